"""SMR, the paper's training set of science and mathematical reasoning, from its public sources (Sec. 2.4, Appendix B).

    python -m sliming.smr build SOURCE RAW_FOLDER --out smr.jsonl [--exclude FILE ...]      one source after the other
    python -m sliming.smr stats smr.jsonl [--plot smr.png]                                 Figure 4, and the paper's counts

`build` appends the source's records in LLaVA's format, image paths relative to --root (the folder above RAW_FOLDER), and
writes each record that it drops, with the reason, to smr.dropped.jsonl. Ids that the file already has are left as they are,
so a build that was cut short goes on where it was, and the result is that of one which was not. It does not depend on the
number of workers either.

The filters are those that Sec. 2.4 names, as far as a rule can tell; REASONS lists them. Two things differ from the paper:
reasoning that does not reach the given answer is dropped (the paper had GPT-4V write it anew), and reasoning over options
which spells out none of them is closed with a sentence that names the given one.

Legend: H, W image height and width in pixels.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from sliming.chat import IMAGE
from sliming.data import check_record
from sliming.images import open_image
from sliming.smr.sources import (OPTION_LETTER, SINGLE_WORD, SOURCES, Candidate, Drop, Selection, SourceError, check_folder,
                                 stream_json, stream_lines)

REASONS = {
    "malformed": "the record does not have its source's form",
    "empty": "question or answer without text",
    "jumbled": "text that no one can read: wrong encoding, control characters, runs of one character, hardly a letter",
    "reasoning": "reasoning that does not end in the given answer, or ends in another option",
    "missing image": "no such image file",
    "broken image": "the image cannot be decoded",
    "blank image": "the image has one colour",
    "blurred image": "no edge of the image is sharp",
    "unrelated": "image and text do not belong together: size, room for the text, the answer's box, or names disagree",
    "duplicate": "the same image, question and answer as an earlier record",
    "evaluation": "the image, or the question with an image like it, is in an excluded evaluation set",
}
SHARP = 0.3          # of the contrast, see `sharp_pixels`: 500 real images have SHARP_PIXELS at 1.1 times the contrast and
SHARP_PIXELS = 32    # more, and after a Gaussian blur of 2.5 pixels at 0.29 times and less
SMALL_EDGE = 16      # pixels: a smaller image shows nothing
ROW = 15             # pixels that a printed line needs at least; TabMWP's 300 samples have 20 to 41 a line
ALIKE = 6            # bits of 64 by which the thumbnails of two prints of one image may differ
TAIL = 240           # characters at the end of a reasoning in which its answer must stand
CHUNK = 64           # candidates that a worker judges at a time
REMEMBERED = 8192    # images whose check is kept: questions about one image stand close together
PERCENTILE = 99      # Figure 4 draws the interval in which this share of the records lies


# Text


def jumbled(text: str) -> str:
    """Why nobody can read `text`; "" if one can."""
    if match := re.search(r"[\ufffd\ue000-\uf8ff\ud800-\udfff\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", text):
        return f"character U+{ord(match[0]):04X}"
    if match := re.search(r"[ÃÂ][\u0080-\u00bf]|â€|ï»¿", text):
        return f"wrong encoding ({match[0]!r})"
    if match := re.search(r"([^\s0._\-=*~#…\\])\1{14,}|[A-Za-z]{81,}", text):
        return f"a run of characters ({match[0][:12]}...)"
    solid = re.sub(r"[\s_.\-…]", "", text)  # blanks to fill in are no jumble
    if len(solid) >= 20 and sum(map(str.isalnum, solid)) < 0.25 * len(solid):
        return "hardly a letter or digit"
    return ""


def question_key(question: str) -> int:
    """64 bits of a question without image marks, case, punctuation and the instructions of Table 6; 0 if nothing is left."""
    text = re.sub(r"<image\s*\d*>", " ", question)
    for instruction in (SINGLE_WORD, OPTION_LETTER):
        text = text.replace(instruction.strip(), " ")
    text = " ".join(re.findall(r"\w+", text.lower()))
    return hash64(text.encode()) if text else 0


def hash64(data: bytes) -> int:
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big")


NUMBER_WORDS = "zero one two three four five six seven eight nine ten eleven twelve".split()
# A letter that is concluded with; "the answer is A dog" has an article.
CONCLUSION = r"(?:answer is|answer:|故选)\s*[:：]?\s*(?:option\s*)?\(?([A-H])(?=\s*(?:[.):,;。，]|$))"
BRACED = r"\{((?:[^{}]|\{[^{}]*\})*)\}"


def plain(text: str) -> str:
    """Text with fractions as a/b and without LaTeX's markup, thousands separators and needless space."""
    text = re.sub(r"\\[dt]?frac\s*" + BRACED + r"\s*" + BRACED, r"\1/\2", text)
    text = re.sub(r"\\(sqrt|pi|angle|triangle)", r" \1", text)
    text = re.sub(r"\\[A-Za-z]+|[\\${}~^]", " ", text)
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    return re.sub(r"\s+", " ", text).strip()


