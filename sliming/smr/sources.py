"""The raw layouts of SMR's ten sources, read record by record (Sec. 2.4, Appendix B).

Each reader takes the folder in which a source was unpacked and yields a Candidate per question: the prompt, the answer,
and what the filters of smr.py need to judge them. A record that does not have its source's form becomes a Drop. Files are
read as a stream, so memory does not grow with them. What a reader passes over by its selection (another split, no image,
machine-written) it counts in `Selection.passed_over`.

Layouts and fields: ArxivQA, hub MMInstruction/ArxivQA (github.com/MMInstruction/multimodal-arxiv); ScienceQA,
lupantech/ScienceQA; MATH-Vision, mathvision-cuhk/MATH-V; TextbookQA, README.md of tqa_train_val_test (allenai.org/data/tqa);
GeoQA3, chen-judge/GeoQA; GeoQA+, SCNU203/GeoQA-Plus in LLaVA's format; Geometry3K, lupantech/InterGPS; TabMWP,
lupantech/PromptPG; DVQA, kushalkafle/DVQA_dataset README.md; AI2D, allenai/dqa-net; ChartQA, vis-nlp/ChartQA. What the
released SMR takes of them: yfzhang114/SliME docs/smr_data.md.

Legend: letters A, B, ... name options in their order; gold: the answer that the source gives.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sliming.chat import DETAIL_PROMPTS, OPTION_LETTER, SINGLE_WORD

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class SourceError(ValueError):
    """A folder or a file that is not of the source's layout; one line."""


@dataclass(frozen=True)
class Candidate:
    """One question before the filters. `image` is a file; None for a text-only question."""

    id: str
    image: Path | None
    question: str                   # as the source has it, without options: compared with evaluation sets
    prompt: str                     # what the model is asked
    answer: str                     # what it should say
    gold: str = ""                  # if `answer` is reasoning: what it must end in (an option's text, or the free answer)
    letter: str = ""                # the gold option's letter, where there are options
    others: tuple[str, ...] = ()    # the texts of the other options
    closing: str = ""               # the sentence that spells the answer out
    always: bool = False            # add `closing` even where the reasoning has the answer itself
    size: tuple[int, int] | None = None            # width and height that the source states for the image
    rows: int = 0                                  # lines of text that the image must have room for
    box: tuple[float, float, float, float] | None = None  # x, y, width, height that must lie in the image
    mismatch: str = ""              # why image and text do not belong together, if the record itself shows it


@dataclass(frozen=True)
class Drop:
    """A record that is not built: `reason` is one of smr.REASONS, `detail` one line."""

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


def stream_json(path: Path) -> Iterator[tuple[str | int, object]]:
    """(key, value) of each member of a top-level JSON object or array, holding one block of the file at a time."""
    decoder, buffer, place, block = json.JSONDecoder(), "", 0, 1 << 20

    def skip(characters: str) -> str:
        """Moves past `characters`; the next one, "" at the end of the file."""
        nonlocal buffer, place
        while True:
            while place < len(buffer) and buffer[place] in characters:
                place += 1
            if place < len(buffer):
                return buffer[place]
            buffer, place = file.read(block), 0
            if not buffer:
                return ""

    def value() -> object:
        nonlocal buffer, place
        while True:
            try:
                result, end = decoder.raw_decode(buffer, place)
                if end < len(buffer) or isinstance(result, (dict, list, str)):  # a number could go on in the next block
                    place = end
                    return result
                problem, cut = "unexpected end", True
            except json.JSONDecodeError as error:
                problem, cut = error.msg, len(buffer) - error.pos <= block  # a whole block after it: not cut, but broken
            more = file.read(block) if cut else ""
            if not more:
                raise SourceError(f"{path}: broken JSON after {index} records ({problem})")
            buffer, place = buffer[place:] + more, 0

    index = 0
    try:
        with open(path, encoding="utf-8-sig") as file:
            opening = skip(" \t\r\n")
            if opening not in ("[", "{"):
                raise SourceError(f"{path}: not a JSON list or object")
            place += 1
            while (following := skip(" \t\r\n,")) != ("]" if opening == "[" else "}"):
                if not following:
                    raise SourceError(f"{path}: broken JSON after {index} records (unexpected end)")
                key: str | int = index
                if opening == "{":
                    key = str(value())
                    skip(" \t\r\n:")
                yield key, value()
                index += 1
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as text ({error})") from error


