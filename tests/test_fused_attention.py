"""The Triton kernels against the formula in float64: interpreted; compiled where there is a GPU.

Triton decides at import whether it interprets (TRITON_INTERPRET=1). So the tests of this file that
launch a kernel run in one child process with that variable set, started by test_interpreter, and on
a machine with a GPU in another that sees it, started by test_compiled. Anywhere the kernels are
compiled, for two GPU generations.

Shapes: B crops, H heads, Nq queries, L keys, Dh channels of a head.
"""

import math
import os
import re
import subprocess
import sys
import tempfile

import pytest
import torch

from sliming.qformer import QueryFormer, query_attention

triton = pytest.importorskip("triton", reason="Triton has no package for this platform")
from sliming import fused_attention as kernels  # noqa: E402

DEVICE = "cpu" if kernels.INTERPRETED else "cuda" if torch.cuda.is_available() else None
launches = pytest.mark.skipif(DEVICE is None,
                              reason="no GPU: test_interpreter runs this in a child process")
# Largest error allowed, as a part of the largest number. float32: sums in another order. float16
# and bfloat16 round p, ds and results at 2^-11 and 2^-8, and the roundings of a sum add up. Triton
# 3.9's interpreter truncates to bfloat16 where GPUs round to nearest: twice the error, of one sign.
BOUND = {torch.float32: 1e-5, torch.float16: 4e-3,
         torch.bfloat16: 4e-2 if kernels.INTERPRETED else 2e-2}
SHORT = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
SHAPES = [  # B, H, Nq, L, Dh: all Nq in 1, 7, 144, L in 1, 65, 576, Dh in 32, 64, 128, B in 0, 1, 3
    (0, 2, 7, 65, 32), (1, 2, 1, 1, 32), (3, 1, 7, 1, 64), (3, 2, 1, 65, 128), (3, 2, 7, 65, 32),
    (1, 1, 7, 576, 64), (2, 1, 144, 65, 32), (1, 1, 144, 576, 128), (1, 3, 33, 31, 64),
    (2, 1, 196, 40, 32)]


@pytest.fixture(autouse=True)
def poison():
    """Fresh memory is filled with NaN, so that a number that no kernel wrote cannot pass."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.ones(1).new_empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def first_choice(monkeypatch, request):
    """On a GPU each case compiles one choice of those that tuning compares; one test, all."""
    if DEVICE != "cuda" or request.node.originalname == "test_every_choice_of_tuning":
        return
    for kernel in (kernels.forward_kernel, kernels.dq_kernel):
        monkeypatch.setattr(kernel, "early_config_prune",
                            lambda *args, **more: kernels.suited(*args, **more)[:1])
    monkeypatch.setattr(kernels.dkdv_kernel, "configs", kernels.dkdv_kernel.configs[:1])


def make(B, H, Nq, L, Dh, dtype, scale=1.0, bias=True):
    """q, k, v, key bias and out's gradient; k and v are views of [B, L, H*Dh], as projected."""
    torch.manual_seed(B + H + Nq + L + Dh)
    q, c = torch.randn(H, Nq, Dh) * scale, torch.randn(H, L, Dh)
    k, v = (torch.randn(B, L, H, Dh).transpose(1, 2) for _ in range(2))
    dout = torch.randn(B, Nq, H * Dh)
    q, k, v, c, dout = (t.to(dtype).to(DEVICE) for t in (q, k, v, c, dout))
    leaves = [t.requires_grad_() for t in ((q, k, v, c) if bias else (q, k, v))]
    return leaves, dout


def twin(q, k, v, c=0.0, rounding=0.0):
    """The formula in fused_attention.py with its [B, H, Nq, L] matrix. ``rounding``: of k + c."""
    k = k + c + rounding
    scores = torch.einsum("hnd,bhld->bhnl", q, k) / math.sqrt(q.shape[-1])
    return torch.einsum("bhnl,bhld->bnhd", scores.softmax(dim=-1), v).flatten(2)     # [B, Nq, H*Dh]


