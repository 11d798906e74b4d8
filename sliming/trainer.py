"""The three training stages (Sec. 2.2, "Alternating Training Scheme"; hyperparameters Table 7).

  stage   shown            trained                       data
  I       global view      adapter                       captions
  II      local crops      compression                   detailed descriptions
  III     both, routed     adapter, compression, LLM     questions and answers

The vision tower is frozen throughout. Each stage starts from the checkpoint of the one before and leaves, in OUT/stageN,
a checkpoint (config.json, safetensors, tokenizer), train_config.json, metrics.jsonl (a line per step) and loss.png.

Under torchrun every rank takes its share of each global batch. The loss is a mean over all supervised tokens of the global
batch and gradients are summed over ranks, so the result does not depend on how records fall on ranks: not on unequal answer
lengths, nor on a rank whose share has no image or no usable record at all.
"""

import json
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from sliming.chat import IGNORE
from sliming.data import Batches, Order, RecordError, read_records
from sliming.model import CheckpointError, SliME, SliMEConfig
from sliming.synthetic import TrainingSet


@dataclass(frozen=True)
class Stage:
    """What a stage shows and trains."""

    parts: str                  # argument of SliME.forward
    template: str               # of chat.TEMPLATES
    trained: tuple[str, ...]    # submodules of SliME


STAGES = {
    1: Stage("global", "plain", ("adapter",)),
    2: Stage("local", "chat", ("compression",)),
    3: Stage("both", "chat", ("adapter", "compression", "llm")),
}

@dataclass(frozen=True)
class Recipe:
    """How long and how fast one stage learns."""

    steps: int
    batch_size: int        # records per step over all ranks
    learning_rate: float   # peak, of adapter and compression
    llm_learning_rate: float = 0.0


@dataclass(frozen=True)
class Preset:
    """A model to begin with and the recipe of each stage."""

    model: SliMEConfig
    recipes: dict[int, Recipe]


PRESETS = {
    "tiny": Preset(SliMEConfig(vision="tiny", llm="tiny", vision_layer=-1, num_queries=16),
                   {1: Recipe(400, 16, 2e-3), 2: Recipe(400, 16, 2e-3), 3: Recipe(550, 16, 1e-3, 1e-3)}),
}


@dataclass
class TrainConfig:
    """The flags of train.py."""

    stage: str = field(default="all", metadata={"help": "1, 2, 3 or all: which stage(s) to run"})
    preset: str = field(default="tiny", metadata={"help": f"model and hyperparameters: {', '.join(PRESETS)}"})
    out: str = field(default="out", metadata={"help": "folder; the stages write stage1, stage2 and stage3 in it"})
    data: str | None = field(default=None, metadata={
        "help": "LLaVA-format JSON or JSONL (id, image, conversations); without it the built-in pictures"})
    images: str = field(default=".", metadata={"help": "folder that the image paths in --data are relative to"})
    init_from: str | None = field(default=None, metadata={
        "help": "checkpoint to start from, instead of the stage before (or, for stage 1, the backbones)"})
    max_steps: int | None = field(default=None, metadata={"help": "optimizer steps per stage, instead of the preset's"})
    batch_size: int | None = field(default=None, metadata={"help": "records per step over all ranks, instead of the preset's"})
    seed: int = field(default=0, metadata={"help": "of initialisation, order, noise and the built-in pictures"})
    workers: int = field(default=0, metadata={"help": "processes that read and slice images; 0: the training process itself"})
    strict_data: bool = field(default=False, metadata={"help": "stop at a bad record or image instead of skipping and counting"})
    eval_questions: int = field(default=512, metadata={"help": "held-out questions of each family after each stage; 0: none"})


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def say(text: str) -> None:
    """Prints on the first rank, without tearing a progress bar."""
    if is_main():
        tqdm.write(text, file=sys.stdout)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def initial_model(config: TrainConfig, stage: int) -> SliME:
    """The model that a stage starts from. Raises FileNotFoundError with the command to run first, CheckpointError if
    the checkpoint was made with another preset's backbones."""
    preset = PRESETS[config.preset].model
    if config.init_from is None and stage == 1:
        say(f"stage 1 starts from the backbones {preset.vision} (vision) and {preset.llm} (language)")
        return SliME.from_backbones(preset)
    before = Path(config.init_from or Path(config.out) / f"stage{stage - 1}")
    if config.init_from is None and not (before / "config.json").is_file():
        raise FileNotFoundError(f"stage {stage} starts from stage {stage - 1}, and {before} has no checkpoint; run first: "
                                f"python train.py --stage {stage - 1} --preset {config.preset} --out {config.out}")
    model = SliME.from_pretrained(str(before))
    for name in ("vision", "llm", "num_queries"):
        if getattr(model.config, name) != getattr(preset, name):
            raise CheckpointError(f"{before} is a checkpoint of another preset: its {name} is {getattr(model.config, name)!r}, "
                             f"preset {config.preset} has {getattr(preset, name)!r}")
    say(f"stage {stage} starts from {before}")
    return model


