"""What every benchmark is made of: a Question, the Benchmark that asks it, and reading its files.

A benchmark is one object: it reads its official files into questions with their prompts, scores an
answer, adds scores up, and writes what a server or a judge takes. Families of them share a file:
vqa.py, yesno.py, choice.py, maths.py, judged.py; benchmarks.py lists them all.

Legend: K numbers that are counted of a unit, which is what only counts together.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sliming.chat import IMAGE, OPTION_LETTER, SINGLE_WORD
from sliming.evaluation.formats import LETTERS
from sliming.guard import read_text
from sliming.records import RecordError, lines

Image = bytes | tuple[str, ...]  # an encoded image, or the paths it may have in the image folder


@dataclass(frozen=True)
class Question:
    """One question to the model."""

    id: str
    prompt: str
    images: list[Image]
    references: str | list[str] | None  # the gold answer or answers; None where it is not public
    context: dict                       # what scoring it and handing it in need
    source: str = ""                    # its id in a question file that numbers otherwise


class Benchmark:
    """One benchmark, from its files to its numbers. A prompt is the question, its options, then
    `form`, Table 6's response format, on a line of its own; images come before it."""

    name = ""                    # on the command line
    column = ""                  # in the tables (report.py)
    form: str | None = None      # Table 6; None is its "-"
    data = ""                    # the official file(s)
    truth: tuple[str, ...] = ()  # names of a second one, looked for beside it and one folder up
    answer_tokens = 128          # at most
    gold: tuple[type, ...] = (str,)  # what a gold answer is: text, or a list of annotators' answers
    by: tuple[str, ...] = ()     # fields of the context by which accuracy is given, too
    judge = ""                   # who decides, where nothing is scored here
    submission = ""              # ending of the file that a server or judge takes
    decides = "the official server: gold answers are not in the data"  # where nothing is scored
    submits_always = False       # even where answers are scored here

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """The questions of the official file; `truth` is the second one, where there is one."""
        raise NotImplementedError

    def score(self, prediction: str, references: str | list[str], context: dict) -> float:
        """How right one answer is, 0 to 1, by the rule of the benchmark's own program."""
        raise NotImplementedError

    def submit(self, rows: list[dict]) -> object:
        """The content of the file that a server or judge takes, from rows of answers."""
        raise NotImplementedError

    def extracted(self, row: dict) -> str | None:
        """What is scored of an answer; None where it is not scored here."""
        return None if self.judge or row["references"] is None else row["prediction"]

    # Whole-benchmark numbers are functions of sums over units (a question; MMBench's rotations of
    # one), so that the bootstrap can draw units.

    def unit(self, place: int, context: dict) -> tuple[str, object]:
        """(part of the benchmark, unit of it) of the record at `place`."""
        return "", place

    def counts(self, members: list[dict], scores: list[float]) -> tuple[float, ...]:
        """What `totals` needs of one unit [K]: here, right and asked."""
        return scores[0], 1

    def totals(self, sums: dict[str, np.ndarray]) -> dict:
        """The numbers from each part's sums [..., K]; "table": columns, in percent or points."""
        right, n = split(sum(sums.values()))
        accuracy = 100 * ratio(right, n)
        return {"n": n, "correct": right, "acc": accuracy, "table": {self.column: accuracy}}

    def groups(self, context: dict) -> dict[str, object]:
        """{field: value or list of values} by which accuracy is given, too."""
        return {field: context[field] for field in self.by if context.get(field) is not None}

    def parts(self, numbers: dict) -> list[tuple]:
        """(field, part, score, n) of the second table."""
        return [(field, part, value["acc"], value["n"])
                for field, parts in numbers.get("by", {}).items() for part, value in parts.items()]

    def remark(self, asked: int, left_out: int) -> str:
        """What has to be known about the numbers: of `asked` questions, so many are not scored."""
        return ""

    def ask(self, text: str, options: Iterable[str] = (), mark: str = "{}. {}",
            form: str | None = "") -> str:
        """A prompt: text, options and, unless the text ends so already, the response format."""
        text = "\n".join([text, *map(mark.format, LETTERS, options)])
        form = self.form if form == "" else form
        return text if form is None or text.endswith(form) else f"{text}\n{form}"

    def second(self, path: Path, truth: Path | None) -> Path:
        """The second official file, without which this one cannot be scored."""
        if truth is None:
            raise RecordError(f"{path}: the gold answers are in {' or '.join(self.truth)}: "
                              "put it beside this file or name it with --truth")
        return truth

    def llava(self, path: Path, truth: Path | None, own: bool = False) -> Iterator[Question]:
        """The questions of a file of LLaVA's, {question_id, image, text} a line, found in the
        second official file; with their `own` text as prompt, or the one from there."""
        truth = self.second(path, truth)
        finder = Finder(self.read(truth, None))
        for row in load_rows(path):
            number, image, text = need(row, "question_id", "image", "text")
            try:
                found = finder.find(number, text.split("\n")[0], image, row.get("category"))
            except RecordError as error:
                raise RecordError(f"{path}: {error} of {truth}") from error
            yield replace(found, images=[(image, *found.images[0])], source=str(number),
                          prompt=self.ask(text) if own else found.prompt)


