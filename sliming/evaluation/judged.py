"""Free answers that a judge marks: LLaVA-Bench, MM-Vet. Their files are written for it, and
LLaVA-Bench's number comes from the judge's reviews."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sliming.evaluation.question import Benchmark, Question, load_rows, need, ratio, split
from sliming.records import RecordError


class LlavaBench(Benchmark):
    """100 x the model's points / the reference's (llava/eval/summarize_gpt_review.py), over all
    and per category."""

    name, column = "llava_bench", "LLaVA-W"
    data, answer_tokens, submission = "questions.jsonl", 1024, ".jsonl"
    judge = ("GPT-4 as a judge (haotian-liu/LLaVA llava/eval/eval_gpt_review_bench.py reads the "
             "answers file; --score-only takes its reviews)")

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        for row in load_rows(path):
            key, image, text = need(row, "question_id", "image", "text")
            yield Question(str(key), text, [(image,)], None,
                           {"question_id": key, "category": row.get("category")})

    def review(self, row: dict) -> dict:
        """A judge's review as a row of answers: its first line is two numbers, the points of the
        reference's answer and of the model's."""
        first = str(row["content"]).split("\n")[0]
        try:
            theirs, ours = map(float, first.replace(",", " ").split())
        except ValueError as error:
            raise RecordError(f"the review of question {row.get('question_id')} does not begin "
                              f"with a line of two numbers but with {first[:60]!r}") from error
        context = {"points": [ours, theirs], "category": row.get("category", "")}
        return {"id": str(row.get("question_id")), "prediction": row["content"],
                "references": "", "context": context}

    def extracted(self, row: dict) -> str | None:
        return row["prediction"] if "points" in row["context"] else None

    def score(self, prediction: str, references: str, context: dict) -> float:
        return context["points"][0] / 10

    def unit(self, place: int, context: dict) -> tuple[str, object]:
        return context["category"], place

    def counts(self, members: list[dict], scores: list[float]) -> tuple[float, ...]:
        return *members[0]["context"]["points"], 1

    def totals(self, sums: dict[str, np.ndarray]) -> dict:
        ours, theirs, n = split(sum(sums.values()))
        parts = {part: 100 * ratio(*split(values)[:2]) for part, values in sums.items()}
        return {"n": n, "parts": parts, "table": {self.column: 100 * ratio(ours, theirs)}}

    def parts(self, numbers: dict) -> list[tuple]:
        return [("category", *part, "") for part in numbers["parts"].items()]

    def submit(self, rows: list[dict]) -> list[dict]:
        return [{"question_id": row["context"]["question_id"], "prompt": row["prompt"],
                 "text": row["prediction"], "answer_id": row["id"], "model_id": "sliming",
                 "metadata": {}} for row in rows]


class MMVet(Benchmark):
    """Marked by MM-Vet's evaluator."""

    name, column = "mm_vet", "MM-Vet"
    data, answer_tokens, submission = "mm-vet.json", 1024, ".json"
    judge = "MM-Vet's GPT-4 judge (yuweihao/MM-Vet mm-vet_evaluator.ipynb reads the answers file)"

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """mm-vet.json, or LLaVA's llava-mm-vet.jsonl."""
        for row in load_rows(path):
            official = "imagename" in row
            fields = ("key", "imagename", "question") if official else \
                ("question_id", "image", "text")
            key, image, text = need(row, *fields)
            source = str(key).removeprefix("v1_")
            yield Question(f"v1_{source}", text, [(image, f"images/{image}")], None, {}, source)

    def submit(self, rows: list[dict]) -> dict:
        return {row["id"]: row["prediction"] for row in rows}
