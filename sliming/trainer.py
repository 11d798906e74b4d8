"""The three training stages (Sec. 2.2, "Alternating Training Scheme"; hyperparameters Table 7, in presets.py).

  stage   shown            trained                       data
  I       global view      adapter                       captions
  II      local crops      compression                   detailed descriptions
  III     both, routed     adapter, compression, LLM     questions and answers

The vision tower is frozen throughout. Each stage starts from the checkpoint of the one before and leaves, in OUT/stageN,
a checkpoint (config.json, safetensors, tokenizer), train_config.json, metrics.jsonl (a line per step) and loss.png.

The loss of a step is the mean over all supervised tokens of its global batch, and gradients are summed over micro-batches and
ranks. So the result depends neither on how many GPUs there are nor on how records fall on them: not on unequal answer lengths,
nor on a rank whose share has no image or nothing at all. The noise of gate and router belongs to the record (data.py).

Legend: R ranks, P parameters, T packed tokens of a micro-batch, V its views, L patches per view.
"""

import json
import math
import os
import sys
import time
import warnings
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.data import DataLoader
from tqdm import tqdm

from sliming.chat import IGNORE
from sliming.checkpoints.states import States, add_lora, barrier, is_main, whole_tensors, without_lora, write_lora
from sliming.data import RecordError, Share, Steps, blank_sample, open_mixture
from sliming.model import Batch, CheckpointError, SliME
from sliming.config import PRESETS, SHARDING, Recipe
from sliming.tiny.pictures import TrainingSet
from sliming.watch import cut_metrics, memory, peak_flops, plot_loss, step_flops


@dataclass(frozen=True)
class Stage:
    """What a stage shows and trains."""

    parts: str                  # argument of SliME.forward
    template: str | None        # of chat.TEMPLATES; None for the model's own
    trained: tuple[str, ...]    # submodules of SliME


STAGES = {
    1: Stage("global", "plain", ("adapter",)),
    2: Stage("local", None, ("compression",)),
    3: Stage("both", None, ("adapter", "compression", "llm")),
}


def flag(text: str, default=None):
    return field(default=default, metadata={"help": text})


@dataclass
class TrainConfig:
    """The flags of train.py. Those without a default of their own take the preset's value for the stage."""

    stage: str = flag("1, 2, 3 or all: which stage(s) to run", "all")
    preset: str = flag(f"model and hyperparameters: {', '.join(PRESETS)}", "tiny")
    out: str = flag("folder; the stages write stage1, stage2 and stage3 in it", "out")
    data: list[str] | None = flag("LLaVA-format JSON or JSONL files (id, image, conversations), each with a weight if wanted: "
                                  "a.json b.jsonl:0.5; without them the built-in pictures")
    images: str = flag("folder that the image paths in --data are relative to", ".")
    vision: str | None = flag("folder or hub id of the vision tower, instead of the preset's")
    llm: str | None = flag("folder or hub id of the language model, instead of the preset's")
    init_from: str | None = flag("checkpoint to start from, instead of the stage before (or, for stage 1, the backbones); "
                                 "also a stage folder of the released code")
    resume: str = flag("auto: go on with an interrupted run in --out; never: start anew", "auto")
    save_every: int = flag("steps between states to resume from", 200)
    keep: int = flag("states to keep", 2)
    seed: int = flag("of initialisation, order, noise and the built-in pictures", 0)
    workers: int = flag("processes per rank that read and slice images; 0: the training process itself", 0)
    strict_data: bool = flag("stop at a bad record or image instead of skipping and counting", False)
    eval_questions: int = flag("held-out questions of each family after each stage of the tiny preset; 0: none", 512)
    attention: str = flag("how the query formers attend: auto, sdpa or triton", "auto")
    adapter_schedule: str = flag("stage 1: together, or alternate (the MLP first, then the query former behind it)", "together")
    compile: bool = flag("torch.compile the language model's layers", False)
    tensorboard: bool = flag("also write TensorBoard's files (needs the package tensorboard)", False)
    max_steps: int | None = flag("optimizer steps per stage, instead of the preset's")
    batch_size: int | None = flag("records per step over all ranks, whatever their number")
    micro_batch: int | None = flag("records at a time on one rank, at most; the rest of its share is accumulated")
    learning_rate: float | None = flag("peak, of adapter and compression")
    llm_learning_rate: float | None = flag("peak, of the language model or its LoRA adapters")
    warmup_ratio: float | None = flag("share of the steps before the cosine")
    shard: str | None = flag(f"{', '.join(SHARDING)}: what the ranks divide among them (ZeRO-2, ZeRO-3, ZeRO-3 with offload)")
    bf16: bool | None = flag("compute in bfloat16")
    recompute: bool | None = flag("recompute the language model's layers in the backward pass")
    lora: bool | None = flag("train LoRA adapters in stage 3 instead of the language model")
    max_tokens: int | None = flag("tokens of a sample at most, before routing: longer ones lose crops, never words")
    token_budget: int | None = flag("tokens of a micro-batch at most, before routing")

    def recipe(self, stage: int) -> Recipe:
        """The preset's recipe with the flags that were given."""
        given = {f.name: getattr(self, f.name) for f in fields(Recipe) if getattr(self, f.name, None) is not None}
        if self.max_steps is not None:
            given["steps"] = self.max_steps
        if "llm" not in STAGES[stage].trained:
            given["lora"] = False
        return replace(PRESETS[self.preset].recipes[stage], **given)


