"""What a file of SMR holds: counts beside the paper's, and the lengths of Figure 4."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from sliming.chat import IMAGE
from sliming.data import check_record
from sliming.records import RecordError, lines
from sliming.smr.sources import SOURCES

PERCENTILE = 99      # Figure 4 draws the interval in which this share of the records lies


@dataclass
class Lengths:
    """How many of a source's records have images, and how many words their texts have."""

    images: int = 0
    query: list[int] = field(default_factory=list)    # of each record
    answer: list[int] = field(default_factory=list)


def words(text: str) -> int:
    """Words between spaces; every Chinese character is one."""
    return len(re.findall(r"[\u4e00-\u9fff]|[^\s\u4e00-\u9fff]+", text.replace(IMAGE, "")))


def lengths(path: Path) -> dict[str, Lengths]:
    """Per source, in SOURCES' order, and "all". A record of several rounds counts with its mean."""
    found = {name: Lengths() for name in [*SOURCES, "others", "all"]}
    for number, record in lines(path):
        try:
            turns, images = check_record(record)
        except RecordError as error:
            raise RecordError(f"{path}, line {number}: {error}") from error
        name = next((name for name in SOURCES if str(record.get("id")).startswith(f"{name}-")),
                    "others")
        counts = [words(turn["value"]) for turn in turns]
        for entry in (found[name], found["all"]):
            entry.images += bool(images)
            entry.query.append(round(np.mean(counts[0::2])))
            entry.answer.append(round(np.mean(counts[1::2])))
    if not found["all"].query:
        raise RecordError(f"{path}: no records in it")
    return {name: entry for name, entry in found.items() if entry.query}


def end(counts: list[int]) -> int:
    """The smallest length that PERCENTILE % of the records do not exceed."""
    return int(np.percentile(counts, PERCENTILE, method="inverted_cdf"))


def table(found: dict[str, Lengths]) -> str:
    """Counts beside the paper's, and lengths in words: mean and the end of the 99 % interval."""
    rows = [("source", "records", "paper", "images", "query", "99 %", "answer", "99 %",
             "answer <= 5")]
    for name, entry in found.items():
        row = [name, f"{len(entry.query):,}", SOURCES[name].paper if name in SOURCES else "",
               f"{entry.images:,}"]
        for counts in (entry.query, entry.answer):
            row += [f"{np.mean(counts):.1f}", str(end(counts))]
        rows.append((*row, f"{np.mean(np.array(entry.answer) <= 5):.0%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows)


def plot(found: dict[str, Lengths], path: Path) -> None:
    """Figure 4: the share of records by the length of their query (left) and answer (right), one
    line per source."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, part in zip(panels, ("query", "answer"), strict=True):
        last = max(end(getattr(found["all"], part)), 1)
        edges = np.unique(np.linspace(0.5, last + 0.5, 31).round() - 0.5)  # bins of whole words
        for number, (name, entry) in enumerate(found.items()):
            counts = getattr(entry, part)
            color, width = ("black", 2.2) if name == "all" else (f"C{number}", 1.1)
            panel.stairs(np.histogram(counts, edges)[0] / len(counts), edges, baseline=None,
                         label=f"{name} ({len(counts):,})", color=color, linewidth=width)
        panel.set(xlabel=f"words of the {part} (up to {last}: {PERCENTILE} % of all records)",
                  ylabel="share of the source's records", xlim=(edges[0], edges[-1]),
                  ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
