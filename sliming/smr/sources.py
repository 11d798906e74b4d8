"""The raw layouts of SMR's ten sources, one reader each (Sec. 2.4, Appendix B).

A record that does not have its source's form becomes a Drop; RecordError for a file or a choice
that cannot be used. Files are read as a stream, so memory does not grow with them. Where each
layout is documented, and what of it no real file has confirmed: README.md beside this.
"""

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from sliming.chat import DETAIL_PROMPTS, OPTION_LETTER, SINGLE_WORD
from sliming.evaluation import formats
from sliming.evaluation.formats import LETTERS, place_of, texts
from sliming.guard import open_file, read_text
from sliming.records import RecordError, elements, inside, lines, parse
from sliming.smr.candidates import Candidate, Drop, Selection

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
    return lines(path, parsed)


def load(path: Path) -> object:
    """A small JSON file; what is wrong with it is returned, for `guarded`."""
    try:
        with open_file(path) as file:
            return parsed(file.read(), path, 1)
    except OSError as error:
        return RecordError(f"{path}: cannot be read ({error.strerror})")


def parsed(text: bytes, path: Path, number: int) -> object:
    try:
        return parse(text, path, number)
    except RecordError as error:
        return error


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


# -------------------------------------------------------- ScienceQA, TabMWP, ChartQA, MATH-Vision


def scienceqa(folder: Path, selection: Selection) -> Found:
    """problems.json {pid: entry}, images in [images/]<split>/<pid>/: a letter.

    The prompt has the instructions how to solve it (Appendix B): hint and lecture.
    """
    def make(pid: str, entry: dict) -> Candidate:
        row = formats.scienceqa(pid, entry)
        hint, lecture = ((entry.get(key) or "").strip() for key in ("hint", "lecture"))
        before = (f"Context: {hint}\n" if hint else "") + (f"{lecture}\n" if lecture else "")
        image = inside(images, row.image) if row.image else None
        return choice(f"scienceqa-{pid}", image, row.question.strip(), options_of(row.options),
                      row.place, before)

    images = folder / "images" if (folder / "images").is_dir() else folder
    for pid, entry, *_ in elements(folder / "problems.json"):
        readable = isinstance(entry, dict)
        if readable and entry.get("split") not in selection.splits:
            selection.passed_over[f"split {entry.get('split')}"] += 1
        elif readable and not entry.get("image") and not selection.text_only:
            selection.passed_over["no image (--text-only takes it)"] += 1
        else:
            yield guarded(f"scienceqa-{pid}", make, pid, entry)


def tabmwp(folder: Path, selection: Selection) -> Found:
    """problems_<split>.json {pid: entry}, tables/<pid>.png: the solution.

    Its last sentence is "The answer is 1,200." or "The answer is (B) no.": what PromptPG's scorer
    takes for the answer. That takes a first word of two letters for an option, too, so a solution
    of a question with options does not begin with "At", but as others do.
    """
    def make(pid: str, entry: dict) -> Candidate:
        row, (solution,) = formats.tabmwp(pid, entry), stripped(pid, entry, "solution")
        question, gold, unit = row.question.strip(), row.answer.strip(), entry.get("unit")
        said = gold if row.place is None else f"({row.letter}) {gold}"
        if row.options and re.match("[A-Fa-f][a-z] ", solution):
            solution = f"Look at the table. {solution}"
        prompt = question + (f" (unit: {unit})" if unit else "") + lettered(row.options)
        return Candidate(f"tabmwp-{pid}", inside(folder, row.image), question, prompt, solution,
                         **right(row.options, row.place) or {"gold": gold}, always=True,
                         closing=f"The answer is {said.rstrip('.')}.",
                         rows=int(entry.get("row_num") or 0))

    for split in selection.splits:
        for pid, entry, *_ in elements(folder / f"problems_{split}.json"):
            yield guarded(f"tabmwp-{pid}", make, pid, entry)


