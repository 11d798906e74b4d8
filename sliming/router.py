"""Text-guided router: keep the local tokens that the question is about (Sec. 2.2, "Text-Guided
Router").

    S       = z_v z_x^T, rows of z_v and z_x normalised       cosine of image and text tokens
    score_i = mean_j S_ij  (+ 0.1 * Normal(0, 1) in training)
    p       = softmax_i(score / temperature), sorted from high to low
    token i is kept if the p of all tokens before it add up to at most gamma: the one that crosses
    gamma stays

The released code (yfzhang114/SliME, llava/model/multimodal_resampler/builder.py) sums over the text
tokens where the paper averages, so that long questions keep fewer tokens; `score` chooses.

No parameters, and no gradient: the selection is hard. Each image is routed alone, by its own
sample's question.

Legend: M local tokens of one image in raster order, Q question tokens, D channels of the LLM.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def route(local: Tensor, question: Tensor, gamma: float, *, score: str = "mean",
          temperature: float = 1.0, noise: Tensor | None = None, random: bool = False) -> Tensor:
    """Which of an image's local tokens to keep: [M, D] -> bool [M].

    `question` [Q, D] are the LLM's input embeddings of the question; without one (Q = 0) every
    token is kept, as nothing is irrelevant then. `gamma` in (0, 1]; 1 keeps every token. `noise`
    [M] is added to the scores. `random`: as many tokens as the router would keep, but drawn
    uniformly with torch's generator (a control experiment).
    Raises ValueError for another `score`, and where `gamma` or `temperature` is out of range.
    """
    if score not in ("mean", "sum") or not temperature > 0:
        raise ValueError('score must be "mean" or "sum" and temperature above 0, '
                         f"got {score!r} and {temperature}")
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must be in (0, 1], got {gamma}")
    if gamma == 1 or len(local) == 0 or len(question) == 0:
        return torch.ones(len(local), dtype=torch.bool, device=local.device)
    scores = relevance(local, question, score)                                 # [M]
    if noise is not None:
        scores = scores + noise
    return select(scores / temperature, gamma, random)


def relevance(local: Tensor, question: Tensor, score: str = "mean") -> Tensor:
    """Mean or sum of each image token's cosines with the question tokens: [M, D], [Q, D] ->
    float32 [M]."""
    # The mean over j of z_v . z_x_j is one product with the mean of z_x: D, not Q D per token.
    text = F.normalize(question.float(), dim=-1).sum(dim=0)                    # [D]
    if score == "mean":
        text = text / len(question)
    length = torch.linalg.vector_norm(local, dim=-1, dtype=torch.float32)      # [M]
    return (local * text).sum(dim=-1) / length.clamp(min=1e-12)


def select(scores: Tensor, gamma: float, random: bool = False) -> Tensor:
    """Keeps the best tokens until their softmax mass surpasses `gamma` < 1; of equal ones the
    first.

    `scores` float32 [M], M > 0 -> bool [M].
    """
    ranked, order = scores.sort(descending=True, stable=True)                  # [M]
    # The softmax without its denominator, in float64: these numbers lie so close together that they
    # add exactly, and no rounding moves the cut.
    weight = (ranked - ranked[0]).exp().double()                               # [M]
    mass = weight.cumsum(dim=0)                                                # [M]
    # "Not above" instead of "at most": where a score is NaN all is kept, and shows in the loss.
    kept = ~(mass - weight > gamma * mass[-1])                                 # [M], best first
    if random:
        order = torch.randperm(len(scores), device=scores.device)
    return torch.zeros_like(kept).scatter(0, order, kept)                      # [M], raster order
