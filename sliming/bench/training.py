"""A training step beside the obvious alternatives, on the CPU; on a GPU the 8B shapes."""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from sliming import distributed as ranks
from sliming.bench.inference import eight_billion
from sliming.bench.timing import medians_ms, own_process, picture, show
from sliming.chat import IGNORE
from sliming.config import PRESETS, Recipe, TrainConfig
from sliming.data import Steps
from sliming.model import SliME
from sliming.tiny.pictures import TrainingSet
from sliming.trainer import one_step, set_up
from sliming.watch import peak_flops, peak_memory

WAYS = ("sliming: packed, supervised logits, real views", "every logit", "ten views",
        "padded batch", "padded batch, every logit, ten views")


def padded_hidden(model: SliME, embeddings: Tensor, lengths: list[int]) -> Tensor:
    """The language model on samples padded to the longest: packed [T, D] -> packed [T, D]."""
    rows = nn.utils.rnn.pad_sequence(embeddings.split(lengths), batch_first=True)
    mask = torch.arange(rows.shape[1]) < torch.tensor(lengths)[:, None]        # [B, longest]
    output = model.llm.get_decoder()(inputs_embeds=rows, attention_mask=mask.long(),
                                     use_cache=False)
    return output.last_hidden_state[mask]


def gradient_step(way: str, folder: str, samples: int) -> Callable[[], tuple[float, int]]:
    """One of WAYS to compute the gradients of a step of the tiny preset's stage III, as a function
    that does it: -> loss, real tokens."""
    model = SliME.from_pretrained(folder).eval()                        # no noise: equal losses
    everywhere, ten, padded = (word in way for word in WAYS[1:4])
    if padded:
        model.llm.set_attn_implementation("sdpa")
    model.vision.requires_grad_(False)
    work = Steps(TrainingSet(3, 0), model.processor, "both", model.config.template,
                 Recipe(samples, 0), 1)
    batch = work[0].batches[0]

    def step() -> tuple[float, int]:
        if ten:  # the released code's collator fills every image up to ten views, all encoded
            missing = 9 * len(batch.grids) - len(batch.crops)
            model.vision(batch.crops.new_zeros(missing, *batch.crops.shape[1:]))
        embeddings, labels, lengths = model.embed(batch, model.see(batch))
        hidden = (padded_hidden if padded else SliME.decode)(model, embeddings, lengths)
        ends = torch.tensor(lengths).cumsum(0) - 1
        following = labels.roll(-1).index_fill(0, ends, IGNORE)  # [T]: what each position predicts
        if not everywhere:
            kept = torch.nonzero(following != IGNORE)[:, 0]
            hidden, following = hidden[kept], following[kept]
        logits = model.llm.get_output_embeddings()(hidden)
        loss = F.cross_entropy(logits.float(), following, ignore_index=IGNORE)
        loss.backward()
        return loss.item(), len(embeddings)

    return step


def peak_of_step(way: str, folder: str, samples: int) -> float:
    """GB of resident memory that a step adds at its peak, in a process of its own."""
    step, cpu = gradient_step(way, folder, samples), torch.device("cpu")
    before = peak_memory(cpu)
    step()
    return peak_memory(cpu) - before


def train(device: torch.device, out: Path, samples: int = 16, repeats: int = 9) -> None:
    """Forward and backward of one step in each of WAYS, on the CPU; on a GPU `full_size`."""
    if device.type == "cuda":
        return full_size(device, lambda: eight_billion(4, device))
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder)
        peaks = {}
        for way in WAYS:
            with own_process() as pool:
                peaks[way] = pool.submit(peak_of_step, way, folder, samples).result()
        steps = {way: gradient_step(way, folder, samples) for way in WAYS}
    losses, tokens = zip(*(step() for step in steps.values()), strict=True)
    if max(losses) - min(losses) > 1e-4:
        raise RuntimeError(f"the ways give different losses: {losses}")
    times = medians_ms(steps, torch.device("cpu"), repeats, 1)
    show(f"forward and backward of a step of the tiny preset's stage III, {samples} records, on "
         "the CPU; equal losses",
         ["way", "ms", "real tokens/s", "times ours", "GB at the peak, model aside"],
         [[way, f"{ms:.0f}", f"{1e3 * tokens[0] / ms:.0f}", f"{ms / times[WAYS[0]]:.2f}",
           f"{peaks[way]:.2f}"] for way, ms in times.items()])
    print("not run: 8B shapes, stages I, II, III and LoRA: needs a CUDA device")


def trained(config: TrainConfig, stage: int, device: torch.device) -> list[dict]:
    """Trains a stage and keeps nothing: the rows of its log, with the `seconds` of each step."""
    with redirect_stdout(None):
        run = set_up(config, stage, device)
    rows = []
    for step in range(run.steps):
        began = time.perf_counter()
        share = next(run.shares)
        rows.append(one_step(run, share, step, time.perf_counter() - began))
        run.optimizer.step()
        run.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        rows[-1]["seconds"] = time.perf_counter() - began
    return rows


def full_size(device: torch.device, build: Callable[[], SliME], steps: int = 6,
              batch: int = 16) -> None:
    """Stages I, II, III and III with LoRA of the model that `build` makes, on images of 4 x 3
    crops: tokens per second, data aside, MFU without recomputation, peak memory. Under torchrun
    the presets divide it as they say; else, on a GPU, layers of the language model are compiled,
    too."""
    ranks.start(device, sharded=True)
    shard = None if dist.is_initialized() else "none"
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        model = build()
        size = model.processor.crop_size
        model.save_pretrained(folder)
        del model
        picture(4 * size, 3 * size).save(Path(folder, "a.png"))
        turns = [{"from": "human", "value": "<image>\nWhat?"},
                 {"from": "gpt", "value": "a number, " * 20}]
        records = Path(folder, "records.json")
        records.write_text(json.dumps([{"image": "a.png", "conversations": turns}]))
        rows = [(1, "llama3-8b", False), (2, "llama3-8b", False), (3, "llama3-8b", False),
                (3, "llama3-8b-lora", False)]
        rows += [(*row[:2], True) for row in rows[2:]] if device.type == "cuda" and shard else []
        for stage, preset, compiled in rows:
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(device)
            logs = trained(TrainConfig(preset=preset, init_from=folder, data=[str(records)],
                                       images=folder, out=f"{folder}/{preset}", shard=shard,
                                       compile=compiled, batch_size=batch, max_steps=steps),
                           stage, device)
            seconds = statistics.median(log["seconds"] - log["waited"] for log in logs[1:])
            peak = peak_flops(device) or math.nan
            name = f"{stage}{' LoRA' * ('lora' in preset)}{', compiled' * compiled}"
            lines.append([name, f"{logs[-1]['tokens'] / seconds:.0f}",
                          f"{100 * logs[-1]['flops'] / seconds / peak:.1f} %".replace("nan %", "-"),
                          f"{peak_memory(device):.1f}", f"{logs[0]['seconds']:.1f}"])
            print(*lines[-1], sep="  ", flush=True)  # what comes next may be stopped
    ranks.end()
    show("8B shapes, 4 layers of tower and language model, bfloat16, activations recomputed, "
         f"global batch {batch}, {'as the presets divide it' if shard is None else 'not divided'}",
         ["stage", "tokens/s", "MFU", "peak GB", "first step s"], lines)
