"""A question on its way into SMR: what a reader makes of a record, and the filters judge.

Legend: letters A, B, ... name options in their order; gold: the answer that the source gives.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Candidate:
    """One question before the filters. `image` is a file; None for a text-only question."""

    id: str
    image: Path | None
    question: str                   # as the source has it, without options
    prompt: str                     # what the model is asked
    answer: str                     # what it should say
    gold: str = ""                  # the right option's text, or the free answer
    letter: str = ""                # the right option's letter, where there are options
    others: tuple[str, ...] = ()    # the texts of the other options
    closing: str = ""               # makes `answer` reasoning: the sentence that spells gold out
    always: bool = False            # add `closing` even where the reasoning has gold itself
    size: tuple[int, int] | None = None            # width, height that the source states
    rows: int = 0                                  # lines of text that the image has room for
    box: tuple[float, ...] = ()     # x, y, width, height that must lie in the image
    mismatch: str = ""              # why image and text do not belong together, if it shows here


@dataclass(frozen=True)
class Drop:
    """A record that is not built: `reason` is one of filters.REASONS, `detail` one line."""

    id: str
    reason: str
    detail: str
    image: str = ""


@dataclass
class Selection:
    """What is taken of a source; `passed_over` counts what is not, by the reason."""

    splits: tuple[str, ...] = ()    # () = the source's own training splits
    seed: int = 0                   # of DVQA's choice and of Table 5's prompts
    count: int = 100_000            # DVQA: how many reasoning questions
    machine: bool = False           # ChartQA: machine-written questions too
    text_only: bool = False         # ScienceQA: questions without an image too
    passed_over: Counter = field(default_factory=Counter)
