"""Features of built-in pictures, made once: same learning and answers; the tower runs no more."""

import json

import numpy as np
import pytest
import torch
from flows import losses, run_train

from sliming.config import PRESETS, STAGES, TrainConfig
from sliming.inputs import Batch
from sliming.model import SliME
from sliming.tiny.features import Features
from sliming.tiny.held_out import held_out_accuracy
from sliming.tiny.pictures import TrainingSet
from sliming.trainer import train_stage

CPU = torch.device("cpu")


@pytest.fixture
def views(model, monkeypatch):
    """How many views each call of any tower got."""
    seen, forward = [], type(model.vision).forward
    monkeypatch.setattr(type(model.vision), "forward",
                        lambda self, pixels: seen.append(len(pixels)) or forward(self, pixels))
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_pool_learns_the_same_with_features_and_with_pixels(model, views, monkeypatch, tmp_path,
                                                              stage):
    model.save_pretrained(tmp_path / "start")
    curves = []
    for name in ("features", "pixels"):
        if name == "pixels":
            monkeypatch.setattr("sliming.trainer.training_set",
                                lambda config, stage, *_: TrainingSet(stage, 0, config.pool))
        views.clear()
        config = TrainConfig(out=str(tmp_path / name), init_from=str(tmp_path / "start"),
                             max_steps=4, batch_size=3, pool=5)
        train_stage(config, stage, CPU)
        curves.append(losses(tmp_path / name / f"stage{stage}"))
        assert len(views) == (1 if name == "features" else 4)  # five pictures at once; every step
    assert curves[0] == pytest.approx(curves[1], abs=1e-5) and curves[0][3] != curves[0][0]


def test_a_pool_s_pictures_come_back_with_new_words():
    records = TrainingSet(2, seed=1, pool=3)
    one, again = records[1], records[4]
    assert np.array_equal(one["image"], again["image"])
    assert one["conversations"] != again["conversations"]
    assert not np.array_equal(one["image"], records[2]["image"])


def test_nothing_comes_back_where_the_pool_is_larger_than_the_stage(views, tmp_path):
    """Then the pictures are new ones all the time, as without a pool."""
    for pool in (0, 6):
        config = TrainConfig(out=str(tmp_path / str(pool)), max_steps=2, batch_size=3, pool=pool)
        train_stage(config, 1, CPU)
    assert losses(tmp_path / "0" / "stage1") == losses(tmp_path / "6" / "stage1")
    assert views == [3] * 4
    assert not (tmp_path / "6" / "features").exists()


@pytest.mark.parametrize("parts", ["both", "global", "local"])
def test_features_are_what_encode_gives_and_equal_views_are_kept_once(model, views, tmp_path,
                                                                      parts):
    pictures = [TrainingSet(3)[index]["image"] for index in (0, 1, 2, 0)]
    features = Features(tmp_path, "some", pictures, model, parts)
    assert len(features) == 4 and len(views) == 1
    batch = Batch.pack([model.processor.ask(picture, "") for picture in pictures])
    whole, crops = model.encode(batch, parts)
    start = 0
    kept = [features[index] for index in range(4)]
    for number, (slices, grid) in enumerate(zip(kept, batch.grids, strict=True)):
        assert slices.grid == grid
        if parts == "local":
            assert slices.global_view is None
        else:
            assert (slices.global_view - whole[number]).abs().max() < 1e-5
        if parts == "global":
            assert slices.crops is None
            continue
        count = grid[0] * grid[1]
        assert (slices.crops - crops[start:start + count]).abs().max() < 1e-5
        start += count
    assert features.path.stat().st_size == views[0] * 64 * 128 * 4
    assert views[0] < len(whole) + len(crops)
    # The same model finds the file again; another tower, way of slicing or name does not.
    views.clear()
    assert Features(tmp_path, "some", iter(()), model, parts).path == features.path and not views
    model.config.max_side = 5
    sliced = Features(tmp_path, "some", pictures[:1], model, parts).path
    model.vision.clip.embeddings.class_embedding.data += 1
    encoded = Features(tmp_path, "some", pictures[:1], model, parts).path
    assert len({features.path, sliced, encoded}) == 3


@pytest.mark.parametrize("suffix", [".f32", ".npz"])
@pytest.mark.parametrize("damage", ["a bit", "cut", "gone"])
def test_a_damaged_file_is_made_anew(model, views, tmp_path, capsys, suffix, damage):
    pictures = [TrainingSet(3)[index]["image"] for index in (0, 1)]
    path = Features(tmp_path, "some", pictures, model, "both").path
    whole, damaged = path.read_bytes(), path.with_suffix(suffix)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content[:-5] if damage == "cut" else content)
    if damage == "gone":
        damaged.unlink()
    views.clear()
    for _ in range(2):
        assert len(Features(tmp_path, "some", pictures, model, "both")) == 2 and len(views) == 1
    assert path.read_bytes() == whole
    said = capsys.readouterr().err.count(f"{path} is damaged, and made anew\n")
    assert said == (damage != "gone")


def test_ranks_share_the_pictures(tmp_path):
    """Each reads its part of the pool and of the questions; what is learned and answered is what
    one process learns and answers."""
    flags = ["--stage", 2, "--pool", 5, "--batch-size", 4, "--max-steps", 3,
             "--eval-questions", 40, "--init-from", tmp_path / "start", "--out"]
    SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(tmp_path / "start")
    alone = run_train([*flags, tmp_path / "one"])
    done = run_train([*flags, tmp_path / "two"], ranks=2)
    assert alone.returncode == done.returncode == 0, done.stderr[-2000:]
    curves = [losses(tmp_path / out / "stage2") for out in ("one", "two")]
    assert curves[0] == pytest.approx(curves[1], abs=1e-5)
    answers = [json.loads((tmp_path / out / "stage2" / "eval.json").read_text())
               for out in ("one", "two")]
    assert answers[0] == answers[1] and answers[0]["global"]["n"] == 40
    for number in range(2):  # progress is shown once
        assert done.stderr.count(f"stage2-seed0-5-pictures-{number}-of-2: 0p") == (number == 0)
    assert not (tmp_path / "two" / "features").exists()


def test_held_out_pictures_are_encoded_once_for_all_stages(model, views, tmp_path):
    plain = held_out_accuracy(model, 6)
    views.clear()
    for _ in range(2):
        assert held_out_accuracy(model, 6, folder=tmp_path) == plain
    assert len(views) == 1  # for both families
    views.clear()
    held_out_accuracy(model, 6, "global")
    assert views == [6]  # what is not shown is not encoded


def test_a_pool_is_of_whole_built_in_pictures(capsys):
    for flags in (["--data", "a.json"], ["--max-tokens", "300"]):
        with pytest.raises(SystemExit):
            TrainConfig.from_flags("", ["--pool", "9", *flags])
        assert "--pool is of whole built-in pictures" in capsys.readouterr().err
    assert TrainConfig.from_flags("", ["--data", "a.json"]).pool is None