def chartqa(folder: Path, selection: Selection) -> Found:
    """<split>/<split>_{human,augmented}.json [entry], <split>/png/: a word; human-written only."""
    def make(name: str, number: int, entry: dict) -> Candidate:
        row = formats.chartqa(number, entry)
        image = inside(base / split, row.image)
        return word(name, image, row.question.strip(), row.answer.strip())

    base = folder / "ChartQA Dataset" if (folder / "ChartQA Dataset").is_dir() else folder
    for split in selection.splits:
        for kind in ("human", "augmented"):
            path = base / split / f"{split}_{kind}.json"
            if kind == "augmented" and not selection.machine:
                machine = sum(1 for _ in elements(path)) if path.exists() else 0
                selection.passed_over["machine-written (--machine takes it)"] += machine
                continue
            for number, entry, *_ in elements(path):
                name = f"chartqa-{split}-{kind}-{number}"
                yield guarded(name, make, name, number, entry)


def math_vision(folder: Path, selection: Selection) -> Found:
    """data/<split>.jsonl, images/: the solution where there is one, else a word.

    Split `test` is test.jsonl less the ids of testmini.jsonl, which is an evaluation set.
    """
    def make(number: int, entry: dict) -> Candidate:
        row = formats.math_vision(number, entry)
        name, image = f"math-vision-{row.id}", inside(folder, row.image)
        asked, gold, solution, *options = formats.as_meant(
            row.question, row.answer, entry.get("solution") or "", *row.options)
        letters = list(LETTERS[:len(options)])
        bare = [option.strip("(). ") for option in options] == letters  # they are in the picture
        fields = right(letters if bare else options, row.place) or {"gold": gold}
        prompt = asked + ("" if bare else lettered(options, "({}) {}"))
        said = row.letter or gold
        pictures = r"!\[[^\]]*\]\([^)]*\)|\[asy\].*?\[/asy\]"
        solution = re.sub(pictures, "", solution, flags=re.DOTALL).strip()
        if not solution:
            return Candidate(name, image, row.question, f"{prompt}\n{SINGLE_WORD}", said, **fields)
        return Candidate(name, image, row.question, prompt, solution, **fields,
                         always=bool(options), closing=f"So the answer is {said}.")

    mini = folder / "data" / "testmini.jsonl"
    if not mini.exists():
        raise RecordError(f"{mini}: missing; without it the evaluation's questions cannot be "
                          "kept out")
    held_out = {str(entry.get("id")) for _, entry in rows(mini) if isinstance(entry, dict)}
    for split in selection.splits:
        for number, entry in rows(folder / "data" / f"{split}.jsonl"):
            known = isinstance(entry, dict) and str(entry.get("id")) in held_out
            if known and split != "testmini":
                selection.passed_over["in testmini (evaluation)"] += 1
            else:
                yield guarded(f"math-vision-line-{number}", make, number, entry)


# ------------------------------------------------------ ArxivQA, TextbookQA, GeoQA, Geometry3K


def arxivqa(folder: Path, selection: Selection) -> Found:
    """arxivqa.jsonl {id, image, question, options, label, rationale}, images/: the rationale."""
    def make(number: int, entry: dict) -> Candidate:
        name, image, question, label, rationale = stripped(
            number, entry, "id", "image", "question", "label", "rationale")
        # Some lists of options begin with a heading, which is none.
        options = options_of([option for option in entry["options"]
                              if not str(option).strip().startswith("##")])
        match = re.match(r"[(\[]?([A-Z])(?![A-Za-z])", label)  # "B", "B)", "[B]", "B. blue"
        said = options.index(label) if label in options else LETTERS.find(match[1]) if match else -1
        place = place_of(number, said, options)
        return Candidate(f"arxivqa-{name}", inside(folder, image), question,
                         question + lettered(options), rationale, **right(options, place),
                         closing=f"So the answer is {options[place]}", always=True)

    for number, entry in rows(folder / "arxivqa.jsonl"):
        yield guarded(f"arxivqa-line-{number}", make, number, entry)