def stands_in(answer: str, tail: str) -> bool:
    """Is `answer` (both `plain`) in `tail` as a word or number of its own? A number by its value, one letter by its case."""
    if number := re.fullmatch(r"-?(\d+(?:\.\d+)?)(?: ?[a-zA-Z]+ ?\d?)?", answer):  # with or without its unit
        said = re.findall(r"(?<![\d.])(?<!\d/)\d+(?:\.\d+)?(?!\d)(?!\s*/\s*\d)", tail)
        said += [str(NUMBER_WORDS.index(word)) for word in re.findall("[a-z]+", tail.lower()) if word in NUMBER_WORDS]
        return any(float(text) == float(number[1]) for text in said)
    pattern = r"\s*".join(re.escape(character) for character in answer.rstrip(".") if not character.isspace())
    flags = 0 if re.fullmatch("[A-Z]", answer) else re.IGNORECASE
    return bool(pattern) and re.search(rf"(?<![^\W_])(?<!\d[./]){pattern}(?![^\W_])(?!\s*/\s*\d)", tail, flags) is not None


def conclude(candidate: Candidate) -> tuple[str, str]:
    """(answer, reason against it): the reasoning, closed with its answer where it does not spell that out.

    The reasoning must have the gold answer among its last characters. Over options it may have none of them (`yes` and `no` are
    rarely spelled out), but not another one, and a letter that it concludes with must be the gold one.
    """
    answer, gold, tail = candidate.answer.rstrip(), plain(candidate.gold), plain(candidate.answer)[-TAIL:]
    closed = f"{answer}\n{candidate.closing}"
    if candidate.letter and (said := re.findall(CONCLUSION, tail)):
        if said[-1] != candidate.letter:
            return "", f"it concludes with {said[-1]}, the answer is {candidate.letter}"
        return answer, ""
    if stands_in(gold, tail):
        return closed if candidate.always or candidate.gold not in answer[-TAIL:] else answer, ""
    if not candidate.letter:
        return "", f"the answer {candidate.gold[:60]!r} is not at its end"
    for text in candidate.others:
        if text.lower() not in ("yes", "no", "true", "false") and stands_in(plain(text), tail):
            return "", f"it ends in {text[:60]!r}, the answer is {candidate.gold[:60]!r}"
    return closed, ""


# Images


@dataclass(frozen=True)
class Look:
    """What the check of an image found: `reason` is "" if nothing is wrong with it."""

    reason: str = ""
    detail: str = ""
    size: tuple[int, int] = (0, 0)   # W, H
    pixels: int = 0                  # 64-bit hash of the RGB values
    thumbnail: int = 0               # 64 bits: is a cell of a 9 x 8 thumbnail brighter than its left neighbour?


def sharp_pixels(grey: Image.Image) -> int:
    """How many pixels of a grey image [H, W] lie at a sharp edge: 8-neighbour Laplacian of at least SHARP times the contrast.

    An edge of contrast C between two pixels has a Laplacian of up to 3 C, one blurred with a Gaussian of s pixels 0.7 C / s^2.
    It is their number that counts, not their share: a drawing may be a few lines on a large sheet.
    """
    low, high = grey.getextrema()
    pixels = np.asarray(grey).astype(np.int16)                   # [H, W]
    rows = pixels[:, :-2] + pixels[:, 1:-1] + pixels[:, 2:]      # [H, W-2]
    laplacian = 9 * pixels[1:-1, 1:-1] - rows[:-2] - rows[1:-1] - rows[2:]  # [H-2, W-2]
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
    """Why the candidate's text is not about this image, as far as a rule can tell; "" if nothing speaks against it."""
    width, height = look.size
    if candidate.mismatch:
        return candidate.mismatch
    if candidate.size and tuple(candidate.size) != look.size:
        return f"the record is of an image of {candidate.size[0]} x {candidate.size[1]} pixels, this has {width} x {height}"
    if candidate.rows * ROW > height:
        return f"a table of {candidate.rows} rows in {height} pixels"
    if candidate.box:
        x, y, w, h = candidate.box
        if x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
            return f"the answer's box {list(candidate.box)} is not in the image of {width} x {height} pixels"
    return ""


