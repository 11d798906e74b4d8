"""Records, files and order: what is wrong is said in one line, and the order does not depend on ranks or workers."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sliming.data import Batches, Order, RecordError, check_record, load_sample, read_records
from sliming.synthetic import TrainingSet


def record(**changes):
    return {"id": "r1", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}], **changes}


def one_line(error):
    assert "\n" not in str(error.value)
    return True


def test_files_of_both_kinds(tmp_path):
    records = [record(id=str(i)) for i in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "a.jsonl").write_text("\n\n".join(json.dumps(r) for r in records) + "\n")
    assert read_records(tmp_path / "a.json") == read_records(tmp_path / "a.jsonl") == records


@pytest.mark.parametrize("name, text, message", [
    ("a.json", '[{"id": 1},\n{"id": }]', "line 2: broken JSON"),
    ("a.jsonl", '{"id": 1}\n{"id": 2\n', "line 2: broken JSON"),
    ("a.json", "[]", "no records"),
    ("a.jsonl", "", "no records"),
])
def test_broken_files_say_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordError, match=message) as error:
        read_records(tmp_path / name)
    assert one_line(error) and name in str(error.value)


def test_missing_and_binary_files(tmp_path):
    (tmp_path / "b.json").write_bytes(b"\xff\xfe\x00")
    for name in ("missing.json", "b.json"):
        with pytest.raises(RecordError, match=f"{name}: cannot be read") as error:
            read_records(tmp_path / name)
        assert one_line(error)


human, gpt = {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}


@pytest.mark.parametrize("changes, message", [
    ({"conversations": None}, "no conversations"),
    ({"conversations": []}, "no conversations"),
    ({"conversations": [gpt, human]}, "turn 1 must be"),
    ({"conversations": [human, {"from": "gpt"}]}, "turn 2 must be"),
    ({"conversations": [human, {"from": "gpt", "value": " "}]}, "turn 2 is an empty answer"),
    ({"conversations": [human, {"from": "gpt", "value": "<image>"}]}, "answer with an <image> marker"),
    ({"conversations": [human, gpt, human]}, "last question has no answer"),
    ({"conversations": [human, gpt]}, "0 <image> markers for 1 images"),
    ({"image": ["a.png", "b.png"]}, "1 <image> markers for 2 images"),
])
def test_malformed_records(changes, message):
    with pytest.raises(RecordError, match=f"record r1: .*{message}") as error:
        check_record(record(**changes))
    assert one_line(error)


def test_a_record_that_is_no_object():
    with pytest.raises(RecordError, match="not list"):
        check_record([1])


def test_images_missing_broken_outside_and_of_wrong_type(model, tmp_path):
    Image.new("RGB", (10, 10)).save(tmp_path / "fine.png")
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes((tmp_path / "fine.png").read_bytes()[:40])
    for image, message in (("a.png", "unreadable image"), ("b.png", "no such image"), ("../fine.png", "lies outside"),
                           (str(tmp_path / "fine.png"), "lies outside"), (7, "must be a path, not int")):
        with pytest.raises(RecordError, match=f"record r1: .*{message}") as error:
            load_sample(record(image=image), folder, "chat", model)
        assert one_line(error)
    assert len(load_sample(record(image="fine.png"), tmp_path, "chat", model).images) == 1
    words = load_sample(record(image=[], conversations=[human, gpt]), tmp_path, "chat", model)
    assert words.images == []


def test_order_is_a_new_permutation_each_epoch():
    order = Order(10, seed=3)
    first, second = ([order[e * 10 + i] for i in range(10)] for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(10)) and first != second
    assert [Order(10, seed=3)[i] for i in range(10)] == first != [Order(10, seed=4)[i] for i in range(10)]


def batches(model, **changes):
    return Batches(**{"records": TrainingSet(3), "order": None, "folder": None, "template": "chat", "model": model,
                      "batch_size": 6, "steps": 4, **changes})


def test_ranks_share_each_batch_and_workers_do_not_matter(model):
    whole = [batch for batch, _ in batches(model)]  # ends after the last step
    assert len(whole) == 4
    for step in range(4):
        parts = [batches(model, rank=rank, world=4)[step][0] for rank in range(4)]
        assert sorted(n for part in parts for n in part.lengths) == sorted(whole[step].lengths)
        assert sum(len(part.input_ids) for part in parts) == len(whole[step].input_ids)
    for workers in (0, 2):
        loader = DataLoader(batches(model), batch_size=None, num_workers=workers)
        for (batch, skipped), reference in zip(loader, whole):
            assert torch.equal(batch.input_ids, reference.input_ids) and torch.equal(batch.views, reference.views)
            assert skipped == []


def test_bad_records_are_skipped_and_counted_or_stop_a_strict_run(model, tmp_path):
    Image.fromarray(np.full((80, 90, 3), 200, np.uint8)).save(tmp_path / "a.png")
    records = [record(), record(id="r2", image="gone.png"), record(id="r3")]
    options = {"records": records, "order": Order(3, 0), "folder": tmp_path, "batch_size": 3}
    batch, skipped = batches(model, **options)[0]
    assert len(batch.lengths) == 2 and len(skipped) == 1 and "record r2" in skipped[0] and "gone.png" in skipped[0]
    with pytest.raises(RecordError, match="record r2"):
        batches(model, **options, strict=True)[0]
    nothing, skipped = batches(model, **{**options, "records": [records[1]], "order": Order(1, 0)})[0]
    assert nothing is None and len(skipped) == 3
