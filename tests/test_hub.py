"""What lies on the hub: parquet records, datasets by name, small instruct models; on small random
backbones of the real architectures."""

import io
import json
import os
import pickle
import shlex
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flows import ROOT, losses, run_train
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    CLIPVisionModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from sliming import hub
from sliming.backbones import TINY
from sliming.config import Recipe, TrainConfig
from sliming.data import Steps, check_record, load_sample, open_mixture
from sliming.hub import ParquetFile, choose, parts_of
from sliming.model import SliME
from sliming.records import RecordError
from sliming.tiny.pictures import TrainingSet
from sliming.trainer import train_stage

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
QWEN = ("{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\n"
        "You help.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def png(image):
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def write(path, rows, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def pictured(count, stage=3):
    """Records with pictures, in LLaVA's form."""
    return [TrainingSet(stage, seed=1)[index] for index in range(count)]


def embedded(records):
    return [{**record, "image": {"bytes": png(record["image"]), "path": "a.png"}}
            for record in records]


DOT = {"bytes": png(Image.new("RGB", (40, 30))), "path": None}
ASKED = [("What?", "that"), ("And?", "this")]
AS = {  # one conversation about two pictures, as it is written in each form
    "conversations": [{"from": "gpt" if i % 2 else "human", "value": value} for i, value in
                      enumerate(("<image>\n<image>\nWhat?", "that", "And?", "this"))],
    "texts": [{"user": user, "assistant": said, "source": "x"} for user, said in ASKED],
    "messages": [{"role": role, "content": text} for pair in ASKED
                 for role, text in zip(("user", "assistant"), pair, strict=True)]}
AS["parts"] = [{"role": turn["role"], "content": [{"type": "image", "text": None}] * 2 * (i == 0)
                + [{"type": "text", "text": turn["content"]}]}
               for i, turn in enumerate(AS["messages"])]


@pytest.mark.parametrize("form", AS)
def test_every_form_is_the_same_conversation(form, model, tmp_path):
    row = {"images": [DOT, DOT], form.replace("parts", "messages"): AS[form], "more": 1}
    write(tmp_path / "a.parquet", [row] * 3)
    mixture = open_mixture([str(tmp_path / "a.parquet")], seed=0)
    assert hub.FORMS[form.replace("parts", "messages")] in str(mixture) and len(mixture) == 3
    turns, images = check_record(mixture[0])
    assert turns == AS["conversations"] and len(images) == 2
    assert mixture.files[0][2]["id"] == "a.parquet:2"
    assert len(load_sample(mixture[0], tmp_path, "chat", model.processor).images) == 2
    # A file of JSON may have these forms, too, with paths.
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text(json.dumps([{**row, "images": ["a.png", "a.png"]}]))
    turns, images = check_record(open_mixture([str(tmp_path / "a.json")], seed=0)[0])
    assert turns == AS["conversations"] and images == ["a.png", "a.png"]


def rows(share):
    return [(ids.tolist(), noise.flatten().tolist()[:3], crops.sum().item())
            for batch in share.batches for ids, noise, crops in zip(
                batch.words.split(batch.lengths), batch.gate_noise,
                batch.crops.split([c * r for c, r in batch.grids]), strict=True)]


def test_order_pixels_and_noise_are_those_of_files(model, tmp_path):
    """A JSON file, a parquet file and a folder of two are the same to training, on any rank."""
    records = pictured(7)
    write(tmp_path / "one.parquet", embedded(records), row_group_size=2)
    for part in (0, 1):
        write(tmp_path / "two" / f"{part}.parquet", embedded(records[4 * part:][:4 - part]))
    for index, record in enumerate(records):
        record.pop("image").save(tmp_path / f"{index}.png")
        record["image"] = f"{index}.png"
    (tmp_path / "files.json").write_text(json.dumps(records))

    def shares(name, rank=0, world=1):
        work = Steps(open_mixture([str(tmp_path / name)], seed=3), model.processor, "both", "chat",
                     Recipe(4, 0.0), 3, tmp_path, rank=rank, world=world)
        return list(pickle.loads(pickle.dumps(work)))

    whole = [rows(share) for share in shares("files.json")]
    for name in ("one.parquet", "two"):
        assert [rows(share) for share in shares(name)] == whole
        ranks = [shares(name, rank, 2) for rank in (0, 1)]
        for step in range(3):
            assert sorted(rows(ranks[0][step]) + rows(ranks[1][step])) == sorted(whole[step])


def test_held_back_records_are_never_shown(tmp_path):
    records = [{**record, "id": str(index)} for index, record in enumerate(embedded(pictured(7)))]
    write(tmp_path / "a.parquet", records)
    both = open_mixture([f"{tmp_path / 'a.parquet'}:0.6"] * 2, 0, hold_back=2)
    assert [record["id"] for record in both.held] == ["5", "6"] and len(both) == 3 + 4
    first = [file is both.files[0] for file, _ in map(both.where, range(70))]
    seen = [both[place]["id"] for place in range(70)]
    assert {name for name, of_it in zip(seen, first, strict=True) if of_it} == set("01234")
    assert {name for name, of_it in zip(seen, first, strict=True) if not of_it} == set("0123456")


def test_a_file_is_laid_out_once_and_again_when_it_changes(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", embedded(pictured(3)))
    before = ParquetFile(path)[1]["conversations"]
    with monkeypatch.context() as patch:
        patch.setattr(hub, "rows_of", None)  # would fail if it were called
        work = pickle.loads(pickle.dumps(ParquetFile(path)))
        assert work[1]["conversations"] == before and len(pickle.dumps(work)) < 1000
    write(path, embedded(pictured(5)))
    assert len(ParquetFile(path)) == 5
    places = ParquetFile(path).places
    places.write_bytes(places.read_bytes()[:-8])  # a damaged index is made anew
    assert len(ParquetFile(path)) == 5 and ParquetFile(path)[1]["conversations"] == before
    sizes = [ParquetFile(path).size(index) for index in range(5)]
    assert all(50 < size < 2000 for size in sizes)  # of the words alone


def test_broken_pictures_cost_their_record_only(model, tmp_path):
    good = embedded(pictured(4))
    good[1]["image"] = {"bytes": good[1]["image"]["bytes"][:60], "path": None}
    good[2]["image"] = {"bytes": None, "path": "../outside.png"}
    write(tmp_path / "a.parquet", good)
    share = Steps(open_mixture([str(tmp_path / "a.parquet")], 0), model.processor, "both", "chat",
                  Recipe(4, 0.0), 1, tmp_path)[0]
    assert len(share.ids) == 2 and len(share.skipped) == 2
    said = "\n".join(sorted(share.skipped))
    assert f"record {good[1]['id']}: image 1: unreadable image" in said
    assert f"record {good[2]['id']}: ../outside.png lies outside" in said


@pytest.mark.parametrize("make, message", [
    (lambda path: write(path, [{"x": 1, "y": 2}]),
     "its columns are x, y; a record needs conversations, messages, texts"),
    (lambda path: write(path, embedded(pictured(2))) and path.write_bytes(path.read_bytes()[:-99]),
     "cannot be read as parquet .*; download it again"),
    (lambda path: write(path, embedded(pictured(2))[:0]), "its columns are"),
    (lambda path: path.mkdir(), "no .parquet file in this folder"),
    (lambda path: os.mkfifo(path), "cannot be read .not a regular file"),
    (lambda path: None, "cannot be read"),
])
def test_bad_files_get_one_line(make, message, tmp_path):
    make(tmp_path / "a.parquet")
    with pytest.raises(RecordError, match=f"a.parquet: {message}") as error:
        open_mixture([str(tmp_path / "a.parquet")], seed=0)
    assert "\n" not in str(error.value)


def test_without_pyarrow_it_says_what_to_type(tmp_path, monkeypatch):
    path = write(tmp_path / "a.parquet", embedded(pictured(1)))
    monkeypatch.setitem(os.sys.modules, "pyarrow", None)
    with pytest.raises(RecordError, match=r"needs pyarrow: pip install pyarrow.*\[hub\]"):
        ParquetFile(path)


def dataset(names, configs=None):
    siblings = [SimpleNamespace(rfilename=name) for name in names]
    return SimpleNamespace(siblings=siblings, card_data=configs and {"configs": configs}, sha="c0")


def test_datasets_by_name(tmp_path, monkeypatch):
    """With a folder that stands for the hub: as the card says, else by the files' names."""
    for name in ("ai2d(a,b)/train-00000-of-00002", "ai2d(a,b)/train-00001-of-00002",
                 "docvqa/test-00000-of-00001"):
        write(tmp_path / "o" / "n" / f"{name}.parquet", embedded(pictured(2)))
    names = [str(path.relative_to(tmp_path / "o" / "n"))
             for path in (tmp_path / "o" / "n").rglob("*.parquet")]
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda self, name: dataset(names))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, repo_type, revision:
                        str(tmp_path / name / file))
    assert len(open_mixture(["hub:o/n:ai2d(a,b)"], 0)) == 4
    assert len(open_mixture(["hub:o/n:docvqa:test:2"], 0)) == 4  # with a weight
    for asked in ("hub:o/n:nothing", "hub:o/n:ai2d(a,b):test", "hub:o/n"):
        with pytest.raises(RecordError, match="owner/name:subset:split; there is .*docvqa:test"):
            open_mixture([asked], 0)
    card = [{"config_name": "q", "data_files": [{"split": "train", "path": "data/train-*"},
                                                {"split": "test", "path": ["b/*"]}]}]
    found = parts_of(dataset(["data/train-0.parquet", "b/0.parquet", "b/README.md"], card))
    assert found == {("q", "train"): ["data/train-0.parquet"], ("q", "test"): ["b/0.parquet"]}
    assert choose("hub:o/n", [], list(found)) == ("q", "train")
    assert list(parts_of(dataset(["data/train-0.parquet", "data/test-0.parquet"]))) == [
        ("default", "test"), ("default", "train")]
    assert list(parts_of(dataset(["a/train/0000.parquet"]))) == [("a", "train")]

    def absent(self, name):
        raise OSError("401: no such repository\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", absent)
    with pytest.raises(RecordError, match="hub:o/n: not to be had from the hub .401.*hf auth") as e:
        open_mixture(["hub:o/n"], 0)
    assert "\n" not in str(e.value)


def test_a_checkpoint_goes_to_the_hub_and_comes_back(model, tmp_path, monkeypatch):
    """With a local folder in the hub's place, revisions included."""
    there = tmp_path / "hub"

    def upload(self, repo_id, folder_path, revision, **_):
        shutil.copytree(folder_path, there / repo_id / (revision or "main"), dirs_exist_ok=True)
        return "url"

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo",
                        lambda self, repo_id, **_: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr("sliming.checkpoints.files.snapshot_download", lambda name, revision=None,
                        **_: str(there / name / (revision or "main")))
    start = tmp_path / "stage3"
    model.save_pretrained(start)
    (start / "README.md").unlink()
    (start / "train_config.json").write_text(json.dumps({"data": ["hub:o/n:ai2d"], "stage": "3"}))
    (start / "eval.json").write_text(json.dumps({"detail": {"accuracy": 0.944, "n": 512}}))
    ours = SliME.from_pretrained(start)
    ours.push_to_hub("me/slime", branch="v1", model_card_kwargs={"license": "mit"})
    again = SliME.from_pretrained("me/slime", revision="v1")
    for name, tensor in again.tensors().items():
        assert torch.equal(tensor, ours.tensors()[name])
    card = (there / "me/slime/v1/README.md").read_text()
    for said in ('license: "mit"', "* hub:o/n:ai2d", "| detail | 94.4 % of 512 |",
                 'SliME.from_pretrained("me/slime")', "| num_queries | 16 |"):
        assert said in card
    with pytest.raises(FileNotFoundError, match="no config.json|no such"):
        SliME.from_pretrained("me/slime", revision="v2")
    with pytest.raises(ValueError, match="takes data, evaluation, license, not licence"):
        ours.push_to_hub("me/slime", model_card_kwargs={"licence": "mit"})


# ----------------------------------------------------------------------------------- the first hour


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """clip/, qwen/ and the data that the README's commands name."""
    work = tmp_path_factory.mktemp("hour")
    torch.manual_seed(0)
    CLIPVisionModel(CLIPVisionConfig(
        hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        image_size=84, patch_size=14)).save_pretrained(work / "clip")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.chat_template = None, "<|im_end|>", QWEN
    tokenizer.save_pretrained(work / "qwen")
    qwen = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id))
    qwen.save_pretrained(work / "qwen")
    (work / "captions" / "images").mkdir(parents=True)
    captions = pictured(5, 1)
    for record in captions:
        record["image"].save(work / "captions" / "images" / f"{record['id']}.png")
        record["image"] = f"{record['id']}.png"
    (work / "captions" / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(captions))
    for name, stage in (("shards", 1), ("descriptions", 2), ("instructions", 3)):
        for part in (0, 1):
            write(work / name / f"train-{part}.parquet", embedded(pictured(5, stage)))
    texts = [{"texts": [{"user": "Who?", "assistant": "me"}], "images": None}] * 3
    write(work / "instructions" / "words.parquet", texts)
    pictured(1)[0]["image"].save(work / "photo.png")
    return work


