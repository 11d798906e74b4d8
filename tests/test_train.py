"""The three stages as programs: what they train, what they write, and what they say when something
is wrong."""

import json
import os
import re
import shutil
import sys

import pytest
import torch
from flows import in_process, losses, run_train
from PIL import Image

import train
from sliming.checkpoints import released
from sliming.config import PRESETS, STAGES, TrainConfig
from sliming.model import SliME
from sliming.tiny.held_out import ASKED
from sliming.trainer import learning_rate_scale, train_stage

CPU = torch.device("cpu")


def fails(folder, *arguments):
    """The one line with which train.py, run in this process, stops."""
    done = in_process(train.main, *arguments, cwd=folder)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """All three stages for two steps each, once for this file: the folder and what was printed."""
    out = tmp_path_factory.mktemp("out")
    done = run_train(["--max-steps", 2, "--batch_size", 4, "--eval-questions", 4, "--out", out])
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_each_stage_leaves_all_its_files_and_says_where_it_starts(short_run):
    out, printed = short_run
    for stage in STAGES:
        names = {path.name for path in (out / f"stage{stage}").iterdir()}
        assert {"config.json", "model.safetensors", "tokenizer.json", "train_config.json",
                "metrics.jsonl", "loss.png", "eval.json"} <= names
        results = json.loads((out / f"stage{stage}" / "eval.json").read_text())
        assert tuple(results) == ASKED[stage]
        assert stage < 3 or {"global", "detail", "detail_without_local", "detail_gamma_1",
                             "detail_gamma_025", "detail_random_025"} <= set(results)
        assert all(0 <= row["accuracy"] <= 1 and row["n"] == 4 for row in results.values())
        with Image.open(out / f"stage{stage}" / "loss.png") as plot:
            assert plot.width > 600
    assert "stage 1 starts from the backbones tiny" in printed
    assert f"stage 2 starts from {out}/stage1" in printed


def test_stages_train_their_parts_and_nothing_else(short_run):
    out, _ = short_run
    torch.manual_seed(0)
    before = SliME.from_backbones(SliME.from_pretrained(out / "stage1").config)
    for stage, plan in STAGES.items():
        after = SliME.from_pretrained(out / f"stage{stage}")
        for name in ("vision", "adapter", "compression", "llm"):
            both = [getattr(model, name).parameters() for model in (before, after)]
            same = all(torch.equal(a, b) for a, b in zip(*both, strict=True))
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


def test_learning_rate_schedule():
    scales = [learning_rate_scale(step, 100) for step in range(100)]
    assert scales[:4] == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0]  # 3 warm-up steps
    assert scales[3:] == sorted(scales[3:], reverse=True) and 0 < scales[-1] < 0.001
    assert [learning_rate_scale(step, 1) for step in range(1)] == [1.0]


@pytest.mark.parametrize("arguments, message", [
    (["--preset", "gigantic"], "--preset: invalid choice: 'gigantic' .choose from '?tiny'?, "),
    (["--stage", "4"], "--stage: invalid choice: '4'"),
    (["--colour", "red"], "unrecognized arguments: --colour red; --help lists the flags"),
    (["--stage", "2", "--out", "empty"],
     r"run first: python train.py --stage 1 --preset tiny --out empty"),
    (["--stage", "3", "--init-from", "nowhere/at/all"],
     "nowhere/at/all: no such checkpoint folder"),
    (["--init-from", "somewhere"], "name the stage with --stage"),
    (["--stage", "1", "--data", "missing.json"], "missing.json: cannot be read"),
    (["--stage", "1", "--shard", "params"], "start with torchrun"),
    (["--stage", "1", "--preset", "llama3-8b", "--sample-every", "9"], "whole on each rank"),
    (["--stage", "1", "--attention", "fast"], "--attention: invalid choice: 'fast'"),
    (["--stage", "1", "--attention", "triton"], "attention 'triton' cannot run here"),
])
def test_wrong_flags_get_one_line(tmp_path, arguments, message):
    assert re.search(message, fails(tmp_path, *arguments))


def test_checkpoint_of_another_preset_and_strict_data(short_run, tmp_path):
    out, _ = short_run
    other = tmp_path / "stage1"
    shutil.copytree(out / "stage1", other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "llm": "lmsys/vicuna-7b-v1.5"}))
    message = fails(tmp_path, "--stage", 2, "--out", tmp_path)
    assert "is a checkpoint of another preset: its llm is 'lmsys/vicuna-7b-v1.5'" in message
    data = tmp_path / "data.json"
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    data.write_text(json.dumps([{"id": "r9", "image": "no.png", "conversations": turns}]))
    for flags, message in (((), "no usable record in a whole batch"),
                           (("--strict-data",), "record r9: .*no.png")):
        got = fails(tmp_path, "--stage", 2, "--init-from", out / "stage1",
                    "--out", tmp_path, "--data", data, "--resume", "never", *flags)
        assert re.search(message, got)


def test_a_loss_that_is_not_finite_stops_the_run(short_run, tmp_path):
    out, _ = short_run
    model = SliME.from_pretrained(out / "stage2")
    with torch.no_grad():
        model.llm.get_decoder().norm.weight.fill_(3e38)  # finite, so saved; what follows is not
    model.save_pretrained(tmp_path / "nan")
    message = fails(tmp_path, "--stage", 3, "--init-from", "nan",
                    "--batch_size", 2, "--max-steps", 2)
    assert re.search(r"step 0: loss nan, gradient norm nan, with the records .*; "
                     r"no state was saved yet", message)