def textbookqa(folder: Path, selection: Selection) -> Found:
    """<split>/tqa_v*_<split>.json: lessons with questions.diagramQuestions, instructionalDiagrams.

    A question with a diagram is answered with a letter; an instructional diagram is asked for with
    a prompt of Table 5 and answered with its description. Images: relative to the split's folder.
    """
    def question(base: Path, key: str, entry: dict) -> Candidate:
        choices = sorted(entry["answerChoices"].items())
        options = options_of([stripped(key, text, "processedText")[0] for _, text in choices])
        (gold,) = stripped(key, entry["correctAnswer"], "processedText")
        letters = [letter for letter, _ in choices]
        gold = gold.lower().rstrip(".)")
        place = place_of(key, letters.index(gold) if gold in letters else gold, options)
        (asked,) = stripped(key, entry["beingAsked"], "processedText")
        (image,) = stripped(key, entry, "imagePath")
        return choice(f"textbookqa-{key}", inside(base, image), asked, options, place,
                      mismatch=other_name(entry))

    def diagram(base: Path, key: str, entry: dict) -> Candidate:
        name = f"textbookqa-{key}"
        image, text = stripped(key, entry, "imagePath", "processedText")
        drawn = hashlib.blake2b(f"{selection.seed} {name}".encode(), digest_size=8).digest()
        prompt = DETAIL_PROMPTS[int.from_bytes(drawn, "big") % len(DETAIL_PROMPTS)]
        return Candidate(name, inside(base, image), prompt, prompt, text, gold=text,
                         mismatch=other_name(entry))

    def other_name(entry: dict) -> str:
        stated, path = entry.get("imageName"), entry["imagePath"]
        same = not stated or Path(path).stem == Path(stated).stem
        return "" if same else f"imageName {stated} but imagePath {path}"

    for split in selection.splits:
        base = folder / split
        for _, lesson, *_ in elements(next(base.glob(f"tqa_v*_{split}.json"))):
            try:
                passed = len(lesson["questions"].get("nonDiagramQuestions", {}))
                asked = list(lesson["questions"]["diagramQuestions"].items())
                taught = list(lesson.get("instructionalDiagrams", {}).items())
            except (KeyError, TypeError, AttributeError) as error:
                yield Drop(f"textbookqa-{split}", "malformed", f"a lesson without {error}")
                continue
            if passed:
                selection.passed_over["question without a diagram"] += passed
            for key, entry in asked:
                yield guarded(f"textbookqa-{key}", question, base, key, entry)
            for key, entry in taught:
                yield guarded(f"textbookqa-{key}", diagram, base, key, entry)


def geoqa(folder: Path, selection: Selection) -> Found:
    """GeoQA3: json/<id>.json {id, subject, choices, label, answer}, image/<id>.png, and GeoQA+:
    geoqa+.jsonl in LLaVA's format, images/; whichever of the two the folder holds.

    GeoQA3's solution is the answer and ends in its option's letter.
    """
    def geoqa3(stem: str, entry: dict) -> Candidate:
        key, subject, answer = stripped(stem, entry, "id", "subject", "answer")
        options = options_of(entry["choices"])
        place = place_of(stem, entry["label"], options)
        prompt = " ".join([subject, *map("{}. {}".format, LETTERS, options)])
        return Candidate(f"geoqa-{key}", inside(folder, f"image/{key}.png"), subject, prompt,
                         answer.rstrip(".。 "), **right(options, place),
                         closing=f"故选{LETTERS[place]}", always=True)

    def plus(number: int, entry: dict) -> Candidate:
        key, image = stripped(number, entry, "id", "image")
        (prompt,), (answer,) = (stripped(key, turn, "value") for turn in entry["conversations"][:2])
        prompt, image = prompt.replace("<image>", "").strip(), image.removeprefix("geoqa+/")
        image = image if image.startswith("images/") else f"images/{image}"
        return Candidate(f"geoqa-plus-{key}", inside(folder, image), prompt, prompt, answer,
                         gold=answer)

    for path in sorted((folder / "json").glob("*.json")):
        yield guarded(f"geoqa-{path.stem}", geoqa3, path.stem, load(path))
    if (folder / "geoqa+.jsonl").exists():
        for number, entry in rows(folder / "geoqa+.jsonl"):
            yield guarded(f"geoqa-plus-line-{number}", plus, number, entry)


