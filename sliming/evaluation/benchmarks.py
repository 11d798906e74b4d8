"""The paper's benchmarks as questions: their official files, the prompts of Table 6, and the files that servers take.

Each reader turns one official file (or folder) into `Question`s; the table `BENCHMARKS` at the end names the files. A
prompt is the question, then its options, then Table 6's response format on a line of its own; images come before it. Where
LLaVA distributes a question file whose text already ends in that format, it is not added twice. What a file alone does not
hold is looked for under its official name beside it (`Benchmark.truth`).

Facts about layouts are from the benchmarks' repositories and, for prompts, yfzhang114/SliME and haotian-liu/LLaVA. Of
MMBench-CN, Table 6 gives the English prompt; the released evaluation asks in Chinese, and so does this.
"""

import ast
import base64
import csv
import io
import json
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from xml.sax.saxutils import escape

from sliming.chat import OPTION_LETTER as LETTER
from sliming.chat import SINGLE_WORD as WORD
from sliming.records import RecordError
from sliming.evaluation.metrics import LETTERS, MME_COGNITION, MME_PERCEPTION, textvqa_words

LETTER_CN = "请直接回答选项字母。"
RESPONSE_FORMATS = {  # Table 6, row by row; "-" is None. ChartQA and TabMWP are not in it.
    "textvqa": WORD, "gqa": WORD, "vqav2": WORD, "mmbench": LETTER, "mmbench_cn": LETTER_CN, "mmmu": LETTER,
    "mmmu_short_answer": WORD, "llava_bench": None, "mme": WORD, "scienceqa": LETTER, "mathvision": WORD,
    "mathvista": None, "mathverse": None, "pope": WORD, "amber": WORD, "mm_vet": None, "chartqa": WORD, "tabmwp": WORD,
    "tabmwp_choice": LETTER,
}

Image = bytes | tuple[str, ...]  # an encoded image, or the paths it may have inside the image folder


@dataclass(frozen=True)
class Question:
    """One question to the model. `references` is None where the gold answer is not public; `context` is what scoring it
    and submitting it need (metrics.score)."""

    id: str
    prompt: str
    images: list[Image]
    references: str | list[str] | None
    context: dict


@dataclass(frozen=True)
class Benchmark:
    """How to read one. `read(path, truth)` gives its questions; `truth` is the second official file where there is one."""

    read: Callable[[Path, Path | None], list[Question]]
    data: str                       # the official file(s)
    truth: tuple[str, ...] = ()     # official names of the second file, looked for beside the first and one folder up
    answer_tokens: int = 128        # at most
    submission: str = ""            # ending of the official file of answers, where one is written
    submit: Callable[[list[dict]], object] | None = None  # its content from rows of answers


# ------------------------------------------------------------------------------------------------------------ reading files

def load(path: Path) -> list | dict:
    """The content of a .json, .jsonl, .tsv or .parquet file; JSON that is really JSON lines is read as such."""
    try:
        if path.suffix == ".parquet":
            return load_parquet([path])
        if path.is_dir():
            if files := sorted(path.rglob("*.parquet")):
                return load_parquet(files)
            raise RecordError(f"{path}: a folder without .parquet files; name the benchmark's question file")
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read as text ({error})") from error
    if path.suffix == ".tsv":
        csv.field_size_limit(sys.maxsize)
        return list(csv.DictReader(io.StringIO(text, newline=""), delimiter="\t"))
    whole = None
    if path.suffix != ".jsonl":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            whole = error
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            if whole is not None and not rows:  # not even its first line: meant as one piece
                number, error = whole.lineno, whole
            raise RecordError(f"{path}, line {number}: broken JSON ({error.msg}, column {error.colno})") from error
    return rows


def load_parquet(files: list[Path]) -> list[dict]:
    try:
        from pyarrow import parquet  # only for this format, hence not a dependency
    except ImportError as error:
        raise RecordError(f"{files[0]}: reading .parquet needs pyarrow: pip install pyarrow, or convert it to .jsonl") from error
    return [row for file in files for row in parquet.read_table(file).to_pylist()]


