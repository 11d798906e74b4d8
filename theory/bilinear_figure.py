"""The panels of the bilinear chapter (Sec. 2.3, App. C of "Beyond LLaVA-HD"); the mathematics is in
bilinear.py.

Every panel is a function of the axes and a Setting; grey levels, line styles and markers carry what colour
carries.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

import bilinear as lab
from bilinear import Problem, Setting

DARK, BLUE, ORANGE, LIGHT = "#1a1a1a", "#2a6fb0", "#e08214", "#b8b8b8"   # luminances 10, 39, 58, 72 %


def excess_curve(problem: Problem, update: lab.Pairs, steps: int, floor: float = 1e-17) -> np.ndarray:
    """L - min L for one start, t = 1..steps: [steps], clipped below at `floor` for a log axis."""
    U, V = lab.trajectory(update, steps)
    return np.maximum(problem.excess(U[1:], V[1:]).reshape(steps), floor)


def typical(setting: Setting) -> Problem:
    """The setting's problem, with |c| kept off 0 and 1, where there is no saddle or no second coordinate to
    draw.
    """
    return lab.make_problem(float(np.sign(setting.c) or 1) * min(max(abs(setting.c), 0.01), 0.95), setting.d)


def plateau(ax: object, setting: Setting) -> None:
    """Excess loss against iteration from Eq. 2's start with tau0 = 10^-k: the same plateau in GD and AO."""
    p = typical(setting)
    eta = min(setting.eta, 0.9 / p.sigma[0])
    for k, colour in zip((2, 5, 8), (LIGHT, ORANGE, DARK), strict=True):
        u, v = lab.make_start(p, "paper", 10.0 ** -k, 1)
        steps = int((k * np.log(10) + 20) / np.log1p(2 * abs(p.c) * eta))
        steps = min(steps, 20_000)
        ax.loglog(np.arange(1, steps + 1), excess_curve(p, lab.gradient_descent(p.X, u, v, eta), steps),
                  color=colour, label=rf"GD, $\tau_0=10^{{-{k}}}$")
        few = min(steps, 300)
        ax.loglog(np.arange(1, few + 1), excess_curve(p, lab.alternating(p.X, u, v), few), color=colour,
                  ls="--", label=rf"AO, $\tau_0=10^{{-{k}}}$")
    ax.axhline(p.saddle_gap, color="k", lw=0.8, ls=":")
    ax.text(1.1, p.saddle_gap * 3, "level of the saddle, 2|c|", fontsize=8)
    ax.set(xlabel="iteration", ylabel="excess loss", ylim=(1e-17, 1e3),
           title=f"1  The same plateau in both (c = {p.c:g})")
    ax.legend(fontsize=7.5, loc="lower left")


def streams(ax: object, setting: Setting) -> None:
    """The field of Eq. 6 in the (tau, nu) plane, and its five fixed points by kind."""
    c = typical(setting).c
    tau, nu = np.meshgrid(np.linspace(-1.45, 1.45, 25), np.linspace(-1.45, 1.45, 25))
    ax.streamplot(tau, nu, *lab.flow_field(c, tau, nu), color=LIGHT, density=0.9, linewidth=0.8)
    style = {"source": ("s", "white"), "optimum": ("o", DARK), "saddle": ("X", ORANGE)}
    for kind, (marker, face) in style.items():
        points = np.array([(f.tau, f.nu) for f in lab.fixed_points(abs(c), 2) if f.kind == kind])
        ax.plot(*(points.T if c > 0 else points.T[::-1]), marker, color=face, mec="k", ms=9, label=kind)
    ax.set(xlabel=r"$\tau$ (along $w_+$)", ylabel=r"$\nu$ (along $w_-$)", xlim=(-1.45, 1.45),
           ylim=(-1.45, 1.45), title="2  Eq. 6: five fixed points, one kind attracts")
    ax.legend(fontsize=7.5, loc="upper right", framealpha=0.95)


SCALING = {"gd-tuned": ("GD, best step", DARK, "o", "-"), "ao": ("AO", BLUE, "s", "--"),
           "heavy-ball": ("heavy ball", ORANGE, "^", "-"),
           "over-relaxed": ("over-relaxed AO", LIGHT, "D", "--")}


