"""Mathematics: MathVision, MathVista, MathVerse, TabMWP."""

import random
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from sliming.chat import OPTION_LETTER, SINGLE_WORD
from sliming.evaluation import formats
from sliming.evaluation.formats import LETTERS
from sliming.evaluation.latex import plain_math, same_value
from sliming.evaluation.question import Benchmark, Question, entries, load, load_rows, need, number

FLAGS = [f"{first}he {phrase}" for phrase in (
    "final answer is", "answer is", "correct answer is", "answer should be") for first in "tT"]


def mathvision_answer(prediction: str) -> str:
    """What is compared: a final letter, a number after "is", what follows "the answer is", or the
    last box."""
    text = prediction.strip()
    for letter in "ABCDE":
        ends = text.endswith((f" {letter}.", f" ({letter})."))
        begins = (f"{letter}\n", f"({letter})\n", f"({letter}) {letter}\n")
        if ends or text.startswith(begins):
            text = letter
    tail = text.split("is ")[-1].rstrip(".")
    if number(tail) is not None:
        text = tail
    if "oxed{" not in text:
        for flag in FLAGS:
            if flag in text:
                text = text.split(flag)[-1].strip().split("\n")[0].split(". ")[0].strip()
    elif text.count("oxed{") > 1:
        text = "\\boxed{" + text.split("oxed{")[-1]
    text = plain_math(text)
    for letter in "abcde":
        text = text.replace(f"({letter})", letter).replace("{" + letter + "}", letter)
    return text.rstrip(".").lstrip(":").strip()


class MathVision(Benchmark):
    """The option's letter, its value or the gold value (mathvision-cuhk/MATH-V
    evaluation/evaluate.py), also per subject and level."""

    name, column, form = "mathvision", "MathVision", SINGLE_WORD
    data, by = "testmini.jsonl", ("subject", "level")

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """testmini.jsonl, which the paper reports, or test.jsonl."""
        for key, entry in entries(load(path), path):
            row = formats.math_vision(key, entry)
            shown = row.options == list(LETTERS[:len(row.options)])  # the options, in the picture
            context = {name: entry.get(name) for name in self.by}
            text, *options = formats.as_meant(row.question, *row.options)
            yield Question(row.id, self.ask(text, () if shown else options, "({}) {}"),
                           [(row.image, PurePosixPath(row.image).name)], row.letter or row.answer,
                           {**context, "id": row.id, "options": row.options})

    def remark(self, asked: int, left_out: int) -> str:
        return "the paper's numbers are those of testmini, its 304 questions" * (asked > 304)

    def score(self, prediction: str, references: str, context: dict) -> float:
        answer, options = mathvision_answer(prediction), context.get("options")
        value = options[LETTERS.index(references)] if options else ""
        return float(same_value(references, answer) or same_value(value, answer))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


def mathvista_value(extraction: str, context: dict) -> str | None:
    """An extracted answer in the form of the gold answer (calculate_score.py): a choice by its
    letter or the one at the smallest edit distance, a number."""
    if context["question_type"] == "multi_choice":
        choices, extraction = context["choices"], extraction.strip()
        if letters := re.findall(r"\(([a-zA-Z])\)", extraction):
            extraction = letters[0].upper()
        if extraction in tuple(LETTERS[:len(choices)]):
            return choices[LETTERS.index(extraction)]
        return min(choices, key=lambda choice: edit_distance(extraction, choice))
    try:
        if context["answer_type"] == "integer":
            return str(int(float(extraction)))
        if context["answer_type"] == "float":
            return str(round(float(extraction), int(context["precision"])))
    except (ValueError, OverflowError):
        return None
    return extraction


def mathvista_extract(prediction: str, context: dict) -> str | None:
    """An answer that is one already: an option, its letter, a number of the kind asked for. The
    reference's extract_answer.py takes these as they are, but for the letter."""
    text, kind = prediction.strip(), {"integer": int, "float": float}.get(context["answer_type"])
    if context["question_type"] == "multi_choice":
        letters = LETTERS[:len(context["choices"])]
        letter = re.fullmatch(rf"\(?([{letters}{letters.lower()}])\)?\.?", text)
        return text if text in context["choices"] else letter and letter[1].upper()
    try:
        return str(kind(text)) if kind else None
    except ValueError:
        return None


