"""What a file of SMR holds: counts beside the paper's, and the lengths of Figure 4."""

import re
from collections import Counter
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
    """How many records of a source have a query and an answer of how many words."""

    records: int = 0
    images: int = 0
    query: Counter = field(default_factory=Counter)    # words -> records
    answer: Counter = field(default_factory=Counter)


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
        rounds = len(turns) // 2
        for entry in (found[name], found["all"]):
            entry.records += 1
            entry.images += bool(images)
            entry.query[round(sum(words(turn["value"]) for turn in turns[0::2]) / rounds)] += 1
            entry.answer[round(sum(words(turn["value"]) for turn in turns[1::2]) / rounds)] += 1
    if not found["all"].records:
        raise RecordError(f"{path}: no records in it")
    return {name: entry for name, entry in found.items() if entry.records}


def quantile(counts: Counter, percent: float) -> int:
    """The smallest length that `percent` of the records do not exceed."""
    rest = counts.total() * percent / 100
    for length in sorted(counts):
        rest -= counts[length]
        if rest <= 1e-9:
            return length
    return 0


def table(found: dict[str, Lengths]) -> str:
    """Counts beside the paper's, and lengths in words: mean and the end of the 99 % interval."""
    rows = [("source", "records", "paper", "images", "query", "99 %", "answer", "99 %",
             "answer <= 5")]
    for name, entry in found.items():
        row = [name, f"{entry.records:,}", SOURCES[name].paper if name in SOURCES else "",
               f"{entry.images:,}"]
        for counts in (entry.query, entry.answer):
            mean = sum(length * count for length, count in counts.items()) / entry.records
            row += [f"{mean:.1f}", str(quantile(counts, PERCENTILE))]
        short = sum(count for length, count in entry.answer.items() if length <= 5)
        rows.append((*row, f"{short / entry.records:.0%}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                     for row in rows)


def plot(found: dict[str, Lengths], path: Path) -> None:
    """Figure 4: the share of records by the length of their query (left) and answer (right), one
    line per source."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, part in zip(panels, ("query", "answer"), strict=True):
        end = max(quantile(getattr(found["all"], part), PERCENTILE), 1)
        edges = np.unique(np.linspace(0.5, end + 0.5, 31).round() - 0.5)  # bins of whole words
        for number, (name, entry) in enumerate(found.items()):
            counts = getattr(entry, part)
            weights = np.array(list(counts.values())) / entry.records
            shares, _ = np.histogram(list(counts), edges, weights=weights)
            color, width = ("black", 2.2) if name == "all" else (f"C{number}", 1.1)
            panel.stairs(shares, edges, label=f"{name} ({entry.records:,})", baseline=None,
                         color=color, linewidth=width)
        panel.set(xlabel=f"words of the {part} (up to {end}: {PERCENTILE} % of all records)",
                  ylabel="share of the source's records", xlim=(edges[0], edges[-1]),
                  ylim=(0, None))
        panel.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)