# Evaluation sets


@dataclass
class Excluded:
    """The images and questions of evaluation sets: what training data must not hold.

    `images`: pixel hash -> file. `questions`: question key -> (thumbnail or None where the image is not there, file) ...
    """

    images: dict[int, str] = field(default_factory=dict)
    questions: dict[int, list[tuple[int | None, str]]] = field(default_factory=dict)

    def add(self, path: Path) -> int:
        """Reads a JSON or JSONL file of questions and the images it names, as far as they are there; returns how many."""
        with open(path, encoding="utf-8-sig") as file:
            first = file.read(4096).lstrip()
        lines = path.suffix == ".jsonl" or (first.startswith("{") and "\n{" in first)
        looks: dict[Path, Look | None] = {}
        count = 0
        for _, record in stream_lines(path) if lines else stream_json(path):
            for entry in record if isinstance(record, list) else [record]:
                if not isinstance(entry, dict):
                    continue
                turns = entry.get("conversations")
                question = turns[0].get("value") if turns else next(
                    (entry[key] for key in ("question", "query_wo", "query", "text") if isinstance(entry.get(key), str)), None)
                if not question:
                    continue
                count += 1
                name = next((entry[key] for key in ("image", "imgname", "img_path") if isinstance(entry.get(key), str)), None)
                places = [base / name for base in (path.parent, path.parent / "images", path.parent.parent,
                                                   path.parent.parent / "images", path.parent / "png")] if name else []
                image = next((place for place in places if len(name) < 512 and place.is_file()), None)
                if image not in looks:
                    looks[image] = look_at(str(image)) if image else None
                look = looks[image]
                if look and look.pixels:
                    self.images[look.pixels] = path.name
                if key := question_key(question):
                    entries = self.questions.setdefault(key, [])
                    thumbnail = (look.thumbnail if look and look.pixels else None, path.name)
                    if thumbnail not in entries:
                        entries.append(thumbnail)
        if not count:
            raise SourceError(f"{path}: no record with a question in it; --exclude takes JSON or JSONL of questions")
        return count

    def holds(self, candidate: Candidate, look: Look | None) -> str:
        """Which evaluation set has this image, or this question with such an image or with one that is not there."""
        if look and look.pixels in self.images:
            return f"the image is in {self.images[look.pixels]}"
        for thumbnail, name in self.questions.get(question_key(candidate.question), ()):
            if thumbnail is None or (look is not None and (thumbnail ^ look.thumbnail).bit_count() <= ALIKE):
                return f"the question is in {name}" + ("" if thumbnail is None else ", with an image like this")
        return ""


# Building


def judge_texts(candidates: list[Candidate | Drop]) -> list[tuple[str, Drop | None]]:
    """Per candidate the final answer, or why its text is not good enough."""
    results: list[tuple[str, Drop | None]] = []
    for item in candidates:
        if isinstance(item, Drop):
            results.append(("", item))
            continue
        reason, detail, answer = "", "", item.answer
        if not item.question or not answer.strip():
            reason, detail = "empty", "no question" if not item.question else "no answer"
        elif IMAGE in item.prompt or IMAGE in answer:
            reason, detail = "jumbled", f"the text holds {IMAGE}"
        elif trouble := jumbled(item.prompt) or jumbled(answer):
            reason, detail = "jumbled", trouble
        elif item.gold:
            answer, detail = conclude(item)
            reason = "reasoning" if detail else ""
        results.append((answer, Drop(item.id, reason, detail, str(item.image or "")) if reason else None))
    return results


def judge(candidates: list[Candidate | Drop], images: list[str]) -> tuple[list[tuple[str, Drop | None]], dict[str, Look]]:
    """A worker's job: the texts of a chunk, and those of its images that no chunk before had."""
    return judge_texts(candidates), {image: look_at(image) for image in images}


