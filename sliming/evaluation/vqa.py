"""Questions about photographs and charts with short answers: TextVQA, VQAv2, GQA, ChartQA.

Facts about layouts are from the benchmarks' repositories and, for prompts, from yfzhang114/SliME
and haotian-liu/LLaVA. LLaVA's question files end in the response format already.
"""

import re
from pathlib import Path

from sliming import formats
from sliming.chat import SINGLE_WORD
from sliming.evaluation.question import Benchmark, Question, entries, load, load_rows, need
from sliming.records import RecordError

# ----------------------------------------------------------------------------- words compared

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


def contractions() -> dict[str, str]:
    """{word with an apostrophe missing: the word}, the reference's table with gaps and slips."""
    table = {word.replace("'", ""): word for word in CONTRACTED.split()}
    for word in CONTRACTED_TWICE.split():
        first, last = word.index("'"), word.rindex("'")
        table[word[:first] + word[first + 1:]] = table[word[:last] + word[last + 1:]] = word
    return table | {
        "somebody'd": "somebodyd", "ow's'at": "'ow's'at", "'ows'at": "'ow's'at",
        "'ow'sat": "'ow's'at", "yall'd've": "y'all'd've", "y'alld've": "y'all'd've",
        "y'all'dve": "y'all'd've"}


CONTRACTIONS = contractions()


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
    total = 0.0
    for index in range(len(references)):
        others = references[:index] + references[index + 1:]
        total += min(1.0, others.count(answer) / 3)
    return total / len(references)


# ------------------------------------------------------------------------------- the benchmarks


class TextVQA(Benchmark):
    """Soft accuracy (yfzhang114/SliME llava/eval/m4c_evaluator.py)."""

    name, column, form, several = "textvqa", "VQA-T", SINGLE_WORD, True
    data, truth = "llava_textvqa_val_v051_ocr.jsonl", ("TextVQA_0.5.1_val.json",)

    def read(self, path: Path, truth: Path | None) -> list[Question]:
        """LLaVA's file with the answers in TextVQA_0.5.1_val.json, or the latter, without OCR."""
        content = load(path)
        if isinstance(content, dict) and "data" in content:
            questions = []
            for _, row in entries(content["data"], path):
                number, image, text = need(row, "question_id", "image_id", "question")
                questions.append(Question(str(number), self.ask(text), [(f"{image}.jpg",)],
                                          row.get("answers"), {}))
            return questions
        gold = {}
        truth = self.second(path, truth)
        for _, row in entries(load(truth)["data"], truth):
            image, text, given = need(row, "image_id", "question", "answers")
            gold[str(image), text.lower()] = str(need(row, "question_id")[0]), given
        questions = []
        for _, row in entries(content, path):
            image_id, image, text = need(row, "question_id", "image", "text")
            key = (str(image_id), text.split("\n")[0].lower())
            if key not in gold:
                raise RecordError(f"{path}: question {image_id} ({key[1]!r}) is not in {truth}")
            number, given = gold[key]
            questions.append(Question(number, self.ask(text), [(image,)], given, {}, key[0]))
        return questions

    def score(self, prediction: str, references: list[str], context: dict) -> float:
        words = [textvqa_words(reference) for reference in references]
        return agreement(textvqa_words(prediction), words)


class VQAv2(Benchmark):
    """Soft accuracy (GT-Vision-Lab/VQA vqaEval.py); for the test set EvalAI's file."""

    name, column, form, several = "vqav2", "VQAv2", SINGLE_WORD, True
    data = "llava_vqav2_mscoco_test-dev2015.jsonl or v2_OpenEnded_mscoco_val2014_questions.json"
    truth, submission = ("v2_mscoco_val2014_annotations.json",), ".json"

    def read(self, path: Path, truth: Path | None) -> list[Question]:
        """v2_OpenEnded_mscoco_val2014_questions.json with annotations, or LLaVA's test file."""
        content, gold, questions = load(path), {}, []
        if truth is not None:
            for _, row in entries(load(truth)["annotations"], truth):
                number, given = need(row, "question_id", "answers")
                gold[str(number)] = [answer["answer"] for answer in given]
        subset = content.get("data_subtype", "val2014") if isinstance(content, dict) else ""
        for _, row in entries(content["questions"] if subset else content, path):
            number, text = need(row, "question_id", "question" if subset else "text")
            (image,) = need(row, "image_id" if subset else "image")
            image = f"COCO_{subset}_{image:012d}.jpg" if subset else image
            number = str(number)
            questions.append(Question(number, self.ask(text), [(image,)], gold.get(number), {}))
        return questions

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

    def read(self, path: Path, truth: Path | None) -> list[Question]:
        """testdev_balanced_questions.json, or llava_gqa_testdev_balanced.jsonl with it beside."""
        rows, questions = load_rows(path), []
        if "imageId" in rows[0]:
            for row in rows:
                image, text, answer = need(row, "imageId", "question", "answer")
                images = [(f"{image}.jpg",)]
                questions.append(Question(row["key"], self.ask(text), images, answer, {}))
            return questions
        truth = self.second(path, truth)
        gold = load(truth)
        for row in rows:
            number, image, text = need(row, "question_id", "image", "text")
            number = str(number)
            if number not in gold:
                raise RecordError(f"{path}: question {number} is not in {truth}")
            answer = gold[number]["answer"]
            questions.append(Question(number, self.ask(text), [(image,)], answer, {}))
        return questions

    def score(self, prediction: str, references: str, context: dict) -> float:
        return float(prediction.rstrip(".").lower() == references)


class ChartQA(Benchmark):
    """Relaxed accuracy: numbers within 5 %, else equal but for case (QwenLM/Qwen-VL
    evaluate_vqa.py); also of its human- and its machine-written half."""

    name, column, form, by = "chartqa", "ChartQA", SINGLE_WORD, ("half",)
    data = "test_human.json, test_augmented.json"

    def read(self, path: Path, truth: Path | None) -> list[Question]:
        """test_human.json, test_augmented.json, or the folder of both."""
        files, questions = [path], []
        if path.is_dir():
            files = sorted(path.glob("*_human.json")) + sorted(path.glob("*_augmented.json"))
        if not files:
            raise RecordError(f"{path}: no *_human.json and no *_augmented.json in it")
        for file in files:
            half = {"human": "human", "augmented": "machine"}.get(file.stem.split("_")[-1])
            for key, entry in entries(load(file), file):
                row = formats.chartqa(key, entry)
                images = [(entry["imgname"], row.image)]
                questions.append(Question(f"{file.stem}/{row.id}", self.ask(row.question), images,
                                          row.answer, {"half": half}))
        return questions

    def score(self, prediction: str, references: str, context: dict) -> float:
        given, gold = chart_number(prediction), chart_number(references)
        if given is not None and gold:
            return float(abs(given - gold) / abs(gold) <= 0.05)
        return float(prediction.lower() == references.lower())


def chart_number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None
