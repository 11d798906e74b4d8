"""Soft mixture of an MLP and a query former for the global view (Sec. 2.1, "Soft Mixture of
Experts").

    y    = G(x)_0 f_m(x) + G(x)_1 f_q(x)
    G(x) = softmax_i((x . W_g)_i + Normal(0, 1) . softplus((x . W_noise)_i))    noise: training only

One pair of gates per token, from the vision tower's feature of that token. f_m is LLaVA-1.5's
projector (Linear, GELU, Linear). f_q is a query former with as many queries as there are tokens,
then the same MLP: the paper only names f_q, and sharing the MLP is what the released code does
(yfzhang114/SliME, llava/model/multimodal_projector/builder.py). That code takes
softplus(x . W_g) + 0.01 as the noise's standard deviation, leaves W_noise unused, and divides the
gates by their sum plus 1e-6; `gate_noise` and `gate_epsilon` choose.

Legend: B images, L tokens of the global view, Dv channels of the vision tower, D of the LLM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sliming.qformer import QueryFormer


class MoEAdapter(nn.Module):
    """Projects the global view into the LLM's space, all L tokens kept.

    `vision_dim` is Dv, `llm_dim` D, `num_tokens` L, a perfect square (ValueError otherwise).
    `gate_noise`: what the noise's size is learned by, "w_noise" or "w_gate". `expert`: 0 or 1 for
    the MLP or the query former alone, as the released code trains them one after the other in stage
    I. `mlp` [..., Dv] -> [..., D] is also the projector of the compressed local tokens.
    """

    def __init__(self, vision_dim: int, llm_dim: int, num_tokens: int, *,
                 gate_noise: str = "w_noise", gate_epsilon: float = 0.0, expert: int | None = None):
        super().__init__()
        if gate_noise not in ("w_noise", "w_gate") or expert not in (None, 0, 1):
            raise ValueError('gate_noise must be "w_noise" or "w_gate" and expert 0, 1 or None, '
                             f"got {gate_noise!r} and {expert!r}")
        self.num_tokens, self.expert = num_tokens, expert
        self.gate_noise, self.gate_epsilon = gate_noise, gate_epsilon
        self.mlp = nn.Sequential(nn.Linear(vision_dim, llm_dim), nn.GELU(),
                                 nn.Linear(llm_dim, llm_dim))
        self.query_former = QueryFormer(vision_dim, num_tokens)
        # Zeros, as in the released code: no preference at first, noise of size softplus(0) = ln 2.
        self.w_gate = nn.Parameter(torch.zeros(vision_dim, 2))
        self.w_noise = nn.Parameter(torch.zeros(vision_dim, 2))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Features of global views [B, L, Dv], B may be 0 -> tokens [B, L, D], gates float32
        [B, L, 2]. `noise` as for `gate`. ValueError where L differs from `num_tokens`.
        """
        if x.shape[1] != self.num_tokens:
            raise ValueError(f"the adapter is built for {self.num_tokens} tokens per image, "
                             f"got {x.shape[1]}")
        if self.expert is not None:
            alone = torch.full(x.shape[:2], self.expert, device=x.device)      # [B, L]
            return self.mlp(self.query_former(x) if self.expert else x), F.one_hot(alone, 2).float()
        gates = self.gate(x, noise)                                            # [B, L, 2]
        f_m = self.mlp(x)                                                      # [B, L, D]
        f_q = self.mlp(self.query_former(x))                                   # [B, L, D]
        g_m, g_q = gates.to(f_m.dtype).split(1, dim=-1)                        # [B, L, 1] each
        return g_m * f_m + g_q * f_q, gates

    def gate(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Weights of (MLP, query former) per token: [B, L, Dv] -> float32 [B, L, 2], summing to 1.

        `noise`: standard normals [B, L, 2] to use in training; drawn where None.
        """
        # Float32 under mixed precision too: bfloat16 logits between 4 and 8 are 0.03 apart.
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            logits = x @ self.w_gate.float()                                   # [B, L, 2]
            if self.training:
                noise = torch.randn_like(logits) if noise is None else noise
                if self.gate_noise == "w_noise":
                    size = F.softplus(x @ self.w_noise.float())                # [B, L, 2]
                else:
                    size = F.softplus(x @ self.w_gate.float()) + 1e-2          # [B, L, 2]
                logits = logits + noise * size
            gates = logits.softmax(dim=-1)
            if self.gate_epsilon:
                gates = gates / (gates.sum(dim=-1, keepdim=True) + self.gate_epsilon)
            return gates
