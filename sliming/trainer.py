"""The three training stages (Sec. 2.2, "Alternating Training Scheme"; hyperparameters Table 7).

  stage   shown            trained                       data
  I       global view      adapter                       captions
  II      local crops      compression                   detailed descriptions
  III     both, routed     adapter, compression, LLM     questions and answers

The vision tower is frozen throughout. Each stage starts from the checkpoint of the one before and
leaves in OUT/stageN a checkpoint, train_config.json, metrics.jsonl (a line per step) and loss.png.

The loss of a step is the mean over all supervised tokens of its global batch, and gradients are
summed over micro-batches and ranks. So the result depends neither on how many GPUs there are nor on
how records fall on them: not on unequal answers, nor on a rank whose share has no image or nothing
at all. The noise of gate and router belongs to the record (data.py).
"""

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import DataLoader

from sliming import distributed as ranks
from sliming import watch
from sliming.backbones import compile_layers
from sliming.chat import IGNORE
from sliming.checkpoints import files, pretrained, released
from sliming.checkpoints.lora import add_lora, begin_lora, without_lora
from sliming.checkpoints.states import States
from sliming.config import PRESETS, STAGES, Recipe, TrainConfig
from sliming.data import RecordError, Share, Steps, open_mixture
from sliming.guard import Stopped, deaf
from sliming.inputs import Batch, seed_of
from sliming.model import SliME
from sliming.samples import ask_held_out
from sliming.tiny.features import training_set


@dataclass
class Run:
    """One stage, ready to be trained."""

    config: TrainConfig
    stage: int
    parts: str    # what is shown
    recipe: Recipe
    device: torch.device
    out: Path
    model: SliME
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    states: States
    steps: int    # of the whole stage
    first: int    # steps that are done already
    skipped: int  # records, so far
    work: Steps
    shares: Iterator[Share]


def train_stage(config: TrainConfig, stage: int, device: torch.device, kind: type[SliME] = SliME,
                records: Sequence[dict] | None = None) -> None:
    """Trains one stage and writes its folder. Its last state stays in the folder's `resume`:
    whoever runs several stages removes it when all are done. `kind` and `records`: another model
    and what it learns from, instead of the configuration's (lab/).

    Raises RecordError (data), CheckpointError and OSError (files), ValueError (settings that do not
    fit), FloatingPointError (loss or gradient not finite), Stopped (by a signal).
    """
    run = set_up(config, stage, device, kind, records)
    with watch.Log(run.out, f"stage {stage}", run.first, run.steps, config.report) as log:
        for step in range(run.first, run.steps):
            began = time.perf_counter()
            share = next(run.shares)
            waited = time.perf_counter() - began
            # What a language model of the user's own draws, dropout say, follows from the step.
            torch.manual_seed(seed_of(config.seed, stage, step, ranks.rank_and_world()[0]))
            scale = learning_rate_scale(step, run.steps, run.recipe.warmup_ratio)
            for group in run.optimizer.param_groups:
                group["lr"] = scale * group["peak"]
            row = one_step(run, share, step, waited)
            run.optimizer.step()
            run.optimizer.zero_grad()
            stop = log.write(row, device)
            run.states.settle(wait=False)
            if config.sample_every and (step + 1) % config.sample_every == 0 and ranks.is_main():
                ask_held_out(run.model, run.work, step + 1, run.out)
            if (step + 1) % config.save_every == 0 or step + 1 == run.steps or stop:
                run.states.save(step + 1, run.skipped)
            if stop:
                run.states.settle()
                raise Stopped(f"stage {stage} stopped with step {step + 1} of {run.steps} saved")
    finish(run, log.history)
    run.states.settle()