def say(text: str) -> None:
    """Prints on the first rank, without tearing a progress bar."""
    if is_main():
        tqdm.write(text, file=sys.stdout)


def reduce(values: list[float], device: torch.device, how=dist.ReduceOp.SUM) -> list[float]:
    """Numbers summed (or otherwise reduced) over the ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, how)
    return tensor.tolist()


def gather(texts: list[str]) -> list[str]:
    """The texts of all ranks."""
    everyone = [texts]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, texts)
    return sum(everyone, [])


# ------------------------------------------------------------------------------------------------------- the model to train


def initial_model(config: TrainConfig, stage: int) -> SliME:
    """The model that a stage starts from. Raises FileNotFoundError with the command to run first, CheckpointError if
    the checkpoint was made with another preset's backbones."""
    preset = PRESETS[config.preset].model
    preset = replace(preset, vision=config.vision or preset.vision, llm=config.llm or preset.llm)
    # What is frozen may be bfloat16; what is trained becomes float32 in `prepare`.
    dtype = torch.bfloat16 if config.recipe(stage).bf16 else torch.float32
    before = Path(config.init_from or Path(config.out) / f"stage{stage - 1}")
    released = config.init_from is not None and (before / "mm_projector.bin").is_file()
    if released or (config.init_from is None and stage == 1):
        say(f"stage {stage} starts from the backbones {preset.vision} (vision) and {preset.llm} (language)"
            + (f" and the adapters in {before}" if released else ""))
        model = SliME.from_backbones(preset, dtype)
        if released:
            from sliming.official import load_stage_files  # needed by this kind of start only
            load_stage_files(model, before)
        return model
    if config.init_from is None and not (before / "config.json").is_file():
        raise FileNotFoundError(f"stage {stage} starts from stage {stage - 1}, and {before} has no checkpoint; run first: "
                                f"python train.py --stage {stage - 1} --preset {config.preset} --out {config.out}")
    model = SliME.from_pretrained(str(before), dtype=dtype, float32=("adapter", "compression"))
    for name in ("vision", "llm", "num_queries"):
        if config.init_from is None and getattr(model.config, name) != getattr(preset, name):
            raise CheckpointError(f"{before} is a checkpoint of another preset: its {name} is {getattr(model.config, name)!r}, "
                                  f"preset {config.preset} has {getattr(preset, name)!r}")
    say(f"stage {stage} starts from {before}")
    return model


