"""Files of answers: ours, which a killed run goes on with, and other programs'.

Ours is JSONL: a header that names benchmark, questions and checkpoint, then a row per answer with
all that scoring it needs. Other programs write LLaVA's form, {"question_id": ..., "text": ...} a
line; its lines find their questions in the benchmark's own files, by id, image and prompt.
"""

import hashlib
import json
import os
from pathlib import Path

from sliming.checkpoints.files import weights_key
from sliming.evaluation.benchmarks import find, read_questions
from sliming.evaluation.question import Finder, Question
from sliming.records import RecordError, lines, resume

HEADER = {"benchmark", "questions", "key", "checkpoint", "weights"}

# ------------------------------------------------------------------------------------------ ours


def answers_file(out: Path, name: str, rank: int = 0) -> Path:
    return out / (f"{name}.jsonl" if rank == 0 else f"{name}.rank{rank}.jsonl")


def header_of(name: str, questions: list[Question], checkpoint: str) -> dict:
    """What a file of answers remembers: benchmark, questions (ids and prompts), weights."""
    asked = json.dumps([(question.id, question.prompt) for question in questions])
    key = hashlib.sha256(asked.encode()).hexdigest()[:16]
    return {"benchmark": name, "questions": len(questions), "key": key, "checkpoint": checkpoint,
            "weights": weights_key(checkpoint)}


def read_answers(path: Path) -> tuple[dict, list[dict]]:
    """Header and rows of a file of ours; {} where not even the header is whole."""
    try:
        header, *rows = resume(path) or [{}]
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    if header and not HEADER <= set(header):
        raise no_answers(path)
    for number, row in enumerate(rows, 2):
        if not {"id", "prediction", "references", "context"} <= set(row):
            raise RecordError(f"{path}, line {number}: not an answer with id, prediction, "
                              "references and context")
    return header, rows


def check_header(path: Path, found: dict, wanted: dict) -> None:
    """RecordError unless a file has answers of this benchmark, these questions and weights."""
    for name, what in (
            ("benchmark", f"another benchmark, {found['benchmark']}, not {wanted['benchmark']}"),
            ("key", "other questions (--data)"),
            ("checkpoint", f"another checkpoint, {found['checkpoint']}, "
                           f"not {wanted['checkpoint']}"),
            ("weights", "other weights, which were in the checkpoint's folder before")):
        if found[name] != wanted[name]:
            raise RecordError(f"{path} holds answers of {what}; choose another --out or move it "
                              "away")


def collect(out: Path, name: str, questions: list[Question], header: dict) -> dict[str, dict]:
    """What earlier runs, on any number of ranks, have answered, {id: row}, put into the one file,
    in the questions' order."""
    ranks, done = sorted(out.glob(f"{name}.rank*.jsonl")), {}
    for path in [answers_file(out, name), *ranks]:
        if path.exists():
            found, rows = read_answers(path)
            if found:
                check_header(path, found, header)
            done.update({row["id"]: row for row in rows})
    done = {question.id: done[question.id] for question in questions if question.id in done}
    new = out / f".{name}.new"
    with open(new, "w", encoding="utf-8", errors="backslashreplace") as file:
        for row in [header, *done.values()]:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(new, answers_file(out, name))
    for path in ranks:
        path.unlink()
    return done


# ------------------------------------------------------------------------------- other programs'


def no_answers(path: Path) -> RecordError:
    return RecordError(f"{path}: not a file of answers: its first line has neither benchmark and "
                       "checkpoint (ours) nor question_id and text (LLaVA's)")


def is_llavas(path: Path) -> bool:
    """Are these answers in LLaVA's form (or a judge's reviews), not ours? RecordError for what is
    neither, before anything mends its last line."""
    _, first = next(lines(path), (0, {}))
    fields = set(first) if isinstance(first, dict) else {""}
    llavas = "question_id" in fields and bool({"text", "content"} & fields)
    if fields and not llavas and not HEADER <= fields:
        raise no_answers(path)
    return llavas


def imported(name: str, files: list[Path], data: Path | None,
             truth: Path | None) -> tuple[dict, list[dict]]:
    """Header and rows, as ours, of LLaVA-style answers to a benchmark read from `data`; without it
    each line has to hold its own gold `answer`. A judge's reviews are taken, too."""
    benchmark, rows, models = find(name), [], set()
    questions = read_questions(name, data, truth) if data else []
    finder = Finder(questions)
    for path in files:
        for number, line in lines(path):
            try:
                if not isinstance(line, dict) or "question_id" not in line:
                    raise RecordError("no question_id in it")
                if hasattr(benchmark, "review") and "content" in line:
                    row = benchmark.review(line)
                elif not isinstance(line.get("text"), str):
                    raise RecordError("no `text` in it, the answer")
                elif data:
                    found = finder.find(line["question_id"], line.get("prompt") or "",
                                        line.get("image"), line.get("category"))
                    row = {"id": found.id, "prompt": found.prompt, "prediction": line["text"],
                           "references": found.references, "context": found.context}
                elif "answer" in line:
                    row = {"id": str(line["question_id"]), "prediction": line["text"],
                           "references": line["answer"], "context": line}
                else:
                    raise RecordError("no gold `answer` in it: name the benchmark's own file "
                                      "with --data")
            except RecordError as error:
                raise RecordError(f"{path}, line {number}: {error}") from error
            rows.append(row)
            models.add(line.get("model_id") or path.stem)
    header = {"benchmark": name, "questions": len(questions) or len(rows), "weights": "",
              "checkpoint": ", ".join(sorted(models))}
    return header, rows