def compare(leaves, dout, attend, looser=1.0):
    """Output and gradients of ``attend`` against the twin in float64, to ``looser`` times BOUND."""
    out = attend(*leaves)
    grads = torch.autograd.grad(out, leaves, dout)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    # The product takes k + c rounded to its dtype, as torch's does: no error of the kernel's.
    rounding = 0.0
    if len(leaves) == 4:
        rounding = (leaves[1] + leaves[3]).detach().double() - (exact[1] + exact[3]).detach()
    expected = twin(*exact, rounding=rounding)
    wanted = torch.autograd.grad(expected, exact, dout.double())
    crops, _, keys, _ = leaves[1].shape
    names = ("out", "dq", "dk", "dv", "dc")[:1 + len(leaves)]
    for name, got, want in zip(names, (out, *grads), (expected, *wanted), strict=True):
        assert got.shape == want.shape and got.dtype == leaves[0].dtype, name
        if want.numel() == 0:
            continue
        # No crop: dq and dc are 0. One key: the weight is 1 whatever the scores, so the exact dq,
        # dk and dc are 0, and the computed ones a difference of numbers near 1.
        size = 1.0 if crops == 0 or keys == 1 else want.abs().max().item()
        error = (got.double() - want).abs().max().item() / size
        assert error <= looser * BOUND[got.dtype], f"{name}: {error:.2g} of its largest number"


def same(results, others, bound=1e-5):
    """Two lists of tensors agree to ``bound`` of each largest number: sums in another order."""
    for i, (a, b) in enumerate(zip(results, others, strict=True)):
        assert (a - b).abs().max() <= bound * b.abs().max(), i


@launches
@pytest.mark.parametrize("dtype", BOUND, ids=SHORT.get)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_every_gradient(shape, dtype):
    leaves, dout = make(*shape, dtype)
    compare(leaves, dout, lambda *args: query_attention(*args, attention="triton"))


@launches
def test_every_choice_of_tuning():
    leaves, dout = make(2, 1, 144, 100, 128, torch.bfloat16)
    compare(leaves, dout, lambda *args: query_attention(*args, attention="triton"))


@launches
def test_without_key_bias_and_with_channels_apart():
    leaves, dout = make(2, 2, 7, 33, 32, torch.float32, bias=False)
    compare(leaves, dout, lambda *args: query_attention(*args, attention="triton"))
    q, k, v = leaves
    k, v = (t.detach().transpose(2, 3).contiguous().transpose(2, 3) for t in (k, v))
    assert k.stride(-1) == 33                          # L
    torch.testing.assert_close(query_attention(q, k, v, attention="triton"),
                               query_attention(*leaves, attention="triton"))


@launches
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", BOUND, ids=SHORT.get)
def test_extreme_logits(dtype, sign):
    """Scores of several hundred, where exp overflows unless the maximum is taken off first; and all
    far below 0, where exp(0 - lse) of the zeros that stand for keys beyond L overflows unless they
    are masked.

    Keys come in pairs of equal scores, as they differ only in channels where queries are 0: so two
    weights share the one, and gradients of scores do not vanish. No key bias: k + c truncated, not
    rounded (see BOUND), would move scores of this size by more than 1.
    """
    (q, k, v), dout = make(2, 1, 7, 66, 32, dtype, scale=100.0, bias=False)
    q, k = sign * q.detach().abs(), k.detach().abs()
    q[..., 24:] = 0
    k[:, :, 33:, :24] = k[:, :, :33, :24]
    leaves = [q.requires_grad_(), k.requires_grad_(), v]
    scores = sign * torch.einsum("hnd,bhld->bhnl", q.float(), k.float()) / math.sqrt(32)
    assert scores.min() > 100 and scores.max() > 300
    # A float32 score near 1000 is off by 1000 * 2^-24 = 6e-5 a rounding, and so is its weight.
    looser = 10 if dtype == torch.float32 else 1
    compare(leaves, dout, lambda *args: query_attention(*args, attention="triton"), looser)


