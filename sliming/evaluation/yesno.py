"""Questions to be answered by yes or no: MME, POPE, AMBER (and AMBER's descriptions)."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sliming.chat import SINGLE_WORD
from sliming.evaluation.question import Benchmark, Question, load_rows, need, ratio, split
from sliming.guard import read_text
from sliming.records import RecordError

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")
SUMS = {"perception": PERCEPTION, "cognition": COGNITION, "hallucination": PERCEPTION[:4]}


def mme_answer(prediction: str) -> str:
    """"yes", "no" or "other": the whole answer, else what its first 4 characters hold."""
    text = prediction.lower()
    if text in ("yes", "no"):
        return text
    return "yes" if "yes" in text[:4] else "no" if "no" in text[:4] else "other"


class MME(Benchmark):
    """Accuracy of questions plus of images, whose two questions must both be right, summed over
    categories (BradyFU, eval_tool/calculation.py)."""

    name, form = "mme", SINGLE_WORD
    data = "MME_Benchmark_release_version or llava_mme.jsonl"
    truth = ("MME_Benchmark_release_version",)

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """MME_Benchmark_release_version, or eval_tool's folder of one <category>.txt each, with
        lines of image, question and answer; or LLaVA's llava_mme.jsonl with one of them."""
        if path.suffix == ".jsonl":
            yield from self.llava(path, truth)
            return
        for category, image, text, answer, file in self.read_lines(path):
            answer = answer.strip()
            if answer not in ("Yes", "No"):
                raise RecordError(f"{file}: a line must be image, question and Yes or No between "
                                  f"tabs, not {(image, text, answer)}")
            endings = [""] if Path(image).suffix else [".jpg", ".png"]
            places = tuple(f"{category}/{inner}{image}{ending}"
                           for inner in ("images/", "") for ending in endings)
            # Seven of the official lines have two blanks before the form that is dropped here.
            text = " ".join(text.replace("Please answer yes or no.", "").split())
            yield Question(f"{category}/{image}/{answer}", self.ask(text), [places], answer,
                           {"category": category, "image": image}, f"{category}/{image}")

    def read_lines(self, path: Path) -> list[tuple]:
        """(category, image, question, answer, file) of every line. In the release, a category's
        folder holds the images and, per image, a .txt, together or in folders of their own."""
        found = []
        for category in (*PERCEPTION, *COGNITION):
            files = [path / f"{category}.txt"]
            if not files[0].is_file():
                inner = path / category / "questions_answers_YN"
                files = sorted((inner if inner.is_dir() else inner.parent).glob("*.txt"))
            for file in files:
                image = [] if file.stem == category and file.parent == path else [file.stem]
                for line in filter(str.strip, read_text(file).splitlines()):
                    found.append((category, *[*image, *line.split("\t"), "", ""][:3], file))
        if not found:
            raise RecordError(f"{path}: no MME category in it, neither <category>.txt nor "
                              "<category>/*.txt")
        return found

    def score(self, prediction: str, references: str, context: dict) -> float:
        return float(mme_answer(prediction) == references.lower())

    def unit(self, place: int, context: dict) -> tuple[str, object]:
        return context["category"], context["image"]

    def counts(self, members: list[dict], scores: list[float]) -> tuple[float, ...]:
        return sum(scores), len(scores), all(scores), 1

    def totals(self, sums: dict[str, np.ndarray]) -> dict:
        categories = {}
        for category, values in sums.items():
            right, n, both, images = split(values)
            categories[category] = 100 * ratio(right, n) + 100 * ratio(both, images)
        n = split(sum(sums.values()))[1]
        add = {name: sum((categories[part] for part in parts if part in categories),
                         start=np.zeros_like(n)) for name, parts in SUMS.items()}
        return {**add, "categories": categories, "n": n,
                "table": {f"MME-{name[0].upper()}": value for name, value in add.items()}}

    def parts(self, numbers: dict) -> list[tuple]:
        return [("category", *part, "") for part in numbers["categories"].items()]


def pope_answer(prediction: str) -> str:
    """"no" if No, no or not is a word of the first sentence, else "yes"."""
    words = prediction.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


