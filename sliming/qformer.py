"""Query former: learnable queries condense a crop's patch features (Sec. 2.2, Local Feature Compression).

    q = LN_q(M_Q) + pos              learnable queries M_Q, laid out on a grid of their own
    k = LN_kv(x) + pos'              pos' = pos resized bicubically from the query grid to the patch grid
    v = LN_kv(x)                     values carry no position
    y = LN_post(W_o attention(W_q q, W_k k, W_v v))

One cross-attention and nothing more: no residual, no feed-forward layer. The paper leaves these details open;
they are those of the released code (yfzhang114/SliME, llava/model/multimodal_resampler/sampler.py), except
that positions are float32 here and rounded to float16 there.

Shapes: B crops, L patches of a crop and Nq queries (both square grids), D channels, H heads of Dh = D / H.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from sliming.fused_attention import query_attention


def square_side(count: int, what: str) -> int:
    """Side of the square grid of ``count`` cells; ValueError naming ``what`` where there is none."""
    side = math.isqrt(max(count, 0))
    if side == 0 or side * side != count:
        raise ValueError(f"{what} must be a perfect square >= 1 (a square grid), got {count}")
    return side


def sincos_2d(dim: int, side: int) -> torch.Tensor:
    """Fixed 2-D sin-cos positions of a side x side grid: float32 [side*side, dim], cells in raster order.

    The first half of the channels encodes the column, the second half the row. Each half is [sin | cos] of
    coordinate * f_i with f_i = 1 / 10000^(i / (dim/4)), i = 0 .. dim/4 - 1. ValueError unless 4 divides dim.
    """
    if dim % 4:
        raise ValueError(f"dim must be divisible by 4 for 2-D sin-cos positions, got {dim}")
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = torch.arange(side, dtype=torch.float64)[:, None] * frequency       # [side, dim/4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)                        # [side, dim/2]
    column = axis[None, :, :].expand(side, side, dim // 2)                     # [row, column, dim/2]
    row = axis[:, None, :].expand(side, side, dim // 2)                        # [row, column, dim/2]
    return torch.cat([column, row], dim=2).flatten(0, 1).float()               # [side*side, dim]


class QueryFormer(nn.Module):
    """Condenses [B, L, D] patch features to [B, Nq, D]; equations in the module docstring.

    dim: D. num_queries: Nq, a perfect square. num_heads: H, one per 128 channels by default (released code).
    Raises ValueError where Nq is no perfect square, H does not divide D, or 4 does not divide D.
    """

    def __init__(self, dim: int, num_queries: int, num_heads: int | None = None):
        super().__init__()
        self.num_heads = max(1, dim // 128) if num_heads is None else num_heads
        if dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, got num_heads {self.num_heads} and dim {dim}")
        self.side = square_side(num_queries, "num_queries")
        self.query = nn.Parameter(torch.empty(num_queries, dim))
        # Persistent, so that a checkpoint brings the positions it was trained with, rounded ones included.
        self.register_buffer("position", sincos_2d(dim, self.side))            # [Nq, D]
        self.ln_q = nn.LayerNorm(dim, eps=1e-6)
        self.ln_kv = nn.LayerNorm(dim, eps=1e-6)
        self.ln_post = nn.LayerNorm(dim, eps=1e-6)
        self.w_q = nn.Linear(dim, dim)
        self.w_k = nn.Linear(dim, dim)
        self.w_v = nn.Linear(dim, dim)
        self.w_o = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.query, std=0.02)
        for linear in (self.w_q, self.w_k, self.w_v, self.w_o):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)
        # Keys start as queries do, so that from the first step on each query looks at its own place of the crop.
        self.w_k.weight.data.copy_(self.w_q.weight)

    def key_position(self, side: int) -> torch.Tensor:
        """Positions on a side x side patch grid, float32 [side*side, D]; as stored where the grids agree."""
        if side == self.side:
            return self.position.float()
        grid = self.position.float().unflatten(0, (self.side, self.side))      # [row, column, D]
        grid = grid.permute(2, 0, 1)[None]                                     # [1, D, row, column]
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)
        return grid[0].flatten(1).T                                            # [side*side, D]

    def split_heads(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., N, D] -> [..., H, N, Dh], a strided view."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: patch features [B, L, D] in raster order, B may be 0 -> [B, Nq, D], raster order of queries.

        Raises ValueError where L is no perfect square.
        """
        dtype = self.query.dtype
        key_position = self.key_position(square_side(x.shape[1], "patches per crop"))    # [L, D]
        q = self.w_q(self.ln_q(self.query) + self.position.to(dtype))          # [Nq, D], once for all crops
        patches = self.ln_kv(x)                                                # [B, L, D]
        k = self.w_k(patches + key_position.to(dtype))                         # [B, L, D]
        v = self.w_v(patches)                                                  # [B, L, D]
        out = query_attention(self.split_heads(q), self.split_heads(k), self.split_heads(v))
        return self.ln_post(self.w_o(out))                                     # [B, Nq, D]