def prepare(model: SliME, config: TrainConfig, stage: int, device: torch.device, mesh: DeviceMesh | None) -> list[dict]:
    """Freezes, casts, adds LoRA, shards: everything between a loaded model and its first step.

    Returns the optimizer's parameter groups. What is trained is float32, the rest as it was loaded.
    """
    recipe, plan = config.recipe(stage), STAGES[stage]
    model.requires_grad_(False)
    if recipe.lora:
        add_lora(model.llm)
    for part in plan.trained:
        for name, parameter in getattr(model, part).named_parameters():
            if part != "llm" or not recipe.lora or ".lora_" in name:
                parameter.requires_grad_(True)
                parameter.data = parameter.data.float()
    if recipe.recompute:
        with warnings.catch_warnings():  # later releases of transformers give it another name
            warnings.simplefilter("ignore", FutureWarning)
            model.llm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.compile:
        for layer in model.llm.get_decoder().layers:
            layer.compile(dynamic=True)  # packed rows have a new length in every batch
    model.use_attention(config.attention)
    if recipe.shard != "none":
        shard(model, recipe, mesh)
    if recipe.shard == "offload":  # parameters stay on the CPU between uses
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
    else:
        model.to(device)
    # fully_shard replaces parameters: they are collected by name afterwards.
    groups = []
    for name in plan.trained:
        rate = recipe.llm_learning_rate if name == "llm" else recipe.learning_rate
        groups.append({"params": [p for p in getattr(model, name).parameters() if p.requires_grad], "lr": rate})
    return groups


