"""What comes out: tables with the paper's rows, a plot, the files that servers and judges take."""

import json
import sys
from pathlib import Path

import numpy as np

from sliming.evaluation.benchmarks import find, write_submission
from sliming.evaluation.metrics import aggregate, bootstrap
from sliming.records import RecordError

PAPER_COLUMNS = [  # of Tables 1 and 2
    "VQA-T", "GQA", "VQAv2", "MMB", "MMB-C", "MMMU-v", "LLaVA-W", "MME-P", "MME-C", "MM-Vet",
    "MathVerse", "MathVista", "MathVision", "ScienceQA", "POPE", "AMBER", "MME-H"]
TABLE_COLUMNS = [*PAPER_COLUMNS, "ChartQA", "TabMWP"]
PAPER = {  # Tables 1 and 2, "Ours"; the LoRA row is the one marked with a dagger
    "SliME-7B": [64.39, 63.13, 80.32, 69.32, 61.85, 37.20, 76.10, 1544, 383, 35.40,
                 17.50, 37.50, 16.12, 76.80, 85.40, 87.80, 633],
    "SliME-8B": [64.76, 63.94, 80.69, 75.00, 71.80, 41.20, 73.90, 1578, 337, 37.40,
                 22.90, 43.30, 16.78, 84.18, 86.00, 88.90, 671],
    "SliME-8B LoRA": [65.26, 63.94, 80.79, 75.42, 70.96, 40.80, 64.90, 1573, 346, 36.80,
                      21.80, 43.60, 16.12, 84.13, 86.00, 90.10, 645],
    "SliME-13B": [66.11, 63.60, 80.43, 71.13, 65.20, 38.00, 73.10, 1606, 293, 41.20,
                  19.00, 40.80, 18.09, 80.17, 86.30, 89.40, 673],
}


def say(text: str) -> None:
    print(text, file=sys.stderr)


def scored(name: str, rows: list[dict]) -> list[dict]:
    """The rows that can be scored here, with what counts as their prediction."""
    found = [(row, find(name).extracted(row)) for row in rows]
    return [{**row, "prediction": answer} for row, answer in found if answer is not None]


def columns_of(name: str, rows: list[dict]) -> dict[str, float]:
    """A benchmark's columns of the paper's tables; {} where nothing can be scored here."""
    rows = scored(name, rows)
    return aggregate(name, rows)["table"] if rows else {}


def result(name: str, rows: list[dict], asked: int, out: Path) -> dict:
    """A benchmark's numbers, and its columns with their intervals. Says what has to be known about
    them and writes the submission."""
    benchmark, usable = find(name), scored(name, rows)
    numbers = aggregate(name, usable) if usable else {"table": {}}
    interval = bootstrap(name, usable) if usable else {}
    left_out = len(rows) - len(usable)
    if usable and left_out:
        numbers["n_left_out"] = left_out
    if len(rows) < asked:
        say(f"{name}: {len(rows)} of {asked} questions are answered")
    if remark := benchmark.remark(asked, left_out):
        say(f"{name}: {remark}")
    if benchmark.submission and (not usable or benchmark.submits_always):
        path = out / f"{name}_submission{benchmark.submission}"
        write_submission(benchmark.submit(rows), path)
        say(f"{name}: decided by {benchmark.judge or benchmark.decides}; the answers for it are "
            f"in {path}")
    return {"n": len(rows), "of": asked, "numbers": numbers,
            "columns": {column: [value, *interval[column]]
                        for column, value in numbers["table"].items()}}


def found_columns(results: dict[str, dict]) -> dict[str, list[float]]:
    """{column: [value, low, high]} in the tables' order."""
    found = {column: values for one in results.values()
             for column, values in one["columns"].items()}
    return {column: found[column] for column in TABLE_COLUMNS if column in found}


def paper_rows() -> dict[str, dict[str, float]]:
    """{model: {column: value}} of the paper's tables."""
    return {f"{model} (paper)": dict(zip(PAPER_COLUMNS, values, strict=True))
            for model, values in PAPER.items()}


