"""Speed and memory against named peers, measured in one run on this machine.

    python -m sliming.bench --what attention --out out/bench
    python -m sliming.bench --what inference
    python -m sliming.bench --what train
    python -m sliming.bench --what data
"""

import argparse
import copy
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sliming.backbones import PIXEL_MEAN, PIXEL_STD, TINY, VisionTower, build_llm
from sliming.chat import IGNORE
from sliming.checkpoints.states import States
from sliming.config import PRESETS
from sliming.data import Steps, open_mixture
from sliming.model import Batch, SliME, SliMEConfig
from sliming.qformer import QueryFormer, query_attention
from sliming.slicer import Slices, slice_image
from sliming.tiny.pictures import TrainingSet
from sliming.trainer import STAGES, TrainConfig, one_step, prepare
from sliming.watch import memory, peak_flops


def device_line(device: torch.device) -> str:
    """What the numbers below it were measured on: device or CPU threads, versions."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"


def median_ms(run: Callable[[], object], device: torch.device, repeats: int = 20, warmup: int = 3) -> float:
    """Median milliseconds of one call of ``run``; see medians_ms."""
    return medians_ms({"": run}, device, repeats, warmup)[""]


def medians_ms(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int = 20,
               warmup: int = 3) -> dict[str, float]:
    """Median milliseconds of one call of each of ``runs``: CUDA events on a GPU, the clock on a CPU.

    They take turns, so that whatever else the machine does meets all of them alike; warm-up calls are not
    counted.
    """
    times = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                run()
                end.record()
                torch.cuda.synchronize(device)
                elapsed = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                run()
                elapsed = 1e3 * (time.perf_counter() - begin)
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def print_table(header: list[str], rows: list[list[str]]) -> None:
    """Rows of text in aligned columns, the first to the left and the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        first, *others = zip(row, widths)
        cells = [first[0].ljust(first[1])] + [cell.rjust(width) for cell, width in others]
        print("  ".join(cells).rstrip(), flush=True)


# --- attention ---

class Straightforward(nn.Module):
    """The query former as the first four equations of qformer.py stand, with torch's attention."""

    def __init__(self, former: QueryFormer):
        super().__init__()
        self.former = former

    def key_position(self, x: torch.Tensor) -> torch.Tensor:
        """Positions resized from the query grid to the patch grid, [L, D]."""
        f, side = self.former, math.isqrt(x.shape[1])
        grid = f.position.float().unflatten(0, (f.side, f.side)).permute(2, 0, 1)[None]
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return grid[0].flatten(1).T.to(x.dtype)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [Nq, D], k and v [B, L, D] -> [B, Nq, D], output projection included."""
        f = self.former
        q, k, v = map(f.split_heads, (q.expand(k.shape[0], *q.shape), k, v))   # [B, H, N, Dh]
        return f.w_o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.former
        position = f.position.to(x.dtype)
        q = f.ln_q(f.query) + position                                         # [Nq, D]
        patches = f.ln_kv(x)                                                   # [B, L, D]
        return f.ln_post(self.attend(f.w_q(q), f.w_k(patches + self.key_position(x)), f.w_v(patches)))


class Released(Straightforward):
    """As the released code computes it (llava/model/multimodal_resampler/sampler.py): nn.MultiheadAttention,
    the queries repeated for every crop before their projection, and the attention weights asked for."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        f = self.former
        position = f.position.to(x.dtype)
        q = (f.ln_q(f.query) + position)[:, None].repeat(1, len(x), 1)         # [Nq, B, D]
        patches = f.ln_kv(x).transpose(0, 1)                                   # [L, B, D]
        keys = patches + self.key_position(x)[:, None]
        # nn.MultiheadAttention.forward is this call, with the three projections packed in one weight.
        out, _ = F.multi_head_attention_forward(
            q, keys, patches, q.shape[-1], f.num_heads,
            torch.cat([f.w_q.weight, f.w_k.weight, f.w_v.weight]),
            torch.cat([f.w_q.bias, f.w_k.bias, f.w_v.bias]),
            None, None, False, 0.0, f.w_o.weight, f.w_o.bias, need_weights=True)
        return f.ln_post(out.transpose(0, 1))


