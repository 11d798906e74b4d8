"""The three stages as programs: what they train, what they write, and what they say when something is wrong."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sliming.model import SliME
from sliming.synthetic import TrainingSet
from sliming.trainer import STAGES, TrainConfig, learning_rate_scale, train_stage

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def run(*arguments, ranks=None, limit=None, cwd=ROOT):
    """train.py in a process of its own, under torchrun if `ranks` is given; `limit` bounds the size of files in bytes."""
    launch = [sys.executable] if ranks is None else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                     f"--nproc_per_node={ranks}"]
    before = None
    if limit is not None:
        import resource
        before = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # noqa: E731
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*launch, str(ROOT / "train.py"), *map(str, arguments)], capture_output=True, text=True,
                          preexec_fn=before, env=environment, cwd=cwd, timeout=300)


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """All three stages for two steps each, once for this file: the folder and what was printed."""
    out = tmp_path_factory.mktemp("out")
    done = run("--max-steps", 2, "--batch_size", 4, "--eval-questions", 4, "--out", out)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_each_stage_leaves_all_its_files_and_says_where_it_starts(short_run):
    out, printed = short_run
    for stage in STAGES:
        names = {path.name for path in (out / f"stage{stage}").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "train_config.json", "metrics.jsonl", "loss.png",
                "eval.json"} <= names
        results = json.loads((out / f"stage{stage}" / "eval.json").read_text())
        assert {"global", "detail", "detail_without_local", "detail_gamma_1", "detail_gamma_025",
                "detail_random_025"} <= set(results)
        assert all(0 <= row["accuracy"] <= 1 and row["n"] == 4 for row in results.values())
        with Image.open(out / f"stage{stage}" / "loss.png") as plot:
            assert plot.width > 600
    assert "stage 1 starts from the backbones tiny" in printed and f"stage 2 starts from {out}/stage1" in printed


def test_stages_train_their_parts_and_nothing_else(short_run):
    out, _ = short_run
    torch.manual_seed(0)
    before = SliME.from_backbones(SliME.from_pretrained(out / "stage1").config)
    for stage, plan in STAGES.items():
        after = SliME.from_pretrained(out / f"stage{stage}")
        for name in ("vision", "adapter", "compression", "llm"):
            pairs = zip(getattr(before, name).parameters(), getattr(after, name).parameters())
            same = all(torch.equal(a, b) for a, b in pairs)
            if stage == 1 and name == "compression":
                continue  # its random start is that of the stage's own seeded construction
            assert same == (name not in plan.trained), (stage, name)
        before = after


def test_the_same_seed_gives_the_same_losses_bit_for_bit(tmp_path):
    curves = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        config = TrainConfig(out=str(tmp_path / name), max_steps=3, batch_size=3, seed=seed)
        train_stage(config, 1, CPU)
        curves.append(losses(tmp_path / name / "stage1"))
    assert curves[0] == curves[1] != curves[2]


def test_two_ranks_learn_what_one_learns(short_run, tmp_path):
    """Stage II has no noise: any difference would be the sharing's. Records of very unequal length, one without image on
    one rank, one step in which a rank has nothing at all."""
    out, _ = short_run
    folder = tmp_path / "images"
    folder.mkdir()
    records = []
    for index in range(7):
        record = TrainingSet(2)[index]
        record["image"].save(folder / f"{index}.png")
        records.append({**record, "image": f"{index}.png"})
    records[3]["image"] = "missing.png"
    (tmp_path / "data.json").write_text(json.dumps(records))
    curves = []
    for ranks in (1, 2):
        target = tmp_path / f"ranks{ranks}"
        shutil.copytree(out / "stage1", target / "stage1")
        done = run("--stage", 2, "--max-steps", 5, "--batch_size", 3, "--eval-questions", 0, "--out", target,
                   "--data", tmp_path / "data.json", "--images", folder, ranks=ranks)
        assert done.returncode == 0, done.stderr
        assert "missing.png" in done.stderr
        curves.append(losses(target / "stage2"))
    assert len(curves[0]) == 5
    np.testing.assert_allclose(curves[0], curves[1], atol=1e-5)


def test_learning_rate_schedule():
    scales = [learning_rate_scale(step, 100) for step in range(100)]
    assert scales[:4] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]  # 3 steps of warm-up
    assert scales[3:] == sorted(scales[3:], reverse=True) and 0 < scales[-1] < 0.001
    assert [learning_rate_scale(step, 1) for step in range(1)] == [1.0]


@pytest.mark.parametrize("arguments, message", [
    (["--preset", "gigantic"], "unknown preset 'gigantic'; there are tiny"),
    (["--stage", "4"], "unknown stage '4'; use 1, 2, 3 or all"),
    (["--colour", "red"], "unknown flag --colour red"),
    (["--stage", "2", "--out", "empty"], r"run first: python train.py --stage 1 --preset tiny --out empty"),
    (["--stage", "3", "--init-from", "nowhere/at/all"], "nowhere/at/all: no such checkpoint folder"),
    (["--init-from", "somewhere"], "name the stage with --stage"),
    (["--stage", "1", "--data", "missing.json"], "missing.json: cannot be read"),
])
def test_wrong_flags_get_one_line(tmp_path, arguments, message):
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert re.search(message, done.stderr.splitlines()[-1])


def test_checkpoint_of_another_preset_and_strict_data(short_run, tmp_path):
    out, _ = short_run
    other = tmp_path / "other"
    shutil.copytree(out / "stage1", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "llm": "lmsys/vicuna-7b-v1.5"}))
    done = run("--stage", 2, "--init-from", other, "--out", tmp_path)
    assert done.returncode == 1 and "is a checkpoint of another preset" in done.stderr and "Traceback" not in done.stderr
    (tmp_path / "data.json").write_text(json.dumps([{"id": "r9", "image": "no.png", "conversations": [
        {"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]}]))
    for flags, message in (((), "no usable record in the whole batch"), (("--strict-data",), "record r9: .*no.png")):
        done = run("--stage", 2, "--init-from", out / "stage1", "--out", tmp_path, "--data", tmp_path / "data.json", *flags)
        assert done.returncode == 1 and re.search(message, done.stderr) and "Traceback" not in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="limits the size of files, which only POSIX systems can")
def test_a_full_disk_leaves_the_last_checkpoint_whole(short_run, tmp_path):
    out, _ = short_run
    shutil.copytree(out, tmp_path / "out")
    before = {name: (tmp_path / "out/stage2" / name).read_bytes() for name in ("config.json", "model.safetensors")}
    done = run("--stage", 2, "--max-steps", 1, "--batch_size", 2, "--out", tmp_path / "out", limit=1_000_000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name, data in before.items():
        assert (tmp_path / "out/stage2" / name).read_bytes() == data
    SliME.from_pretrained(tmp_path / "out/stage2")
