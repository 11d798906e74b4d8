"""Questions about photographs and charts with short answers: TextVQA, VQAv2, GQA, ChartQA.

Facts about layouts are from the benchmarks' repositories and, for prompts, from yfzhang114/SliME
and haotian-liu/LLaVA. LLaVA's question files end in the response format already.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from sliming.chat import SINGLE_WORD
from sliming.evaluation import formats
from sliming.evaluation.question import Benchmark, Question, entries, load, load_rows, need, number
from sliming.records import RecordError

PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"
NUMBER_WORDS = {word: str(number) for number, word in enumerate(
    "zero one two three four five six seven eight nine ten".split())} | {"none": "0"}
CONTRACTED = """ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd
    he's how'd how'll how's isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've
    o'clock oughtn't shan't should've shouldn't somebody'll somebody's someone'd someone'll
    someone's something'd something'll that's there'd there're there's they'd they'll they're
    they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's
    where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd
    you'll you're you've"""
CONTRACTED_TWICE = """couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've
    somebody'd've someone'd've something'd've there'd've they'd've we'd've who'd've wouldn't've
    y'all'll you'd've"""


# {word with an apostrophe missing: the word}, the reference's table with gaps and slips.
CONTRACTIONS = {word.replace("'", ""): word for word in CONTRACTED.split()} | {
    "".join(word.rsplit("'", 1)): word for word in CONTRACTED_TWICE.split()} | {
    word.replace("'", "", 1): word for word in CONTRACTED_TWICE.split()} | {
    "somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at", "'ow'sat": "'ow's'at",
    "yall'd've": "y'all'd've", "y'alld've": "y'all'd've", "y'all'dve": "y'all'd've"}


def strip_punctuation(text: str) -> str:
    """A mark is deleted if it touches a space or the text has a number like 1,000, else a space.

    "Touches" and "has" refer to the text before any replacement. Of the periods that no digit
    follows, the first 32 go: the reference passes a flag (re.UNICODE, 32) as re.sub's count.
    """
    delete_all = re.search(r"\d,\d", text) is not None
    result = text
    for mark in PUNCTUATION:
        delete = delete_all or mark + " " in text or " " + mark in text
        result = result.replace(mark, "" if delete else " ")
    return re.sub(r"\.(?!\d)", "", result, count=32)


