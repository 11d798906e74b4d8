"""From the bilinear problem to the model: does training in turns help the smallest network built like SliME?

    python theory/stages.py           table and figure (out/stages.png), about a minute on two cores

bilinear.py finds that alternation has no better limit than gradient descent, that it is Gauss-Seidel
against Jacobi, and that it escapes a symmetric start. Here the question is put to a network with SliME's
parts (Fig. 2):

    global view - frozen features ------------------------> adapter - tokens -+
    crops ------- frozen features - compressor (queries) -> adapter - tokens -+- question, head - answer

An image is P crops of L patches; one patch of each crop holds an object (a key and M values), the rest is
clutter. The global view is each crop's mean: every object is in it, diluted. A detail question names a key
and asks for its values, a global question asks for the image's mean values. The compressor sees the patches
at full strength, but must learn which to keep; both paths share the adapter, so the local one is a product
of two trained factors: the problem is bilinear in (adapter, the compressor's value map).

Recipes, at an equal number of updates (one update = one gradient from one batch):

    end to end      both blocks, both views, all the time
    alternating     both views; 20 updates of one block, then 20 of the other
    three stages    I adapter, global view; II compressor, local view; III both (Sec. 2.2); a third each

and the paper's "soft constraint within the gradient during E2E training" (its future work), tried as

    sequential      Gauss-Seidel: one update of the adapter, one of the compressor, in turn; the
                    rates on offer go beyond the best end-to-end one, so they include over-relaxation
    preconditioned  both, each gradient times the inverse Gram matrix of the other factor, as AO's solve does
    balanced        both, gradients rescaled so that |gradient| / |parameters| agree between the blocks
    interleaved     one update of stage I, one of II, one of III, in turn: the stages as a constraint

What came out (five seeds, 400 updates; run it for the numbers): trained on both views from the start,
nothing is neglected but the global view; end to end, balanced or not, reaches the lowest loss. The three
stages end close behind, and so does interleaving them under Adam; both keep the global view 1.6 to 2.6
times as useful alone. That is one half of the paper's Table 4; the other half, a neglected local path, does
not appear. In turns, each block gets half the updates, and momentum makes "sequential" unstable at rates
that suit the others (`bilinear.heavy_ball`).

Each recipe runs with momentum SGD and with Adam and takes the best learning rate of RATES by its validation
loss; all seeds and rates of a recipe are one batched computation. Which recipe wins is measured, not
assumed.

Shapes: R = seeds x rates runs; B images; P crops; L patches; F features; D token width; Q queries a crop; M
values.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]

P, L, Q, M, KEYS, F, D = 4, 6, 2, 4, 8, 48, 16
RATES = {"SGD": (0.02, 0.05, 0.1, 0.2, 0.4), "Adam": (0.001, 0.003, 0.01, 0.03)}
RECIPES = ("end to end", "alternating", "three stages", "sequential", "preconditioned", "balanced",
           "interleaved")
VIEWS = ("both", "global", "local")
BLOCK = 20                                      # updates of one block before "alternating" turns to the other


@dataclass
class World:
    """What is frozen, one per run: the features' weights, the head's key and value maps, the keys'
    directions.
    """
    features: torch.Tensor                      # [R, KEYS + M, F]
    head_key: torch.Tensor                      # [R, D, KEYS]
    head_value: torch.Tensor                    # [R, D, M]
    keys: torch.Tensor                          # [R, KEYS, KEYS], rows orthonormal


def make_world(seeds: int, rates: int) -> World:
    """Worlds for `seeds` seeds, each repeated `rates` times."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(seeds, *shape, generator=generator)

    head = torch.linalg.qr(draw(D, KEYS + M))[0]
    frozen = (draw(KEYS + M, F) / (KEYS + M) ** 0.5, head[..., :KEYS], head[..., KEYS:], torch.linalg.qr(
        draw(KEYS, KEYS))[0])
    return World(*(tensor.repeat_interleave(rates, dim=0) for tensor in frozen))