class Finder:
    """Finds the question that is meant by LLaVA's fields of it."""

    def __init__(self, questions: Iterable[Question]):
        self.waiting: dict[tuple, list[Question]] = {}
        self.done: set[int] = set()
        for question in questions:
            prompt, part = words(question.prompt), question.context.get("category")
            source = question.source or question.id
            keys = {("id", question.id), ("id", source), ("id, prompt", stem(source), prompt)}
            paths = question.images[0] if question.images else b""
            for name in paths if isinstance(paths, tuple) else ():
                keys |= {("part", part, name, prompt), ("image, prompt", name, prompt)}
            for key in keys:
                self.waiting.setdefault(key, []).append(question)

    def find(self, number: object, prompt: str, image: str | None, part: str | None) -> Question:
        """The question, once; RecordError where none fits, or several of different parts."""
        number, prompt, fit = str(number), words(prompt), 0
        for key in (("part", part, image, prompt), ("id, prompt", stem(number), prompt),
                    ("image, prompt", image, prompt), ("id", number)):
            found = [question for question in self.waiting.get(key, ())
                     if id(question) not in self.done]
            # An id alone is not enough where another file may number other questions so.
            if key[0] == "id" and prompt:
                found = [question for question in found if question.id == number]
            if len({question.context.get("category") for question in found}) == 1:
                self.done.add(id(found[0]))
                return found[0]
            fit = max(fit, len(found))
        raise RecordError(f"{fit} questions fit question {number}" if fit else
                          f"question {number} is not among the questions, or comes twice")


def words(prompt: str) -> str:
    """A prompt without image markers, response formats, case and the length of its blanks."""
    for part in (IMAGE, OPTION_LETTER, SINGLE_WORD, "Please answer yes or no."):
        prompt = prompt.replace(part, "")
    return " ".join(prompt.lower().split())


def stem(number: str) -> str:
    """A question's id, where it is an image's name without its ending."""
    return re.sub(r"\.(jpe?g|png)$", "", number)


def split(sums: np.ndarray) -> list[np.ndarray]:
    """[..., K] -> K arrays."""
    return list(np.moveaxis(sums, -1, 0))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """above / below, 0 where there is nothing to divide by."""
    return np.divide(above, below, out=np.zeros_like(above), where=below != 0)


# -------------------------------------------------------------------------------- reading files


def load(path: Path) -> list | dict:
    """The content of a .json, .jsonl, .tsv or .parquet file, or of a folder of the last (of its
    validation files, where it has them)."""
    if path.is_dir() or path.suffix == ".parquet":
        return load_parquet(path)
    if path.suffix == ".jsonl":
        return [value for _, value in lines(path)]
    try:
        text = read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read as text ({error})") from error
    if path.suffix == ".tsv":
        csv.field_size_limit(sys.maxsize)
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        rows = []
        try:  # POPE's and others' .json are JSON lines
            for _, value in lines(path):
                rows.append(value)
        except RecordError:
            if rows:
                raise
            raise RecordError(f"{path}, line {error.lineno}: broken JSON ({error.msg})") from error
        return rows


def load_parquet(path: Path) -> list[dict]:
    files = [path] if path.is_file() else sorted(path.rglob("validation*.parquet"))
    files = files or sorted(path.rglob("*.parquet"))
    if not files:
        raise RecordError(f"{path}: a folder without .parquet files; name the question file")
    try:
        from pyarrow import parquet  # only for this format, hence not a dependency
    except ImportError as error:
        raise RecordError(f"{path}: reading .parquet needs pyarrow: pip install pyarrow, "
                          "or convert it to .jsonl") from error
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def entries(content: list | dict, path: Path) -> Iterator[tuple[str | int, dict]]:
    """Key or place and value of a list or an object of objects; RecordError for all else."""
    if isinstance(content, dict) and not all(isinstance(row, dict) for row in content.values()):
        content = [content]  # JSON lines of one line
    if not content:
        raise RecordError(f"{path}: no questions in it")
    for key, row in content.items() if isinstance(content, dict) else enumerate(content):
        if not isinstance(row, dict):
            raise RecordError(f"{path}: entry {key + 1} is not an object but {type(row).__name__}")
        yield key, row


def load_rows(path: Path) -> list[dict]:
    """The rows of a file; those of an object of objects have their key as "key"."""
    return [row if isinstance(key, int) else {"key": key, **row}
            for key, row in entries(load(path), path)]


def need(row: dict, *names: str) -> list:
    """Values of a row's fields; RecordError that names the row and the field it lacks."""
    for name in names:
        if row.get(name) is None:
            ids = ("id", "question_id", "index", "pid", "key")
            label = next((f"{key} {row[key]}" for key in ids if key in row), "a row")
            raise RecordError(f"{label}: no `{name}` among {', '.join(map(str, row))}"[:300])
    return [row[name] for name in names]


def number(text: str) -> float | None:
    """The number that a text is."""
    try:
        return float(text)
    except ValueError:
        return None