def rows_of(content: list | dict, path: Path) -> list[dict]:
    """A list of objects as it is, an object of objects as a list with each key as "key"; RecordError for all else."""
    if isinstance(content, dict) and not all(isinstance(row, dict) for row in content.values()):
        content = [content]  # JSON lines of one line
    if isinstance(content, dict):
        content = [{"key": key, **row} for key, row in content.items()]
    for place, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise RecordError(f"{path}: entry {place} is not an object but {type(row).__name__}")
    if not content:
        raise RecordError(f"{path}: no questions in it")
    return content


def load_rows(path: Path) -> list[dict]:
    return rows_of(load(path), path)


def need(row: dict, *names: str) -> list:
    """The values of a row's fields; RecordError that names the row and the field that is missing or empty."""
    for name in names:
        if row.get(name) is None:
            label = next((f"{key} {row[key]}" for key in ("id", "question_id", "index", "pid", "key") if key in row), "a row")
            raise RecordError(f"{label}: no `{name}`; its fields are {', '.join(map(str, row))}"[:300])
    return [row[name] for name in names]


def ask(text: str, response: str | None) -> str:
    """A prompt: the text and, unless it ends so already, the response format on a line of its own."""
    return text if response is None or text.endswith(response) else f"{text}\n{response}"


def with_options(text: str, options: list[str], form: str = "{}. {}") -> str:
    return "\n".join([text, *(form.format(letter, option) for letter, option in zip(LETTERS, options))])


def no_truth(path: Path, names: tuple[str, ...]) -> RecordError:
    return RecordError(f"{path}: the gold answers are in {' or '.join(names)}: put it beside this file or name it with --truth")


# ------------------------------------------------------------------------------ questions about photographs: TextVQA to MME

def read_textvqa(path: Path, truth: Path | None) -> list[Question]:
    """llava_textvqa_val_v051_ocr.jsonl with the answers in TextVQA_0.5.1_val.json, or the latter alone, without OCR."""
    content = load(path)
    if isinstance(content, dict) and "data" in content:
        return [Question(str(number), ask(text, WORD), [(f"{image}.jpg",)], row.get("answers"), {})
                for row in rows_of(content["data"], path)
                for number, image, text in [need(row, "question_id", "image_id", "question")]]
    if truth is None:
        raise no_truth(path, BENCHMARKS["textvqa"].truth)
    answers = {}
    for row in rows_of(load(truth)["data"], truth):
        image, question, given, number = need(row, "image_id", "question", "answers", "question_id")
        answers[str(image), question.lower()] = (str(number), given)
    questions = []
    for row in rows_of(content, path):
        image_id, image, text = need(row, "question_id", "image", "text")
        key = (str(image_id), text.split("\n")[0].lower())
        if key not in answers:
            raise RecordError(f"{path}: question {image_id} ({key[1]!r}) is not in {truth}")
        number, given = answers[key]
        questions.append(Question(number, ask(text, WORD), [(image,)], given, {}))
    return questions


def read_vqav2(path: Path, truth: Path | None) -> list[Question]:
    """v2_OpenEnded_mscoco_val2014_questions.json with its annotations, or LLaVA's llava_vqav2_mscoco_test-dev2015.jsonl."""
    content, answers = load(path), {}
    if truth is not None:
        for row in rows_of(load(truth)["annotations"], truth):
            number, given = need(row, "question_id", "answers")
            answers[str(number)] = [answer["answer"] for answer in given]
    subset = content.get("data_subtype", "val2014") if isinstance(content, dict) else ""
    questions = []
    for row in rows_of(content["questions"] if subset else content, path):
        number, text = need(row, "question_id", "question" if subset else "text")
        image = f"COCO_{subset}_{need(row, 'image_id')[0]:012d}.jpg" if subset else need(row, "image")[0]
        questions.append(Question(str(number), ask(text, WORD), [(image,)], answers.get(str(number)), {}))
    return questions


def read_gqa(path: Path, truth: Path | None) -> list[Question]:
    """testdev_balanced_questions.json, or llava_gqa_testdev_balanced.jsonl with the former beside it."""
    rows = load_rows(path)
    if "imageId" in rows[0]:
        return [Question(row["key"], ask(text, WORD), [(f"{image}.jpg",)], answer, {})
                for row in rows for image, text, answer in [need(row, "imageId", "question", "answer")]]
    if truth is None:
        raise no_truth(path, BENCHMARKS["gqa"].truth)
    gold = load(truth)
    questions = []
    for row in rows:
        number, image, text = need(row, "question_id", "image", "text")
        if str(number) not in gold:
            raise RecordError(f"{path}: question {number} is not in {truth}")
        questions.append(Question(str(number), ask(text, WORD), [(image,)], gold[str(number)]["answer"], {}))
    return questions