def learning_rate_scale(step: int, steps: int, warmup_ratio: float = 0.03) -> float:
    """Linear warm-up over the first 3 % of the steps, then a cosine to zero (Table 7)."""
    warmup = math.ceil(steps * warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


# ------------------------------------------------------------------------------------------- set up


def set_up(config: TrainConfig, stage: int, device: torch.device, kind: type[SliME] = SliME,
           records: Sequence[dict] | None = None) -> Run:
    """Everything before the first step: model, optimizer, states to go on from, data."""
    torch.manual_seed(config.seed)
    plan, recipe, (rank, world) = STAGES[stage], config.recipe(stage), ranks.rank_and_world()
    recipe.check(world, dist.is_initialized())
    found = starting_point(config, stage)
    # What is frozen may be bfloat16; what is trained becomes float32 in `prepare`.
    dtype = torch.bfloat16 if recipe.bf16 else torch.float32
    model = kind.build(found, dtype, float32=("adapter", "compression"))
    prepare(model, config, stage, device)
    model.fill(found, device, offload=recipe.shard == "offload")
    if recipe.lora:
        begin_lora(model.llm)
    if config.init_from and (Path(config.init_from) / "mm_projector.bin").is_file():
        released.fill_stage_files(model, Path(config.init_from))
    groups = [{"params": [p for p in getattr(model, part).parameters() if p.requires_grad],
               "peak": recipe.llm_learning_rate if part == "llm" else recipe.learning_rate}
              for part in plan.trained]
    trained = [parameter for group in groups for parameter in group["params"]]
    folder = Path(config.images) if config.data else None
    if records is None and config.data:
        records = open_mixture(config.data, config.seed, 4 if config.sample_every else 0)
        watch.say(f"stage {stage} reads {records}")
    elif records is None:
        records = training_set(config, stage, model, device)
    steps = recipe.steps or max(1, len(records) // recipe.batch_size)
    learned, all_of = (sum(p.numel() for p in some) for some in (trained, model.parameters()))
    watch.say(f"stage {stage}: shows {plan.parts}, trains {', '.join(plan.trained)}"
              f"{' (LoRA)' if recipe.lora else ''} ({learned:,} of {all_of:,} parameters), {steps} "
              f"steps of {recipe.batch_size} records on {world} process{'es'[:2 * (world > 1)]}")

    out = Path(config.out) / f"stage{stage}"
    out.mkdir(parents=True, exist_ok=True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, fused=True)
    settings = {**asdict(config), **getattr(records, "fingerprints", {}),
                "first weights": files.weights_key(found.folder, found.config.vision,
                                                  config.init_from)}
    states = States(out / "resume", model, optimizer, settings, config.keep)
    first, skipped = states.restore()
    template = plan.template or model.config.template
    work = Steps(records, model.processor, plan.parts, template, recipe, steps, folder, first, rank,
                 world, noise=(config.seed, stage))
    loader = DataLoader(work, batch_size=None, num_workers=config.readers(device.type),
                        worker_init_fn=deaf, pin_memory=device.type == "cuda")
    model.train()
    model.vision.eval()
    return Run(config, stage, plan.parts, recipe, device, out, model, trained, optimizer, states,
               steps, first, skipped, work, iter(loader))


def starting_point(config: TrainConfig, stage: int) -> files.Checkpoint:
    """What a stage starts from. FileNotFoundError with the command to run first, CheckpointError if
    the checkpoint was made with another preset's backbones."""
    given = {name: value for name in ("vision", "llm", "resize")
             if (value := getattr(config, name)) is not None}
    preset = replace(PRESETS[config.preset].model, **given)
    before = Path(config.init_from or Path(config.out) / f"stage{stage - 1}")
    adapters = config.init_from is not None and (before / "mm_projector.bin").is_file()
    if adapters or (config.init_from is None and stage == 1):
        also = f" and the adapters in {before}" if adapters else ""
        watch.say(f"stage {stage} starts from the backbones {preset.vision} (vision) and "
                  f"{preset.llm} (language){also}")
        return pretrained.read(preset)
    if config.init_from is None and not (before / "config.json").is_file():
        raise FileNotFoundError(
            f"stage {stage} starts from stage {stage - 1}, and {before} has no checkpoint; run "
            f"first: python train.py --stage {stage - 1} --preset {config.preset} --out "
            f"{config.out}")
    found = released.read_any(files.find(before))
    for name in ("vision", "llm", "num_queries"):
        had, wants = getattr(found.config, name), getattr(preset, name)
        if config.init_from is None and had != wants:
            raise files.CheckpointError(
                f"{before} is a checkpoint of another preset: its {name} is {had!r}, preset "
                f"{config.preset} has {wants!r}")
    found.config.resize = config.resize or found.config.resize
    watch.say(f"stage {stage} starts from {before}")
    return found


def prepare(model: SliME, config: TrainConfig, stage: int, device: torch.device) -> None:
    """Freezes, casts, adds LoRA, shards: all that is done to a model before its weights are read.
    What is trained is float32."""
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
        model.llm.activation_checkpointing_enable({"use_reentrant": False})
    if config.compile:
        compile_layers(model.llm, recipe.bf16, device)
    model.use_attention(config.attention)
    # Units of sharding: the tower, every layer of the language model, and all the rest.
    units = [model.vision, *model.llm.get_decoder().layers, model]
    ranks.shard(units, recipe.shard, recipe.bf16, device)


# ------------------------------------------------------------------------------------------- a step


def one_step(run: Run, share: Share, step: int, waited: float) -> dict:
    """Forward and backward over a rank's micro-batches; leaves clipped gradients. Returns what is
    to be logged. FloatingPointError for a loss or gradient that is not finite."""
    model, device = run.model, run.device
    learned = sum(int((batch.labels != IGNORE).sum()) for batch in share.batches)
    learned, skipped = ranks.reduce([learned, len(share.skipped)], device)     # of all ranks
    most = [len(share.batches), watch.peak_memory(device)]
    rounds, memory = ranks.reduce(most, device, dist.ReduceOp.MAX)
    if skipped and run.config.strict_data:
        raise RecordError(ranks.gather(share.skipped)[0])
    for complaint in share.skipped:
        watch.say(f"skipped {complaint}", everyone=True)
    if learned == 0:
        raise RecordError(f"step {step}: no usable record in a whole batch, {skipped:.0f} skipped")
    active = choose_active(run, step)
    loss, tokens, flops = accumulate(run, share.batches, int(rounds), learned)
    if not isinstance(model, FSDPModule):  # which sums them in the backward pass
        ranks.sum_gradients(active)
    for parameter in set(run.trained) - set(active):
        parameter.grad = None
    loss, tokens, flops, waited = ranks.reduce([loss.item(), tokens, flops, waited], device)
    norm = ranks.gathered(nn.utils.clip_grad_norm_(active, 1.0)).item()
    if not math.isfinite(loss) or not math.isfinite(norm):
        run.states.settle()
        records = ", ".join(ranks.gather(share.ids))
        raise FloatingPointError(f"step {step}: loss {loss}, gradient norm {norm}, with the "
                                 f"records {records}; {run.states.last()}")
    run.skipped += int(skipped)
    return {"step": step, "loss": loss, "grad_norm": norm, "supervised_tokens": int(learned),
            "tokens": int(tokens), "lr": run.optimizer.param_groups[0]["lr"], "flops": flops,
            "skipped": run.skipped, "memory_gb": round(memory, 2), "waited": waited}


def accumulate(run: Run, batches: list[Batch], rounds: int,
               normalizer: float) -> tuple[Tensor, int, float]:
    """Adds up gradients over `rounds` micro-batches; their loss, tokens and arithmetic.

    All ranks run the same number of them, as sharded parameters are gathered by all or none: one
    that has run out learns nothing from a blank.
    """
    model = run.model
    loss, tokens, flops = torch.zeros((), device=run.device), 0, 0.0
    for index in range(rounds):
        real = index < len(batches)
        batch = batches[index] if real else Batch.pack([model.processor.blank(learned=True)])
        with torch.autocast(run.device.type, torch.bfloat16, enabled=run.recipe.bf16):
            output = model(batch.to(run.device), parts=run.parts, normalizer=normalizer,
                           logits=False)
        (output.loss if real else 0 * output.loss).backward()
        if real:
            loss += output.loss.detach()
            tokens += output.tokens
            flops += watch.step_flops(model, batch, run.parts, output.tokens)
    return loss, tokens, flops


def choose_active(run: Run, step: int) -> list[nn.Parameter]:
    """What this step trains: all of it, or one expert of the adapter (--adapter-schedule alternate,
    the paper's footnote 3: the MLP first, then the query former behind it)."""
    if run.config.adapter_schedule != "alternate" or run.stage != 1:
        return run.trained
    adapter = run.model.adapter
    adapter.expert = int(step >= run.steps // 2)
    return list((adapter.query_former if adapter.expert else adapter.mlp).parameters())


# ---------------------------------------------------------------------------------- what is written


def finish(run: Run, history: list[dict]) -> None:
    """Writes the checkpoint, the flags and the loss curve. A full disk leaves the checkpoint that
    was there whole."""
    model, out = run.model, run.out
    model.adapter.expert = model.config.expert
    tensors = model.tensors()
    # The language model's master weights are float32 only for training's sake.
    files.write(out, model.config, without_lora(tensors), model.processor.tokenizer,
                half=lambda name: run.recipe.bf16 and name.startswith("llm."))
    if run.recipe.lora:
        files.write_lora(out / "lora", model.llm, tensors, model.config.llm)
    if ranks.is_main():
        flags = asdict(replace(run.config, stage=str(run.stage)))
        (out / "train_config.json").write_text(json.dumps(flags, indent=2) + "\n")
        watch.plot_loss(history, f"Stage {run.stage}: shows {run.parts}, trains "
                  f"{', '.join(STAGES[run.stage].trained)}", out / "loss.png")
    ranks.barrier()
    watch.say(f"stage {run.stage}: checkpoint, metrics.jsonl and loss.png are in {out}")