def learning_rate_scale(step: int, steps: int, warmup_ratio: float = 0.03) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine to zero (Table 7)."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_stage(config: TrainConfig, stage: int, device: torch.device) -> SliME:
    """Trains one stage and writes its folder; returns the model."""
    torch.manual_seed(config.seed)
    plan, recipe = STAGES[stage], PRESETS[config.preset].recipes[stage]
    steps, batch_size = config.max_steps or recipe.steps, config.batch_size or recipe.batch_size
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

    model = initial_model(config, stage).to(device)
    model.requires_grad_(False)
    groups = [{"params": list(getattr(model, name).requires_grad_(True).parameters()),
               "lr": recipe.llm_learning_rate if name == "llm" else recipe.learning_rate} for name in plan.trained]
    trained = [parameter for group in groups for parameter in group["params"]]
    say(f"stage {stage}: shows {plan.parts}, trains {', '.join(plan.trained)} "
        f"({sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters), "
        f"{steps} steps of {batch_size} records")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_scale(step, steps))

    if config.data is None:
        records, order, folder = TrainingSet(stage, config.seed), None, None
    else:
        records, folder = read_records(config.data), Path(config.images)
        order = Order(len(records), config.seed)
    batches = Batches(records, order, folder, plan.template, model, batch_size, steps, rank, world, config.strict_data)
    loader = DataLoader(batches, batch_size=None, num_workers=config.workers)

    out = Path(config.out) / f"stage{stage}"
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed + 1000 * rank)  # the ranks' noise differs, their initial weights do not
    model.train()
    model.vision.eval()
    history, skipped = [], 0
    progress = tqdm(total=steps, desc=f"stage {stage}", unit="step", disable=not is_main())
    with open(out / "metrics.jsonl", "w") as log:
        started = time.perf_counter()
        for step, (batch, complaints) in enumerate(loader):
            # How much the whole global batch has to learn decides the weight of each token; see the docstring above.
            learned = 0 if batch is None else int((batch.labels != IGNORE).sum())
            words = 0 if batch is None else len(batch.input_ids)
            counts = sum_over_ranks(torch.tensor([learned, words, len(complaints)], dtype=torch.float64, device=device))
            learned_all, words_all, skipped_now = counts.tolist()
            for complaint in complaints:
                tqdm.write(f"skipped {complaint}", file=sys.stderr)
            skipped += int(skipped_now)
            if learned_all == 0:
                raise RecordError(f"step {step}: no usable record in the whole batch, {int(skipped_now)} skipped")
            loss = torch.zeros((), device=device)
            if batch is not None:
                loss = model(batch.to(device), parts=plan.parts, normalizer=learned_all).loss
                loss.backward()
            sum_gradients(trained)
            loss = sum_over_ranks(loss.detach())
            norm = nn.utils.clip_grad_norm_(trained, 1.0)
            if not math.isfinite(loss.item()) or not math.isfinite(norm.item()):
                raise FloatingPointError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()}; nothing was saved "
                                         f"over the checkpoint that the stage started from")
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            now = time.perf_counter()
            row = {"step": step, "loss": loss.item(), "lr": optimizer.param_groups[0]["lr"], "grad_norm": norm.item(),
                   "supervised_tokens": int(learned_all), "text_tokens_per_second": round(words_all / (now - started), 1),
                   "skipped": skipped}
            started = now
            history.append(row)
            if is_main():
                log.write(json.dumps(row) + "\n")
                progress.set_postfix_str(f"loss {row['loss']:.3f}, lr {row['lr']:.1e}, "
                                         f"{row['text_tokens_per_second']:.0f} tokens/s" +
                                         (f", {skipped} skipped" if skipped else ""), refresh=False)
                progress.update()
    progress.close()
    if is_main():
        save(model, config, stage, out, history)
    return model


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sums gradients over the ranks in one call; a rank that had nothing to learn adds zeros."""
    if not dist.is_initialized():
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)


def save(model: SliME, config: TrainConfig, stage: int, out: Path, history: list[dict]) -> None:
    """Writes the checkpoint, the flags and the loss curve. A full disk leaves the checkpoint that was there whole."""
    model.save_pretrained(out)
    (out / "train_config.json").write_text(json.dumps(asdict(replace(config, stage=str(stage))), indent=2) + "\n")
    plot_loss(history, stage, out / "loss.png")
    say(f"stage {stage}: checkpoint, metrics.jsonl and loss.png are in {out}")


def plot_loss(history: list[dict], stage: int, path: Path) -> None:
    """The loss per step, faint, and its running mean."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot as plt  # heavy, and needed once per stage
    losses, means, mean = [row["loss"] for row in history], [], None
    for loss in losses:
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        means.append(mean)
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(losses, color="0.75", linewidth=1, label="per step")
    axes.plot(means, color="tab:blue", linewidth=2, label="running mean")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", yscale="log",
             title=f"Stage {stage}: {STAGES[stage].parts} view{'s' if STAGES[stage].parts == 'both' else ''}, "
                   f"training {', '.join(STAGES[stage].trained)}")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
