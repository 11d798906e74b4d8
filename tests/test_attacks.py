"""What attacks on the programs have found, in its smallest cases: hostile files, kills, slips."""

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flows import ENVIRONMENT, ROOT, run_train, until
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from sliming import data
from sliming.backbones import TINY
from sliming.chat import IMAGE, TEMPLATES, without_markers
from sliming.checkpoints import files, released
from sliming.checkpoints.states import States, look_at
from sliming.config import PRESETS, Recipe, SliMEConfig
from sliming.data import RecordFile, Steps, load_sample, open_mixture
from sliming.generate import Conversation, answer_file
from sliming.guard import InputError, deaf, one_line, only_one, plain
from sliming.images import open_image
from sliming.model import SliME
from sliming.records import RecordError, elements

GOOD = {"id": "good",
        "conversations": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}]}
posix = pytest.mark.skipif(os.name != "posix", reason="has no pipes or signals of this kind")


@contextmanager
def refused(match, kind=(ValueError, OSError)):
    """One line without control characters, within five seconds."""
    began = time.monotonic()
    with pytest.raises(kind, match=match) as error:
        yield
    assert plain(str(error.value)) == str(error.value) and time.monotonic() - began < 5


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of the tiny preset; copies are cheap, as files are linked."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    torch.manual_seed(0)
    SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder)
    return folder


def copied(saved, folder, **settings):
    """A copy of a checkpoint whose config.json has other settings."""
    folder.mkdir(parents=True)
    for path in saved.iterdir():
        if path.name != "config.json":
            os.link(path, folder / path.name)
    config = json.loads((saved / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))
    return folder


# ----------------------------------------------------------------------------- records and images


def with_text(text):
    turns = [{"from": "human", "value": text}, {"from": "gpt", "value": "x"}]
    return {**GOOD, "conversations": turns}


BAD_RECORDS = {
    "half a character": json.dumps(with_text("\ud800")),
    "nested too deeply": "[" * 5000 + "]" * 5000,
    "nested in a field": '{"id": 1, "x": ' + "[" * 5000 + '"]"' + "]" * 5000 + "}",
    "a long number": '{"id": ' + "1" * 5000 + "}",
    "a null byte": json.dumps({**with_text(IMAGE), "image": "a\0b.png"}),
    "links in a circle": json.dumps({**with_text(IMAGE), "image": "circle.png"}),
    "longer than the context": json.dumps(with_text("word " * 5000)),
    "a pipe": json.dumps({**with_text(IMAGE), "image": "pipe.png"}),
    "escapes": json.dumps({**with_text(IMAGE), "id": "a\n\x1b[31mred\u202e",
                           "image": "\x1b[2J\n.png"}),
}


@posix
@pytest.mark.parametrize("ending", [".json", ".jsonl"])
@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_costs_itself_only(model, tmp_path, name, ending):
    os.symlink(tmp_path / "circle.png", tmp_path / "circle.png")
    pipe(tmp_path / "pipe.png")
    path, texts = tmp_path / f"a{ending}", [json.dumps(GOOD), BAD_RECORDS[name], json.dumps(GOOD)]
    path.write_text("[" + ",\n".join(texts) + "]" if ending == ".json" else "\n".join(texts),
                    encoding="utf-8")
    began = time.monotonic()
    mixture = open_mixture([str(path)], 0)
    share = Steps(mixture, model.processor, "both", "chat", Recipe(3, 0.0), 1, tmp_path)[0]
    assert time.monotonic() - began < 5
    assert share.ids == ["good", "good"] and len(share.skipped) == 1
    assert plain(share.skipped[0]) == share.skipped[0] and len(share.skipped[0]) < 300
    assert "record" in share.skipped[0] or path.name in share.skipped[0]


def test_a_palette_icns_and_eps(tmp_path):
    """ICNS of a kind that Pillow's decoder has no error for; EPS would start another program."""
    with io.BytesIO() as file:
        Image.new("P", (16, 16)).save(file, "PNG")
        png = file.getvalue()
    icon = b"ic07" + (8 + len(png)).to_bytes(4, "big") + png
    (tmp_path / "a.icns").write_bytes(b"icns" + (8 + len(icon)).to_bytes(4, "big") + icon)
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"
                                     b"%%EndComments\n{} loop\n%%EOF\n")
    for name in ("a.icns", "a.eps"):
        with refused("unreadable image"):
            open_image(tmp_path / name)


