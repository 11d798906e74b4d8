"""How well a checkpoint answers: the built-in held-out questions, a file of records, or the paper's benchmarks.

    python -m sliming.evaluate --checkpoint out/stage3
    python -m sliming.evaluate --checkpoint out/stage3 --data questions.json --images folder
    python -m sliming.evaluate --checkpoint out/stage3 --benchmark mathvision pope --data testmini.jsonl coco \\
        --images MATH-V val2014
    torchrun --nproc_per_node 8 -m sliming.evaluate --benchmark gqa --data testdev_balanced_questions.json --images images
    python -m sliming.evaluate --score-only out/eval/pope.jsonl

The first two count exact matches: an answer counts if greedy decoding would give it to the letter and then stop. That is
decided in one forward pass per batch instead of a generation per question: greedy decoding reproduces an answer exactly if
and only if, with the answer itself as input, every one of its tokens is the most probable one at its place (by induction
over the tokens).

A benchmark (Sec. 3; Tables 1, 2 and 6) is read from its official files (benchmarks.py), answered greedily in batches, and
scored by its own program's rules (metrics.py). Answers are appended to OUT/NAME.jsonl as they come; the same command goes
on where a killed one stopped. Where a judge or a server decides, its file is written instead.

Legend: B samples, V views, A supervised tokens of a batch, C vocabulary.
"""

import argparse
import hashlib
import io
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from sliming.evaluation.benchmarks import BENCHMARKS, Question, locate, read_questions, write_submission
from sliming.chat import IMAGE
from sliming.data import RecordError, RecordFile, load_sample
from sliming.evaluation.metrics import JUDGED, aggregate, bootstrap, mathvista_offline
from sliming.model import Batch, Sample, SliME
from sliming.tiny.held_out import exact, held_out_accuracy, table


@torch.no_grad()
def record_accuracy(model: SliME, records: Sequence[dict], folder: Path) -> dict:
    """Exact match over the answers of LLaVA-format records: {accuracy, n, skipped}; unusable records are skipped."""
    model.eval()
    hits, skipped = [], []
    for index in tqdm(range(len(records)), desc="records", unit="record"):
        try:
            sample = load_sample(records[index], folder, model.config.template, model)
        except RecordError as error:
            skipped.append(str(error))
            continue
        batch = Batch.pack([sample]).to(model.adapter.w_gate.device)
        hits += exact(batch, model(batch).logits)
    if not hits:
        raise RecordError(f"no usable record; the first was skipped because: {skipped[0]}")
    return {"accuracy": sum(hits) / len(hits), "n": len(hits), "skipped": len(skipped)}


# ------------------------------------------------------------------------------------------------------------ answering

def answer_batch(model: SliME, samples: list[Sample], max_new_tokens: int) -> list[str]:
    """The greedy answers to samples, the same as one by one."""
    return [model.tokenizer.decode(ids).strip() for ids in model.generate_batch(samples, max_new_tokens=max_new_tokens)]


def prepare(model: SliME, question: Question, folder: Path) -> Sample:
    """A question, images first, ready for the model. Raises RecordError for a missing or broken image."""
    images = [locate(image, folder, question.id) for image in question.images]
    turn = {"from": "human", "value": f"{IMAGE}\n" * len(images) + question.prompt.replace(IMAGE, "")}
    try:
        return model.prompt([turn], [io.BytesIO(image) if isinstance(image, bytes) else image for image in images])
    except (ValueError, OSError) as error:
        raise RecordError(f"question {question.id}: {error}") from error


# --------------------------------------------------------------------------------------------------- the file of answers

HEADER_START = b'{"benchmark": "'


def fingerprint(questions: list[Question]) -> str:
    """Says which questions a file of answers belongs to: ids and prompts, in order."""
    return hashlib.sha256(json.dumps([(q.id, q.prompt) for q in questions]).encode()).hexdigest()[:16]


