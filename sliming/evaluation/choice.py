"""Questions with options: MMBench and MMBench-CN, MMMU, ScienceQA.

Of MMBench-CN, Table 6 gives the English prompt; the released evaluation asks in Chinese, and so
does this.
"""

import ast
import base64
import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sliming.chat import OPTION_LETTER, SINGLE_WORD
from sliming.evaluation import formats
from sliming.evaluation.formats import LETTERS
from sliming.evaluation.question import Benchmark, Question, load, load_rows, need, ratio, split
from sliming.records import RecordError

EMPTY = (None, "", "nan")
MARKS = [("", ""), ("", "."), ("", ","), ("", ":"), ("", ")"), ("", ")."), ("(", ")"), ("(", ")."),
         (":", ""), (":", ","), (":", "."), (":", ")"), (":", ").")]  # before and after a letter


def mmbench_letter(prediction: str, choices: dict[str, str]) -> str | None:
    """The option's letter, or None: one that stands alone, then one with a mark at it, then the
    only option whose text the answer contains (can_infer of open-compass/VLMEvalKit and lmms-eval,
    without the judge behind it)."""
    words = prediction.split()
    for before, after in MARKS:
        found = [letter for letter in "ABCDE" if before + letter + after in words]
        # "A dog in ..." names no option.
        article = (before, after) == ("", "") and "A" in words and len(words) > 3
        if len(found) == 1 and not article:
            return found[0]
    found = [letter for letter, text in choices.items() if str(text).lower() in prediction.lower()]
    return found[0] if len(found) == 1 else None


class MMBench(Benchmark):
    """Circular: a question counts only if all its rotations are right."""

    name, column, form = "mmbench", "MMB", OPTION_LETTER
    data, submission = "mmbench_dev_20230712.tsv", ".xlsx"

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """mmbench_dev_20230712.tsv and the like; the test set's files have no `answer`."""
        rows = load_rows(path)
        pictures = {row.get("index"): row.get("image") for row in rows}
        for row in rows:
            index, text, image = need(row, "index", "question", "image")
            options = {letter: row[letter] for letter in "ABCD" if row.get(letter) not in EMPTY}
            if len(image) < 64:  # not an image but the index of the row that has it
                image = pictures.get(image) or ""
            try:
                picture = base64.b64decode(image, validate=True)
            except ValueError as error:
                raise RecordError(f"index {index}: the image is no base64") from error
            context = {"index": int(index), **options, "question": text}
            text = text if row.get("hint") in EMPTY else f"{row['hint']}\n{text}"
            yield Question(str(index), self.ask(text, options.values()), [picture],
                           row.get("answer") or None, context)

    def score(self, prediction: str, references: str, context: dict) -> float:
        """One rotation; `context`: {"A": text, ...}."""
        choices = {letter: context[letter] for letter in "ABCD"
                   if context.get(letter) is not None}
        return float(mmbench_letter(prediction, choices) == references)

    def unit(self, place: int, context: dict) -> tuple[str, object]:
        return "", int(context["index"]) % 1_000_000

    def counts(self, members: list[dict], scores: list[float]) -> tuple[float, ...]:
        """All rotations right, the first right, rotations, questions."""
        first = min(range(len(members)), key=lambda at: int(members[at]["context"]["index"]))
        return all(scores), scores[first], len(scores), 1

    def totals(self, sums: dict[str, np.ndarray]) -> dict:
        circular, vanilla, rows, questions = split(sums[""])
        return {"n_rows": rows, "n_questions": questions, "circular_correct": circular,
                "circular_acc": ratio(circular, questions),
                "vanilla_acc": ratio(vanilla, questions),
                "table": {self.column: 100 * ratio(circular, questions)}}

    def submit(self, rows: list[dict]) -> list[list]:
        """The sheet of MMBench's server."""
        head = ["index", "question", "A", "B", "C", "D", "prediction"]
        cells = [{**row["context"], "prediction": row["prediction"]} for row in rows]
        return [head, *([row.get(name, "") for name in head] for row in cells)]


class MMBenchCN(MMBench):
    """MMBench in Chinese."""

    name, column, data = "mmbench_cn", "MMB-C", "mmbench_dev_cn_20231003.tsv"
    form = "请直接回答选项字母。"


def mmmu_letter(prediction: str, choices: dict[str, str]) -> str | None:
    """The letter that MMMU reads out of an answer, None for none."""
    for mark in ",.!?;:'":
        prediction = prediction.strip(mark)
    text = f" {prediction} "
    for form in ("({letter})", " {letter} "):
        places = {letter: text.rfind(form.format(letter=letter)) for letter in choices}
        if max(places.values()) >= 0:
            return max(places, key=places.get)
    if len(text.split()) > 5:
        text = text.lower()
        places = {letter: text.rfind(str(option).lower()) for letter, option in choices.items()}
        if max(places.values()) >= 0:
            return max(places, key=places.get)
    return None


NUMBER_FORMS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
                r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
KEYS = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]


