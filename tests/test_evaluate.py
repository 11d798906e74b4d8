"""Benchmarks from official files to a table: reading, prompts, batched answers, resuming, several ranks, submissions."""

import base64
import io
import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from PIL import Image

from reference import reference_folder
from sliming.evaluation import run as evaluate
from sliming.evaluation.benchmarks import BENCHMARKS, LETTER, LETTER_CN, RESPONSE_FORMATS, WORD, locate, read_questions
from sliming.data import RecordError
from sliming.evaluation.run import PAPER, TABLE_COLUMNS, answer_batch, answers_file, read_answers

REPOSITORY = Path(__file__).resolve().parents[1]


def write(path: Path, content: object, lines: bool = False) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content), encoding="utf-8")
    return path


def picture(path: Path | None, size: tuple[int, int] = (40, 30), seed: int = 0) -> bytes:
    noise = torch.randint(0, 256, (size[1], size[0], 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    image, buffer = Image.fromarray(noise.numpy()), io.BytesIO()
    image.save(buffer, "PNG")
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def run(*arguments: object, monkeypatch, capsys) -> tuple[str, str]:
    """stdout and stderr of the command line; SystemExit as it is."""
    monkeypatch.setattr(sys, "argv", ["evaluate", *map(str, arguments)])
    evaluate.main()
    return capsys.readouterr()


@pytest.fixture
def command(monkeypatch, capsys):
    return lambda *arguments: run(*arguments, monkeypatch=monkeypatch, capsys=capsys)


@pytest.fixture
def checkpoint(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.fixture
def short_answers(monkeypatch):
    """Four tokens are enough for tests."""
    for name, benchmark in BENCHMARKS.items():
        monkeypatch.setitem(BENCHMARKS, name, type(benchmark)(**{**vars(benchmark), "answer_tokens": 4}))


@pytest.fixture
def tabmwp(tmp_path) -> Path:
    """Seven questions of TabMWP's layout; the images lie in tables/."""
    problems = {str(number): {"question": f"What is {number} + 1?", "choices": ["1", "2"] if number % 2 else None,
                              "answer": "2", "unit": None} for number in range(7)}
    for number in range(7):
        picture(tmp_path / "tables" / f"{number}.png", (30 + 40 * number, 60), number)
    return write(tmp_path / "problems_test.json", problems)


# -------------------------------------------------------------------------------------------------------------- reading

def test_photograph_questions(tmp_path):
    truth = {"data": [{"image_id": "a1", "question": "What brand?", "question_id": 34602, "answers": ["x"] * 10}]}
    write(tmp_path / "TextVQA_0.5.1_val.json", truth)
    data = write(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", [
        {"question_id": "a1", "image": "a1.jpg", "text": f"What brand?\nReference OCR token: N, I\n{WORD}"}], lines=True)
    (question,) = read_questions("textvqa", data)
    assert question.prompt == f"What brand?\nReference OCR token: N, I\n{WORD}"  # not asked for a word twice
    assert (question.id, question.references, question.images) == ("34602", ["x"] * 10, [("a1.jpg",)])
    (question,) = read_questions("textvqa", tmp_path / "TextVQA_0.5.1_val.json")
    assert question.prompt == f"What brand?\n{WORD}"

    write(tmp_path / "v2_mscoco_val2014_annotations.json", {"annotations": [
        {"question_id": 1, "answers": [{"answer": "yes"}] * 10}]})
    data = write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", {"data_subtype": "val2014", "questions": [
        {"question_id": 1, "image_id": 42, "question": "Is it?"}]})
    (question,) = read_questions("vqav2", data)
    assert question.images == [("COCO_val2014_000000000042.jpg",)] and question.references == ["yes"] * 10
    data = write(tmp_path / "test" / "inner" / "llava_vqav2_mscoco_test-dev2015.jsonl", [
        {"question_id": 7, "image": "i.jpg", "text": f"Is it?\n{WORD}"}], lines=True)
    (question,) = read_questions("vqav2", data)
    assert question.references is None and question.prompt == f"Is it?\n{WORD}"

    gold = write(tmp_path / "testdev_balanced_questions.json", {"201": {"imageId": "n1", "question": "Left?", "answer": "no"}})
    llava = write(tmp_path / "llava_gqa_testdev_balanced.jsonl", [
        {"question_id": "201", "image": "n1.jpg", "text": f"Left?\n{WORD}"}], lines=True)
    assert read_questions("gqa", gold) == read_questions("gqa", llava)

    for category, label in (("random", "yes"), ("adversarial", "no")):
        write(tmp_path / "coco" / f"coco_pope_{category}.json", [
            {"question_id": 1, "image": "COCO.jpg", "text": "Is there a dog in the image?", "label": label}] * 2, lines=True)
    questions = read_questions("pope", tmp_path / "coco")
    assert [q.id for q in questions] == ["adversarial/1", "adversarial/1#2", "random/1", "random/1#2"]
    assert questions[0].prompt == f"Is there a dog in the image?\n{WORD}" and questions[0].references == "no"
    llava = write(tmp_path / "llava_pope_test.jsonl", [
        {"question_id": 1, "image": "COCO.jpg", "text": f"Is there a dog in the image?\n{WORD}", "category": "random"}], lines=True)
    assert [(q.id, q.references) for q in read_questions("pope", llava)] == [("random/1", "yes")]

    data = write(tmp_path / "amber" / "query" / "query_discriminative.json", [
        {"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny in this image?"}])
    write(tmp_path / "amber" / "annotations.json", [{"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"}])
    (question,) = read_questions("amber", data)
    assert question.context == {"type": "discriminative-attribute-state"} and question.prompt.endswith(f"image?\n{WORD}")

    (tmp_path / "MME" / "count" / "images").mkdir(parents=True)
    (tmp_path / "MME" / "count" / "questions_answers_YN").mkdir()
    (tmp_path / "MME" / "count" / "questions_answers_YN" / "12.txt").write_text(
        "Are there two? Please answer yes or no.\tYes\nAre there six? Please answer yes or no.\tNo\n")
    (tmp_path / "MME" / "OCR").mkdir()
    (tmp_path / "MME" / "OCR" / "1.txt").write_text("Is it? Please answer yes or no.\tNo\n")
    questions = read_questions("mme", tmp_path / "MME")
    assert [q.id for q in questions] == ["count/12/Yes", "count/12/No", "OCR/1/No"]
    assert questions[0].prompt == f"Are there two?\n{WORD}" and "OCR/1.png" in questions[2].images[0]
    llava = write(tmp_path / "llava_mme.jsonl", [{"question_id": "count/12.png", "image": "count/12.png", "category": "count",
                                                  "text": f"Are there six?\n{WORD}"}], lines=True)
    (question,) = read_questions("mme", llava, tmp_path / "MME")
    assert question.references == "No" and question.context == questions[1].context
    picture(tmp_path / "MME" / "count" / "images" / "12.png")
    assert locate(questions[0].images[0], tmp_path / "MME", "?").name == "12.png"