def weights_key(checkpoint: str) -> str:
    """Tells the weights in a local folder apart from others put there later: a hash of its files' names, sizes, and first and
    last megabytes; empty for a hub id."""
    digest = hashlib.sha256()
    files = sorted(path for path in Path(checkpoint).rglob("*") if path.suffix in (".safetensors", ".bin", ".pt"))
    for path in files:
        digest.update(f"{path.relative_to(checkpoint)} {path.stat().st_size} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, path.stat().st_size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest()[:16] if files else ""


def read_answers(path: Path) -> tuple[dict, list[dict]]:
    """Header and rows of a file of answers. A last line that a killed run left torn is left out, its question is asked again.

    Raises RecordError for a file that is none and for a line that is broken further up.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    rows = []
    for number, line in enumerate(lines[:-1], 1):  # what follows the last line break is nothing, or torn
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise RecordError(f"{path}, line {number}: broken JSON; remove the line, its question is asked again") from error
    if not rows and HEADER_START.startswith(lines[0][:len(HEADER_START)]):
        return {}, []  # empty, or torn in its first line
    header = rows[0] if rows and isinstance(rows[0], dict) else {}
    if not {"benchmark", "questions", "key", "checkpoint", "weights"} <= set(header):
        raise RecordError(f"{path}: not a file of answers: its first line names no benchmark and checkpoint")
    for number, row in enumerate(rows[1:], 2):
        if not isinstance(row, dict) or not {"id", "prediction", "references", "context"} <= set(row):
            raise RecordError(f"{path}, line {number}: not an answer with id, prediction, references and context")
    return header, rows[1:]


def check_header(path: Path, found: dict, wanted: dict) -> None:
    """RecordError unless a file of answers is that of this benchmark, these questions and this checkpoint."""
    for name, what in (("benchmark", f"another benchmark, {found['benchmark']}, not {wanted['benchmark']}"),
                       ("key", "other questions (--data)"),
                       ("checkpoint", f"another checkpoint, {found['checkpoint']}, not {wanted['checkpoint']}"),
                       ("weights", "other weights, which were in the checkpoint's folder before")):
        if found[name] != wanted[name]:
            raise RecordError(f"{path} holds answers of {what}; choose another --out or move it away")


def answer_benchmark(model: SliME, name: str, questions: list[Question], images: Path, out: Path, header: dict,
                     done: dict[str, dict], batch_size: int, rank: int = 0, world: int = 1) -> None:
    """Answers what is not in `done` {id: row} yet and appends it to this rank's file, batch by batch."""
    todo = [question for question in questions if question.id not in done][rank::world]
    path = answers_file(out, name, rank)
    rows, shown = list(done.values()), 0.0

    def read(start: int) -> list[Sample]:
        return [prepare(model, question, images) for question in todo[start:start + batch_size]]

    with open(path, "a", encoding="utf-8") as file, ThreadPoolExecutor(1) as reader, \
            tqdm(total=len(todo), desc=name, unit="question", disable=rank > 0 or not todo,
                 mininterval=1 if sys.stderr.isatty() else 10) as bar:
        if file.tell() == 0:
            file.write(json.dumps(header) + "\n")
            file.flush()
        coming = reader.submit(read, 0)
        for start in range(0, len(todo), batch_size):
            samples = coming.result()
            coming = reader.submit(read, start + batch_size)  # while the model answers
            said = answer_batch(model, samples, BENCHMARKS[name].answer_tokens)
            for question, text in zip(todo[start:start + batch_size], said):
                rows.append({"id": question.id, "prompt": question.prompt, "prediction": text,
                             "references": question.references, "context": question.context})
                file.write(json.dumps(rows[-1], ensure_ascii=False) + "\n")
            file.flush()
            if rank == 0 and start + len(said) >= shown:  # a hundred times in all: scoring everything anew costs a little
                columns = score_rows(name, rows)[1]
                bar.set_postfix_str(" ".join(f"{column} {value:.1f}" for column, value in columns.items()), refresh=False)
                shown = start + len(said) + len(todo) / 100
            bar.update(len(said))


def answers_file(out: Path, name: str, rank: int) -> Path:
    return out / (f"{name}.jsonl" if rank == 0 else f"{name}.rank{rank}.jsonl")


def collect(out: Path, name: str, questions: list[Question], header: dict) -> dict[str, dict]:
    """What earlier runs, on any number of ranks, have answered, {id: row}, put into the one file, in the questions' order."""
    files = [path for path in [answers_file(out, name, 0), *sorted(out.glob(f"{name}.rank*.jsonl"))] if path.exists()]
    done = {}
    for path in files:
        found, rows = read_answers(path)
        if found:
            check_header(path, found, header)
        done.update({row["id"]: row for row in rows})
    done = {question.id: done[question.id] for question in questions if question.id in done}
    new = out / f".{name}.new"
    new.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in [header, *done.values()]), encoding="utf-8")
    os.replace(new, answers_file(out, name, 0))
    for path in out.glob(f"{name}.rank*.jsonl"):
        path.unlink()
    return done