def mmmu_value(text: str) -> list[str | float]:
    """A number to 2 decimals, or lower-case text; a single character only with a space at it, lest
    it match everywhere."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        text = text.lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def mmmu_candidates(prediction: str) -> list[str | float]:
    """What an open answer may mean: its key clauses and the numbers in them."""
    text = prediction.strip().strip(".").lower()
    sentences, clauses = text.split("\n"), []
    for place, sentence in enumerate(sentences, 1):
        keys = KEYS + ["="] if place == len(sentences) else KEYS
        tails = [sentence.split(key)[-1].strip() for key in keys if key in sentence]
        shortest = None
        for tail in tails:
            if not shortest or len(tail) < len(shortest):
                shortest = tail
        if shortest and shortest not in tuple(":,.!?;'"):
            clauses.append(shortest)
    clauses = clauses or [text]
    numbers = [number for clause in clauses for form in NUMBER_FORMS
               for number in re.findall(form, clause)]
    return [value for piece in clauses + numbers for value in mmmu_value(piece)]


class MMMU(Benchmark):
    """Accuracy on the validation set (MMMU-Benchmark/MMMU eval_utils.py). The reference guesses
    where it finds no option; so does this, always the same for the same question."""

    name, column, form = "mmmu", "MMMU-v", OPTION_LETTER
    open_form, gold = SINGLE_WORD, (str, list)
    data = "validation-00000-of-00001.parquet of every subject"

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """The validation set's .parquet files (or their folder), or the same rows as JSON."""
        for row in load_rows(path):
            key, question, kind = need(row, "id", "question", "question_type")
            options, answer = row.get("options") or [], row.get("answer")
            choice, context = kind == "multiple-choice", {"id": key}
            try:
                options = ast.literal_eval(options) if isinstance(options, str) else options
                if isinstance(answer, str) and answer.startswith("[") and not choice:
                    answer = ast.literal_eval(answer)
            except (ValueError, SyntaxError) as error:
                raise RecordError(f"{key}: options or answer are no list") from error
            images = []
            for place in range(1, 8):
                image = row.get(f"image_{place}")
                if isinstance(image, dict):
                    image = image.get("bytes") or image.get("path")
                if image is not None:
                    images.append(image if isinstance(image, bytes) else (image,))
            if choice:
                context["index2ans"] = {LETTERS[at]: text for at, text in enumerate(options)}
            prompt = self.ask(question, options if choice else (), "({}) {}",
                              self.form if choice else self.open_form)
            yield Question(key, prompt, images, answer, context)

    def score(self, prediction: str, references: str | list[str], context: dict) -> float:
        """`context`: "index2ans" {letter: option} for a choice, and "id", which seeds the guess."""
        gold = references if isinstance(references, list) else [references]
        if choices := context.get("index2ans"):
            guess = random.Random(str(context.get("id"))).choice(sorted(choices))
            return float((mmmu_letter(prediction, choices) or guess) in gold)
        right = [value for answer in gold for value in mmmu_value(str(answer))]
        words = [value for value in right if isinstance(value, str)]
        return float(any(
            value in right if isinstance(value, float) else any(word in value for word in words)
            for value in mmmu_candidates(prediction)))

    def unit(self, place: int, context: dict) -> tuple[str, object]:
        return "choice" if context.get("index2ans") else "open", place

    def totals(self, sums: dict[str, np.ndarray]) -> dict:
        right, n = split(sum(sums.values()))
        opened = split(sums["open"]) if "open" in sums else [np.zeros_like(n)] * 2
        return {"n": n, "correct": right, "acc": ratio(right, n), "open_correct": opened[0],
                "n_open": opened[1], "table": {self.column: 100 * ratio(right, n)}}


def scienceqa_letter(prediction: str) -> str:
    """The option's letter, or "FAILED" (yfzhang114/SliME llava/eval/eval_science_qa.py)."""
    if prediction in tuple("ABCDE"):
        return prediction
    if len(prediction) >= 3 and prediction[0] in "ABCDE" and prediction[1:3] == ". ":
        return prediction[0]
    found = re.findall(r"The answer is ([A-Z]).", prediction)
    return found[0] if len(found) == 1 else "FAILED"


class ScienceQA(Benchmark):
    """Accuracy of all questions and, the paper's number, of those with an image."""

    name, column, form = "scienceqa", "ScienceQA", OPTION_LETTER
    data, truth = "llava_test_CQM-A.json", ("problems.json",)

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """problems.json with pid_splits.json beside it (the test split), or LLaVA's
        llava_test_CQM-A.json with problems.json."""
        content = load(path)
        if isinstance(content, dict):
            problems, splits = content, path.with_name("pid_splits.json")
            chosen = load(splits).get("test") if splits.is_file() else None
            chosen = chosen or [key for key, row in problems.items() if row.get("split") == "test"]
            asked = [(key, None, None) for key in chosen]
            if not asked:
                raise RecordError(f"{path}: no question of the test split in it")
        else:
            problems = load(self.second(path, truth))
            asked = [(str(key), turns[0]["value"].replace("<image>", "").strip(), row.get("image"))
                     for row in content for key, turns in [need(row, "id", "conversations")]]
        for key, text, image in asked:
            if key not in problems:
                raise RecordError(f"{path}: question {key} is not in problems.json")
            row = formats.scienceqa(key, problems[key])
            prompt = self.ask(text or "")
            if text is None:
                hint, image = problems[key].get("hint"), row.image
                text = f"Context: {hint}\n{row.question}" if hint else row.question
                prompt, image = self.ask(text, row.options), image and image.removeprefix("test/")
            yield Question(key, prompt, [(image, f"test/{image}")] if image else [], row.letter,
                           {"is_image": bool(image), "choices": row.options})

    def score(self, prediction: str, references: str, context: dict) -> float:
        return float(scienceqa_letter(prediction) == references)

    def unit(self, place: int, context: dict) -> tuple[str, object]:
        return "image" if context.get("is_image") else "text", place

    def groups(self, context: dict) -> dict[str, object]:
        return {"questions": ["all", "with image" if context.get("is_image") else "text only"]}

    def totals(self, sums: dict[str, np.ndarray]) -> dict:
        right, n = split(sum(sums.values()))
        images = split(sums["image"]) if "image" in sums else [np.zeros_like(n)] * 2
        accuracy = 100 * ratio(*images)
        return {"n": n, "acc": 100 * ratio(right, n), "n_img": images[1], "img_acc": accuracy,
                "table": {self.column: accuracy}}
