"""sample.py as its user runs it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sliming.synthetic import held_out

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def run(*arguments, typed="", cwd=ROOT):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, str(ROOT / "sample.py"), *map(str, arguments)], capture_output=True, text=True,
                          input=typed, env=environment, cwd=cwd, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """out/stage1 with an untrained checkpoint, and a picture."""
    from sliming.trainer import TrainConfig, initial_model
    folder = tmp_path_factory.mktemp("sample")
    initial_model(TrainConfig(), 1).save_pretrained(folder / "out" / "stage1")
    held_out("detail", 0)["image"].save(folder / "picture.png")
    return folder


def test_answer_and_explanation(folder):
    done = run("--image", "picture.png", "--prompt", "How many bars are there?", "--explain", "look.png",
               "--max-new-tokens", 5, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\n")
    with Image.open(folder / "look.png") as picture:
        assert picture.width >= 1200 and np.asarray(picture.convert("L")).std() > 20


def test_several_images_and_none(folder):
    for images in ([], ["picture.png", "picture.png"]):
        flags = ["--image", *images] if images else []
        done = run(*flags, "--prompt", "Which?", "--max-new-tokens", 2, cwd=folder)
        assert done.returncode == 0, done.stderr


def test_conversation_until_an_empty_line(folder):
    done = run("--image", "picture.png", "--max-new-tokens", 3, typed="How many?\nAnd now?\n\nnever read\n", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 3
    assert run("--image", "picture.png", typed="", cwd=folder).returncode == 0  # end of input


@pytest.mark.parametrize("arguments, message", [
    (["--image", "missing.png", "--prompt", "?"], "missing.png: no such image file"),
    (["--image", "text.png", "--prompt", "?"], "text.png: unreadable image"),
    (["--out", "nothing", "--prompt", "?"], "no checkpoint in nothing/; make one with: python train.py"),
    (["--checkpoint", "nothing/here/x", "--prompt", "?"], "no such checkpoint folder"),
    (["--gamma", "0", "--prompt", "?"], "--gamma must lie in"),
    (["--temperature", "-1", "--prompt", "?"], "--temperature must be"),
    (["--explain", "x.png", "--prompt", "?"], "--explain needs an --image"),
])
def test_wrong_input_gets_one_line(folder, arguments, message):
    (folder / "text.png").write_text("no picture")
    done = run(*arguments, cwd=folder)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert message in done.stderr.splitlines()[-1]
