"""Memory and arithmetic of each preset, estimated: on a GPU in training, and of its machine.

    weights      what is trained in float32, the rest in bfloat16; divided by the ranks when sharded
    gradients    float32 of what is trained, divided likewise; Adam's two moments the same twice
    gathered     what sharding puts together to run: with `grads` the whole model in bfloat16, with
                 `params` and `offload` the root (embeddings, adapter) and two layers
    activations  of a micro-batch of `token_budget` tokens: the input of every layer, and what one
                 layer makes between its input and its output, as layers are recomputed
    logits       of CHUNK supervised tokens, in bfloat16 and, with their gradient, float32

Left out: the allocator's waste, the kernels' workspace, CUDA's own 0.5 GB. The models are built
on the meta device from the shapes that their publishers state.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config

from sliming.backbones import VisionTower, build_llm, on_meta
from sliming.bench.timing import show
from sliming.chat import IMAGE_TOKEN, Encoded
from sliming.checkpoints.lora import ALPHA, RANK
from sliming.config import PRESETS, STAGES, Recipe, SliMEConfig
from sliming.inputs import Processor
from sliming.model import CHUNK, SliME

GB = 1e9
CLIP = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=23,
                        num_attention_heads=16, image_size=336, patch_size=14)


def llama(width: int, inner: int, layers: int, heads: int, groups: int, words: int) -> LlamaConfig:
    return LlamaConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=groups, vocab_size=words,
                       max_position_embeddings=8192, bos_token_id=0, eos_token_id=words - 1)


def qwen(width: int, inner: int, layers: int, heads: int) -> Qwen2Config:
    return Qwen2Config(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                       num_attention_heads=heads, num_key_value_heads=2, tie_word_embeddings=True,
                       eos_token_id=151_645)


LANGUAGE_MODELS = {
    "vicuna-7b": llama(4096, 11008, 32, 32, 32, 32_000),
    "vicuna-13b": llama(5120, 13824, 40, 40, 40, 32_000),
    "llama3-8b": llama(4096, 14336, 32, 32, 8, 128_256),
    "llama3-70b": llama(8192, 28672, 80, 64, 8, 128_256),
    "small": qwen(896, 4864, 24, 14),
    "small-1.5b": qwen(1536, 8960, 28, 12),
}
CROPS, WORDS = 6, 150  # of the record whose arithmetic is counted


def on_paper(preset: str, tokenizer=None, layers: int | None = None) -> SliME:
    """The preset's model without memory, tower and language model cut to `layers` if given."""
    llm, tower = LANGUAGE_MODELS[preset.removesuffix("-lora")].to_dict(), CLIP.to_dict()
    if layers is not None:
        llm["num_hidden_layers"] = tower["num_hidden_layers"] = layers
    config = SliMEConfig(vision_layer=-1, separator_id=0, slicing="official", global_view="squash",
                         vision_config=tower, llm_config=llm)
    with on_meta():
        model = SliME(config, VisionTower(CLIPVisionConfig.from_dict(tower)), build_llm(llm),
                      Processor(config, tokenizer))
    model.llm.tie_weights()  # again: the meta device has parted them
    return model


def numel(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def low_rank(llm: nn.Module) -> int:
    """Parameters of LoRA beside every linear layer but the output layer."""
    return sum(RANK * (linear.in_features + linear.out_features)
               for linear in llm.get_decoder().modules() if isinstance(linear, nn.Linear))


def estimate(model: SliME, recipe: Recipe, stage: int, ranks: int) -> dict[str, float]:
    """Bytes on one GPU, by the names of the module's docstring, and `host`, on one rank's share of
    the machine."""
    layers, width = model.llm.get_decoder().layers, model.llm.config.hidden_size
    every, trained = numel(model), 0
    for part in STAGES[stage].trained:
        module = getattr(model, part)
        trained += low_rank(module) if part == "llm" and recipe.lora else numel(module)
    if recipe.lora:
        every += low_rank(model.llm)
    float_bytes = 2 if recipe.bf16 else 4
    share = 1 if recipe.shard == "none" else ranks
    weights = (4 * trained + float_bytes * (every - trained)) / share
    states = {"weights": weights, "gradients": 4 * trained / share, "moments": 8 * trained / share}
    layer = numel(layers[0])
    root = every - numel(layers) - numel(model.vision)
    gathered = {"none": 0, "grads": every}.get(recipe.shard, root + 2 * layer)
    tokens = recipe.token_budget or 0
    inner = tokens * float_bytes * (8 * width + 4 * model.llm.config.intermediate_size)
    kept = tokens * float_bytes * width * len(layers) if recipe.recompute else inner * len(layers)
    words = model.llm.config.vocab_size
    on_host = recipe.shard == "offload"
    gpu = dict.fromkeys(states, 0.0) if on_host else states
    return {**gpu, "gathered": float_bytes * gathered, "activations": kept + inner,
            "logits": CHUNK * words * (float_bytes + 8),
            "host": sum(states.values()) if on_host else 0.0}


def flops(model: SliME, recipe: Recipe, stage: int) -> float:
    """Floating-point operations of a record of CROPS crops and WORDS words, recomputation included:
    those of `watch.step_flops`, every local token kept."""
    parts, p = STAGES[stage].parts, model.processor
    views = {"global": 1, "local": CROPS}.get(parts, 1 + CROPS)
    tokens = WORDS + p.token_count(Encoded([IMAGE_TOKEN], [], []), [(CROPS, 1)], parts)
    layers = numel(model.llm.get_decoder().layers)
    passes = 4 + 2 * ("llm" in STAGES[stage].trained and not recipe.lora) + 2 * recipe.recompute
    return 2 * numel(model.vision) * views * p.num_patches + passes * layers * tokens


def memory(device: torch.device, out: Path) -> None:
    """A row for each preset, stage and number of GPUs; the arithmetic of each preset."""
    rows, work = [], []
    for preset in PRESETS:
        if preset == "tiny":
            continue
        model, recipes = on_paper(preset), PRESETS[preset].recipes
        work.append([preset, *(f"{flops(model, recipes[stage], stage) / 1e12:.1f}"
                               for stage in STAGES)])
        for stage in (1, 3):  # II is as I
            recipe = recipes[stage]
            for ranks in (1,) if recipe.shard == "none" else (8, 16):
                parts = estimate(model, recipe, stage, ranks)
                host = parts.pop("host")
                rows.append([f"{preset}, {'III' if stage == 3 else 'I, II'}", ranks, recipe.shard,
                             *(f"{value / GB:.1f}" for value in parts.values()),
                             f"{sum(parts.values()) / GB:.0f}", f"{min(ranks, 8) * host / GB:.0f}"])
    show("GB, estimated", ["preset, stage", "GPUs", "sharding", "weights", "gradients", "moments",
                           "gathered", "activations", "logits", "one GPU", "a machine of 8"], rows)
    show(f"TFLOP of a record of {CROPS} crops and {WORDS} words, estimated",
         ["preset", "I", "II", "III"], work)
    print(f"LoRA: rank {RANK}, alpha {ALPHA}. Not measured on GPUs; see the README for what was "
          "checked on CPU ranks.")
