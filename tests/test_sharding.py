"""What is learned depends neither on the number of ranks nor on what they divide among them."""

import json

import numpy as np
import pytest
import torch
from flows import losses, run_train

from sliming.config import PRESETS
from sliming.model import SliME
from sliming.tiny.pictures import TrainingSet

MODES = ["none", "grads", "params", "offload"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records of unequal length, a third without an image, one broken; a checkpoint to start at."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for index in range(24):
        record = TrainingSet(3, seed=1)[index]
        if index % 3 == 0:  # words only, some long
            turns = [{"from": "human", "value": "Who?"},
                     {"from": "gpt", "value": "nobody at all " * (1 + index)}]
            records.append({"id": f"words {index}", "conversations": turns})
            continue
        record["image"].save(folder / f"{index}.png")
        records.append({**record, "image": f"{index}.png"})
    records[4]["image"] = "missing.png"
    (folder / "data.json").write_text(json.dumps(records))
    torch.manual_seed(0)
    SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder / "start")
    return folder


def command(data, out, stage, *flags, steps=8):
    return ["--stage", stage, "--max-steps", steps, "--batch_size", 4, "--eval-questions", 0,
            "--out", out, "--data", data / "data.json", "--images", data,
            "--init-from", data / "start", *flags]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folders by (stage, what two ranks share, or None for one rank): a step's four records at once
    on one rank, one record at a time on two."""
    out = tmp_path_factory.mktemp("runs")
    folders = {}
    for ranks, plans in ((None, [(1, None), (2, None), (3, None)]),
                         (2, [(1, "grads"), (2, "grads"), *((3, mode) for mode in MODES)])):
        flags = () if ranks is None else ("--micro_batch", 1, "--shard")
        commands = []
        for stage, mode in plans:
            folders[stage, mode] = out / f"{stage}-{mode or 'alone'}"
            commands.append(command(data, folders[stage, mode], stage, *flags, *[mode] * bool(mode),
                                    steps=8 if stage == 3 else 3))
        done = run_train(*commands, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "missing.png" in done.stderr
    return folders


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_learn_what_one_learns(runs, mode):
    """Eight steps of stage III, with the noise of gate and router."""
    curves = [losses(runs[3, which] / "stage3") for which in (None, mode)]
    assert len(curves[0]) == 8
    np.testing.assert_allclose(*curves, atol=1e-5)
    model, other = (SliME.from_pretrained(runs[3, which] / "stage3").tensors()
                    for which in (None, mode))
    for name, tensor in model.items():
        if not name.endswith("w_k.bias"):  # its exact gradient is 0: Adam's steps are of rounding
            assert (other[name] - tensor).abs().max() <= 1e-3, name


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_parts_are_sharded_too(runs, stage):
    """Stages I and II, where the language model is frozen and parts of the model see nothing."""
    curves = [losses(runs[stage, which] / f"stage{stage}") for which in (None, "grads")]
    np.testing.assert_allclose(*curves, atol=1e-5)