def geometry3k(folder: Path, selection: Selection) -> Found:
    """<split>/<id>/data.json {problem_text, choices, answer, img_width, img_height} beside
    img_diagram.png: a letter. Train and val are the ids 0 to 2400 that the released SMR has."""
    def make(path: Path, entry: dict) -> Candidate:
        name, (question, answer) = path.parent.name, stripped(path, entry, "problem_text", "answer")
        options = options_of(entry["choices"])
        stated = (entry.get("img_width"), entry.get("img_height"))
        return choice(f"geometry3k-{name}", path.parent / "img_diagram.png", question, options,
                      place_of(name, LETTERS.find(answer or "-"), options),
                      size=stated if all(stated) else None)

    for split in selection.splits:
        for path in sorted(folder.glob(f"{split}/*/data.json")):
            yield guarded(f"geometry3k-{path.parent.name}", make, path, load(path))


# ---------------------------------------------------------------------------------- DVQA, AI2D


def dvqa(folder: Path, selection: Selection) -> Found:
    """<split>_qa.json [{image, question, answer, template_id or question_type, answer_bbox or
    bbox_answer, question_id}], images/: a word.

    A random `count` of the reasoning questions. The file is read twice, so that only their places
    are held.
    """
    def reasoning(entry: object) -> bool:
        kinds = ("template_id", "question_type")
        return not isinstance(entry, dict) or "reasoning" in map(entry.get, kinds)

    def make(split: str, place: int, entry: dict) -> Candidate:
        image, question, answer = stripped(f"at-{place}", entry, "image", "question", "answer")
        box = tuple(map(float, entry.get("answer_bbox") or entry.get("bbox_answer") or ()))
        if len(box) not in (0, 4):
            raise RecordError(f"an answer's box has four numbers, not {len(box)}")
        fits = image.startswith(f"bar_{split}_")
        return word(f"dvqa-{split}-{entry.get('question_id', f'at-{place}')}", inside(base, image),
                    question, answer, box=box,
                    mismatch="" if fits else f"image {image} is not of split {split}")

    base = folder / "images" if (folder / "images").is_dir() else folder
    paths = [(split, folder / f"{split}_qa.json") for split in selection.splits]
    total = sum(reasoning(entry) for _, path in paths for _, entry, *_ in elements(path))
    chosen = np.zeros(total, dtype=bool)  # [questions]
    chosen[np.random.default_rng(selection.seed).permutation(total)[:selection.count]] = True
    place = -1
    for split, path in paths:
        for _, entry, *_ in elements(path):
            if not reasoning(entry):
                selection.passed_over["not reasoning"] += 1
                continue
            place += 1
            if chosen[place]:
                yield guarded(f"dvqa-{split}-at-{place}", make, split, place, entry)
            else:
                selection.passed_over["not drawn (--count)"] += 1


def ai2d(folder: Path, selection: Selection) -> Found:
    """questions/<image>.json {imageName, questions: {text: {abcLabel, answerTexts, correctAnswer,
    questionId}}}, images/: a letter.

    A question about letters has its picture, with the letters drawn in, in abc_images. The images
    named in ai2d_test_ids.csv are the split `test`, all others `train`.
    """
    def make(name: str, number: int, question: str, stated: str, entry: dict) -> Candidate:
        options = options_of(entry["answerTexts"])
        (said,) = texts(name, entry, "correctAnswer")
        pictures = "abc_images" if entry.get("abcLabel") else "images"
        return choice(f"ai2d-{entry.get('questionId', f'{name}-{number}')}",
                      inside(folder, f"{pictures}/{name}"), question.strip(), options,
                      place_of(name, int(said), options), mismatch="" if stated == name else
                      f"the file is of {name}, its imageName is {stated}")

    ids = folder / "ai2d_test_ids.csv"
    if not ids.exists():
        raise RecordError(f"{ids}: missing; without it the test images cannot be kept out (an "
                          "empty file takes them all)")
    test = set(read_text(ids).split())
    for path in sorted((folder / "questions").glob("*.json")):
        name, page = path.name.removesuffix(".json"), load(path)
        if ("test" if Path(name).stem in test else "train") not in selection.splits:
            selection.passed_over["other split by ai2d_test_ids.csv"] += 1
            continue
        try:  # an image without questions has an empty list
            questions = list(dict(page["questions"]).items())
        except (KeyError, TypeError, ValueError):
            detail = str(page) if isinstance(page, RecordError) else f"{path}: no questions in it"
            yield Drop(f"ai2d-{name}", "malformed", detail)
            continue
        for number, (question, entry) in enumerate(questions):
            yield guarded(f"ai2d-{name}-{number}", make, name, number, question,
                          page.get("imageName", name), entry)


