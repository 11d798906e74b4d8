"""What a candidate must pass to become a record of SMR: readable text, reasoning that ends in the
given answer, an image that shows something and belongs to the text, and no place in an evaluation
set. These are the filters that Sec. 2.4 names, as far as a rule can tell.

Differences from the paper: README.md beside this.

Legend: H, W image height and width in pixels.
"""

import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from sliming.chat import IMAGE, OPTION_LETTER, SINGLE_WORD
from sliming.evaluation.formats import LETTERS
from sliming.evaluation.latex import arithmetic
from sliming.guard import open_file
from sliming.images import open_image
from sliming.records import RecordError, elements, lines
from sliming.smr.candidates import Candidate, Drop

REASONS = {
    "malformed": "the record does not have its source's form",
    "empty": "question or answer without text",
    "jumbled": "text that no one can read: wrong encoding, control characters, runs of one "
               "character, hardly a letter",
    "reasoning": "reasoning that does not end in the given answer, or ends in another option",
    "missing image": "no such image file",
    "broken image": "the image cannot be decoded",
    "blank image": "the image has one colour",
    "blurred image": "no edge of the image is sharp",
    "unrelated": "image and text do not belong together: size, room for the text, the answer's "
                 "box, or names disagree",
    "duplicate": "the same image, question and answer as an earlier record",
    "excluded image": "the image is in an evaluation set",
    "excluded look": "the question is in an evaluation set, with an image like this",
    "excluded answer": "question and answer are in an evaluation set, whose image is not there",
    "excluded question": "the question is in an evaluation set that has neither image nor answer",
}
# 500 real images have SHARP_PIXELS (see `sharp_pixels`) at 1.1 times the contrast and more, and
# after a Gaussian blur of 2.5 pixels at 0.29 times and less.
SHARP = 0.3          # of the contrast
SHARP_PIXELS = 32
SMALL_EDGE = 16      # pixels: a smaller image shows nothing
ROW = 15             # pixels of a printed line, at least; TabMWP's 300 samples have 20 to 41
ALIKE = 6            # bits of 64 by which the thumbnails of two prints of one image may differ
TAIL = 240           # characters at the end of a reasoning in which its answer must stand

# ------------------------------------------------------------------------------------------- text


def jumbled(text: str) -> str:
    """Why nobody can read `text`; "" if one can."""
    control = r"[\ufffd\ue000-\uf8ff\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
    if match := re.search(control, text):
        return f"character U+{ord(match[0]):04X}"
    if match := re.search(r"[ÃÂ][\u0080-\u00bf]|â€|ï»¿", text):
        return f"wrong encoding ({match[0]!r})"
    if match := re.search(r"([^\s0._\-=*~#…\\])\1{14,}|[A-Za-z]{81,}", text):
        return f"a run of characters ({match[0][:12]}...)"
    solid = re.sub(r"[\s_.\-…]", "", text)  # blanks to fill in are no jumble
    if len(solid) >= 20 and sum(map(str.isalnum, solid)) < 0.25 * len(solid):
        return "hardly a letter or digit"
    return ""


def hash64(data: bytes | str) -> int:
    data = data.encode(errors="backslashreplace") if isinstance(data, str) else data
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# A letter that is concluded with; "the answer is A dog" has an article.
CONCLUSION = (r"(?:answer is|answer:|故选)\s*[:：]?\s*(?:option\s*)?\(?([A-H])"
              r"(?=\s*(?:[.):,;。，]|$))")
BRACED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"
UNIT = r"(?: ?(?!and |or )[a-zA-Z]+ ?\d?)?"


