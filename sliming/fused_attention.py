"""Cross-attention of shared queries to every crop: one Triton kernel forward, two backward.

For each crop b and head h, with queries q_n and key biases c_l that are the same for every crop:

    k'_bl = k_bl + c_l             S_bnl  = s q_n . k'_bl, s = 1 / sqrt(Dh)
    P_bnl = exp(S_bnl - lse_bn)    lse_bn = log sum_l exp(S_bnl)             o_bn = sum_l P_bnl v_bl

and with do_bn = d loss / d o_bn, from the product rule and the softmax's Jacobian:

    delta_bn = do_bn . o_bn                        dS_bnl = P_bnl (do_bn . v_bl - delta_bn)
    dv_bl = sum_n P_bnl do_bn                      dq_n = s sum_b sum_l dS_bnl k'_bl
    dk_bl = s sum_n dS_bnl q_n                     dc_l = sum_b dk_bl

No [Nq, L] matrix reaches memory. The forward pass walks over blocks of keys with a running maximum
m and a running sum t of exp(S - m); whenever m grows, t and the output so far shrink by
exp(m_old - m_new) (online softmax). It keeps o and lse only; the backward pass makes P again from
lse. Exponentials are to base 2, the hardware's own.

A program is a group of warps that owns a tile of the result, which it writes once:

    forward_kernel   owns (queries, head, crop)     loops over keys               writes o, lse
    dq_kernel        owns (queries, head, split)    loops over crops, then keys   writes delta, dq
    dkdv_kernel      owns (keys, head, crop)        loops over queries            writes dk, dv

A split is every SPLITS-th crop: dq has no crop axis, so its owner adds crops up in order, and torch
adds the splits' sums. Nothing is added atomically, so equal inputs give equal bits. dq_kernel meets
every (crop, query) once and runs before dkdv_kernel, so it is the one that writes delta. Counts,
tiles, registers and why c is added to keys: "The query former's kernel" in README.md.

Shapes: B crops, H heads, Nq queries, L keys (patches of a crop), Dh channels of a head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_SIZES = (32, 64, 128)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTERPRETED = triton.knobs.runtime.interpret     # TRITON_INTERPRET=1: in numpy on the CPU
EMULATED = tl.constexpr(INTERPRETED)
LOG2_E = tl.constexpr(1.4426950408889634)


def configs(*choices: tuple[int, int, int], block: str) -> list[triton.Config]:
    """(size of `block`, warps, stages) -> what autotuning tries; interpreted, only the first."""
    return [triton.Config({block: size}, num_warps=warps, num_stages=stages)
            for size, warps, stages in (choices[:1] if INTERPRETED else choices)]


def suited(choices: list[triton.Config], _, MAIN: int, PRECISION: str,
           **rest) -> list[triton.Config]:
    """Those whose tiles fit the registers: 8 warps for 128 rows and for float32, which also takes
    small blocks, else 4."""
    exact = PRECISION == "ieee"
    return [choice for choice in choices if choice.num_warps == (8 if MAIN == 128 or exact else 4)
            and (not exact or choice.kwargs["BLOCK_L"] == 32)]


def query_tiles(num_queries: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """(MAIN, TAIL, programs) that cover Nq rows at the least cost, in rows.

    A program costs its rows, padding included, and its loads of k and v, which take as long as the
    products of about 100 rows (L2 at 5.5 TB/s against 600 TFLOP/s).
    """
    # float32 products do not run on tensor cores: small tiles, or registers overflow.
    mains = (16, 32) if dtype == torch.float32 else (16, 32, 64, 128)
    pairs = [(main, tail) for main in mains for tail in (0, 16, 32) if tail < main]
    plans = [(main, tail, -(-num_queries // (main + tail))) for main, tail in pairs]
    return min(plans, key=lambda plan: (plan[0] + plan[1] + 100) * plan[2])


def precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies: float32 exactly, as its default, TF32, has 10 of 23 mantissa bits."""
    return "ieee" if dtype == torch.float32 else "tf32"        # no effect on 2-byte numbers


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """a @ b + acc in float32."""
    if EMULATED:                     # numpy has no bfloat16; float32 holds its values
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_rows(pointer, rows, count, stride, DH: tl.constexpr):
    """Rows of a [count, DH] matrix with contiguous channels; rows beyond count are zeros."""
    offsets = rows[:, None] * stride + tl.arange(0, DH)[None, :]
    return tl.load(pointer + offsets, mask=rows[:, None] < count, other=0.0)