def test_questions_with_options(tmp_path):
    png = picture(None)
    rows = [["index", "question", "hint", "A", "B", "C", "D", "answer", "category", "image", "split"],
            ["7", "Which?", "Look:\nhere", "cat", "dog", "", "", "A", "x", base64.b64encode(png).decode(), "dev"],
            ["1000007", "Which?", "nan", "dog", "cat", "", "", "B", "x", "7", "dev"]]
    quoted = ["\t".join('"' + cell + '"' if "\n" in cell else cell for cell in row) for row in rows]
    (tmp_path / "mmbench_dev.tsv").write_text("\n".join(quoted), encoding="utf-8")
    first, second = read_questions("mmbench", tmp_path / "mmbench_dev.tsv")
    assert first.prompt == f"Look:\nhere\nWhich?\nA. cat\nB. dog\n{LETTER}" and first.images == second.images == [png]
    assert second.prompt == f"Which?\nA. dog\nB. cat\n{LETTER}" and second.context["index"] == 1000007
    assert read_questions("mmbench_cn", tmp_path / "mmbench_dev.tsv")[0].prompt.endswith(f"B. dog\n{LETTER_CN}")

    data = write(tmp_path / "mmmu.jsonl", [
        {"id": "validation_Art_1", "question": "See <image 1>", "options": "['one', \"it's\"]", "answer": "B",
         "image_1": "a.png", "image_2": "b.png", "question_type": "multiple-choice"},
        {"id": "validation_Art_2", "question": "How many?", "options": "[]", "answer": "['3', 'three']",
         "image_1": {"bytes": None, "path": "c.png"}, "question_type": "open"}], lines=True)
    choice, opened = read_questions("mmmu", data)
    assert choice.prompt == f"See <image 1>\n(A) one\n(B) it's\n{LETTER}" and choice.images == [("a.png",), ("b.png",)]
    assert choice.context["index2ans"] == {"A": "one", "B": "it's"}
    assert opened.prompt == f"How many?\n{WORD}" and opened.references == ["3", "three"]

    problems = {"5": {"question": "Why?", "choices": ["no", "yes"], "answer": 1, "hint": "A plant.", "image": "image.png",
                      "split": "test"},
                "6": {"question": "How?", "choices": ["so", "not"], "answer": 0, "hint": "", "image": None, "split": "test"},
                "8": {"question": "Train?", "choices": ["a"], "answer": 0, "split": "train"}}
    data = write(tmp_path / "problems.json", problems)
    with_image, without = read_questions("scienceqa", data)
    assert with_image.prompt == f"Context: A plant.\nWhy?\nA. no\nB. yes\n{LETTER}" and with_image.references == "B"
    assert without.prompt == f"How?\nA. so\nB. not\n{LETTER}" and without.images == [] and not without.context["is_image"]
    llava = write(tmp_path / "llava_test_CQM-A.json", [
        {"id": "5", "image": "5/image.png",
         "conversations": [{"from": "human", "value": "<image>\nContext: A plant.\nWhy?\nA. no\nB. yes"}]}])
    assert read_questions("scienceqa", llava) == [with_image]