def scaling_counts(cs: np.ndarray) -> dict[str, np.ndarray]:
    """Iterations from a balanced start one radian from the optimum until the excess is 1e-8 of the saddle's,
    which itself shrinks with c, per method of SCALING: [len(cs)] each.
    """
    counts = {name: [] for name in SCALING}
    for c in cs:
        p = lab.make_problem(float(c), 4)
        start = p.embed(np.array([np.cos(1.0)]), np.array([np.sin(1.0)]))
        for name in SCALING:
            counts[name].append(lab.iterations_to(p, name, *start, 0.0, excess=1e-8 * p.saddle_gap)[0])
    return {name: np.array(values) for name, values in counts.items()}


def conditioning(ax: object, setting: Setting) -> None:
    """Iterations against c: alternation lowers the line, over-relaxation and momentum change its slope."""
    cs = np.geomspace(0.003, 0.3, 7)
    for name, values in scaling_counts(cs).items():
        label, colour, marker, line = SCALING[name]
        slope = np.polyfit(np.log(cs[:4]), np.log(values[:4]), 1)[0]
        ax.loglog(cs, values, line, color=colour, marker=marker, mec="k", mew=0.5, ms=5,
                  label=f"{label}: slope {slope:.2f}")
    ax.set(xlabel="c = a.b", ylabel=r"iterations to excess $2c\cdot10^{-8}$",
           title="3  Alternation does not cure conditioning")
    ax.legend(fontsize=7.5)


def basins(ax: object, setting: Setting, size: int = 61) -> None:
    """Which of the two optima +-(u, v) GD reaches from a plane of unbalanced starts, and the two candidate
    borders.
    """
    p = typical(setting)
    (p1, q1), (p2, q2) = p.pairs
    x, y = np.meshgrid(np.linspace(-2, 2, size), np.linspace(-2, 2, size))
    u = x[..., None] * p1 + 1.4 * p2
    v = y[..., None] * q1 + 0.1 * q2
    end, _ = lab.after(lab.gradient_descent(p.X, u, v, 0.04), min(int(200 / abs(p.c)), 2000))
    ax.contourf(x, y, end @ p1, levels=[-9, 0, 9], colors=["#d9d9d9", "#8fb6dc"])
    ax.contour(x, y, lab.basin_side(p, u, v), levels=[0], colors=[DARK], linewidths=1.8)
    ax.contour(x, y, lab.basin_side(p, u, v, theta=1.0), levels=[0], colors=[DARK], linewidths=1.5,
               linestyles="--")
    ax.plot([], [], color=DARK, lw=1.8, label=r"$s=0$: the true border")
    ax.plot([], [], color=DARK, lw=1.5, ls="--", label=r"$\theta=1$: ignores the imbalance")
    ax.set(xlabel=r"$p_1\cdot u_0$", ylabel=r"$q_1\cdot v_0$",
           title=r"4  GD's basins: to $+(u,v)$ (dark) or $-(u,v)$")
    ax.legend(fontsize=7.5, loc="upper right", framealpha=0.95)


def block_rates(c: float, eta: float, ks: np.ndarray) -> np.ndarray:
    """Escape rate of k-step blocks over GD's at equal eta and equal products, derived: [len(ks)]."""
    s2, rho = 1 - c, (1 - c) / (1 + c)
    factors = [abs(lab.pair_factors(1 - (1 - eta * s2) ** int(k), 1 / rho, True)[0]) for k in ks]
    return np.log(factors) / (ks * np.log1p(2 * c * eta))


def measured_block_rate(problem: Problem, eta: float, k: int) -> float:
    """The same ratio for one k, fitted to a run from the saddle plus 1e-9."""
    (p1, q1), (p2, q2) = problem.pairs
    s = np.sqrt(problem.sigma[1])
    values = []
    for u, _ in lab.blocks(problem.X, s * p2 + 1e-9 * p1, s * q2 + 1e-9 * q1, eta, k):
        values.append(u @ p1)
        if abs(values[-1]) > 1e-4:
            return np.log(lab.fitted_factor(np.array(values[2:]))) / (k * np.log1p(problem.saddle_gap * eta))


def blocks(ax: object, setting: Setting) -> None:
    """Relative escape rate against k eta: stepping longer on one block before turning is only ever slower."""
    eta = 0.02
    for c, colour, marker in ((0.1, BLUE, "s"), (0.3, DARK, "o"), (0.6, ORANGE, "^")):
        p = lab.make_problem(c, 4)
        ks = np.unique(np.geomspace(1, 1000, 60).astype(int))
        ax.semilogx(ks * eta, block_rates(c, eta, ks), color=colour)
        some = np.array([5, 20, 50, 150, 250, 500])
        runs = [measured_block_rate(p, eta, int(k)) for k in some]
        ax.semilogx(some * eta, runs, marker, color=colour, mec="k", mew=0.5, ms=6,
                    label=f"c = {c}: run (marks), derived (line)")
    ax.axhline(1, color="k", lw=0.8, ls=":")
    ax.set(xlabel=r"$k\,\eta$ (length of a block)", ylabel="escape rate / GD's", ylim=(0, 1.15),
           title="5  Longer blocks escape more slowly")
    ax.legend(fontsize=7.5, loc="lower left")


