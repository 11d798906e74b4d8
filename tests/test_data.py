"""Records, files and order: errors take one line; the order does not depend on ranks or workers."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from sliming import data, inputs
from sliming.config import Recipe
from sliming.data import RecordFile, Steps, check_record, load_sample, open_mixture
from sliming.images import open_image
from sliming.inputs import Batch
from sliming.records import RecordError
from sliming.tiny.pictures import TrainingSet


def record(**changes):
    return {"id": "r1", "image": "a.png", "conversations": [
        {"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "that"}], **changes}


def one_line(error):
    assert "\n" not in str(error.value)
    return True


def strange_records(count):
    """Records whose text holds what could confuse a reader of bytes and lines."""
    odd = ['a "quoted" {brace} [list], ', "Grüße 漢字 🙂", "line\nbreak\\", "]}\r\n", "x" * 5000]
    return [record(id=str(i), note=odd[i % len(odd)] * (1 + i % 3)) for i in range(count)]


@pytest.mark.parametrize("indent, ascii_only", [(None, True), (1, False)])
def test_files_of_both_kinds(tmp_path, indent, ascii_only, monkeypatch):
    """One by one as the json module reads them at once, whatever pieces the index is built in."""
    records = strange_records(40)
    text = json.dumps(records, indent=indent, ensure_ascii=ascii_only)
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    lines = "\n\n".join(json.dumps(r, ensure_ascii=ascii_only) for r in records)
    (tmp_path / "a.jsonl").write_text(lines + "\n", encoding="utf-8")
    for chunk in (7, 1000, 1 << 20):
        monkeypatch.setattr("sliming.records.CHUNK", chunk)
        for name in ("a.json", "a.jsonl"):
            (tmp_path / f"{name}.index.npy").unlink(missing_ok=True)
            file = RecordFile(tmp_path / name)
            assert len(file) == 40 and list(file) == records
    (tmp_path / "empty.json").write_text(" [ ] ")
    with pytest.raises(RecordError, match="no records"):
        RecordFile(tmp_path / "empty.json")


def test_the_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    monkeypatch.setattr("sliming.data.SMALL", 0)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record(id="old")) + "\n")
    RecordFile(path)
    with monkeypatch.context() as patch:
        patch.setattr("sliming.data.offsets_of_lines", None)  # would fail if it were called
        assert RecordFile(path)[0]["id"] == "old"
    path.write_text("".join(json.dumps(record(id=name)) + "\n" for name in ("a newer one", "two")))
    assert [r["id"] for r in RecordFile(path)] == ["a newer one", "two"]


def test_an_index_elsewhere_where_the_folder_is_read_only(tmp_path, monkeypatch):
    path = tmp_path / "data" / "a.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(record()) + "\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def mkstemp(suffix, prefix, folder, make=data.tempfile.mkstemp):
        if folder == path.parent:
            raise PermissionError(13, "Permission denied", str(folder))
        return make(suffix, prefix, folder)

    monkeypatch.setattr(data.tempfile, "mkstemp", mkstemp)
    RecordFile(path)
    assert not list(tmp_path.rglob("*.npy"))  # a small file leaves none
    monkeypatch.setattr("sliming.data.SMALL", 0)
    assert RecordFile(path)[0] == record()
    assert not list(path.parent.glob("*.npy"))
    assert len(list((tmp_path / "cache" / "sliming").glob("*.npy"))) == 1


@pytest.mark.parametrize("name, text, message", [
    ("a.json", '[{"id": 1},\n{"id": }]', "line 2: broken JSON"),
    ("a.json", '[{"id": 1},\n{"id": 2}', "line 2: broken JSON"),
    ("a.json", '[{"id": 1}\n\n{"id": 2}]', "line 3: broken JSON .expected ,"),
    ("a.json", '[record]', "line 1: broken JSON"),
    ("a.json", '[{"id": 1}, {"id": 2}, ', "broken JSON .Expecting value"),
    ("a.json", "[]", "no records"),
    ("a.jsonl", "", "no records"),
])
def test_broken_files_say_the_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(RecordError, match=message) as error:
        RecordFile(tmp_path / name)
    assert one_line(error) and name in str(error.value)


def test_a_broken_line_costs_that_record_only(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n\n{"id": 2\n{"id": 3}\n')
    file = RecordFile(tmp_path / "a.jsonl")
    assert file[0] == {"id": 1} and file[2] == {"id": 3}
    with pytest.raises(RecordError, match="a.jsonl, line 3: broken JSON") as error:
        file[1]
    assert one_line(error)


def test_missing_and_binary_files(tmp_path):
    (tmp_path / "b.json").write_bytes(b"[\xff\xfe\x00]")
    for name in ("missing.json", "b.json"):
        with pytest.raises(RecordError, match=f"{name}: cannot be read") as error:
            RecordFile(tmp_path / name)
        assert one_line(error)


def test_mixtures(tmp_path):
    """Every epoch holds each file's records in its weight's number, in a new order; a half is
    another half next time."""
    for name, count in (("a", 6), ("b", 4)):
        lines = "".join(json.dumps({"id": f"{name}{i}"}) + "\n" for i in range(count))
        (tmp_path / f"{name}.jsonl").write_text(lines)
    files = [str(tmp_path / "a.jsonl"), f"{tmp_path}/b.jsonl:0.5"]
    mixture = open_mixture(files, seed=1)
    assert len(mixture) == 8
    epochs = [[mixture[epoch * 8 + i]["id"] for i in range(8)] for epoch in range(4)]
    for epoch in epochs:
        assert {name for name in epoch if name[0] == "a"} == {f"a{i}" for i in range(6)}
        assert sum(name[0] == "b" for name in epoch) == 2
    assert epochs[0] != epochs[1]
    for first, second in (epochs[:2], epochs[2:]):  # two halves are a whole
        assert len({name for name in first + second if name[0] == "b"}) == 4
    assert [open_mixture(files, seed=1)[i]["id"] for i in range(8)] == epochs[0]
    twice = open_mixture([f"{tmp_path}/b.jsonl:2"], seed=0)
    assert sorted(twice[i]["id"] for i in range(8)) == sorted(2 * [f"b{i}" for i in range(4)])
    with pytest.raises(RecordError, match="a weight must be above 0"):
        open_mixture([f"{tmp_path}/b.jsonl:0"], seed=0)


human, gpt = {"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}


@pytest.mark.parametrize("changes, message", [
    ({"conversations": None}, "no conversations"),
    ({"conversations": []}, "no conversations"),
    ({"conversations": [gpt, human]}, "turn 1 must be"),
    ({"conversations": [human, {"from": "gpt"}]}, "turn 2 must be"),
    ({"conversations": [human, {"from": "gpt", "value": " "}]}, "turn 2 is an empty answer"),
    ({"conversations": [human, {"from": "gpt", "value": "<image>"}]},
     "no question, but has an <image> marker"),
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
    for image, message in (("a.png", "unreadable image"), ("b.png", "no such image"),
                           ("../fine.png", "lies outside"), (7, "must be a path, not int"),
                           (str(tmp_path / "fine.png"), "lies outside")):
        with pytest.raises(RecordError, match=f"record r1: .*{message}") as error:
            load_sample(record(image=image), folder, "chat", model.processor)
        assert one_line(error)
    assert len(load_sample(record(image="fine.png"), tmp_path, "chat", model.processor).images) == 1
    words = record(image=[], conversations=[human, gpt])
    assert load_sample(words, tmp_path, "chat", model.processor).images == []


@pytest.mark.parametrize("rule", ["paper", "official"])
def test_too_long_samples_lose_crops_and_never_words(model, tmp_path, monkeypatch, rule):
    """The largest image gives way first, and each is read once however many bounds are tried."""
    Image.new("RGB", (190, 190), "white").save(tmp_path / "large.png")
    Image.new("RGB", (128, 64), "white").save(tmp_path / "small.png")
    long = record(image=["large.png", "small.png"], conversations=[
        {"from": "human", "value": "<image> <image>\nWhat?"},
        {"from": "gpt", "value": "that " * 30}])
    monkeypatch.setattr(model.config, "slicing", rule)
    reads = []
    monkeypatch.setattr(inputs, "open_image", lambda source, *rest: (
        reads.append(source) if isinstance(source, Path) else None) or open_image(source, *rest))
    counts = []
    for limit in (None, 330, 280):
        sample = load_sample(long, tmp_path, "chat", model.processor, max_tokens=limit)
        grids = [image.grid for image in sample.images]
        assert [len(image.crops) for image in sample.images] == [c * r for c, r in grids]
        assert grids[1] == (2, 1)
        counts.append(model.processor.token_count(sample.text, grids, "both"))
        batch = Batch.pack([sample])
        read = model.embed(batch, model.see(batch, gamma=1.0))[0]  # by the language model
        assert len(read) == counts[-1]
        if limit is None:
            text = sample.text
        assert sample.text == text
    assert counts[0] > 330 >= counts[1] > 280 >= counts[2] and len(reads) == 6
    message = "record r1: .* tokens with the fewest crops, the limit is 100; shorten"
    with pytest.raises(RecordError, match=message):
        load_sample(long, tmp_path, "chat", model.processor, max_tokens=100)


def steps(model, batch_size=6, token_budget=None, micro_batch=None, **changes):
    recipe = Recipe(batch_size, 0.0, token_budget=token_budget, micro_batch=micro_batch)
    return Steps(**{"records": TrainingSet(3), "processor": model.processor, "parts": "both",
                    "template": "chat", "recipe": recipe, "steps": 4, **changes})


def rows(share):
    """The samples of a share in one order: ids, pixels and noise of each."""
    return sorted((ids.tolist(), noise.flatten().tolist()[:3]) for batch in share.batches
                  for ids, noise in zip(batch.words.split(batch.lengths), batch.gate_noise,
                                        strict=True))


def test_ranks_share_each_step_and_workers_do_not_matter(model):
    whole = list(steps(model))  # ends after the last step
    assert len(whole) == 4 and all(len(share.batches) == 1 for share in whole)
    for step in range(4):
        parts = [steps(model, rank=rank, world=3)[step] for rank in range(3)]
        assert sorted(row for part in parts for row in rows(part)) == rows(whole[step])
    for workers, start in ((0, None), (2, None), (1, "spawn")):
        loader = DataLoader(steps(model), batch_size=None, num_workers=workers,
                            multiprocessing_context=start)
        for share, reference in zip(loader, whole, strict=True):
            assert torch.equal(share.batches[0].words, reference.batches[0].words)
            assert torch.equal(share.batches[0].crops, reference.batches[0].crops)
            assert share.skipped == []
    assert rows(steps(model, first=2)[0]) == rows(whole[2])  # going on from a step


def test_workers_are_handed_neither_weights_nor_indices(model, tmp_path, monkeypatch):
    """Where processes are not forked, all that a worker has is sent to it: the tokenizer, settings,
    the names of files."""
    monkeypatch.setattr("sliming.data.SMALL", 0)
    lines = "".join(json.dumps(record(id=str(i))) + "\n" for i in range(20_000))
    (tmp_path / "a.jsonl").write_text(lines)
    work = steps(model, records=open_mixture([str(tmp_path / "a.jsonl")], seed=0))
    sent = pickle.dumps(work)
    assert len(sent) < len(pickle.dumps(model.processor.tokenizer)) + 10_000
    again = pickle.loads(sent)
    assert [again.records[place] for place in (0, 7)] == [work.records[place] for place in (0, 7)]


def test_long_records_are_dealt_out_evenly(model, tmp_path):
    sizes = [1, 100, 1, 100, 1, 100, 1, 100]
    records = [record(id=str(i), image=[], conversations=[human, {**gpt, "value": "word " * n}])
               for i, n in enumerate(sizes)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    mixture = open_mixture([str(tmp_path / "a.json")], seed=0)
    shares = [steps(model, records=mixture, batch_size=8, rank=rank, world=2)[0] for rank in (0, 1)]
    tokens = [sum(sum(batch.lengths) for batch in share.batches) for share in shares]
    assert max(tokens) < 1.2 * min(tokens)


def test_micro_batches(model):
    """By number and by tokens; a sample longer than the budget stands alone; nothing is lost."""
    whole = rows(steps(model)[0])
    for options in ({"micro_batch": 4}, {"token_budget": 400}, {"token_budget": 1}):
        share = steps(model, **options)[0]
        assert rows(share) == whole and len(share.ids) == 6
        if "micro_batch" in options:
            assert [len(batch.lengths) for batch in share.batches] == [4, 2]
        for batch in share.batches:
            tokens = sum(batch.lengths) + sum(65 + 16 * c * r for c, r in batch.grids)
            assert len(batch.lengths) == 1 or tokens <= options.get("token_budget", 10_000)


def test_with_several_ranks_every_micro_batch_has_an_image(model, tmp_path):
    (tmp_path / "a.json").write_text(json.dumps([record(image=[], conversations=[human, gpt])]))
    mixture = open_mixture([str(tmp_path / "a.json")], seed=0)
    options = {"records": mixture, "batch_size": 2, "folder": tmp_path}
    (batch,) = steps(model, **options, world=2)[0].batches
    (alone,) = steps(model, **{**options, "batch_size": 1})[0].batches
    assert len(batch.grids) == 1 and len(alone.grids) == 0
    assert model(batch).loss.item() == pytest.approx(model(alone).loss.item(), abs=1e-6)
    blank = model.processor.blank(learned=True)
    assert sum(label >= 0 for label in blank.text.labels) == 1


def test_bad_records_are_skipped_and_counted_or_stop_a_strict_run(model, tmp_path):
    Image.fromarray(np.full((80, 90, 3), 200, np.uint8)).save(tmp_path / "a.png")
    records = [record(), record(id="r2", image="gone.png"), record(id="r3")]
    (tmp_path / "a.json").write_text(json.dumps(records))
    (tmp_path / "b.json").write_text(json.dumps([record(id="r2", image="gone.png")]))
    options = {"records": open_mixture([str(tmp_path / "a.json")], 0), "folder": tmp_path,
               "batch_size": 3}
    share = steps(model, **options)[0]
    assert len(share.batches[0].lengths) == 2 and sorted(share.ids) == ["r1", "r3"]
    assert len(share.skipped) == 1
    assert "record r2" in share.skipped[0] and "gone.png" in share.skipped[0]
    nothing = steps(model, **{**options, "records": open_mixture([str(tmp_path / "b.json")], 0)})[0]
    assert nothing.batches == [] and len(nothing.skipped) == 3