def small(work, *more):
    return ["--vision", work / "clip", "--llm", work / "qwen", "--batch_size", 4, "--no-bf16",
            "--workers", 0, *more]


def test_the_first_hour_word_for_word(work):
    """The README's commands with the preset small, and the answer of what they have trained."""
    text = (ROOT / "sliming" / "README.md").read_text()
    commands = [shlex.split(line)[2:] for line in text.splitlines()
                if line.startswith("python train.py") and "--preset small" in line]
    assert [command[command.index("--stage") + 1] for command in commands] == ["1", "2", "3"]
    commands = [[*command, *small(work, "--max-steps", 2)] for command in commands]
    done = run_train(*commands, cwd=work)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "instructions (13 records: LLaVA's conversations)" in done.stdout
    assert len(losses(work / "out" / "stage3")) == 2
    model = SliME.from_pretrained(work / "out" / "stage3")
    assert model.config.template == "tokenizer" and model.llm.config.model_type == "qwen2"
    assert model.processor.tokenizer.chat_template == QWEN
    prompt = model.processor.ask(str(work / "photo.png"), "How many?")
    said = model.processor.tokenizer.decode([t for t in prompt.text.ids if t >= 0])
    assert said.startswith("<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n")
    assert said.endswith("How many?<|im_end|>\n<|im_start|>assistant\n")
    assert isinstance(model.answer(str(work / "photo.png"), "How many?", max_new_tokens=3), str)