def plain(text: str) -> str:
    """Text with fractions as a/b, without LaTeX's markup, thousands separators, needless space."""
    text = re.sub(r"\\[dt]?frac\s*" + BRACED + r"\s*" + BRACED, r"\1/\2", text)
    text = re.sub(r"\\(sqrt|pi|angle|triangle)", r" \1", text)
    text = re.sub(r"\\[A-Za-z]+|[\\${}~^]", " ", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+", " ", text).strip()


def stands_in(answer: str, tail: str) -> bool:
    """Is `answer` (both `plain`) in `tail` as a word or number of its own? A number by its value,
    with or without its unit; one letter by its case."""
    if number := re.fullmatch(r"-?(\d+(?:\.\d+)?)" + UNIT, answer):
        said = re.findall(r"(?<![\d.])(?<!\d/)\d+(?:\.\d+)?(?!\d)(?!\s*/\s*\d)", tail)
        words = re.findall("[a-z]+", tail.lower())
        said += [NUMBER_WORDS.index(word) for word in words if word in NUMBER_WORDS]
        said += [int(a) / int(b) for a, b in re.findall(r"\b(\d+)\s*/\s*([1-9]\d*)\b", tail)]
        return any(float(text) == float(number[1]) for text in said)
    characters = answer.rstrip(".").replace(" ", "")
    pattern = r"\s*".join(map(re.escape, characters))
    whole = rf"(?<![^\W_])(?<!\d[./]){pattern}(?![^\W_])(?!\s*/\s*\d)"
    flags = 0 if re.fullmatch("[A-Z]", answer) else re.IGNORECASE
    return bool(pattern) and re.search(whole, tail, flags) is not None


def value(formula: str) -> float | None:
    """What LaTeX (or plain) arithmetic comes to, its unit aside; None for anything else."""
    formula = re.sub(r"\\(?:mathrm|text|mbox)\s*\{[^{}]*\}(?:\^\{?\d\}?)?", "", formula)  # units
    formula = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|\\[,;!]|~", "", formula)
    formula = re.sub(r"(\d+)\s*(\\[dt]?frac\s*\{\d+\}\s*\{\d+\})", r"(\1+\2)", formula)  # 1 1/2
    if boxed := re.search(r"\\f?box(?:ed)?" + BRACED, formula):
        formula = boxed[1]
    try:
        return float(arithmetic(formula.strip(" $").rstrip(" $.,")))
    except (ValueError, OverflowError):
        return None


def comes_to(gold: str, reasoning: str) -> bool:
    """Has one of the formulas near the end of `reasoning` the value of `gold`? 5/2 is 2.5."""
    wanted = value(gold)
    if wanted is None:
        return False
    for formula in re.finditer(r"\$+([^$]+)\$+", reasoning):
        result = value(re.split(r"=|\\approx|\\\\|&", formula[1])[-1])
        near = formula.end() > len(reasoning) - TAIL
        if near and result is not None and math.isclose(wanted, result, abs_tol=1e-9):
            return True
    return False


def conclude(candidate: Candidate) -> tuple[str, str]:
    """(answer, reason against it): the reasoning, closed with its answer where it has not that.

    Reasoning must have the gold answer among its last characters, or a formula of its value. Over
    options it may have none of them (`yes` and `no` are rarely spelled out), but not another one,
    unless it rules out all three or more of them, or gold stands for others ("all of these"). A
    letter that it concludes with must be the gold one.
    """
    answer, gold = candidate.answer.rstrip(), candidate.gold
    solution = re.split(r"[(\[]Alternatively\b", answer)[0]  # a second one, behind the answer
    tail = plain(solution)[-TAIL:]
    closed = f"{answer}\n{candidate.closing}"
    if candidate.letter and (said := re.findall(CONCLUSION, tail)):
        if said[-1] != candidate.letter:
            return "", f"it concludes with {said[-1]}, the answer is {candidate.letter}"
        return answer, ""
    if stands_in(plain(gold), tail) or comes_to(gold, solution):
        return closed if candidate.always or gold not in answer[-TAIL:] else answer, ""
    if not candidate.letter:
        return "", f"the answer {gold[:60]!r} is not at its end"
    named = [text for text in candidate.others if stands_in(plain(text), tail)
             and text.lower() not in ("yes", "no", "true", "false")]
    ruled_out = len(named) == len(candidate.others) > 2
    if not named or ruled_out or re.match(r"(?:all|any|both|either)\b", gold.lower()):
        return closed, ""
    return "", f"it ends in {named[0][:60]!r}, the answer is {gold[:60]!r}"


def judge_text(item: Candidate | Drop) -> tuple[str, Drop | None]:
    """The final answer, or why the text is not good enough."""
    if isinstance(item, Drop):
        return "", item
    reason, detail, answer = "", "", item.answer
    if not item.question or not answer.strip():
        reason, detail = "empty", "no answer" if item.question else "no question"
    elif IMAGE in item.prompt or IMAGE in answer:
        reason, detail = "jumbled", f"the text holds {IMAGE}"
    elif detail := jumbled(item.prompt) or jumbled(answer):
        reason = "jumbled"
    elif item.closing:
        answer, detail = conclude(item)
        reason = "reasoning" if detail else ""
    return answer, Drop(item.id, reason, detail, str(item.image or "")) if reason else None


# ----------------------------------------------------------------------------------------- images


@dataclass(frozen=True)
class Look:
    """What the check of an image found: `reason` is "" if nothing is wrong with it."""

    reason: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)   # W, H
    pixels: int = 0                  # 64-bit hash of the RGB values
    thumbnail: int = 0               # 64 bits: is a cell of 9 x 8 brighter than its left neighbour?


