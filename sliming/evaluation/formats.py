"""Data sets that are asked as benchmarks and learned from in SMR: one official entry -> Row.

Text stays as the source has it, as answers are scored by it; `as_meant` is for what is shown of
MATH-Vision's. An entry that cannot be used raises RecordError, which names it and the field.
"""

import re
from dataclasses import dataclass

from sliming.records import RecordError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Row:
    """One question with its answer."""

    id: str
    question: str
    options: list[str]   # [] where the answer is free
    answer: str          # the text of the right option, or the free answer
    place: int | None    # of the right option among `options`
    image: str | None    # path inside the data set's folder; None where there is no image

    @property
    def letter(self) -> str:
        """The letter of the right option, "" where the answer is free."""
        return "" if self.place is None else LETTERS[self.place]


def tabmwp(key: object, entry: object) -> Row:
    """TabMWP (lupantech/PromptPG): the answer is an option's text or free."""
    question, answer = texts(key, entry, "question", "answer")
    options = options_of(key, entry, "choices") if entry.get("choices") else []
    if options and answer not in options:
        raise RecordError(f"question {key}: answer {answer!r} is none of {len(options)} options")
    place = options.index(answer) if options else None
    return Row(str(key), question, options, answer, place, f"tables/{key}.png")


def chartqa(key: object, entry: object) -> Row:
    """ChartQA (vis-nlp/ChartQA), named by its place; the image is in the split's folder."""
    question, answer, image = texts(key, entry, "query", "label", "imgname")
    return Row(str(key), question, [], answer, None, f"png/{image}")


def scienceqa(key: object, entry: object) -> Row:
    """ScienceQA (lupantech/ScienceQA): the answer is a place."""
    (question,) = texts(key, entry, "question")
    options = options_of(key, entry, "choices")
    place = place_of(key, entry.get("answer"), options)
    image = entry.get("image")
    image = f"{entry.get('split', 'test')}/{key}/{image}" if image else None
    return Row(str(key), question, options, options[place], place, image)


def math_vision(key: object, entry: object) -> Row:
    """MATH-Vision (mathvision-cuhk/MATH-V), named by its `id`: the answer is a letter or free."""
    key = entry.get("id", key) if isinstance(entry, dict) else key
    question, answer, image = texts(key, entry, "question", "answer", "image")
    options, place = options_of(key, entry, "options") if entry.get("options") else [], None
    if options:
        place = place_of(key, LETTERS.find(answer) if len(answer) == 1 else answer, options)
        answer = options[place]
    return Row(str(key), question, options, answer, place, image)


# LaTeX commands whose names begin with n, which a literal \n may be the beginning of.
N_COMMANDS = ("(?:abla|atural|e|earrow|eg|eq|ewline|exists|geq|i|leq|mid|onumber|ormalsize|ot|otin|"
              "parallel|u|warrow)")


def as_meant(*texts: str) -> list[str]:
    r"""The texts of one of MATH-Vision's problems as they were meant: line breaks for its literal
    \n, and the backslash of a \frac of which its JSON makes a form feed.

    The mark <image1> of its only image goes. Several are captions in its one picture, and so are
    named: image 2.
    """
    lone, made = len(set(re.findall(r"<image\d+>", " ".join(texts)))) == 1, []
    for text in texts:
        # Two backslashes before the n: one of them ends a row of LaTeX.
        text = re.sub(rf"(\\*)\\n(?!{N_COMMANDS}(?![A-Za-z]))",
                      lambda match: "\\\\\n" if match[1] else "\n", text.replace("\f", r"\f"))
        if lone:
            text = re.sub(r"[ \t]*\n?<image\d+>(?=(\w?))", lambda match: " " * len(match[1]), text)
        text = re.sub(r"<image(\d+)>(?=(<?))",
                      lambda match: f"image {match[1]}" + " " * len(match[2]), text)
        made.append(text.strip())
    return made


# ------------------------------------------------------------------------------ fields of an entry


def texts(key: object, entry: object, *names: str) -> list[str]:
    """Fields that must be text, or a number that is taken as such."""
    if not isinstance(entry, dict):
        raise RecordError(f"entry {key} is not an object but {type(entry).__name__}")
    for name in names:
        value = entry.get(name)
        if value is None:
            raise RecordError(f"question {key}: no `{name}` among {', '.join(entry)}"[:300])
        if isinstance(value, bool) or not isinstance(value, (str, int, float)):
            raise RecordError(f"question {key}: `{name}` is {type(value).__name__}, not text")
    return [str(entry[name]) for name in names]


def options_of(key: object, entry: dict, name: str) -> list[str]:
    """A field that must be a list of 1 to 26 options."""
    options = entry.get(name)
    if not isinstance(options, list) or not 1 <= len(options) <= len(LETTERS):
        raise RecordError(f"question {key}: `{name}` must be a list of 1 to 26 options")
    return [str(option) for option in options]


def place_of(key: object, answer: object, options: list[str]) -> int:
    """An answer that must be a place among the options."""
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if not whole or not 0 <= answer < len(options):
        raise RecordError(f"question {key}: answer {answer!r} is none of {len(options)} options")
    return answer