def stream_lines(path: Path) -> Iterator[tuple[int, object]]:
    """(line number, value) of a JSONL file; a broken line's value is its json.JSONDecodeError."""
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except json.JSONDecodeError as error:
                        yield number, error
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path}: cannot be read as text ({error})") from error


def guarded(name: str, record: object, make: Callable[[dict], Candidate]) -> Iterator[Candidate | Drop]:
    """`make(record)`, or a Drop that says which field is missing or wrong."""
    try:
        if isinstance(record, json.JSONDecodeError):
            raise ValueError(f"broken JSON ({record.msg}, column {record.colno})")
        if not isinstance(record, dict):
            raise ValueError(f"a record must be an object, not {type(record).__name__}")
        yield make(record)
    except KeyError as error:
        yield Drop(name, "malformed", f"no field {error.args[0]!r}")
    except (TypeError, ValueError, IndexError, AttributeError) as error:
        yield Drop(name, "malformed", str(error).splitlines()[0])


def text_of(record: dict, key: str) -> str:
    """A field that must be text (or a number), stripped."""
    value = record[key]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise ValueError(f"field {key!r} must be text, not {type(value).__name__}")
    return str(value).strip()


def options_of(texts: object) -> list[str]:
    """Options without their own letters ("A) red" or "(A) red" becomes "red" if all have them); at least two."""
    if not isinstance(texts, list) or len(texts) < 2 or len(texts) > len(LETTERS):
        raise ValueError(f"options must be a list of 2 to 26 texts, not {str(texts)[:60]!r}")
    texts = [str(text).strip() for text in texts]
    matches = [re.match(rf"\(?{letter}\s*[).:]\s*(.*)", text, re.DOTALL) for letter, text in zip(LETTERS, texts)]
    return [match[1].strip() for match in matches] if all(matches) else texts


def lettered(options: list[str], form: str = "{}. {}") -> str:
    return "".join("\n" + form.format(letter, text) for letter, text in zip(LETTERS, options))


def at(options: list[str], index: object) -> int:
    """`index` if it is a place in `options`."""
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(options):
        raise ValueError(f"the answer {index!r} is not one of the {len(options)} options")
    return index


def inside(folder: Path, relative: str) -> Path:
    """A file of the raw folder; a record may not point outside it."""
    path = Path(relative)
    if path.is_absolute() or ".." in path.parts or not relative:
        raise ValueError(f"image path {relative!r} leaves the source's folder")
    return folder / path


def others(options: list[str], index: int) -> tuple[str, ...]:
    return tuple(text for place, text in enumerate(options) if place != index)


def splits_of(selection: Selection, default: tuple[str, ...]) -> tuple[str, ...]:
    return selection.splits or default


