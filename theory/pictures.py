"""The pictures of the bilinear chapter: bilinear.py's figure of three panels, and its film.

Everything drawn comes from `bilinear.experiment`. A method has one colour everywhere (of Okabe and
Ito's, which the colour-blind can tell apart); a start has one dash; theory is thin and dark.
"""

from dataclasses import asdict
from pathlib import Path

import bilinear as lab
import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

LOOKS = {"gd": ("GD, step η", "#0072b2"), "sequential": ("sequential GD, step η", "#56b4e9"),
         "ao": ("AO", "#d55e00"), "over-relaxed": ("over-relaxed AO*", "#e69f00"),
         "heavy-ball": ("heavy ball*", "#009e73"), "adam": (f"Adam at {lab.ADAM_RATE}", "#cc79a7")}
DASHES = {"generic": ("-", "generic start"), "eq2": ("--", "Eq. 2, (τ, ν) = ({tau0:g}, {nu0:g})")}
MARKS = {"gd": "o", "ao": "s"}
GREY, DARK = "#b0b0b0", "#222222"
STYLE = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "legend.fontsize": 8,
         "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
         "svg.hashsalt": "bilinear"}
KINDS = ("at rest", "two-cycle", "longer cycles, chaos", "diverges")


def draw_excess(ax: Axes, results: dict) -> None:
    """Panel 1: excess loss against iterations, runs as thick lines and theory as thin ones."""
    setting, races, longest = results["setting"], results["races"], []
    for kind, (dashes, _) in DASHES.items():
        for name, run in races[kind].items():
            label, colour = LOOKS[name]
            counts = (races[k][name]["arrived"] for k in DASHES)
            label += ": " + " / ".join("–" if n is None else str(n) for n in counts)
            label = label if kind == "generic" else None                # one entry for both starts
            ax.semilogy(np.maximum(run["excess"], lab.FLOOR / 10), dashes, color=colour, lw=2.4,
                        alpha=0.75, label=label)
            if run["derived"] is not None:
                ax.semilogy(run["derived"], color=DARK, lw=0.7, zorder=3)
            # Adam is as slow for every c: beside others it may run out of the picture
            if run["arrived"] and (name != "adam" or len(setting["methods"]) == 1):
                longest.append(len(run["excess"]))
    for dashes, label in DASHES.values():
        ax.plot([], [], dashes, color=GREY, lw=2.4, label=label.format(**setting))
    ax.plot([], [], color=DARK, lw=0.7, label="derived rate")
    ax.axhline(2 * setting["c"], color=DARK, lw=0.8, ls=":", zorder=0, label="the saddle, 2c")
    tops = [3 * run["excess"][0] for runs in races.values() for run in runs.values()]
    ax.set(xlim=(0, max(longest, default=lab.LIMIT)), ylim=(lab.FLOOR, max(10, *tops)),
           xlabel="iteration", ylabel="excess loss", title="1  How fast, from two starts")
    ax.legend(title=f"iterations to {lab.ARRIVED:g},\ngeneric / Eq. 2 (* is told c)",
              title_fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.02))


def draw_field(ax: Axes, results: dict) -> None:
    """Panel 2: the field of Eq. 6, its five fixed points, and how GD and AO walk through it."""
    c, walks = results["setting"]["c"], results["walks"]
    size = max(1.5, 1.1 * max(np.abs(path[0]).max() for path in walks["gd"]))
    grid = np.linspace(-size, size, 41)
    ax.streamplot(grid, grid, *lab.field(c, *np.meshgrid(grid, grid)), color=GREY, linewidth=0.6,
                  density=0.8, arrowsize=0.7)
    for name, mark in MARKS.items():
        label, colour = LOOKS[name]
        for i, path in enumerate(walks[name]):
            ax.plot(*path.T, "-" + mark, color=colour, lw=1.4, ms=3.5, label=None if i else label)
    for tau, nu, mark, face, label in ((0, 0, "o", "white", "source"),
                                       (0, 1, "X", "white", "saddle"),
                                       (1, 0, "*", DARK, "optimum")):
        ax.plot([tau, -tau], [nu, -nu], mark, color=face, mec=DARK, ms=9, label=label, zorder=4)
    ax.set(xlim=(-size, size), ylim=(-size, size), xlabel="τ, along the optimum",
           ylabel="ν, along the saddle", title="2  Which way: Eq. 6, GD and AO")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)