def sharp_pixels(grey: Image.Image) -> int:
    """How many pixels of a grey image [H, W] lie at a sharp edge: 8-neighbour Laplacian of at least
    SHARP times the contrast C. (An edge between two pixels has up to 3 C, one blurred with a
    Gaussian of s pixels 0.7 C / s^2. No share is taken: a drawing may be a few lines on a sheet.)
    """
    low, high = grey.getextrema()
    laplacian = np.asarray(grey.filter(ImageFilter.FIND_EDGES))[1:-1, 1:-1]  # [H-2, W-2], 0 to 255
    return int(np.count_nonzero(laplacian >= math.ceil(SHARP * (high - low))))


def look_at(path: str) -> Look:
    """Decodes an image once and judges it."""
    try:
        image = open_image(path)
    except FileNotFoundError:
        return Look("missing image", path)
    except ValueError as error:
        return Look("broken image", str(error))
    if min(image.size) < SMALL_EDGE:
        return Look("blank image", f"{image.width} x {image.height} pixels")
    grey = image.convert("L")
    low, high = grey.getextrema()
    if high - low < 8:
        return Look("blank image", f"grey values {low} to {high}")
    if (sharp := sharp_pixels(grey)) < SHARP_PIXELS:
        return Look("blurred image", f"{sharp} pixels at a sharp edge, {SHARP_PIXELS} are needed")
    cells = np.asarray(grey.resize((9, 8), Image.Resampling.BOX), dtype=np.int16)  # [8, 9]
    bits = np.packbits(cells[:, 1:] > cells[:, :-1])
    return Look("", "", image.size, hash64(image.tobytes()), int.from_bytes(bits.tobytes(), "big"))


def unrelated(candidate: Candidate, look: Look) -> str:
    """Why the candidate's text is not about this image, as far as a rule can tell; "" if nothing
    speaks against it."""
    width, height = look.size
    if candidate.mismatch:
        return candidate.mismatch
    if candidate.size and tuple(candidate.size) != look.size:
        stated = " x ".join(map(str, candidate.size))
        return f"the record is of an image of {stated} pixels, this has {width} x {height}"
    if candidate.rows * ROW > height:
        return f"a table of {candidate.rows} rows in {height} pixels"
    if candidate.box:
        x, y, w, h = candidate.box
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            return (f"the answer's box {list(candidate.box)} is not in the image of {width} x "
                    f"{height} pixels")
    return ""


# -------------------------------------------------------------------------------- evaluation sets


@dataclass(frozen=True)
class Asked:
    """A question of an evaluation set: what is known of its image and its answer."""

    thumbnail: int | None   # None where the image is not there
    answer: str             # of the right option the text; "" where none is given
    file: str