def test_mathematics_and_free_answers(tmp_path):
    data = write(tmp_path / "testmini.jsonl", [
        {"id": "4", "question": "How many?\n<image1>", "options": [], "answer": "6", "image": "images/4.jpg"},
        {"id": "5", "question": "Which?\n<image1>", "options": ["A", "B"], "answer": "A", "image": "images/5.jpg"},
        {"id": "6", "question": "Which?", "options": ["$1$", "2"], "answer": "B", "image": "images/6.jpg"}], lines=True)
    prompts = [question.prompt for question in read_questions("mathvision", data)]
    assert prompts == [f"How many?\n<image1>\n{WORD}", f"Which?\n<image1>\n{WORD}", f"Which?\n(A) $1$\n(B) 2\n{WORD}"]

    row = {"pid": "1", "question": "Q", "image": "images/1.jpg", "choices": None, "precision": 1.0, "answer": "1.2",
           "question_type": "free_form", "answer_type": "float"}
    data = write(tmp_path / "vista" / "testmini.json", {"1": row})
    with pytest.raises(RecordError, match="query.json"):
        read_questions("mathvista", data)
    write(tmp_path / "vista" / "query.json", {"1": "Hint: answer.\nQuestion: Q"})
    assert read_questions("mathvista", data)[0].prompt == "Hint: answer.\nQuestion: Q"

    data = write(tmp_path / "verse.json", [{"sample_index": "1", "query_wo": "Find.", "answer": "A", "image": ""}])
    (question,) = read_questions("mathverse", data)
    assert question.prompt == "Find." and question.images == []

    write(tmp_path / "chart" / "test_human.json", [{"imgname": "1.png", "query": "How much?", "label": "3"}])
    write(tmp_path / "chart" / "test_augmented.json", [{"imgname": "2.png", "query": "Who?", "label": "Bo"}])
    assert [q.references for q in read_questions("chartqa", tmp_path / "chart")] == ["3", "Bo"]

    data = write(tmp_path / "questions.jsonl", [{"question_id": 0, "image": "001.jpg", "text": "Describe.", "category": "detail"}],
                 lines=True)
    assert read_questions("llava_bench", data)[0].prompt == "Describe."
    vet = write(tmp_path / "mm-vet.json", {"v1_0": {"imagename": "v1_0.png", "question": "What is x?", "answer": "1"}})
    llava = write(tmp_path / "llava-mm-vet.jsonl", [{"question_id": 0, "image": "v1_0.png", "text": "What is x?"}], lines=True)
    assert read_questions("mm_vet", vet) == read_questions("mm_vet", llava) and read_questions("mm_vet", vet)[0].id == "v1_0"


