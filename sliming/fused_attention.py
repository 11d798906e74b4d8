"""Cross-attention of shared learnable queries to the patches of every crop (paper Sec. 2.2).

    out[b, n, h] = sum_l softmax_l(q[h, n] . k[b, h, l] / sqrt(Dh)) v[b, h, l]

The queries carry no crop axis: one [H, Nq, Dh] array serves the whole batch, and its gradient is the sum over
crops. At the paper's sizes (L = 576, Nq = 144, H = 8, Dh = 128, bfloat16) a crop costs 0.34 GFLOP and 2.4 MB
of keys and values to read, so this step is bound by memory traffic. This file is the place of a fused kernel
that reads the shared queries from cache and sums their gradient inside; for now the work is torch's own.

Shapes: B crops, H heads, Nq queries, L patches of a crop, Dh channels of a head.
"""

import torch
import torch.nn.functional as F


def query_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attend from the shared queries to each crop's patches; the formula is in the module docstring.

    q: [H, Nq, Dh], the same for every crop. k, v: [B, H, L, Dh], any strides; B may be 0. One dtype for all.
    Returns [B, Nq, H*Dh] in that dtype, heads side by side in the channels. Differentiable in q, k and v.
    """
    q = q.expand(k.shape[0], *q.shape)                 # [B, H, Nq, Dh], stride 0 along B: no copy made here
    out = F.scaled_dot_product_attention(q, k, v)      # [B, H, Nq, Dh]
    return out.transpose(1, 2).flatten(2)              # [B, Nq, H*Dh]
