"""Killed at any moment, a run goes on as if nothing had happened."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from flows import ENVIRONMENT, ROOT, begin, losses, run_train, stop_after, until

import train
from sliming.checkpoints.states import States, discard
from sliming.config import PRESETS, TrainConfig
from sliming.model import SliME
from sliming.trainer import train_stage
from sliming.watch import cut_metrics

STEPS = 20


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("start")
    torch.manual_seed(0)
    SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder)
    return folder


def flags(start, out, save_every):
    return ["--stage", "3", "--max-steps", str(STEPS), "--batch_size", "2", "--eval-questions", "0",
            "--out", str(out), "--init-from", str(start), "--save_every", str(save_every)]


def rows(folder):
    path = folder / "stage3" / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def killed_often(start, out, save_every, kills, seed=0):
    """Starts the run and kills it at a random moment, `kills` times; then lets it finish."""
    rng, command = random.Random(seed), flags(start, out, save_every)
    for kill in range(kills):
        process = begin(command, folder=out.parent)
        target = min(STEPS - 3, (kill + 1) * (STEPS - 2) // (kills + 1))
        until(lambda: rows(out) >= target or not process.is_alive())  # noqa: B023
        # With a state after every step, most moments lie in a step or in its saving.
        time.sleep(rng.random() * 0.15)
        process.kill()
        process.join()
    done = run_train(command)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(start, tmp_path, kills):
    """SIGKILL, in saving too: losses and weights equal the uninterrupted run's bit for bit."""
    printed = killed_often(start, tmp_path / "killed", 1, kills)
    assert "goes on at step" in printed
    done = run_train(flags(start, tmp_path / "whole", 10))
    assert done.returncode == 0, done.stderr[-2000:]
    folders = [tmp_path / name / "stage3" for name in ("killed", "whole")]
    curves = [losses(folder) for folder in folders]
    assert len(curves[0]) == STEPS and curves[0] == curves[1]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1]
    assert not (tmp_path / "killed" / "stage3" / "resume").exists()


def config(start, out, **changes):
    return TrainConfig(stage="3", out=str(out), init_from=str(start), max_steps=8, batch_size=4,
                       save_every=2, **changes)


@pytest.fixture(scope="module")
def half_done(start, tmp_path_factory):
    """A run of 8 steps on one rank, stopped after 4, and its uninterrupted twin's losses."""
    folder = tmp_path_factory.mktemp("half")
    train_stage(config(start, folder / "whole"), 3, torch.device("cpu"))
    with stop_after(4, True):
        train_stage(config(start, folder / "half"), 3, torch.device("cpu"))
    return folder / "half", losses(folder / "whole" / "stage3")


def test_another_number_of_ranks_goes_on(start, half_done, tmp_path):
    """One rank's run is finished by two that share everything; two ranks' run by one."""
    half, whole = half_done
    shutil.copytree(half, tmp_path / "up")
    command = ["--stage", 3, "--init-from", start, "--max-steps", 8, "--batch_size", 4,
               "--save_every", 2, "--eval-questions", 0]
    done = run_train([*command, "--out", tmp_path / "up", "--shard", "params"],
                     [*command, "--out", tmp_path / "down", "--shard", "params"],
                     ranks=2, SLIMING_TEST_STOP="4")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "goes on at step 4" in done.stdout
    np.testing.assert_allclose(losses(tmp_path / "up" / "stage3"), whole, atol=1e-5)
    assert len(losses(tmp_path / "down" / "stage3")) == 4
    train_stage(config(start, tmp_path / "down"), 3, torch.device("cpu"))
    np.testing.assert_allclose(losses(tmp_path / "down" / "stage3"), whole, atol=1e-5)


@pytest.mark.skipif(not Path("/proc/self/task").exists(),
                    reason="finds the ranks as Linux shows them")
@pytest.mark.slow
def test_two_ranks_killed_while_saving_go_on_as_one(start, half_done, tmp_path):
    """SIGKILL to torchrun and its sharded ranks in the middle of writing a state: the one before is
    whole, for one rank too."""
    writing = tmp_path / "stage3" / "resume" / ".writing-00000006"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), "--stage", "3", "--init-from", str(start),
               "--max-steps", "8", "--batch_size", "4", "--save_every", "2",
               "--eval-questions", "0", "--out", str(tmp_path), "--shard", "params"]
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=ENVIRONMENT, stdout=log, stderr=log)
        while not writing.exists():
            assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ranks = children.read_text().split()
        for each in (*map(int, ranks), process.pid):  # the ranks are in sessions of their own
            os.kill(each, signal.SIGKILL)
        process.wait()
    assert len(ranks) == 2
    done = len(losses(tmp_path / "stage3"))
    assert 4 <= done < 8
    train_stage(config(start, tmp_path), 3, torch.device("cpu"))
    np.testing.assert_allclose(losses(tmp_path / "stage3"), half_done[1], atol=1e-5)


