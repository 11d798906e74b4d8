"""From the bilinear problem to the model: does training in turns help the smallest network like SliME?

    python theory/stages.py                          table and figure (out/stages.png), MINUTES

The network has SliME's parts (Fig. 2):

    global view - frozen features ------------------------> adapter - tokens -+
    crops ------- frozen features - compressor (queries) -> adapter - tokens -+- question, head - answer

An image is P crops of L patches; one patch of each crop holds an object (a key and M values), the
rest is clutter. The global view is each crop's mean: every object is in it, diluted. A detail
question names a key and asks for its values, a global question asks for the image's mean values. The
compressor sees the patches at full strength, but must learn which to keep. Both paths share the
adapter, so the problem is bilinear in (adapter, the compressor's value map).

Recipes, at an equal number of updates (one update = one gradient of one batch of 32):

    end to end      both blocks, both views, all the time
    three stages    I adapter, global view; II compressor, local view; III both (Sec. 2.2); a third each
    interleaved     an update of I, one of II, one of III: the stages as a constraint on one run, which
                    the paper names as future work (Sec. 4)
    in turns        both views; 20 updates of the adapter, 20 of the compressor: AO's counterpart

Each runs with momentum SGD and with Adam and takes its rate from a grid (factor 1.75) by its loss on
validation images; losses and scores are of test images. Seeds share worlds and images between
recipes, so that differences are paired. All seeds and rates of a recipe are one batched computation.

Shapes: R = seeds x rates runs; B images; P crops; L patches; F features; D token width; Q queries a
crop; M values. Rates are per update; losses are mean squared errors of values +-1.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from program import file, make_parser, markdown, number
from torch import Tensor

P, L, Q, M, KEYS, F, D = 4, 6, 2, 4, 8, 48, 16
RATES = {"SGD": tuple(0.05 * 1.75**i for i in range(6)), "Adam": tuple(0.003 * 1.75**i for i in range(6))}
RECIPES = ("end to end", "three stages", "interleaved", "in turns")
COMPRESSOR = ("queries", "key", "value")
VIEWS = ("both", "global", "local")
TURN = 20                                       # updates of one block before "in turns" turns

# ---- The world, the network ----------------------------------------------------------------------


@dataclass
class World:
    """What is frozen, one per run: the features' weights, the head's maps, the keys' directions."""

    features: Tensor                            # [R, KEYS + M, F]
    head_key: Tensor                            # [R, D, KEYS]
    head_value: Tensor                          # [R, D, M]
    keys: Tensor                                # [R, KEYS, KEYS], rows orthonormal


