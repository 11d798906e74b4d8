"""Query former: learnable queries condense a crop's patches (Sec. 2.2, "Local Feature
Compression").

    q = LN_q(M_Q) + pos              learnable queries M_Q, laid out on a grid of their own
    k = LN_kv(x) + pos'              pos' = pos resized bicubically to the grid of patches
    v = LN_kv(x)                     values carry no position
    y = LN_post(W_o attention(W_q q, W_k k, W_v v))

One cross-attention and nothing more: no residual, no feed-forward layer. The paper leaves these
details open; they are those of the released code (yfzhang114/SliME,
llava/model/multimodal_resampler/sampler.py), whose positions are rounded to float16.

`QueryFormer.as_written` is these four lines as code. `forward` gives the same numbers for three
quarters of the work.

Legend: B crops, L patches of a crop and Nq queries (both square grids), D channels, H heads of
Dh = D / H channels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from sliming.fused_attention import DTYPES, HEAD_SIZES, INTERPRETED, fused_attention
except ModuleNotFoundError as error:
    if error.name != "triton":
        raise
    fused_attention = None  # Triton has no package for this platform

ATTENTION = ("auto", "sdpa", "triton")


class QueryFormer(nn.Module):
    """Condenses patch features [B, L, D] to [B, Nq, D].

    `dim` is D, `num_queries` Nq, a perfect square, `num_heads` H, by default one per 128 channels
    as in the released code. `attention` may be set on a built module (see `query_attention`).
    Raises ValueError where Nq is no square, H does not divide D, or 4 does not divide D.
    """

    def __init__(self, dim: int, num_queries: int, num_heads: int | None = None):
        super().__init__()
        self.attention = "auto"
        self.num_heads = max(1, dim // 128) if num_heads is None else num_heads
        if dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, got {self.num_heads} and {dim}")
        self.side = square_side(num_queries, "num_queries")
        self.query = nn.Parameter(torch.empty(num_queries, dim))               # M_Q
        # Persistent, so that a checkpoint brings its own positions, rounded ones included.
        self.register_buffer("position", sincos_2d(dim, self.side))            # [Nq, D]
        self.ln_q, self.ln_kv, self.ln_post = (nn.LayerNorm(dim, eps=1e-6) for _ in range(3))
        self.w_q, self.w_k, self.w_v, self.w_o = (nn.Linear(dim, dim) for _ in range(4))
        nn.init.trunc_normal_(self.query, std=0.02)
        for linear in (self.w_q, self.w_k, self.w_v, self.w_o):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        # Ours: keys start as queries do, so that each query looks at its own place from the first
        # step on.
        self.w_k.weight.data.copy_(self.w_q.weight)

    def as_written(self, x: Tensor) -> Tensor:
        """The equations above, line by line: [B, L, D] -> [B, Nq, D]."""
        position = self.position.to(self.query.dtype)                          # [Nq, D]
        q = self.ln_q(self.query) + position                                   # [Nq, D]
        k = self.ln_kv(x) + self.to_patch_grid(position, x.shape[1])           # [B, L, D]
        v = self.ln_kv(x)                                                      # [B, L, D]
        q, k, v = map(self.split_heads, (self.w_q(q), self.w_k(k), self.w_v(v)))
        return self.ln_post(self.w_o(query_attention(q, k, v)))                # [B, Nq, D]

    def forward(self, x: Tensor) -> Tensor:
        """Patch features [B, L, D] in raster order, B may be 0 -> [B, Nq, D], queries in raster
        order. Equal to `as_written`; ValueError where L is no perfect square.

        With LN_kv(x) = gamma x_hat + beta, x_hat = (x - mean) / std, keys and values are

            W_k k + b_k = (W_k gamma) x_hat + c      c = W_k (beta + pos') + b_k, for every crop
            W_v v + b_v = (W_v gamma) x_hat + d      d = W_v beta + b_v, for every patch

        The tower is frozen, so x_hat needs no gradient: gamma and beta get theirs from the D x D
        products, not from B L rows. Attention weights sum to one, so d passes through them into the
        output's bias. Resizing is linear, so pos is projected first: Nq rows instead of L.
        """
        gamma, beta = self.ln_kv.weight, self.ln_kv.bias
        position = self.position.to(self.query.dtype)                          # [Nq, D]
        # Once per step, whatever the number of crops.
        q = self.w_q(self.ln_q(self.query) + position)                         # [Nq, D]
        c = self.to_patch_grid(F.linear(position, self.w_k.weight), x.shape[1]) + self.w_k(beta)
        out_bias = self.w_o(self.w_v(beta))                                    # [D], W_o d + b_o
        # Once per crop.
        x_hat = F.layer_norm(x, (x.shape[-1],), eps=self.ln_kv.eps)            # [B, L, D]
        k = F.linear(x_hat, self.w_k.weight * gamma)                           # [B, L, D], less c
        v = F.linear(x_hat, self.w_v.weight * gamma)                           # [B, L, D], less d
        q, k, v, c = map(self.split_heads, (q, k, v, c))
        out = query_attention(q, k, v, c, self.attention)                      # [B, Nq, D]
        return self.ln_post(F.linear(out, self.w_o.weight, out_bias))          # [B, Nq, D]

    def split_heads(self, tokens: Tensor) -> Tensor:
        """[..., N, D] -> [..., H, N, Dh], a strided view."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def to_patch_grid(self, tokens: Tensor, patches: int) -> Tensor:
        """[Nq, C] on the grid of queries -> [L, C], resized bicubically to the grid of patches."""
        side = square_side(patches, "patches per crop")
        if side == self.side:
            return tokens
        # Resizing is a linear map: as a matrix, the resized unit vectors, it is made once.
        dtype = torch.promote_types(tokens.dtype, torch.float32)
        unit = torch.eye(self.side**2, dtype=dtype, device=tokens.device)      # [Nq, Nq]
        unit = unit.unflatten(1, (self.side, self.side))[None]                # [1, Nq, row, column]
        resized = F.interpolate(unit, (side, side), mode="bicubic")[0].flatten(1)          # [Nq, L]
        return resized.T.to(tokens.dtype) @ tokens                             # [L, C]

    @torch.no_grad()
    def look_nearby(self, *, content: float, near: float, far: float, share: float) -> None:
        """Makes a new query former look at each query's own place first. In no paper: for short
        runs.

        Scores compare places more than contents: both LayerNorms scale contents by `content` (W_v
        makes up for it); W_q = W_k take the quickest `share` of the positions' waves, which tell
        neighbours apart, by `near` and the others by `far`. With the tiny preset's gains a query's
        own cell begins with 96 % of its attention instead of 9 %.
        """
        quarter = self.query.shape[1] // 4                                     # waves per kind
        gain = torch.full((4, quarter), far)                               # sin, cos of column, row
        gain[:, :round(share * quarter)] = near
        self.ln_q.weight.fill_(content)
        self.ln_kv.weight.fill_(content)
        self.w_v.weight.div_(content)
        self.w_q.weight.mul_(gain.flatten())                                  # [D, D] by [D] inputs
        self.w_k.weight.copy_(self.w_q.weight)


def sincos_2d(dim: int, side: int) -> Tensor:
    """Fixed 2-D sin-cos positions of a side x side grid: float32 [side*side, dim], raster order.

    The first half of the channels encodes the column, the second the row. Each half is [sin | cos]
    of coordinate / 10000^(i / (dim/4)), i = 0 .. dim/4 - 1. ValueError unless 4 divides dim.
    """
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4 for 2-D sin-cos positions, got {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency       # [side, dim/4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                        # [side, dim/2]
    column = axis[None, :, :].expand(side, side, -1)                          # [row, column, dim/2]
    row = axis[:, None, :].expand(side, side, -1)                             # [row, column, dim/2]
    return torch.cat([column, row], dim=2).flatten(0, 1).float()               # [side*side, dim]


def square_side(count: int, what: str) -> int:
    """Side of the square grid of `count` cells; ValueError naming `what` where there is none."""
    side = math.isqrt(max(count, 0))
    if side == 0 or side * side != count:
        raise ValueError(f"{what} must be a perfect square >= 1 (a square grid), got {count}")
    return side


# ----------------------------------------------------------------------------------- how it attends


def query_attention(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None = None,
                    attention: str = "auto") -> Tensor:
    """Attends from the shared queries to each crop's patches.

        out[b, n, h] = sum_l softmax_l(q[h, n] . (k[b, h, l] + key_bias[h, l]) / sqrt(Dh)) v[b, h,
        l]

    `q` [H, Nq, Dh] and `key_bias` [H, L, Dh] are the same for every crop; `k`, `v` [B, H, L, Dh],
    any strides, B may be 0; one dtype for all. Returns [B, Nq, H*Dh] in that dtype, heads side by
    side. Differentiable in all four.

    `attention`: "sdpa" is torch's own, "triton" the kernel of fused_attention.py, "auto" the kernel
    on a CUDA device in two-byte numbers, where it beats FlashAttention 2 (not cuDNN: bench/).
    ValueError, with the reason, where "triton" cannot run.
    """
    if attention not in ATTENTION:
        raise ValueError(f"attention must be one of {', '.join(ATTENTION)}, got {attention!r}")
    if attention == "triton" and (obstacle := why_not_triton(q)):
        raise ValueError(f"attention 'triton' cannot run here: {obstacle}; use 'auto' or 'sdpa'")
    if attention == "auto" and q.is_cuda and q.element_size() == 2 and not why_not_triton(q):
        attention = "triton"
    if attention == "triton":
        return fused_attention(q, k, v, key_bias)
    if key_bias is not None:
        k = k + key_bias                                                       # [B, H, L, Dh]
    q = q.expand(k.shape[0], *q.shape)                                     # [B, H, Nq, Dh], no copy
    out = F.scaled_dot_product_attention(q, k, v)                              # [B, H, Nq, Dh]
    return out.transpose(1, 2).flatten(2)                                      # [B, Nq, H*Dh]


def why_not_triton(q: Tensor) -> str | None:
    """Why the Triton kernel cannot run on queries like q [H, Nq, Dh], or None where it can."""
    if fused_attention is None:
        return "Triton is not installed"
    if not q.is_cuda and not INTERPRETED:
        return f"it needs a CUDA device, and the tensors are on {q.device.type}"
    if q.dtype not in DTYPES or q.shape[-1] not in HEAD_SIZES:
        sizes, dtype = ", ".join(map(str, HEAD_SIZES)), str(q.dtype).removeprefix("torch.")
        return (f"it takes float32, bfloat16 or float16 and heads of {sizes} channels, "
                f"got {dtype} and {q.shape[-1]}")
    return None
