"""Benchmarks from official files to a table: reading, prompts, answers, resuming, ranks."""

import base64
import io
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from flows import run_train
from PIL import Image
from reference import reference_folder

from sliming.chat import OPTION_LETTER as LETTER
from sliming.chat import SINGLE_WORD as WORD
from sliming.evaluation import answers, benchmarks
from sliming.evaluation import run as evaluate
from sliming.evaluation.answers import answers_file, read_answers
from sliming.evaluation.benchmarks import BENCHMARKS, locate, read_questions
from sliming.evaluation.report import PAPER, TABLE_COLUMNS
from sliming.model import SliME
from sliming.records import RecordError

REPOSITORY = Path(__file__).resolve().parents[2]
LETTER_CN = "请直接回答选项字母。"


def write(path: Path, content: object, lines: bool = False) -> Path:
    """JSON, or JSONL for `lines` and for a .jsonl path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = lines or path.suffix == ".jsonl"
    text = "".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content)
    path.write_text(text, encoding="utf-8")
    return path


def picture(path: Path | None, size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=generator)
    image, buffer = Image.fromarray(noise.numpy()), io.BytesIO()
    image.save(buffer, "PNG")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


@pytest.fixture
def command(monkeypatch, capsys):
    """stdout and stderr of the command line; SystemExit as it is."""
    def run(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
        evaluate.main()
        return capsys.readouterr()
    return run


@pytest.fixture
def fails(command, tmp_path):
    """The one line with which a command ends."""
    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as error:
            command("--out", tmp_path / "out", *arguments)
        message = str(error.value)
        assert message.startswith("sliming.evaluation: ") and "\n" not in message
        return message
    return run


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def short_answers(monkeypatch):
    """Four tokens are enough for tests."""
    for benchmark in BENCHMARKS.values():
        monkeypatch.setattr(benchmark, "answer_tokens", 4, raising=False)


@pytest.fixture
def tabmwp(tmp_path) -> Path:
    """Seven questions of TabMWP's layout; the images lie in tables/."""
    problems = {str(n): {"question": f"What is {n} + 1?", "choices": ["1", "2"] if n % 2 else None,
                         "answer": "2", "unit": None} for n in range(7)}
    for number in range(7):
        picture(tmp_path / "tables" / f"{number}.png", (30 + 40 * number, 60), number)
    return write(tmp_path / "problems_test.json", problems)


# ------------------------------------------------------------------------------------------ reading


@pytest.fixture
def asked(tmp_path):
    """The questions of a benchmark whose file has this content."""
    return lambda name, file, content: read_questions(name, write(tmp_path / file, content))


def test_photograph_questions(tmp_path, asked):
    official = {"image_id": "a1", "question": "What brand?", "question_id": 34602,
                "answers": ["x"] * 10}
    (question,) = asked("textvqa", "TextVQA_0.5.1_val.json", {"data": [official]})
    assert question.prompt == f"What brand?\n{WORD}"
    text = f"What brand?\nReference OCR token: N, I\n{WORD}"
    (question,) = asked("textvqa", "llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": "a1", "image": "a1.jpg", "text": text}])
    assert question.prompt == text  # not asked for a word twice
    assert (question.id, question.references, question.images) == \
        ("34602", ["x"] * 10, [("a1.jpg", "a1.jpg")])

    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": 1, "answers": [{"answer": "yes"}] * 10}]})
    (question,) = asked("vqav2", "v2_OpenEnded_mscoco_val2014_questions.json", {
        "data_subtype": "val2014",
        "questions": [{"question_id": 1, "image_id": 42, "question": "Is it?"}]})
    assert question.images == [("COCO_val2014_000000000042.jpg",)]
    assert question.references == ["yes"] * 10
    (question,) = asked("vqav2", "test/inner/llava_vqav2_mscoco_test-dev2015.jsonl", [
        {"question_id": 7, "image": "i.jpg", "text": f"Is it?\n{WORD}"}])
    assert question.references is None and question.prompt == f"Is it?\n{WORD}"

    (first,) = asked("gqa", "testdev_balanced_questions.json",
                     {"201": {"imageId": "n1", "question": "Left?", "answer": "no"}})
    assert (first.id, first.prompt, first.references) == ("201", f"Left?\n{WORD}", "no")
    llava = {"question_id": "201", "image": "n1.jpg", "text": f"Left?\n{WORD}"}
    (second,) = asked("gqa", "llava_gqa_testdev_balanced.jsonl", [llava])
    assert second.references == "no" and second.prompt == first.prompt
    with pytest.raises(RecordError, match="question 202 is not among the questions"):
        asked("gqa", "llava_gqa_testdev_balanced.jsonl",
              [llava | {"question_id": "202", "text": f"Right?\n{WORD}"}])

    chart = {"imgname": "1.png", "query": "How much?", "label": "3"}
    write(tmp_path / "chart" / "test_human.json", [chart])
    write(tmp_path / "chart" / "test_augmented.json", [{**chart, "label": "Bo"}])
    assert [(q.references, q.context["half"]) for q in
            read_questions("chartqa", tmp_path / "chart")] == [("3", "human"), ("Bo", "machine")]