class MathVista(Benchmark):
    """Accuracy of extracted answers (lupantech/MathVista), also by its metadata. The published
    numbers have them extracted by GPT-4; what needs that is not scored here."""

    name, column, answer_tokens, submission = "mathvista", "MathVista", 1024, ".json"
    data, truth = "testmini.json (on the hub annot_testmini.json)", ("query.json",)
    by = ("task", "category", "context", "grade", "skills", "source", "language")
    decides, submits_always = "the official extraction and judge", True
    fields = ("pid", "question", "image", "choices", "unit", "precision", "answer", "metadata",
              "question_type", "answer_type")

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """testmini.json; the prompt is the data set's own query, its field or of query.json."""
        queries = load(truth) if truth is not None else {}
        for row in load_rows(path):
            key = str(row.get("pid", row.get("key")))
            query = row.get("query") or queries.get(key) or self.second(path, None)
            image, *_ = need(row, "image", "question_type", "answer_type")
            context = {**{name: row.get(name) for name in self.fields}, "query": query}
            yield Question(key, query, [(image, PurePosixPath(image).name)], row.get("answer"),
                           context)

    def extracted(self, row: dict) -> str | None:
        answer = super().extracted(row)
        return None if answer is None else mathvista_extract(answer, row["context"])

    def score(self, prediction: str, references: str, context: dict) -> float:
        """`prediction` is an extraction; `context`: question_type, answer_type, choices,
        precision."""
        return float(mathvista_value(prediction, context) == references)

    def groups(self, context: dict) -> dict[str, object]:
        return super().groups(context.get("metadata") or {})

    def parts(self, numbers: dict) -> list[tuple]:
        return [("answers", "without extraction", numbers["acc"], numbers["n"]),
                *super().parts(numbers)]

    def remark(self, asked: int, left_out: int) -> str:
        return (f"{left_out} answers need a language model to extract them and are not scored; "
                "the accuracy is that of the others") if left_out else ""

    def submit(self, rows: list[dict]) -> dict:
        """The input of MathVista's extract_answer.py."""
        return {row["id"]: {**row["context"], "pid": row["id"], "response": row["prediction"]}
                for row in rows}


class MathVerse(Benchmark):
    """String equality (ZrrSkywalker/MathVerse score_answer_s2.py --quick_match), also per version
    of the problem and subject. The published numbers need GPT-4, first to extract answers."""

    name, column, answer_tokens, submission = "mathverse", "MathVerse", 1024, ".json"
    data, by = "testmini.json", ("problem_version", "subject", "subfield")
    decides, submits_always = "the official extraction and judge", True

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """testmini.json; the prompt is query_wo. The text-only version has an empty `image`."""
        for row in load_rows(path):
            key, text, answer = need(row, "sample_index", "query_wo", "answer")
            image = row.get("image")
            images = [(image, f"images/{image}")] if image else []
            yield Question(str(key), text, images, answer, {"row": row})

    def remark(self, asked: int, left_out: int) -> str:
        return ("scored is string equality; the paper's numbers need a language model to extract "
                "answers and another to compare them")

    def score(self, prediction: str, references: str, context: dict) -> float:
        return float(prediction == references)

    def groups(self, context: dict) -> dict[str, object]:
        row = context.get("row", {})
        return super().groups({**(row.get("metadata") or {}), **row})

    def submit(self, rows: list[dict]) -> list[dict]:
        """The input of MathVerse's extract_answer_s1.py."""
        return [{**row["context"]["row"], "model_answer": row["prediction"]} for row in rows]

