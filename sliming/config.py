"""Every setting: what a model is, what a stage trains, how it learns, the flags of train.py.

Nothing here needs torch, so that a wrong flag is named at once.
"""

import argparse
import math
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import NoReturn

from sliming.guard import first_to_say, plain

# ---------------------------------------------------------------------------------------- the model


@dataclass
class SliMEConfig:
    """Everything that a checkpoint needs to be built again. Defaults are the paper's.

    Where the released code departs from the paper a field chooses; checkpoints/released sets it.
    """

    # Where the backbones came from: "tiny", a folder or a hub id.
    vision: str = "openai/clip-vit-large-patch14-336"
    llm: str = "lmsys/vicuna-7b-v1.5"
    vision_layer: int = -2           # hidden state of the tower that is used
    num_queries: int = 144           # Nq: tokens left of each crop (Table 3)
    gamma: float = 0.75              # share of the relevance that is kept (Sec. 2.2, Table 3)
    router_noise: float = 0.1        # std of the noise on the router's scores in training
    router_score: str = "mean"       # or "sum": over the question's similarities to an image token
    router_temperature: float = 1.0
    router_text: str = "question"    # or "all" words: template and, in training, answer included
    gate_noise: str = "w_noise"      # or "w_gate": what the size of the gates' noise is learned by
    gate_epsilon: float = 0.0        # added to the gates' sum, which they are divided by
    expert: int | None = None        # 0: MLP alone, 1: query former alone; None: both, gated
    look_nearby: dict | None = None  # gains of QueryFormer.look_nearby; None: the paper
    slicing: str = "paper"           # rule of slicer.choose_grid
    global_view: str = "pad"         # or "squash"
    resize: str = "pillow"           # or "torch": who resizes; see slicer.resizer
    max_side: int = 6                # crops along a side, at most
    max_crops: int | None = None     # crops of an image, at most
    separator: str = ","             # its embedding stands between global view and local tokens
    separator_id: int | None = None  # that token, where it is known as a number only
    template: str = "chat"           # of chat.TEMPLATES, for answering; "tokenizer": its own
    vision_config: dict = field(default_factory=dict)  # of the backbones, as transformers has them
    llm_config: dict = field(default_factory=dict)

    def check(self) -> None:
        """ValueError, which names the field, for a setting of another kind or out of its range."""
        for name, kinds, low, high in (
                ("vision_layer", int, -1000, -1), ("num_queries", int, 1, 10_000),
                ("gamma", float, 1e-6, 1), ("router_noise", float, 0, 100),
                ("router_temperature", float, 1e-6, 1e6), ("gate_epsilon", float, 0, 1),
                ("expert", None, 0, 1), ("max_side", int, 1, 100), ("max_crops", None, 1, 10_000),
                ("separator_id", None, 0, 2**31)):
            value = getattr(self, name)
            right = isinstance(value, (int, float) if kinds is float else int) and (
                low <= value <= high) and not isinstance(value, bool)
            if not right and not (kinds is None and value is None):
                raise ValueError(f"{name} must be {'a' if kinds is float else 'a whole'} number of "
                                 f"{low} to {high}, not {value!r}")
        for name, known in (
                ("router_score", ("mean", "sum")), ("router_text", ("question", "all")),
                ("gate_noise", ("w_noise", "w_gate")), ("slicing", ("paper", "official")),
                ("global_view", ("pad", "squash")), ("resize", ("pillow", "torch")),
                ("template", ("plain", "chat", "vicuna_v1", "llama3", "tokenizer"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be {' or '.join(known)}, not "
                                 f"{getattr(self, name)!r}")
        for name, kind in (("vision", str), ("llm", str), ("separator", str),
                           ("vision_config", dict), ("llm_config", dict),
                           ("look_nearby", dict | None)):
            if not isinstance(getattr(self, name), kind):
                raise ValueError(f"{name} must not be {type(getattr(self, name)).__name__}")


# --------------------------------------------------------------------------------------- the stages


@dataclass(frozen=True)
class Stage:
    """What a stage shows and trains (Sec. 2.2, "Alternating Training Scheme")."""

    parts: str                # "global", "local" or "both": argument of SliME.forward
    template: str | None      # of chat.TEMPLATES; None for the model's own
    trained: tuple[str, ...]  # submodules of SliME


STAGES = {
    1: Stage("global", "plain", ("adapter",)),                      # captions
    2: Stage("local", None, ("compression",)),                      # detailed descriptions
    3: Stage("both", None, ("adapter", "compression", "llm")),      # questions and answers
}

# What the ranks divide among them. none: everything is everywhere. grads: as DeepSpeed's ZeRO-2.
# params: as ZeRO-3. offload: ZeRO-3, kept in the CPU's memory.
SHARDING = ("none", "grads", "params", "offload")


@dataclass(frozen=True)
class Recipe:
    """How one stage learns. Every field is also a flag of train.py."""

    batch_size: int                  # records per step over all ranks: the global batch
    learning_rate: float             # peak, of adapter and compression
    llm_learning_rate: float = 0.0   # peak, of the language model or of its LoRA adapters
    steps: int | None = None         # None: one epoch
    warmup_ratio: float = 0.03       # of the steps, before the cosine
    shard: str = "none"              # one of SHARDING
    bf16: bool = False               # compute in bfloat16; what is trained is kept in float32
    recompute: bool = False          # the language model's layers again in the backward pass
    lora: bool = False               # stage III trains the LLM's LoRA adapters only
    max_tokens: int | None = None    # of a sample, before routing; longer ones lose crops
    token_budget: int | None = None  # of a micro-batch on one device, before routing
    micro_batch: int | None = None   # records of a micro-batch, at most
    pool: int = 0                    # built-in pictures, read by the tower once; 0: always new ones

    def check(self, world: int, joined: bool) -> None:
        """ValueError where the recipe does not fit `world` processes (`joined`: by torchrun)."""
        if self.batch_size % world:
            fits = self.batch_size // world * world or world
            raise ValueError(f"a global batch of {self.batch_size} records cannot be shared evenly "
                             f"by {world} processes: use --batch-size {fits} or another number of "
                             "processes")
        if self.shard not in SHARDING:
            raise ValueError(f"--shard {self.shard}: choose one of {', '.join(SHARDING)}")
        if self.shard != "none" and not joined:
            raise ValueError(f"--shard {self.shard}: start with torchrun, sharding needs its "
                             "process group")


@dataclass(frozen=True)
class Preset:
    """A model to begin with and the recipe of each stage."""

    model: SliMEConfig
    recipes: dict[int, Recipe]


def table_7(llm: str, template: str, llm_learning_rate: float, shard: tuple[str, str],
            lora: bool = False) -> Preset:
    """One column of the paper's Table 7; `shard`: of stages I and II, and of stage III.

    The paper gives batch sizes, learning rates, schedule, ZeRO stages and bfloat16; the released
    scripts (yfzhang114/SliME, scripts/) add recomputation and LoRA's numbers. Where the two differ
    (the scripts train Llama 3's adapters with 5e-4 instead of 1e-3) the paper's value stands here.
    """
    # The LLM's own; beside "tokenizer" what the released scripts cut at, where here crops go.
    context = {"llama3": 8192, "tokenizer": 2048}.get(template, 4096)
    common = {"bf16": True, "recompute": True, "max_tokens": context, "token_budget": 16384}
    adapters = Recipe(256, 1e-3, shard=shard[0], **common)
    # With LoRA the released scripts keep 2e-5 for adapter and compression.
    last = Recipe(128, 2e-5 if lora else llm_learning_rate, llm_learning_rate, shard=shard[1],
                  lora=lora, **common)
    return Preset(SliMEConfig(llm=llm, template=template), {1: adapters, 2: adapters, 3: last})


LLAMA3 = "meta-llama/Meta-Llama-3-{}-Instruct"
PRESETS = {
    # 64 patches and 16 queries per crop. Steps are few, so the compression begins where long
    # training would bring it: each query looks at its own place first (QueryFormer.look_nearby).
    "tiny": Preset(
        SliMEConfig(vision="tiny", llm="tiny", vision_layer=-1, num_queries=16, resize="torch",
                    look_nearby={"content": 0.1, "near": 13.0, "far": 0.1, "share": 6 / 32}),
        {1: Recipe(16, 2e-3, steps=400, pool=2_048), 2: Recipe(16, 2e-3, steps=360, pool=2_048),
         3: Recipe(16, 1e-3, 1e-3, steps=310, pool=2_048)}),
    "vicuna-7b": table_7("lmsys/vicuna-7b-v1.5", "vicuna_v1", 2e-5, ("grads", "params")),
    "vicuna-13b": table_7("lmsys/vicuna-13b-v1.5", "vicuna_v1", 2e-5, ("grads", "params")),
    "llama3-8b": table_7(LLAMA3.format("8B"), "llama3", 1e-5, ("grads", "params")),
    "llama3-8b-lora": table_7(LLAMA3.format("8B"), "llama3", 1e-4, ("grads", "params"), lora=True),
    "llama3-70b-lora": table_7(LLAMA3.format("70B"), "llama3", 1e-4, ("params", "offload"),
                               lora=True),
    # For one GPU of 24 GB. Nobody has published a SliME of this size: batches, schedule and the
    # adapters' rate are Table 7's, recomputation, 2,048 tokens and LoRA's numbers the released
    # scripts'. Ours are Vicuna's 2e-5 for the language model, and that 1.5 billion weights, whose
    # gradients and moments alone fill the GPU, learn through LoRA.
    "small": table_7("Qwen/Qwen2.5-0.5B-Instruct", "tokenizer", 2e-5, ("none", "none")),
    "small-1.5b": table_7("Qwen/Qwen2.5-1.5B-Instruct", "tokenizer", 1e-4, ("none", "none"),
                          lora=True),
}

# -------------------------------------------------------------------------------------------- flags


def number(kind: type, low: float, high: float = math.inf, above: bool = False):
    """A type for argparse: an int or float of `low` (or `above` it) .. `high`."""
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (low < value <= high if above else low <= value <= high):
            what = "a whole number" if kind is int else "a number"
            least = f"above {low}" if above else f"of at least {low}"
            most = f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"must be {what} {least}{most}, not {text!r}")
        return value

    read.range = kind, low, high, above
    return read


COUNT, NATURAL = number(int, 1, 2**31), number(int, 0, 2**31)
BATCH, WORKERS, PROCESSES = number(int, 1, 2**20), number(int, 0, 1024), number(int, 1, 1024)
SEED, RATE = number(int, 0, 2**32 - 1), number(float, 0, 10)


def flag(text: str, default=None, read=str, choices: tuple | None = None):
    return field(default=default, metadata={"help": text, "read": read, "choices": choices})


@dataclass
class TrainConfig:
    """The flags of train.py. One of the last group that is not given has the preset's value."""

    stage: str = flag("which stage(s) to run", "all", choices=("1", "2", "3", "all"))
    preset: str = flag("model and hyperparameters", "tiny", choices=tuple(PRESETS))
    out: str = flag("folder; the stages write stage1, stage2 and stage3 in it", "out")
    data: list[str] | None = flag("JSON, JSONL or parquet files of records, folders of parquet "
                                  "files, hub:owner/name[:subset][:split]; each with a weight if "
                                  "wanted: a.json b.jsonl:0.5; without it the built-in pictures")
    images: str = flag("folder that the image paths in --data are relative to", ".")
    vision: str | None = flag("folder or hub id of the vision tower, instead of the preset's")
    llm: str | None = flag("folder or hub id of the language model, instead of the preset's")
    resize: str | None = flag("who resizes images, instead of the preset's or the checkpoint's: "
                              "pillow, or torch in a fraction of the time",
                              choices=("pillow", "torch"))
    init_from: str | None = flag("checkpoint to start from, instead of the stage before (for stage "
                                 "1, the backbones); also a stage folder of the released code")
    resume: str = flag("auto: go on with an interrupted run in --out; never: start anew", "auto",
                       choices=("auto", "never"))
    save_every: int = flag("steps between states to resume from", 200, COUNT)
    keep: int = flag("states to keep", 2, COUNT)
    seed: int = flag("of initialisation, order, noise and the built-in pictures", 0, SEED)
    workers: int | None = flag("processes per rank that read and slice images, 0: the training "
                               "process itself; by default 4 where there is a GPU, else 0", None,
                               WORKERS)
    strict_data: bool = flag("stop at a bad record instead of skipping and counting it", False)
    eval_questions: int = flag("held-out questions of each family after each stage of the tiny "
                               "preset; 0: none", 512, NATURAL)
    attention: str = flag("how the query formers attend", "auto",
                          choices=("auto", "sdpa", "triton"))
    adapter_schedule: str = flag("stage 1: together, or alternate (the MLP first, then the query "
                                 "former behind it)", "together",
                                 choices=("together", "alternate"))
    compile: bool = flag("torch.compile the language model's layers (a GPU and --bf16)", False)
    report: str | None = flag("where metrics go, too (a package to be installed)", None,
                              choices=("wandb", "trackio", "tensorboard"))
    sample_every: int = flag("steps between answers to a few held-out questions, to the log and as "
                             "a picture in the stage's folder; of --data the last four records of "
                             "the first file are held back for them; 0: never", 0, NATURAL)

    max_steps: int | None = flag("optimizer steps per stage", None, COUNT)
    batch_size: int | None = flag("records per step over all ranks together", None, BATCH)
    micro_batch: int | None = flag("records at a time on one rank; the rest is accumulated", None,
                                   COUNT)
    learning_rate: float | None = flag("peak, of adapter and compression", None, RATE)
    llm_learning_rate: float | None = flag("peak, of the language model or its LoRA adapters", None,
                                           RATE)
    warmup_ratio: float | None = flag("share of the steps before the cosine", None,
                                      number(float, 0, 1))
    shard: str | None = flag("what the ranks divide among them (ZeRO-2, ZeRO-3, ZeRO-3 with "
                             "offload)", choices=SHARDING)
    bf16: bool | None = flag("compute in bfloat16")
    recompute: bool | None = flag("recompute the language model's layers in the backward pass")
    lora: bool | None = flag("train LoRA adapters in stage 3 instead of the language model")
    max_tokens: int | None = flag("tokens of a sample at most, before routing: longer ones lose "
                                  "crops, never words", None, COUNT)
    token_budget: int | None = flag("tokens of a micro-batch at most, before routing", None, COUNT)
    pool: int | None = flag("built-in pictures per stage, which the vision tower reads once and "
                            "which come back with new words; 0: a new picture every time", None,
                            NATURAL)

    def recipe(self, stage: int) -> Recipe:
        """The preset's recipe for a stage, with the flags that were given."""
        given = {f.name: getattr(self, f.name) for f in fields(Recipe)
                 if getattr(self, f.name, None) is not None}
        if self.max_steps is not None:
            given["steps"] = self.max_steps
        if "llm" not in STAGES[stage].trained:
            given["lora"] = False
        return replace(PRESETS[self.preset].recipes[stage], **given)

    def readers(self, device: str) -> int:
        """Data workers of a rank on a device of that type."""
        return (4 if device == "cuda" else 0) if self.workers is None else self.workers

    @classmethod
    def from_flags(cls, description: str, words: list[str] | None = None) -> "TrainConfig":
        """Reads the command line; a wrong flag ends the program with one line."""
        parser = Parser(prog="train.py", description=description, formatter_class=Help)
        for f in fields(cls):
            options = {"help": f.metadata["help"], "default": f.default, "dest": f.name}
            if "bool" in str(f.type):
                options["action"] = argparse.BooleanOptionalAction
            else:
                options |= {"type": f.metadata["read"], "choices": f.metadata["choices"]}
                options |= {"nargs": "+"} if "list" in str(f.type) else {}
            parser.add_argument(f"--{f.name.replace('_', '-')}", **options)
        words = sys.argv[1:] if words is None else words
        words = [re.sub("^--[^=]*", lambda flag: flag[0].replace("_", "-"), word) for word in words]
        config = cls(**vars(parser.parse_args(words)))
        if config.pool and (config.data or config.max_tokens):
            parser.error("--pool is of whole built-in pictures: leave --data and --max-tokens away")
        if config.stage == "all" and config.init_from:
            parser.error("--init-from says where one stage starts: name the stage with --stage")
        if config.sample_every and any(config.recipe(s).shard != "none" for s in STAGES):
            parser.error("--sample-every asks a model that is whole on each rank: --shard none")
        # A checkpoint brings its backbones; the released stage files do not.
        adapters = config.init_from and (Path(config.init_from) / "mm_projector.bin").exists()
        if config.init_from and not adapters and (config.vision or config.llm):
            parser.error("--init-from brings vision tower and language model: leave --vision and "
                         "--llm away")
        return config


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """--help with a program's docstring as it stands, and every flag's default."""


class Parser(argparse.ArgumentParser):
    """Flags are written out, and a wrong one gets one line."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        name = self.prog.removeprefix("python -m ").partition(" ")[0]
        line = f"{name}: {plain(message)}; --help lists the flags\n"
        self.exit(2, line if first_to_say(line) else None)