@posix
def test_only_regular_files_are_opened(saved, tmp_path):
    with refused("pipe.png: unreadable image .*not a regular file"):
        open_image(pipe(tmp_path / "pipe.png"))
    with refused("pipe.jsonl: cannot be read .not a regular file"):
        RecordFile(pipe(tmp_path / "pipe.jsonl"))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        folder = copied(saved, tmp_path / f"with {name}")
        pipe(folder / name)
        with refused("neither a file nor a folder|no config.json"):
            SliME.from_pretrained(folder)


def test_two_lists_in_a_file_and_odd_encodings(tmp_path):
    path, text = tmp_path / "a.json", json.dumps([GOOD])
    path.write_text(text + text)
    with refused("a.json, line 1: broken JSON .something follows", RecordError):
        RecordFile(path)
    line = json.dumps(GOOD).encode()
    for content, number in ((b"\xef\xbb\xbf" + text.encode(), 1),
                            (b" " * (3 << 20) + text.encode(), 1),
                            (b"\xef\xbb\xbf" + line + b"\n" + line, 2)):
        path.write_bytes(content)
        assert list(RecordFile(path)) == [GOOD] * number
    for content in (text.encode("utf-16"), b"\x1f\x8b" + bytes(50)):
        path.write_bytes(content)
        with refused("a.json: does not begin as JSON in UTF-8 does", RecordError):
            RecordFile(path)
    path.write_text("[" + ",".join(["1" * 5000, "[" * 3000 + "]" * 3000, "2"]) + "]")
    assert [element.value for element in elements(path)] == [None, None, 2]


def archive():
    with io.BytesIO() as file:
        with zipfile.ZipFile(file, "w") as made:
            made.writestr(zipfile.ZipInfo("a.npy"), "")  # of 1980: a test has one name
        return file.getvalue()


@pytest.mark.parametrize(
    "damage", [b"", b"\x93NUMPY", archive(), "half", "other kind", "offsets"], ids=str)
def test_a_damaged_index_is_made_anew(tmp_path, monkeypatch, damage):
    monkeypatch.setattr("sliming.data.SMALL", 0)
    path, index = tmp_path / "a.jsonl", tmp_path / "a.jsonl.index.npy"
    path.write_text(2 * (json.dumps(GOOD) + "\n"))
    whole = (RecordFile(path), np.load(index))[1]
    if damage == "half":
        index.write_bytes(index.read_bytes()[:-8])
    elif isinstance(damage, bytes):
        index.write_bytes(damage)
    elif damage == "other kind":
        np.save(index, whole.astype(float))
    else:
        np.save(index, whole * [[1, 1], [1, -1], [1, 9]])
    assert list(RecordFile(path)) == [GOOD, GOOD]
    assert np.array_equal(np.load(index), whole)


def test_an_index_that_cannot_be_kept_stays_in_memory(tmp_path, monkeypatch):
    def full(file, array):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sliming.data.SMALL", 0)
    monkeypatch.setattr(data.np, "save", full)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text(json.dumps(GOOD))
    assert list(RecordFile(tmp_path / "a.jsonl")) == [GOOD]
    assert not list(tmp_path.rglob("*.npy"))


def test_markers_do_not_form_again():
    for text in ("<im<image>age>", "<ima<im<image>age>ge>", "<image><image>"):
        assert without_markers(text) == ""
    assert without_markers("a <image b> <im<image>ag") == "a <image b> <imag"
    began = time.monotonic()
    assert without_markers("<image" * 100_000 + ">" * 100_000) == ""
    assert time.monotonic() - began < 5


# ------------------------------------------------------------------------------------- answering


