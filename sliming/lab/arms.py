"""The arms: what each does otherwise than the default, which is SliME as the paper trains it.

An arm is a few settings of `SliMEConfig`, a schedule of turns, and, where that does not say it, a
small subclass of SliME. Whatever the schedule, an arm learns from the same records in as many
steps: a turn takes over the steps of the lessons that it learns from.

Legend: P crops, I images, L patches per view, Nq tokens per crop, M local tokens of an image, K
kept ones, Dv vision width, D model width.
"""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sliming.inputs import Batch
from sliming.model import Output, SliME, Visual


@dataclass(frozen=True)
class Turn:
    """What a stage of an arm shows and trains, and what it learns from."""

    parts: str                # "global", "local" or "both"
    trained: tuple[str, ...]  # submodules of SliME
    lessons: tuple[int, ...]  # 1: captions, 2: detailed descriptions, 3: questions; shuffled


EVERY = ("adapter", "compression", "llm")
LAST = Turn("both", EVERY, (3,))
# Schedules of the three lessons.
THREE_STAGES = (Turn("global", ("adapter",), (1,)), Turn("local", ("compression",), (2,)), LAST)
JOINED = (Turn("both", ("adapter", "compression"), (1, 2)), LAST)
END_TO_END = (Turn("both", EVERY, (1, 2, 3)),)
GLOBAL_ONLY = (Turn("global", ("adapter",), (1,)), Turn("global", ("adapter",), (2,)),
               Turn("global", ("adapter", "llm"), (3,)))
# A compression without weights: stage II trains the MLP behind it.
MLP_ON_CROPS = (THREE_STAGES[0], Turn("local", ("adapter",), (2,)), LAST)
# A global view that passes the compression: stage I trains that, too.
SHARED_QUERIES = (Turn("global", ("adapter", "compression"), (1,)), *THREE_STAGES[1:])


@dataclass(frozen=True)
class Arm:
    """One thing tried. `about` is what tables call it."""

    about: str
    settings: dict = field(default_factory=dict)  # of SliMEConfig, where other than the preset's
    turns: tuple[Turn, ...] = THREE_STAGES
    kind: type[SliME] = SliME
    asked: tuple[str, ...] = ("both", "global", "local")  # the views it is tested with
    detail: float = 0.5       # share of detail questions in lesson 3
    against: str = "default"  # the arm that it is compared with
    late: bool = False        # as the default until the last turn: both train the first two once


# ----------------------------------------------------------------------------- other compressions


class Pool(nn.Module):
    """The mean of each 2 x 2 patches: [P, L, Dv] -> [P, L / 4, Dv]."""

    def forward(self, x: Tensor) -> Tensor:
        return squares(x).mean(dim=2)