def arxivqa(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """arxivqa.jsonl {id, image, question, options, label, rationale}, images/: the rationale is the answer."""
    def make(record: dict) -> Candidate:
        options = options_of(record["options"])
        match = re.match(r"\(?([A-Z])(?![A-Za-z])", text_of(record, "label"))
        if not match or LETTERS.index(match[1]) >= len(options):
            raise ValueError(f"label {record['label']!r} is not one of the {len(options)} options")
        index, question = LETTERS.index(match[1]), text_of(record, "question")
        return Candidate(f"arxivqa-{text_of(record, 'id')}", inside(folder, text_of(record, "image")), question,
                         question + lettered(options), text_of(record, "rationale"), gold=options[index], letter=match[1],
                         others=others(options, index), closing=f"So the answer is {options[index]}",
                         always=True)

    for number, record in stream_lines(folder / "arxivqa.jsonl"):
        yield from guarded(f"arxivqa-line-{number}", record, make)


def scienceqa(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """problems.json {pid: {question, choices, answer, hint, image, lecture, split}}, [images/]<split>/<pid>/image.png.

    The prompt has the question and the instructions how to solve it (Appendix B): hint and lecture.
    """
    images = folder / "images" if (folder / "images").is_dir() else folder
    for pid, record in stream_json(folder / "problems.json"):
        def make(record: dict) -> Candidate:
            options, question = options_of(record["choices"]), text_of(record, "question")
            index = at(options, record["answer"])
            hint, lecture = (record.get(key) or "" for key in ("hint", "lecture"))
            prompt = (f"Context: {hint}\n" if hint.strip() else "") + (f"{lecture}\n" if lecture.strip() else "")
            image = inside(images, f"{record['split']}/{pid}/{record['image']}") if record.get("image") else None
            return Candidate(f"scienceqa-{pid}", image, question, prompt + question + lettered(options) + "\n" + OPTION_LETTER,
                             LETTERS[index])

        if isinstance(record, dict) and record.get("split") not in splits_of(selection, ("train",)):
            selection.passed_over[f"split {record.get('split')}"] += 1
        elif isinstance(record, dict) and not record.get("image") and not selection.text_only:
            selection.passed_over["no image (--text-only takes it)"] += 1
        else:
            yield from guarded(f"scienceqa-{pid}", record, make)


def math_vision(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """data/test.jsonl {id, question, options, answer, solution, image} less the ids of data/testmini.jsonl (evaluation)."""
    mini = folder / "data" / "testmini.jsonl"
    if not mini.exists():
        raise SourceError(f"{mini}: missing; without it the evaluation's questions cannot be kept out")
    held_out = {str(record["id"]) for _, record in stream_lines(mini) if isinstance(record, dict) and "id" in record}

    def make(record: dict) -> Candidate:
        options = [str(text).strip() for text in record.get("options") or []]
        question, gold = text_of(record, "question"), text_of(record, "answer")
        # One picture holds all parts of a problem, so a single reference to it says nothing.
        asked = re.sub(r"[ \t]*\n?<image1>", "", question).strip() if "<image2>" not in question else question
        letters_only = options == list(LETTERS[: len(options)])
        prompt = asked + ("" if letters_only else lettered(options, "({}) {}"))
        index = at(options, LETTERS.find(gold)) if options else 0
        solution = re.sub(r"!\[[^\]]*\]\([^)]*\)|\[asy\].*?\[/asy\]", "", record.get("solution") or "", flags=re.DOTALL)
        image = inside(folder, text_of(record, "image"))
        if not solution.strip():
            return Candidate(f"math-vision-{record['id']}", image, question, prompt + "\n" + SINGLE_WORD, gold)
        return Candidate(f"math-vision-{record['id']}", image, question, prompt, solution.strip(),
                         gold=options[index] if options else gold, letter=gold if options else "",
                         others=others(options, index) if options else (), closing=f"So the answer is {gold}.",
                         always=bool(options))

    for number, record in stream_lines(folder / "data" / "test.jsonl"):
        if isinstance(record, dict) and str(record.get("id")) in held_out:
            selection.passed_over["in testmini (evaluation)"] += 1
        else:
            yield from guarded(f"math-vision-line-{number}", record, make)


def textbookqa(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """<split>/tqa_v1_<split>.json: lessons with questions.diagramQuestions and instructionalDiagrams.

    Questions with a diagram as such; instructional diagrams with a prompt of Table 5 and their description as answer.
    """
    def question(base: Path, name: str) -> Callable[[dict], Candidate]:
        def make(record: dict) -> Candidate:
            choices = sorted(record["answerChoices"].items())
            options = options_of([text_of(choice, "processedText") for _, choice in choices])
            gold = text_of(record["correctAnswer"], "processedText").lower().rstrip(".)")
            index = at(options, [key for key, _ in choices].index(gold) if gold in dict(choices) else gold)
            asked = text_of(record["beingAsked"], "processedText")
            return Candidate(name, inside(base, text_of(record, "imagePath")), asked,
                             asked + lettered(options) + "\n" + OPTION_LETTER, LETTERS[index], mismatch=other_name(record))
        return make

    def diagram(base: Path, name: str) -> Callable[[dict], Candidate]:
        def make(record: dict) -> Candidate:
            choice = int.from_bytes(hashlib.blake2b(f"{selection.seed} {name}".encode(), digest_size=8).digest(), "big")
            prompt = DETAIL_PROMPTS[choice % len(DETAIL_PROMPTS)]
            return Candidate(name, inside(base, text_of(record, "imagePath")), prompt, prompt,
                             text_of(record, "processedText"), mismatch=other_name(record))
        return make

    def other_name(record: dict) -> str:
        stated, path = record.get("imageName"), record["imagePath"]
        return "" if not stated or Path(path).stem == Path(stated).stem else f"imageName {stated} but imagePath {path}"

    for split in splits_of(selection, ("train",)):
        base = folder / split
        for _, lesson in stream_json(base / f"tqa_v1_{split}.json"):
            try:
                passed = len(lesson["questions"].get("nonDiagramQuestions", {}))
                asked, taught = lesson["questions"]["diagramQuestions"], lesson.get("instructionalDiagrams", {})
                asked, taught = list(asked.items()), list(taught.items())
            except (KeyError, TypeError, AttributeError) as error:
                yield Drop(f"textbookqa-{split}", "malformed", f"a lesson without {error}")
                continue
            if passed:
                selection.passed_over["question without a diagram"] += passed
            for key, record in asked:
                yield from guarded(f"textbookqa-{key}", record, question(base, f"textbookqa-{key}"))
            for key, record in taught:
                yield from guarded(f"textbookqa-{key}", record, diagram(base, f"textbookqa-{key}"))


def geoqa(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """GeoQA3: json/<id>.json {id, subject, choices, label, answer}, image/<id>.png; GeoQA+: geoqa+.jsonl (LLaVA), images/.

    Whichever of the two the folder holds, or both. GeoQA3's solution is the answer and ends in its option's letter.
    """
    def make3(record: dict) -> Candidate:
        options, subject = options_of(record["choices"]), text_of(record, "subject")
        index = at(options, record["label"])
        solution = re.sub(r"[.。]?\s*$", "", text_of(record, "answer"))
        return Candidate(f"geoqa-{record['id']}", inside(folder, f"image/{record['id']}.png"), subject,
                         " ".join([subject, *(f"{letter}. {text}" for letter, text in zip(LETTERS, options))]), solution,
                         gold=options[index], letter=LETTERS[index], others=others(options, index),
                         closing=f"故选{LETTERS[index]}", always=True)

    def make_plus(record: dict) -> Candidate:
        human, gpt = record["conversations"][:2]
        prompt = text_of(human, "value").replace("<image>", "").strip()
        image = text_of(record, "image").removeprefix("geoqa+/")
        image = image if image.startswith("images/") else f"images/{image}"
        return Candidate(f"geoqa-plus-{record['id']}", inside(folder, image), prompt, prompt, text_of(gpt, "value"))

    if (folder / "json").is_dir():
        for path in sorted((folder / "json").glob("*.json"), key=lambda path: (len(path.stem), path.stem)):
            yield from guarded(f"geoqa-{path.stem}", load(path), make3)
    if (folder / "geoqa+.jsonl").exists():
        for number, record in stream_lines(folder / "geoqa+.jsonl"):
            yield from guarded(f"geoqa-plus-line-{number}", record, make_plus)


def load(path: Path) -> object:
    """A small JSON file; what is wrong with it is returned as json.JSONDecodeError, for `guarded`."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return error
    except (OSError, UnicodeDecodeError) as error:
        return json.JSONDecodeError(f"cannot be read: {error}", "", 0)


def geometry3k(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """<split>/<id>/data.json {id, problem_text, choices, answer, img_width, img_height}, img_diagram.png (RGBA).

    Train and val are the ids 0 to 2400 that the released SMR has.
    """
    def make(record: dict) -> Candidate:
        options, question = options_of(record["choices"]), text_of(record, "problem_text")
        index = at(options, LETTERS.find(text_of(record, "answer") or "-"))
        stated = (record.get("img_width"), record.get("img_height"))
        return Candidate(f"geometry3k-{path.parent.name}", path.parent / "img_diagram.png", question,
                         question + lettered(options) + "\n" + OPTION_LETTER, LETTERS[index], size=stated if all(stated) else None)

    for split in splits_of(selection, ("train", "val")):
        for path in sorted(folder.glob(f"{split}/*/data.json"), key=lambda path: (len(path.parent.name), path.parent.name)):
            yield from guarded(f"geometry3k-{path.parent.name}", load(path), make)


def tabmwp(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """problems_<split>.json {pid: {question, choices, answer, unit, solution, row_num}}, tables/<pid>.png: the solution."""
    for split in splits_of(selection, ("train", "dev")):
        whole = folder / f"problems_{split}.json"
        for path in [whole] if whole.exists() else sorted(folder.glob(f"problems_{split}*.json")):
            for pid, record in stream_json(path):
                def make(record: dict) -> Candidate:
                    question, gold, unit = text_of(record, "question"), text_of(record, "answer"), record.get("unit")
                    options = options_of(record["choices"]) if record.get("choices") else []
                    if options and gold not in options:
                        raise ValueError(f"the answer {gold!r} is not one of the {len(options)} options")
                    index = options.index(gold) if options else 0
                    prompt = question + (f" (unit: {unit})" if unit else "") + lettered(options)
                    return Candidate(f"tabmwp-{pid}", folder / "tables" / f"{int(pid)}.png", question, prompt,
                                     text_of(record, "solution"), gold=gold, letter=LETTERS[index] if options else "",
                                     others=others(options, index) if options else (),
                                     closing=f"The answer is {f'{gold} {unit}' if unit else gold}".rstrip(".") + ".",
                                     rows=int(record.get("row_num") or 0))
                yield from guarded(f"tabmwp-{pid}", record, make)


def dvqa(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """<split>_qa.json [{image, question, answer, question_type or template_id, bbox_answer or answer_bbox, question_id}].

    A random `count` of the reasoning questions: the file is read twice, so that only their places are held.
    """
    def reasoning(record: object) -> bool:
        return not isinstance(record, dict) or "reasoning" in (record.get("question_type"), record.get("template_id"))

    def make(record: dict) -> Candidate:
        image, question = text_of(record, "image"), text_of(record, "question")
        box = record.get("bbox_answer") or record.get("answer_bbox")
        box = tuple(float(number) for number in box) if box else None
        if box and len(box) != 4:
            raise ValueError(f"an answer's box has four numbers, not {len(box)}")
        base = folder / "images" if images else folder
        name = record["question_id"] if "question_id" in record else f"at-{place}"
        return Candidate(f"dvqa-{split}-{name}", inside(base, image), question, question + "\n" + SINGLE_WORD,
                         text_of(record, "answer"), box=box,
                         mismatch="" if image.startswith(f"bar_{split}_") else f"image {image} is not of split {split}")

    images = (folder / "images").is_dir()
    paths = [(split, folder / f"{split}_qa.json") for split in splits_of(selection, ("train",))]
    total = sum(reasoning(record) for _, path in paths for _, record in stream_json(path))
    chosen = np.zeros(total, dtype=bool)  # [questions]
    chosen[np.random.default_rng(selection.seed).permutation(total)[: selection.count]] = True
    place = -1
    for split, path in paths:
        for _, record in stream_json(path):
            if not reasoning(record):
                selection.passed_over["not reasoning"] += 1
                continue
            place += 1
            if chosen[place]:
                yield from guarded(f"dvqa-{split}-at-{place}", record, make)
            else:
                selection.passed_over["not drawn (--count)"] += 1


def ai2d(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """questions/<image>.json {imageName, questions: {text: {abcLabel, answerTexts, correctAnswer, questionId}}}, images/.

    A question about letters has its picture, with the letters drawn in, in abc_images. Images named in ai2d_test_ids.csv, if
    the folder has it, are passed over.
    """
    held_out = folder / "ai2d_test_ids.csv"
    test = set(held_out.read_text(encoding="utf-8").split()) if held_out.exists() else set()
    for path in sorted((folder / "questions").glob("*.json"), key=lambda path: (len(path.name), path.name)):
        name, record = path.name.removesuffix(".json"), load(path)
        if Path(name).stem in test:
            selection.passed_over["in ai2d_test_ids.csv"] += 1
            continue
        try:
            questions = list(dict(record["questions"]).items())  # an image without questions has an empty list
        except (KeyError, TypeError, ValueError):
            detail = record.msg if isinstance(record, json.JSONDecodeError) else "no questions in it"
            yield Drop(f"ai2d-{name}", "malformed", f"{path.name}: {detail}")
            continue
        stated = record.get("imageName", name)
        for number, (question, entry) in enumerate(questions):
            def make(entry: dict) -> Candidate:
                options = options_of(entry["answerTexts"])
                index = at(options, entry["correctAnswer"])
                pictures = "abc_images" if entry.get("abcLabel") else "images"
                return Candidate(f"ai2d-{entry.get('questionId', f'{name}-{number}')}", inside(folder, f"{pictures}/{name}"),
                                 question.strip(), question.strip() + lettered(options) + "\n" + OPTION_LETTER, LETTERS[index],
                                 mismatch="" if stated == name else f"the file is of {name}, its imageName is {stated}")
            yield from guarded(f"ai2d-{name}-{number}", entry, make)


def chartqa(folder: Path, selection: Selection) -> Iterator[Candidate | Drop]:
    """"ChartQA Dataset"/<split>/<split>_{human,augmented}.json [{imgname, query, label}], <split>/png: human-written only."""
    base = folder / "ChartQA Dataset" if (folder / "ChartQA Dataset").is_dir() else folder
    for split in splits_of(selection, ("train",)):
        for kind in ("human", "augmented"):
            if kind == "augmented" and not selection.machine:
                if (path := base / split / f"{split}_augmented.json").exists():
                    selection.passed_over["machine-written"] += sum(1 for _ in stream_json(path))
                continue
            for number, record in stream_json(base / split / f"{split}_{kind}.json"):
                def make(record: dict) -> Candidate:
                    question = text_of(record, "query")
                    image = inside(base / split / "png", text_of(record, "imgname"))
                    return Candidate(f"chartqa-{split}-{kind}-{number}", image, question, question + "\n" + SINGLE_WORD,
                                     text_of(record, "label"))
                yield from guarded(f"chartqa-{split}-{kind}-{number}", record, make)


@dataclass(frozen=True)
class Source:
    """How a source is read, what its raw folder must hold (any of the patterns), and how many records the paper has."""

    read: Callable[[Path, Selection], Iterator[Candidate | Drop]]
    holds: tuple[str, ...]
    paper: str   # Figure 3; after a comma Appendix B, where it says something else


SOURCES = {
    "arxivqa": Source(arxivqa, ("arxivqa.jsonl",), "100K"),
    "scienceqa": Source(scienceqa, ("problems.json",), "12.7K"),
    "math-vision": Source(math_vision, ("data/test.jsonl",), "3,040 in all"),
    "textbookqa": Source(textbookqa, ("*/tqa_v1_*.json",), "9.5K"),
    "geoqa": Source(geoqa, ("json/*.json", "geoqa+.jsonl"), "76K"),
    "geometry3k": Source(geometry3k, ("*/*/data.json",), "3,002 in all"),
    "tabmwp": Source(tabmwp, ("problems_*.json",), "30K"),
    "dvqa": Source(dvqa, ("*_qa.json",), "200K, 100K"),
    "ai2d": Source(ai2d, ("questions/*.json",), "12K"),
    "chartqa": Source(chartqa, ("ChartQA Dataset/*/*_human.json", "*/*_human.json"), "28.3K, 9.6K"),
}


def check_folder(source: str, folder: Path) -> None:
    """Raises SourceError where `folder` is not the raw layout of `source`, naming the one that it is."""
    if not folder.is_dir():
        raise SourceError(f"{folder}: no such folder")

    def fits(entry: Source) -> bool:
        return any(next(folder.glob(pattern), None) is not None for pattern in entry.holds)

    if not fits(SOURCES[source]):
        like = [name for name, entry in SOURCES.items() if fits(entry)]
        hint = f"; it looks like {like[0]}" if like else ""
        raise SourceError(f"{folder}: not {source}'s raw folder (no {' or '.join(SOURCES[source].holds)}){hint}")