def make_batch(world: World, batch: int, rates: int, generator: torch.Generator) -> Tensors:
    """Images and questions, fresh on every call, equal for runs that differ in the rate only."""
    runs = world.features.shape[0]
    seeds = runs // rates

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(seeds, batch, *shape, generator=generator).repeat_interleave(rates, dim=0)

    patches = 0.4 * draw(P, L, KEYS + M)                                # clutter: [R, B, P, L, KEYS + M]
    kind = draw(KEYS).argsort(-1)[..., :P]                                 # distinct keys: [R, B, P]
    values = draw(P, M).sign()                                                          # [R, B, P, M]
    run = torch.arange(runs)[:, None, None]
    objects = torch.cat([2 * world.keys[run, kind], values], dim=-1)                    # [R, B, P, KEYS + M]
    place = torch.zeros(runs, batch, P, L).scatter_(-1, draw(P, L).argmax(-1, keepdim=True), 1.0)[..., None]
    patches = patches * (1 - place) + objects[..., None, :] * place
    detail = torch.arange(batch) % 2 == 0                               # half of the questions
    question = torch.where(detail[:, None], world.keys[run[..., 0], kind[..., 0]], 0.0)  # [R, B, KEYS]
    answer = torch.where(detail[:, None], values[:, :, 0], values.mean(2))              # [R, B, M]

    def features(x: torch.Tensor) -> torch.Tensor:
        return (x.flatten(1, -2) @ world.features).relu().reshape(*x.shape[:-1], F)

    return {"global": features(2 * patches.mean(3)), "local": features(patches), "question": question,
            "answer": answer, "detail": detail}                     # [R, B, P, F], [R, B, P, L, F], ...


