"""What the rows of `results.jsonl` say: scores, paired differences, verdicts, charts.

Every arm answers the same questions with every seed, so a difference of two arms is a table
d [seeds n, pictures m] of -1, 0, 1. Its mean has the interval

    mean +- t(n - 1) sqrt(Var(means of the seeds) / n + Var(means of the pictures) / m)

with Student's 97.5 % quantile of n - 1 degrees of freedom. Seeds and pictures are both drawn at
random; the sum counts what they share twice and errs on the wide side. One seed has no interval.

Verdicts follow `CLAIMS`, written before any arm was run. A claim says that some differences are
positive. It holds here if all their intervals lie above 0; it does not hold here if one lies below
`MARGIN`, so that even its upper end is less than a point; else it cannot be told here.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sliming.guard import InputError
from sliming.lab.arms import ARMS
from sliming.lab.run import chosen_rate
from sliming.records import resume
from sliming.watch import say

MARGIN = 0.01
# Student's t, 97.5 %, of 1 .. 9 degrees of freedom; the last one for more, too wide then.
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)

# As printed in Tables 3 and 4, by arm and view: ScienceQA, which the paper calls a matter of the
# global context, and TextVQA, of details. "default" is the row of gamma 75 %, "gamma100" Nq = 144.
PAPER_3 = {
    ("mlp", "global"): (74.30, 58.94), ("mixture", "global"): (77.00, 60.57),
    ("nq4", "both"): (76.15, 63.09), ("nq25", "both"): (75.56, 62.48),
    ("gamma100", "both"): (77.09, 63.58), ("gamma90", "both"): (76.05, 64.05),
    ("default", "both"): (77.44, 63.83), ("gamma50", "both"): (77.09, 62.75),
}
PAPER_4 = {
    ("uncompressed", "both"): (72.97, 61.48), ("compressed", "both"): (73.85, 62.14),
    ("e2e", "both"): (74.12, 59.69), ("e2e", "global"): (75.26, 43.65),
    ("e2e", "local"): (71.24, 58.22), ("default", "both"): (77.44, 63.58),
    ("default", "global"): (76.01, 59.42), ("default", "local"): (76.23, 62.45),
}


@dataclass(frozen=True)
class Claim:
    """`paper`: where it says so. `above`: (arm, another arm, questions asked with which view), the
    first to be better; "all" questions are global and detail ones."""

    text: str
    paper: str
    above: tuple[tuple[str, str, str], ...]


CLAIMS = (
    Claim("The gated mixture beats one MLP on the global view", "Table 3",
          (("mixture", "mlp", "global/global"),)),
    Claim("More tokens per crop help", "Table 3", (("default", "nq4", "all/both"),)),
    Claim("... up to a point", "Table 3", (("default", "nq25", "all/both"),)),
    Claim("Dropping the irrelevant quarter helps", "Table 3",
          (("default", "gamma100", "all/both"),)),
    Claim("The router drops better than chance", "Sec. 2.2",
          (("gamma50", "random50", "all/both"), ("gamma25", "random25", "all/both"))),
    Claim("Uncompressed local tokens hurt questions about the whole", "Table 4",
          (("default", "uncompressed", "global/both"),)),
    Claim("Compressing everything loses the whole", "Table 4",
          (("default", "compressed", "global/both"),)),
    Claim("Three stages end better than end to end", "Table 4", (("default", "e2e", "all/both"),)),
    Claim("End to end leaves the local path untrained", "Table 4",
          (("default", "e2e", "detail/local"),)),
    Claim("Three stages end better than I and II as one", "Sec. 2.2",
          (("default", "joined", "all/both"),)),
    Claim("Details rare: three stages end better than end to end", "Sec. 2.2",
          (("default-rare", "e2e-rare", "all/both"),)),
    Claim("Details rare: end to end leaves the local path untrained", "Sec. 2.2",
          (("default-rare", "e2e-rare", "detail/local"),)),
    Claim("One run, soft turns: better than end to end", "Sec. 4", (("turns", "e2e", "all/both"),)),
    Claim("One run, balanced: better than end to end", "Sec. 4",
          (("balanced", "e2e", "all/both"),)),
    Claim("Merging what is dropped helps", "Sec. 4", (("merge25", "gamma25", "all/both"),)),
)

# --------------------------------------------------------------------------------------- statistics


def interval(table: np.ndarray) -> list[float | None]:
    """Mean and half width of its 95 % interval of a table [seeds, pictures]."""
    n, m = table.shape
    if n < 2:
        return [round(float(table.mean()), 4), None]
    variance = table.mean(1).var(ddof=1) / n + table.mean(0).var(ddof=1) / m
    half = STUDENT[min(n - 1, len(STUDENT)) - 1] * variance ** 0.5
    return [round(float(table.mean()), 4), round(float(half), 4)]


def answers(rows: dict[int, dict], seeds: list[int], asked: str) -> np.ndarray:
    """Right answers, 0 or 1, [seeds, pictures]; of "all" questions the picture's mean."""
    family, view = asked.split("/")
    if family == "all":
        return (answers(rows, seeds, f"global/{view}") + answers(rows, seeds, f"detail/{view}")) / 2
    return np.array([[int(digit) for digit in rows[seed]["right"][asked]] for seed in seeds])