def test_answers_are_appended_to_whole_lines(model, tmp_path):
    """A file without a last line break, line separators of Unicode, half characters, a lock."""
    answers, questions = tmp_path / "answers.jsonl", tmp_path / "questions.jsonl"
    asked = [{"question_id": name, "text": text} for name, text in
             ((1, "Who?"), ("two\u2028", "Why\u2028?"), ("\ud800", "When?"))]
    questions.write_text("\n".join(map(json.dumps, asked)))
    answers.write_text(json.dumps({"question_id": 1, "prompt": "Who?", "text": "me"}))
    for _ in range(2):
        answer_file(model, questions, tmp_path, answers, 2, max_new_tokens=2)
    rows = [json.loads(line) for line in answers.read_bytes().split(b"\n")[:-1]]
    assert [row["question_id"] for row in rows] == [row["question_id"] for row in asked]
    with only_one(answers), refused(f"process {os.getpid()} is writing it"):
        other = ("import sys; from pathlib import Path; from sliming.guard import only_one; "
                 "only_one(Path(sys.argv[1])).__enter__()")
        done = subprocess.run([sys.executable, "-c", other, answers], cwd=ROOT,
                              capture_output=True, text=True)
        raise InputError(done.stderr.strip().splitlines()[-1])
    for wrong in ({"text": "?", "question_id": [1]}, {"text": "?", "question_id": 1, "image": 7},
                  {"text": "\ud800", "question_id": 9}):
        questions.write_text(json.dumps(wrong))
        answers.unlink(missing_ok=True)
        with refused("questions.jsonl, line 1: ", RecordError):
            answer_file(model, questions, tmp_path, answers, 2, max_new_tokens=2)


def test_the_context_is_not_exceeded_unnoticed(model):
    model.config.llm_config["max_position_embeddings"] = 40
    assert len(list(model.generate(model.processor.ask(None, "Who?"), max_new_tokens=5))) <= 5
    with refused("tokens and an answer of 100 exceed the language model's context of 40"):
        list(model.generate(model.processor.ask(None, "Who?"), max_new_tokens=100))
    talk = Conversation(model, [], max_new_tokens=5)
    with refused("exceed the language model's context of 40: begin a new conversation"):
        for _ in range(20):
            "".join(talk.ask("Who is it?"))
    sample = model.processor.ask(None, "Who?")
    (answer,) = model.generate_batch([sample], max_new_tokens=1000)
    assert len(answer) <= 40 - len(sample.text.ids) + 1
    with refused("record long: .* the limit is 40", RecordError):
        load_sample({**with_text("word " * 50), "id": "long"}, None, "chat", model.processor)


# ----------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("field, value", [
    ("gamma", "much"), ("gamma", float("nan")), ("num_queries", 1e9), ("num_queries", True),
    ("vision_layer", 3), ("router_score", "max"), ("slicing", None), ("expert", 2),
    ("separator_id", "x"), ("separator_id", 2**20), ("look_nearby", []), ("vision_config", 7),
    ("template", "<b>"), ("llm_config", {}), ("llm_config", {"model_type": "no\nsuch"}),
    ("vision_config", {"hidden_size": "wide"}), ("look_nearby", {"colour": 1})])
def test_settings_of_another_kind_name_the_file(saved, tmp_path, field, value):
    folder = copied(saved, tmp_path / "c", **{field: value})
    named = f".*{field}" if field in ("gamma", "slicing", "expert") else ""
    with refused(f"c/config.json: cannot be used{named}", files.CheckpointError):
        SliME.from_pretrained(folder)


@pytest.mark.parametrize("part, field, value", [
    ("llm", "vocab_size", 10**12), ("llm", "hidden_size", 10**9), ("llm", "vocab_size", -5),
    ("llm", "num_hidden_layers", 10**7), ("llm", "intermediate_size", 10**9),
    ("vision", "num_hidden_layers", 10**7), ("vision", "image_size", 10**6)])
def test_huge_settings_take_no_memory(saved, tmp_path, monkeypatch, part, field, value):
    """Ours, the released kind, the backbones to begin with: refused before anything is built."""
    monkeypatch.setattr(SliME, "__init__", lambda *_: pytest.fail("was built"))
    message = f"config.json: cannot be used .{field} .*{value}"
    config = json.loads((saved / "config.json").read_text())[f"{part}_config"]
    ours = copied(saved, tmp_path / "ours", **{f"{part}_config": {**config, field: value}})
    with refused(message, files.CheckpointError):
        SliME.from_pretrained(ours)
    backbone = tmp_path / "backbone"
    shutil.copytree(TINY / part, backbone)
    (backbone / "config.json").write_text(json.dumps({**config, field: value}))
    with refused(message, files.CheckpointError):
        preset = replace(PRESETS["tiny"].model, **{part: str(backbone)})
        SliME.from_backbones(preset)
    if part == "llm":
        kind = {"mm_projector_type": "gated", "mm_vision_tower": str(TINY / "vision"),
                "mm_vision_select_layer": -1, "mm_resampler_dim": 16, "mm_resampler_topp": 0.75}
        (ours / "config.json").write_text(json.dumps({**config, **kind, field: value}))
        with refused(message, files.CheckpointError):
            SliME.from_pretrained(ours)


