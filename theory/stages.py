"""From the bilinear problem to the model: does training in turns help the smallest network like it?

    python theory/stages.py                 table and out/stages.png, some five minutes on one core

The network has SliME's parts (Fig. 2):

    global view - frozen features ------------------------> adapter - tokens -+
    crops ------- frozen features - compressor (queries) -> adapter - tokens -+- head - answer

An image is P crops of L patches; one patch of each crop holds an object (a key and M values), the
rest is clutter. The global view is each crop's mean, with every object in it, diluted; the
compressor sees the patches at full strength, but must learn which to keep. A detail question names
a key and asks for its values, a global one asks for the image's mean values. Both paths share the
adapter, so the problem is bilinear in (adapter, the compressor's value map).

Recipes, at an equal number of updates (one update = one gradient of one batch of 32):

    end to end      both blocks, both views, all the time
    three stages    I adapter, global view; II compressor, local view; III both; a third each
    interleaved     an update of each by turns: a soft form, as the paper's future work (Sec. 4)
    in turns        both views; 20 updates of the adapter, 20 of the compressor: AO's counterpart

Each takes its rate from a grid of factor 1.75 by its loss on validation images; losses and scores
are of test images. Recipes share worlds and images, seed by seed, so that differences are paired.

Shapes: R = seeds x rates runs, one batched computation; B images; P crops; L patches; F features;
D token width; Q queries a crop; M values. Losses are mean squared errors of values +-1.
"""

import sys
from pathlib import Path

import torch
from program import file, make_parser, markdown, number
from torch import Tensor

Tensors = dict[str, Tensor]

P, L, Q, M, KEYS, F, D = 4, 6, 2, 4, 8, 48, 16
RECIPES = ("end to end", "three stages", "interleaved", "in turns")
COMPRESSOR, VIEWS = ("queries", "key", "value"), ("both", "global", "local")
RATES = {"SGD": [0.03 * 1.75**i for i in range(6)], "Adam": [0.001 * 1.75**i for i in range(6)]}

# ---- The world and the network -------------------------------------------------------------------

def make_world(seeds: int, rates: int, seed: int) -> Tensors:
    """What is frozen, for `seeds` seeds, each repeated `rates` times: "features" [R, KEYS + M, F];
    the head's "key" [R, D, KEYS] and "value" [R, D, M]; "keys" [R, KEYS, KEYS], rows orthonormal.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(seeds, *shape, generator=generator)

    head, keys = (torch.linalg.qr(draw(n, m))[0] for n, m in ((D, KEYS + M), (KEYS, KEYS)))
    frozen = {"features": draw(KEYS + M, F) / (KEYS + M) ** 0.5, "keys": keys,
              "key": head[..., :KEYS], "value": head[..., KEYS:]}
    return {name: x.repeat_interleave(rates, dim=0) for name, x in frozen.items()}


def make_batch(world: Tensors, batch: int, rates: int, generator: torch.Generator) -> Tensors:
    """Fresh images and questions, equal for runs that differ in the rate only: "global"
    [R, B, P, F], "local" [R, B, P, L, F], "question" [R, B, KEYS], "answer" [R, B, M]; "detail"
    [B], whether it asks for one object."""
    runs = len(world["keys"])

    def draw(*shape: int) -> Tensor:
        x = torch.randn(runs // rates, batch, *shape, generator=generator)
        return x.repeat_interleave(rates, dim=0)

    clutter = 0.4 * draw(P, L, KEYS + M)
    kind, values = draw(KEYS).argsort(-1)[..., :P], draw(P, M).sign()       # distinct keys
    run = torch.arange(runs)[:, None, None]
    objects = torch.cat([2 * world["keys"][run, kind], values], dim=-1)     # [R, B, P, KEYS + M]
    place = torch.nn.functional.one_hot(draw(P, L).argmax(-1), L)[..., None].bool()
    patches = torch.where(place, objects[..., None, :], clutter)            # [R, B, P, L, KEYS + M]
    detail = torch.arange(batch) % 2 == 0
    asked = world["keys"][run[..., 0], kind[..., 0]]                        # the first crop's key

    def features(x: Tensor) -> Tensor:
        return (x.flatten(1, -2) @ world["features"]).relu().reshape(*x.shape[:-1], F)

    return {"global": features(2 * patches.mean(3)), "local": features(patches), "detail": detail,
            "question": torch.where(detail[:, None], asked, 0.0),
            "answer": torch.where(detail[:, None], values[:, :, 0], values.mean(2))}


def make_parameters(seeds: int, rates: int, seed: int) -> Tensors:
    """adapter [R, F, D]; the compressor: queries [R, Q, F], key and value [R, F, F]."""
    generator, w = torch.Generator().manual_seed(seed + 10**6), {}
    shapes = {"adapter": (F, D), "queries": (Q, F), "key": (F, F), "value": (F, F)}
    for name, shape in shapes.items():
        drawn = torch.randn(seeds, *shape, generator=generator) / F**0.5
        w[name] = drawn.repeat_interleave(rates, dim=0).requires_grad_()
    return w


def answer(world: Tensors, w: Tensors, batch: Tensors, view: str) -> Tensor:
    """The network's answer from the tokens of `view`: [R, B, M]."""
    runs, images = batch["question"].shape[:2]
    inputs = []
    if view != "local":
        inputs.append(batch["global"])                                      # [R, B, P, F]
    if view != "global":
        # each crop's queries look at its patches; what they see passes the value map
        score = torch.einsum("rqf,rbplf->rbpql", w["queries"] @ w["key"], batch["local"]) / F**0.5
        seen = torch.einsum("rbpql,rbplf->rbpqf", score.softmax(-1), batch["local"])
        inputs.append((seen.flatten(1, 3) @ w["value"]).reshape(runs, images, P * Q, F))
    tokens = (torch.cat(inputs, dim=2).flatten(1, 2) @ w["adapter"]).reshape(runs, images, -1, D)
    # the head looks for the tokens that match the question and reads their values
    look = torch.einsum("rbtd,rdk,rbk->rbt", tokens, world["key"], batch["question"])
    return torch.einsum("rbt,rbtd,rdm->rbm", look.mul(4).softmax(-1), tokens, world["value"])


