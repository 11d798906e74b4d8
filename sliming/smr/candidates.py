"""A question on its way into SMR: what a reader makes of a record, and the filters judge.

Legend: letters A, B, ... name options in their order; gold: the answer that the source gives.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sliming.chat import OPTION_LETTER, SINGLE_WORD
from sliming.evaluation.formats import LETTERS, texts
from sliming.guard import open_file
from sliming.records import RecordError, parse


@dataclass(frozen=True)
class Candidate:
    """One question before the filters. `image` is a file; None for a text-only question."""

    id: str
    image: Path | None
    question: str                   # as the source has it, without options
    prompt: str                     # what the model is asked
    answer: str                     # what it should say
    gold: str = ""                  # the right option's text, or the free answer
    letter: str = ""                # the right option's letter, where there are options
    others: tuple[str, ...] = ()    # the texts of the other options
    closing: str = ""               # makes `answer` reasoning: the sentence that spells gold out
    always: bool = False            # add `closing` even where the reasoning has gold itself
    size: tuple[int, int] | None = None            # width, height that the source states
    rows: int = 0                                  # lines of text that the image has room for
    box: tuple[float, ...] = ()     # x, y, width, height that must lie in the image
    mismatch: str = ""              # why image and text do not belong together, if it shows here


@dataclass(frozen=True)
class Drop:
    """A record that is not built: `reason` is one of filters.REASONS, `detail` one line."""

    id: str
    reason: str
    detail: str
    image: str = ""


@dataclass
class Selection:
    """What is taken of a source; `passed_over` counts what is not, by the reason."""

    splits: tuple[str, ...] = ()    # () = the source's own training splits
    seed: int = 0                   # of DVQA's choice and of Table 5's prompts
    count: int = 100_000            # DVQA: how many reasoning questions
    machine: bool = False           # ChartQA: machine-written questions too
    text_only: bool = False         # ScienceQA: questions without an image too
    passed_over: Counter = field(default_factory=Counter)


Found = Iterator[Candidate | Drop]

# ------------------------------------------------------------------------- records and their fields


def guarded(name: str, make: Callable[..., Candidate], *arguments: object) -> Candidate | Drop:
    """`make(*arguments)`, or a Drop that says what is missing or wrong in the record."""
    try:
        for argument in arguments:
            if isinstance(argument, RecordError):
                raise argument  # its line or file could not be read
        return make(*arguments)
    except KeyError as error:
        return Drop(name, "malformed", f"no field {error.args[0]!r}")
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        return Drop(name, "malformed", (str(error) or type(error).__name__).splitlines()[0])


def rows(path: Path) -> Iterator[tuple[int, object]]:
    """Line number and value of a JSONL file; a broken line's value is its RecordError."""
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, parse(line, path, number)
                    except RecordError as error:
                        yield number, error
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error


def load(path: Path) -> object:
    """A small JSON file; what is wrong with it is returned, for `guarded`."""
    try:
        return parse(path.read_bytes(), path, 1)
    except RecordError as error:
        return error
    except OSError as error:
        return RecordError(f"{path}: cannot be read ({error.strerror})")


def stripped(name: str, entry: object, *keys: str) -> list[str]:
    """Fields that must be text, or a number that is taken as such."""
    return [text.strip() for text in texts(name, entry, *keys)]


def options_of(given: object) -> list[str]:
    """At least two options, without letters of their own if all have one: "A) red" is "red"."""
    if not isinstance(given, list) or not 2 <= len(given) <= len(LETTERS):
        raise RecordError(f"options must be a list of 2 to 26 texts, not {str(given)[:60]!r}")
    options = [str(text).strip() for text in given]
    matches = [re.match(rf"\(?{LETTERS[at]}\s*[).:]\s*(.*)", text, re.DOTALL)
               for at, text in enumerate(options)]
    return [match[1].strip() for match in matches] if all(matches) else options


def lettered(options: list[str], form: str = "{}. {}") -> str:
    return "".join("\n" + line for line in map(form.format, LETTERS, options))


def right(options: list[str], place: int | None) -> dict:
    """A Candidate's fields about its options."""
    if place is None:
        return {}
    return {"gold": options[place], "letter": LETTERS[place],
            "others": tuple(options[:place] + options[place + 1:])}


def choice(name: str, image: Path | None, question: str, options: list[str], place: int,
           before: str = "", **more: object) -> Candidate:
    """A question that is answered with an option's letter; `before` it stands what helps."""
    prompt = before + question + lettered(options) + "\n" + OPTION_LETTER
    return Candidate(name, image, question, prompt, LETTERS[place],
                     **right(options, place), **more)


def word(name: str, image: Path, question: str, answer: str, **more: object) -> Candidate:
    """A question that is answered with a word or a number."""
    prompt = question + "\n" + SINGLE_WORD
    return Candidate(name, image, question, prompt, answer, gold=answer, **more)