def test_every_template_is_known_to_the_settings():
    for name in TEMPLATES:
        SliMEConfig(template=name).check()


@pytest.mark.parametrize("name, content", [
    ("tokenizer.json", "{"), ("tokenizer.json", '{"model": 7}'),
    ("tokenizer_config.json", '{"tokenizer_class": [1]}')])
def test_tokenizers_that_cannot_be_read_name_the_file(saved, tmp_path, name, content):
    folder = copied(saved, tmp_path / "c")
    (folder / name).unlink()
    (folder / name).write_text(content)
    with refused("c/tokenizer_config.json: cannot be used", files.CheckpointError):
        SliME.from_pretrained(folder)


def test_no_code_of_a_checkpoint_is_run(saved, tmp_path, monkeypatch):
    """Nor is it asked whether to: ours, the released kind, a language model to begin with."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    released.export(SliME.from_pretrained(saved), tmp_path / "released")
    bomb = f"open({str(tmp_path / 'ran')!r}, 'w')"
    for folder in (copied(saved, tmp_path / "ours"), tmp_path / "released"):
        (folder / "code.py").write_text(bomb)
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        (folder / "tokenizer_config.json").unlink()
        settings |= {"auto_map": {"AutoTokenizer": ["code.Tokenizer", "code.Tokenizer"]},
                     "tokenizer_class": "Own"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        try:
            SliME.from_pretrained(folder)
        except files.CheckpointError:
            pass
    words = tmp_path / "words"
    words.mkdir()
    (words / "code.py").write_text(bomb)
    (words / "config.json").write_text(json.dumps(
        {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}))
    with refused("words/config.json: cannot be used"):
        SliME.from_backbones(SliMEConfig(vision="tiny", llm=str(words), vision_layer=-1))
    assert not (tmp_path / "ran").exists()


def test_weights_that_are_there_twice(saved, tmp_path):
    """In two shards; as one file and as shards, of which a reader could take either."""
    folder, backbone = copied(saved, tmp_path / "c"), tmp_path / "llm"
    shutil.copytree(TINY / "llm", backbone)
    for place, name in ((folder, "model-2.safetensors"), (backbone, "old.safetensors")):
        os.link(place / "model.safetensors", place / name)
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / files.INDEX).write_text(json.dumps(index))
    with refused("c: .* is there twice", files.CheckpointError):
        SliME.from_pretrained(folder)
    (backbone / files.INDEX).write_text(json.dumps({"weight_map": {"a": "old.safetensors"}}))
    with refused("has model.safetensors and .*index.json, which names others",
                 files.CheckpointError):
        SliME.from_backbones(replace(PRESETS["tiny"].model, llm=str(backbone)))


def test_names_stay_inside(saved, tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    model = SliME.from_pretrained(copied(saved, tmp_path / "c", vision="../victim"))
    with refused("outside the folder"):
        released.export(model, tmp_path / "target")
    assert not list(victim.iterdir())
    folder = copied(saved, tmp_path / "index")
    (folder / "model.safetensors").rename(victim / "model.safetensors")
    index = {"weight_map": {"a": "../victim/model.safetensors"}}
    (folder / files.INDEX).write_text(json.dumps(index))
    with refused("is not the name of a file beside it", files.CheckpointError):
        SliME.from_pretrained(folder)


def test_numbers_that_are_not_finite_are_neither_saved_nor_read(saved, tmp_path):
    model = SliME.from_pretrained(saved)
    with torch.no_grad():
        model.adapter.w_gate[0, 0] = float("inf")
    with refused("adapter.w_gate holds numbers that are not finite", FloatingPointError):
        model.save_pretrained(tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())
    optimizer = torch.optim.AdamW([model.adapter.w_gate])
    states = States(tmp_path / "states", model, optimizer, {}, keep=2)
    states.save(1, 0)
    with refused("cannot save the state .adapter.w_gate/weight holds numbers"):
        states.settle()
    folder = copied(saved, tmp_path / "d")
    tensors, name = load_file(folder / "model.safetensors"), "llm.model.norm.weight"
    norm = tensors[name]
    for wrong, message in ((norm / 0, "holds numbers that are not finite"),
                           (norm.to(torch.float8_e4m3fn), "is torch.float8_e4m3fn, which is not"),
                           (norm.int(), "is torch.int32, which"),
                           (norm.to(torch.complex64), "is torch.complex64, which")):
        (folder / "model.safetensors").unlink()
        save_file({**tensors, name: wrong}, folder / "model.safetensors")
        with refused(f"d: {name} {message}", files.CheckpointError):
            SliME.from_pretrained(folder)


@pytest.mark.parametrize("change, message", [
    ({"use_dora": True}, "use_dora is set"), ({"use_rslora": True}, "use_rslora is set"),
    ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is set"),
    ({"lora_alpha": None}, "lora_alpha is None, not a number"),
    ({"r": 4}, "has rank 2, adapter_config.json says 4"), ("lone B", "has unknown 1 tensors"),
    ("another base", "belong to another base model")])
def test_lora_folders_that_are_not_plain(saved, tmp_path, change, message):
    folder = copied(saved, tmp_path / "c")
    (folder / "lora").mkdir()
    width = 64 if change == "another base" else 128
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    tensors = {name.format("A"): torch.ones(2, width), name.format("B"): torch.ones(width, 2)}
    if change == "lone B":
        del tensors[name.format("A")]
    save_file(tensors, folder / "lora" / "adapter_model.safetensors")
    settings = {"r": 2, "lora_alpha": 4, **(change if isinstance(change, dict) else {})}
    (folder / "lora" / "adapter_config.json").write_text(json.dumps(settings))
    with refused(message, files.CheckpointError):
        SliME.from_pretrained(folder)


def test_weights_of_an_earlier_save_never_mix_with_new_ones(saved, tmp_path, monkeypatch):
    """More shards, fewer, one file: what a save replaces goes; a stray file is refused by name."""
    model = SliME.from_pretrained(saved)
    for number, size in enumerate((1_000_000, 2_000_000, 5_000_000_000, 1_000_000)):
        monkeypatch.setattr(files, "SHARD", size)
        with torch.no_grad():
            model.adapter.w_gate.fill_(number)
        model.save_pretrained(tmp_path / "c")
        found = SliME.from_pretrained(tmp_path / "c").tensors()
        assert all(torch.equal(tensor, found[name]) for name, tensor in model.tensors().items())
    assert len(list((tmp_path / "c").glob("*.safetensors"))) > 2
    os.link(saved / "model.safetensors", tmp_path / "c" / "zz.safetensors")
    with refused("zz.safetensors does not belong to the checkpoint", files.CheckpointError):
        SliME.from_pretrained(tmp_path / "c")


@pytest.mark.parametrize("how", ["--merge", "--export"])
def test_a_folder_that_holds_something_is_not_written(saved, tmp_path, monkeypatch, how):
    from sliming.checkpoints.__main__ import main
    (tmp_path / "mine").write_text("precious")
    monkeypatch.setattr(sys, "argv", ["checkpoints", how, str(saved), str(tmp_path)])
    with refused("sliming.checkpoints: .* holds something already: choose another folder",
                 SystemExit):
        main()
    assert os.listdir(tmp_path) == ["mine"]


@posix
@pytest.mark.parametrize("how", ["model.save_pretrained({})", "released.export(model, Path({}))"])
def test_a_full_disk_names_the_file(saved, tmp_path, how):
    script = tmp_path / "script.py"
    script.write_text("import sys, signal\n"
                      "from pathlib import Path; from sliming.checkpoints import released\n"
                      "from sliming.model import SliME; from sliming.guard import one_line\n"
                      "def main():\n"
                      "    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
                      "    model = SliME.from_pretrained(sys.argv[1])\n"
                      "    with one_line('save'): " + how.format("sys.argv[2]"))
    done = run_train([saved, tmp_path / "c"], program=script, limit=1 << 20)
    assert done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr and "save: [Errno" in done.stderr
    if how.startswith("model"):
        assert not list((tmp_path / "c").iterdir())


# ------------------------------------------------------------------------------- states and runs


def states_of(folder, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(8, 8)
    return States(folder, model, torch.optim.AdamW(model.parameters()), {"seed": 1}, keep=3)


@pytest.mark.parametrize("what", ["weights", "progress", "missing", "empty"])
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path, capsys, what):
    states = states_of(tmp_path)
    for step in (1, 2):
        states.save(step, 0)
        states.settle()
    name = "progress.json" if what == "progress" else "rank-00000.safetensors"
    path = tmp_path / "step-00000002" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 4  # one bit
    path.write_bytes(b"" if what == "empty" else content)
    if what == "missing":
        path.unlink()
    assert states_of(tmp_path, 1).restore() == (1, 0)
    assert "step-00000002 is passed over: " in capsys.readouterr().out
    (tmp_path / "step-00000001" / "progress.json").write_text("{}")
    with refused("no state in it can be read; --resume never begins anew", files.CheckpointError):
        states_of(tmp_path).restore()


def test_a_state_is_tensors_and_json(tmp_path):
    """What an earlier version wrote, and would have unpickled, is not opened."""
    states = states_of(tmp_path)
    states.save(1, 0)
    states.settle()
    state = tmp_path / "step-00000001"
    assert sorted(os.listdir(state)) == ["progress.json", "rank-00000.safetensors"]
    assert set(load_file(state / "rank-00000.safetensors")) == {
        f"{name}/{what}" for name in ("weight", "bias")
        for what in ("weight", "step", "exp_avg", "exp_avg_sq")}
    ran = tmp_path / "ran"
    (state / ".metadata").write_bytes(b"cbuiltins\nopen\n(V%b\nVw\ntR." % str(ran).encode())
    progress = {"step": 1, "skipped": 0, "config": {"seed": 1}}
    (state / "progress.json").write_text(json.dumps(progress))
    assert look_at(state)[1] == "progress.json is damaged, or of another version"
    with refused("no state in it can be read"):
        states.restore()
    assert not ran.exists()


def test_what_a_killed_save_left_is_swept_at_the_next_start(tmp_path):
    for name in (".saving-abc", "resume/.writing-00000007"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_text("half")
    assert states_of(tmp_path / "resume").restore() == (0, 0)
    assert not list(tmp_path.rglob("model.safetensors"))


FLAGS = ["--max-steps", "4", "--batch-size", "2", "--save-every", "1", "--eval-questions", "0"]


def run(monkeypatch, capsys, folder, *flags, stopped=None):
    """train.py in this process: what it said; `stopped`: (stage, step) at which it is killed."""
    class Killed(BaseException):
        pass

    def save(self, step, skipped, save=States.save):
        save(self, step, skipped)
        if stopped == (self.folder.parent.name, step):
            self.settle()
            raise Killed

    monkeypatch.chdir(folder)
    with monkeypatch.context() as patch:
        patch.setattr(States, "save", save)
        patch.setattr(sys, "argv", ["train.py", *FLAGS, *flags])
        try:
            train.main()
        except Killed:
            return "killed"
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
    said = capsys.readouterr()
    return said.out + said.err


def test_never_discards_the_states_of_all_stages_at_once(tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, capsys, tmp_path, stopped=("stage2", 2)) == "killed"
    anew = ("--resume", "never")
    assert run(monkeypatch, capsys, tmp_path, *anew, stopped=("stage1", 2)) == "killed"
    said = run(monkeypatch, capsys, tmp_path, "--stage", "1")
    assert "out/stage1: goes on at step 2" in said
    assert not (tmp_path / "out/stage2/resume").exists()


def test_a_run_goes_on_with_what_it_began_with_only(saved, tmp_path, monkeypatch, capsys):
    """Other weights under the same name, another data file: refused, and what changed is said."""
    copied(saved, tmp_path / "a")
    data_file = tmp_path / "d.jsonl"
    data_file.write_text(4 * (json.dumps(GOOD) + "\n"))
    flags = ("--stage", "3", "--init-from", "a", "--data", "d.jsonl")
    assert run(monkeypatch, capsys, tmp_path, *flags, stopped=("stage3", 2)) == "killed"
    data_file.write_text(4 * (json.dumps({**GOOD, "id": "fool"}) + "\n"))
    said = run(monkeypatch, capsys, tmp_path, *flags).splitlines()[-1]
    assert "is of a run with other flags or files (d.jsonl '" in said
    assert "first weights" not in said
    anew = (*flags, "--resume", "never")
    assert run(monkeypatch, capsys, tmp_path, *anew, stopped=("stage3", 2)) == "killed"
    (tmp_path / "a").rename(tmp_path / "b")
    moved = (*flags[:3], "b", *flags[4:])  # the same, elsewhere
    assert run(monkeypatch, capsys, tmp_path, *moved, stopped=("stage3", 3)) == "killed"
    copied(saved, tmp_path / "c", gamma=0.5)
    said = run(monkeypatch, capsys, tmp_path, *flags[:3], "c", *flags[4:])
    assert "other flags or files (first weights '" in said


def test_a_second_run_in_the_folder_is_refused(tmp_path, monkeypatch, capsys):
    """With the number of the first; the lock of one that was killed is void."""
    (tmp_path / "out").mkdir()
    code = ("from pathlib import Path; from sliming.guard import only_one\n"
            "with only_one(Path('out')): print(1, flush=True); input()")
    other = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=ENVIRONMENT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert other.stdout.readline() == b"1\n"
        said = run(monkeypatch, capsys, tmp_path, "--stage", "1")
        assert f"train.py: out: process {other.pid} is writing it" in said and said.count("\n") == 1
    finally:
        other.kill()
        other.wait()
    assert "train.py:" not in run(monkeypatch, capsys, tmp_path, "--stage", "1", "--max-steps", "1")


@posix
@pytest.mark.parametrize("number, workers",
                         [(signal.SIGTERM, 0), (signal.SIGTERM, 2), (signal.SIGINT, 2)])
def test_a_signal_ends_with_a_state_and_what_to_type(tmp_path, number, workers):
    command = [sys.executable, str(ROOT / "train.py"), "--stage", "1", "--max-steps", "300",
               "--batch-size", "2", "--resume", "never", "--eval-questions", "0",
               "--workers", str(workers)]
    process = subprocess.Popen(command, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, start_new_session=True)
    rows = tmp_path / "out/stage1/metrics.jsonl"
    until(lambda: rows.exists() and rows.stat().st_size)
    os.killpg(process.pid, number)  # as a terminal does, to the workers too
    _, error = process.communicate(timeout=60)
    (line,) = [line for line in error.replace("\r", "\n").split("\n") if line
               and "step/s" not in line and "s/step" not in line and "?" not in line]
    assert process.returncode == 130 and line.startswith("train.py: stage 1 stopped with step ")
    assert line.endswith("train.py --stage 1 --max-steps 300 --batch-size 2 --eval-questions 0 "
                         f"--workers {workers}")
    assert len(list(Path(tmp_path / "out/stage1/resume").glob("step-*"))) == 1


def work_until_told(ready) -> None:
    deaf()
    ready.set()
    time.sleep(60)


@posix
def test_a_worker_that_its_program_ends_has_not_failed():
    """Any other exit code, and torch shows a traceback if another worker is still there."""
    fork = multiprocessing.get_context("fork")  # as the workers are: with no thread but this one
    ready = fork.Event()
    worker = fork.Process(target=work_until_told, args=(ready,), daemon=True)
    worker.start()
    ready.wait(60)
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0


def test_a_lost_rank_and_full_memory_get_one_line():
    """What torch raises there is RuntimeError; any other is this package's fault, shown whole."""
    lost = "[gloo/pair.cc:537] Read error [127.0.0.1]:1: Connection reset by peer"
    for error, message in ((RuntimeError(lost), "another rank"),
                           (torch.OutOfMemoryError("CUDA out of memory. Tried"),
                            "CUDA out of memory: lower the batch")):
        with refused(f"x: .*{message}", SystemExit), one_line("x"):
            raise error
    with pytest.raises(RuntimeError, match="ours"), one_line("x"):
        raise RuntimeError("ours")