def difference(done: dict, arm: str, other: str, asked: str) -> list | None:
    """Paired over the seeds that both have; None without any."""
    seeds = sorted(done.get(arm, {}).keys() & done.get(other, {}).keys())
    if not seeds:
        return None
    return interval(answers(done[arm], seeds, asked) - answers(done[other], seeds, asked))


def verdict(differences: list[list | None]) -> str:
    """The rule at the top of this file."""
    if None in differences or any(half is None for _, half in differences):
        return "cannot be told here"
    if any(mean + half < MARGIN for mean, half in differences):
        return "does not hold here"
    if all(mean - half > 0 for mean, half in differences):
        return "holds here"
    return "cannot be told here"


def summary(rows: list[dict], setting: dict) -> dict:
    """Everything that tables and charts show."""
    rates = {name: chosen_rate(rows, name, setting["rates"]) for name in ARMS}
    done, tried = {}, {}
    for row in rows:
        if row["rate"] == rates[row["arm"]]:
            done.setdefault(row["arm"], {})[row["seed"]] = row
        if row["seed"] == 0:
            tried.setdefault(row["arm"], {})[str(row["rate"])] = row["validation_loss"]
    arms = {}
    for name in (name for name in ARMS if name in done):
        arm, mine = ARMS[name], done[name]
        seeds, first = sorted(mine), ARMS[name].asked[0]
        asked = [f"{family}/{view}" for view in arm.asked for family in ("global", "detail", "all")]

        def mean(what: str, mine: dict = mine) -> float:
            return round(float(np.mean([row[what] for row in mine.values()])), 2)

        arms[name] = {
            "seeds": seeds, "rate": rates[name], "tried": tried[name],
            "scores": {one: interval(answers(mine, seeds, one)) for one in asked},
            "against": arm.against,
            "difference": {} if arm.against == name else {
                family: difference(done, name, arm.against, f"{family}/{first}")
                for family in ("global", "detail", "all")},
            "tokens": mean("tokens"),
            "ms_per_step": min(row["ms_per_step"] for row in mine.values()),  # other work adds
            "memory_gb": mean("memory_gb"), "curve": mine[seeds[0]]["curve"]}
    claims = []
    for claim in CLAIMS:
        found = [difference(done, *one) for one in claim.above]
        claims.append({"claim": claim.text, "paper": claim.paper, "differences": found,
                       "verdict": verdict(found)})
    return {"setting": setting, "arms": arms, "claims": claims}


# ------------------------------------------------------------------------------------------- tables


def points(pair: list | None, sign: bool = False) -> str:
    """A share and its half width, in points."""
    if pair is None:
        return "-"
    mean, half = pair
    text = f"{100 * mean:+.1f}" if sign else f"{100 * mean:.1f}"
    return text if half is None else f"{text} ± {100 * half:.1f}"