class Shuffle(nn.Module):
    """Each 2 x 2 patches as one long vector, then an MLP: [P, L, Dv] -> [P, L / 4, Dv]."""

    def __init__(self, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(4 * width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(squares(x).flatten(2))


def squares(x: Tensor) -> Tensor:
    """Each 2 x 2 patches together, in raster order: [P, L, Dv] -> [P, L / 4, 4, Dv]."""
    side = int(x.shape[1] ** 0.5) // 2
    x = x.unflatten(1, (side, 2, side, 2)).transpose(2, 3)                     # [P, y, x, 2, 2, Dv]
    return x.flatten(3, 4).flatten(1, 2)


class Uncompressed(SliME):
    """LLaVA-HD: every patch of every crop goes through the MLP."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.compression = nn.Identity()


class AveragePooled(SliME):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.compression = Pool()


class PixelShuffled(SliME):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.compression = Shuffle(len(self.adapter.w_gate))


class Compressed(SliME):
    """Monkey: the global view passes the same queries as the crops."""

    def see(self, batch: Batch, parts: str = "both", gamma: float | None = None,
            random_tokens: bool = False, features: tuple[Tensor, Tensor] | None = None) -> Visual:
        features = self.encode(batch, parts) if features is None else features
        visual = super().see(batch, parts, gamma, random_tokens, features)
        return replace(visual, whole=self.adapter.mlp(self.compression(features[0])))  # [I, Nq, D]


# ---------------------------------------------------------------------------------- other routers


class AtRandom(SliME):
    """As many local tokens as the router would keep, but any; in training and when asked."""

    def see(self, batch: Batch, parts: str = "both", gamma: float | None = None,
            random_tokens: bool = False, features: tuple[Tensor, Tensor] | None = None) -> Visual:
        return super().see(batch, parts, gamma, True, features)


class Merging(SliME):
    """Each local token that the router drops is averaged into the kept one that is most like it."""

    def see(self, *arguments, **options) -> Visual:
        visual = super().see(*arguments, **options)
        local = [merge(*pair) for pair in zip(visual.local, visual.keep, strict=True)]
        return replace(visual, local=local)


def merge(tokens: Tensor, keep: Tensor) -> Tensor:
    """Local tokens [M, D] of which `keep` bool [M] stay; the same with the kept ones replaced by
    the mean of all that they stand for."""
    with torch.no_grad():
        unit = F.normalize(tokens, dim=-1)
        nearest = (unit[~keep] @ unit[keep].T).argmax(1)                       # [M - K] of K
        count = 1 + torch.bincount(nearest, minlength=int(keep.sum()))         # [K]
    sums = tokens[keep].index_add(0, nearest, tokens[~keep])                   # [K, D]
    return tokens.index_put((keep,), sums / count[:, None])                    # [M, D]


# --------------------------------------------------------------------------------- soft alternation


class SoftTurns(SliME):
    """End to end, but the views take turns of `PERIOD` steps: the gradient that comes back through
    the resting view's tokens counts little at first and as much as the other's in the end."""

    PERIOD = 20
    steps = 1  # of the run, which sets it

    def __init__(self, *parts):
        super().__init__(*parts)
        self.seen = 0

    def see(self, *arguments, **options) -> Visual:
        visual = super().see(*arguments, **options)
        if not self.training:
            return visual
        resting, share = self.seen // self.PERIOD % 2, self.seen / self.steps
        self.seen += 1
        if resting == 0:
            return replace(visual, whole=damped(visual.whole, share))
        return replace(visual, local=[damped(tokens, share) for tokens in visual.local])


def damped(x: Tensor, share: float) -> Tensor:
    """The same numbers; `share` of the gradient."""
    return share * x + (1 - share) * x.detach()


class Balanced(SliME):
    """End to end, with a penalty: the loss of the view that, shown alone, says less of the answer.
    So neither may be neglected."""

    PENALTY = 0.5

    def forward(self, batch: Batch, *, parts: str = "both", visual: Visual | None = None,
                **options) -> Output:
        visual = self.see(batch, parts) if visual is None else visual
        output = super().forward(batch, visual=visual, **options)
        if not self.training:
            return output
        alone = [super(Balanced, self).forward(batch, visual=one, **options).loss for one in
                 (replace(visual, local=[], keep=[]), replace(visual, whole=visual.whole[:0]))]
        return output._replace(loss=output.loss + self.PENALTY * torch.maximum(*alone))


# ---------------------------------------------------------------------------------------- all arms

ARMS = {
    "default": Arm("SliME, three stages", late=True),
    "mixture": Arm("global view only: mixture", {}, GLOBAL_ONLY, asked=("global",)),
    "mlp": Arm("global view only: MLP", {"expert": 0}, GLOBAL_ONLY, asked=("global",),
               against="mixture"),
    "queries": Arm("global view only: query former", {"expert": 1}, GLOBAL_ONLY,
                   asked=("global",), against="mixture"),
    "nq4": Arm("4 tokens per crop", {"num_queries": 4}),
    "nq25": Arm("25 tokens per crop", {"num_queries": 25}),
    "gamma100": Arm("γ 1", {"gamma": 1.0}, late=True),
    "gamma90": Arm("γ 0.9", {"gamma": 0.9}, late=True),
    "gamma50": Arm("γ 0.5", {"gamma": 0.5}, late=True),
    "gamma25": Arm("γ 0.25", {"gamma": 0.25}, late=True),
    "random50": Arm("as many as γ 0.5, at random", {"gamma": 0.5}, kind=AtRandom,
                    against="gamma50", late=True),
    "random25": Arm("as many as γ 0.25, at random", {"gamma": 0.25}, kind=AtRandom,
                    against="gamma25", late=True),
    "merge25": Arm("γ 0.25, the dropped merged into the kept", {"gamma": 0.25}, kind=Merging,
                   against="gamma25", late=True),
    "uncompressed": Arm("local tokens uncompressed", {"num_queries": 64}, MLP_ON_CROPS,
                        kind=Uncompressed),
    "compressed": Arm("global view compressed, too", {}, SHARED_QUERIES, kind=Compressed),
    "average": Arm("average pooling", {}, MLP_ON_CROPS, kind=AveragePooled),
    "shuffle": Arm("pixel shuffle and an MLP", kind=PixelShuffled),
    "joined": Arm("stages I and II as one", {}, JOINED),
    "e2e": Arm("end to end", {}, END_TO_END),
    "turns": Arm("end to end, soft turns", {}, END_TO_END, kind=SoftTurns, against="e2e"),
    "balanced": Arm("end to end, balanced", {}, END_TO_END, kind=Balanced, against="e2e"),
    "default-rare": Arm("three stages, details rare", detail=0.1, late=True),
    "joined-rare": Arm("stages I and II as one, details rare", {}, JOINED, detail=0.1,
                       against="default-rare"),
    "e2e-rare": Arm("end to end, details rare", {}, END_TO_END, detail=0.1,
                    against="default-rare"),
}