AMOUNT, DIGITS = r"[\d$.,/:]+", r"[-\d$.,/:]*\d"
# What names an option, in the order in which it is looked for.
OPTION_FORMS = (r"^\(([A-Za-z])\)$", r"^([A-Za-z])$", r"^([A-Za-z]). ", r"[Th]he answer is ([A-Z])",
                r"(?s)^\(([A-Za-z])\) .", r"(?s)[Th]he answer is \(([A-Za-z])\) .")
# A free answer is the last match of the first of these that occurs.
FREE_FORMS = (r"(?s)[Th]he answer is (.+)", rf"[Th]he table shows that ({AMOUNT}) ",
              rf" = ({AMOUNT})", rf" (?:be|is) ({DIGITS})", rf" (?:are|was) ({DIGITS})",
              rf" were ({DIGITS})", rf" ({AMOUNT} [AP]\.M\.)", rf"({DIGITS})")


def tabmwp_answer(prediction: str, context: dict) -> str:
    """The option or the amount that an answer gives (lupantech/PromptPG, extract_prediction)."""
    text = re.sub(r"\$?\\frac\{([-\d.,]+)\}\{([\d.,]+)\}\$?", r"\1/\2", prediction)
    text = re.sub(r"(?<![AP]\.M)\.$", "", text)
    text = re.sub(r"(?<=\d)=(?=[-$\d])", " = ", text).replace("\u2212", "-")
    if choices := context.get("choices"):
        for form in OPTION_FORMS:
            found = re.search(form, text)
            if found and (place := "ABCDEF".find(found[1].upper())) >= 0:
                guess = random.Random(str(context.get("id")))  # a letter behind the last option
                return choices[place] if place < len(choices) else guess.choice(choices)
        return max(choices, key=lambda choice: likeness(choice, text))
    for form in FREE_FORMS:
        if found := re.findall(form, text):
            answer = found[-1].strip()
            return answer if ".M." in answer else answer.removesuffix(".")
    return text


def likeness(a: str, b: str) -> float:
    """Of two texts: the share of their words that they have in common; 2 if they are the same."""
    if a == b:
        return 2.0
    words, others = a.split(" "), b.split(" ")
    longest = max(len(words), len(others))
    return len({*words} & {*others}) / longest if longest > 1 else 0.0


def tabmwp_form(text: str, unit: str | None) -> str:
    """Text as it is compared (run_gpt3.py, normalize_answer): "1,000", "$56.40" and "3/4" are
    numbers, to 3 decimals; other text goes without its unit."""
    text = re.sub(r"[,./]$", "", re.sub(r"^\$", "", text))
    if not re.fullmatch(r"[-+]?[\d,./]+", text):
        return (text.replace(unit, "").strip() if unit else text).lower()
    number = text.replace(",", "")
    try:
        above, _, below = number.partition("/")
        value = float(above) / float(below.split("/")[0]) if below else float(number)
        number = str(int(number)) if re.fullmatch(r"[-+]?\d+", number) else str(round(value, 3))
    except (ValueError, ZeroDivisionError):  # where the reference stops
        return text
    return re.sub(r"\.0+$", "", number)


class TabMWP(Benchmark):
    """The option or the number (not in the paper's tables; one of SMR's sources)."""

    name, column, form, choice_form = "tabmwp", "TabMWP", SINGLE_WORD, OPTION_LETTER
    data = "problems_test.json"

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """problems_test.json and the like: tables as images, questions of SMR's kind."""
        for key, entry in entries(load(path), path):
            row, unit = formats.tabmwp(key, entry), entry.get("unit")
            asks = f" (unit: {unit})" if unit and not row.options else ""
            prompt = self.ask(row.question + asks, row.options,
                              form=self.choice_form if row.options else self.form)
            yield Question(row.id, prompt, [(PurePosixPath(row.image).name, row.image)],
                           row.answer,
                           {"choices": row.options or None, "unit": unit, "id": row.id})

    def score(self, prediction: str, references: str, context: dict) -> float:
        """`context`: "choices" (list or None), "unit", and "id", which seeds a guess."""
        unit = context.get("unit")
        answer = tabmwp_form(tabmwp_answer(prediction, context), unit)
        return float(answer == tabmwp_form(references, unit))
