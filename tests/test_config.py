"""The paper's presets, on small backbones in local folders that stand for the hub's."""

import json
from dataclasses import replace

import pytest
import torch
from flows import LLAMA3_TOKENS, ROOT, losses, run_train
from transformers import AutoTokenizer, CLIPVisionConfig, CLIPVisionModel, LlamaConfig
from transformers.models.llama import LlamaForCausalLM

from sliming.backbones import TINY
from sliming.config import PRESETS, SHARDING
from sliming.model import SliME
from sliming.tiny.pictures import TrainingSet


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """clip/, llm/ (with Llama 3's special tokens), data.json with records of each kind."""
    folder = tmp_path_factory.mktemp("presets")
    torch.manual_seed(0)
    clip = CLIPVisionConfig(hidden_size=128, intermediate_size=128, num_hidden_layers=2,
                            num_attention_heads=2, image_size=84, patch_size=14)
    CLIPVisionModel(clip).save_pretrained(folder / "clip")
    tokenizer = AutoTokenizer.from_pretrained(TINY / "llm")
    tokenizer.add_special_tokens({"additional_special_tokens": LLAMA3_TOKENS})
    llama = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=8192,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)
    LlamaForCausalLM(llama).save_pretrained(folder / "llm")
    tokenizer.save_pretrained(folder / "llm")
    records = []
    for index in range(4):
        record = TrainingSet(3, seed=1)[index]
        record["image"].save(folder / f"{index}.png")
        records.append({**record, "image": f"{index}.png"})
    words = [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "me"}]
    records.append({"id": "words", "conversations": words})
    (folder / "data.json").write_text(json.dumps(records))
    return folder


@pytest.mark.parametrize("name, llm_rate", [
    ("vicuna-7b", 2e-5), ("vicuna-13b", 2e-5), ("llama3-8b", 1e-5), ("llama3-8b-lora", 1e-4),
    ("llama3-70b-lora", 1e-4)])
def test_table_7(name, llm_rate):
    """Batch sizes, rates and sharding as the paper prints them."""
    recipes = PRESETS[name].recipes
    assert [recipes[stage].batch_size for stage in (1, 2, 3)] == [256, 256, 128]
    assert recipes[1].learning_rate == recipes[2].learning_rate == 1e-3
    assert recipes[3].llm_learning_rate == llm_rate and recipes[3].lora == name.endswith("lora")
    expected = ("params", "offload") if "70b" in name else ("grads", "params")
    assert (recipes[1].shard, recipes[3].shard) == expected
    for recipe in recipes.values():
        assert recipe.warmup_ratio == 0.03 and recipe.bf16 and recipe.steps is None
        assert recipe.shard in SHARDING


def test_small_presets_fit_one_gpu_of_24_gb():
    """On paper; the whole of 1.5 billion weights would not."""
    from sliming.bench.memory import estimate, on_paper
    for name, most in (("small", 14e9), ("small-1.5b", 14e9)):
        model, preset = on_paper(name), PRESETS[name]
        assert preset.model.template == "tokenizer"
        for stage, recipe in preset.recipes.items():
            assert recipe.shard == "none" and recipe.bf16 and recipe.max_tokens == 2048
            assert sum(estimate(model, recipe, stage, 1).values()) < most
    assert sum(estimate(model, replace(recipe, lora=False), 3, 1).values()) > 24e9


def test_the_readme_commands_on_two_ranks(folder, tmp_path):
    """Every command of the README with a preset of the paper's size, on small files and backbones:
    sharded, in bfloat16, recomputed, more than one epoch; stage III in full and with LoRA."""
    texts = [path.read_text() for path in (ROOT / "sliming" / "README.md", ROOT / "README.md")]
    lines = [line.split() for line in dict.fromkeys("\n".join(texts).splitlines())
             if line.startswith("torchrun") and "--preset llama3" in line]
    assert {line[line.index("--stage") + 1] for line in lines} == {"1", "2", "3"}
    for name in ("pretrain.json", "describe.json", "instruct.json"):
        (tmp_path / name).write_text((folder / "data.json").read_text())
    records = json.loads((folder / "data.json").read_text())
    (tmp_path / "smr.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "images").symlink_to(folder)
    small = ["--vision", folder / "clip", "--llm", folder / "llm", "--batch_size", 4,
             "--max-steps", 2]
    commands = [[*line[line.index("train.py") + 1:], *small] for line in lines]
    done = run_train(*commands, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    for stage in (1, 2, 3):
        assert len(losses(out / f"stage{stage}")) == 2
        row = json.loads((out / f"stage{stage}" / "metrics.jsonl").read_text().splitlines()[-1])
        assert {"loss", "grad_norm", "lr", "tokens_per_second", "memory_gb", "data_wait",
                "skipped"} <= set(row)
    assert "(LoRA)" in done.stdout
    assert (out / "stage3" / "lora" / "adapter_model.safetensors").exists()
    model = SliME.from_pretrained(out / "stage3")
    assert model.config.template == "llama3" and model.config.num_queries == 144
    assert isinstance(model.answer(str(folder / "0.png"), "How many?", max_new_tokens=3), str)


def test_bfloat16_is_close_to_float32_on_one_process(folder, tmp_path):
    common = ["--stage", 1, "--preset", "vicuna-7b", "--vision", folder / "clip",
              "--llm", folder / "llm", "--data", folder / "data.json", "--images", folder,
              "--batch_size", 4, "--max-steps", 4, "--shard", "none", "--out"]
    done = run_train([*common, tmp_path / "half"], [*common, tmp_path / "full", "--no-bf16"])
    assert done.returncode == 0, done.stderr[-3000:]
    half, full = (torch.tensor(losses(tmp_path / name / "stage1")) for name in ("half", "full"))
    assert not torch.equal(half, full)
    torch.testing.assert_close(half, full, atol=0.05, rtol=0.02)  # bfloat16 rounds at 2^-9