# ------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Source:
    """How a source is read, how many records the paper has of it, what its raw folder must hold
    (any of the patterns; their first star is a split's name), and which splits are for training."""

    read: Callable[[Path, Selection], Found]
    paper: str   # Figure 3; after a comma Appendix B, where it says something else
    holds: tuple[str, ...]
    training: tuple[str, ...] = ()

    def fits(self, folder: Path) -> bool:
        return any(next(folder.glob(pattern), None) is not None for pattern in self.holds)

    def splits(self, folder: Path) -> set[str]:
        """The splits that `folder` has."""
        if self.read is scienceqa:  # a field of the records
            entries = (entry for _, entry, *_ in elements(folder / "problems.json"))
            return {str(entry.get("split")) for entry in entries if isinstance(entry, dict)}
        if self.read is ai2d:  # a list of ids
            return {"train", "test"}
        return {re.fullmatch(re.escape(pattern).replace(r"\*", "([^/]*)"),
                             path.relative_to(folder).as_posix())[1]
                for pattern in self.holds for path in folder.glob(pattern)}


SOURCES = {
    "arxivqa": Source(arxivqa, "100K", ("arxivqa.jsonl",)),
    "scienceqa": Source(scienceqa, "12.7K", ("problems.json",), ("train",)),
    "math-vision": Source(math_vision, "3,040 in all", ("data/*.jsonl",), ("test",)),
    "textbookqa": Source(textbookqa, "9.5K", ("*/tqa_v*_*.json",), ("train",)),
    "geoqa": Source(geoqa, "76K", ("json/*.json", "geoqa+.jsonl")),
    "geometry3k": Source(geometry3k, "3,002 in all", ("*/*/data.json",), ("train", "val")),
    "tabmwp": Source(tabmwp, "30K", ("problems_*.json",), ("train", "dev")),
    "dvqa": Source(dvqa, "200K, 100K", ("*_qa.json",), ("train",)),
    "ai2d": Source(ai2d, "12K", ("questions/*.json",), ("train",)),
    "chartqa": Source(chartqa, "28.3K, 9.6K",
                      ("ChartQA Dataset/*/*_human.json", "*/*_human.json"), ("train",)),
}


def check(source: str, folder: Path, selection: Selection) -> Selection:
    """`selection` with its splits; RecordError where `folder` is not the raw layout of `source`,
    naming the one that it is, or lacks a split, naming those that it has."""
    if not folder.is_dir():
        raise RecordError(f"{folder}: no such folder")
    chosen = SOURCES[source]
    if not chosen.fits(folder):
        like = [name for name, entry in SOURCES.items() if entry.fits(folder)]
        hint = f"; it looks like {like[0]}" if like else ""
        raise RecordError(f"{folder}: not {source}'s raw folder (no {' or '.join(chosen.holds)})"
                          f"{hint}")
    if selection.splits and not chosen.training:
        raise RecordError(f"{source} has no splits: leave --splits out")
    splits = selection.splits or chosen.training
    there = chosen.splits(folder) if splits else ()
    for split in splits:
        if split not in there:
            raise RecordError(f"{folder}: no split {split!r} of {source}; there are "
                              f"{', '.join(sorted(there))}: choose with --splits")
    return replace(selection, splits=tuple(dict.fromkeys(splits)))
