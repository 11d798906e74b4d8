"""What the programs of theory/ share: flags with ranges, JSON, and a Markdown table."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np


def make_parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser whose errors are one line, exit status 2, and which takes no abbreviated flags."""
    parser = argparse.ArgumentParser(prog=name, description=description, allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"{name}: {message}\n")
    return parser


def check(fine: bool, message: str) -> None:
    """Raise what argparse reports as one line."""
    if not fine:
        raise argparse.ArgumentTypeError(message)


def number(kind: type, low: float, high: float) -> Callable[[str], float]:
    """An argparse type: a number of this kind from low to high."""
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        what = f"a {'whole ' * (kind is int)}number from {low:g} to {high:g}"
        check(low <= value <= high, f"must be {what}, not {text!r}")
        return value
    return parse


def file(*endings: str) -> Callable[[str], Path]:
    """An argparse type: a file with one of these endings, in a folder that is made if need be."""
    def parse(text: str) -> Path:
        path = Path(text)
        check(path.suffix.lower() in endings, f"must end in {' or '.join(endings)}, not {text!r}")
        try:                                            # before the work, so that none is lost
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("a").close()
        except OSError as reason:
            check(False, f"cannot write {text!r}: {reason.strerror}")
        return path
    return parse


def plain(value: object) -> object:
    """The same value as JSON can hold it: arrays as lists, numbers that are not finite as None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(item) for item in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


def markdown(rows: list[tuple[str, ...]]) -> str:
    """Rows of cells, the header first, as an aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])