# ---- Training ------------------------------------------------------------------------------------

def schedule(recipe: str, t: int, steps: int) -> tuple[str, tuple[str, ...]]:
    """(view shown, parameters moved) in update t of `steps`."""
    stages = (("global", ("adapter",)), ("local", COMPRESSOR), ("both", ("adapter", *COMPRESSOR)))
    if recipe == "in turns":
        return "both", (COMPRESSOR if t // 20 % 2 else ("adapter",))
    now = {"end to end": 2, "three stages": min(3 * t // steps, 2), "interleaved": t % 3}
    return stages[now[recipe]]


def update(w: Tensors, grads: Tensors, state: dict, rate: Tensor, optimiser: str) -> None:
    """Momentum SGD (.9) or Adam (.9, .999), in place, each run's gradient clipped to norm 1."""
    norm = sum(g.square().flatten(1).sum(1) for g in grads.values()).sqrt()
    clip = (1 / norm).clamp(max=1)[:, None, None]                           # [R, 1, 1]
    for name, g in grads.items():
        t, m, s = state.get(name, (0, 0.0, 0.0))
        g, t = g * clip, t + 1
        if optimiser == "SGD":
            m = step = 0.9 * m + g
        else:
            m, s = 0.9 * m + 0.1 * g, 0.999 * s + 0.001 * g * g
            step = m / (1 - 0.9**t) / ((s / (1 - 0.999**t)).sqrt() + 1e-8)
        state[name] = t, m, s
        w[name].data -= rate * step


def train(recipe: str, optimiser: str, seeds: int, steps: int, seed: int = 0) -> dict:
    """One recipe, all seeds and rates; then, at the "rate" of least validation loss (an "edge" of
    the grid?), the test "loss": [seeds], and for each of VIEWS: [seeds] the share of the answers'
    variance that it explains, mean of both kinds of question: 1 perfect, 0 nothing."""
    grid = RATES[optimiser]
    world, w = (make(seeds, len(grid), seed) for make in (make_world, make_parameters))
    rate, state = torch.tensor(grid).repeat(seeds)[:, None, None], {}       # [R, 1, 1]
    stream, validation, test = (torch.Generator().manual_seed(seed + i * 10**6) for i in (2, 3, 4))
    for t in range(steps):
        view, names = schedule(recipe, t, steps)
        batch = make_batch(world, 32, len(grid), stream)
        loss = (answer(world, w, batch, view) - batch["answer"]).square().mean((1, 2)).sum()
        grads = torch.autograd.grad(loss, [w[name] for name in names])
        update(w, dict(zip(names, grads, strict=True)), state, rate, optimiser)

    def misses(batch: Tensors, view: str) -> Tensor:
        with torch.no_grad():
            return (answer(world, w, batch, view) - batch["answer"]).square()         # [R, B, M]

    batch = make_batch(world, 256, len(grid), validation)
    loss = misses(batch, "both").mean((1, 2)).reshape(seeds, -1).mean(0)              # [rates]
    best = int(loss.nan_to_num(float("inf")).argmin())
    result = {"recipe": recipe, "optimiser": optimiser, "steps": steps, "rate": grid[best],
              "edge": best in (0, len(grid) - 1)}
    batch = make_batch(world, 256, len(grid), test)
    for view in VIEWS:
        miss = misses(batch, view)
        share = [1 - miss[:, of].mean((1, 2)) / batch["answer"][:, of].square().mean((1, 2))
                 for of in (batch["detail"], ~batch["detail"])]
        result[view] = torch.stack(share).mean(0).reshape(seeds, -1)[:, best].tolist()
        if view == "both":
            result["loss"] = miss.mean((1, 2)).reshape(seeds, -1)[:, best].tolist()
    return result


# ---- What came out -------------------------------------------------------------------------------

def interval(x: list[float]) -> tuple[float, float]:
    """Mean of x and half its 95 % interval, by Student's t (Cornish and Fisher's expansion)."""
    n = len(x) - 1
    t = 1.96 + 2.372 / n + 2.823 / n**2 + 2.556 / n**3
    x = torch.tensor(x)
    return float(x.mean()), float(t * x.std() / (n + 1) ** 0.5)


def compare(results: list[dict]) -> list[dict]:
    """Each result with the "gap" of its loss to end to end's, seed by seed."""
    base = {(r["optimiser"], r["steps"]): r["loss"] for r in results if r["recipe"] == RECIPES[0]}
    return [r | {"gap": [x - y for x, y in zip(r["loss"], base[r["optimiser"], r["steps"]],
                                               strict=True)]} for r in results]


def table(rows: list[dict]) -> str:
    """The comparison as Markdown."""
    cells = [("optimiser", "updates", "recipe", "rate", "test loss", "less end to end's",
              "both views", "global alone", "local alone")]
    for r in rows:
        cells.append((r["optimiser"], str(r["steps"]), r["recipe"],
                      f"{r['rate']:.2g}" + "*" * r["edge"], f"{interval(r['loss'])[0]:.4f}",
                      "{:+.4f} ± {:.4f}".format(*interval(r["gap"])),
                      *("{:.2f} ± {:.2f}".format(*interval(r[view])) for view in VIEWS)))
    return markdown(cells)


def draw(rows: list[dict], path: Path) -> None:
    """Side by side: the gap in loss to end to end, and what each view explains alone."""
    from matplotlib.figure import Figure

    looks = dict(zip(RECIPES, (("#0072b2", "o"), ("#222222", "s"), ("#999999", "^"),
                               ("#d55e00", "D")), strict=True))
    figure = Figure(figsize=(9, 0.9 + 0.22 * len(rows)), dpi=110, layout="constrained")
    axes, keys = figure.subplots(1, 3, sharey=True), ("gap", "global", "local")
    for ax, key in zip(axes, keys, strict=True):
        for i, r in enumerate(rows):
            (colour, mark), (middle, half) = looks[r["recipe"]], interval(r[key])
            ax.errorbar(middle, i + i // 4, xerr=half, fmt=mark, color=colour, ms=5, capsize=2,
                        label=r["recipe"] if i < 4 else None)
        ax.axvline(0, color="#b0b0b0", lw=0.8, zorder=0)
        title = "test loss less end to end's" if key == "gap" else f"{key} view alone explains"
        ax.set_title(title, fontsize=10, loc="left")
    axes[0].set_yticks([1.5 + 5 * i for i in range(len(rows) // 4)],           # four recipes each
                       [f"{r['optimiser']},\n{r['steps']} updates" for r in rows[::4]])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False)
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> int:
    """Run every recipe with both optimisers at each horizon; returns the exit status."""
    parser = make_parser("stages.py", __doc__.split("\n")[0])
    add = parser.add_argument
    add("--seeds", type=number(int, 5, 64), default=8, help="worlds, the same for all recipes [8]")
    add("--seed", type=number(int, 0, 1000), default=0, help="of the first draw [0]")
    add("--steps", type=number(int, 60, 100_000), nargs="+", default=[400, 1200],
        help="updates per run, one or more horizons [400 1200]")
    add("--out", type=file(".png", ".pdf", ".svg"), help="the figure [out/stages.png]")
    args = parser.parse_args(arguments)
    out = args.out or file(".png")("out/stages.png")
    rows = compare([train(recipe, optimiser, args.seeds, steps, args.seed) for optimiser in RATES
                    for steps in dict.fromkeys(args.steps) for recipe in RECIPES])
    print(table(rows))
    draw(rows, out)
    print("\n± half of a 95 % interval, of differences seed by seed; views: the share of variance\n"
          f"they explain; * is the first or the last rate of its grid.\n\nwrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