def test_other_flags_are_refused_and_never_begins_anew(start, half_done, tmp_path):
    half, whole = half_done
    shutil.copytree(half, tmp_path / "half")
    message = "run with other flags .*learning_rate None, now 0.01.*--resume never"
    with pytest.raises(ValueError, match=message):
        train_stage(config(start, tmp_path / "half", learning_rate=0.01), 3, torch.device("cpu"))
    discard(tmp_path / "half", [3])
    train_stage(config(start, tmp_path / "half"), 3, torch.device("cpu"))
    assert losses(tmp_path / "half" / "stage3") == whole


def test_stages_that_are_done_stay_done(tmp_path, monkeypatch):
    """A run of all stages that stops before a stage's first state does not begin again with the
    stages before it."""
    class Stop(BaseException):
        pass

    def stop(config, stage, device, train_stage=train_stage):
        if stage == stopped:
            raise Stop
        trained.append(stage)
        return train_stage(config, stage, device)

    def weights():
        return [path.read_bytes() for path in sorted(tmp_path.glob("stage*/model.safetensors"))]

    monkeypatch.setattr("sliming.trainer.train_stage", stop)
    monkeypatch.setattr(sys, "argv", ["train.py", "--out", str(tmp_path), "--max-steps", "2",
                                      "--batch_size", "2", "--eval-questions", "0"])
    # The stage before is found to be done, at its last step.
    for stopped, expected in ((2, [1]), (3, [1, 2]), (None, [2, 3])):
        before, trained = weights(), []
        with pytest.raises(Stop) if stopped else nullcontext():
            train.main()
        assert trained == expected
        assert before == weights()[:len(before)]
        curves = [losses(path) for path in sorted(tmp_path.glob("stage*"))]
        assert [len(curve) for curve in curves] == [2] * max(expected)
    assert not list(tmp_path.glob("stage*/resume"))


def test_a_state_is_of_its_moment(tmp_path):
    """It is copied before `save` returns, and has its name as soon as it is whole."""
    torch.manual_seed(0)
    model = torch.nn.Linear(300, 300)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    states, copies = States(tmp_path, model, optimizer, {"seed": 1}, keep=2), {}
    for step in range(1, 5):
        model(torch.ones(300)).sum().backward()
        optimizer.step()
        states.save(step, skipped=7)
        momentum = optimizer.state[model.weight]["exp_avg"]
        copies[step] = [tensor.clone() for tensor in (model.weight, model.bias, momentum)]
        for tensor in (model.weight, momentum):  # while it is being written
            tensor.data.add_(1)
    until(lambda: states.settle(wait=False) or not states.writing)
    names = [path.name for path in states.found()]
    assert names == ["step-00000003", "step-00000004"] == sorted(os.listdir(tmp_path))
    for step in (4, 3):
        assert states.restore() == (step, 7)
        found = (model.weight, model.bias, optimizer.state[model.weight]["exp_avg"])
        assert all(torch.equal(a, b) for a, b in zip(found, copies[step], strict=True))
        assert float(optimizer.state[model.weight]["step"]) == step
        shutil.rmtree(states.found()[-1])


def test_a_state_that_cannot_be_written_gets_one_line(tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError("No space left on device")

    model = torch.nn.Linear(2, 2)
    states = States(tmp_path, model, torch.optim.AdamW(model.parameters()), {}, keep=2)
    monkeypatch.setattr("os.fsync", full)
    states.save(1, 0)
    with pytest.raises(OSError, match="cannot save the state .*No space left") as error:
        states.settle()
    assert "\n" not in str(error.value) and not states.found()


def test_metrics_survive_a_kill_while_they_are_cut(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    row = '{{"step": {}, "loss": 1.5}}\n'
    path.write_text("".join(map(row.format, range(3))) + '{"st')
    monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        cut_metrics(path, 2)
    monkeypatch.undo()
    assert [row["step"] for row in cut_metrics(path, 2)] == [0, 1]
    assert path.read_text() == row.format(0) + row.format(1)
    path.write_text('{"step": 0}\n')
    with pytest.raises(ValueError, match="metrics.jsonl: holds rows that are no training's"):
        cut_metrics(path, 2)