# ------------------------------------------------------------------------------------------------------------- the scores

TABLE_COLUMNS = ["VQA-T", "GQA", "VQAv2", "MMB", "MMB-C", "MMMU-v", "LLaVA-W", "MME-P", "MME-C", "MM-Vet",       # Table 1
                 "MathVerse", "MathVista", "MathVision", "ScienceQA", "POPE", "AMBER", "MME-H",                  # Table 2
                 "ChartQA", "TabMWP"]                                                                            # in neither
PAPER = {  # Tables 1 and 2, "Ours"; the LoRA row is the one marked with a dagger
    "SliME-7B": [64.39, 63.13, 80.32, 69.32, 61.85, 37.20, 76.10, 1544, 383, 35.40,
                 17.50, 37.50, 16.12, 76.80, 85.40, 87.80, 633],
    "SliME-8B": [64.76, 63.94, 80.69, 75.00, 71.80, 41.20, 73.90, 1578, 337, 37.40,
                 22.90, 43.30, 16.78, 84.18, 86.00, 88.90, 671],
    "SliME-8B LoRA": [65.26, 63.94, 80.79, 75.42, 70.96, 40.80, 64.90, 1573, 346, 36.80,
                      21.80, 43.60, 16.12, 84.13, 86.00, 90.10, 645],
    "SliME-13B": [66.11, 63.60, 80.43, 71.13, 65.20, 38.00, 73.10, 1606, 293, 41.20,
                  19.00, 40.80, 18.09, 80.17, 86.30, 89.40, 673],
}


def scorable(name: str, rows: list[dict]) -> list[dict]:
    """The rows that can be scored here, with what counts as their prediction."""
    if name in JUDGED:
        return []
    rows = [row for row in rows if row["references"] is not None]
    if name != "mathvista":
        return rows
    return [{**row, "prediction": mathvista_offline(row["prediction"], row["context"]) or ""} for row in rows]


def score_rows(name: str, rows: list[dict]) -> tuple[dict, dict[str, float]]:
    """All numbers of a benchmark and its columns of the paper's tables; both empty where nothing can be scored here."""
    rows = scorable(name, rows)
    numbers = aggregate(name, rows) if rows else {"table": {}}
    if name == "mathvista" and rows:
        numbers["n_needs_judge"] = sum(row["prediction"] == "" for row in rows)
    return numbers, numbers["table"]


def judge(name: str, rows: list[dict], asked: int, out: Path) -> dict:
    """The result of a benchmark for the table; prints what has to be known about it and writes its submission file."""
    numbers, columns = score_rows(name, rows)
    interval = bootstrap(name, scorable(name, rows)) if columns else {}
    if len(rows) < asked:
        print(f"{name}: {len(rows)} of {asked} questions are answered", file=sys.stderr)
    if name == "mathvision" and asked > 304:
        print("mathvision: the paper's numbers are those of testmini, its 304 questions", file=sys.stderr)
    if name == "mathverse" or numbers.get("n_needs_judge"):
        print(f"{name}: scored are only answers of exactly the form asked for; the paper's numbers need a language model to "
              "extract the others", file=sys.stderr)
    benchmark = BENCHMARKS[name]
    if benchmark.submit and (not columns or name in ("mathvista", "mathverse")):
        path = out / f"{name}_submission{benchmark.submission}"
        write_submission(benchmark.submit(rows), path)
        who = JUDGED.get(name) or ("the official extraction and judge" if columns else "the official server: gold answers are "
                                   "not in the data")
        print(f"{name}: decided by {who}; the answers for it are in {path}", file=sys.stderr)
    return {"n": len(rows), "of": asked, "numbers": numbers,
            "columns": {column: [value, *interval[column]] for column, value in columns.items()}}


def markdown(results: dict[str, dict], ours: str) -> str:
    """A table in Markdown: the paper's SliME rows and, below, ours with its 95 % bootstrap intervals."""
    found = {column: values for result in results.values() for column, values in result["columns"].items()}
    columns = [column for column in TABLE_COLUMNS if column in found]
    lines = ["| model | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for model, row in PAPER.items():
        paper = dict(zip(TABLE_COLUMNS, row))
        lines.append(f"| {model} (paper) | " + " | ".join(f"{paper[c]:g}" if c in paper else "" for c in columns) + " |")
    cells = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in (found[column] for column in columns)]
    return "\n".join([*lines, f"| {ours} | " + " | ".join(cells) + " |"])