@launches
def test_bits_repeat_and_crops_do_not_see_each_other():
    leaves, dout = make(3, 1, 33, 40, 32, torch.float32)
    first, second = ((out, *torch.autograd.grad(out, leaves, dout))
                     for out in (query_attention(*leaves, attention="triton") for _ in range(2)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    q, k, v, c = leaves
    assert torch.equal(query_attention(q, k[2:], v[2:], c, "triton")[0], first[0][2])


@launches
def test_query_former_on_both_paths_and_compiled_in_one_graph():
    (q, k, v, c), _ = make(2, 1, 7, 33, 32, torch.float32)
    torch.library.opcheck(kernels.forward_op, (q, k, v, c))
    former = QueryFormer(64, 36, num_heads=2).to(DEVICE)
    compiled = torch.compile(former, fullgraph=True, backend="aot_eager")
    x, cotangent = torch.randn(2, 25, 64, device=DEVICE), torch.randn(2, 36, 64, device=DEVICE)
    # W_k's bias moves a query's scores alike: its exact gradient is 0, the computed one rounding.
    parameters, results = [p for n, p in former.named_parameters() if n != "w_k.bias"], []
    for module, attention in ((former, "sdpa"), (former, "triton"), (compiled, "triton")):
        former.attention = attention
        out = module(x)
        results.append((out, *torch.autograd.grad(out, parameters, cotangent)))
    same(results[1], results[0])
    same(results[2], results[0])


@pytest.mark.skipif(kernels.INTERPRETED, reason="this is the child process")
def test_interpreter():
    """Runs this file's launching tests in a process of its own in which Triton interprets."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
                         env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) >= 3 * len(SHAPES), run.stdout[-1000:]


@pytest.mark.skipif(torch.version.cuda is None or "SLIMING_TEST_GPU" in os.environ
                    or kernels.INTERPRETED, reason="no GPU, or this is a child process")
def test_compiled():
    """Runs the launching tests on the machine's GPU, if any: others do not see it (conftest.py)."""
    environment = os.environ | {"SLIMING_TEST_GPU": "1"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    run = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__,
                          "-k", "not kernels_compile and not interpreter"],
                         env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-1000:]


# --- compiled without a GPU ---

def resources(kernel, dtype, capability, choice):
    """Shared memory of a program, and bytes of stack (what does not fit the registers) of a thread,
    compiled as the first call of the paper's shape would: 37 crops, 8 heads of 128, 144 queries,
    576 patches."""
    main, tail, tiles = kernels.query_tiles(144, dtype)
    block = 32 if dtype == torch.float32 else 64  # not tuned in dkdv_kernel: see backward_op
    constants = {"DH": 128, "BIAS": True, "MAIN": main, "TAIL": tail, "BLOCK_L": block,
                 "PRECISION": kernels.precision(dtype)} | choice.kwargs
    numbers = {"B": 37, "H": 8, "NQ": 144, "L": 576, "SPLITS": 33,
               "TILES": 576 // block if kernel is kernels.dkdv_kernel else tiles}
    for stride, n in (("crop", 576 * 1024), ("head", 128), ("row", 1024)):
        numbers |= {f"k_{stride}": n, f"v_{stride}": n}
    signature, values, attributes = {}, {}, {}
    # What Triton makes of a call's arguments: 1 and multiples of 16 are known.
    for i, name in enumerate(kernel.arg_names):
        value = constants.get(name, numbers.get(name))
        if name in constants or value == 1:
            signature[name], values[(i,)] = "constexpr", value
            continue
        pointer = "*fp32" if name in ("LSE", "DELTA", "DQ") else "*" + SHORT[dtype]
        signature[name] = "fp32" if name == "scale" else pointer if value is None else "i32"
        if name != "scale" and (value or 16) % 16 == 0:
            attributes[(i,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        triton.compiler.ASTSource(kernel.fn, signature, constexprs=values, attrs=attributes),
        target=triton.backends.compiler.GPUTarget("cuda", capability, 32),
        options={"num_warps": choice.num_warps, "num_stages": choice.num_stages})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name],
                              capture_output=True, text=True)
    return compiled.metadata.shared, int(re.search(r"STACK:(\d+)", used.stdout)[1])


@pytest.mark.skipif(kernels.INTERPRETED, reason="the interpreter does not compile")
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", BOUND, ids=SHORT.get)
@pytest.mark.parametrize("kernel", [kernels.forward_kernel, kernels.dq_kernel, kernels.dkdv_kernel],
                         ids=["forward", "dq", "dkdv"])
def test_kernels_compile(kernel, dtype, capability):
    """To machine code for A100 and H100, within the 163 KiB of shared memory that an A100 gives a
    program, and without spilling: the first choice at most 32 bytes a thread, the others, which
    tuning would not take, some hundred."""
    main, tail, _ = kernels.query_tiles(144, dtype)
    choices = kernel.configs
    if kernel is not kernels.dkdv_kernel:
        choices = kernels.suited(choices, None, MAIN=main, TAIL=tail,
                                 PRECISION=kernels.precision(dtype))
    assert choices
    for choice in choices if dtype == torch.bfloat16 else choices[:1]:
        shared, stack = resources(kernel, dtype, capability, choice)
        assert shared <= 163 * 1024, choice
        # float32 has no tensor cores, and its products need more registers: only where asked for.
        limit = 600 if dtype == torch.float32 else 32 if choice is choices[0] else 256
        assert stack <= limit, choice


# --- the choice ---

def test_tiles_cover_the_queries():
    assert kernels.query_tiles(144, torch.bfloat16) == (128, 16, 1)
    assert kernels.query_tiles(576, torch.bfloat16) == (128, 16, 4)
    for dtype in BOUND:
        for queries in range(1, 700):
            main, tail, programs = kernels.query_tiles(queries, dtype)
            assert (main + tail) * (programs - 1) < queries <= (main + tail) * programs
            assert main in (16, 32, 64, 128) and tail in (0, 16, 32)


@pytest.mark.skipif(DEVICE == "cpu", reason="in the interpreter it can run")
def test_forcing_triton_where_it_cannot_run_is_an_error():
    q, kv = torch.zeros(1, 2, 32), torch.zeros(1, 1, 3, 32)
    message = "'triton' cannot run here: it needs a CUDA device.* on cpu"
    with pytest.raises(ValueError, match=message):
        query_attention(q, kv, kv, attention="triton")
    former = QueryFormer(32, 4)
    former.attention = "triton"
    with pytest.raises(ValueError, match="cannot run here"):
        former(torch.zeros(1, 4, 32))
    message = "attention must be one of auto, sdpa, triton, got 'flash'"
    with pytest.raises(ValueError, match=message):
        query_attention(q, kv, kv, attention="flash")


@launches
def test_forcing_triton_on_sizes_it_does_not_take_is_an_error():
    for width, dtype in ((40, torch.float32), (32, torch.float64)):
        q = torch.zeros(1, 2, width, dtype=dtype, device=DEVICE)
        kv = torch.zeros(1, 1, 3, width, dtype=dtype, device=DEVICE)
        message = f"heads of 32, 64, 128 .* got {str(dtype)[6:]} and {width}"
        with pytest.raises(ValueError, match=message):
            query_attention(q, kv, kv, attention="triton")
        query_attention(q, kv, kv)                     # "auto" takes torch's own


def test_the_choice_on_a_gpu(monkeypatch):
    """The meta device stands for a GPU. `auto` takes the kernel in two-byte numbers and heads that
    it knows, SDPA else; what was asked for is checked where the tensors are, not where the model
    was built."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda t: t.device.type == "meta"))
    calls = []
    monkeypatch.setattr("sliming.qformer.fused_attention",
                        lambda *args: calls.append(args[0].dtype) or kernels.fused_attention(*args))
    former = QueryFormer(256, 16)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        on_gpu = QueryFormer(256, 16).to("meta", dtype)
        assert on_gpu(torch.empty(3, 64, 256, dtype=dtype, device="meta")).shape == (3, 16, 256)
    assert calls == [torch.bfloat16, torch.float16]
    q, kv = torch.empty(2, 4, 40, dtype=torch.bfloat16, device="meta"), torch.empty(
        1, 2, 9, 40, dtype=torch.bfloat16, device="meta")
    query_attention(q, kv, kv)
    assert len(calls) == 2
    former.attention = "triton"  # on the CPU, as training and sampling do before they move it
    assert former.to("meta")(torch.empty(3, 64, 256, device="meta")).shape == (3, 16, 256)
    assert calls[2:] == [torch.float32]
