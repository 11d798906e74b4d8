"""The SMR builder: every source from a small raw folder of its layout, every filter, resuming, leakage, statistics, real samples."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from reference import reference_folder

from sliming.smr import build as smr
from sliming.data import RecordFile, check_record
from sliming.model import SliME
from sliming.smr.build import Excluded, Look, build, conclude, jumbled, lengths, look_at, plain, quantile, stands_in, table, unrelated
from sliming.smr.sources import SOURCES, Candidate, Selection, SourceError, check_folder, stream_json
from sliming.tiny.pictures import DETAIL_PROMPTS
from sliming.config import PRESETS


def draw(path: Path, seed: int = 0, size: tuple[int, int] = (90, 70)) -> Path:
    """A picture with sharp edges, another for every seed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng, image = np.random.default_rng(seed), Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = (int(n) for n in rng.integers(2, min(size) // 2, 4))
        pen.rectangle((x, y, x + w, y + h), fill=tuple(int(n) for n in rng.integers(0, 200, 3)), outline="black")
    image.save(path)
    return path


def write(path: Path, content: object) -> None:
    """JSON, or JSONL for a .jsonl path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content) if lines else json.dumps(content), encoding="utf-8")


def raw_arxivqa(folder):
    row = {"question": "What is shown?", "options": ["A) Red bars", "B) Blue bars"], "label": "B",
           "rationale": "The bars are blue bars."}
    write(folder / "arxivqa.jsonl", [row | {"id": f"cs-{n}", "image": f"images/{n}.png"} for n in range(3)]
          + [row | {"id": "bad", "image": "images/0.png", "label": "E"}])
    for n in range(3):
        draw(folder / f"images/{n}.png", n)


def raw_scienceqa(folder):
    row = {"question": "Which is a star?", "choices": ["Sun", "Moon"], "answer": 0, "hint": "Look up.", "image": "image.png",
           "lecture": "Stars shine.", "solution": "It shines.", "split": "train"}
    write(folder / "problems.json", {"1": row, "2": row | {"image": None}, "3": row | {"split": "test"}, "4": row | {"answer": 2},
                                     "5": row | {"hint": "", "lecture": ""}})
    write(folder / "pid_splits.json", {})
    draw(folder / "train/1/image.png", 1)
    draw(folder / "train/5/image.png", 5)


def raw_math_vision(folder):
    row = {"question": "How many?\n<image1>", "options": [], "answer": "3", "solution": None, "level": 1}
    rows = [row | {"id": str(n), "image": f"images/{n}.png"} for n in range(5)]
    rows[1] |= {"options": ["2 cm", "3 cm"], "answer": "B", "solution": "Six halves make 3. ![](https://x/y.png)"}
    rows[2] |= {"options": list("AB"), "answer": "A", "solution": "It is B, so the answer is B."}
    rows[3] |= {"question": "<image1> and <image2>: which?", "options": list("AB"), "answer": "A"}
    write(folder / "data/test.jsonl", rows)
    write(folder / "data/testmini.jsonl", rows[4:])
    for n in range(5):
        draw(folder / f"images/{n}.png", 10 + n)


def raw_textbookqa(folder):
    choices = {"a": {"processedText": "core"}, "b": {"processedText": "crust"}}
    asked = {"beingAsked": {"processedText": "Which layer is outside?"}, "answerChoices": choices,
             "correctAnswer": {"processedText": "b"}, "imagePath": "question_images/q.png", "imageName": "q.png"}
    lesson = {"globalID": "L_1", "questions": {"nonDiagramQuestions": {"NDQ_1": {}}, "diagramQuestions": {
                  "DQ_1": asked, "DQ_2": asked | {"imageName": "other.png", "answerChoices": dict(reversed(choices.items()))}}},
              "instructionalDiagrams": {"I_1": {"imagePath": "teaching_images/t.png", "processedText": "The crust is thin."}}}
    write(folder / "train/tqa_v1_train.json", [lesson, {"globalID": "L_2"}])
    draw(folder / "train/question_images/q.png", 20)
    draw(folder / "train/teaching_images/t.png", 21)


def raw_geoqa(folder):
    row = {"subject": "如图,∠A=(  )", "choices": ["124°", "62°"], "label": 0}
    write(folder / "json/1.json", row | {"id": 1, "answer": "解:∠A=2∠B=124°.故选A."})
    write(folder / "json/2.json", row | {"id": 2, "answer": "解:∠A=124°"})
    write(folder / "json/10.json", row | {"id": 10, "answer": "解:∠A=62°.故选B."})
    (folder / "json/3.json").write_text("{")
    write(folder / "geoqa+.jsonl", [{"id": 7, "image": "images/7.png", "conversations": [
        {"from": "human", "value": "<image>\nFind x. A. 1 B. 2"}, {"from": "gpt", "value": "B"}]}])
    for name in ("image/1.png", "image/2.png", "image/10.png", "images/7.png"):
        draw(folder / name, len(name) + ord(name[-5]))


def raw_geometry3k(folder):
    row = {"problem_text": "Find y.", "choices": ["9", "\\sqrt { 2 }"], "answer": "B", "img_width": 90, "img_height": 70}
    for place in ("train/0", "val/2101", "test/2401"):
        draw(folder / place / "img_diagram.png", hash64(place))
        write(folder / place / "data.json", row)
    write(folder / "train/1/data.json", row | {"img_width": 91})
    draw(folder / "train/1/img_diagram.png", 1)


def raw_tabmwp(folder):
    row = {"question": "How many?", "choices": None, "answer": "1,200", "unit": "cups", "row_num": 3, "solution": "2 x 600 = 1200."}
    write(folder / "problems_train.json", {
        "1": row, "2": row | {"choices": ["yes", "no"], "answer": "no", "unit": None, "solution": "12 is more than 9."},
        "3": row | {"solution": "It is 1,300 cups."}, "4": row | {"row_num": 40}, "5": row | {"answer": None}})
    write(folder / "problems_dev.json", {"6": row})
    write(folder / "problems_test.json", {"7": row})
    for n in range(1, 8):
        draw(folder / f"tables/{n}.png", 30 + n)


def raw_dvqa(folder, questions=10):
    kinds = ("reasoning", "data", "structure")
    write(folder / "train_qa.json", [
        {"image": f"bar_train_{n // 3:08}.png", "question": f"Is {n} more?", "answer": "yes", "question_id": n,
         ("question_type", "template_id")[n % 2]: kinds[n % 3 if n % 5 else 0], "bbox_answer": [1, 2, 30, 9 if n else 900]}
        for n in range(questions)])
    for n in range((questions + 2) // 3):
        draw(folder / f"images/bar_train_{n:08}.png", 40 + n)


def raw_ai2d(folder):
    def page(name, label):
        return {"imageName": name, "questions": {"What is A?": {"abcLabel": label, "answerTexts": ["ear", "eye"], "correctAnswer": 1,
                                                               "questionId": f"{name}-0"}}}
    for n, label in enumerate((True, False, False)):
        write(folder / f"questions/{n}.png.json", page(f"{n}.png", label))
        draw(folder / f"images/{n}.png", 50 + n)
    draw(folder / "abc_images/0.png", 60)
    write(folder / "questions/3.png.json", page("4.png", False))
    draw(folder / "images/3.png", 53)
    (folder / "ai2d_test_ids.csv").write_text("2\n")


def raw_chartqa(folder):
    base = folder / "ChartQA Dataset/train"
    rows = [{"imgname": "a.png", "query": "In which year?", "label": "2014"}, {"imgname": "a.png", "query": "How many?", "label": 6},
            {"imgname": "gone.png", "query": "Which?", "label": "Yes"}, {"imgname": "../b.png", "query": "Which?", "label": "Yes"}]
    write(base / "train_human.json", rows)
    write(base / "train_augmented.json", [{"imgname": "a.png", "query": "What share?", "label": "70.4"}])
    draw(base / "png/a.png", 70)


def hash64(text):
    return smr.hash64(text.encode())


# source: built ids, dropped {id: reason}, number passed over, and (id, prompt, answer) of one record, after the image mark
EXPECTED = {
    "arxivqa": (3, {"arxivqa-line-4": "malformed"}, 0, ("arxivqa-cs-0", "What is shown?\nA. Red bars\nB. Blue bars",
                                                     "The bars are blue bars.\nSo the answer is Blue bars")),
    "scienceqa": (2, {"scienceqa-4": "malformed"}, 2, ("scienceqa-1", "Context: Look up.\nStars shine.\nWhich is a star?\nA. Sun\n"
                  "B. Moon\nAnswer with the option's letter from the given choices directly.", "A")),
    "math-vision": (3, {"math-vision-2": "reasoning"}, 1, ("math-vision-1", "How many?\n(A) 2 cm\n(B) 3 cm",
                                                            "Six halves make 3.\nSo the answer is B.")),
    "textbookqa": (2, {"textbookqa-DQ_2": "unrelated", "textbookqa-train": "malformed"}, 1,
                   ("textbookqa-DQ_1", "Which layer is outside?\nA. core\nB. crust\nAnswer with the option's letter from the given "
                    "choices directly.", "B")),
    "geoqa": (3, {"geoqa-10": "reasoning", "geoqa-3": "malformed"}, 0,
              ("geoqa-2", "如图,∠A=(  ) A. 124° B. 62°", "解:∠A=124°\n故选A")),
    "geometry3k": (2, {"geometry3k-1": "unrelated"}, 0, ("geometry3k-2101", "Find y.\nA. 9\nB. \\sqrt { 2 }\nAnswer with the option's "
                   "letter from the given choices directly.", "B")),
    "tabmwp": (3, {"tabmwp-3": "reasoning", "tabmwp-4": "unrelated", "tabmwp-5": "malformed"}, 0,
               ("tabmwp-1", "How many? (unit: cups)", "2 x 600 = 1200.\nThe answer is 1,200 cups.")),
    "dvqa": (4, {"dvqa-train-0": "unrelated"}, 5, ("dvqa-train-3", "Is 3 more?\nAnswer the question using a single word or phrase.", "yes")),
    "ai2d": (2, {"ai2d-4.png-0": "unrelated"}, 1, ("ai2d-0.png-0", "What is A?\nA. ear\nB. eye\nAnswer with the option's letter from the "
             "given choices directly.", "B")),
    "chartqa": (2, {"chartqa-train-human-2": "missing image", "chartqa-train-human-3": "malformed"}, 1,
                ("chartqa-train-human-1", "How many?\nAnswer the question using a single word or phrase.", "6")),
}


def make_raw(source: str, folder: Path) -> Path:
    globals()[f"raw_{source.replace('-', '_')}"](folder)
    return folder


def dropped_in(out: Path) -> dict[str, str]:
    return {row["id"]: row["reason"] for row in map(json.loads, out.with_suffix(".dropped.jsonl").read_text().splitlines())}


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_builds_from_its_layout(tmp_path, source):
    built, dropped, passed, (name, prompt, answer) = EXPECTED[source]
    folder, out = make_raw(source, tmp_path / "raw"), tmp_path / "smr.jsonl"
    result = build(source, folder, out)
    records = {record["id"]: record for record in RecordFile(out)}
    assert result["built"] == len(records) == built and dropped_in(out) == dropped
    assert sum(result["dropped"].values()) == len(dropped) and sum(result["passed over"].values()) == passed
    assert set(result["dropped"]) <= set(smr.REASONS)
    for record in records.values():
        check_record(record)
        assert (tmp_path / record["image"]).is_file() and record["image"].startswith("raw/")
    if source == "ai2d":  # a question about letters is about the picture that has them
        assert records["ai2d-0.png-0"]["image"] == "raw/abc_images/0.png" and records["ai2d-1.png-0"]["image"] == "raw/images/1.png"
    human, gpt = records[name]["conversations"]
    assert (human["value"], gpt["value"]) == ("<image>\n" + prompt, answer)


def test_selections(tmp_path):
    """What the options of `build` change: text-only questions, machine-written ones, splits, DVQA's draw."""
    for source in ("scienceqa", "chartqa", "tabmwp", "textbookqa"):
        make_raw(source, tmp_path / source)
    out = tmp_path / "smr.jsonl"
    assert build("scienceqa", tmp_path / "scienceqa", out, selection=Selection(text_only=True))["built"] == 3
    text_only = next(record for record in RecordFile(out) if record["id"] == "scienceqa-2")
    assert "image" not in text_only and "<image>" not in text_only["conversations"][0]["value"]
    assert build("chartqa", tmp_path / "chartqa", out, selection=Selection(machine=True))["built"] == 3
    assert build("tabmwp", tmp_path / "tabmwp", out, selection=Selection(splits=("test",)))["built"] == 1
    prompts = set()
    for seed in range(40):
        build("textbookqa", tmp_path / "textbookqa", tmp_path / f"{seed}.jsonl", selection=Selection(seed=seed))
        records = {record["id"]: record for record in RecordFile(tmp_path / f"{seed}.jsonl")}
        prompts.add(records["textbookqa-I_1"]["conversations"][0]["value"].removeprefix("<image>\n"))
    assert prompts <= set(DETAIL_PROMPTS) and len(prompts) > 8


def test_dvqa_draws_by_seed(tmp_path):
    raw_dvqa(tmp_path / "raw", 90)
    drawn = []
    for number, seed in enumerate((0, 0, 1)):
        out = tmp_path / f"{number}.jsonl"
        result = build("dvqa", tmp_path / "raw", out, selection=Selection(seed=seed, count=12))
        assert result["built"] + sum(result["dropped"].values()) == 12 and result["passed over"]["not drawn (--count)"] > 12
        drawn.append(out.read_text())
    assert drawn[0] == drawn[1] != drawn[2]


def test_workers_and_interruptions_do_not_show(tmp_path):
    """Two processes, and a build cut in the middle of a line and taken up again, give the files of one that ran through."""
    raw_dvqa(tmp_path / "raw", 600)
    tabmwp = make_raw("tabmwp", tmp_path / "tabmwp")
    for name, workers in (("one", 1), ("two", 2), ("cut", 1)):
        build("dvqa", tmp_path / "raw", tmp_path / f"{name}.jsonl", workers=workers)
    for suffix in (".jsonl", ".dropped.jsonl"):
        text = (tmp_path / f"one{suffix}").read_bytes()
        assert text == (tmp_path / f"two{suffix}").read_bytes() and text
        (tmp_path / f"cut{suffix}").write_bytes(text[: len(text) // 2])
    again = build("dvqa", tmp_path / "raw", tmp_path / "cut.jsonl", workers=2)
    assert again["kept"] > 50 and again["built"] > 50 and again["stale"] == 0
    for name in ("one", "cut"):
        build("tabmwp", tabmwp, tmp_path / f"{name}.jsonl")
        build("tabmwp", tabmwp, tmp_path / f"{name}.jsonl")  # nothing new
    for suffix in (".jsonl", ".dropped.jsonl"):
        text = (tmp_path / f"one{suffix}").read_bytes()
        assert text == (tmp_path / f"cut{suffix}").read_bytes() and len(set(text.splitlines())) == text.count(b"\n")


def test_an_image_shared_by_questions_is_looked_at_once(tmp_path, monkeypatch):
    """... also where another one is looked up long after; a check that is forgotten is made again."""
    raw_dvqa(tmp_path / "raw", 300)
    rows = json.loads((tmp_path / "raw/train_qa.json").read_text())
    rows.append(rows[3] | {"question": "Once more?", "question_id": 300, "question_type": "reasoning"})
    write(tmp_path / "raw/train_qa.json", rows)
    looked = []
    monkeypatch.setattr(smr, "look_at", lambda path: looked.append(path) or look_at(path))
    build("dvqa", tmp_path / "raw", tmp_path / "smr.jsonl")
    assert len(looked) == len(set(looked)) == 100
    monkeypatch.setattr(smr, "REMEMBERED", 5)
    monkeypatch.setattr(smr, "CHUNK", 4)
    build("dvqa", tmp_path / "raw", tmp_path / "few.jsonl")
    assert len(looked) == 201  # bar 1 is looked at again for the last question
    assert (tmp_path / "few.jsonl").read_bytes() == (tmp_path / "smr.jsonl").read_bytes()


def test_looks(tmp_path):
    sharp = draw(tmp_path / "sharp.png", 3, (200, 150))
    assert look_at(str(sharp)).reason == "" and look_at(str(sharp)).size == (200, 150)
    Image.open(sharp).filter(ImageFilter.GaussianBlur(4)).save(tmp_path / "blurred.png")
    Image.new("RGB", (90, 90), "white").save(tmp_path / "white.png")
    Image.new("RGB", (90, 9)).save(tmp_path / "thin.png")
    (tmp_path / "cut.png").write_bytes(sharp.read_bytes()[:200])
    (tmp_path / "text.png").write_text("no image")
    for name, reason in (("blurred", "blurred image"), ("white", "blank image"), ("thin", "blank image"), ("cut", "broken image"),
                         ("text", "broken image"), ("gone", "missing image")):
        look = look_at(str(tmp_path / f"{name}.png"))
        assert look.reason == reason and "\n" not in look.detail
    # One thin line in a large empty drawing is sharp: the measure is the steepest edge, not a mean.
    sparse = Image.new("L", (800, 800), 255)
    ImageDraw.Draw(sparse).line((100, 100, 160, 130), fill=0)
    sparse.save(tmp_path / "sparse.png")
    assert look_at(str(tmp_path / "sparse.png")).reason == ""
    # The same picture in another format has another pixel hash but nearly the same thumbnail.
    Image.open(sharp).save(tmp_path / "sharp.jpg", quality=85)
    first, second = look_at(str(sharp)), look_at(str(tmp_path / "sharp.jpg"))
    assert first.pixels != second.pixels and (first.thumbnail ^ second.thumbnail).bit_count() <= smr.ALIKE
    assert (first.thumbnail ^ look_at(str(draw(tmp_path / "other.png", 9))).thumbnail).bit_count() > smr.ALIKE


def test_sharp_pixels_one_by_one(tmp_path):
    """The arrays against a loop over pixels and their neighbours."""
    image = Image.open(draw(tmp_path / "a.png", 5, (40, 30))).convert("L").filter(ImageFilter.GaussianBlur(0.7))
    grey = np.asarray(image, dtype=int)
    count = 0
    for y in range(1, grey.shape[0] - 1):
        for x in range(1, grey.shape[1] - 1):
            count += 9 * grey[y, x] - grey[y - 1:y + 2, x - 1:x + 2].sum() >= smr.SHARP * (grey.max() - grey.min())
    assert smr.sharp_pixels(image) == count > smr.SHARP_PIXELS


@pytest.mark.parametrize("text, trouble", [
    ("How many bars?", ""), ("如图,∠A=62°", ""), ("$\\frac{1}{2}$ of 1,000,000,000,000,000,000", ""), ("Which ____________________?", ""),
    ("a\ufffdb", "U+FFFD"), ("a\x00b", "U+0000"), ("cafÃ© au lait", "encoding"), ("donâ€™t", "encoding"), ("a" * 20, "run"),
    ("x" * 10 + "yz" * 50, "run"), ("@#$% ^&*( )!@# $%^& *()_ +{}|", "hardly"), ("naïve Ångström", ""),
])
def test_jumbled_text(text, trouble):
    assert (trouble in jumbled(text)) if trouble else jumbled(text) == ""


@pytest.mark.parametrize("answer, tail, expected", [
    ("8", "there are 8 pens", True), ("8", "there are 18 pens", False), ("8", "it is 8.5", False), ("8", "it is 5/8", False),
    ("8.0", "it is 8.", True), ("1,200", "it is 1200 g", True), ("12:40 P.M.", "at 12:40 P. M.", True), ("3 cm", "so it is 3.", True),
    ("1/5", "= \\frac{1}{5}", True), ("1/5", "= \\frac{1}{50}", False), ("linear", "it is nonlinear", False),
    ("Linear", "it is linear.", True), ("A", "a line", False), ("A", "shape $\\mathrm{A}$.", True), ("two", "two of them", True),
    ("2", "two of them", True), ("\\frac{\\sqrt{3}}{2}", "\\boxed{\\frac{\\sqrt{3}}{2}}", True), ("-3", "x = -3", True), ("...", "x", False),
])
def test_answer_stands_in_reasoning(answer, tail, expected):
    assert stands_in(plain(answer), plain(tail)) is expected


@pytest.mark.parametrize("reasoning, gold, letter, others, expected", [
    ("It is red.", "red", "A", ("blue",), "It is red."),
    ("Count: 5 + 4 = 9", "9", "", (), "Count: 5 + 4 = 9"),
    ("Nothing is said.", "red", "A", ("blue",), "Nothing is said.\nIt is it."),
    ("It is blue.", "red", "A", ("blue",), None),
    ("So the answer is B.", "red", "A", ("blue",), None),
    ("The answer is A dog.", "dog", "B", ("cat",), "The answer is A dog."),
    ("There is no money left, he can.", "yes", "A", ("no",), "There is no money left, he can.\nIt is it."),
    ("5 + 4 = 8", "9", "", (), None),
    ("9 " + "and on " * 60, "9", "", (), None),  # at its start only
])
def test_reasoning_ends_in_the_answer(reasoning, gold, letter, others, expected):
    answer, trouble = conclude(Candidate("x", None, "q", "q", reasoning, gold, letter, others, "It is it."))
    assert (answer or None) == expected and bool(trouble) == (expected is None)


def test_unrelated_image_and_text():
    look, candidate = Look(size=(100, 60)), Candidate("x", None, "q", "q", "a")
    for change, related in (({}, True), ({"size": (100, 60)}, True), ({"size": (60, 100)}, False), ({"rows": 4}, True),
                            ({"rows": 5}, False), ({"box": (0, 0, 100, 60)}, True), ({"box": (90, 0, 20, 5)}, False),
                            ({"mismatch": "names differ"}, False)):
        assert (unrelated(candidate.__class__(**{**candidate.__dict__, **change}), look) == "") is related


def test_empty_and_duplicate_records(tmp_path):
    folder = make_raw("chartqa", tmp_path / "raw")
    rows = [{"imgname": name, "query": query, "label": label} for name, query, label in (
        ("a.png", "How many?", "6"), ("a.png", "How many?", "6"), ("b.png", "How many?", "6"), ("a.png", "How many?", "7"),
        ("a.png", "How many?", ""), ("a.png", "How \x00 many?", "6"), ("a.png", "", "6"), ("a.png", "see <image>", "6"))]
    write(folder / "ChartQA Dataset/train/train_human.json", rows)
    (folder / "ChartQA Dataset/train/png/b.png").write_bytes((folder / "ChartQA Dataset/train/png/a.png").read_bytes())
    result = build("chartqa", folder, tmp_path / "smr.jsonl")
    # Another answer to the same question is not a duplicate: no rule can tell which is right.
    assert result["built"] == 2 and result["dropped"] == {"duplicate": 2, "empty": 2, "jumbled": 2}


def test_leakage(tmp_path):
    """By image; by question with a like image; by question alone where the evaluation's image is not there."""
    raw = make_raw("chartqa", tmp_path / "raw") / "ChartQA Dataset/train"
    for name, seed in (("b.png", 71), ("c.png", 72), ("d.png", 73)):
        draw(raw / "png" / name, seed)
    write(raw / "train_human.json", [{"imgname": f"{name}.png", "query": query, "label": "1"} for name, query in (
        ("a", "One?"), ("b", "Two?"), ("c", "Two?"), ("d", "Three, four?"))])
    bench = tmp_path / "bench"
    bench.mkdir()
    (bench / "same.png").write_bytes((raw / "png/a.png").read_bytes())
    Image.open(raw / "png/b.png").save(bench / "like.jpg", quality=90)
    write(bench / "test.json", {"1": {"question": "Anything", "image": "same.png"}, "2": {"question": "two", "image": "like.jpg"}})
    write(bench / "far.jsonl", [{"text": "Three four?\nAnswer the question using a single word or phrase.", "image": "none.png"}])
    out = tmp_path / "smr.jsonl"
    result = build("chartqa", raw.parents[1], out, exclude=[bench / "test.json", bench / "far.jsonl"])
    assert result["built"] == 1 and result["dropped"] == {"evaluation": 3}
    assert [record["id"] for record in RecordFile(out)] == ["chartqa-train-human-2"]
    details = out.with_suffix(".dropped.jsonl").read_text()
    assert "the image is in test.json" in details and "with an image like this" in details and "far.jsonl" in details
    # A file that was built without the exclusion is found out.
    build("chartqa", raw.parents[1], tmp_path / "leaky.jsonl")
    assert build("chartqa", raw.parents[1], tmp_path / "leaky.jsonl", exclude=[bench / "test.json"])["stale"] == 2
    write(bench / "nothing.json", [{"id": 1}])
    with pytest.raises(SourceError, match="no record with a question"):
        Excluded().add(bench / "nothing.json")


def test_wrong_folders_and_broken_files(tmp_path):
    arxivqa, tabmwp = make_raw("arxivqa", tmp_path / "arxivqa"), make_raw("tabmwp", tmp_path / "tabmwp")
    with pytest.raises(SourceError, match="not tabmwp's raw folder .* it looks like arxivqa") as error:
        build("tabmwp", arxivqa, tmp_path / "smr.jsonl")
    assert "\n" not in str(error.value) and not (tmp_path / "smr.jsonl").exists()
    with pytest.raises(SourceError, match="no such folder"):
        check_folder("tabmwp", tmp_path / "nowhere")
    for source in SOURCES:  # no layout is taken for another
        folder = make_raw(source, tmp_path / "all" / source)
        check_folder(source, folder)
        for other in SOURCES.keys() - {source}:
            with pytest.raises(SourceError, match=f"looks like {source}"):
                check_folder(other, folder)
    text = (tabmwp / "problems_train.json").read_text()
    (tabmwp / "problems_train.json").write_text(text[: text.index('"3"')])
    with pytest.raises(SourceError, match="broken JSON after 2 records"):
        build("tabmwp", tabmwp, tmp_path / "smr.jsonl")
    assert len(RecordFile(tmp_path / "smr.jsonl")) == 2  # what came before is kept
    with open(arxivqa / "arxivqa.jsonl", "a") as file:
        file.write('{"id": \n')
    build("arxivqa", arxivqa, tmp_path / "smr.jsonl")
    assert dropped_in(tmp_path / "smr.jsonl")["arxivqa-line-5"] == "malformed" and len(RecordFile(tmp_path / "smr.jsonl")) == 5
    with pytest.raises(SourceError, match="not below --root"):
        build("arxivqa", arxivqa, tmp_path / "smr.jsonl", root=tabmwp)
    (tmp_path / "notes.jsonl").write_text('{"no": "id"}\n')
    with pytest.raises(SourceError, match="not a file that this command builds"):
        build("arxivqa", arxivqa, tmp_path / "notes.jsonl")
    (make_raw("math-vision", tmp_path / "mv") / "data/testmini.jsonl").unlink()
    with pytest.raises(SourceError, match="testmini.jsonl: missing"):
        build("math-vision", tmp_path / "mv", tmp_path / "smr.jsonl")


def test_stream_json(tmp_path):
    """As json.load, whatever a block's border cuts, for lists and objects; broken files say after how many records."""
    path, rng = tmp_path / "a.json", random.Random(0)
    rows = [{"text": "ü\"\\{}[]," * rng.randrange(40), "n": [rng.random(), -3, None, True]} for _ in range(12000)] + ["x", 12345]
    for content, indent in ((rows, None), (dict(zip(map(str, range(20000)), rows)), 1), ([], None), ({}, None)):
        path.write_text(json.dumps(content, indent=indent, ensure_ascii=False), encoding="utf-8")
        expected = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
        assert list(stream_json(path)) == expected
    for text, message in (('[1, 2', "after 1 records"), ('[{"a": 1}, {"a" 2}]', "after 1 records"), ("3", "not a JSON list"), ("", "not a JSON")):
        path.write_text(text)
        with pytest.raises(SourceError, match=message):
            list(stream_json(path))


def test_statistics(tmp_path):
    def record(name, query, answer):
        return {"id": name, "image": "a.png", "conversations": [{"from": "human", "value": f"<image>\n{query}"}, {"from": "gpt", "value": answer}]}
    rows = [record(f"tabmwp-{n}", "one two three", "w " * (n + 1)) for n in range(100)] + [record("geoqa-1", "如图 A", "故选A")]
    rows.append({"id": "mine", "conversations": [{"from": "human", "value": "a b"}, {"from": "gpt", "value": "c"}] * 2})
    write(tmp_path / "smr.jsonl", rows)
    found = lengths(tmp_path / "smr.jsonl")
    assert list(found) == ["geoqa", "tabmwp", "others", "all"] and found["all"].records == 102
    assert found["geoqa"].query == {3: 1} and found["geoqa"].answer == {3: 1} and found["others"].query == {2: 1}
    assert quantile(found["tabmwp"].answer, 99) == 99 and quantile(found["tabmwp"].answer, 100) == 100
    text = table(found)
    assert "30K" in text and "76K" in text and text.splitlines()[0].split()[:3] == ["source", "records", "paper"]
    smr.plot(found, tmp_path / "smr.png")
    assert Image.open(tmp_path / "smr.png").width > 1000
    for content, message in (("", "no records"), ('{"id": 1}\n', "line 1: record 1: no conversations")):
        (tmp_path / "bad.jsonl").write_text(content)
        with pytest.raises(SourceError, match=message):
            lengths(tmp_path / "bad.jsonl")


def run(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=Path(__file__).parents[1])


@pytest.fixture
def main(monkeypatch, capsys):
    """The command line in this process: (what it printed, its exit message)."""
    def call(*arguments: object) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["smr", *map(str, arguments)])
        try:
            smr.main()
            message = ""
        except SystemExit as error:
            message = str(error.code)
        return capsys.readouterr().out, message
    return call


def test_command_line(tmp_path, main):
    folder, out = make_raw("ai2d", tmp_path / "raw"), tmp_path / "smr.jsonl"
    text, message = main("build", "ai2d", folder, "--out", out, "--workers", 1)
    assert text.startswith("ai2d: 2 built, 0 were there, 1 dropped, 1 not selected") and "unrelated" in text and not message
    assert main("build", "ai2d", folder, "--out", out, "--workers", 1)[0].startswith("ai2d: 0 built, 2 were there")
    text, message = main("stats", out, "--plot", tmp_path / "smr.png")
    assert "ai2d" in text and "12K" in text and (tmp_path / "smr.png").exists() and not message
    _, message = main("build", "dvqa", folder, "--out", out)
    assert message.startswith("smr: ") and "looks like ai2d" in message and "\n" not in message
    assert main("build", "ai2d", folder, "--out", out, "--exclude", tmp_path / "none.json")[1].startswith("smr: ")
    assert main("stats", tmp_path / "none.jsonl")[1].startswith("smr: ")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_killed_build_leaves_no_workers(tmp_path):
    """Workers that wait for their next chunk end with the process that would have sent it."""
    raw_dvqa(tmp_path / "raw", 3000)
    code = ("import sys, smr_slow; from pathlib import Path; from sliming import smr\n"
            "smr.build('dvqa', Path(sys.argv[1]), Path(sys.argv[2]), workers=2)")
    (tmp_path / "smr_slow.py").write_text("import time; from sliming import smr; look = smr.look_at\n"
                                          "smr.look_at = lambda path: time.sleep(0.05) or look(path)\n")
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[1]}:{tmp_path}"}
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "raw"), str(tmp_path / "smr.jsonl")], env=environment)

    def workers() -> list[Path]:
        return [path for path in Path("/proc").glob("[0-9]*/cmdline") if _holds(path, str(tmp_path / "smr.jsonl"))]

    def until(wanted: int) -> None:
        for _ in range(300):
            if len(workers()) == wanted:
                return
            time.sleep(0.1)
        raise AssertionError(f"{len(workers())} processes instead of {wanted}")

    try:
        until(3)
    finally:
        process.kill()
        process.wait()
    until(0)