def test_torchrun_with_one_process_shards_too(tmp_path, monkeypatch):
    """The presets of Table 7 ask for sharding, which wants a process group even of one."""
    seen = []
    monkeypatch.setattr("sliming.trainer.train_stage",
                        lambda *_: seen.append(torch.distributed.is_initialized()))
    environment = {"WORLD_SIZE": 1, "RANK": 0, "MASTER_ADDR": "localhost", "MASTER_PORT": 0}
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    for preset in ("llama3-8b", "tiny"):
        in_process(train.main, "--stage", 1, "--preset", preset, "--out", tmp_path,
                   "--eval-questions", 0)
    assert seen == [True, False]


class Told:
    """A package with the interface of wandb and trackio."""

    rows, ended = [], 0

    def init(self, project, name):
        self.started = project, name

    def log(self, row, step):
        self.rows.append((step, row["loss"]))

    def finish(self):
        self.ended += 1


def test_reports_and_samples(capsys, monkeypatch, tmp_path):
    """Metrics go where they are wanted, held-out answers to the log and into pictures; what is
    learned stays the same."""
    told = Told()
    monkeypatch.setitem(sys.modules, "trackio", told)
    for out, more in (("plain", {}), ("told", {"report": "trackio", "sample_every": 2})):
        config = TrainConfig(out=str(tmp_path / out), max_steps=4, batch_size=2, **more)
        train_stage(config, 1, CPU)
    printed = capsys.readouterr().out
    assert losses(tmp_path / "told/stage1") == losses(tmp_path / "plain/stage1")
    assert told.rows == list(enumerate(losses(tmp_path / "told/stage1"))) and told.ended == 1
    assert printed.count("step 2: ") == printed.count("step 4: ") == 4 and "wanted" in printed
    for step in (2, 4):
        with Image.open(tmp_path / "told/stage1" / f"samples-{step:06d}.png") as picture:
            assert picture.width > 1000


@pytest.mark.parametrize("name, module", [("tensorboard", "torch.utils.tensorboard"),
                                          ("wandb", "wandb"), ("trackio", "trackio")])
def test_a_report_whose_package_is_not_installed(monkeypatch, tmp_path, name, module):
    monkeypatch.setitem(sys.modules, module, None)
    message = fails(tmp_path, "--stage", 1, "--max-steps", 1, "--batch_size", 2, "--report", name)
    assert f"pip install {name}" in message


def test_alternating_adapters(tmp_path):
    """First the MLP alone learns, then the query former alone, behind it;
    the checkpoint uses both."""
    torch.manual_seed(0)
    before = SliME.from_backbones(PRESETS["tiny"].model)
    before.save_pretrained(tmp_path / "start")
    # Of one step, the second half begins at 0.
    for steps, expected in ((1, {"query_former"}), (2, {"mlp", "query_former"})):
        config = TrainConfig(out=str(tmp_path / str(steps)), max_steps=steps, batch_size=2,
                             adapter_schedule="alternate", init_from=str(tmp_path / "start"))
        train_stage(config, 1, CPU)
        after = SliME.from_pretrained(tmp_path / str(steps) / "stage1")
        assert after.adapter.expert is None
        pairs = zip(after.adapter.named_parameters(), before.adapter.parameters(), strict=True)
        changed = {name.split(".")[0] for (name, new), old in pairs if not torch.equal(new, old)}
        assert changed == expected


@pytest.mark.skipif(os.name != "posix",
                    reason="limits the size of files, which only POSIX systems can")
def test_a_full_disk_leaves_the_last_checkpoint_whole(short_run, tmp_path):
    out, _ = short_run
    shutil.copytree(out, tmp_path / "out")
    stage = tmp_path / "out/stage2"
    before = {name: (stage / name).read_bytes() for name in ("config.json", "model.safetensors")}
    done = run_train(["--stage", 2, "--max-steps", 1, "--batch_size", 2, "--out", tmp_path / "out"],
                     limit=1_000_000)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for name, data in before.items():
        assert (stage / name).read_bytes() == data
    SliME.from_pretrained(stage)


def test_a_batch_that_cannot_be_shared(tmp_path, monkeypatch):
    for name, value in (("is_initialized", True), ("get_rank", 0), ("get_world_size", 3)):
        monkeypatch.setattr(f"torch.distributed.{name}", lambda value=value: value)
    with pytest.raises(ValueError, match="16 records cannot be shared evenly by 3 processes: "
                                         "use --batch-size 15"):
        train_stage(TrainConfig(out=str(tmp_path)), 1, CPU)


def test_a_stage_begins_from_released_stage_files(short_run, tmp_path):
    model = SliME.from_pretrained(short_run[0] / "stage1")
    projector = {name: tensor for name, tensor in released.packed(model.tensors()).items()
                 if "mm_projector" in name}
    torch.save(projector, tmp_path / "mm_projector.bin")
    config = TrainConfig(out=str(tmp_path), max_steps=1, batch_size=2, init_from=str(tmp_path))
    train_stage(config, 2, CPU)
    after = SliME.from_pretrained(tmp_path / "stage2")
    for ours, theirs in zip(after.adapter.parameters(), model.adapter.parameters(), strict=True):
        assert torch.equal(ours, theirs)
