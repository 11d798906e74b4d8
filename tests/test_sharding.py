"""What is learned depends neither on the number of ranks nor on what they divide among them."""

import json

import numpy as np
import pytest
import torch
from flows import losses, run_train

from sliming.model import SliME
from sliming.config import PRESETS
from sliming.tiny.pictures import TrainingSet

MODES = ["none", "grads", "params", "offload"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Records of very unequal length, a third without an image, one broken; and a checkpoint to start from."""
    folder = tmp_path_factory.mktemp("data")
    records = []
    for index in range(24):
        record = TrainingSet(3, seed=1)[index]
        if index % 3 == 0:  # words only, some long
            turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "nobody at all " * (1 + index)}]
            records.append({"id": f"words {index}", "conversations": turns})
            continue
        record["image"].save(folder / f"{index}.png")
        records.append({**record, "image": f"{index}.png"})
    records[4]["image"] = "missing.png"
    (folder / "data.json").write_text(json.dumps(records))
    torch.manual_seed(0)
    SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder / "start")
    return folder


def command(data, out, stage, *flags, steps=20):
    return ["--stage", stage, "--max-steps", steps, "--batch_size", 4, "--eval-questions", 0, "--out", out, "--data",
            data / "data.json", "--images", data, "--init-from", data / "start", *flags]


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """Folders by (stage, what two ranks share, or None for one rank): a step's four records at once on one rank, one record
    at a time on two."""
    out = tmp_path_factory.mktemp("runs")
    alone = {(stage, None): out / f"{stage}-alone" for stage in (1, 2, 3)}
    shared = {(3, mode): out / f"3-{mode}" for mode in MODES} | {(stage, "grads"): out / f"{stage}-grads" for stage in (1, 2)}
    steps = {1: 6, 2: 6, 3: 20}
    for ranks, plans in ((None, alone), (2, shared)):
        commands = [command(data, folder, stage, *(() if mode is None else ("--shard", mode, "--micro_batch", 1)),
                            steps=steps[stage]) for (stage, mode), folder in plans.items()]
        done = run_train(*commands, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "missing.png" in done.stderr
    return alone | shared


@pytest.mark.parametrize("mode", MODES)
def test_two_ranks_learn_what_one_learns(runs, mode):
    """Twenty steps of stage III, with the noise of gate and router."""
    curves = [losses(runs[3, which] / "stage3") for which in (None, mode)]
    assert len(curves[0]) == 20
    np.testing.assert_allclose(*curves, atol=1e-5)
    model, other = (SliME.from_pretrained(runs[3, which] / "stage3").tensors() for which in (None, mode))
    for name, tensor in model.items():
        if not name.endswith("w_k.bias"):  # its exact gradient is 0: Adam makes steps of the rounding
            assert (other[name] - tensor).abs().max() <= 1e-3, name


@pytest.mark.parametrize("stage", [1, 2])
def test_frozen_parts_are_sharded_too(runs, stage):
    """Stages I and II, where the language model is frozen and parts of the model see nothing."""
    np.testing.assert_allclose(*(losses(runs[stage, which] / f"stage{stage}") for which in (None, "grads")), atol=1e-5)
