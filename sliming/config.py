"""What each preset trains, and how: Table 7 of the paper, and what the released scripts add (yfzhang114/SliME, scripts/).

The paper gives batch sizes, learning rates, schedule, ZeRO stages and bfloat16; the scripts add activation checkpointing, the
rank of LoRA and the adapters' rate beside it. Where the two differ (the scripts train the adapters of Llama 3 with
5e-4 instead of 1e-3) the paper's value stands here. Every field of a recipe is also a flag of train.py.
"""

from dataclasses import dataclass

from sliming.model import SliMEConfig

# none: every rank holds everything. grads: as DeepSpeed's ZeRO-2. params: as ZeRO-3. offload: ZeRO-3, kept in the CPU's memory.
SHARDING = ("none", "grads", "params", "offload")


@dataclass(frozen=True)
class Recipe:
    """How one stage learns."""

    batch_size: int                 # records per step over all ranks: the global batch
    learning_rate: float            # peak, of adapter and compression
    llm_learning_rate: float = 0.0  # of the language model, or of its LoRA adapters
    steps: int | None = None        # None: one epoch
    warmup_ratio: float = 0.03      # of the steps, before the cosine
    shard: str = "none"             # one of SHARDING
    bf16: bool = False              # compute in bfloat16; what is trained keeps float32 master weights
    recompute: bool = False         # the language model's layers in the backward pass (activation checkpointing)
    lora: bool = False              # stage III trains adapters of rank 128, alpha 256, instead of the language model
    max_tokens: int | None = None   # of a sample, before routing; longer ones lose crops
    token_budget: int | None = None  # of a micro-batch on one device, before routing


@dataclass(frozen=True)
class Preset:
    """A model to begin with and the recipe of each stage."""

    model: SliMEConfig
    recipes: dict[int, Recipe]


def full_size(llm: str, template: str, llm_learning_rate: float, shard: tuple[str, str], lora: bool = False) -> Preset:
    """One column of Table 7. `shard`: of stages I and II, and of stage III."""
    context = 8192 if template == "llama3" else 4096  # of the language model; the released scripts cut at 2,048
    common = {"bf16": True, "recompute": True, "max_tokens": context, "token_budget": 16384}
    adapters = Recipe(256, 1e-3, shard=shard[0], **common)
    # With LoRA the released scripts keep 2e-5 for adapter and compression.
    last = Recipe(128, 2e-5 if lora else llm_learning_rate, llm_learning_rate, shard=shard[1], lora=lora, **common)
    return Preset(SliMEConfig(llm=llm, template=template), {1: adapters, 2: adapters, 3: last})


PRESETS = {
    "tiny": Preset(SliMEConfig(vision="tiny", llm="tiny", vision_layer=-1, num_queries=16),
                   {1: Recipe(16, 2e-3, steps=400), 2: Recipe(16, 2e-3, steps=350), 3: Recipe(16, 1e-3, 1e-3, steps=450)}),
    "vicuna-7b": full_size("lmsys/vicuna-7b-v1.5", "vicuna_v1", 2e-5, ("grads", "params")),
    "vicuna-13b": full_size("lmsys/vicuna-13b-v1.5", "vicuna_v1", 2e-5, ("grads", "params")),
    "llama3-8b": full_size("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", 1e-5, ("grads", "params")),
    "llama3-8b-lora": full_size("meta-llama/Meta-Llama-3-8B-Instruct", "llama3", 1e-4, ("grads", "params"), lora=True),
    "llama3-70b-lora": full_size("meta-llama/Meta-Llama-3-70B-Instruct", "llama3", 1e-4, ("params", "offload"), lora=True),
}