class POPE(Benchmark):
    """Mean F1 of its three parts (AoiDragon/POPE evaluate.py)."""

    name, column, form, truth = "pope", "POPE", SINGLE_WORD, ("coco",)
    data = ("the folder coco of coco_pope_{adversarial,popular,random}.json, "
            "or llava_pope_test.jsonl")

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """One or a folder of coco_pope_*.json, or LLaVA's llava_pope_test.jsonl with it."""
        if path.suffix == ".jsonl":
            yield from self.llava(path, truth)
            return
        files = sorted(path.glob("coco_pope_*.json")) if path.is_dir() else [path]
        if not files:
            raise RecordError(f"{path}: no coco_pope_*.json in it")
        for file in files:
            part = file.stem.removeprefix("coco_pope_")
            for row in load_rows(file):
                key, image, text, label = need(row, "question_id", "image", "text", "label")
                yield Question(f"{part}/{key}", self.ask(text), [(image,)], label,
                               {"category": part}, str(key))

    def score(self, prediction: str, references: str, context: dict) -> float:
        return float(pope_answer(prediction) == references)

    def unit(self, place: int, context: dict) -> tuple[str, object]:
        return context.get("category", ""), place

    def counts(self, members: list[dict], scores: list[float]) -> tuple[float, ...]:
        """True and false "yes", true and false "no"."""
        yes, right = pope_answer(members[0]["prediction"]) == "yes", bool(scores[0])
        return yes and right, yes and not right, not yes and right, not yes and not right

    def totals(self, sums: dict[str, np.ndarray]) -> dict:
        parts = {}
        for part, values in sums.items():
            true_yes, false_yes, true_no, false_no = split(values)
            n = values.sum(-1)
            precision = ratio(true_yes, true_yes + false_yes)
            recall = ratio(true_yes, true_yes + false_no)
            parts[part] = {
                "n": n, "f1": ratio(2 * precision * recall, precision + recall),
                "accuracy": ratio(true_yes + true_no, n), "precision": precision,
                "recall": recall, "yes_ratio": ratio(true_yes + false_yes, n)}
        means = {key: sum(part[key] for part in parts.values()) / len(parts)
                 for key in next(iter(parts.values()))}
        return {**means, "n": sum(part["n"] for part in parts.values()), "parts": parts,
                "table": {self.column: 100 * means["f1"]}}

    def parts(self, numbers: dict) -> list[tuple]:
        return [("part", part, 100 * value["f1"], value["n"])
                for part, value in numbers["parts"].items() if part]


KINDS = {"discriminative-hallucination": "existence", "discriminative-attribute-state": "state",
         "discriminative-attribute-number": "number", "discriminative-attribute-action": "action"}
ATTRIBUTES = ("state", "number", "action")


class Amber(Benchmark):
    """F1 (the paper's column, though Table 6 says accuracy), with "no" as what is looked for;
    only the bare word counts (junyangwang0410/AMBER inference.py after SliME's capitalize)."""

    name, column, form = "amber", "AMBER", SINGLE_WORD
    data, truth = "query_discriminative.json", ("annotations.json",)

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """query_discriminative.json, or a part of it, with annotations.json."""
        truth = self.second(path, truth)
        gold = {row.get("id"): row for row in load_rows(truth)}
        for row in load_rows(path):
            key, image, text = need(row, "id", "image", "query")
            label = gold.get(key, {}).get("truth")
            if not isinstance(label, str):
                raise RecordError(f"{path}: question {key} has no yes or no in {truth}; "
                                  "descriptions are --benchmark amber_generative")
            yield Question(str(key), self.ask(text), [(image,)], label,
                           {"type": gold[key]["type"]})

    def score(self, prediction: str, references: str, context: dict) -> float:
        return float(prediction.capitalize() == references.capitalize())

    def unit(self, place: int, context: dict) -> tuple[str, object]:
        return KINDS.get(context.get("type"), "relation"), place

    def counts(self, members: list[dict], scores: list[float]) -> tuple[float, ...]:
        """Right, asked, "No" said, "No" true, both."""
        no = members[0]["prediction"].capitalize() == "No"
        truly = members[0]["references"].capitalize() == "No"
        return scores[0], 1, no, truly, no and truly

    def totals(self, sums: dict[str, np.ndarray]) -> dict:
        whole, parts = sum(sums.values()), dict(sums)
        attributes = [sums[part] for part in ATTRIBUTES if part in sums]
        if attributes:
            parts["attribute"] = sum(attributes)
        rates = {part: self.rates(values, 0.001 if part == "existence" else 0.0001)
                 for part, values in parts.items()}
        total = self.rates(whole, 0.0001)
        return {**total, "parts": rates, "table": {self.column: total["f1"]}}

    def parts(self, numbers: dict) -> list[tuple]:
        return [("kind", kind, value["f1"], value["n"])
                for kind, value in numbers["parts"].items()]

    @staticmethod
    def rates(values: np.ndarray, small: float) -> dict:
        """Percentages as the reference prints them, rounded before F1."""
        right, n, said, truly, both = split(values)
        accuracy, precision, recall = (
            np.round(100 * above / (below + 0.001), 1)
            for above, below in ((right, n), (both, said), (both, truly)))
        p, r = precision / 100, recall / 100
        return {"n": n, "accuracy": accuracy, "precision": precision, "recall": recall,
                "f1": np.round(100 * 2 * p * r / (p + r + small), 1)}


class AmberGenerative(Benchmark):
    """AMBER's other half: descriptions, whose nouns its own program looks up."""

    name, data = "amber_generative", "query_generative.json"
    answer_tokens, submission = 1024, ".json"
    judge = "AMBER's program (junyangwang0410/AMBER inference.py --evaluation_type g)"

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        for row in load_rows(path):
            key, image, text = need(row, "id", "image", "query")
            yield Question(str(key), text, [(image,)], None, {"id": key})

    def submit(self, rows: list[dict]) -> list[dict]:
        return [{"id": row["context"]["id"], "response": row["prediction"]} for row in rows]