def plot(results: dict[str, dict], ours: str, path: Path) -> None:
    """The same as bars, at most seven benchmarks in a row, MME's points in a row of their own."""
    import matplotlib.pyplot as plt  # only here: it takes a second to load

    found = {column: values for result in results.values() for column, values in result["columns"].items()}
    percent = [column for column in TABLE_COLUMNS if column in found and not column.startswith("MME-")]
    points = [column for column in TABLE_COLUMNS if column in found and column.startswith("MME-")]
    rows = [("percent", percent[start:start + 7]) for start in range(0, len(percent), 7)]
    rows += [("points", points)] if points else []
    longest = max(len(columns) for _, columns in rows)
    figure, panels = plt.subplots(len(rows), 1, squeeze=False, layout="constrained",
                                  figsize=(max(8, 1.6 * longest), 0.6 + 3 * len(rows)))
    width = 0.8 / (len(PAPER) + 1)
    for panel, (unit, columns) in zip(panels[:, 0], rows):
        for place, (model, row) in enumerate([*PAPER.items(), (ours, None)]):
            paper = dict(zip(TABLE_COLUMNS, row or []))
            at = [index + (place - len(PAPER) / 2) * width for index in range(len(columns))]
            heights = [found[c][0] if row is None else paper.get(c, float("nan")) for c in columns]
            panel.bar(at, heights, width * 0.92, color="tab:orange" if row is None else plt.cm.Blues(0.35 + 0.15 * place),
                      label=ours if row is None else f"{model} (paper)")
            tops = heights
            if row is None:
                tops = [max(found[c][0], found[c][2]) for c in columns]
                errors = [[max(0, found[c][0] - found[c][1]) for c in columns], [t - h for t, h in zip(tops, heights)]]
                panel.errorbar(at, heights, errors, fmt="none", ecolor="black", elinewidth=1, capsize=2)
            for x, top, height in zip(at, tops, heights):
                if height == height:  # the paper has no such number: NaN
                    panel.annotate(f"{height:.0f}", (x, top), xytext=(0, 2), textcoords="offset points", ha="center",
                                   fontsize=7)
        panel.set_xticks(range(len(columns)), columns)
        panel.set_xlim(-0.6, (len(columns) if unit == "points" else longest) - 0.4)
        panel.set_ylabel(unit)
        panel.margins(y=0.1)
        panel.spines[["top", "right"]].set_visible(False)
    bars, names = panels[0, 0].get_legend_handles_labels()
    names = [name if len(name) <= 24 else f"...{name[-21:]}" for name in names]  # a long path would push the others out
    figure.legend(bars, names, loc="outside upper center", ncols=len(PAPER) + 1, frameon=False,
                  fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(results: dict[str, dict], ours: str, weights: str, out: Path) -> None:
    """Writes results.json, results.md and results.png into `out` and prints the table. A benchmark scored into the same
    folder earlier, for the same weights, stays in them."""
    path, model = out / "results.json", {"model": ours, "weights": weights}
    try:
        before = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise RecordError(f"{path}: broken JSON; move it away, the answers beside it are kept") from error
    results = {**(before["results"] if {key: before.get(key) for key in model} == model else {}), **results}
    path.write_text(json.dumps({**model, "results": results}, indent=2) + "\n")
    if any(result["columns"] for result in results.values()):
        (out / "results.md").write_text(markdown(results, ours) + "\n")
        plot(results, ours, out / "results.png")
        print(markdown(results, ours))
        print(f"wrote {path}, results.md and results.png", file=sys.stderr)


# ------------------------------------------------------------------------------------------------------------ command line

def evaluate_benchmarks(arguments: argparse.Namespace) -> None:
    """Answers and scores --benchmark NAME ..., each with its --data, --images and --truth, on every rank of torchrun."""
    names, data = arguments.benchmark, arguments.data or []
    images, truths = arguments.images, arguments.truth or [None] * len(names)
    if len(data) != len(names):
        raise RecordError(f"{len(names)} benchmarks need as many --data files, not {len(data)}")
    images = images * len(names) if len(images) == 1 else images
    if len(images) != len(names) or len(truths) != len(names):
        raise RecordError(f"{len(names)} benchmarks need one --images folder for all, or one each, and a --truth each or none")
    asked = {}
    for name, file, truth in zip(names, data, truths):
        asked[name] = read_questions(name, Path(file), Path(truth) if truth and truth != "-" else None)
    if len(asked) != len(names):
        raise RecordError("a benchmark is named twice; give its parts their own --out")

    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1:  # only to wait for each other: a file of answers per rank, on a disk that all can reach
        dist.init_process_group("gloo", timeout=timedelta(days=7))

    def wait() -> None:
        if world > 1:
            dist.barrier()

    out, model, results = arguments.out, None, {}
    out.mkdir(parents=True, exist_ok=True)
    for name, folder in zip(names, images):
        header = {"benchmark": name, "questions": len(asked[name]), "key": fingerprint(asked[name]),
                  "checkpoint": arguments.checkpoint, "weights": weights_key(arguments.checkpoint)}
        if rank == 0:
            collect(out, name, asked[name], header)
        wait()
        done = {row["id"]: row for row in read_answers(answers_file(out, name, 0))[1]}
        wait()  # until all have read, before anyone appends
        if len(done) < len(asked[name]):
            if model is None:
                model = SliME.from_pretrained(arguments.checkpoint, dtype=choose_dtype(arguments.dtype, device)).to(device)
            if done and rank == 0:
                print(f"{name}: {len(done)} of {len(asked[name])} questions are answered already", file=sys.stderr)
            answer_benchmark(model, name, asked[name], folder, out, header, done, arguments.batch_size, rank, world)
        wait()
        if rank == 0:
            rows = list(collect(out, name, asked[name], header).values())
            results[name] = judge(name, rows, len(asked[name]), out)
    if rank == 0:
        report(results, arguments.checkpoint, weights_key(arguments.checkpoint), out)
    wait()


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def score_only(arguments: argparse.Namespace) -> None:
    """Scores files of answers, complete or not, without a model."""
    results, checkpoints = {}, set()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for place, file in enumerate(arguments.score_only):
        header, rows = read_answers(Path(file))
        if not rows:
            raise RecordError(f"{file}: no answers in it")
        name = header["benchmark"]
        if name not in BENCHMARKS:
            raise RecordError(f"{file}: answers of an unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
        if arguments.benchmark and name not in arguments.benchmark:
            raise RecordError(f"{file}: answers of another benchmark, {name}, not {' or '.join(arguments.benchmark)}")
        results[name] = judge(name, list({row["id"]: row for row in rows}.values()), header["questions"], arguments.out)
        checkpoints.add((header["checkpoint"], header["weights"]))
    if len(checkpoints) > 1 or len(results) < len(arguments.score_only):
        raise RecordError("--score-only takes answers of one checkpoint, one file per benchmark")
    report(results, *checkpoints.pop(), arguments.out)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sliming.evaluate", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default="out/stage3", help="folder or hub id (default: %(default)s)")
    parser.add_argument("--benchmark", nargs="+", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="each benchmark's official question file or, without "
                        "--benchmark, LLaVA-format JSON or JSONL; without either, the built-in held-out questions")
    parser.add_argument("--images", type=Path, nargs="+", default=[Path(".")], metavar="FOLDER",
                        help="folder of the images that --data names, for all benchmarks or for each")
    parser.add_argument("--truth", nargs="+", metavar="FILE", help="official file of gold answers, for each benchmark, - for "
                        "none (default: looked for beside --data)")
    parser.add_argument("--out", type=Path, default=Path("out/eval"), help="answers and results (default: %(default)s)")
    parser.add_argument("--score-only", nargs="+", metavar="ANSWERS", help="score files of answers that --out holds already")
    parser.add_argument("--batch-size", type=int, default=8, help="questions answered together (default: 8)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="of the model (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--questions", type=int, default=512, help="built-in questions of each family (default: 512)")
    parser.add_argument("--across-seams", action="store_true", help="let printed labels lie across the seams of crops")
    arguments = parser.parse_args()
    if arguments.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    try:
        if arguments.score_only:
            score_only(arguments)
        elif arguments.benchmark:
            evaluate_benchmarks(arguments)
        elif arguments.data:
            if len(arguments.data) > 1 or len(arguments.images) > 1:
                parser.error("several --data files or --images folders need their --benchmark names")
            model = SliME.from_pretrained(arguments.checkpoint)
            print(json.dumps(record_accuracy(model, RecordFile(arguments.data[0]), arguments.images[0])))
        else:
            model = SliME.from_pretrained(arguments.checkpoint)
            print(table(held_out_accuracy(model, arguments.questions, across_seams=arguments.across_seams)))
    except (ValueError, OSError) as error:  # RecordError and CheckpointError among them
        sys.exit(f"sliming.evaluate: {' '.join(str(error).split())}")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