def end_with_parent() -> None:
    """A worker ends when the process that started it does, also one that was killed."""
    def wait() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


Judged = tuple[Candidate | Drop, str, Drop | None, Look | None]  # with its final answer, why it is dropped, and its image


def judged(candidates: Iterable[Candidate | Drop], workers: int) -> Iterator[Judged]:
    """(candidate, answer, drop, look) in the order of `candidates`, judged by `workers` processes (1: in this one).

    Only a few chunks are under way at any time, and an image that many questions share is looked at once.
    """
    def resolve(chunk: list, future: Future | tuple) -> Iterator[Judged]:
        texts, new = future.result() if isinstance(future, Future) else future
        looks.update(new)
        for item, (answer, drop) in zip(chunk, texts):
            yield item, answer, drop, looks[str(item.image)] if isinstance(item, Candidate) and item.image else None
        while len(looks) > limit:
            known.discard(looks.popitem(last=False)[0])

    ahead = 3 * workers  # chunks under way
    limit = REMEMBERED + 2 * CHUNK * (ahead + 2)  # what the chunks under way may need is never among the oldest
    items, looks, known, waiting = iter(candidates), OrderedDict(), set(), deque()
    with ProcessPoolExecutor(workers, initializer=end_with_parent) if workers > 1 else nullcontext() as pool:
        while chunk := list(islice(items, CHUNK)):
            names = dict.fromkeys(str(item.image) for item in chunk if isinstance(item, Candidate) and item.image)
            for name in names:
                if name in looks:
                    looks.move_to_end(name)  # it will be wanted when this chunk is resolved
            fresh = [name for name in names if name not in known]
            known.update(fresh)
            waiting.append((chunk, pool.submit(judge, chunk, fresh) if isinstance(pool, Executor) else judge(chunk, fresh)))
            if len(waiting) > ahead:
                yield from resolve(*waiting.popleft())
        while waiting:
            yield from resolve(*waiting.popleft())


def append_to(path: Path) -> Iterator[tuple[dict, str]]:
    """(record, line) of each record that a JSONL file has; a last line that was cut short is taken off."""
    good = 0
    if path.exists():
        with open(path, "r+b") as file:
            for line in file:
                try:
                    record = json.loads(line)
                    name = record["id"] if line.endswith(b"\n") else None
                except (ValueError, KeyError, TypeError) as error:
                    if line.endswith(b"\n"):
                        raise SourceError(f"{path}: not a file that this command builds (a line without an id)") from error
                    name = None
                if name is None:
                    break
                good += len(line)
                yield record, line.decode()
            file.truncate(good)


def record_of(candidate: Candidate, answer: str, root: Path) -> dict:
    """LLaVA's format; the image's path relative to `root`."""
    mark, image = "", {}
    if candidate.image:
        mark, image = f"{IMAGE}\n", {"image": candidate.image.relative_to(root).as_posix()}
    record = {"id": candidate.id, **image, "conversations": [
        {"from": "human", "value": mark + candidate.prompt}, {"from": "gpt", "value": answer}]}
    check_record(record)
    return record