def under(backend: SDPBackend, run: Callable) -> Callable:
    """``run`` with scaled_dot_product_attention held to one backend."""
    def held(*args):
        with sdpa_kernel(backend):
            return run(*args)
    return held


def repeated_weights(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as nn.MultiheadAttention computes it when weights are asked for: [B, H, Nq, L] in memory."""
    q = q[None].repeat(len(k), 1, 1, 1) * q.shape[-1]**-0.5                    # [B, H, Nq, Dh]
    return ((q @ k.transpose(2, 3)).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def expanded(attention: Callable) -> Callable:
    """An attention on q [B, H, Nq, Dh] as one on shared queries."""
    return lambda q, k, v: attention(q.expand(len(k), *q.shape), k, v).transpose(1, 2).flatten(2)


def peers(device: torch.device, former: QueryFormer) -> tuple[dict, dict, list[str]]:
    """-> bare attentions (q, k, v), whole query formers (x), and what this device does not run, and why."""
    sdpa = expanded(F.scaled_dot_product_attention)

    def whole(choice: str) -> QueryFormer:
        module = copy.copy(former)                     # the same parameters
        module.attention = choice
        return module

    straight = Straightforward(former)
    bare = {"released way": repeated_weights}
    formers = {"released way": Released(former), "sliming, sdpa": whole("sdpa")}
    if device.type == "cpu":
        bare["sliming, sdpa"] = lambda q, k, v: query_attention(q, k, v, attention="sdpa")
        formers["straightforward, SDPA"] = straight
        bare["SDPA math"] = under(SDPBackend.MATH, sdpa)
        formers["straightforward, SDPA math"] = under(SDPBackend.MATH, straight)
        return bare, formers, [
            "sliming, triton: needs a CUDA device", "flex_attention: its CPU version has no backward pass",
            "torch.compile: minutes of compiling for a CPU version that no one trains with",
            "Nq 64, 196 and 576, D 1280, more than 8 crops: hours"]
    bare["sliming, triton"] = lambda q, k, v: query_attention(q, k, v, attention="triton")
    formers["sliming, triton"] = whole("triton")
    backends = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
                "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}
    for name, backend in backends.items():
        bare[f"SDPA {name}"] = under(backend, sdpa)
        formers[f"straightforward, SDPA {name}"] = under(backend, straight)
    bare["released way, compiled"] = torch.compile(repeated_weights)
    bare["SDPA, compiled"] = torch.compile(sdpa)
    bare["flex_attention, compiled"] = torch.compile(expanded(flex_attention))
    formers["released way, compiled"] = torch.compile(Released(former))
    formers["straightforward, compiled"] = torch.compile(Straightforward(former))
    formers["sliming, triton, compiled"] = torch.compile(whole("triton"))
    return bare, formers, []


def results(run: Callable, inputs: tuple[torch.Tensor, ...],
            leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    """Output of ``run(*inputs)``, and the gradients of ``leaves`` for a fixed gradient of the output."""
    out = run(*inputs)
    cotangent = torch.linspace(0, 99, out.numel(), device=out.device).cos().view_as(out).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent)]


def check(got: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """RuntimeError unless each tensor is within rounding of the expected float32 one."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        # float32 rounds at 2^-24, bfloat16 at 2^-9, in sums of some thousand terms that partly cancel.
        bound = 1e-4 if a.dtype == torch.float32 else 1e-1
        error = (a.float() - b).norm() / b.norm()
        if not error <= bound:
            raise RuntimeError(f"wrong: result {i} is off by {error:.2g} of its size")


def kept_bytes(run: Callable, inputs: tuple[torch.Tensor, ...], former: QueryFormer) -> int:
    """Bytes that one forward pass keeps for the backward pass, besides its inputs and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (*inputs, *former.parameters(), *former.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(*inputs)                             # alive until the sum is taken: no address is reused
        total = sum(kept.values())
        del out
    return total


def peak_bytes(run: Callable, inputs: tuple[torch.Tensor, ...], leaves: list[torch.Tensor]) -> float:
    """Bytes that one forward and backward pass allocates at its peak, gradients included; NaN on a CPU."""
    device = inputs[0].device
    if device.type != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = run(*inputs)
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return torch.cuda.max_memory_allocated(device) - before


def measure(methods: dict[str, Callable], inputs: tuple[torch.Tensor, ...], leaves: list[torch.Tensor],
            former: QueryFormer) -> dict[str, dict]:
    """method -> median ms of the forward pass and of both passes, MB kept between the two, MB at the peak."""
    device = inputs[0].device
    repeats = 50 if device.type == "cuda" else 11
    cotangent = torch.randn_like(next(iter(methods.values()))(*inputs))
    forward = medians_ms({name: partial(run, *inputs) for name, run in methods.items()}, device, repeats)
    both = medians_ms({name: lambda run=run: torch.autograd.grad(run(*inputs), leaves, cotangent)
                       for name, run in methods.items()}, device, repeats)
    return {name: {"forward": forward[name], "both": both[name],
                   "kept": kept_bytes(run, inputs, former) / 1e6,
                   "peak": peak_bytes(run, inputs, leaves) / 1e6} for name, run in methods.items()}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying 256 MB."""
    source = torch.zeros(64_000_000, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median_ms(lambda: target.copy_(source), device, repeats=10))


def attention(device: torch.device, out: Path, sizes: list[tuple[int, int]] | None = None,
              crop_counts: tuple[int, ...] | None = None) -> None:
    """The bare attention and the whole query former, forward and backward, on crops of 24 x 24 patches.

    sizes: pairs (D, Nq). Before each timing, output and gradients are compared with the straightforward
    version's in float32. FLOP and bytes are those of fused_attention.py and qformer.py for every method, so
    that TFLOP/s and TB/s order as times do. Prints tables, saves ``out``/attention.png.
    """
    torch.manual_seed(0)
    cuda = device.type == "cuda"
    dtype = torch.bfloat16 if cuda else torch.float32
    patches = 576
    sizes = sizes or ([(d, n) for d in (1024, 1280) for n in (64, 144, 196, 576)] if cuda else [(1024, 144)])
    crop_counts = crop_counts or ((1, 8, 64, 192, 512) if cuda else (1, 8))
    bandwidth = copy_bandwidth(device)
    print(f"{str(dtype).removeprefix('torch.')}, L = {patches}; copying moves {bandwidth / 1e12:.3f} TB/s")
    times, failed = {}, []
    for dim, queries in sizes:
        torch.compiler.reset()
        former = QueryFormer(dim, queries).to(device, dtype)
        exact = copy.deepcopy(former).float()
        bare, formers, skipped = peers(device, former)
        # b_k moves all scores of a query alike: its exact gradient is 0 and what is computed is rounding.
        parameters, exact_parameters = ([p for name, p in module.named_parameters() if name != "w_k.bias"]
                                        for module in (former, exact))
        sdpa = under(SDPBackend.MATH, expanded(F.scaled_dot_product_attention))
        straight = under(SDPBackend.MATH, Straightforward(exact))
        for crops in crop_counts:
            x = torch.randn(crops, patches, dim, device=device, dtype=dtype)
            qkv = [torch.randn(size, device=device, dtype=dtype, requires_grad=True)
                   for size in ((queries, dim), x.shape, x.shape)]
            exact_qkv = [t.detach().float().requires_grad_() for t in qkv]
            heads, exact_heads = (tuple(map(former.split_heads, each)) for each in (qkv, exact_qkv))
            for what, methods, inputs, leaves, reference in (
                    ("bare attention", bare, heads, qkv, (sdpa, exact_heads, exact_qkv)),
                    ("query former", formers, (x,), parameters, (straight, (x.float(),), exact_parameters))):
                expected, right = results(*reference), {}
                for name, run in methods.items():
                    try:
                        check(results(run, inputs, leaves), expected)
                        right[name] = run
                    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                        if name.startswith("sliming"):
                            raise
                        reason = str(error).splitlines()[0]
                        failed.append(f"{what}, {name}, Nq {queries}, D {dim}, {crops} crops: {reason}")
                del expected
                rows = measure(right, inputs, leaves, former)
                report(what, rows, crops, queries, patches, dim, dtype.itemsize, bandwidth)
                times[what, dim, queries, crops] = {name: row["both"] / crops for name, row in rows.items()}
    for line in skipped + failed:
        print(f"not run: {line}")
    plot_attention(times, device_line(device), out / "attention.png")


def report(what: str, rows: dict[str, dict], crops: int, queries: int, patches: int, dim: int, itemsize: int,
           bandwidth: float) -> None:
    """Prints one table: times, rates, memory, and how many times as long as our fastest each method takes."""
    n, l, d = queries, patches, dim
    bare = what == "bare attention"
    flop = crops * (14 * n * l * d + (0 if bare else 8 * l * d * d + 6 * n * d * d))
    rows_moved = {"forward": 2 * l + n, "both": 8 * l + 4 * n}                   # of D numbers, per crop
    ours = min((row["both"] for name, row in rows.items() if name.startswith("sliming")), default=math.nan)
    print(f"\n{what}: Nq {n}, D {d}, {crops} crops")
    header = ["method", "fwd ms", "bwd ms", "both ms", "/ ours", "TFLOP/s", "kept MB", "peak MB"]
    header += ["fwd TB/s", "of copy", "both TB/s"] if bare else []
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["both"]):
        both = row["both"]
        line = [name, f"{row['forward']:.3f}", f"{both - row['forward']:.3f}", f"{both:.3f}",
                f"{both / ours:.2f}", f"{flop / both / 1e9:.3f}", f"{row['kept']:.1f}", f"{row['peak']:.1f}"]
        if bare:
            forward_rate, both_rate = (crops * itemsize * d * count / (1e-3 * row[part])
                                       for part, count in rows_moved.items())
            line += [f"{forward_rate / 1e12:.4f}", f"{forward_rate / bandwidth:.0%}",
                     f"{both_rate / 1e12:.4f}"]
        lines.append([cell.replace("nan", "-") for cell in line])
    print_table(header, lines)