def plain_words(text: str) -> str:
    """Lower case, digits for number words, no articles, contractions with their apostrophe."""
    words = [NUMBER_WORDS.get(word, word) for word in text.lower().split()]
    words = [CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the")]
    return " ".join(words)


def one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def textvqa_words(text: str) -> str:
    """An answer as TextVQA compares it (facebookresearch/mmf, EvalAIAnswerProcessor)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(strip_punctuation(one_line(text)))


def agreement(answer: str, references: list[str]) -> float:
    """Mean over the annotators of min(1, how many of the others gave `answer` / 3)."""
    given = references.count(answer)
    return sum(min(1.0, (given - (one == answer)) / 3) for one in references) / len(references)


# ------------------------------------------------------------------------------- the benchmarks


class TextVQA(Benchmark):
    """Soft accuracy (yfzhang114/SliME llava/eval/m4c_evaluator.py)."""

    name, column, form, gold = "textvqa", "VQA-T", SINGLE_WORD, (list,)
    data, truth = "llava_textvqa_val_v051_ocr.jsonl", ("TextVQA_0.5.1_val.json",)

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """LLaVA's file with the answers in TextVQA_0.5.1_val.json, or the latter, without OCR."""
        content = load(path)
        if not isinstance(content, dict) or "data" not in content:
            yield from self.llava(path, truth, own=True)
            return
        for _, row in entries(content["data"], path):
            key, image, text = need(row, "question_id", "image_id", "question")
            yield Question(str(key), self.ask(text), [(f"{image}.jpg",)], row.get("answers"), {},
                           str(image))

    def score(self, prediction: str, references: list[str], context: dict) -> float:
        words = [textvqa_words(reference) for reference in references]
        return agreement(textvqa_words(prediction), words)


class VQAv2(Benchmark):
    """Soft accuracy (GT-Vision-Lab/VQA vqaEval.py); for the test set EvalAI's file."""

    name, column, form, gold = "vqav2", "VQAv2", SINGLE_WORD, (list,)
    data = "llava_vqav2_mscoco_test-dev2015.jsonl or v2_OpenEnded_mscoco_val2014_questions.json"
    truth, submission = ("v2_mscoco_val2014_annotations.json",), ".json"

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """v2_OpenEnded_mscoco_val2014_questions.json with annotations, or LLaVA's test file."""
        content, answers = load(path), {}
        if truth is not None:
            for _, row in entries(load(truth)["annotations"], truth):
                key, given = need(row, "question_id", "answers")
                answers[str(key)] = [answer["answer"] for answer in given]
        subset = content.get("data_subtype", "val2014") if isinstance(content, dict) else ""
        fields = ("question", "image_id") if subset else ("text", "image")
        for _, row in entries(content["questions"] if subset else content, path):
            key, text, image = need(row, "question_id", *fields)
            image = f"COCO_{subset}_{image:012d}.jpg" if subset else image
            yield Question(str(key), self.ask(text), [(image,)], answers.get(str(key)), {})

    def score(self, prediction: str, references: list[str], context: dict) -> float:
        prediction, references = one_line(prediction), [one_line(text) for text in references]
        if len(set(references)) > 1:  # identical references switch all normalisation off
            prediction = plain_words(strip_punctuation(prediction))
            references = [plain_words(strip_punctuation(text)) for text in references]
        return agreement(prediction, references)

    def submit(self, rows: list[dict]) -> list[dict]:
        """Answers normalised as LLaVA's convert_vqav2_for_submission.py does."""
        return [{"question_id": int(row["id"]), "answer": textvqa_words(row["prediction"])}
                for row in rows]


class GQA(Benchmark):
    """Equal in lower case without final periods (yfzhang114/SliME convert_gqa_for_eval.py)."""

    name, column, form = "gqa", "GQA", SINGLE_WORD
    data, truth = "testdev_balanced_questions.json", ("testdev_balanced_questions.json",)

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """testdev_balanced_questions.json, or llava_gqa_testdev_balanced.jsonl with it beside."""
        rows = load_rows(path)
        if "imageId" not in rows[0]:
            yield from self.llava(path, truth)
            return
        for row in rows:
            image, text, answer = need(row, "imageId", "question", "answer")
            yield Question(row["key"], self.ask(text), [(f"{image}.jpg",)], answer, {})

    def score(self, prediction: str, references: str, context: dict) -> float:
        return float(prediction.rstrip(".").lower() == references)


class ChartQA(Benchmark):
    """Relaxed accuracy: numbers within 5 %, else equal but for case (QwenLM/Qwen-VL
    evaluate_vqa.py); also of its human- and its machine-written half."""

    name, column, form, by = "chartqa", "ChartQA", SINGLE_WORD, ("half",)
    data = "test_human.json, test_augmented.json"

    def read(self, path: Path, truth: Path | None) -> Iterator[Question]:
        """test_human.json, test_augmented.json, or the folder of both."""
        files = [path]
        if path.is_dir():
            files = sorted(path.glob("*_human.json")) + sorted(path.glob("*_augmented.json"))
        if not files:
            raise RecordError(f"{path}: no *_human.json and no *_augmented.json in it")
        for file in files:
            half = {"human": "human", "augmented": "machine"}.get(file.stem.split("_")[-1])
            for key, entry in entries(load(file), file):
                row = formats.chartqa(key, entry)
                yield Question(f"{file.stem}/{row.id}", self.ask(row.question),
                               [(entry["imgname"], row.image)], row.answer, {"half": half})

    def score(self, prediction: str, references: str, context: dict) -> float:
        given, gold = chart_number(prediction), chart_number(references)
        if given is not None and gold:
            return float(abs(given - gold) / abs(gold) <= 0.05)
        return float(prediction.lower() == references.lower())


def chart_number(text: str) -> float | None:
    value = number(text.rstrip("%"))
    return value / 100 if text.endswith("%") and value is not None else value