def draw_ends(ax: Axes, results: dict) -> None:
    """Panel 3: the losses between which GD ends against its step, and the loss at which AO does."""
    e, c, eta = results["ends"], results["setting"]["c"], results["setting"]["eta"]
    x, bounded, saddle = e["eta_sigma1"], e["kind"] < 3, (1 + c) ** 2 / 2
    ax.axhline(e["ao"], color=LOOKS["ao"][1], lw=5, alpha=0.6, label="AO: takes no step size")
    ax.plot(np.repeat(x[bounded], 32), e["loss"][bounded].ravel(), ".", color=LOOKS["gd"][1],
            ms=1.5, label="GD: its last 32 losses", rasterized=True)
    ax.axhline(saddle, color=DARK, lw=0.8, ls=":", label="the saddle")
    ax.axvline(eta * (1 + c), color=DARK, lw=0.9, ls="--", label="η of panels 1, 2")
    top = 1.8 * max(saddle, e["loss"][bounded].max(initial=0))
    for here in np.split(np.arange(len(x)), np.flatnonzero(np.diff(e["kind"])) + 1):
        kind, half = e["kind"][here[0]], (x[1] - x[0]) / 2
        first, last = x[here[0]] - half, x[here[-1]] + half
        ax.axvspan(first, last, color=str(1 - 0.09 * kind), lw=0, zorder=0)
        if len(here) > 20:                               # wide enough for its name
            ax.text(x[here].mean(), 0.98 * top, KINDS[kind], rotation=90, ha="center", va="top",
                    size=8)
    ax.set(xlim=(x[0], x[-1]), ylim=(0, top), xlabel="η σ₁", ylabel="loss",
           title="3  Where GD ends from Eq. 2's start")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, markerscale=4)


def draw(results: dict) -> Figure:
    """The figure of three panels: 990 x 946 pixels."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9, 8.6), dpi=110, layout="constrained")
        top, bottom = figure.subfigures(2, 1)
        axes = [top.subplots(), *bottom.subplots(1, 2)]
        for panel, ax in zip((draw_excess, draw_field, draw_ends), axes, strict=True):
            panel(ax, results)
        title = "c = a·b = {c:g},  η = {eta:.4g},  d = {d},  seed {seed}"
        figure.suptitle(title.format(**results["setting"]), fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write the figure; a PNG in 128 colours: a third as large, and it looks the same."""
    if path.suffix.lower() == ".png":
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        image = Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB")
        image.quantize(128).save(path, optimize=True)
    else:
        figure.savefig(path)


def animate(setting: lab.Setting, path: Path, frames: int = 40) -> None:
    """Write a GIF: GD and AO walk through panel 2's field from Eq. 2's start; and their losses."""
    p, start = lab.make_problem(setting.c, setting.d, setting.seed), (setting.tau0, setting.nu0)
    eta = setting.eta or lab.tuned(setting.c)["step"]
    curves = {name: lab.race(p, name, p.start(*start), eta)["excess"] for name in MARKS}
    steps = min(max(map(len, curves.values())), 1000)
    walks = {name: lab.walk(p, name, *start, eta, steps) for name in MARKS}
    with rc_context(STYLE):
        figure = Figure(figsize=(8, 4), dpi=90, layout="constrained")
        canvas, (left, right) = FigureCanvasAgg(figure), figure.subplots(1, 2)
        draw_field(left, {"setting": asdict(setting), "walks": {m: [walks[m][:1]] for m in MARKS}})
        right.axhline(2 * setting.c, color=DARK, lw=0.8, ls=":")
        right.set(xlim=(0, steps), ylim=(lab.FLOOR, 30 * curves["gd"][0]), yscale="log",
                  xlabel="iteration", title=f"Excess loss, c = {setting.c:g}, η = {eta:.3g}")
        trails = {name: [ax.plot([], [], "-" + mark, color=LOOKS[name][1], lw=1.6, ms=8,
                                 markevery=[-1])[0] for ax in (left, right)]
                  for name, mark in MARKS.items()}
        counter = right.text(0.97, 0.97, "", transform=right.transAxes, ha="right", va="top")
        canvas.draw()
        still, pictures = canvas.copy_from_bbox(figure.bbox), []
        # AO is soon there: the film starts slowly and goes faster
        for t in np.unique((steps * np.linspace(0, 1, frames) ** 2).astype(int)):
            canvas.restore_region(still)
            counter.set_text(f"iteration {t}")
            for name, (here, loss) in trails.items():
                here.set_data(*walks[name][: t + 1].T)
                loss.set_data(np.arange(len(curves[name][: t + 1])), curves[name][: t + 1])
            for artist in (counter, *sum(trails.values(), [])):
                artist.axes.draw_artist(artist)
            pictures.append(Image.fromarray(np.array(canvas.buffer_rgba())).convert("RGB"))
    palette = pictures[-1].quantize(128)                 # one for all: the last frame shows it all
    pictures = [frame.quantize(palette=palette, dither=0) for frame in pictures]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=180, loop=0)