def shard(model: SliME, recipe: Recipe, mesh: DeviceMesh) -> None:
    """Divides parameters, gradients and optimizer state among the ranks (FSDP2).

    Units, each gathered when it runs: the tower, every layer of the language model, and all the rest. "grads" keeps what
    was gathered until the backward pass has used it; "params" and "offload" gather it again. Gradients are summed, not
    averaged, as each rank's loss is divided by the global batch's tokens already.
    """
    options = {"mesh": mesh, "reshard_after_forward": recipe.shard != "grads",
               "offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available()) if recipe.shard == "offload" else OffloadPolicy()}
    if recipe.bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for unit in (model.vision, *model.llm.get_decoder().layers, model):
        fully_shard(unit, **options)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


# ------------------------------------------------------------------------------------------------------------ the training


def learning_rate_scale(step: int, steps: int, warmup_ratio: float = 0.03) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine to zero (Table 7)."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def train_stage(config: TrainConfig, stage: int, device: torch.device) -> SliME:
    """Trains one stage and writes its folder; returns the model. Its last state stays in the folder's `resume`: whoever runs
    several stages removes it when all are done.

    Raises RecordError for unusable data, CheckpointError and OSError for what cannot be read or written, ValueError for
    settings that do not fit, FloatingPointError where loss or gradient stop being finite.
    """
    torch.manual_seed(config.seed)
    plan, recipe = STAGES[stage], config.recipe(stage)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    if recipe.batch_size % world:
        raise ValueError(f"a global batch of {recipe.batch_size} records cannot be shared evenly by {world} processes: "
                         f"use --batch_size {recipe.batch_size // world * world or world} or another number of processes")
    if recipe.shard not in SHARDING or (recipe.shard != "none" and not dist.is_initialized()):
        raise ValueError(f"--shard {recipe.shard}: " + ("start with torchrun, sharding needs its process group"
                         if recipe.shard in SHARDING else f"choose one of {', '.join(SHARDING)}"))
    out = Path(config.out) / f"stage{stage}"
    mesh = init_device_mesh(device.type, (world,)) if recipe.shard != "none" else None
    for turn in range(int(os.environ.get("LOCAL_WORLD_SIZE", 1))):  # one whole model at a time in the machine's memory
        if turn == int(os.environ.get("LOCAL_RANK", 0)):
            model = initial_model(config, stage)
            groups = prepare(model, config, stage, device, mesh)
        barrier()
    trained = [parameter for group in groups for parameter in group["params"]]
    records = TrainingSet(stage, config.seed) if config.data is None else open_mixture(config.data, config.seed)
    steps = recipe.steps or max(1, len(records) // recipe.batch_size)
    say(f"stage {stage}: shows {plan.parts}, trains {', '.join(plan.trained)}{' (LoRA)' if recipe.lora else ''} "
        f"({sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters), "
        f"{steps} steps of {recipe.batch_size} records on {world} process{'es' if world > 1 else ''}")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)

    out.mkdir(parents=True, exist_ok=True)
    states = States(out / "resume", model, optimizer, asdict(replace(config, stage=str(stage))), config.keep)
    first, skipped = states.restore() if config.resume == "auto" else states.discard()
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_scale(first + step, steps, recipe.warmup_ratio))
    if first:
        say(f"stage {stage} goes on at step {first}")
    history = cut_metrics(out / "metrics.jsonl", first)
    loader = DataLoader(Steps(records, None if config.data is None else Path(config.images),
                              plan.template or model.config.template, plan.parts, model, recipe.batch_size, steps, first, rank,
                              world, config.strict_data, config.micro_batch, recipe.token_budget, recipe.max_tokens,
                              noise=(config.seed, stage)),
                        batch_size=None, num_workers=config.workers)
    model.train()
    model.vision.eval()
    board = None
    if config.tensorboard and is_main():
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise ValueError("--tensorboard needs a package: pip install tensorboard") from error
        board = SummaryWriter(out / "tensorboard")
    progress = tqdm(total=steps, initial=first, desc=f"stage {stage}", unit="step", disable=not is_main())
    with open(out / "metrics.jsonl", "a") as log:
        began, shares = time.perf_counter(), iter(loader)
        for step in range(first, steps):
            share = next(shares)
            waited = time.perf_counter() - began
            # Whatever a language model of the user's own draws, dropout say, is drawn again when the run goes on from here.
            torch.manual_seed((config.seed * 4 + stage << 44) + (step << 16) + rank)
            active = trained
            if config.adapter_schedule == "alternate" and stage == 1:
                model.adapter.expert = int(step >= steps // 2)
                half = model.adapter.query_former if model.adapter.expert else model.adapter.mlp
                active = list(half.parameters())
            row = one_step(model, share, plan.parts, trained, active, device, recipe.bf16, step, states)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            skipped += row.pop("skipped_now")
            took, began = time.perf_counter() - began, time.perf_counter()
            flops = row.pop("flops") / took
            (waited,), (most,) = reduce([waited], device), reduce([memory(device)], device, dist.ReduceOp.MAX)
            row |= {"lr": optimizer.param_groups[0]["lr"], "skipped": skipped, "data_wait": round(waited / world / took, 3),
                    "tokens_per_second": round(row["tokens"] / took, 1), "memory_gb": round(most, 2)}
            if peak := peak_flops(device):
                row["mfu"] = round(flops / world / peak, 4)
            history.append(row)
            if is_main():
                log.write(json.dumps(row) + "\n")
                log.flush()
                notes = [f"loss {row['loss']:.3f}", f"norm {row['grad_norm']:.2f}", f"lr {row['lr']:.1e}",
                         f"{row['tokens_per_second']:.0f} tokens/s"]
                notes += [f"MFU {100 * row['mfu']:.0f} %"] if "mfu" in row else []
                notes += [f"{row['memory_gb']:.1f} GB", f"data {100 * row['data_wait']:.0f} %"]
                notes += [f"{skipped} skipped"] if skipped else []
                progress.set_postfix_str(", ".join(notes), refresh=False)
                progress.update()
                for name in ("loss", "grad_norm", "lr", "tokens_per_second", "data_wait") if board else ():
                    board.add_scalar(name, row[name], step)
            states.settle(wait=False)
            if (step + 1) % config.save_every == 0 or step + 1 == steps:
                states.save(step + 1, skipped)
    progress.close()
    model.adapter.expert = model.config.expert
    finish(model, config, stage, out, history)
    states.settle()
    if recipe.shard != "none" or recipe.lora:
        model = SliME.from_pretrained(out).to(device)  # whole again, LoRA merged
    return model


def one_step(model: SliME, share: Share, parts: str, trained: list[nn.Parameter], active: list[nn.Parameter],
             device: torch.device, bf16: bool, step: int, states: States) -> dict:
    """Forward and backward over a rank's micro-batches; leaves clipped gradients. Returns what is to be logged."""
    learned = sum(int((batch.labels != IGNORE).sum()) for batch in share.batches)
    learned_all, skipped_all = reduce([learned, len(share.skipped)], device)
    (rounds,) = reduce([len(share.batches)], device, dist.ReduceOp.MAX)
    for complaint in share.skipped:
        tqdm.write(f"skipped {complaint}", file=sys.stderr)
    if learned_all == 0:
        raise RecordError(f"step {step}: no usable record in the whole batch, {int(skipped_all)} skipped")
    loss, tokens, flops = torch.zeros((), device=device), 0, 0.0
    for index in range(int(rounds)):
        real = index < len(share.batches)
        # All ranks run the same number of micro-batches: sharded parameters are gathered by all or none.
        batch = share.batches[index] if real else Batch.pack([blank_sample(model, learned=True)])
        with torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext():
            output = model(batch.to(device), parts=parts, normalizer=learned_all)
        (output.loss if real else 0 * output.loss).backward()
        if real:
            loss += output.loss.detach()
            tokens += output.tokens
            flops += step_flops(model, batch, parts, output.tokens)
    if not isinstance(model, FSDPModule):  # which sums them in the backward pass
        sum_gradients(active)
    for parameter in set(trained) - set(active):
        parameter.grad = None
    loss, tokens, flops = reduce([loss.item(), tokens, flops], device)
    norm = nn.utils.clip_grad_norm_(active, 1.0)
    norm = norm.full_tensor().item() if hasattr(norm, "full_tensor") else norm.item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        states.settle()
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}, with the records "
                                 f"{', '.join(gather(share.ids))}; {states.last()}")
    return {"step": step, "loss": loss, "grad_norm": norm, "supervised_tokens": int(learned_all), "tokens": int(tokens),
            "flops": flops, "skipped_now": int(skipped_all)}


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sums gradients over the ranks in one call; a rank that had nothing to learn adds zeros."""
    if not dist.is_initialized():
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])
    dist.all_reduce(flat)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.grad = part.view_as(parameter)


# --------------------------------------------------------------------------------------------------------- what is written


def finish(model: SliME, config: TrainConfig, stage: int, out: Path, history: list[dict]) -> None:
    """Writes the checkpoint, the flags and the loss curve. A full disk leaves the checkpoint that was there whole."""
    tensors, recipe = whole_tensors(model), config.recipe(stage)
    if is_main():
        # The language model's master weights are float32 only for training's sake.
        plain = {name: tensor.bfloat16() if recipe.bf16 and name.startswith("llm.") else tensor
                 for name, tensor in without_lora(tensors).items()}
        model.save_pretrained(out, tensors=plain)
        if recipe.lora:
            write_lora(model.llm, tensors, out / "lora", model.config.llm)
        (out / "train_config.json").write_text(json.dumps(asdict(replace(config, stage=str(stage))), indent=2) + "\n")
        plot_loss(history, f"Stage {stage}: shows {STAGES[stage].parts}, trains {', '.join(STAGES[stage].trained)}",
                  out / "loss.png")
    barrier()
    say(f"stage {stage}: checkpoint, metrics.jsonl and loss.png are in {out}")