def plot_attention(times: dict, title: str, path: Path) -> None:
    """times: (what, D, Nq, crops) -> {method: ms per crop}; saves one panel for each (what, D, Nq)."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels = sorted({key[:3] for key in times})
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(5.5 * columns, 4.5 * rows), squeeze=False,
                                layout="constrained")
    names = dict.fromkeys(name for methods in times.values() for name in methods)
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for axis, panel in zip(axes.flat, panels):
        points = {key[3]: methods for key, methods in times.items() if key[:3] == panel}
        for name in names:
            crops = [count for count, methods in points.items() if name in methods]
            if crops:
                axis.plot(crops, [points[count][name] for count in crops], "o-", label=name,
                          color=colours[name], linewidth=3 if name.startswith("sliming") else 1.2)
        what, dim, queries = panel
        axis.set(title=f"{what}: Nq {queries}, D {dim}", xlabel="crops", xscale="log", ylim=(0, None),
                 ylabel="ms per crop, forward + backward", xticks=list(points), xticklabels=list(points))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\nplot: {path}")


# --- inference ---

def eight_billion(layers: int, device: torch.device) -> SliME:
    """SliME-Llama3-8B's shapes with random weights, tower and language model cut to ``layers`` layers each.

    Shapes: openai/clip-vit-large-patch14-336 and meta-llama/Meta-Llama-3-8B, their config.json. Texts are read
    with the tiny preset's tokenizer, whose ids are all in the vocabulary.
    """
    tower = CLIPVisionConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers + 1,
                             num_attention_heads=16, image_size=336, patch_size=14)
    llm = LlamaConfig(vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers,
                      num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
                      rope_parameters={"rope_type": "default", "rope_theta": 500000.0}, bos_token_id=0,
                      eos_token_id=128001)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    config = SliMEConfig(vision_config=tower.to_dict(), llm_config=llm.to_dict(), slicing="official",
                         global_view="squash")
    language = build_llm(config.llm_config, dtype)
    for parameter in language.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    model = SliME(config, VisionTower(tower, -2), language, AutoTokenizer.from_pretrained(TINY / "llm"))
    return model.to(device, dtype).eval()


def inner_size(image: Image.Image, slices: Slices) -> tuple[int, int]:
    """(width, height) of the picture inside its canvas of crops, as the released code computes it."""
    width, height = (count * slices.crops.shape[-1] for count in slices.grid)
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        return width, min(math.ceil(image.height * scale_x), height)
    return min(math.ceil(image.width * scale_y), width), height


def per_crop(image: Image.Image, slices: Slices, processor) -> torch.Tensor:
    """The released code's way to the same pixels (llava/mm_utils.py, process_anyres_image): two resizes, a black
    canvas, and every view by itself through transformers' image processor: float32 [1 + P, 3, S, S]."""
    columns, rows = slices.grid
    size = slices.crops.shape[-1]
    inner = inner_size(image, slices)
    canvas = Image.new("RGB", (columns * size, rows * size))
    canvas.paste(image.resize(inner, Image.Resampling.BICUBIC),
                 ((canvas.width - inner[0]) // 2, (canvas.height - inner[1]) // 2))
    views = [image.resize((size, size), Image.Resampling.BICUBIC)]
    views += [canvas.crop((x * size, y * size, (x + 1) * size, (y + 1) * size))
              for y in range(rows) for x in range(columns)]
    return torch.cat([processor(view, return_tensors="pt")["pixel_values"] for view in views])


def preprocessing(sizes: tuple[tuple[int, int], ...] = ((336, 336), (640, 480), (1024, 1024), (2016, 1344), (4000, 3000)),
                  repeats: int = 9) -> None:
    """Images per second from a decoded picture to views, one thread, beside the way of ``per_crop``.

    "ours, uint8" is what the model takes: it normalises on the device. "normalised" does that here, on the same thread.
    "two resizes" is Pillow's work alone, which both ways need: no other code around it could be faster than that.
    """
    processor = CLIPImageProcessorPil(size={"shortest_edge": 336}, crop_size=336)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    lines = []
    for width, height in sizes:
        pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        cut = partial(slice_image, image, rule="official", global_view="squash")

        def normalised() -> torch.Tensor:
            slices = cut()
            views = torch.cat([slices.global_view[None], slices.crops]).float()
            return views.div_(255).sub_(mean).div_(std)

        slices = cut()
        inner = inner_size(image, slices)

        def resizes() -> None:
            image.resize(inner, Image.Resampling.BICUBIC)
            image.resize((336, 336), Image.Resampling.BICUBIC)

        old = partial(per_crop, image, slices, processor)
        if (old() - normalised()).abs().max() > 1e-6:
            raise RuntimeError("the two ways give different pixels")
        times = medians_ms({"ours": cut, "normalised": normalised, "per crop": old, "resizes": resizes},
                           torch.device("cpu"), repeats, 2)
        lines.append([f"{width} x {height}", str(len(slices.crops)), *(f"{1e3 / times[key]:.1f}" for key in times),
                      f"{times['per crop'] / times['ours']:.2f}", f"{times['per crop'] / times['normalised']:.2f}"])
    print("\npreprocessing, images per second; equal pixels in all ways")
    print_table(["image", "crops", "ours, uint8", "ours, normalised", "CLIPImageProcessor per crop",
                 "two resizes alone", "ratio", "normalised"], lines)


def peak_memory(device: torch.device) -> float:
    """Bytes at the peak: of the device since its statistics were reset, or of this process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def inference(device: torch.device, out: Path, models: dict[str, Callable[[], SliME]] | None = None,
              sizes: tuple[tuple[int, int], ...] | None = None, answers: int = 17) -> None:
    """Preprocessing; the vision tower; the first token; tokens after it; memory; tokens that an image costs.

    models: name -> builder, by default the tiny preset and the 8B shapes cut to two layers. sizes: of preprocessing.
    """
    preprocessing() if sizes is None else preprocessing(sizes, repeats=1)
    models = models or {"tiny preset": lambda: SliME.from_backbones(PRESETS["tiny"].model).to(device).eval(),
                        "8B shapes, 2 layers": lambda: eight_billion(2, device)}
    question = "What number is on the red bar?"
    lines, counts, together = [], [], []
    for name, build in models.items():                 # the smaller first: a process's peak only grows
        model = build()
        size = model.crop_size
        full = size == 336
        model.end_ids = set()                          # no answer ends early
        repeats, warmup = (20, 3) if device.type == "cuda" else (1, 1) if full else (3, 1)
        for side in (1024, 2016) if full else (2 * size, 3 * size):
            image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
            sample = model.asked(image, question)
            batch = Batch.pack([sample]).to(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            tower = median_ms(lambda: model.vision(batch.views), device, repeats, warmup)
            first = median_ms(lambda: list(model.generate(sample, max_new_tokens=1)), device, repeats, warmup)
            more = median_ms(lambda: list(model.generate(sample, max_new_tokens=answers)), device, repeats, warmup)
            lines.append([name, f"{side} x {side}", str(len(batch.views) - 1), f"{len(batch.views) / tower * 1e3:.1f}",
                          f"{first / 1e3:.3f}", f"{1e3 * (answers - 1) / (more - first):.1f}",
                          f"{peak_memory(device) / 1e9:.2f}"])
            for rule in ("paper", "official") if full else ("paper",):
                kept = {}
                cut = slice_image(image, rule=rule, global_view="squash", crop_size=size)
                batch = Batch.pack([replace(sample, images=[cut])]).to(device)
                features = model.vision(batch.views)
                for gamma in (1.0, 0.75, 0.5):
                    visual = model.see(batch, gamma=gamma, features=features)
                    kept[gamma] = model.adapter.num_tokens + 1 + int(visual.keep.sum())
                tiling = (1 + len(cut.crops)) * model.adapter.num_tokens
                counts.append([name, f"{side} x {side}", rule, str(len(cut.crops)), str(tiling),
                               *(str(count) for count in kept.values()), f"{tiling / kept[0.75]:.1f}"])
        prompts = [model.asked(None, question + " " * i) for i in range(8)]  # the language model alone, 8 questions
        one_by_one = median_ms(lambda: [list(model.generate(one, max_new_tokens=answers)) for one in prompts], device,
                               repeats, warmup)
        at_once = median_ms(lambda: model.generate_batch(prompts, max_new_tokens=answers), device, repeats, warmup)
        together.append([name, *(f"{1e3 * len(prompts) * answers / ms:.1f}" for ms in (one_by_one, at_once)),
                         f"{one_by_one / at_once:.2f}"])
        del model
    print("\none question about one image, greedy; the first token includes encoding the image")
    memory = "peak GB" if device.type == "cuda" else "peak GB, process so far"
    print_table(["model", "image", "crops", "views/s in the tower", "first token s", "tokens/s after it", memory], lines)
    print(f"\n8 questions without an image, {answers} tokens of answer each: tokens/s of all together")
    print_table(["model", "one by one", "generate_batch", "ratio"], together)
    print("\nvisual tokens, global view and separator included; weights are not trained, so what the router keeps\n"
          "at a gamma shows the size of the cut, not what a trained model would keep")
    print_table(["model", "image", "grid rule", "crops", "uncompressed tiling", "gamma 1", "0.75", "0.5",
                 "tiling / 0.75"], counts)


# --- training ---

def training_batch(model: SliME, samples: int, seed: int = 0) -> Batch:
    """A step of the tiny preset's stage III."""
    share = Steps(TrainingSet(3, seed), None, model.config.template, "both", model, samples, 1)[0]
    return share.batches[0]


def padded_hidden(model: SliME, embeddings: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The language model on samples padded to the longest: packed embeddings [T, D] -> hidden states [T, D]."""
    rows = nn.utils.rnn.pad_sequence(embeddings.split(lengths), batch_first=True)            # [B, longest, D]
    mask = torch.arange(rows.shape[1], device=rows.device) < torch.tensor(lengths, device=rows.device)[:, None]
    hidden = model.llm.get_decoder()(inputs_embeds=rows, attention_mask=mask.long(), use_cache=False)
    return hidden.last_hidden_state[mask]


def gradient_step(name: str, folder: str, samples: int) -> Callable[[], tuple[float, int]]:
    """One way to compute a training step's gradients, as a function that does it: -> loss, real tokens."""
    model = SliME.from_pretrained(folder).eval()                                 # no noise: equal losses
    padded, everywhere, ten = (word in name for word in ("padded batch", "every logit", "ten views"))
    if padded:
        model.llm.set_attn_implementation("sdpa")
    model.vision.requires_grad_(False)
    batch = training_batch(model, samples)

    def step() -> tuple[float, int]:
        if ten:  # the released code's collator fills every image up to ten views; the tower encodes them all
            missing = 10 * len(batch.grids) - len(batch.views)
            model.vision(batch.views.new_zeros(missing, *batch.views.shape[1:]))
        embeddings, labels, lengths = model.embed(batch, model.see(batch))
        hidden = padded_hidden(model, embeddings, lengths) if padded else model.decode(embeddings, lengths)
        ends = torch.tensor(lengths).cumsum(0) - 1
        following = labels.roll(-1).index_fill(0, ends, IGNORE)                  # [T]: what each position predicts
        if not everywhere:
            kept = torch.nonzero(following != IGNORE)[:, 0]
            hidden, following = hidden[kept], following[kept]
        logits = model.llm.get_output_embeddings()(hidden)
        loss = F.cross_entropy(logits.float(), following, ignore_index=IGNORE)
        loss.backward()
        return loss.item(), len(embeddings)

    return step


def peak_of_step(name: str, folder: str, samples: int) -> float:
    """GB of resident memory that a step adds at its peak, in a process of its own."""
    step = gradient_step(name, folder, samples)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9


TRAIN_VARIANTS = ("sliming: packed, supervised logits, real views", "every logit", "ten views", "padded batch",
                  "padded batch, every logit, ten views")


def training(device: torch.device, out: Path, samples: int = 16, repeats: int = 9) -> None:
    """A training step beside the obvious alternatives, on the CPU; on a GPU also the 8B shapes, every stage."""
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder)
        peaks = {}
        for name in TRAIN_VARIANTS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                peaks[name] = pool.submit(peak_of_step, name, folder, samples).result()
        steps = {name: gradient_step(name, folder, samples) for name in TRAIN_VARIANTS}
    losses, tokens = zip(*(step() for step in steps.values()))
    if max(losses) - min(losses) > 1e-4:
        raise RuntimeError(f"the ways give different losses: {losses}")
    times = medians_ms(steps, torch.device("cpu"), repeats, 1)
    best = times[TRAIN_VARIANTS[0]]
    print(f"\nforward and backward of a step of the tiny preset's stage III, {samples} records, on the CPU; equal losses")
    print_table(["way", "ms", "real tokens/s", "times ours", "GB at the peak, model aside"],
                [[name, f"{ms:.0f}", f"{1e3 * tokens[0] / ms:.0f}", f"{ms / best:.2f}", f"{peaks[name]:.2f}"]
                 for name, ms in times.items()])
    if device.type == "cuda":
        full_size(device)
    else:
        print("not run: 8B shapes, stages I, II, III and LoRA: needs a CUDA device")


def full_size(device: torch.device, build: Callable[[], SliME] | None = None, steps: int = 6) -> None:
    """Stages I, II, III and III with LoRA on 8B shapes (4 layers of tower and LLM) in bfloat16, one GPU, pictures of
    1344 x 1008: tokens per second, MFU (forward and backward, without recomputation), peak memory."""
    rows, build = [], build or (lambda: eight_billion(4, torch.device("cuda")))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1008, 1344, 3), dtype=np.uint8))
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a number, " * 20}]
    records = [{"id": str(index), "image": picture, "conversations": turns} for index in range(16 * steps)]
    for stage, lora in ((1, False), (2, False), (3, False), (3, True)):
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
        model = build()
        model.config.template = "chat"
        config = TrainConfig(preset="llama3-8b-lora" if lora else "llama3-8b", shard="none")
        groups = prepare(model, config, stage, device, None)
        parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer, elapsed, done = torch.optim.AdamW(groups, weight_decay=0.0), [], []
        states = States(Path("nowhere"), model, optimizer, {}, 1)
        for share in Steps(records, None, "chat", STAGES[stage].parts, model, 16, steps, token_budget=16384):
            began = time.perf_counter()
            row = one_step(model.train(), share, STAGES[stage].parts, parameters, parameters, device, True, 0, states)
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            elapsed.append(time.perf_counter() - began)
            done.append(row)
        median = statistics.median(elapsed[1:])
        peak = peak_flops(device) or math.nan
        rows.append([f"{stage}{' LoRA' if lora else ''}", f"{done[-1]['tokens'] / median:.0f}",
                     f"{100 * done[-1]['flops'] / median / peak:.1f} %", f"{memory(device):.1f}"])
        del model, groups, parameters, optimizer, states
    print("\n8B shapes, 4 layers of tower and language model, bfloat16, activations recomputed, global batch 16")
    print_table(["stage", "tokens/s", "MFU", "peak GB"], rows)