@pytest.mark.parametrize("name, content, complaint", [
    ("nonsense", "{}", "unknown benchmark 'nonsense'; there are textvqa"),
    ("gqa", "", "no questions in it"),
    ("gqa", '{"a": 1', "broken JSON"),
    ("mathvision", '{"id": "1"}\n{"id": ', "line 2: broken JSON"),
    ("mathvision", '{"id": "1", "question": "Q", "options": ["x"], "answer": "B", "image": "i"}', "'B' is none of its 1 options"),
    ("mathvision", '{"id": "9", "question": "Q"}', "id 9: no `answer`"),
    ("mathvision", "[1, 2]", "entry 1 is not an object but int"),
    ("pope", '{"1": {"question": "of TabMWP"}}', "no `question_id`"),
    ("scienceqa", '{"5": {"question": "Q", "choices": ["a"], "answer": 3, "split": "test"}}', "answer 3 is no place among its 1"),
    ("textvqa", '{"question_id": 1, "image": "a", "text": "b"}', "put it beside this file or name it with --truth"),
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
    picture(tmp_path / "in" / "a.png")
    assert locate(("b.png", "a.png"), tmp_path / "in", "q") == tmp_path / "in" / "a.png" and locate(b"x", tmp_path, "q") == b"x"
    for name in ("../in/a.png", str(tmp_path / "in" / "a.png")):
        with pytest.raises(RecordError, match="lies outside"):
            locate((name,), tmp_path / "in", "q")
    with pytest.raises(RecordError, match="question q: no image b.png"):
        locate(("b.png",), tmp_path, "q")


@pytest.mark.reference
def test_prompts_and_rows_are_the_papers():
    text = (reference_folder("paper") / "beyond-llava-hd.txt").read_text(encoding="utf-8").replace("’", "'")
    table6 = text[text.index("Table6:"):text.index("Table7:")].replace(" ", "")
    names = {"Text-VQA": "textvqa", "GQA": "gqa", "VQA-v2": "vqav2", "MMBench,MMBench-CN": "mmbench", "MMMU(Multi-choice)": "mmmu",
             "MMMU(Shortanswer)": "mmmu_short_answer", "LLaVA-Bench": "llava_bench", "MME": "mme", "Science-QA": "scienceqa",
             "MathVision": "mathvision", "MathVista": "mathvista", "MathVerse": "mathverse", "POPE": "pope", "AMBER": "amber"}
    for row, name in names.items():
        (prompt,) = re.findall(rf"^{re.escape(row)}(-(?=[AS])|Answer.*?\.)", table6, re.M)
        assert prompt == (RESPONSE_FORMATS[name] or "-").replace(" ", ""), row
    rows = {}
    for line in text[text.index("Table 1: "):text.index("Table 3: ")].splitlines():
        if line.startswith("SliME-"):
            rows.setdefault(line.split()[0].replace("†", " LoRA"), []).extend(map(float, line.split()[2:]))
    assert rows == PAPER and len(TABLE_COLUMNS) == len(rows["SliME-7B"]) + 2


# -------------------------------------------------------------------------------------------------------------- answering

def test_batched_answers_are_those_one_by_one(model, tmp_path):
    sizes = [(40, 30), (700, 300), (100, 400)]
    images = [picture(None, size, seed) for seed, size in enumerate(sizes)]
    conversations = [("<image>\nWhat number is it?", images[:1]), ("<image>\nWhich colour is the square?", images[1:2]),
                     ("<image>\n<image>\nAny circle?", images[1:]), ("Words only", [])]
    samples = [model.processor.prompt([{"from": "human", "value": text}], [io.BytesIO(image) for image in some])
               for text, some in conversations]

    logits: list[torch.Tensor] = []
    model.llm.get_output_embeddings().register_forward_hook(lambda module, inputs, output: logits.append(output))

    def one_by_one() -> list[str]:
        return [model.processor.tokenizer.decode(list(model.generate(sample, max_new_tokens=7))).strip() for sample in samples]

    before = model.llm.config._attn_implementation
    alone = one_by_one()
    logits.clear()
    assert answer_batch(model, samples, 7) == alone and len(set(alone)) > 1
    together, running = list(logits), list(range(len(samples)))                   # per step [samples still running, C]
    steps = {}
    for index, sample in enumerate(samples):
        logits.clear()
        list(model.generate(sample, max_new_tokens=7))
        steps[index] = list(logits)
    for step, rows in enumerate(together):
        running = [index for index in running if step < len(steps[index])]
        torch.testing.assert_close(rows, torch.stack([steps[index][step] for index in running]), atol=2e-4, rtol=2e-4)
    assert answer_batch(model, samples[:1], 1) == [model.processor.tokenizer.decode(next(model.generate(samples[0]))).strip()]
    longest = max((list(model.generate(sample, max_new_tokens=7)) for sample in samples), key=len)
    model.end_ids.add(longest[len(longest) // 2])  # another end, so that answers stop at different steps
    assert one_by_one() != alone and answer_batch(model, samples, 7) == one_by_one()
    assert model.llm.config._attn_implementation == before


def test_a_killed_run_goes_on_where_it_was(tabmwp, checkpoint, tmp_path, command, short_answers, monkeypatch):
    arguments = ["--checkpoint", checkpoint, "--benchmark", "tabmwp", "--data", tabmwp, "--images", tmp_path, "--batch-size", 2]
    command(*arguments, "--out", tmp_path / "whole")
    whole = answers_file(tmp_path / "whole", "tabmwp", 0).read_bytes()
    header, rows = read_answers(answers_file(tmp_path / "whole", "tabmwp", 0))
    assert [row["id"] for row in rows] == [str(number) for number in range(7)] and header["benchmark"] == "tabmwp"

    asked, real = [], evaluate.answer_batch
    monkeypatch.setattr(evaluate, "answer_batch", lambda model, samples, tokens: (asked.append(len(samples)),
                                                                                 real(model, samples, tokens))[1])
    lines = whole.splitlines(keepends=True)
    for kept in (b"", lines[0][:9], b"".join(lines[:4]), b"".join(lines[:4]) + lines[4][:30], b"".join(lines)):
        asked.clear()
        path = answers_file(tmp_path / "killed", "tabmwp", 0)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(kept)
        out, err = command(*arguments, "--out", tmp_path / "killed")
        assert path.read_bytes() == whole and sum(asked) == 7 - max(0, kept.count(b"\n") - 1)
    assert asked == [] and "| TabMWP |" in out and "SliME-8B" in out
    # what other ranks left behind counts, too
    other = answers_file(tmp_path / "killed", "tabmwp", 1)
    answers_file(tmp_path / "killed", "tabmwp", 0).write_bytes(b"".join(lines[:2]))
    other.write_bytes(lines[0] + lines[7])
    command(*arguments, "--out", tmp_path / "killed")
    assert sum(asked) == 5 and not other.exists() and path.read_bytes() == whole


def test_bad_runs_end_with_one_line_and_keep_what_is_answered(tabmwp, checkpoint, tmp_path, command, short_answers):
    def fails(*arguments) -> str:
        with pytest.raises(SystemExit) as error:
            command("--checkpoint", checkpoint, "--out", tmp_path / "out", *arguments)
        message = str(error.value)
        assert message.startswith("sliming.evaluate: ") and "\n" not in message
        return message

    common = ["--data", tabmwp, "--images", tmp_path, "--batch-size", 2]
    (tmp_path / "tables" / "4.png").rename(tmp_path / "tables" / "away.png")
    assert "question 4: no image 4.png or tables/4.png" in fails("--benchmark", "tabmwp", *common)
    assert len(read_answers(answers_file(tmp_path / "out", "tabmwp", 0))[1]) == 4
    (tmp_path / "tables" / "4.png").write_bytes(b"no image")
    assert "question 4" in fails("--benchmark", "tabmwp", *common)
    assert len(read_answers(answers_file(tmp_path / "out", "tabmwp", 0))[1]) == 4
    (tmp_path / "tables" / "away.png").rename(tmp_path / "tables" / "4.png")

    assert "unknown benchmark 'tabmwq'; there are" in fails("--benchmark", "tabmwq", *common)
    assert "2 benchmarks need as many --data" in fails("--benchmark", "tabmwp", "pope", *common)
    assert "named twice" in fails("--benchmark", "tabmwp", "tabmwp", "--data", tabmwp, tabmwp)
    answers = answers_file(tmp_path / "out", "tabmwp", 0)
    assert "answers of another benchmark, tabmwp, not pope" in fails("--benchmark", "pope", "--score-only", answers)
    assert "line 1: broken JSON" in fails("--score-only", tmp_path / "tables" / "0.png")
    assert "not a file of answers" in fails("--score-only", write(tmp_path / "some.jsonl", [{"id": 1}] * 2, lines=True))
    assert "cannot be read" in fails("--score-only", tmp_path / "absent.jsonl")

    kept = answers.read_bytes()
    for wrong, said in (({"benchmark": "pope"}, "another benchmark, pope, not tabmwp"), ({"key": "0"}, "other questions"),
                        ({"checkpoint": "other"}, "another checkpoint, other, not"), ({"weights": "0"}, "other weights")):
        header, *rows = kept.splitlines(keepends=True)
        answers.write_bytes(json.dumps({**json.loads(header), **wrong}).encode() + b"\n" + b"".join(rows))
        changed = answers.read_bytes()
        assert said in fails("--benchmark", "tabmwp", *common) and answers.read_bytes() == changed
    answers.write_bytes(kept.replace(b'"id": "1"', b'"id": 1"', 1))
    assert "line 3: broken JSON" in fails("--benchmark", "tabmwp", *common)


def test_two_ranks_share_the_work(tabmwp, checkpoint, tmp_path, command, short_answers):
    command("--checkpoint", checkpoint, "--benchmark", "tabmwp", "--data", tabmwp, "--images", tmp_path, "--out", tmp_path / "one")
    program = ("import sys; sys.argv[0] = 'evaluate'; from sliming import benchmarks, evaluate\n"
               "b = benchmarks.BENCHMARKS; b['tabmwp'] = type(b['tabmwp'])(**{**vars(b['tabmwp']), 'answer_tokens': 4})\n"
               "evaluate.main()")
    script = tmp_path / "script.py"
    script.write_text(program)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, "--checkpoint",
         checkpoint, "--benchmark", "tabmwp", "--data", tabmwp, "--images", tmp_path, "--out", tmp_path / "two", "--batch-size", "2"],
        capture_output=True, text=True, cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("SliME-7B") == 1  # one rank reports
    assert "4/4" in done.stderr  # its share of seven questions
    files = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert files == ["results.json", "results.md", "results.png", "tabmwp.jsonl"]
    assert answers_file(tmp_path / "two", "tabmwp", 0).read_bytes() == answers_file(tmp_path / "one", "tabmwp", 0).read_bytes()


@pytest.mark.reference
def test_real_questions_end_to_end(checkpoint, tmp_path, command, short_answers):
    """MathVision and TabMWP as they are distributed, through a checkpoint, into one table; then scored again from the files."""
    folder = reference_folder("realdata")
    rows = (folder / "mathvision" / "data" / "testmini.jsonl").read_text().splitlines()[:6]
    (tmp_path / "testmini.jsonl").write_text("\n".join(rows))
    problems = json.loads((folder / "tabmwp" / "problems_dev1k.json").read_text())
    write(tmp_path / "problems_dev.json", dict(list(problems.items())[:9]))
    out, err = command("--checkpoint", checkpoint, "--benchmark", "mathvision", "tabmwp", "--data", tmp_path / "testmini.jsonl",
                       tmp_path / "problems_dev.json", "--images", folder / "mathvision", folder / "tabmwp", "--out", tmp_path / "out")
    lines = out.strip().splitlines()
    assert lines[0] == "| model | MathVision | TabMWP |" and lines[2] == "| SliME-7B (paper) | 16.12 |  |"
    assert re.fullmatch(r"\| \S+tiny \| [\d.]+ \[[\d.]+, [\d.]+\] \| [\d.]+ \[[\d.]+, [\d.]+\] \|", lines[-1])
    assert "question/s" in err and "MathVision" in err  # speed, time left and score so far
    assert (tmp_path / "out" / "results.md").read_text() == out and Image.open(tmp_path / "out" / "results.png").width > 400
    again, _ = command("--score-only", *(answers_file(tmp_path / "out", name, 0) for name in ("mathvision", "tabmwp")),
                       "--out", tmp_path / "again")
    assert again == out


@pytest.mark.reference
def test_published_totals_from_official_files(tmp_path, command):
    """Real models' answers to questions read from the official layout, scored on the command line."""
    folder = reference_folder("benchmarks")
    expected = {entry["name"]: entry for entry in json.loads((folder / "expected.json").read_text())}

    def result(name: str, questions: list, said: dict) -> dict:
        rows = [{"id": q.id, "prompt": q.prompt, "prediction": said[q.id], "references": q.references, "context": q.context}
                for q in questions]
        command("--score-only", answered(tmp_path, name, rows), "--out", tmp_path)
        return json.loads((tmp_path / "results.json").read_text())["results"][name]

    for name, entry in expected.items():
        wanted = entry["expected"]
        if name.startswith("mme_"):
            answers = (folder / entry["files"][0]).parent
            said = {f"{path.stem}/{image}/{gold}": answer for path in answers.glob("*.txt")
                    for image, _, gold, answer in (line.split("\t") for line in path.read_text().splitlines())}
            columns = result("mme", read_questions("mme", answers), said)["columns"]
            values = [columns[column][0] for column in ("MME-P", "MME-C", "MME-H")]
            assert values == pytest.approx([wanted["perception"], wanted["cognition"], wanted["hallucination"]])
            assert all(low < value < high for value, low, high in columns.values())
        if name.startswith("pope_"):
            answers = [json.loads(line) for line in (folder / entry["files"][0]).read_text().splitlines()]
            by_question = {(row["image"], row["prompt"]): row["text"] for row in answers}
            questions = read_questions("pope", folder / entry["files"][1])
            numbers = result("pope", questions, {q.id: by_question[q.images[0][0], q.prompt] for q in questions})["numbers"]
            assert {key: numbers[key] for key in wanted} == pytest.approx(wanted)
        if name.startswith("mathvision_"):
            said = {row["id"]: row["response"] for row in
                    map(json.loads, (folder / entry["files"][0]).read_text().splitlines())}
            questions = read_questions("mathvision", folder / "mathvision" / "test.jsonl")
            numbers = result("mathvision", questions, said)["numbers"]
            assert round(numbers["acc"], 2) == wanted["acc"] and numbers["n"] == wanted["n"]


# -------------------------------------------------------------------------------------- what is decided elsewhere

def answered(tmp_path, name: str, rows: list[dict]) -> Path:
    header = {"benchmark": name, "questions": len(rows), "key": "", "checkpoint": "x", "weights": ""}
    path = write(tmp_path / f"{name}.jsonl", [header, *rows], lines=True)
    path.write_text(path.read_text() + "\n")
    return path


def row(id: str, prediction: str, references=None, **context) -> dict:
    return {"id": id, "prompt": "P", "prediction": prediction, "references": references, "context": context}


def test_judged_benchmarks_get_their_official_file(tmp_path, command):
    out, err = command("--score-only", answered(tmp_path, "mm_vet", [row("v1_0", "a"), row("v1_1", "b")]), "--out", tmp_path)
    assert json.loads((tmp_path / "mm_vet_submission.json").read_text()) == {"v1_0": "a", "v1_1": "b"}
    assert "decided by MM-Vet's GPT-4 judge" in err and out == ""
    command("--score-only", answered(tmp_path, "llava_bench", [row("3", "a dog", question_id=3)]), "--out", tmp_path)
    made = json.loads((tmp_path / "llava_bench_submission.jsonl").read_text())
    assert (made["question_id"], made["prompt"], made["text"]) == (3, "P", "a dog")
    _, err = command("--score-only", answered(tmp_path, "vqav2", [row("9", "Two dogs.")]), "--out", tmp_path)
    assert json.loads((tmp_path / "vqav2_submission.json").read_text()) == [{"question_id": 9, "answer": "2 dogs"}]
    assert "official server" in err
    verse = row("1", "A", "A", row={"sample_index": "1", "query_wo": "Find."})
    out, err = command("--score-only", answered(tmp_path, "mathverse", [verse]), "--out", tmp_path)
    assert json.loads((tmp_path / "mathverse_submission.json").read_text())[0]["model_answer"] == "A"
    assert "| MathVerse |" in out and "need a language model" in err
    kind = {"question_type": "multi_choice", "answer_type": "text", "choices": ["12", "13"]}
    vista = [row("1", "(B)", "13", **kind), row("2", "It is the second", "13", **kind)]
    command("--score-only", answered(tmp_path, "mathvista", vista), "--out", tmp_path)
    assert json.loads((tmp_path / "mathvista_submission.json").read_text())["2"]["response"] == "It is the second"
    numbers = json.loads((tmp_path / "results.json").read_text())["results"]["mathvista"]["numbers"]
    assert numbers["correct"] == 1 and numbers["n_needs_judge"] == 1


def test_mmbench_test_set_becomes_a_workbook(tmp_path, command):
    rows = [row("7", "A & <b>\x07", None, index=7, question="Wh\nich?", A="cat", B="犬")]
    command("--score-only", answered(tmp_path, "mmbench", rows), "--out", tmp_path)
    with zipfile.ZipFile(tmp_path / "mmbench_submission.xlsx") as book:
        for part in book.namelist():
            ElementTree.fromstring(book.read(part))
        sheet = ElementTree.fromstring(book.read("xl/worksheets/sheet1.xml"))
    space = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
    cells = [["".join(cell.itertext()) for cell in line] for line in sheet.iter(f"{space}row")]
    assert cells == [["index", "question", "A", "B", "C", "D", "prediction"], ["7", "Wh\nich?", "cat", "犬", "", "", "A & <b>"]]