@triton.jit
def store_rows(pointer, tile, rows, count, stride, DH: tl.constexpr):
    offsets = rows[:, None] * stride + tl.arange(0, DH)[None, :]
    tl.store(pointer + offsets, tile.to(pointer.dtype.element_ty), mask=rows[:, None] < count)


@triton.jit
def load_keys(K, C, h, rows, L, stride, DH: tl.constexpr, BIAS: tl.constexpr):
    """A block of one crop's keys k' = k + c; K points at the crop's head, C at [H, L, DH]."""
    k = load_rows(K, rows, L, stride, DH)
    if BIAS:
        k = (k.to(tl.float32)
             + load_rows(C + h * L * DH, rows, L, DH, DH).to(tl.float32)).to(k.dtype)
    return k


@triton.jit
def softmax_step(q, k, v, valid, top, total, acc, scale, PRECISION: tl.constexpr):
    """One block of keys for a tile of queries: running maximum, running sum, output so far."""
    s = dot(q, tl.trans(k), None, PRECISION) * (scale * LOG2_E)    # [rows, BLOCK_L]
    s = tl.where(valid[None, :], s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))            # finite: the first block has a valid key
    p = tl.exp2(s - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    acc = dot(p.to(v.dtype), v, acc * shrink[:, None], PRECISION)
    return new_top, total * shrink + tl.sum(p, 1), acc


@triton.jit
def finish_softmax(OUT, LSE, top, total, acc, rows, NQ, stride, DH: tl.constexpr):
    store_rows(OUT, acc / total[:, None], rows, NQ, stride, DH)
    tl.store(LSE + rows, top + tl.log2(total), mask=rows < NQ)


@triton.autotune(configs((32, 8, 2), (32, 8, 3), (64, 8, 2), (32, 4, 2), (64, 4, 2),
                         block="BLOCK_L"),
                 key=["NQ", "L", "DH"], prune_configs_by={"early_config_prune": suited})
@triton.jit
def forward_kernel(Q, K, V, C, OUT, LSE, scale, H, NQ, L, TILES,
                   k_crop, k_head, k_row, v_crop, v_head, v_row,
                   DH: tl.constexpr, BIAS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
                   PRECISION: tl.constexpr, BLOCK_L: tl.constexpr):
    """Q [H, NQ, DH], K, V [B, H, L, DH] with strides -> OUT [B, NQ, H, DH], LSE [B, H, NQ]."""
    index = tl.program_id(0)         # neighbours have one crop and head, and share its L2
    h = (index // TILES) % H
    b = (index // (TILES * H)).to(tl.int64)  # from 3,641 crops on, offsets pass 2^31
    K += b * k_crop + h * k_head
    V += b * v_crop + h * v_head
    OUT += (b * NQ * H + h) * DH
    LSE += (b * H + h) * NQ
    rows = (index % TILES) * (MAIN + TAIL) + tl.arange(0, MAIN)
    q = load_rows(Q + h * NQ * DH, rows, NQ, DH, DH)
    top = tl.full([MAIN], float("-inf"), tl.float32)
    total = tl.zeros([MAIN], tl.float32)
    acc = tl.zeros([MAIN, DH], tl.float32)
    if TAIL:
        tail_rows = (index % TILES) * (MAIN + TAIL) + MAIN + tl.arange(0, TAIL)
        tail_q = load_rows(Q + h * NQ * DH, tail_rows, NQ, DH, DH)
        tail_top = tl.full([TAIL], float("-inf"), tl.float32)
        tail_total = tl.zeros([TAIL], tl.float32)
        tail_acc = tl.zeros([TAIL, DH], tl.float32)
    for start in range(0, L, BLOCK_L):
        keys = start + tl.arange(0, BLOCK_L)
        k = load_keys(K, C, h, keys, L, k_row, DH, BIAS)
        v = load_rows(V, keys, L, v_row, DH)
        top, total, acc = softmax_step(q, k, v, keys < L, top, total, acc, scale, PRECISION)
        if TAIL:
            tail_top, tail_total, tail_acc = softmax_step(
                tail_q, k, v, keys < L, tail_top, tail_total, tail_acc, scale, PRECISION)
    finish_softmax(OUT, LSE, top, total, acc, rows, NQ, H * DH, DH)
    if TAIL:
        finish_softmax(OUT, LSE, tail_top, tail_total, tail_acc, tail_rows, NQ, H * DH, DH)


@triton.jit
def load_crop(OUT, DOUT, LSE, DELTA, rows, NQ, stride, DH: tl.constexpr):
    """One tile's do, lse and delta = do . o of one crop; delta is also written, for dkdv_kernel."""
    do = load_rows(DOUT, rows, NQ, stride, DH)
    o = load_rows(OUT, rows, NQ, stride, DH)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    tl.store(DELTA + rows, delta, mask=rows < NQ)
    return do, tl.load(LSE + rows, mask=rows < NQ, other=0.0), delta


@triton.jit
def dq_step(q, do, k, v, valid, lse, delta, dq, scale, PRECISION: tl.constexpr):
    """Adds one block of keys to dq / scale of one tile of queries."""
    s = dot(q, tl.trans(k), None, PRECISION) * (scale * LOG2_E)    # [rows, BLOCK_L]
    # Keys beyond L score 0, and exp2(0 - lse) may overflow: set to zero, not only multiplied by it.
    p = tl.where(valid[None, :], tl.exp2(s - lse[:, None]), 0.0)
    ds = p * (dot(do, tl.trans(v), None, PRECISION) - delta[:, None])
    return dot(ds.to(k.dtype), k, dq, PRECISION)


@triton.autotune(configs((32, 8, 2), (64, 8, 2), (32, 4, 2), (64, 4, 2), block="BLOCK_L"),
                 key=["NQ", "L", "DH"], prune_configs_by={"early_config_prune": suited})
@triton.jit
def dq_kernel(Q, K, V, C, OUT, DOUT, LSE, DELTA, DQ, scale, B, H, NQ, L, TILES, SPLITS,
              k_crop, k_head, k_row, v_crop, v_head, v_row,
              DH: tl.constexpr, BIAS: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
              PRECISION: tl.constexpr, BLOCK_L: tl.constexpr):
    """Writes DELTA [B, H, NQ] and DQ [SPLITS, H, NQ, DH], float32."""
    index = tl.program_id(0)
    h = (index // TILES) % H
    split = index // (TILES * H)
    rows = (index % TILES) * (MAIN + TAIL) + tl.arange(0, MAIN)
    q = load_rows(Q + h * NQ * DH, rows, NQ, DH, DH)
    dq = tl.zeros([MAIN, DH], tl.float32)
    if TAIL:
        tail_rows = (index % TILES) * (MAIN + TAIL) + MAIN + tl.arange(0, TAIL)
        tail_q = load_rows(Q + h * NQ * DH, tail_rows, NQ, DH, DH)
        tail_dq = tl.zeros([TAIL, DH], tl.float32)
    for crop in range(split, B, SPLITS):
        b = tl.cast(crop, tl.int64)
        here = (b * NQ * H + h) * DH                   # of OUT and DOUT [B, NQ, H, DH]
        line = (b * H + h) * NQ                        # of LSE and DELTA [B, H, NQ]
        do, lse, delta = load_crop(OUT + here, DOUT + here, LSE + line, DELTA + line,
                                   rows, NQ, H * DH, DH)
        if TAIL:
            tail_do, tail_lse, tail_delta = load_crop(
                OUT + here, DOUT + here, LSE + line, DELTA + line, tail_rows, NQ, H * DH, DH)
        for start in range(0, L, BLOCK_L):
            keys = start + tl.arange(0, BLOCK_L)
            k = load_keys(K + b * k_crop + h * k_head, C, h, keys, L, k_row, DH, BIAS)
            v = load_rows(V + b * v_crop + h * v_head, keys, L, v_row, DH)
            dq = dq_step(q, do, k, v, keys < L, lse, delta, dq, scale, PRECISION)
            if TAIL:
                tail_dq = dq_step(tail_q, tail_do, k, v, keys < L, tail_lse, tail_delta, tail_dq,
                                  scale, PRECISION)
    DQ += (split * H + h).to(tl.int64) * NQ * DH
    store_rows(DQ, dq * scale, rows, NQ, DH, DH)
    if TAIL:
        store_rows(DQ, tail_dq * scale, tail_rows, NQ, DH, DH)


@triton.autotune(configs((16, 4, 2), (16, 4, 3), (32, 4, 2), (32, 8, 2), block="BLOCK_N"),
                 key=["NQ", "L", "DH"])
@triton.jit
def dkdv_kernel(Q, K, V, C, DOUT, LSE, DELTA, DK, DV, scale, H, NQ, L, TILES,
                k_crop, k_head, k_row, v_crop, v_head, v_row,
                DH: tl.constexpr, BIAS: tl.constexpr, BLOCK_L: tl.constexpr,
                PRECISION: tl.constexpr, BLOCK_N: tl.constexpr):
    """Writes DK and DV [B, L, H, DH]. Scores are transposed: sums over queries are products."""
    index = tl.program_id(0)
    h = (index // TILES) % H
    b = (index // (TILES * H)).to(tl.int64)
    keys = (index % TILES) * BLOCK_L + tl.arange(0, BLOCK_L)
    k = load_keys(K + b * k_crop + h * k_head, C, h, keys, L, k_row, DH, BIAS)
    v = load_rows(V + b * v_crop + h * v_head, keys, L, v_row, DH)
    dk = tl.zeros([BLOCK_L, DH], tl.float32)
    dv = tl.zeros([BLOCK_L, DH], tl.float32)
    for start in range(0, NQ, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        # Rows beyond NQ have q = do = lse = delta = 0, so p = 1 meets do = 0 and ds = 0.
        q = load_rows(Q + h * NQ * DH, rows, NQ, DH, DH)
        do = load_rows(DOUT + (b * NQ * H + h) * DH, rows, NQ, H * DH, DH)
        lse = tl.load(LSE + (b * H + h) * NQ + rows, mask=rows < NQ, other=0.0)
        delta = tl.load(DELTA + (b * H + h) * NQ + rows, mask=rows < NQ, other=0.0)
        s = dot(k, tl.trans(q), None, PRECISION) * (scale * LOG2_E)    # [BLOCK_L, BLOCK_N]
        p = tl.exp2(s - lse[None, :])  # may overflow for keys beyond L, rows that nobody stores
        dv = dot(p.to(do.dtype), do, dv, PRECISION)
        ds = p * (dot(v, tl.trans(do), None, PRECISION) - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    here = (b * L * H + h) * DH
    store_rows(DK + here, dk * scale, keys, L, H * DH, DH)
    store_rows(DV + here, dv, keys, L, H * DH, DH)


def shared_arguments(q: Tensor, key_bias: Tensor | None) -> dict:
    """The kernels' compile-time arguments that follow from the tensors."""
    return {"DH": q.shape[-1], "BIAS": key_bias is not None, "PRECISION": precision(q.dtype)}


# Operators of torch, so that torch.compile and autograd see one node each and need not look inside.
@torch.library.custom_op("sliming::query_attention", mutates_args=())
def forward_op(q: Tensor, k: Tensor, v: Tensor,
               key_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """-> out [B, Nq, H, Dh] in q's dtype, logsumexp to base 2 float32 [B, H, Nq]."""
    (heads, queries, width), (crops, _, patches, _) = q.shape, k.shape
    out = q.new_empty(crops, queries, heads, width)
    lse = q.new_empty(crops, heads, queries, dtype=torch.float32)
    main, tail, tiles = query_tiles(queries, q.dtype)
    if crops:
        forward_kernel[(crops * heads * tiles,)](
            q, k, v, key_bias, out, lse, width**-0.5, heads, queries, patches, tiles,
            *k.stride()[:3], *v.stride()[:3], MAIN=main, TAIL=tail, **shared_arguments(q, key_bias))
    return out, lse


@torch.library.custom_op("sliming::query_attention_backward", mutates_args=())
def backward_op(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, out: Tensor, lse: Tensor,
                dout: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-> dq [H, Nq, Dh], dk and dv [B, L, H, Dh], in q's dtype."""
    (heads, queries, width), (crops, _, patches, _) = q.shape, k.shape
    dk, dv = (q.new_empty(crops, patches, heads, width) for _ in range(2))
    if crops == 0:
        return torch.zeros_like(q), dk, dv
    arguments = shared_arguments(q, key_bias)
    main, tail, tiles = query_tiles(queries, q.dtype)
    # Two programs per multiprocessor: fixed for a device, and with it the order of the sum.
    units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    splits = min(crops, -(-2 * units // (heads * tiles)))
    dq = q.new_empty(splits, heads, queries, width, dtype=torch.float32)
    delta = torch.empty_like(lse)
    dq_kernel[(splits * heads * tiles,)](
        q, k, v, key_bias, out, dout, lse, delta, dq, width**-0.5, crops, heads, queries, patches,
        tiles, splits, *k.stride()[:3], *v.stride()[:3], MAIN=main, TAIL=tail, **arguments)
    block = 32 if q.dtype == torch.float32 else 64
    blocks = -(-patches // block)
    dkdv_kernel[(crops * heads * blocks,)](
        q, k, v, key_bias, dout, lse, delta, dk, dv, width**-0.5, heads, queries, patches, blocks,
        *k.stride()[:3], *v.stride()[:3], BLOCK_L=block, **arguments)
    return dq.sum(0).to(q.dtype), dk, dv


@forward_op.register_fake
def _(q, k, v, key_bias):
    heads, queries, width = q.shape
    return (q.new_empty(k.shape[0], queries, heads, width),
            q.new_empty(k.shape[0], heads, queries, dtype=torch.float32))


@backward_op.register_fake
def _(q, k, v, key_bias, out, lse, dout):
    crops, heads, patches, width = k.shape
    dk, dv = (q.new_empty(crops, patches, heads, width) for _ in range(2))
    return torch.empty_like(q), dk, dv


def save_for_backward(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, *output)


def backward(ctx, dout: Tensor, _):
    q, k, v, key_bias, out, lse = ctx.saved_tensors
    dq, dk, dv = backward_op(q, k, v, key_bias, out, lse, dout.contiguous())
    dc = None if key_bias is None else dk.sum(0).transpose(0, 1)               # [H, L, Dh]
    return dq, dk.transpose(1, 2), dv.transpose(1, 2), dc


forward_op.register_autograd(backward, setup_context=save_for_backward)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None) -> Tensor:
    """The attention of the module docstring; arguments and result as in `qformer.query_attention`.

    Needs a CUDA device or Triton's interpreter, one of DTYPES for all, Dh in HEAD_SIZES and L >= 1.
    """
    # Views of [B, L, D] projections are read as they are, unless their channels are strided.
    k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
    key_bias = None if key_bias is None else key_bias.contiguous()
    out, _ = forward_op(q.contiguous(), k, v, key_bias)
    return out.flatten(2)                              # [B, Nq, H*Dh]