def build(source: str, folder: Path, out: Path, *, root: Path | None = None, exclude: Iterable[Path] = (),
          selection: Selection | None = None, workers: int = 1, progress: bool = False) -> dict:
    """Appends the records of `source` to `out` and the dropped ones to `out` with the suffix .dropped.jsonl.

    Returns {"built": new records, "kept": records that `out` had already, "stale": records that `out` has and this build would
    drop (it was built with less excluded), "dropped": {reason: count}, "passed over": {reason: count}}.
    Raises SourceError for a folder or file of another kind; what was built before that is kept.
    """
    check_folder(source, folder)
    folder, root = folder.resolve(), (root or folder.parent).resolve()
    if not folder.is_relative_to(root):
        raise SourceError(f"{folder}: not below --root {root}")
    excluded, selection = Excluded(), selection or Selection()
    for path in exclude:
        excluded.add(path)
    dropped_path = out.with_suffix(".dropped.jsonl")
    done = {hash64(record["id"].encode()) for record, _ in append_to(out)}
    dropped_before = Counter(hash64(line.encode()) for _, line in append_to(dropped_path))
    count, dropped, names, contents = Counter(built=0, kept=0, stale=0), Counter(), set(), set()
    broken: list[SourceError] = []
    started = said = time.monotonic()

    def until_broken() -> Iterator[Candidate | Drop]:
        try:
            yield from SOURCES[source].read(folder, selection)
        except SourceError as error:
            broken.append(error)  # raised when everything before it is written

    def verdict(item: Candidate, answer: str, look: Look | None) -> tuple[str, str]:
        if look and look.reason:
            return look.reason, look.detail
        if look and (detail := unrelated(item, look)):
            return "unrelated", detail
        if detail := excluded.holds(item, look):
            return "evaluation", detail
        content = hash64(f"{look.pixels if look else 0}\n{item.prompt}\n{answer}".encode())
        if content in contents or hash64(item.id.encode()) in names:
            return "duplicate", "of an earlier record's " + ("image, question and answer" if content in contents else "id")
        contents.add(content)
        return "", ""

    with open(out, "a", encoding="utf-8") as records, open(dropped_path, "a", encoding="utf-8") as drops:
        for item, answer, drop, look in judged(until_broken(), workers):
            if drop is None:
                reason, detail = verdict(item, answer, look)
                drop = Drop(item.id, reason, detail, str(item.image or "")) if reason else None
            name = hash64(item.id.encode())
            if drop is not None:
                dropped[drop.reason] += 1
                count["stale"] += name in done and name not in names
                image = os.path.relpath(drop.image, root) if drop.image else ""
                line = json.dumps({"id": drop.id, "source": source, "reason": drop.reason, "image": image,
                                   "detail": drop.detail.replace(f"{root}/", "")}, ensure_ascii=False) + "\n"
                if dropped_before[hash64(line.encode())] > 0:
                    dropped_before[hash64(line.encode())] -= 1
                else:
                    drops.write(line)
            else:
                names.add(name)
                if name in done:
                    count["kept"] += 1
                else:
                    records.write(json.dumps(record_of(item, answer, root), ensure_ascii=False) + "\n")
                    count["built"] += 1
            if progress and time.monotonic() - said > 10:
                said, total = time.monotonic(), sum(count.values()) + sum(dropped.values())
                print(f"{source}: {total:,} records, {total / (said - started) * 60:,.0f} a minute", file=sys.stderr, flush=True)
    if broken:
        raise broken[0]
    return {**count, "dropped": dict(dropped), "passed over": dict(selection.passed_over)}


# Statistics


@dataclass
class Lengths:
    """How many records of a source have a query and an answer of how many words."""

    records: int = 0
    images: int = 0
    query: Counter = field(default_factory=Counter)    # words -> records
    answer: Counter = field(default_factory=Counter)


def words(text: str) -> int:
    """Words between spaces; every Chinese character is one."""
    return len(re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+", text.replace(IMAGE, "")))


def lengths(path: Path) -> dict[str, Lengths]:
    """Per source, in SOURCES' order, and "all". A record of several rounds counts with its mean (Sec. 2.4)."""
    found = {name: Lengths() for name in [*SOURCES, "others", "all"]}
    for number, record in stream_lines(path):
        try:
            turns, images = check_record(record)
        except ValueError as error:
            raise SourceError(f"{path}, line {number}: {error}") from error
        name = next((name for name in SOURCES if str(record.get("id")).startswith(f"{name}-")), "others")
        rounds = len(turns) // 2
        for entry in (found[name], found["all"]):
            entry.records += 1
            entry.images += bool(images)
            entry.query[round(sum(words(turn["value"]) for turn in turns[0::2]) / rounds)] += 1
            entry.answer[round(sum(words(turn["value"]) for turn in turns[1::2]) / rounds)] += 1
    if not found["all"].records:
        raise SourceError(f"{path}: no records in it")
    return {name: entry for name, entry in found.items() if entry.records}


def quantile(counts: Counter, percent: float) -> int:
    """The smallest length that `percent` of the records do not exceed."""
    rest = counts.total() * percent / 100
    for length in sorted(counts):
        rest -= counts[length]
        if rest <= 1e-9:
            return length
    return 0


def table(found: dict[str, Lengths]) -> str:
    """Counts beside the paper's, and the lengths in words: mean and the end of the 99 % interval."""
    rows = [("source", "records", "paper", "images", "query", "99 %", "answer", "99 %", "answer <= 5")]
    for name, entry in found.items():
        def mean(counts: Counter) -> str:
            return f"{sum(length * count for length, count in counts.items()) / entry.records:.1f}"
        short = sum(count for length, count in entry.answer.items() if length <= 5) / entry.records
        rows.append((name, f"{entry.records:,}", SOURCES[name].paper if name in SOURCES else "", f"{entry.images:,}",
                     mean(entry.query), str(quantile(entry.query, PERCENTILE)), mean(entry.answer),
                     str(quantile(entry.answer, PERCENTILE)), f"{short:.0%}"))
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) if not place else cell.rjust(width)
                               for place, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows)


