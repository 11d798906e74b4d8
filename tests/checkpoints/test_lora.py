"""LoRA: trained beside frozen weights, saved in peft's format, merged when it is read."""

import json

import pytest
import torch

from sliming.checkpoints.__main__ import main
from sliming.checkpoints.files import write_lora
from sliming.checkpoints.lora import ALPHA, RANK, add_lora, without_lora
from sliming.config import TrainConfig
from sliming.model import SliME
from sliming.trainer import train_stage

peft = pytest.importorskip("peft", reason="LoRA needs peft: pip install sliming[lora]")
CPU = torch.device("cpu")


def config(out, start):
    return TrainConfig(stage="3", out=str(out), init_from=str(start), max_steps=3, batch_size=2,
                       lora=True)


@pytest.fixture
def start(model, tmp_path):
    model.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


def test_only_adapters_of_the_language_model_change(model, start, tmp_path):
    """What comes back is merged: every linear layer moved, embeddings and norms did not."""
    train_stage(config(tmp_path, start), 3, CPU)
    after = SliME.from_pretrained(tmp_path / "stage3")
    assert not [name for name in after.tensors() if "lora" in name]
    before = dict(model.llm.named_parameters())
    moved = {name.split(".")[-2] for name, new in after.llm.named_parameters()
             if not torch.equal(new, before[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not torch.equal(after.compression.query, model.compression.query)
    record = json.loads((tmp_path / "stage3" / "lora" / "adapter_config.json").read_text())
    assert record["r"] == RANK == 128 and record["lora_alpha"] == ALPHA == 256


def test_peft_reads_the_adapters_and_gets_the_merged_model(model, start, tmp_path):
    train_stage(config(tmp_path, start), 3, CPU)
    merged = SliME.from_pretrained(tmp_path / "stage3")
    wrapped = peft.PeftModel.from_pretrained(model.llm, tmp_path / "stage3" / "lora")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        expected = merged.llm(ids).logits
        torch.testing.assert_close(wrapped(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_merging_by_hand_and_by_command(model, start, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    before = {name: tensor.clone() for name, tensor in model.tensors().items()}
    add_lora(model.llm)
    for name, parameter in model.llm.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    with_adapters = model.tensors()
    without = without_lora(with_adapters)
    assert set(without) == set(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in without.items())
    folder = start / "lora"
    write_lora(folder, model.llm, with_adapters, "somewhere/base")
    ids = torch.arange(3, 40)[None]
    expected = model.llm(ids).logits
    again = SliME.from_pretrained(start)
    torch.testing.assert_close(again.llm(ids).logits, expected, atol=1e-4, rtol=1e-4)
    merged = tmp_path / "merged"
    monkeypatch.setattr("sys.argv", ["checkpoints", "--merge", str(start), str(merged)])
    main()
    assert not (merged / "lora").exists()
    plain = SliME.from_pretrained(merged).tensors()
    assert all(torch.equal(plain[name], tensor) for name, tensor in again.tensors().items())


def test_without_peft_one_line(start, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ValueError, match="LoRA needs the package peft: pip install"):
        train_stage(config(tmp_path, start), 3, CPU)