def _holds(path: Path, text: str) -> bool:
    try:
        return text in path.read_text()
    except OSError:  # it has just ended
        return False


REAL = {"tabmwp": Selection(), "math-vision": Selection(), "geometry3k": Selection(),
        "scienceqa": Selection(splits=("train", "val", "test"), text_only=True), "chartqa": Selection(machine=True)}


@pytest.mark.reference
def test_real_samples_build(tmp_path):
    """Every real record is built, dropped with a reason, or not selected; what is built trains."""
    root, out = reference_folder("realdata"), tmp_path / "smr.jsonl"
    for source, selection in REAL.items():
        folder = root / source.replace("-", "")
        total = {"tabmwp": lambda: sum(len(json.loads(path.read_text())) for path in folder.glob("problems_*.json")),
                 "math-vision": lambda: len(RecordFile(folder / "data/test.jsonl")),
                 "geometry3k": lambda: len(list(folder.glob("*/*/data.json"))),
                 "scienceqa": lambda: len(json.loads((folder / "problems.json").read_text())),
                 "chartqa": lambda: sum(len(json.loads(path.read_text())) for path in folder.rglob("train_*.json"))}[source]()
        result = build(source, folder, out, selection=selection, root=root)
        assert result["built"] + sum(result["dropped"].values()) + sum(result["passed over"].values()) == total
        # What the samples lack are images; of the records that have theirs nearly all must pass the filters.
        others = {reason: number for reason, number in result["dropped"].items() if reason != "missing image"}
        assert sum(others.values()) <= max(1, 0.05 * total), others
    for record in RecordFile(out):
        check_record(record)
        assert "image" not in record or (root / record["image"]).is_file()
    checkpoint = tmp_path / "tiny"
    SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(checkpoint)
    done = run("train.py", "--stage", 3, "--data", out, "--images", root, "--max-steps", 2, "--batch-size", 4, "--init-from", checkpoint,
               "--out", tmp_path / "out", "--eval-questions", 0, "--strict-data")
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out/stage3/config.json").exists()


@pytest.mark.reference
def test_real_evaluation_questions_are_kept_out(tmp_path):
    """MATH-Vision's testmini as --exclude drops exactly its records, though they are selected."""
    folder = reference_folder("realdata/mathvision")
    raw = tmp_path / "mathvision"
    (raw / "data").mkdir(parents=True)
    (raw / "images").symlink_to(folder / "images")
    (raw / "data/test.jsonl").write_bytes((folder / "data/test.jsonl").read_bytes())
    (raw / "data/testmini.jsonl").write_text("")
    mini = {f"math-vision-{record['id']}" for record in RecordFile(folder / "data/testmini.jsonl")}
    result = build("math-vision", raw, tmp_path / "smr.jsonl", exclude=[folder / "data/testmini.jsonl"])
    built = {record["id"] for record in RecordFile(tmp_path / "smr.jsonl")}
    assert built.isdisjoint(mini) and 0 < result["dropped"]["evaluation"] <= len(mini) and result["built"] > len(mini)