@posix
def test_a_killed_rank_and_an_error_of_all_cost_a_few_lines(tmp_path):
    """Under torchrun, which finds what pyproject.toml says that it may load of this package."""
    (tmp_path / "sliming-0.dist-info").mkdir()
    project = (ROOT / "pyproject.toml").read_text()
    entry = re.search(r'^sliming = "(sliming.guard:.*)"', project, re.MULTILINE)[1]
    (tmp_path / "sliming-0.dist-info/METADATA").write_text("Name: sliming\nVersion: 0\n")
    (tmp_path / "sliming-0.dist-info/entry_points.txt").write_text(
        f"[torchrun.handlers]\nsliming = {entry}\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               str(ROOT / "train.py"), "--stage", "1", *FLAGS]

    def run(*flags):
        return subprocess.Popen([*command, *flags], cwd=tmp_path, env=environment, text=True,
                                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    for flags, message in (("--save-every", "0"), "--save-every"), (("--init-from", "no"), "no: "):
        error = run(*flags).communicate(timeout=120)[1]
        assert error.count("\n") <= 2 and error.count("train.py: ") == 1 and message in error
    process = run("--max-steps", "1000")
    rows = tmp_path / "out/stage1/metrics.jsonl"
    until(lambda: rows.exists() and rows.stat().st_size)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    lines = [line for line in process.communicate(timeout=120)[1].replace("\r", "\n").split("\n")
             if line and "step" not in line]
    assert process.returncode == 1 and len(lines) <= 2
    assert f"exitcode: -9) local_rank: 1 (pid: {children[1]})" in lines[-1]


def hear_ctrl_c() -> None:
    """What runs in the background of a script, these tests perhaps, is deaf to it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@posix
def test_an_early_ctrl_c_ends_in_a_line(tmp_path):
    """While Python still loads modules, some of which turn it into errors of their own."""
    for name in ("train.py", "sample.py"):
        for wait in (0.08, 0.5, 1.2):
            error = early = "Fatal Python error: init_"
            while early in error:  # the interpreter itself has not begun yet: a busy machine
                process = subprocess.Popen([sys.executable, str(ROOT / name)], cwd=tmp_path,
                                           stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                                           text=True, preexec_fn=hear_ctrl_c)
                time.sleep(wait)
                process.send_signal(signal.SIGINT)
                error = process.communicate(timeout=60)[1]
                wait += 0.05
            assert error.count("\n") <= 1 and "Traceback" not in error, (name, wait, error)


def test_ctrl_c_amid_an_import_is_not_swallowed(tmp_path):
    (tmp_path / "hungry.py").write_text("import os, signal\n"
                                        "try: os.kill(os.getpid(), signal.SIGINT)\n"
                                        "except BaseException: pass\n")
    code = "from sliming.guard import one_line\nwith one_line('x'): import hungry; print('on')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"},
                          preexec_fn=hear_ctrl_c)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "x: stopped\n")


def test_the_readme_names_tests_that_exist():
    """In the tables of what is promised and what is not; a file's test stands behind its name."""
    text = (ROOT / "sliming/README.md").read_text().split("## Reliability")[1].split("\n## ")[0]
    written = {path.relative_to(ROOT / "tests").as_posix(): path.read_text()
               for path in (ROOT / "tests").rglob("test_*.py")}
    named = re.findall(r"`((?:\w+/)*test_\w+(?:\.py)?)`", text)
    assert len(named) > 15
    for name in named:
        assert name in written or f"def {name}(" in written["test_attacks.py"], name


def test_a_checkpoint_brings_its_backbones(tmp_path, monkeypatch, capsys):
    said = run(monkeypatch, capsys, tmp_path, "--stage", "2", "--init-from", "a", "--llm", "b")
    assert ("train.py: --init-from brings vision tower and language model: "
            "leave --vision and --llm away") in said


def test_strict_data_with_workers_gets_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "d.json").write_text(json.dumps([{**GOOD, "id": "r\n9", "image": "no.png"}]))
    said = run(monkeypatch, capsys, tmp_path, "--stage", "1", "--data", "d.json", "--strict-data",
               "--workers", "1")
    assert [line for line in said.splitlines() if "r\\n9" in line] == said.splitlines()[-1:]
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("train.py: record r\\n9: 0 <image> markers")