def tied(ax: object, setting: Setting) -> None:
    """Loss from v0 = -u0: flat for GD, at the saddle's level; AO, sequential GD and a kick leave."""
    p = typical(setting)
    eta = min(setting.eta, 0.9 / p.sigma[0])
    u, v = lab.make_start(p, "tied", 0, 1)
    steps = min(int(40 / (2 * abs(p.c) * eta)), 5000)
    runs = {"GD": (lab.gradient_descent(p.X, u, v, eta), DARK, "-", 2.2),
            "GD + 1e-6 kick": (lab.gradient_descent(p.X, lab.kicked(u), v, eta), ORANGE, "-", 1.4),
            "sequential GD": (lab.blocks(p.X, u, v, eta), BLUE, "-.", 1.4),
            "AO": (lab.alternating(p.X, u, v), "#6b6b6b", "--", 1.4)}
    for label, (update, colour, line, width) in runs.items():
        U, V = lab.trajectory(update, steps)
        ax.semilogx(np.arange(1, steps + 1), p.loss(U, V)[1:, 0], line, color=colour, lw=width, label=label)
    best = (1 - abs(p.c)) ** 2 / 2
    ax.axhline(best, color="k", lw=0.8, ls=":")
    ax.axhline(best + p.saddle_gap, color="k", lw=0.8, ls=":")
    ax.text(1.1, best + p.saddle_gap + 0.02, "saddle, $(1+|c|)^2/2$", fontsize=8)
    ax.text(1.1, best - 0.06, "optimum, $(1-|c|)^2/2$", fontsize=8)
    ax.set(xlabel="iteration", ylabel="loss", ylim=(best - 0.1, None),
           title=r"6  Tied start, $v_0=\mp u_0$: GD cannot leave")
    ax.legend(fontsize=7.5, loc="center left", bbox_to_anchor=(0, 0.4))


def rank(ax: object, setting: Setting) -> None:
    """Iterations of the rank-r fit against the conditioning of what is kept: here alternation does help."""
    conditions = np.array([1, 3, 10, 30, 100])
    style = {"GD": (DARK, "o", "-"), "scaled GD": (LIGHT, "D", "-"), "ALS": (BLUE, "s", "--"),
             "over-relaxed ALS": (ORANGE, "^", "--")}
    for name in lab.RANK_METHODS:
        colour, marker, line = style[name]
        counts = [np.median([lab.rank_iterations(name, condition, seed=seed) for seed in range(3)])
                  for condition in conditions]
        ax.loglog(conditions, counts, line, color=colour, marker=marker, mec="k", mew=0.5, ms=6,
                  label=f"{name}: {counts[0]:.0f} to {counts[-1]:.0f}")
    ax.set(xlabel=r"$\sigma_1/\sigma_r$", ylabel="iterations to relative excess 1e-8",
           title=r"Rank 3 of a $30\times30$ matrix, $\sigma_{r+1}/\sigma_r=1/2$")
    ax.legend(fontsize=8)


PANELS: dict[str, Callable] = {
    "plateau": plateau, "streams": streams, "conditioning": conditioning, "basins": basins, "blocks": blocks,
    "tied": tied, "rank": rank}


def draw(path: Path, setting: Setting, panel: str | None = None) -> None:
    """Write the six-panel figure, or one panel, to `path`; 9 inches wide, so that 10 points read well at 900
    pixels.
    """
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 9.5, "axes.titlesize": 10, "axes.grid": True, "grid.alpha": 0.25,
                         "axes.axisbelow": True, "svg.hashsalt": "bilinear"}):
        names = [panel] if panel else [name for name in PANELS if name != "rank"]
        size, grid = ((6, 4.2), (1, 1)) if panel else ((9, 10.8), (3, 2))
        figure, axes = plt.subplots(*grid, figsize=size, layout="constrained", squeeze=False)
        for name, ax in zip(names, axes.flat, strict=True):
            PANELS[name](ax, setting)
        figure.savefig(path, dpi=150)
        plt.close(figure)
