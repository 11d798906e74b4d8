"""How well a checkpoint answers: held-out questions, a file of records, or the paper's benchmarks.

    python -m sliming.evaluation --checkpoint out/stage3
    python -m sliming.evaluation --checkpoint out/stage3 --data questions.json --images folder
    torchrun --nproc_per_node 8 -m sliming.evaluation --benchmark mathvision pope \\
        --data testmini.jsonl coco --images MATH-V val2014
    python -m sliming.evaluation --score-only out/eval/pope.jsonl
    python -m sliming.evaluation --score-only answers.jsonl --benchmark pope --data coco

The first two count exact matches: an answer counts if greedy decoding would give it to the letter
and then stop. A benchmark (Sec. 3; Tables 1, 2 and 6) is read from its official files, answered
greedily in batches, and scored by its own program's rules. Answers are appended to OUT/NAME.jsonl
as they come; the same command goes on where a killed one stopped. Where a judge or a server
decides, its file is written instead. The last command scores another program's answers.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from sliming.chat import IMAGE, without_markers
from sliming.config import BATCH, COUNT, Parser
from sliming.data import load_sample, open_records
from sliming.distributed import barrier, choose_dtype, is_main, rank_and_world, rank_device, reduce
from sliming.evaluation import answers
from sliming.evaluation.benchmarks import BENCHMARKS, find, locate, read_questions
from sliming.evaluation.question import Question
from sliming.evaluation.report import columns_of, report, result, say
from sliming.generate import exact_match
from sliming.guard import naming, one_line, only_one
from sliming.inputs import Batch, Sample
from sliming.model import SliME
from sliming.records import RecordError
from sliming.tiny.held_out import held_out_accuracy, table

# --------------------------------------------------------------------------- a file of records


@torch.no_grad()
def record_accuracy(model: SliME, records: Sequence[dict], folder: Path, batch_size: int) -> dict:
    """Exact match over the answers of LLaVA-format records: {accuracy, n, skipped}, of all ranks
    together; unusable records are skipped."""
    model.eval()
    rank, world = rank_and_world()
    mine, right, n, skipped = range(rank, len(records), world), 0, 0, []
    for start in tqdm(range(0, len(mine), batch_size), desc="records", unit="batch",
                      disable=rank > 0):
        samples = []
        for index in mine[start:start + batch_size]:
            try:
                samples.append(load_sample(records[index], folder, model.config.template,
                                           model.processor))
            except RecordError as error:
                skipped.append(str(error))
        if samples:
            batch = Batch.pack(samples).to(model.device)
            hits = exact_match(batch, model(batch).logits)
            right, n = right + sum(hits), n + len(hits)
    right, n, missed = map(int, reduce([right, n, len(skipped)], torch.device("cpu")))
    if n == 0:
        reason = f"; the first was skipped because: {skipped[0]}" if skipped else ""
        raise RecordError(f"no usable record{reason}")
    return {"accuracy": right / n, "n": n, "skipped": missed}


# ------------------------------------------------------------------------------------ answering


def to_sample(model: SliME, question: Question, folder: Path) -> Sample:
    """A question, images first, ready for the model. RecordError for a missing or broken image."""
    images = [locate(image, folder, question.id) for image in question.images]
    images = [io.BytesIO(image) if isinstance(image, bytes) else image for image in images]
    text = f"{IMAGE}\n" * len(images) + without_markers(question.prompt)
    try:
        return model.processor.prompt([{"from": "human", "value": text}], images)
    except (ValueError, OSError) as error:
        raise RecordError(f"question {question.id}: {error}") from error


def answer_benchmark(model: SliME, name: str, questions: list[Question], images: Path, out: Path,
                     header: dict, done: dict[str, dict], batch_size: int) -> None:
    """Answers what is not in `done` {id: row} yet, batch by batch, into this rank's file."""
    rank, world = rank_and_world()
    todo = [question for question in questions if question.id not in done][rank::world]
    rows, shown = list(done.values()), 0.0

    path = answers.answers_file(out, name, rank)
    with naming(path), open(path, "a", encoding="utf-8", errors="backslashreplace") as file, \
            tqdm(total=len(todo), desc=name, unit="question", disable=rank > 0 or not todo,
                 mininterval=1 if sys.stderr.isatty() else 10) as bar:
        if file.tell() == 0:
            file.write(json.dumps(header) + "\n")
            file.flush()
        for said in model.answer_all(todo, lambda question: to_sample(model, question, images),
                                     batch_size, max_new_tokens=find(name).answer_tokens):
            for question, text in said:
                rows.append({"id": question.id, "prompt": question.prompt, "prediction": text,
                             "references": question.references, "context": question.context})
                file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            file.flush()
            # Scoring everything anew costs a little: a hundred times in all.
            bar.update(len(said))
            if rank == 0 and bar.n >= shown:
                columns = columns_of(name, rows).items()
                bar.set_postfix_str(" ".join(f"{column} {value:.1f}" for column, value in columns),
                                    refresh=False)
                shown = bar.n + len(todo) / 100


# ---------------------------------------------------------------------------------- command line


def load_model(arguments: argparse.Namespace) -> SliME:
    device = rank_device()
    dtype = choose_dtype(arguments.dtype, device)
    return SliME.from_pretrained(arguments.checkpoint, dtype=dtype).to(device)