def markdown(results: dict[str, dict], ours: str) -> str:
    """The paper's SliME rows and, below, ours with its 95 % intervals; then accuracies per part."""
    found = found_columns(results)
    lines = [f"| model | {' | '.join(found)} |", "|---|" + "---:|" * len(found)]
    for model, paper in paper_rows().items():
        cells = [f"{paper[column]:g}" if column in paper else "" for column in found]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    cells = [f"{value:.1f} [{low:.1f}, {high:.1f}]" for value, low, high in found.values()]
    lines.append(f"| {ours} | {' | '.join(cells)} |")
    parts = [(name, *part) for name, one in results.items() if one["columns"]
             for part in find(name).parts(one["numbers"])]
    if parts:
        lines += ["", "| benchmark | by | part | score | n |", "|---|---|---|---:|---:|"]
    lines += [f"| {name} | {field} | {part} | {score:.1f} | {n} |"
              for name, field, part, score, n in parts]
    return "\n".join(lines)


def plot(results: dict[str, dict], ours: str, path: Path) -> None:
    """The same as bars, at most seven benchmarks in a row, MME's points in a row of their own."""
    import matplotlib.pyplot as plt  # only here: it takes a second to load

    found, width = found_columns(results), 0.8 / (len(PAPER) + 1)
    points = [column for column in found if column.startswith("MME-")]
    percent = [column for column in found if column not in points]
    rows = [percent[at:at + 7] for at in range(0, len(percent), 7)] + [points] * bool(points)
    longest = max(map(len, rows))
    # A long path would push the legend's other names out.
    ours = ours if len(ours) <= 24 else f"...{ours[-21:]}"
    models = {model: {column: [value] * 3 for column, value in paper.items()}
              for model, paper in paper_rows().items()}
    figure, panels = plt.subplots(len(rows), 1, squeeze=False, layout="constrained",
                                  figsize=(max(8, 1.6 * longest), 0.6 + 3 * len(rows)))
    for panel, columns in zip(panels[:, 0], rows, strict=True):
        for place, (model, known) in enumerate([*models.items(), (ours, found)]):
            value, low, high = np.array([known.get(column, [np.nan] * 3) for column in columns]).T
            bars = panel.bar(
                np.arange(len(columns)) + (place - len(PAPER) / 2) * width, value, width * 0.92,
                color="tab:orange" if known is found else plt.cm.Blues(0.35 + 0.15 * place),
                label=model, error_kw={"capsize": 2},
                yerr=np.maximum(0, [value - low, high - value]) if known is found else None)
            panel.bar_label(bars, ["" if np.isnan(v) else f"{v:.0f}" for v in value], padding=2,
                            fontsize=7)
        panel.set_xticks(range(len(columns)), columns)
        panel.set_xlim(-0.6, (len(columns) if columns is points else len(rows[0])) - 0.4)
        panel.set_ylabel("points" if columns is points else "percent")
        panel.margins(y=0.1)
        panel.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside upper center",
                  ncols=len(PAPER) + 1, frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def report(results: dict[str, dict], ours: str, weights: str, out: Path) -> None:
    """Writes results.json, results.md and results.png into `out` and prints the tables. What was
    scored into the same folder earlier, for the same weights, stays in them."""
    path, model = out / "results.json", {"model": ours, "weights": weights}
    try:
        before = json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise RecordError(f"{path}: broken JSON; move it away, the answers beside it are "
                          "kept") from error
    if {key: before.get(key) for key in model} == model:
        results = {**before["results"], **results}
    path.write_text(json.dumps({**model, "results": results}, indent=2) + "\n")
    if found_columns(results):
        (out / "results.md").write_text(markdown(results, ours) + "\n")
        plot(results, ours, out / "results.png")
        print(markdown(results, ours))
        say(f"wrote {path}, results.md and results.png")