# --- data ---

def data_side(path: str) -> tuple[float, float]:
    """In a process of its own: seconds to open a file of records and read the first, GB resident that it adds with 2,000
    records read in training's order."""
    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9

    before, began = resident(), time.perf_counter()
    records = open_mixture([path], seed=0)
    records[0]
    ready = time.perf_counter() - began
    for place in range(2000):
        records[place]
    return ready, resident() - before


def data(device: torch.device, out: Path, count: int = 2_000_000) -> None:
    """Starting on a file of two million records: the first time, and every time after it."""
    turn = {"from": "human", "value": "<image>\nWhat is shown?"}
    with tempfile.TemporaryDirectory() as folder:
        for name, begin, between, end in (("records.jsonl", "", "\n", "\n"), ("records.json", "[", ",\n", "]\n")):
            path = Path(folder) / name
            with open(path, "w") as file:
                file.write(begin)
                for index in range(count):
                    answer = {"from": "gpt", "value": f"picture {index} " * (1 + index % 20)}
                    record = {"id": str(index), "image": f"{index}.jpg", "conversations": [turn, answer]}
                    file.write((between if index else "") + json.dumps(record))
                file.write(end)
            rows = []
            for _ in range(2):
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    rows.append(pool.submit(data_side, str(path)).result())
            print(f"{name}: {count:,} records, {path.stat().st_size / 1e9:.2f} GB; first start {rows[0][0]:.1f} s, later "
                  f"{rows[1][0]:.2f} s; the data side adds {1e3 * rows[1][1]:.0f} MB of resident memory", flush=True)
            path.unlink()


# name -> what it measures: called with the device and the folder for plots
SUBJECTS: dict[str, Callable[[torch.device, Path], None]] = {
    "attention": attention, "inference": inference, "train": training, "data": data}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sliming.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=SUBJECTS, required=True, help="what to measure")
    parser.add_argument("--out", type=Path, default=Path("out/bench"),
                        help="folder for the plots (default: out/bench)")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    args.out.mkdir(parents=True, exist_ok=True)
    print(device_line(device), flush=True)
    SUBJECTS[args.what](device, args.out)


if __name__ == "__main__":
    main()