def one_each(arguments: argparse.Namespace) -> list[tuple[str, Path, Path, Path | None]]:
    """(benchmark, --data, --images, --truth) of every benchmark that is asked."""
    names, data, images = arguments.benchmark, arguments.data or [], arguments.images
    truths = arguments.truth or ["-"] * len(names)
    if len(data) != len(names):
        raise RecordError(f"{len(names)} benchmarks need as many --data files, not {len(data)}")
    images = images * len(names) if len(images) == 1 else images
    if len(images) != len(names) or len(truths) != len(names):
        raise RecordError(f"{len(names)} benchmarks need one --images folder for all, or one each, "
                          "and a --truth each or none")
    if len(set(names)) != len(names):
        raise RecordError("a benchmark is named twice; give its parts their own --out")
    return [(name, Path(file), folder, None if truth == "-" else Path(truth))
            for name, file, folder, truth in zip(names, data, images, truths, strict=True)]


def evaluate_benchmarks(arguments: argparse.Namespace) -> None:
    """Answers and scores --benchmark NAME ... on every rank; the first one reports."""
    out, model, results = arguments.out, None, {}
    asked = [(name, read_questions(name, data, truth), images)
             for name, data, images, truth in one_each(arguments)]
    out.mkdir(parents=True, exist_ok=True)
    with only_one(out) if is_main() else nullcontext():
        for name, questions, images in asked:
            header = answers.header_of(name, questions, arguments.checkpoint)
            if is_main():
                answers.collect(out, name, questions, header)
            barrier()
            file = answers.answers_file(out, name)
            done = {row["id"]: row for row in answers.read_answers(file)[1]}
            barrier()  # until all have read, before anyone appends
            if len(done) < len(questions):
                if done and is_main():
                    say(f"{name}: {len(done)} of {len(questions)} questions are answered already")
                model = model or load_model(arguments)
                answer_benchmark(model, name, questions, images, out, header, done,
                                 arguments.batch_size)
            barrier()
            if is_main():
                rows = list(answers.collect(out, name, questions, header).values())
                results[name] = result(name, rows, len(questions), out)
        if is_main():
            report(results, header["checkpoint"], header["weights"], out)
        barrier()


def score_only(arguments: argparse.Namespace) -> None:
    """Scores files of answers, complete or not, without a model."""
    files, names = [Path(file) for file in arguments.score_only], arguments.benchmark or []
    results, models = {}, set()
    arguments.out.mkdir(parents=True, exist_ok=True)
    llavas = [answers.is_llavas(file) for file in files]
    if any(llavas):
        few = len(arguments.data or []) <= 1 and len(arguments.truth or []) <= 1
        if not all(llavas) or len(names) != 1 or not few:
            raise RecordError("answers in LLaVA's form need the one --benchmark that they answer, "
                              "at most one --data and --truth, and no file of ours beside them")
        (data,), (truth,) = ([Path(file) for file in given or []] or [None]
                             for given in (arguments.data, arguments.truth))
        found = [(files[0], *answers.imported(names[0], files, data, truth))]
    else:
        found = [(file, *answers.read_answers(file)) for file in files]
    for file, header, rows in found:
        if not rows:
            raise RecordError(f"{file}: no answers in it")
        name = header["benchmark"]
        find(name)
        if names and name not in names:
            raise RecordError(f"{file}: answers of another benchmark, {name}, not "
                              f"{' or '.join(names)}")
        rows = list({row["id"]: row for row in rows}.values())
        results[name] = result(name, rows, header["questions"], arguments.out)
        models.add((header["checkpoint"], header["weights"]))
    if len(models) > 1 or len(results) < len(found):
        raise RecordError("--score-only takes answers of one checkpoint, one file per benchmark")
    report(results, *models.pop(), arguments.out)


def parse_arguments() -> argparse.Namespace:
    parser = Parser(prog="python -m sliming.evaluation", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", default="out/stage3", help="folder or hub id (default: %(default)s)")
    add("--benchmark", nargs="+", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    add("--data", nargs="+", metavar="FILE", help="each benchmark's official question file or, "
        "without --benchmark, records as train.py takes them; without either, held-out questions")
    add("--images", type=Path, nargs="+", default=[Path(".")], metavar="FOLDER",
        help="folder of the images that --data names, for all benchmarks or for each")
    add("--truth", nargs="+", metavar="FILE", help="official file of gold answers, for each "
        "benchmark, - for none (default: looked for beside --data)")
    add("--out", type=Path, default=Path("out/eval"),
        help="answers and results (default: %(default)s)")
    add("--score-only", nargs="+", metavar="ANSWERS", help="score files of answers, ours or, with "
        "--benchmark and --data, LLaVA's {question_id, text} a line")
    add("--batch-size", type=BATCH, default=8, help="questions answered together (default: 8)")
    add("--dtype", choices=("float32", "bfloat16", "float16"),
        help="of the model (default: bfloat16 on a GPU, else float32)")
    add("--questions", type=COUNT, default=512,
        help="held-out questions of each family (default: 512)")
    add("--across-seams", action="store_true",
        help="let printed labels lie across the seams of crops")
    arguments = parser.parse_args()
    alone = not arguments.benchmark and not arguments.score_only
    if alone and (len(arguments.data or []) > 1 or len(arguments.images) > 1):
        parser.error("several --data files or --images folders need their --benchmark names")
    return arguments


@one_line("sliming.evaluation", resumes=True)
def main() -> None:
    arguments = parse_arguments()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not arguments.score_only:
        # Only to wait for each other and to add up: gloo, whatever the model runs on.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    try:
        if arguments.score_only:
            score_only(arguments)
        elif arguments.benchmark:
            evaluate_benchmarks(arguments)
        else:
            model = load_model(arguments)
            if arguments.data:
                records = open_records(arguments.data[0])
                text = json.dumps(record_accuracy(model, records, arguments.images[0],
                                                  arguments.batch_size))
            else:
                rank, world = rank_and_world()
                text = table(held_out_accuracy(model, arguments.questions, "both",
                                               arguments.across_seams, rank=rank, world=world))
            if is_main():
                print(text)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()