def read_pope(path: Path, truth: Path | None) -> list[Question]:
    """coco_pope_adversarial.json, _popular and _random: one of them, the folder that holds them, or LLaVA's
    llava_pope_test.jsonl with that folder."""
    if path.suffix == ".jsonl":
        if truth is None:
            raise no_truth(path, BENCHMARKS["pope"].truth)
        gold = {(q.context["category"], q.images[0], q.prompt): q for q in read_pope(truth, None)}
        keys = [(category, (image,), ask(text, WORD)) for row in load_rows(path)
                for category, image, text in [need(row, "category", "image", "text")]]
        if missing := [key for key in keys if key not in gold]:
            raise RecordError(f"{path}: the question {missing[0]} is not in {truth}")
        return [gold[key] for key in keys]
    files = sorted(path.glob("coco_pope_*.json")) if path.is_dir() else [path]
    if not files:
        raise RecordError(f"{path}: no coco_pope_*.json in it")
    questions = []
    for file in files:
        category = file.stem.removeprefix("coco_pope_")
        for row in load_rows(file):
            number, image, text, label = need(row, "question_id", "image", "text", "label")
            questions.append(Question(f"{category}/{number}", ask(text, WORD), [(image,)], label, {"category": category}))
    return questions


def read_amber(path: Path, truth: Path | None) -> list[Question]:
    """query_discriminative.json (or a part of it) with annotations.json."""
    if truth is None:
        raise no_truth(path, BENCHMARKS["amber"].truth)
    gold = {row.get("id"): row for row in load_rows(truth)}
    questions = []
    for row in load_rows(path):
        number, image, text = need(row, "id", "image", "query")
        if "truth" not in gold.get(number, {}) or not isinstance(gold[number]["truth"], str):
            raise RecordError(f"{path}: question {number} has no yes or no in {truth}; generative questions are not scored")
        questions.append(Question(str(number), ask(text, WORD), [(image,)], gold[number]["truth"],
                                  {"type": gold[number]["type"]}))
    return questions