@dataclass
class Excluded:
    """The images and questions of evaluation sets: what training data must not hold."""

    images: dict[int, str] = field(default_factory=dict)             # pixel hash -> file
    questions: dict[int, list[Asked]] = field(default_factory=dict)  # by `question_key`
    said: list[str] = field(default_factory=list)                    # what was found, a line a file

    def add(self, path: Path) -> None:
        """Reads a JSON or JSONL file of questions, and those images that it names and that are
        there. RecordError where no question is found."""
        look_once, count, named, found = cache(look_at), 0, 0, 0
        for entry in entries_of(path):
            question, answer = asked_in(entry)
            name = text_in(entry, "image", "imgname", "img_path")
            if not question:
                continue
            image = find_image(path.parent, name)
            count, named, found = count + 1, named + bool(name), found + bool(image)
            look = look_once(str(image)) if image else Look()
            if look.pixels:
                self.images[look.pixels] = path.name
            asked = Asked(look.thumbnail if look.pixels else None, answer, path.name)
            known = self.questions.setdefault(question_key(question), [])
            if asked not in known:
                known.append(asked)
        if not count:
            raise RecordError(f"{path}: no record with a question in it; --exclude takes JSON or "
                              "JSONL of questions")
        rest = f"; without it a question counts as the same where its answer is ({count - found:,})"
        self.said.append(f"{path}: {count:,} questions, {found:,} of {named:,} images found"
                         + rest * (found < count))

    def holds(self, candidate: Candidate, look: Look | None) -> tuple[str, str]:
        """(reason, detail) where an evaluation set has this image or this question."""
        if look and look.pixels in self.images:
            return "excluded image", f"the image is in {self.images[look.pixels]}"
        key = question_key(candidate.question)
        for asked in self.questions.get(key, ()) if key else ():
            detail = f"the question is in {asked.file}"
            if asked.thumbnail is not None:
                if look and (asked.thumbnail ^ look.thumbnail).bit_count() <= ALIKE:
                    return "excluded look", f"{detail}, with an image like this"
            elif not asked.answer:
                return "excluded question", f"{detail}, which has neither its image nor its answer"
            elif same_answer(candidate, asked.answer):
                return "excluded answer", f"{detail}, with this answer"
        return "", ""


def entries_of(path: Path) -> Iterator[dict]:
    """The records of a JSONL file (POPE's are called .json), or of a JSON list or object."""
    try:
        with open_file(path) as file:
            one_a_line = path.suffix == ".jsonl" or re.match(rb"\s*\{.*\}\s*\n\{", file.read(4096))
    except OSError as error:
        raise RecordError(f"{path}: cannot be read ({error.strerror})") from error
    for _, record, *_ in lines(path) if one_a_line else elements(path):
        for entry in record if isinstance(record, list) else [record]:
            if isinstance(entry, dict):
                yield entry


def text_in(entry: object, *names: str) -> str:
    """The first of these fields that is text or a number; "" if none is."""
    values = map(entry.get, names) if isinstance(entry, dict) else ()
    return next((str(value) for value in values if isinstance(value, (str, int, float))), "")


def asked_in(entry: dict) -> tuple[str, str]:
    """(question, answer) of an evaluation record: the right option's text, else the answer as it
    is given; "" where there is none."""
    turns, options = entry.get("conversations"), entry.get("choices") or entry.get("options")
    if isinstance(turns, list):
        asked, said, *_ = [*(text_in(turn, "value") for turn in turns[:2]), "", ""]
        return asked, said
    answer = text_in(entry, "answer", "label")
    if isinstance(options, list):
        digit = answer.isdigit() and isinstance(entry.get("answer"), int)  # ScienceQA's is a place
        place = int(answer) if digit else LETTERS.find(answer) if len(answer) == 1 else -1
        answer = str(options[place]) if 0 <= place < len(options) else answer
    return text_in(entry, "question", "query_wo", "query", "text", "problem_text"), answer


def find_image(folder: Path, name: str) -> Path | None:
    """The image that a file in `folder` names, where benchmarks have theirs."""
    bases = (folder, folder / "images", folder.parent, folder.parent / "images", folder / "png")
    if not 0 < len(name) < 256 or "\0" in name:
        return None
    return next((base / name for base in bases if (base / name).is_file()), None)


def question_key(question: str) -> int:
    """64 bits of a question without image marks, case, punctuation and the instructions of Table 6;
    0 if nothing is left."""
    text = re.sub(r"<image\s*\d*>|\\n", " ", question)  # MATH-Vision writes line breaks so
    text = text.replace(SINGLE_WORD, " ").replace(OPTION_LETTER, " ")
    text = " ".join(re.findall(r"\w+", text.lower()))
    return hash64(text) if text else 0


def same_answer(candidate: Candidate, answer: str) -> bool:
    """Is `answer` the candidate's, by letter, text or value?"""
    if candidate.letter and re.fullmatch(r"\(?[A-Z]\)?\.?", answer.strip()):
        return answer.strip("(). ") == candidate.letter
    a, b = plain(candidate.gold).lower().rstrip("."), plain(answer).lower().rstrip(".")
    wanted = value(candidate.gold)
    return a == b or (wanted is not None and wanted == value(answer))