def test_a_model_without_a_chat_template_is_refused_before_stage_1(work, tmp_path):
    """Which itself would need none."""
    shutil.copytree(work / "qwen", tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    config = TrainConfig(stage="1", preset="small", vision=str(work / "clip"), bf16=False,
                         llm=str(tmp_path / "base"), out=str(tmp_path), max_steps=1, batch_size=2,
                         data=[str(work / "shards")])
    with pytest.raises(ValueError, match="no chat template: use an instruction-tuned"):
        train_stage(config, 1, torch.device("cpu"))


def test_one_rank_two_ranks_killed_and_resumed_are_equal(work, tmp_path):
    """Stage I on a mixture of parquet and JSON with weights."""
    turns = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "it is me"}]
    (tmp_path / "more.json").write_text(json.dumps([{"id": str(i), "conversations": turns}
                                                    for i in range(4)]))
    command = ["--stage", 1, "--preset", "small", *small(work, "--max-steps", 6, "--save-every", 2),
               "--sample-every", 3, "--data", *sorted((work / "shards").glob("*.parquet")),
               f"{tmp_path / 'more.json'}:0.5"]
    one = run_train([*command, "--out", tmp_path / "one"], [*command, "--out", tmp_path / "down"],
                    SLIMING_TEST_STOP="4")
    assert one.returncode == 0, one.stderr[-2000:]
    assert len(losses(tmp_path / "down" / "stage1")) == 4
    again = run_train([*command, "--out", tmp_path / "down"])
    assert again.returncode == 0 and "goes on at step 4" in again.stdout, again.stderr[-2000:]
    two = run_train([*command, "--out", tmp_path / "two"], ranks=2)
    assert two.returncode == 0, two.stderr[-2000:]
    whole = losses(tmp_path / "one" / "stage1")
    assert losses(tmp_path / "down" / "stage1") == whole and len(whole) == 6
    assert "step 6: '' is answered" in one.stdout
    assert (tmp_path / "two" / "stage1" / "samples-000006.png").exists()
    np.testing.assert_allclose(losses(tmp_path / "two" / "stage1"), whole, atol=1e-5)
