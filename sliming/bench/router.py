"""The router's loop over images (router.py) beside a twin that sorts all images at once, padded.

Legend: I images, N local tokens of the largest, D channels.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sliming.bench.timing import medians_ms, show
from sliming.router import route

SHAPES = {"tiny preset, a step of stage III": (128, [64, 96, 144, 64] * 4),
          "one image of 36 crops, 7B": (4096, [36 * 144]),
          "4 images of 16 crops, 7B": (4096, [16 * 144] * 4),
          "1, 4, 9 and 36 crops, 7B": (4096, [144, 4 * 144, 9 * 144, 36 * 144])}


def looped(local: list[Tensor], questions: list[Tensor], gamma: float) -> list[Tensor]:
    return [route(*pair, gamma) for pair in zip(local, questions, strict=True)]


@torch.no_grad()
def padded(local: list[Tensor], questions: list[Tensor], gamma: float) -> list[Tensor]:
    """The same choice, every step once for all images."""
    counts, asked = (torch.tensor([[len(part)] for part in parts]) for parts in (local, questions))
    tokens, text = (pad_sequence(parts, batch_first=True) for parts in (local, questions))
    text = F.normalize(text.float(), dim=-1).sum(dim=1) / asked                # [I, D]
    length = torch.linalg.vector_norm(tokens, dim=-1).clamp(min=1e-12)         # [I, N]
    scores = (tokens * text[:, None]).sum(dim=-1) / length                     # [I, N]
    inside = torch.arange(tokens.shape[1]) < counts                            # [I, N]
    ranked, order = scores.where(inside, -torch.inf).sort(dim=1, descending=True, stable=True)
    weight = (ranked - ranked[:, :1]).exp().double()                           # padding weighs 0
    mass = weight.cumsum(dim=1)                                                # [I, N]
    kept = ~(mass - weight > gamma * mass[:, -1:])                             # best first
    kept = torch.zeros_like(kept).scatter(1, order, kept)                      # raster order
    return [row[:len(part)] for row, part in zip(kept, local, strict=True)]


def router(device: torch.device, out: Path, shapes: dict = SHAPES, repeats: int = 20) -> None:
    """Milliseconds of both, on the CPU, gamma .75, a question of 12 tokens per image. `shapes`:
    name -> D and each image's tokens."""
    torch.manual_seed(0)
    lines = []
    for name, (dim, counts) in shapes.items():
        local = list(torch.randn(sum(counts), dim).split(counts))
        questions = list(torch.randn(len(counts), 12, dim))
        loop, twin = (partial(way, local, questions, 0.75) for way in (looped, padded))
        if not all(map(torch.equal, loop(), twin())):
            raise RuntimeError(f"{name}: the padded way chooses other tokens")
        times = medians_ms({"loop": loop, "twin": twin}, torch.device("cpu"), repeats)
        lines.append([name, str(len(counts)), str(sum(counts)), f"{times['loop']:.2f}",
                      f"{times['twin']:.2f}", f"{times['twin'] / times['loop']:.2f}"])
    show("router, gamma .75, equal choices, on the CPU",
         ["batch", "images", "tokens", "image by image ms", "padded ms", "padded / image by image"],
         lines)
