"""sample.py as its user runs it."""

import json
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
from flows import ENVIRONMENT, ROOT, in_process
from matplotlib.figure import Figure
from PIL import Image

from sliming.config import PRESETS
from sliming.model import SliME
from sliming.tiny.held_out import held_out

sys.path.insert(0, str(ROOT))
import sample  # noqa: E402

run = partial(in_process, sample.main)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """out/stage1 with an untrained checkpoint, and a picture."""
    folder = tmp_path_factory.mktemp("sample")
    SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder / "out" / "stage1")
    held_out("detail", 0)["image"].save(folder / "picture.png")
    return folder


def test_answer_and_explanation(folder):
    done = run("--image", "picture.png", "--prompt", "How many bars are there?",
               "--explain", "look.png", "--max-new-tokens", 5, cwd=folder)
    assert done.returncode == 0 and done.stdout.endswith("\n"), done.stderr
    with Image.open(folder / "look.png") as picture:
        assert picture.width >= 1200 and np.asarray(picture.convert("L")).std() > 20


def test_weights_of_a_gate_have_the_same_colours_in_every_picture(folder, monkeypatch):
    scales, plain = [], Figure.colorbar
    monkeypatch.setattr(Figure, "colorbar", lambda figure, drawn, **options: (
        scales.append(drawn.get_clim()), plain(figure, drawn, **options)))
    run("--image", "picture.png", "--prompt", "How many?", "--explain", "look.png",
        "--max-new-tokens", 1, cwd=folder)
    assert scales == [(0, 1)]


def test_a_page_of_several_questions_and_of_a_conversation(folder):
    flags = ["--image", "picture.png", "--explain", "page.html", "--max-new-tokens", 2]
    for asked, typed, talks in ((["--prompt", "How many?", "--prompt", "Which?"], "", 2),
                                ([], "How many?\nWhich?\n", 1)):
        done = run(*flags, *asked, typed=typed, cwd=folder)
        assert done.returncode == 0 and "wrote page.html" in done.stderr, done.stderr
        page = (folder / "page.html").read_text(encoding="utf-8")
        assert page.count('{"turns": ') == talks and '["Which?", ' in page


def test_as_a_program(folder):
    done = subprocess.run([sys.executable, str(ROOT / "sample.py"), "--image", "picture.png",
                           "--max-new-tokens", "2"], cwd=folder, timeout=120,
                          env=ENVIRONMENT, capture_output=True, text=True, input="How many?\n\n")
    assert done.returncode == 0 and done.stdout.count("> ") == 2, done.stderr


def test_several_images_and_none(folder):
    for images in ([], ["picture.png", "picture.png"]):
        flags = ["--image", *images] if images else []
        done = run(*flags, "--prompt", "Which?", "--max-new-tokens", 2, cwd=folder)
        assert done.returncode == 0, done.stderr


def test_conversation_until_an_empty_line(folder):
    done = run("--image", "picture.png", "--max-new-tokens", 3,
               typed="How many?\nAnd now?\n\nnever read\n", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 3
    assert run("--image", "picture.png", typed="", cwd=folder).returncode == 0  # end of input


def test_a_file_of_questions_goes_on_where_it_was(folder):
    questions = [{"question_id": i, "image": image, "text": "Which?"} for i, image in
                 enumerate(("picture.png", None, ["picture.png", "picture.png"]))]
    file = folder / "questions.jsonl"
    flags = ["--batch", "questions.jsonl", "--answers", "answers.jsonl", "--max-new-tokens", 2]
    lines = [*map(json.dumps, questions)]
    for rest in ([], ["{broken"], lines[2:]):
        file.write_text("\n".join([*lines[:2], *rest]))
        done = run(*flags, cwd=folder)
        assert done.returncode == (rest == ["{broken"]), done.stderr
        if done.returncode:
            assert "questions.jsonl, line 3: broken JSON" in done.stderr.splitlines()[-1]
    answers = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert [answer["question_id"] for answer in answers] == [0, 1, 2]
    assert set(answers[0]) == {"question_id", "prompt", "text"}


@pytest.mark.parametrize("arguments, message", [
    (["--image", "missing.png", "--prompt", "?"], "missing.png: no such image file"),
    (["--image", "text.png", "--prompt", "?"], "text.png: unreadable image"),
    (["--out", "nothing", "--prompt", "?"],
     "no checkpoint in nothing/; make one with: python train.py"),
    (["--checkpoint", "nothing/here/x", "--prompt", "?"], "no such checkpoint folder"),
    (["--gamma", "0", "--prompt", "?"], "--gamma: must be a number above 0 and at most 1, not '0'"),
    (["--temperature", "-1", "--prompt", "?"], "--temperature: must be a number of at least 0"),
    (["--explain", "x.png", "--prompt", "?"], "--explain needs an --image"),
    (["--batch", "q.jsonl", "--prompt", "?"], "--batch brings its own images and questions"),
    (["--attention", "triton", "--prompt", "?"],
     "attention 'triton' cannot run here: it needs a CUDA device"),
])
def test_wrong_input_gets_one_line(folder, arguments, message):
    (folder / "text.png").write_text("no picture")
    done = run(*arguments, cwd=folder)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