def plot(found: dict[str, Lengths], path: Path) -> None:
    """Figure 4: the share of records by the length of their query (left) and answer (right), one line per source."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, part in zip(panels, ("query", "answer")):
        end = max(quantile(getattr(found["all"], part), PERCENTILE), 1)
        edges = np.unique(np.linspace(0.5, end + 0.5, 31).round() - 0.5)  # bins of whole words; none for an empty text
        for number, (name, entry) in enumerate(found.items()):
            counts = getattr(entry, part)
            shares, _ = np.histogram(list(counts), edges, weights=np.array(list(counts.values())) / entry.records)
            panel.stairs(shares, edges, label=f"{name} ({entry.records:,})", baseline=None,
                         color="black" if name == "all" else f"C{number}", linewidth=2.2 if name == "all" else 1.1)
        panel.set(xlabel=f"words of the {part} (up to {end}: {PERCENTILE} % of all records)",
                  ylabel="share of the source's records", xlim=(edges[0], edges[-1]), ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sliming.smr", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    make = commands.add_parser("build", help="append a source's records to a file")
    make.add_argument("source", choices=SOURCES)
    make.add_argument("folder", type=Path, help="where the source was unpacked")
    make.add_argument("--out", type=Path, required=True, help="JSONL; dropped records go to OUT.dropped.jsonl beside it")
    make.add_argument("--root", type=Path, help="image paths are relative to it; default: the folder above FOLDER")
    make.add_argument("--exclude", type=Path, nargs="+", default=[], metavar="FILE",
                      help="evaluation questions, JSON or JSONL, their images beside them")
    make.add_argument("--splits", type=lambda text: tuple(text.split(",")), default=(), metavar="A,B",
                      help="instead of the training splits")
    make.add_argument("--count", type=int, default=Selection.count,
                      help="dvqa: how many reasoning questions (default %(default)s)")
    make.add_argument("--seed", type=int, default=0, help="of dvqa's choice and textbookqa's prompts")
    make.add_argument("--machine", action="store_true", help="chartqa: machine-written questions too")
    make.add_argument("--text-only", action="store_true", help="scienceqa: questions without an image too")
    make.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes (default %(default)s)")
    show = commands.add_parser("stats", help="counts beside the paper's, lengths as in Figure 4")
    show.add_argument("file", type=Path)
    show.add_argument("--plot", type=Path, metavar="PNG", help="draw Figure 4")
    args = parser.parse_args()
    try:
        if args.command == "stats":
            found = lengths(args.file)
            print(table(found))
            if args.plot:
                plot(found, args.plot)
            return
        selection = Selection(args.splits, args.seed, args.count, args.machine, args.text_only)
        result = build(args.source, args.folder, args.out, root=args.root, exclude=args.exclude, selection=selection,
                       workers=args.workers, progress=True)
    except (SourceError, OSError, BrokenProcessPool) as error:
        sys.exit(f"smr: {error}")
    except KeyboardInterrupt:
        sys.exit("smr: stopped; the same command goes on from here")
    print(f"{args.source}: {result['built']:,} built, {result['kept']:,} were there, "
          f"{sum(result['dropped'].values()):,} dropped, {sum(result['passed over'].values()):,} not selected")
    for title in ("dropped", "passed over"):
        for reason, number in result[title].items():
            print(f"  {title}: {number:,}  {reason}" + (f" ({REASONS[reason]})" if title == "dropped" else ""))
    if result["stale"]:
        sys.exit(f"smr: {args.out} holds {result['stale']:,} records that this command drops; delete it and build again")


if __name__ == "__main__":
    main()