def read_mme(path: Path, truth: Path | None) -> list[Question]:
    """MME_Benchmark_release_version, or the folder of eval_tool with one <category>.txt of image, question and answer.

    In the release, a category's folder holds the images and, per image, a .txt of questions and answers, either all
    together or in images/ and questions_answers_YN/. LLaVA's llava_mme.jsonl needs either folder for its answers.
    """
    if path.suffix == ".jsonl":
        if truth is None:
            raise no_truth(path, BENCHMARKS["mme"].truth)
        gold = {(q.context["category"], Path(q.context["image"]).stem, q.prompt): q for q in read_mme(truth, None)}
        questions = []
        for row in load_rows(path):
            number, image, text = need(row, "question_id", "image", "text")
            category, name = number.split("/")[0], Path(number).stem
            question = gold.get((category, name, ask(text.replace(" Please answer yes or no.", ""), WORD)))
            if question is None:
                raise RecordError(f"{path}: the question {text.splitlines()[0]!r} about {number} is not in {truth}")
            questions.append(replace(question, images=[(image, *question.images[0])]))
        return questions
    lines = []  # category, image, question, answer, where
    for category in (*MME_PERCEPTION, *MME_COGNITION):
        if (listed := path / f"{category}.txt").is_file():
            lines += [(category, *line.split("\t")[:3], listed) for line in listed.read_text(encoding="utf-8").splitlines()]
            continue
        folder = path / category / "questions_answers_YN"
        for file in sorted((folder if folder.is_dir() else path / category).glob("*.txt")):
            lines += [(category, file.stem, *line.split("\t")[:2], file)
                      for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not lines:
        raise RecordError(f"{path}: no MME category in it: neither <category>.txt nor <category>/*.txt")
    questions = []
    for line in lines:
        if len(line) != 5 or line[3].strip() not in ("Yes", "No"):
            raise RecordError(f"{line[-1]}: a line must be image, question and Yes or No between tabs, not {line[1:-1]}")
        category, image, text, answer = line[0], line[1], line[2].strip(), line[3].strip()
        names = [image] if Path(image).suffix else [f"{image}{ending}" for ending in (".jpg", ".png")]
        places = tuple(f"{category}/{inner}{name}" for inner in ("images/", "") for name in names)
        questions.append(Question(f"{category}/{image}/{answer}", ask(text.replace(" Please answer yes or no.", ""), WORD),
                                  [places], answer, {"category": category, "image": image}))
    return questions


# --------------------------------------------------------------------------- questions with options: MMBench, MMMU, ScienceQA

def read_mmbench(path: Path, truth: Path | None, response: str = LETTER) -> list[Question]:
    """mmbench_dev_20230712.tsv and the like; the test set's files have no `answer`."""
    rows = load_rows(path)
    pictures = {row.get("index"): row.get("image") for row in rows}
    questions = []
    for row in rows:
        index, text, image = need(row, "index", "question", "image")
        options = {letter: row[letter] for letter in "ABCD" if row.get(letter) not in (None, "", "nan")}
        hint = row.get("hint")
        text = text if hint in (None, "", "nan") else f"{hint}\n{text}"
        if len(image) < 64:  # not an image but the index of the row that has it
            image = pictures.get(image) or ""
        try:
            picture = base64.b64decode(image, validate=True)
        except ValueError as error:
            raise RecordError(f"index {index}: the image is no base64") from error
        context = {"index": int(index), **options, "question": row["question"]}
        questions.append(Question(str(index), ask(with_options(text, list(options.values())), response), [picture],
                                  row.get("answer") or None, context))
    return questions


def read_mmbench_cn(path: Path, truth: Path | None) -> list[Question]:
    return read_mmbench(path, truth, LETTER_CN)


def read_mmmu(path: Path, truth: Path | None) -> list[Question]:
    """MMMU's validation set: its .parquet files (or their folder), or rows of the same fields as JSON."""
    questions = []
    validation = sorted(path.rglob("validation*.parquet"))  # its folder has a development and a test set, too
    for row in rows_of(load_parquet(validation), path) if validation else load_rows(path):
        number, text, kind = need(row, "id", "question", "question_type")
        options, answer = row.get("options") or [], row.get("answer")
        try:
            options = ast.literal_eval(options) if isinstance(options, str) else options
            if isinstance(answer, str) and answer.startswith("[") and kind != "multiple-choice":
                answer = ast.literal_eval(answer)
        except (ValueError, SyntaxError) as error:
            raise RecordError(f"{number}: options or answer are no list") from error
        images = []
        for place in range(1, 8):
            image = row.get(f"image_{place}")
            if isinstance(image, dict):
                image = image.get("bytes") or image.get("path")
            if image is not None:
                images.append(image if isinstance(image, bytes) else (image,))
        choice, context = kind == "multiple-choice", {"id": number}
        if choice:
            context["index2ans"] = dict(zip(LETTERS, options))
            text = with_options(text, options, "({}) {}")
        questions.append(Question(number, ask(text, LETTER if choice else WORD), images, answer, context))
    return questions


def read_scienceqa(path: Path, truth: Path | None) -> list[Question]:
    """problems.json with pid_splits.json beside it (the test split), or LLaVA's llava_test_CQM-A.json with problems.json."""
    content = load(path)
    if isinstance(content, dict):
        problems, splits = content, path.with_name("pid_splits.json")
        chosen = load(splits).get("test") if splits.is_file() else None
        chosen = [key for key, row in problems.items() if row.get("split") == "test"] if chosen is None else chosen
        asked = [(key, None, None) for key in chosen]
        if not asked:
            raise RecordError(f"{path}: no question of the test split in it")
    else:
        if truth is None:
            raise no_truth(path, BENCHMARKS["scienceqa"].truth)
        problems = load(truth)
        asked = [(str(number), turns[0]["value"].replace("<image>", "").strip(), row.get("image"))
                 for row in content for number, turns in [need(row, "id", "conversations")]]
    questions = []
    for number, text, image in asked:
        if number not in problems:
            raise RecordError(f"{path}: question {number} is not in problems.json")
        question, choices, answer = need(problems[number], "question", "choices", "answer")
        if text is None:
            hint, image = problems[number].get("hint"), problems[number].get("image")
            text = with_options(f"Context: {hint}\n{question}" if hint else question, choices)
            image = f"{number}/{image}" if image else None
        if not isinstance(answer, int) or not 0 <= answer < len(choices):
            raise RecordError(f"question {number}: answer {answer!r} is no place among its {len(choices)} choices")
        questions.append(Question(number, ask(text, LETTER), [(image, f"test/{image}")] if image else [], LETTERS[answer],
                                  {"is_image": image is not None, "choices": choices}))
    return questions


# -------------------------------------------------------------------------------------------------- mathematics and charts

def read_mathvision(path: Path, truth: Path | None) -> list[Question]:
    """testmini.jsonl, which the paper reports, or test.jsonl."""
    questions = []
    for row in load_rows(path):
        number, text, answer, image = need(row, "id", "question", "answer", "image")
        options = row.get("options") or []
        if options and answer not in tuple(LETTERS[:len(options)]):
            raise RecordError(f"question {number}: answer {answer!r} is none of its {len(options)} options")
        if options and options != list(LETTERS[:len(options)]):  # letters as options are in the picture
            text = with_options(text, options, "({}) {}")
        questions.append(Question(str(number), ask(text, WORD), [(image, PurePosixPath(image).name)], answer,
                                  {"id": number, "options": options}))
    return questions


def read_mathvista(path: Path, truth: Path | None) -> list[Question]:
    """testmini.json; the prompt is the data set's own query, of its field `query` or of query.json."""
    queries = load(truth) if truth is not None else {}
    questions = []
    for row in load_rows(path):
        number = str(row.get("pid", row.get("key")))
        query = row.get("query") or queries.get(number)
        if not query:
            raise no_truth(path, BENCHMARKS["mathvista"].truth)
        image, kind, form = need(row, "image", "question_type", "answer_type")
        context = {**{name: row.get(name) for name in ("pid", "question", "image", "choices", "unit", "precision", "answer",
                                                      "metadata")},
                   "question_type": kind, "answer_type": form, "query": query}
        questions.append(Question(number, query, [(image, PurePosixPath(image).name)], row.get("answer"), context))
    return questions


def read_mathverse(path: Path, truth: Path | None) -> list[Question]:
    """testmini.json; the prompt is query_wo. An empty `image` (the text-only version) gives no image."""
    questions = []
    for row in load_rows(path):
        number, text, answer = need(row, "sample_index", "query_wo", "answer")
        image = row.get("image")
        questions.append(Question(str(number), text, [(image, f"images/{image}")] if image else [], answer, {"row": row}))
    return questions


def read_chartqa(path: Path, truth: Path | None) -> list[Question]:
    """test_human.json, test_augmented.json, or the folder of both."""
    files = sorted(path.glob("*_human.json")) + sorted(path.glob("*_augmented.json")) if path.is_dir() else [path]
    if not files:
        raise RecordError(f"{path}: no *_human.json and no *_augmented.json in it")
    return [Question(f"{file.stem}/{place}", ask(text, WORD), [(image, f"png/{image}")], answer, {})
            for file in files for place, row in enumerate(load_rows(file))
            for image, text, answer in [need(row, "imgname", "query", "label")]]


def read_tabmwp(path: Path, truth: Path | None) -> list[Question]:
    """problems_test.json and the like: tables as images, questions of SMR's kind."""
    questions = []
    for row in load_rows(path):
        number, text, answer = need(row, "key", "question", "answer")
        choices, unit = row.get("choices"), row.get("unit")
        if choices:
            text = ask(with_options(text, choices), LETTER)
        else:
            text = ask(f"{text} (unit: {unit})" if unit else text, WORD)
        questions.append(Question(number, text, [(f"{number}.png", f"tables/{number}.png")], answer,
                                  {"choices": choices, "unit": unit}))
    return questions


# --------------------------------------------------------------------------------------------------- judged: free answers

def read_llava_bench(path: Path, truth: Path | None) -> list[Question]:
    """questions.jsonl."""
    return [Question(str(number), text, [(image,)], None, {"question_id": number, "category": row.get("category")})
            for row in load_rows(path) for number, image, text in [need(row, "question_id", "image", "text")]]


def read_mm_vet(path: Path, truth: Path | None) -> list[Question]:
    """mm-vet.json, or LLaVA's llava-mm-vet.jsonl."""
    questions = []
    for row in load_rows(path):
        if "imagename" in row:
            number, image, text = need(row, "key", "imagename", "question")
        else:
            number, image, text = need(row, "question_id", "image", "text")
        number = str(number) if str(number).startswith("v1_") else f"v1_{number}"
        questions.append(Question(number, text, [(image, f"images/{image}")], None, {}))
    return questions


# ------------------------------------------------------------------------------------------------ what servers and judges take

def submit_vqav2(rows: list[dict]) -> list[dict]:
    """EvalAI's format, answers normalised as LLaVA's convert_vqav2_for_submission.py does."""
    return [{"question_id": int(row["id"]), "answer": textvqa_words(row["prediction"])} for row in rows]


def submit_mmbench(rows: list[dict]) -> list[list]:
    """The sheet of the MMBench server: index, question, options and prediction."""
    head = ["index", "question", "A", "B", "C", "D", "prediction"]
    return [head, *([row["prediction"] if name == "prediction" else row["context"].get(name, "") for name in head]
                    for row in rows)]


def submit_llava_bench(rows: list[dict]) -> list[dict]:
    return [{"question_id": row["context"]["question_id"], "prompt": row["prompt"], "text": row["prediction"],
             "answer_id": row["id"], "model_id": "sliming", "metadata": {}} for row in rows]


def submit_mm_vet(rows: list[dict]) -> dict:
    return {row["id"]: row["prediction"] for row in rows}


def submit_mathvista(rows: list[dict]) -> dict:
    """The input of MathVista's extract_answer.py."""
    return {row["id"]: {**row["context"], "pid": row["id"], "response": row["prediction"]} for row in rows}


def submit_mathverse(rows: list[dict]) -> list[dict]:
    """The input of MathVerse's extract_answer_s1.py."""
    return [{**row["context"]["row"], "model_answer": row["prediction"]} for row in rows]


def write_submission(content: object, path: Path) -> None:
    """Writes a submission by its ending: .json, .jsonl (a list, one per line) or .xlsx (rows of cells)."""
    if path.suffix == ".xlsx":
        write_sheet(content, path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    else:
        path.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_sheet(rows: list[list], path: Path) -> None:
    """A workbook of one sheet (ECMA-376, SpreadsheetML): the least that readers accept, numbers as such, the rest as text."""
    def cell(value: object) -> str:
        if isinstance(value, int):
            return f"<c><v>{value}</v></c>"
        text = "".join(char for char in str(value) if char >= " " or char in "\t\n")  # XML has no other control characters
        return f'<c t="inlineStr"><is><t xml:space="preserve">{escape(text)}</t></is></c>'

    main = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    kinds = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    relations = "http://schemas.openxmlformats.org/package/2006/relationships"
    sheet = "application/vnd.openxmlformats-officedocument.spreadsheetml."
    body = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    parts = {
        "[Content_Types].xml": f'<Types xmlns="http://schemas.openxmlformats.org/package/2006/content-types">'
            f'<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
            f'<Override PartName="/xl/workbook.xml" ContentType="{sheet}sheet.main+xml"/>'
            f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{sheet}worksheet+xml"/></Types>',
        "_rels/.rels": f'<Relationships xmlns="{relations}"><Relationship Id="rId1" Type="{kinds}/officeDocument" '
            f'Target="xl/workbook.xml"/></Relationships>',
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{kinds}"><sheets><sheet name="Sheet1" sheetId="1" r:id="rId1"/>'
            f'</sheets></workbook>',
        "xl/_rels/workbook.xml.rels": f'<Relationships xmlns="{relations}"><Relationship Id="rId1" Type="{kinds}/worksheet" '
            f'Target="worksheets/sheet1.xml"/></Relationships>',
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{body}</sheetData></worksheet>',
    }
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as workbook:
        for name, content in parts.items():
            workbook.writestr(name, f'<?xml version="1.0" encoding="UTF-8" standalone="yes"?>{content}')


# ------------------------------------------------------------------------------------------------------------------- the table

VQA_ANSWERS = ("v2_mscoco_val2014_annotations.json",)
BENCHMARKS = {
    "textvqa": Benchmark(read_textvqa, "llava_textvqa_val_v051_ocr.jsonl", ("TextVQA_0.5.1_val.json",)),
    "gqa": Benchmark(read_gqa, "testdev_balanced_questions.json", ("testdev_balanced_questions.json",)),
    "vqav2": Benchmark(read_vqav2, "llava_vqav2_mscoco_test-dev2015.jsonl or v2_OpenEnded_mscoco_val2014_questions.json",
                       VQA_ANSWERS, submission=".json", submit=submit_vqav2),
    "mmbench": Benchmark(read_mmbench, "mmbench_dev_20230712.tsv", submission=".xlsx", submit=submit_mmbench),
    "mmbench_cn": Benchmark(read_mmbench_cn, "mmbench_dev_cn_20231003.tsv", submission=".xlsx", submit=submit_mmbench),
    "mmmu": Benchmark(read_mmmu, "validation-00000-of-00001.parquet of every subject"),
    "llava_bench": Benchmark(read_llava_bench, "questions.jsonl", answer_tokens=1024, submission=".jsonl",
                             submit=submit_llava_bench),
    "mme": Benchmark(read_mme, "MME_Benchmark_release_version or llava_mme.jsonl", ("MME_Benchmark_release_version",)),
    "mm_vet": Benchmark(read_mm_vet, "mm-vet.json", answer_tokens=1024, submission=".json", submit=submit_mm_vet),
    "mathverse": Benchmark(read_mathverse, "testmini.json", answer_tokens=1024, submission=".json", submit=submit_mathverse),
    "mathvista": Benchmark(read_mathvista, "testmini.json (on the hub annot_testmini.json)", ("query.json",),
                           answer_tokens=1024, submission=".json", submit=submit_mathvista),
    "mathvision": Benchmark(read_mathvision, "testmini.jsonl"),
    "scienceqa": Benchmark(read_scienceqa, "llava_test_CQM-A.json", ("problems.json",)),
    "pope": Benchmark(read_pope, "the folder coco of coco_pope_{adversarial,popular,random}.json, or llava_pope_test.jsonl",
                      ("coco",)),
    "amber": Benchmark(read_amber, "query_discriminative.json", ("annotations.json",)),
    "chartqa": Benchmark(read_chartqa, "test_human.json, test_augmented.json"),
    "tabmwp": Benchmark(read_tabmwp, "problems_test.json"),
}


def find_truth(benchmark: str, data: Path) -> Path | None:
    """The second official file (for two benchmarks a folder) beside `data` or one folder up, if it lies there."""
    for folder in (data.parent, data.parent.parent):
        for name in BENCHMARKS[benchmark].truth:
            if (folder / name).exists() and folder / name != data:
                return folder / name
    return None


def read_questions(benchmark: str, data: Path, truth: Path | None = None) -> list[Question]:
    """All questions of a benchmark's official file. Raises RecordError, in one line, for anything that does not fit."""
    if benchmark not in BENCHMARKS:
        raise RecordError(f"unknown benchmark {benchmark!r}; there are {', '.join(BENCHMARKS)}")
    if not data.exists():
        raise RecordError(f"{data}: no such file; {benchmark} is read from {BENCHMARKS[benchmark].data}")
    try:
        questions = BENCHMARKS[benchmark].read(data, truth or find_truth(benchmark, data))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, RecordError):
            raise RecordError(f"{benchmark}: {error}") from error
        raise RecordError(f"{benchmark}: {data} does not look like {BENCHMARKS[benchmark].data} "
                          f"({type(error).__name__}: {error})") from error
    seen: dict[str, int] = {}
    numbered = []
    for question in questions:  # an id met again gets a number, so that answers can be told apart
        seen[question.id] = seen.get(question.id, 0) + 1
        again = f"#{seen[question.id]}" if seen[question.id] > 1 else ""
        numbered.append(replace(question, id=question.id + again))
    return numbered


def locate(image: Image, folder: Path, question: str) -> bytes | Path:
    """The image itself, or its path inside the folder of images. Raises RecordError if it is not there."""
    if isinstance(image, bytes):
        return image
    for name in image:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise RecordError(f"question {question}: image {name} lies outside the image folder {folder}")
        if (folder / name).is_file():
            return folder / name
    raise RecordError(f"question {question}: no image {' or '.join(image)} in {folder}")
