"""The query former's attention beside named peers, forward and backward: the bare attention and
the whole query former, on crops of 24 x 24 patches.

Before each timing, output and gradients are compared with those of the plain form in float32. FLOP
and bytes are those of fused_attention.py and qformer.py for every method, so that TFLOP/s and TB/s
order as times do. On a GPU times are the device's alone, its queue kept full; "launched" is both
passes as an idle GPU gets them, which on few crops waits for the host.

Legend: B crops, L patches of a crop, Nq queries, D channels, H heads of Dh. A bare attention takes
q [H, Nq, Dh], the same for every crop, and k, v [B, H, L, Dh], and gives [B, Nq, D].
"""

import copy
import math
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from sliming.backbones import cast
from sliming.bench.timing import copy_bandwidth, device_line, medians_ms, show
from sliming.qformer import QueryFormer, query_attention
from sliming.watch import peak_memory

# -------------------------------------------------------------------------------------------- peers


def terms(former: QueryFormer, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [Nq, D], k and v [B, L, D] of qformer.py's equations, with one LayerNorm for k and v."""
    position, patches = former.position.to(x.dtype), former.ln_kv(x)
    keys = patches + former.to_patch_grid(position, x.shape[1])
    return former.ln_q(former.query) + position, keys, patches


def straightforward(former: QueryFormer, x: Tensor) -> Tensor:
    """The query former unfolded, with torch's attention on every device."""
    q, k, v = terms(former, x)
    q, k, v = map(former.split_heads, (former.w_q(q), former.w_k(k), former.w_v(v)))
    return former.ln_post(former.w_o(query_attention(q, k, v, attention="sdpa")))


def released(former: QueryFormer, x: Tensor) -> Tensor:
    """As the released code computes it (llava/model/multimodal_resampler/sampler.py):
    nn.MultiheadAttention, the queries repeated for every crop before their projection, and the
    attention weights asked for."""
    q, k, v = terms(former, x)
    q, k, v = q[:, None].repeat(1, len(x), 1), k.transpose(0, 1), v.transpose(0, 1)  # [N, B, D]
    # nn.MultiheadAttention's forward is this call, its three projections packed in one weight.
    out, _ = F.multi_head_attention_forward(
        q, k, v, q.shape[-1], former.num_heads,
        torch.cat([former.w_q.weight, former.w_k.weight, former.w_v.weight]),
        torch.cat([former.w_q.bias, former.w_k.bias, former.w_v.bias]),
        None, None, False, 0.0, former.w_o.weight, former.w_o.bias, need_weights=True)
    return former.ln_post(out.transpose(0, 1))


def repeated_weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """nn.MultiheadAttention's when weights are asked for: [B, H, Nq, L] in memory."""
    q = q[None].repeat(len(k), 1, 1, 1) * q.shape[-1]**-0.5                    # [B, H, Nq, Dh]
    return ((q @ k.transpose(2, 3)).softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def expanded(attention: Callable) -> Callable:
    """An attention on q [B, H, Nq, Dh] as one on shared queries."""
    return lambda q, k, v: attention(q.expand(len(k), *q.shape), k, v).transpose(1, 2).flatten(2)


def under(backend: SDPBackend, run: Callable) -> Callable:
    """`run` with scaled_dot_product_attention held to one backend."""
    def held(*inputs):
        with sdpa_kernel(backend):
            return run(*inputs)
    return held


def peers(device: torch.device, former: QueryFormer,
          compiled: bool = True) -> tuple[dict, dict, list[str]]:
    """-> bare attentions (q, k, v), whole query formers (x), what does not run here, and why.
    Without `compiled`, none that torch.compile takes its time for."""
    def whole(choice: str) -> QueryFormer:
        module = copy.copy(former)                     # the same parameters
        module.attention = choice
        return module

    sdpa, plain = expanded(F.scaled_dot_product_attention), partial(straightforward, former)
    bare = {"released way": repeated_weights, "SDPA math": under(SDPBackend.MATH, sdpa)}
    formers = {"released way": partial(released, former), "sliming, sdpa": whole("sdpa"),
               "straightforward, SDPA math": under(SDPBackend.MATH, plain)}
    if device.type == "cpu":
        bare["sliming, sdpa"] = partial(query_attention, attention="sdpa")
        formers["straightforward, SDPA"] = plain
        return bare, formers, [
            "sliming, triton: needs a CUDA device",
            "flex_attention: its CPU version has no backward pass",
            "torch.compile: minutes of compiling for a CPU version that no one trains with",
            "Nq 64, 196 and 576, D 1280, more than 8 crops: hours"]
    bare["sliming, triton"] = partial(query_attention, attention="triton")
    formers["sliming, triton"] = whole("triton")
    for name in ("flash", "efficient", "cudnn"):
        backend = getattr(SDPBackend, f"{name.upper()}_ATTENTION")
        bare[f"SDPA {name}"] = under(backend, sdpa)
        formers[f"straightforward, SDPA {name}"] = under(backend, plain)
    if not compiled:
        return bare, formers, []
    bare["released way, compiled"] = torch.compile(repeated_weights)
    bare["SDPA, compiled"] = torch.compile(sdpa)
    bare["flex_attention, compiled"] = torch.compile(expanded(flex_attention))
    formers["released way, compiled"] = torch.compile(lambda x: released(former, x))
    formers["straightforward, compiled"] = torch.compile(lambda x: straightforward(former, x))
    formers["sliming, triton, compiled"] = torch.compile(whole("triton"))
    return bare, formers, []


# ----------------------------------------------------------------------------- what is right, first


def results(run: Callable, inputs: tuple[Tensor, ...], leaves: list[Tensor]) -> list[Tensor]:
    """Output of `run(*inputs)`, and the gradients of `leaves` for a fixed one of the output: noise,
    as a smooth one is nearly constant over the channels, and LN_post's backward cancels that."""
    out = run(*inputs)
    generator = torch.Generator(out.device).manual_seed(0)
    cotangent = torch.randn(out.shape, generator=generator, device=out.device).bfloat16()
    return [out.detach(), *torch.autograd.grad(out, leaves, cotangent.to(out.dtype))]


def check(got: list[Tensor], expected: list[Tensor]) -> None:
    """RuntimeError unless each tensor is within rounding of the expected float32 one."""
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        # float32 rounds at 2^-24, bfloat16 at 2^-9, in sums of thousands that partly cancel.
        bound = 1e-4 if a.dtype == torch.float32 else 1e-1
        error = (a.float() - b).norm() / b.norm()
        if not error <= bound:
            raise RuntimeError(f"wrong: result {i} is off by {error:.2g} of its size")


def cases(former: QueryFormer, crops: int, patches: int) -> Iterator[tuple]:
    """-> "bare attention", then "query former": inputs, leaves, and the expected results."""
    queries, dim = former.query.shape
    like = {"device": former.query.device, "dtype": former.query.dtype}
    exact = cast(copy.deepcopy(former), torch.float32)
    x = torch.randn(crops, patches, dim, **like)
    qkv = [torch.randn(size, **like, requires_grad=True)
           for size in ((queries, dim), x.shape, x.shape)]
    exact_qkv = [tensor.detach().float().requires_grad_() for tensor in qkv]
    # b_k moves all scores of a query alike: its exact gradient is 0, what is computed is rounding.
    leaves, exact_leaves = ([p for name, p in module.named_parameters() if name != "w_k.bias"]
                            for module in (former, exact))
    heads, exact_heads = (tuple(map(former.split_heads, each)) for each in (qkv, exact_qkv))
    sdpa = under(SDPBackend.MATH, expanded(F.scaled_dot_product_attention))
    yield "bare attention", heads, qkv, results(sdpa, exact_heads, exact_qkv)
    plain = under(SDPBackend.MATH, exact.as_written)
    yield "query former", (x,), leaves, results(plain, (x.float(),), exact_leaves)


# ------------------------------------------------------------------------------- time and memory


def kept_bytes(run: Callable, inputs: tuple[Tensor, ...], former: QueryFormer) -> int:
    """Bytes that one forward pass keeps for the backward pass, besides inputs and parameters."""
    known = {t.untyped_storage().data_ptr()
             for t in (*inputs, *former.parameters(), *former.buffers())}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(*inputs)               # alive until the sum is taken: no address is reused
        total = sum(kept.values())
        del out
    return total


def peak_bytes(run: Callable, inputs: tuple[Tensor, ...], leaves: list[Tensor]) -> float:
    """Bytes that both passes allocate at their peak, gradients included; NaN on a CPU."""
    device = inputs[0].device
    if device.type != "cuda":
        return math.nan
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out = run(*inputs)
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    return 1e9 * peak_memory(device) - before


def measure(methods: dict[str, Callable], inputs: tuple[Tensor, ...], leaves: list[Tensor],
            former: QueryFormer) -> dict[str, dict]:
    """method -> median ms of the forward pass and of both, MB kept between the two, peak MB; on a
    GPU also ms of both as they are launched."""
    device = inputs[0].device
    cuda = device.type == "cuda"
    cotangent = torch.randn_like(next(iter(methods.values()))(*inputs))
    forward = {name: partial(run, *inputs) for name, run in methods.items()}
    both = {name: lambda run=run: torch.autograd.grad(run(*inputs), leaves, cotangent)
            for name, run in methods.items()}
    rows = {name: {"kept": kept_bytes(run, inputs, former) / 1e6,
                   "peak": peak_bytes(run, inputs, leaves) / 1e6} for name, run in methods.items()}
    for part, calls in (("forward", forward), ("both", both), ("launched", both))[:2 + cuda]:
        queued = cuda and part != "launched"
        for name, ms in medians_ms(calls, device, 15 if cuda else 11, queued=queued).items():
            rows[name][part] = ms
    return rows


def attention(device: torch.device, out: Path,
              shapes: list[tuple[int, int, tuple[int, ...]]] | None = None) -> None:
    """Prints tables, saves `out`/attention.png of the first of `shapes`: (D, Nq, numbers of
    crops)."""
    out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    cuda, patches = device.type == "cuda", 576
    dtype = torch.bfloat16 if cuda else torch.float32
    shapes = shapes or ([(1024, 144, (64, 192, 8, 512, 1)), (1024, 64, (64,)), (1024, 196, (64,)),
                         (1024, 576, (64,)), (1280, 144, (64,))] if cuda
                        else [(1024, 144, (1, 8))])
    bandwidth = copy_bandwidth(device)
    print(f"{str(dtype).removeprefix('torch.')}, L = {patches}; copying moves "
          f"{bandwidth / 1e12:.3f} TB/s")
    times, missing = {}, {}
    for dim, queries, crop_counts in shapes:
        former = cast(QueryFormer(dim, queries), dtype).to(device)
        bare, formers, skipped = peers(device, former, compiled=len(crop_counts) > 1)
        missing |= dict.fromkeys(skipped)
        for crops in crop_counts:
            for what, inputs, leaves, expected in cases(former, crops, patches):
                place, right = f"Nq {queries}, D {dim}, {crops} crops", {}
                for name, run in (bare if what == "bare attention" else formers).items():
                    try:
                        check(results(run, inputs, leaves), expected)
                        right[name] = run
                    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                        if name.startswith("sliming"):
                            raise
                        missing[f"{what}, {name}, {place}: {str(error).splitlines()[0]}"] = None
                del expected
                rows = measure(right, inputs, leaves, former)
                report(what, place, rows, (crops, queries, patches, dim), dtype, bandwidth)
                times[what, dim, queries, crops] = {name: row["both"] / crops
                                                    for name, row in rows.items()}
    for line in missing:
        print(f"not run: {line}")
    plot({key: row for key, row in times.items() if key[1:3] == shapes[0][:2]}, device_line(device),
         out / "attention.png")


# ------------------------------------------------------------------------------------- table, plot


def report(what: str, place: str, rows: dict[str, dict], shape: tuple[int, int, int, int],
           dtype: torch.dtype, bandwidth: float) -> None:
    """One table: times, rates, memory, and each method's time over our fastest. `shape`: crops, Nq,
    L, D."""
    crops, n, patches, d = shape
    bare = what == "bare attention"
    flop = crops * (14 * n * patches * d + (0 if bare else 8 * patches * d * d + 6 * n * d * d))
    moved = {"forward": 2 * patches + n, "both": 8 * patches + 4 * n}  # vectors of D, per crop
    ours = min(row["both"] for name, row in rows.items() if name.startswith("sliming"))
    header = ["method", "fwd ms", "bwd ms", "both ms", "/ ours", "TFLOP/s", "kept MB", "peak MB"]
    launched = "launched" in rows[next(iter(rows))]
    header += ["launched ms"] * launched
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["both"]):
        both = row["both"]
        line = [name, f"{row['forward']:.3f}", f"{both - row['forward']:.3f}", f"{both:.3f}",
                f"{both / ours:.2f}", f"{flop / both / 1e9:.3f}", f"{row['kept']:.1f}",
                f"{row['peak']:.1f}", *([f"{row['launched']:.3f}"] if launched else [])]
        if bare:
            forward, both = (crops * dtype.itemsize * d * count / (1e-3 * row[part])
                             for part, count in moved.items())
            line += [f"{forward / 1e12:.4f}", f"{forward / bandwidth:.0%}", f"{both / 1e12:.4f}"]
        lines.append([cell.replace("nan", "-") for cell in line])
    show(f"{what}: {place}", header + (["fwd TB/s", "of copy", "both TB/s"] if bare else []), lines)


def plot(times: dict, title: str, path: Path) -> None:
    """`times`: (what, D, Nq, crops) -> {method: ms per crop}; one panel for each (what, D, Nq)."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot as plt
    panels = sorted({key[:3] for key in times})
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 4.5 * len(panels)), squeeze=False,
                                layout="constrained")
    names = list(dict.fromkeys(name for methods in times.values() for name in methods))
    for axis, panel in zip(axes.flat, panels, strict=True):
        points = {key[3]: methods for key, methods in times.items() if key[:3] == panel}
        for number, name in enumerate(names):
            crops = [count for count, methods in points.items() if name in methods]
            if crops:
                axis.plot(crops, [points[count][name] for count in crops], "o-", label=name,
                          color=f"C{number % 10}", linewidth=3 if "sliming" in name else 1.2)
        axis.set(title="{}: D {}, Nq {}".format(*panel), xlabel="crops", xscale="log",
                 ylim=(0, None), ylabel="ms per crop, forward + backward")
        axis.set_xticks(list(points), list(points))
        axis.minorticks_off()
        axis.legend(fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"\nplot: {path}")
