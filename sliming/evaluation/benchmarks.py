"""All benchmarks by name, their questions, images and submissions."""

import json
from dataclasses import replace
from pathlib import Path

from sliming.evaluation import choice, judged, maths, vqa, yesno
from sliming.evaluation.question import Benchmark, Image, Question
from sliming.records import RecordError, inside

BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in (
    vqa.TextVQA(), vqa.GQA(), vqa.VQAv2(), choice.MMBench(), choice.MMBenchCN(), choice.MMMU(),
    judged.LlavaBench(), yesno.MME(), judged.MMVet(), maths.MathVerse(), maths.MathVista(),
    maths.MathVision(), choice.ScienceQA(), yesno.POPE(), yesno.Amber(), yesno.AmberGenerative(),
    vqa.ChartQA(), maths.TabMWP())}


def find(name: str) -> Benchmark:
    """The benchmark of that name; RecordError where there is none."""
    if name not in BENCHMARKS:
        raise RecordError(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]


def read_questions(name: str, data: Path, truth: Path | None = None) -> list[Question]:
    """All questions of an official file. RecordError, in one line, for anything that does not
    fit."""
    benchmark = find(name)
    if not data.exists():
        raise RecordError(f"{data}: no such file; {name} is read from {benchmark.data}")
    # The second file is looked for beside the first and one folder up.
    near = [folder / file for folder in (data.parent, data.parent.parent)
            for file in benchmark.truth]
    near = [path for path in near if path.exists() and path != data]
    try:
        questions = list(benchmark.read(data, truth or (near[0] if near else None)))
    except RecordError as error:
        raise RecordError(f"{name}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RecordError(f"{name}: {data} does not look like {benchmark.data} "
                          f"({type(error).__name__}: {error})") from error
    # An id met again gets a number, so that answers can be told apart.
    seen, numbered = {}, []
    for question in questions:
        seen[question.id] = again = seen.get(question.id, 0) + 1
        numbered.append(replace(question, id=f"{question.id}#{again}") if again > 1 else question)
    return numbered


def locate(image: Image, folder: Path, question: str) -> bytes | Path:
    """The image itself, or its path in the folder of images. RecordError if it is not there."""
    if isinstance(image, bytes):
        return image
    try:
        paths = [inside(folder, name) for name in image]
    except RecordError as error:
        raise RecordError(f"question {question}: image {error}") from error
    for path in paths:
        if path.is_file():
            return path
    raise RecordError(f"question {question}: no image {' or '.join(image)} in {folder}")


def write_submission(content: object, path: Path) -> None:
    """Writes a submission by its ending: .json, .jsonl (a list) or .xlsx (rows of cells)."""
    if path.suffix == ".xlsx":
        return write_sheet(content, path)
    if path.suffix == ".jsonl":
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
    else:
        text = json.dumps(content, ensure_ascii=False, indent=1) + "\n"
    path.write_text(text, encoding="utf-8")


def write_sheet(rows: list[list], path: Path) -> None:
    try:
        from openpyxl import Workbook  # only for this format, hence an extra
        from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE as FORBIDDEN
    except ImportError as error:
        raise RecordError(f"{path}: writing .xlsx needs openpyxl: pip install 'sliming[eval]' "
                          "or pip install openpyxl, then --score-only") from error
    book = Workbook()
    for row in rows:
        book.active.append(
            [FORBIDDEN.sub("", cell) if isinstance(cell, str) else cell for cell in row])
        for cell in book.active[book.active.max_row]:  # "=1+2" is an answer, not a formula
            cell.data_type = "s" if isinstance(cell.value, str) else cell.data_type
    book.save(path)