def markdown(header: list[str], rows: list[list]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verdicts(results: dict) -> str:
    """The claims, as a table."""
    claims = [[one["claim"], one["paper"], ", ".join(points(d, True) for d in one["differences"]),
               one["verdict"]] for one in results["claims"]]
    return markdown(["claim", "paper", "difference in points, 95 %", "verdict"], claims)


def tables(results: dict) -> str:
    """The README's tables."""
    arms, views = [], []
    for name, arm in results["arms"].items():
        first, scores = ARMS[name].asked[0], arm["scores"]
        arms.append([f"`{name}`", ARMS[name].about,
                     *(points(scores[f"{family}/{first}"]) for family in ("global", "detail")),
                     f"{points(arm['difference']['all'], True)} (`{arm['against']}`)"
                     if arm["difference"] else "",
                     f"{arm['tokens']:.0f}", f"{arm['ms_per_step']:.0f}",
                     f"{arm['memory_gb']:.2f}", arm["rate"], len(arm["seeds"])])
        if len(ARMS[name].asked) > 1:
            views.append([f"`{name}`", *(points(scores[f"{family}/{view}"])
                                         for family in ("global", "detail")
                                         for view in ARMS[name].asked)])
    return "\n\n".join((
        verdicts(results),
        markdown(["arm", "what", "global", "detail", "difference, all (to)", "tokens per image",
                  "ms per step, at least", "GB", "rate", "seeds"], arms),
        markdown(["asked with", "global: both", "only global", "only local", "detail: both",
                  "only global", "only local"], views)))


# ------------------------------------------------------------------------------------------- charts

COLOURS = {"global": "tab:blue", "detail": "tab:orange"}
TABLE_3 = ("mlp", "queries", "mixture", "nq4", "nq25", "gamma100", "gamma90", "default", "gamma50",
           "gamma25", "random50", "random25", "merge25", "average", "shuffle")
TABLE_4 = ("uncompressed", "compressed", "e2e", "joined", "turns", "balanced", "default",
           "e2e-rare", "joined-rare", "default-rare")


def chart(results: dict, bars: list[tuple[str, str]], printed: dict, title: str,
          path: Path) -> None:
    """Scores with intervals, (arm, view) by row, beside what the paper prints."""
    from matplotlib import pyplot as plt
    bars = [(name, view) for name, view in bars if f"all/{view}" in
            results["arms"].get(name, {"scores": {}})["scores"]]
    figure, (here, paper) = plt.subplots(1, 2, sharey=True, constrained_layout=True,
                                         figsize=(10, 1.4 + 0.3 * len(bars)), width_ratios=(2, 1))
    for place, (name, view) in enumerate(bars):
        for family, shift in (("global", -0.15), ("detail", 0.15)):
            mean, half = results["arms"][name]["scores"][f"{family}/{view}"]
            here.errorbar(100 * mean, place + shift, xerr=100 * (half or 0), fmt="o", markersize=4,
                          color=COLOURS[family], label=family if place == 0 else None)
        for value, colour in zip(printed.get((name, view), (np.nan, np.nan)), COLOURS.values(),
                                 strict=True):  # NaN is not drawn
            paper.plot(value, place, "s", color=colour, markersize=5)
    here.set_yticks(range(len(bars)), [
        ARMS[name].about if view == ARMS[name].asked[0] else f"    only {view}"
        for name, view in bars])
    here.invert_yaxis()
    here.set(xlabel="exact match in %, 95 % intervals", title=title, xlim=(0, 100))
    figure.legend(loc="outside upper left", ncols=2)
    paper.set(xlabel="ScienceQA, TextVQA (orange)", title="as the paper prints")
    for axes in (here, paper):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def frontier(results: dict, path: Path) -> None:
    """Accuracy against tokens per image."""
    from matplotlib import pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5), constrained_layout=True)
    lines = {"γ, by the router": ("gamma25", "gamma50", "default", "gamma90", "gamma100"),
             "as many at random": ("random25", "random50"), "tokens per crop": ("nq4", "default",
             "nq25"), "merged": ("merge25",), "average pooling": ("average",),
             "pixel shuffle": ("shuffle",), "uncompressed": ("uncompressed",),
             "global compressed, too": ("compressed",), "global view only": ("mixture",)}
    for label, names in lines.items():
        found = [results["arms"][name] for name in names if name in results["arms"]]
        if found:
            pairs = [next(pair for asked, pair in arm["scores"].items() if asked[:4] == "all/")
                     for arm in found]
            axes.errorbar([arm["tokens"] for arm in found], [100 * mean for mean, _ in pairs],
                          yerr=[100 * (half or 0) for _, half in pairs], fmt="o-", capsize=2,
                          label=label)
    axes.set(xlabel="visual tokens per image", ylabel="exact match in %, global and detail",
             xscale="log", ylim=(0, 100))
    axes.set_xticks(ticks := (64, 100, 150, 200, 300, 400), ticks)
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def schedules(results: dict, path: Path) -> None:
    """Losses of the same validation questions in training, with each view; and what is reached
    where detail questions are rare."""
    from matplotlib import pyplot as plt
    shown = [name for name in ("default", "joined", "e2e") if name in results["arms"]]
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(4 * len(shown) + 4, 3.6),
                                constrained_layout=True, squeeze=False)
    for panel, name in zip(axes[0, :-1], shown, strict=True):
        curve = results["arms"][name]["curve"]
        for view in ("both", "global", "local"):
            panel.plot([row["step"] for row in curve], [row[view] for row in curve], label=view)
        panel.set(xlabel="step", ylabel="loss, validation questions", title=ARMS[name].about,
                  yscale="log")
        panel.grid(alpha=0.3, which="both")
        panel.legend()
    panel = axes[0, -1]
    for name in shown:
        found = [(100 * ARMS[one].detail, results["arms"][one]["scores"]["detail/both"])
                 for one in (f"{name}-rare", name) if one in results["arms"]]
        panel.errorbar([share for share, _ in found], [100 * pair[0] for _, pair in found],
                       yerr=[100 * (pair[1] or 0) for _, pair in found], capsize=2, fmt="o-",
                       label=ARMS[name].about)
    panel.set(xlabel="detail questions in stage III, %", ylabel="detail, exact match in %",
              ylim=(0, 100))
    panel.grid(alpha=0.3)
    panel.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(folder: Path) -> None:
    """Writes results.json, results.md and the charts into the folder. InputError without rows."""
    rows, setting = resume(folder / "results.jsonl"), folder / "setting.json"
    results = summary(rows, json.loads(setting.read_text())) if rows else {"arms": {}}
    if not results["arms"]:
        raise InputError(f"{folder} has no results yet: python -m sliming.lab run --out {folder}")
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "results.md").write_text(tables(results) + "\n")
    chart(results, [(name, ARMS[name].asked[0]) for name in TABLE_3], PAPER_3, "Table 3, here",
          folder / "table3.png")
    chart(results, [(name, view) for name in TABLE_4 for view in ARMS[name].asked], PAPER_4,
          "Table 4, here", folder / "table4.png")
    frontier(results, folder / "frontier.png")
    schedules(results, folder / "schedules.png")
    say(tables(results))