def test_yes_or_no_questions(tmp_path, asked):
    text = "Is there a dog in the image?"
    row = {"question_id": 1, "image": "COCO.jpg", "text": text}
    for category, label in (("random", "yes"), ("adversarial", "no")):
        write(tmp_path / f"coco/coco_pope_{category}.json", [{**row, "label": label}] * 2, True)
    questions = read_questions("pope", tmp_path / "coco")
    assert [q.id for q in questions] == \
        ["adversarial/1", "adversarial/1#2", "random/1", "random/1#2"]
    assert questions[0].prompt == f"{text}\n{WORD}" and questions[0].references == "no"
    (question,) = asked("pope", "llava_pope_test.jsonl", [
        {**row, "text": f"{text}\n{WORD}", "category": "random"}])
    assert (question.id, question.references) == ("random/1", "yes")

    write(tmp_path / "amber" / "annotations.json", [
        {"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"},
        {"id": 1, "type": "generative", "truth": ["sky"], "hallu": []}])
    (question,) = asked("amber", "amber/query/query_discriminative.json", [
        {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"}])
    assert question.context == {"type": "discriminative-attribute-state"}
    assert question.prompt.endswith(f"image?\n{WORD}")
    query = [{"id": 1, "image": "AMBER_1.jpg", "query": "Describe this image."}]
    (question,) = asked("amber_generative", "amber/query/query_generative.json", query)
    assert question.prompt == "Describe this image."
    with pytest.raises(RecordError, match="descriptions are --benchmark amber_generative"):
        asked("amber", "amber/query/query_generative.json", query)


def test_mme_whose_files_have_double_blanks(tmp_path):
    folder = tmp_path / "MME" / "count"
    for name, lines in (("count/questions_answers_YN/12.txt",
                         "Are there two? Please answer yes or no.\tYes\n"
                         "Are there six  things?  Please answer yes or no.\tNo\n"),
                        ("OCR/1.txt", "Is it? Please answer yes or no.\tNo\n")):
        path = tmp_path / "MME" / name
        path.parent.mkdir(parents=True)
        path.write_text(lines)
    questions = read_questions("mme", tmp_path / "MME")
    assert [q.id for q in questions] == ["count/12/Yes", "count/12/No", "OCR/1/No"]
    assert [q.prompt for q in questions[:2]] == \
        [f"Are there two?\n{WORD}", f"Are there six things?\n{WORD}"]
    assert "OCR/1.png" in questions[2].images[0]
    llava = write(tmp_path / "llava_mme.jsonl", [
        {"question_id": "count/12.png", "image": "count/12.png", "category": "count",
         "text": f"Are there six  things? \n{WORD}"}])
    (question,) = read_questions("mme", llava, tmp_path / "MME")
    assert question.references == "No" and question.context == questions[1].context
    assert question.prompt == questions[1].prompt
    picture(folder / "images" / "12.png")
    assert locate(questions[0].images[0], tmp_path / "MME", "?").name == "12.png"
    folder.with_suffix(".txt").write_text("1.jpg\tIs it?\tMaybe\n")
    with pytest.raises(RecordError, match="must be image, question and Yes or No"):
        read_questions("mme", tmp_path / "MME")


def test_questions_with_options(tmp_path, asked):
    png = picture(None)
    head = ["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"]
    rows = [head, ["7", "Which?", '"Look:\nhere"', "cat", "dog", "", "", "A", "x",
                   base64.b64encode(png).decode(), "dev"],
            ["1000007", "Which?", "nan", "dog", "cat", "", "", "B", "x", "7", "dev"]]
    data = tmp_path / "mmbench_dev.tsv"
    data.write_text("\n".join(map("\t".join, rows)), encoding="utf-8")
    first, second = read_questions("mmbench", data)
    assert first.prompt == f"Look:\nhere\nWhich?\nA. cat\nB. dog\n{LETTER}"
    assert first.images == second.images == [png] and second.context["index"] == 1000007
    assert second.prompt == f"Which?\nA. dog\nB. cat\n{LETTER}"
    assert read_questions("mmbench_cn", data)[0].prompt.endswith(f"B. dog\n{LETTER_CN}")

    choice, opened = asked("mmmu", "mmmu.jsonl", [
        {"id": "validation_Art_1", "question": "See <image 1>", "options": "['one', \"it's\"]",
         "answer": "B", "image_1": "a.png", "image_2": "b.png", "question_type": "multiple-choice"},
        {"id": "validation_Art_2", "question": "How many?", "options": "[]",
         "answer": "['3', 'three']", "image_1": {"bytes": None, "path": "c.png"},
         "question_type": "open"}])
    assert choice.prompt == f"See <image 1>\n(A) one\n(B) it's\n{LETTER}"
    assert choice.images == [("a.png",), ("b.png",)]
    assert choice.context["index2ans"] == {"A": "one", "B": "it's"}
    assert opened.prompt == f"How many?\n{WORD}" and opened.references == ["3", "three"]

    with_image, without = asked("scienceqa", "problems.json", {
        "5": {"question": "Why?", "choices": ["no", "yes"], "answer": 1, "hint": "A plant.",
              "image": "image.png", "split": "test"},
        "6": {"question": "How?", "choices": ["so", "not"], "answer": 0, "hint": "", "image": None,
              "split": "test"},
        "8": {"question": "Train?", "choices": ["a"], "answer": 0, "split": "train"}})
    text = "Context: A plant.\nWhy?\nA. no\nB. yes"
    assert with_image.prompt == f"{text}\n{LETTER}" and with_image.references == "B"
    assert with_image.images == [("5/image.png", "test/5/image.png")]
    assert without.prompt == f"How?\nA. so\nB. not\n{LETTER}"
    assert without.images == [] and not without.context["is_image"]
    assert [with_image] == asked("scienceqa", "llava_test_CQM-A.json", [
        {"id": "5", "image": "5/image.png",
         "conversations": [{"from": "human", "value": f"<image>\n{text}"}]}])


def test_mathematics_and_free_answers(tmp_path, asked):
    row = {"question": "Which?", "answer": "B", "image": "images/4.jpg", "subject": "algebra"}
    questions = asked("mathvision", "testmini.jsonl", [
        {**row, "id": "4", "question": "How many?\n<image1>", "options": [], "answer": "6"},
        {**row, "id": "5", "options": ["A", "B"]},
        {**row, "id": "6", "options": ["$1$", "2"], "level": 3}])
    assert [question.prompt for question in questions] == \
        [f"How many?\n{WORD}", f"Which?\n{WORD}", f"Which?\n(A) $1$\n(B) 2\n{WORD}"]
    assert questions[2].context == {"id": "6", "options": ["$1$", "2"], "subject": "algebra",
                                    "level": 3}
    assert [question.references for question in questions] == ["6", "B", "B"]

    rows = {"1": {"pid": "1", "question": "Q", "image": "images/1.jpg", "choices": None,
                  "precision": 1.0, "answer": "1.2", "question_type": "free_form",
                  "answer_type": "float"}}
    with pytest.raises(RecordError, match=r"query\.json"):
        asked("mathvista", "vista/testmini.json", rows)
    write(tmp_path / "vista" / "query.json", {"1": "Hint: answer.\nQuestion: Q"})
    (question,) = asked("mathvista", "vista/testmini.json", rows)
    assert question.prompt == "Hint: answer.\nQuestion: Q"

    (question,) = asked("mathverse", "verse.json", [
        {"sample_index": "1", "query_wo": "Find.", "answer": "A", "image": ""}])
    assert question.prompt == "Find." and question.images == []
    (question,) = asked("llava_bench", "questions.jsonl", [
        {"question_id": 0, "image": "001.jpg", "text": "Describe.", "category": "detail"}])
    assert question.prompt == "Describe."
    vet = asked("mm_vet", "mm-vet.json", {
        "v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "1"}})
    assert vet[0].id == "v1_0" and vet == asked("mm_vet", "llava-mm-vet.jsonl", [
        {"question_id": 0, "image": "v1_0.png", "text": "What is x?"}])


@pytest.mark.parametrize("name, content, complaint", [
    ("nonsense", "{}", "unknown benchmark 'nonsense'; there are textvqa"),
    ("gqa", "", "no questions in it"),
    ("gqa", '{"a": 1', "broken JSON"),
    ("mathvision", '{"id": "1"}\n{"id": ', "line 2: broken JSON"),
    ("mathvision", '{"id": "1", "question": "Q", "options": ["x"], "answer": "B", "image": "i"}',
     "question 1: answer 1 is none of 1 options"),
    ("mathvision", '{"id": "9", "question": "Q"}', "question 9: no `answer`"),
    ("mathvision", "[1, 2]", "entry 1 is not an object but int"),
    ("pope", '{"1": {"question": "of TabMWP"}}', "no `question_id`"),
    ("scienceqa", '{"5": {"question": "Q", "choices": ["a"], "answer": 3, "split": "test"}}',
     "question 5: answer 3 is none of 1"),
    ("tabmwp", '{"5": {"question": "Q", "choices": ["a", "b"], "answer": "c"}}',
     "answer 'c' is none of 2"),
    ("textvqa", '{"question_id": 1, "image": "a", "text": "b"}',
     "put it beside this file or name it with --truth"),
    ("mme", "{}", "no MME category in it"),
    ("vqav2", '{"questions": 3, "data_subtype": "val2014"}', "does not look like"),
])
def test_a_file_that_does_not_fit_gets_one_line(tmp_path, name, content, complaint):
    path = tmp_path / "file.json"
    path.write_text(content)
    with pytest.raises(RecordError) as error:
        read_questions(name, path)
    assert complaint in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RecordError, match="no such file|unknown benchmark"):
        read_questions(name, tmp_path / "absent.json")


def test_images_stay_in_their_folder(tmp_path):
    folder = tmp_path / "in"
    picture(folder / "a.png")
    picture(tmp_path / "b.png")
    assert locate(("b.png", "a.png"), folder, "q") == folder / "a.png"
    assert locate(b"x", tmp_path, "q") == b"x"
    for name in ("../b.png", str(tmp_path / "b.png")):
        with pytest.raises(RecordError, match="question q: .*lies outside"):
            locate((name,), folder, "q")
    with pytest.raises(RecordError, match="question q: no image c.png"):
        locate(("c.png",), folder, "q")


@pytest.mark.reference
def test_prompts_and_rows_are_the_papers():
    text = (reference_folder("paper") / "beyond-llava-hd.txt").read_text(encoding="utf-8")
    text = text.replace("’", "'")
    table6 = text[text.index("Table6:"):text.index("Table7:")].replace(" ", "")
    names = {"Text-VQA": "textvqa", "GQA": "gqa", "VQA-v2": "vqav2", "MMBench,MMBench-CN":
             "mmbench", "MMMU(Multi-choice)": "mmmu", "LLaVA-Bench": "llava_bench", "MME": "mme",
             "Science-QA": "scienceqa", "MathVision": "mathvision", "MathVista": "mathvista",
             "MathVerse": "mathverse", "POPE": "pope", "AMBER": "amber"}
    forms = {row: BENCHMARKS[name].form for row, name in names.items()}
    for row, form in {**forms, "MMMU(Shortanswer)": BENCHMARKS["mmmu"].open_form}.items():
        (prompt,) = re.findall(rf"^{re.escape(row)}(-(?=[AS])|Answer.*?\.)", table6, re.M)
        assert prompt == (form or "-").replace(" ", ""), row
    rows = {}
    for line in text[text.index("Table 1: "):text.index("Table 3: ")].splitlines():
        if line.startswith("SliME-"):
            model, values = line.split()[0].replace("†", " LoRA"), map(float, line.split()[2:])
            rows.setdefault(model, []).extend(values)
    assert rows == PAPER and len(TABLE_COLUMNS) == len(rows["SliME-7B"]) + 2


# ---------------------------------------------------------------------------------------- answering


def test_answers_in_batches_are_those_one_by_one(model):
    """Texts, in their order; that a batch's tokens are those of each alone, test_model.py says."""
    torch.manual_seed(5)  # an untrained adapter makes all answers alike, a random output layer not
    model.llm.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.llm.lm_head.weight))
    images = [picture(None, size, seed) for seed, size in
              enumerate([(40, 30), (700, 300), (100, 400)])]
    samples = [model.processor.prompt([{"from": "human", "value": text}], [*map(io.BytesIO, some)])
               for text, some in (("<image>\nWhat number is it?", images[:1]),
                                  ("<image>\nWhich colour is the square?", images[1:2]),
                                  ("<image>\n<image>\nAny?", images[1:]), ("Words only", []))]
    said = [model.generate(sample, max_new_tokens=7) for sample in samples]
    alone = [model.processor.tokenizer.decode(list(ids)).strip() for ids in said]
    assert len(set(alone)) > 1
    for size in (1, 3, 8):
        batches = model.answer_all(range(4), samples.__getitem__, size, max_new_tokens=7)
        assert [pair for batch in batches for pair in batch] == list(enumerate(alone))


def test_a_killed_run_goes_on_where_it_was(tabmwp, checkpoint, tmp_path, command, short_answers,
                                           monkeypatch):
    arguments = ["--checkpoint", checkpoint, "--benchmark", "tabmwp", "--data", tabmwp,
                 "--images", tmp_path, "--batch-size", 2]
    command(*arguments, "--out", tmp_path / "whole")
    whole = answers_file(tmp_path / "whole", "tabmwp").read_bytes()
    header, rows = read_answers(answers_file(tmp_path / "whole", "tabmwp"))
    assert [row["id"] for row in rows] == list("0123456") and header["benchmark"] == "tabmwp"

    asked, real = [], SliME.generate_batch
    monkeypatch.setattr(SliME, "generate_batch", lambda model, samples, **options: (
        asked.append(len(samples)), real(model, samples, **options))[1])
    lines = whole.splitlines(keepends=True)
    four = b"".join(lines[:4])
    for kept in (b"", lines[0][:9], four, four + lines[4][:30], b"".join(lines)):
        asked.clear()
        path = answers_file(tmp_path / "killed", "tabmwp")
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(kept)
        out, err = command(*arguments, "--out", tmp_path / "killed")
        assert path.read_bytes() == whole and sum(asked) == 7 - max(0, kept.count(b"\n") - 1)
    assert asked == [] and "| TabMWP |" in out and "SliME-8B" in out
    # What other ranks left behind counts, too.
    other = answers_file(tmp_path / "killed", "tabmwp", 1)
    path.write_bytes(b"".join(lines[:2]))
    other.write_bytes(lines[0] + lines[7])
    command(*arguments, "--out", tmp_path / "killed")
    assert sum(asked) == 5 and not other.exists() and path.read_bytes() == whole


def test_bad_runs_end_with_one_line_and_keep_what_is_answered(tabmwp, checkpoint, tmp_path, fails,
                                                              short_answers):
    common = ["--data", tabmwp, "--images", tmp_path, "--batch-size", 2, "--checkpoint", checkpoint]
    file = answers_file(tmp_path / "out", "tabmwp")
    table = tmp_path / "tables" / "4.png"
    table.rename(tmp_path / "away.png")
    assert "question 4: no image 4.png or tables/4.png" in fails("--benchmark", "tabmwp", *common)
    assert len(read_answers(file)[1]) == 4
    table.write_bytes(b"no image")
    assert "question 4" in fails("--benchmark", "tabmwp", *common)
    assert len(read_answers(file)[1]) == 4
    (tmp_path / "away.png").rename(table)

    assert "unknown benchmark 'tabmwq'; there are" in fails("--benchmark", "tabmwq", *common)
    assert "2 benchmarks need as many --data" in fails("--benchmark", "tabmwp", "pope", *common)
    assert "named twice" in fails("--benchmark", "tabmwp", "tabmwp", "--data", tabmwp, tabmwp)
    assert "answers of another benchmark, tabmwp, not pope" in \
        fails("--benchmark", "pope", "--score-only", file)
    assert "line 1: broken JSON" in fails("--score-only", table)
    other = tmp_path / "some.jsonl"
    other.write_text('{"id": 1}')
    assert "not a file of answers" in fails("--score-only", other)
    assert other.read_text() == '{"id": 1}'  # what is not ours stays as it is
    assert "cannot be read" in fails("--score-only", tmp_path / "absent.jsonl")

    kept = file.read_bytes()
    header, *rows = kept.splitlines(keepends=True)
    for wrong, said in (({"benchmark": "pope"}, "another benchmark, pope, not tabmwp"),
                        ({"key": "0"}, "other questions"), ({"weights": "0"}, "other weights"),
                        ({"checkpoint": "other"}, "another checkpoint, other, not")):
        changed = {**json.loads(header), **wrong}
        file.write_bytes(json.dumps(changed).encode() + b"\n" + b"".join(rows))
        before = file.read_bytes()
        assert said in fails("--benchmark", "tabmwp", *common) and file.read_bytes() == before
    file.write_bytes(kept.replace(b'"id": "1"', b'"id": 1"', 1))
    assert "line 3: broken JSON" in fails("--benchmark", "tabmwp", *common)


def records_of(tabmwp: Path) -> Path:
    """Records of which two of five are right, if greedy, and one cannot be used."""
    rows = [{"id": n, "image": f"tables/{n}.png", "conversations": [
        {"from": "human", "value": "<image>\nHow many?"}, {"from": "gpt", "value": "three"}]}
        for n in range(5)]
    rows[3]["image"] = "tables/absent.png"
    return write(tabmwp.parent / "records.json", rows)


def test_two_ranks_share_the_work(tabmwp, checkpoint, tmp_path, command, short_answers):
    records = records_of(tabmwp)
    flags = [["--benchmark", "tabmwp", "--data", tabmwp, "--images", tmp_path, "--batch-size", 2],
             ["--data", records, "--images", tmp_path, "--batch-size", 2], ["--questions", 33]]
    flags = [[*map(str, some), "--checkpoint", str(checkpoint)] for some in flags]
    alone = [command(*some, "--out", tmp_path / "one")[0] for some in flags]
    assert json.loads(alone[1])["n"] == 4 and json.loads(alone[1])["skipped"] == 1
    script = tmp_path / "script.py"
    script.write_text("from sliming.evaluation import benchmarks\n"
                      "from sliming.evaluation.run import main\n"
                      "benchmarks.BENCHMARKS['tabmwp'].answer_tokens = 4\n")
    done = run_train(*([*one, "--out", tmp_path / "two"] for one in flags), program=script, ranks=2,
                     cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(alone)  # one rank reports; the same numbers
    assert "4/4" in done.stderr  # its share of seven questions
    files = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert files == ["results.json", "results.md", "results.png", "tabmwp.jsonl"]
    assert answers_file(tmp_path / "two", "tabmwp").read_bytes() == \
        answers_file(tmp_path / "one", "tabmwp").read_bytes()


def test_every_way_runs_on_the_device_in_the_dtype(tabmwp, checkpoint, tmp_path, command,
                                                   monkeypatch):
    met, device = [], torch.device("meta")  # stands in for a GPU

    def look(model, *_, **__):
        weight = model.adapter.w_gate
        met.append((weight.device.type, weight.dtype))
        return {}

    monkeypatch.setattr(evaluate, "rank_device", lambda: device)
    for name in ("held_out_accuracy", "record_accuracy", "answer_benchmark"):
        monkeypatch.setattr(evaluate, name, look)
    common = ["--checkpoint", checkpoint, "--dtype", "bfloat16", "--out", tmp_path / "out"]
    command(*common)
    command(*common, "--data", records_of(tabmwp), "--images", tmp_path)
    command(*common, "--data", tabmwp, "--images", tmp_path, "--benchmark", "tabmwp")
    assert met == [("meta", torch.bfloat16)] * 3


@pytest.mark.reference
def test_real_questions_end_to_end(checkpoint, tmp_path, command, short_answers):
    """MathVision and TabMWP as they are distributed, into one table; then scored once more."""
    folder = reference_folder("realdata")
    rows = (folder / "mathvision" / "data" / "testmini.jsonl").read_text().splitlines()[:6]
    (tmp_path / "testmini.jsonl").write_text("\n".join(rows))
    problems = json.loads((folder / "tabmwp" / "problems_dev1k.json").read_text())
    write(tmp_path / "problems_dev.json", dict(list(problems.items())[:9]))
    out, err = command(
        "--checkpoint", checkpoint, "--benchmark", "mathvision", "tabmwp", "--data",
        tmp_path / "testmini.jsonl", tmp_path / "problems_dev.json", "--images",
        folder / "mathvision", folder / "tabmwp", "--out", tmp_path / "out")
    lines = out.split("\n\n")[0].splitlines()
    assert lines[0] == "| model | MathVision | TabMWP |"
    assert lines[2] == "| SliME-7B (paper) | 16.12 |  |"
    cell = r"[\d.]+ \[[\d.]+, [\d.]+\]"
    assert re.fullmatch(rf"\| \S+tiny \| {cell} \| {cell} \|", lines[-1])
    assert "| mathvision | subject | " in out and "| mathvision | level | " in out
    assert "question/s" in err and "MathVision" in err  # speed, time left and score so far
    assert (tmp_path / "out" / "results.md").read_text() == out
    assert Image.open(tmp_path / "out" / "results.png").width > 400
    files = [answers_file(tmp_path / "out", name) for name in ("mathvision", "tabmwp")]
    assert command("--score-only", *files, "--out", tmp_path / "again")[0] == out


# -------------------------------------------------------------------------- other programs' answers


def numbers_of(folder: Path, name: str) -> dict:
    return json.loads((folder / "results.json").read_text())["results"][name]["numbers"]


@pytest.mark.reference
def test_published_totals_from_other_programs_answers(tmp_path, command):
    """Real models' answers in their own files, in one command each."""
    folder = reference_folder("benchmarks")
    expected = {entry["name"]: entry["expected"] for entry in
                json.loads((folder / "expected.json").read_text())}
    pope = folder / "pope"
    command("--score-only", pope / "llava-v1.5-13b_adversarial.jsonl",
            pope / "llava-v1.5-13b_random.jsonl", "--benchmark", "pope", "--data", pope,
            "--out", tmp_path)
    for part, numbers in numbers_of(tmp_path, "pope")["parts"].items():
        assert numbers == pytest.approx(expected[f"pope_{part}_llava15_13b"])
    command("--score-only", folder / "scienceqa" / "llava-v1.5-13b.jsonl", "--benchmark",
            "scienceqa", "--out", tmp_path / "science")
    numbers, wanted = numbers_of(tmp_path / "science", "scienceqa"), \
        expected["scienceqa_llava15_13b_half"]
    assert {key: numbers[key] for key in wanted} == pytest.approx(wanted)
    # MME's published files hold the answers beside the questions.
    folder, lines = folder / "mme" / "llava-v1.5-13b", []
    for path in folder.glob("*.txt"):
        for line in path.read_text().splitlines():
            image, question, _, said = line.split("\t")
            lines.append({"question_id": f"{path.stem}/{image}", "text": said,
                          "prompt": question.replace(" Please answer yes or no.", f"\n{WORD}")})
    answers = write(tmp_path / "mme.jsonl", lines)
    command("--score-only", answers, "--benchmark", "mme", "--data", folder, "--out", tmp_path)
    columns = json.loads((tmp_path / "results.json").read_text())["results"]["mme"]["columns"]
    wanted = [expected["mme_llava15_13b"][key]
              for key in ("perception", "cognition", "hallucination")]
    assert [columns[f"MME-{part}"][0] for part in "PCH"] == pytest.approx(wanted)
    assert all(low < value < high for value, low, high in columns.values())


def test_answers_in_llavas_form_find_their_questions(tmp_path, command, fails):
    def pope(number: int, label: str, image: str = "a.jpg") -> dict:
        return {"question_id": number, "image": image, "text": f"Is there {number}?",
                "label": label}
    coco = [pope(1, "yes"), pope(2, "no"), pope(3, "no", "b.jpg")]
    for part in ("random", "popular"):
        write(tmp_path / "coco" / f"coco_pope_{part}.json", coco, True)
    data = tmp_path / "coco" / "coco_pope_random.json"

    def answers(*rows: dict) -> Path:
        return write(tmp_path / "said.jsonl", rows)

    def score(*rows: dict, data: Path = data) -> dict:
        command("--score-only", answers(*rows), "--benchmark", "pope", "--data", data,
                "--out", tmp_path)
        return numbers_of(tmp_path, "pope")

    by_id = [{"question_id": n, "text": "yes"} for n in (3, 1, 2)]
    assert score(*by_id)["precision"] == pytest.approx(1 / 3)
    elsewhere = [{"question_id": 90 + n, "image": row["image"], "text": row["label"],
                  "prompt": f"{row['text']}\n{WORD}"} for n, row in enumerate(coco)]
    assert score(*elsewhere)["f1"] == 1
    both = [{**row, "category": part} for row in elsewhere for part in ("popular", "random")]
    assert set(score(*both, data=data.parent)["parts"]) == {"popular", "random"}

    def refused(*rows: dict, data: object = data, benchmark: str = "pope") -> str:
        return fails("--score-only", answers(*rows), "--benchmark", benchmark, "--data", data)

    assert "line 1: question 9 is not among the questions" in \
        refused({"question_id": 9, "text": "yes"})
    assert "line 2: question 1 is not among the questions, or comes twice" in \
        refused(by_id[1], by_id[1])
    # Numbered by another file: the prompt says that it is another question.
    assert "question 1 is not among" in refused(
        {"question_id": 1, "text": "yes", "prompt": f"Is there a dog?\n{WORD}"})
    assert "2 questions fit question 90" in refused(elsewhere[0], data=data.parent)
    assert "line 2: no `text` in it" in refused(by_id[0], {"question_id": 2})
    assert "line 2: no question_id" in refused(by_id[0], {"text": "yes"})
    assert "no such file" in refused(by_id[0], data=tmp_path / "absent")
    assert "the gold answers are in" in refused(by_id[0], benchmark="gqa")
    assert "unknown benchmark" in refused(by_id[0], benchmark="pop")
    assert "need the one --benchmark" in fails("--score-only", answers(by_id[0]))
    ours = answered(tmp_path, "pope", row("1", "no", "no"))
    assert "no file of ours beside them" in \
        fails("--score-only", ours, answers(by_id[0]), "--benchmark", "pope")
    assert "name the benchmark's own file with --data" in \
        fails("--score-only", answers(by_id[0]), "--benchmark", "pope")


def test_a_judges_reviews_become_ratios(tmp_path, command, fails):
    reviews = [{"question_id": n, "category": f"llava_bench_{category}", "content": content}
               for n, (category, content) in enumerate([
                   ("conv", "8 6\nbecause"), ("conv", "10, 9"), ("detail", "5 5")])]
    out, _ = command("--score-only", write(tmp_path / "r.jsonl", reviews),
                     "--benchmark", "llava_bench", "--out", tmp_path)
    numbers = numbers_of(tmp_path, "llava_bench")
    assert numbers["table"] == {"LLaVA-W": pytest.approx(100 * 20 / 23)}
    assert numbers["parts"]["llava_bench_conv"] == pytest.approx(100 * 15 / 18)
    assert "| llava_bench | category | llava_bench_detail | 100.0 |" in out
    bad = write(tmp_path / "bad.jsonl", [{**reviews[0], "content": "good"}])
    assert "line 1: the review of question 0 does not begin with a line of two numbers" in \
        fails("--score-only", bad, "--benchmark", "llava_bench")


# ------------------------------------------------------------------------ what is decided elsewhere


def answered(tmp_path, name: str, *rows: dict) -> Path:
    header = {"benchmark": name, "questions": len(rows), "key": "", "checkpoint": "x",
              "weights": ""}
    return write(tmp_path / f"{name}.jsonl", [header, *rows])


def row(key: str, prediction: str, references=None, **context) -> dict:
    return {"id": key, "prompt": "P", "prediction": prediction, "references": references,
            "context": context}


def test_judged_benchmarks_get_their_official_file(tmp_path, command):
    def submitted(name: str, *rows: dict) -> tuple[object, str, str]:
        out, err = command("--score-only", answered(tmp_path, name, *rows), "--out", tmp_path)
        return json.loads(next(tmp_path.glob(f"{name}_submission*")).read_text()), out, err

    made, out, err = submitted("mm_vet", row("v1_0", "a"), row("v1_1", "b"))
    assert made == {"v1_0": "a", "v1_1": "b"}
    assert "decided by MM-Vet's GPT-4 judge" in err and out == ""
    made, *_ = submitted("llava_bench", row("3", "a dog", question_id=3))
    assert (made["question_id"], made["prompt"], made["text"]) == (3, "P", "a dog")
    made, _, err = submitted("vqav2", row("9", "Two dogs."))
    assert made == [{"question_id": 9, "answer": "2 dogs"}] and "official server" in err
    made, out, err = submitted("amber_generative", row("1", "A sky.", id=1))
    assert made == [{"id": 1, "response": "A sky."}] and "--evaluation_type g" in err
    made, out, err = submitted("mathverse", row("1", "A", "A", row={
        "sample_index": "1", "query_wo": "Find.", "problem_version": "Text Lite"}))
    assert made[0]["model_answer"] == "A" and "need a language model" in err
    assert "| MathVerse |" in out
    assert "| mathverse | problem_version | Text Lite | 100.0 | 1 |" in out


def test_mathvista_scores_no_answer_that_needs_extraction(tmp_path, command):
    kind = {"question_type": "multi_choice", "answer_type": "text", "choices": ["12", "13"]}
    said = ["(B)", "It is the second", "I do not know.", "12", "b.", "(C)"]
    rows = [row(str(n), text, "13", **kind) for n, text in enumerate(said)]
    rows.append(row("7", "4", "4", question_type="free_form", answer_type="integer", choices=None))
    out, err = command("--score-only", answered(tmp_path, "mathvista", *rows), "--out", tmp_path)
    made = json.loads((tmp_path / "mathvista_submission.json").read_text())
    assert made["1"]["response"] == "It is the second" and len(made) == 7
    numbers = numbers_of(tmp_path, "mathvista")
    assert (numbers["correct"], numbers["n"], numbers["n_left_out"]) == (3, 4, 3)
    assert "3 answers need a language model" in err
    assert "| mathvista | answers | without extraction | 75.0 | 4 |" in out
    nothing = answered(tmp_path, "mathvista", *[row(str(n), "I do not know.", "13", **kind)
                                               for n in range(9)])
    assert command("--score-only", nothing, "--out", tmp_path / "nothing")[0] == ""
    assert numbers_of(tmp_path / "nothing", "mathvista")["table"] == {}


def test_mmbench_test_set_becomes_a_workbook(tmp_path, command, fails, monkeypatch):
    rows = [row("7", "=A & <b>\x07", None, index=7, question="Wh\nich?", A="cat", B="犬")]
    file = answered(tmp_path, "mmbench", *rows)
    monkeypatch.setitem(sys.modules, "openpyxl", None)
    assert "pip install openpyxl" in fails("--score-only", file)
    monkeypatch.undo()
    openpyxl = pytest.importorskip("openpyxl")
    benchmarks.write_submission(BENCHMARKS["mmbench"].submit(rows), tmp_path / "s.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "s.xlsx").active
    assert sheet["G2"].data_type == "s"  # text, not a formula
    assert list(sheet.values) == [("index", "question", "A", "B", "C", "D", "prediction"),
                                  (7, "Wh\nich?", "cat", "犬", None, None, "=A & <b>")]


def test_a_file_of_answers_names_its_weights(checkpoint, tmp_path):
    before = answers.weights_key(str(checkpoint))
    (weights,) = checkpoint.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert len(before) == 16 and answers.weights_key(str(checkpoint)) != before
    assert answers.weights_key("some/hub-id") == ""