def make_world(seeds: int, rates: int) -> World:
    """Worlds for `seeds` seeds, each repeated `rates` times."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(seeds, *shape, generator=generator)

    head, keys = torch.linalg.qr(draw(D, KEYS + M))[0], torch.linalg.qr(draw(KEYS, KEYS))[0]
    frozen = draw(KEYS + M, F) / (KEYS + M) ** 0.5, head[..., :KEYS], head[..., KEYS:], keys
    return World(*(x.repeat_interleave(rates, dim=0) for x in frozen))


def make_batch(world: World, batch: int, rates: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Fresh images and questions, equal for runs that differ in the rate only.

    "global" [R, B, P, F], "local" [R, B, P, L, F], "question" [R, B, KEYS], "answer" [R, B, M],
    "detail" [B]: whether it asks for one object.
    """
    runs = len(world.features)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(runs // rates, batch, *shape, generator=generator)
        return x.repeat_interleave(rates, dim=0)

    clutter = 0.4 * draw(P, L, KEYS + M)
    kind, values = draw(KEYS).argsort(-1)[..., :P], draw(P, M).sign()       # distinct keys: [R, B, P]
    run = torch.arange(runs)[:, None, None]
    objects = torch.cat([2 * world.keys[run, kind], values], dim=-1)        # [R, B, P, KEYS + M]
    place = torch.nn.functional.one_hot(draw(P, L).argmax(-1), L)[..., None]          # [R, B, P, L, 1]
    patches = torch.where(place == 1, objects[..., None, :], clutter)
    detail = torch.arange(batch) % 2 == 0
    asked = world.keys[run[..., 0], kind[..., 0]]                           # the first crop's key

    def features(x: Tensor) -> Tensor:
        return (x.flatten(1, -2) @ world.features).relu().reshape(*x.shape[:-1], F)

    return {"global": features(2 * patches.mean(3)), "local": features(patches), "detail": detail,
            "question": torch.where(detail[:, None], asked, 0.0),
            "answer": torch.where(detail[:, None], values[:, :, 0], values.mean(2))}


def make_parameters(runs: int, rates: int) -> dict[str, Tensor]:
    """adapter [R, F, D]; the compressor: queries [R, Q, F], key and value [R, F, F]."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"adapter": (F, D), "queries": (Q, F), "key": (F, F), "value": (F, F)}
    drawn = {n: torch.randn(runs // rates, *s, generator=generator) for n, s in shapes.items()}
    return {n: (x / F**0.5).repeat_interleave(rates, dim=0).requires_grad_() for n, x in drawn.items()}


def answer(world: World, w: dict[str, Tensor], batch: dict[str, Tensor], view: str) -> Tensor:
    """The network's answer from the tokens of `view`: [R, B, M]."""
    runs, images = batch["question"].shape[:2]
    inputs = []
    if view != "local":
        inputs.append(batch["global"])                                      # [R, B, P, F]
    if view != "global":
        # each crop's queries look at its patches, and what they see passes the value map
        score = torch.einsum("rqf,rbplf->rbpql", w["queries"] @ w["key"], batch["local"]) / F**0.5
        seen = torch.einsum("rbpql,rbplf->rbpqf", score.softmax(-1), batch["local"])
        inputs.append((seen.flatten(1, 3) @ w["value"]).reshape(runs, images, P * Q, F))
    tokens = (torch.cat(inputs, dim=2).flatten(1, 2) @ w["adapter"]).reshape(runs, images, -1, D)
    # the head finds the tokens that match the question and reads their values
    look = torch.einsum("rbtd,rdk,rbk->rbt", tokens, world.head_key, batch["question"])
    return torch.einsum("rbt,rbtd,rdm->rbm", look.mul(4).softmax(-1), tokens, world.head_value)


# ---- Training ------------------------------------------------------------------------------------


def schedule(recipe: str, t: int, steps: int) -> tuple[str, tuple[str, ...]]:
    """(view shown, parameters moved) by update t of `steps`."""
    both = ("both", ("adapter", *COMPRESSOR))
    stages = (("global", ("adapter",)), ("local", COMPRESSOR), both)
    if recipe == "three stages":
        return stages[min(3 * t // steps, 2)]
    if recipe == "interleaved":
        return stages[t % 3]
    if recipe == "in turns":
        return "both", (COMPRESSOR if t // TURN % 2 else ("adapter",))
    return both


def update(w: dict[str, Tensor], grads: dict[str, Tensor], state: dict, rate: Tensor, optimiser: str) \
        -> None:
    """Momentum SGD (.9) or Adam (.9, .999), in place, after clipping each run's gradient to norm 1."""
    norm = sum(g.square().flatten(1).sum(1) for g in grads.values()).sqrt()
    clip = (1 / norm).clamp(max=1)[:, None, None]                           # [R, 1, 1]
    for name, g in grads.items():
        t, m, s = state.get(name, (0, 0.0, 0.0))
        g = g * clip
        if optimiser == "SGD":
            m = step = 0.9 * m + g
        else:
            t, m, s = t + 1, 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
            step = m / (1 - 0.9**t) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)
        state[name] = (t, m, s)
        w[name].data -= rate * step


def train(recipe: str, optimiser: str, seeds: int, steps: int, batch: int = 32) -> dict:
    """One recipe, all seeds and rates; what comes back is at the rate of the least validation loss.

    "loss": [seeds], test images, both views. "explained"[view]: [seeds], the share of the answers'
    variance explained by that view alone, mean of both kinds of question: 1 perfect, 0 nothing.
    "rate", and "edge": whether it is the grid's first or last.
    """
    grid = RATES[optimiser]
    world, w = make_world(seeds, len(grid)), make_parameters(seeds * len(grid), len(grid))
    rate, state = torch.tensor(grid).repeat(seeds)[:, None, None], {}       # [R, 1, 1]
    generator = torch.Generator().manual_seed(2)
    for t in range(steps):
        view, names = schedule(recipe, t, steps)
        examples = make_batch(world, batch, len(grid), generator)
        loss = (answer(world, w, examples, view) - examples["answer"]).square().mean((1, 2)).sum()
        grads = torch.autograd.grad(loss, [w[name] for name in names])
        update(w, dict(zip(names, grads, strict=True)), state, rate, optimiser)

    def errors(seed: int, view: str) -> tuple[Tensor, Tensor]:
        held_out = make_batch(world, 256, len(grid), torch.Generator().manual_seed(seed))
        with torch.no_grad():
            miss = (answer(world, w, held_out, view) - held_out["answer"]).square()
        share = [1 - miss[:, rows].mean((1, 2)) / held_out["answer"][:, rows].square().mean((1, 2))
                 for rows in (held_out["detail"], ~held_out["detail"])]
        return miss.mean((1, 2)).reshape(seeds, -1), torch.stack(share).mean(0).reshape(seeds, -1)

    validation = errors(3, "both")[0].mean(0).nan_to_num(float("inf"))      # [rates]
    best = int(validation.argmin())
    test = {view: errors(4, view) for view in VIEWS}
    return {"recipe": recipe, "optimiser": optimiser, "steps": steps, "rate": grid[best],
            "edge": best in (0, len(grid) - 1), "loss": test["both"][0][:, best].tolist(),
            "explained": {view: share[:, best].tolist() for view, (_, share) in test.items()}}


# ---- What came out -------------------------------------------------------------------------------


def interval(x: Tensor) -> tuple[float, float]:
    """Mean of x: [n], and half its 95 % interval, by Student's t (Cornish and Fisher's expansion)."""
    z, n = 1.959964, len(x) - 1
    t = z + (z**3 + z) / (4 * n) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2) \
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3)
    return float(x.mean()), float(t * x.std() / len(x) ** 0.5)


def compare(results: list[dict]) -> list[dict]:
    """Each result with "difference", of its loss from end to end's, paired by seed, and the scores of
    each view alone: (mean, half the interval).
    """
    first = {(r["optimiser"], r["steps"]): r for r in results if r["recipe"] == RECIPES[0]}
    rows = []
    for r in results:
        loss = torch.tensor(r["loss"])
        base = torch.tensor(first[r["optimiser"], r["steps"]]["loss"])
        rows.append(r | {"difference": interval(loss - base), "mean": float(loss.mean())}
                    | {view: interval(torch.tensor(r["explained"][view])) for view in VIEWS})
    return rows


def table(rows: list[dict]) -> str:
    """The comparison as Markdown."""
    cells = [("optimiser", "updates", "recipe", "rate", "loss", "less end to end's",
              *(f"{view} view" + " alone" * (view != "both") for view in VIEWS))]
    for r in rows:
        gap = "" if r["recipe"] == RECIPES[0] else "{:+.4f} ± {:.4f}".format(*r["difference"])
        cells.append((r["optimiser"], str(r["steps"]), r["recipe"], f"{r['rate']:.2g}" + "*" * r["edge"],
                      f"{r['mean']:.4f}", gap, *("{:.2f} ± {:.2f}".format(*r[view]) for view in VIEWS)))
    return markdown(cells)


def draw(rows: list[dict], path: Path) -> None:
    """Three panels side by side: the paired difference in loss, and each view's use on its own."""
    from matplotlib.figure import Figure

    looks = dict(zip(RECIPES, (("#0072b2", "o"), ("#222222", "s"), ("#999999", "^"), ("#d55e00", "D")),
                     strict=True))
    figure = Figure(figsize=(9, 0.9 + 0.22 * len(rows)), dpi=110, layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    groups = list(dict.fromkeys((r["optimiser"], r["steps"]) for r in rows))
    for ax, key, title in zip(axes, ("difference", "global", "local"), (
            "test loss less end to end's", "global view alone: explained", "local view alone: explained"),
            strict=True):
        for i, r in enumerate(rows):
            colour, marker = looks[r["recipe"]]
            y = i + 1.2 * groups.index((r["optimiser"], r["steps"]))
            ax.errorbar(r[key][0], y, xerr=r[key][1], fmt=marker, color=colour, ms=5, capsize=2,
                        label=r["recipe"] if i < len(RECIPES) else None)
        ax.axvline(0, color="#b0b0b0", lw=0.8, zorder=0)
        ax.set_title(title, fontsize=10, loc="left")
    per = len(rows) / len(groups)
    axes[0].set_yticks([(per - 1) / 2 + (per + 1.2) * g for g in range(len(groups))],
                       [f"{name},\n{steps} updates" for name, steps in groups])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9,
                  frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Run every recipe with both optimisers at each horizon, print, draw; returns the exit status."""
    parser = make_parser("stages.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=number(int, 3, 64), default=8, help="worlds, equal for all recipes [8]")
    add("--steps", type=number(int, 60, 100_000), nargs="+", default=[400, 1200],
        help="updates per run, one or more horizons [400 1200]")
    add("--out", type=file(".png", ".pdf", ".svg"), help="figure file [out/stages.png]")
    add("--json", type=file(".json"), help="write the scores of every seed")
    args = parser.parse_args(arguments)
    out = args.out or file(".png")("out/stages.png")
    rows = compare([train(recipe, optimiser, args.seeds, steps) for optimiser in RATES
                    for steps in dict.fromkeys(args.steps) for recipe in RECIPES])
    print(table(rows))
    print(f"\n{args.seeds} seeds; ± half of a 95 % interval; differences are paired; a view alone: the "
          "share of variance it explains.\n* the best rate is the first or last of its grid.")
    draw(rows, out)
    print(f"figure: {out}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