def make_parameters(runs: int, rates: int) -> Tensors:
    """adapter [R, F, D] | queries [R, Q, F], key [R, F, F], value [R, F, F]: the compressor. Equal across
    rates.
    """
    generator = torch.Generator().manual_seed(1)
    shapes = {"adapter": (F, D), "queries": (Q, F), "key": (F, F), "value": (F, F)}
    drawn = {name: torch.randn(runs // rates, *shape, generator=generator) for name, shape in shapes.items()}
    return {name: (x / F ** 0.5).repeat_interleave(rates, dim=0).requires_grad_()
            for name, x in drawn.items()}


COMPRESSOR = ("queries", "key", "value")


def answer(world: World, w: Tensors, batch: Tensors, view: str) -> torch.Tensor:
    """The network's answer from the tokens of `view`: [R, B, M]."""
    runs, images = batch["question"].shape[:2]
    inputs = []
    if view != "local":
        inputs.append(batch["global"])                                                  # [R, B, P, F]
    if view != "global":
        score = torch.einsum("rqf,rbplf->rbpql", w["queries"] @ w["key"], batch["local"]) / F ** 0.5
        mixed = torch.einsum("rbpql,rbplf->rbpqf", score.softmax(-1), batch["local"])   # [R, B, P, Q, F]
        inputs.append((mixed.flatten(1, 3) @ w["value"]).reshape(runs, images, P * Q, F))
    tokens = (torch.cat(inputs, dim=2).flatten(1, 2) @ w["adapter"]).reshape(runs, images, -1, D)
    look = torch.einsum("rbtd,rdk,rbk->rbt", tokens, world.head_key, batch["question"]).mul(4).softmax(-1)
    return torch.einsum("rbt,rbtd,rdm->rbm", look, tokens, world.head_value)


def loss_per_run(world: World, w: Tensors, batch: Tensors, view: str) -> torch.Tensor:
    """Mean squared error of the answers: [R]."""
    return (answer(world, w, batch, view) - batch["answer"]).square().mean((1, 2))


def schedule(recipe: str, t: int, steps: int) -> tuple[str, tuple[str, ...]]:
    """(view, parameters to update) of update t."""
    stages = (("global", ("adapter",)), ("local", COMPRESSOR), ("both", ("adapter", *COMPRESSOR)))
    if recipe == "three stages":
        return stages[min(3 * t // steps, 2)]
    if recipe == "interleaved":
        return stages[t % 3]
    if recipe in ("alternating", "sequential"):
        turn = t // (BLOCK if recipe == "alternating" else 1) % 2
        return "both", (COMPRESSOR if turn else ("adapter",))
    return stages[2]


def size(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Euclidean norm over all but the first axis, all tensors together: [R]."""
    return sum(t.square().flatten(1).sum(1) for t in tensors).sqrt()


def balance(grads: Tensors, w: Tensors) -> Tensors:
    """Rescale the two blocks' gradients so that |gradient| / |parameters| is the blocks' geometric mean in
    both.
    """
    adapter = size([grads["adapter"]]) / size([w["adapter"]])
    compressor = size([grads[n] for n in COMPRESSOR]) / size([w[n] for n in COMPRESSOR])
    factor = (compressor / adapter.clamp_min(1e-12)).clamp(1e-4, 1e4).sqrt()[:, None, None]  # [R, 1, 1]
    return {name: g * (factor if name == "adapter" else 1 / factor) for name, g in grads.items()}


def precondition(grads: Tensors, w: Tensors, batch: Tensors, damping: float = 0.1) -> Tensors:
    """Scaled GD on the product value x adapter: each factor's gradient times the other side's inverse Gram
    matrix.

    The adapter's inputs are features, so its Gram matrix is theirs; the value map is followed by the adapter,
    so its is adapter adapter'. Both are normalised by their mean eigenvalue and damped: the rate keeps its
    meaning.
    """
    x = batch["global"].flatten(1, 2)                                                   # [R, B P, F]

    def inverse(gram: torch.Tensor) -> torch.Tensor:
        gram = gram / gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]
        return torch.linalg.inv(gram + damping * torch.eye(F))

    adapter = w["adapter"].detach()
    return grads | {"adapter": inverse(x.mT @ x) @ grads["adapter"],
                    "value": grads["value"] @ inverse(adapter @ adapter.mT)}


def train(recipe: str, optimiser: str, seeds: int, steps: int, batch: int = 32) -> dict:
    """Run one recipe for all seeds and rates; returns scores at the best rate and the validation curve.

    scores[view][kind]: [seeds], share of the answers' variance explained on held-out images (1 perfect, 0
    nothing). curve: [checkpoints] mean over seeds of the validation loss, both views; updates: [checkpoints].
    Gradients are clipped to norm 1 per run, as is common practice; SGD has momentum 0.9, Adam its usual
    constants.
    """
    rates = len(RATES[optimiser])
    world, w = make_world(seeds, rates), make_parameters(seeds * rates, rates)
    rate = torch.tensor(RATES[optimiser]).repeat(seeds)[:, None, None]                  # [R, 1, 1]
    generator = torch.Generator().manual_seed(2)
    held_out = [make_batch(world, 256, rates, torch.Generator().manual_seed(seed)) for seed in (3, 4)]
    first = {name: torch.zeros_like(p) for name, p in w.items()}
    second, count = {name: torch.zeros_like(p) for name, p in w.items()}, dict.fromkeys(w, 0)
    updates, curve = [], []
    for t in range(steps + 1):
        if t % max(steps // 30, 1) == 0 or t == steps:
            with torch.no_grad():
                updates.append(t)
                curve.append(loss_per_run(world, w, held_out[0], "both"))
        if t == steps:
            break
        view, names = schedule(recipe, t, steps)
        examples = make_batch(world, batch, rates, generator)
        found = torch.autograd.grad(loss_per_run(world, w, examples, view).sum(), [w[name] for name in names])
        grads = dict(zip(names, found, strict=True))
        if recipe == "balanced":
            grads = balance(grads, w)
        if recipe == "preconditioned":
            grads = precondition(grads, w, examples)
        clip = (1 / size(list(grads.values()))).clamp(max=1)[:, None, None]            # [R, 1, 1]
        with torch.no_grad():
            for name, g in grads.items():
                g = g * clip
                count[name] += 1
                if optimiser == "SGD":
                    first[name].mul_(0.9).add_(g)
                    w[name] -= rate * first[name]
                else:
                    first[name].mul_(0.9).add_(g, alpha=0.1)
                    second[name].mul_(0.999).addcmul_(g, g, value=0.001)
                    mean = first[name] / (1 - 0.9 ** count[name])
                    spread = (second[name] / (1 - 0.999 ** count[name])).sqrt()
                    w[name] -= rate * mean / (spread + 1e-8)
    losses = torch.stack(curve).reshape(len(curve), seeds, rates)               # [checkpoints, seeds, rates]
    best = int(losses[-1].mean(0).nan_to_num(float("inf"), posinf=float("inf")).argmin())
    test, truth, scores = held_out[1], held_out[1]["answer"], {}
    with torch.no_grad():
        for view in VIEWS:
            miss = (answer(world, w, test, view) - truth).square()                      # [R, B, M]
            for kind, rows in (("global", ~test["detail"]), ("detail", test["detail"])):
                share = 1 - miss[:, rows].mean((1, 2)) / truth[:, rows].square().mean((1, 2))
                scores.setdefault(view, {})[kind] = share.reshape(seeds, rates)[:, best].tolist()
    return {"recipe": recipe, "optimiser": optimiser, "rate": RATES[optimiser][best], "scores": scores,
            "updates": updates, "curve": losses[:, :, best].mean(1).tolist()}


def table(results: list[dict]) -> str:
    """Mean over seeds and, in brackets, standard error in the last digits, as Markdown."""
    head = ["optimiser", "recipe", "rate"]
    head += [f"{view}: {kind}" for view in VIEWS for kind in ("global", "detail")]
    cells = [head]
    for r in results:
        row = [r["optimiser"], r["recipe"], f"{r['rate']:g}"]
        for view in VIEWS:
            for kind in ("global", "detail"):
                x = torch.tensor(r["scores"][view][kind])
                row.append(f"{x.mean():.2f} ({x.std() / len(x) ** 0.5 * 100:.0f})")
        cells.append(row)
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


def draw(results: list[dict], path: Path) -> None:
    """Above, validation loss against updates; below, the score of each view; one column per optimiser."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    line = dict(zip(RECIPES, (("#1a1a1a", "-"), ("#2a6fb0", "-"), ("#e08214", "-"), ("#2a6fb0", "--"),
                              ("#8c8c8c", ":"), ("#1a1a1a", "--"), ("#e08214", "--")), strict=True))
    marks = {"both": ("o", "#1a1a1a", "both views"), "local": ("s", "#8fb6dc", "local view only"),
             "global": ("^", "#e08214", "global view only")}
    with plt.rc_context({"font.size": 9.5, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.25}):
        figure, axes = plt.subplots(2, 2, figsize=(9, 7.6), layout="constrained", sharey="row")
        for column, optimiser in enumerate(RATES):
            rows = [r for r in results if r["optimiser"] == optimiser]
            top, bottom = axes[:, column]
            for r in rows:
                colour, style = line[r["recipe"]]
                top.semilogy(r["updates"], r["curve"], style, color=colour, label=r["recipe"], lw=1.6)
            top.set(title=f"{optimiser}, both views", xlabel="updates")
            for view, (marker, colour, label) in marks.items():
                for x, r in enumerate(rows):
                    seeds = [sum(pair) / 2 for pair in zip(*r["scores"][view].values(), strict=True)]
                    x += {"both": -0.2, "local": 0.2, "global": 0.0}[view]
                    bottom.plot([x] * len(seeds), seeds, "_", color="k", ms=8, mew=0.8, zorder=1)
                    bottom.plot(x, sum(seeds) / len(seeds), marker, color=colour, mec="k", ms=7,
                                label=label if r is rows[0] else None)
            bottom.set_xticks(range(len(rows)), [r["recipe"] for r in rows], rotation=35, ha="right")
            bottom.set(title=f"{optimiser}, tested with each view (bars: seeds)", ylim=(-0.3, 1.05))
            bottom.axhline(0, color="k", lw=0.8, ls=":")
        axes[0, 0].set_ylabel("validation loss")
        axes[1, 0].set_ylabel("variance explained, mean\nof both kinds of question")
        axes[0, 1].legend(fontsize=8)
        axes[1, 1].legend(fontsize=8, loc="center left", bbox_to_anchor=(0, 0.62))
        figure.savefig(path, dpi=150)
        plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Run every recipe with both optimisers, print the table, draw the figure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.error = lambda message: parser.exit(2, f"stages.py: {message}\n")
    parser.add_argument("--seeds", type=int, default=5, help="independent worlds, at least 2 [5]")
    parser.add_argument("--steps", type=int, default=400, help="updates per run, at least 60 [400]")
    parser.add_argument("--out", default="out/stages.png", help="figure file [out/stages.png]")
    parser.add_argument("--json", help="write all scores and curves as JSON")
    args = parser.parse_args(arguments)
    if args.seeds < 2 or args.steps < 60:
        parser.error("--seeds must be at least 2 and --steps at least 60")
    if Path(args.out).suffix not in (".png", ".pdf", ".svg"):
        parser.error(f"argument --out: a figure file ends in .png, .pdf or .svg, not {args.out!r}")
    for path in filter(None, (args.out, args.json)):    # before the work, so that none is lost
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).open("a").close()
        except OSError as reason:
            parser.error(f"cannot write {path}: {reason}")
    results = [train(recipe, optimiser, args.seeds, args.steps) for optimiser in RATES for recipe in RECIPES]
    print(table(results))
    print(f"\nVariance explained on held-out images, by view and kind of question (standard error, 1e-2); "
          f"{args.seeds} seeds, {args.steps} updates each.")
    draw(results, Path(args.out))
    print(f"figure: {args.out}")
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
