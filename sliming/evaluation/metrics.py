"""How the paper's benchmarks judge answers (Sec. 3): `score` one, `aggregate` all.

The rules are those of each benchmark's own program, oddities included, for only then are numbers
comparable; each benchmark's object names the program that it follows. A record is {"prediction":
text, "references": gold answer or answers, "context": dict}.

Legend: U units of a part of a benchmark, K what is counted of each, R draws of the bootstrap.
"""

import numpy as np

from sliming.evaluation.benchmarks import find
from sliming.evaluation.question import Benchmark


def score(benchmark: str, prediction: str, references: str | list[str],
          context: dict | None = None) -> float:
    """How right one answer is, 0 to 1, by the benchmark's own rule; `context` as at that rule.

    ValueError for an unknown benchmark, for one that a judge decides, and for a record that lacks
    what the rule needs.
    """
    task, context = find(benchmark), context or {}
    if task.judge and "points" not in context:
        raise ValueError(f"{benchmark} is not scored offline; it is decided by {task.judge}")
    if not isinstance(prediction, str):
        raise ValueError(f"{benchmark}: a prediction must be text, "
                         f"not {type(prediction).__name__}")
    if not isinstance(references, task.gold) or references == []:
        wanted = "text" if str in task.gold else "the list of the annotators' answers"
        raise ValueError(f"{benchmark}: the gold answer must be {wanted}, not {references!r}")
    try:
        return task.score(prediction, references, context)
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{benchmark}: the record does not fit the benchmark "
                         f"({type(error).__name__}: {error})") from error


def scores_of(benchmark: str, records: list[dict]) -> list[float]:
    if not records:
        raise ValueError(f"{benchmark}: no answers to score")
    return [score(benchmark, record["prediction"], record["references"], record.get("context"))
            for record in records]


def aggregate(benchmark: str, records: list[dict]) -> dict:
    """The numbers of a whole benchmark, named as its own program names them; under "table" the
    columns of the paper's tables, under "by" accuracies per subject, level and so on."""
    task, scores = find(benchmark), scores_of(benchmark, records)
    sums = {part: units.sum(0) for part, units in tally(task, records, scores).items()}
    numbers, by = plain("", task.totals(sums)), {}
    for record, value in zip(records, scores, strict=True):
        for field, groups in task.groups(record.get("context") or {}).items():
            for group in groups if isinstance(groups, list) else [groups]:
                by.setdefault(field, {}).setdefault(str(group), []).append(value)
    if by:
        numbers["by"] = {field: {group: {"n": len(some), "acc": 100 * sum(some) / len(some)}
                                 for group, some in sorted(groups.items())}
                         for field, groups in by.items()}
    return numbers


def tally(task: Benchmark, records: list[dict], scores: list[float]) -> dict[str, np.ndarray]:
    """{part: float64 [U, K]}, one row per unit."""
    units: dict[tuple, tuple[list, list]] = {}
    for place, (record, value) in enumerate(zip(records, scores, strict=True)):
        try:
            unit = task.unit(place, record.get("context") or {})
        except (KeyError, ValueError) as error:
            raise ValueError(f"{task.name}: a record's context lacks {error}") from error
        members, values = units.setdefault(unit, ([], []))
        members.append(record)
        values.append(value)
    parts: dict[str, list] = {}
    for (part, _), (members, values) in units.items():
        parts.setdefault(part, []).append(task.counts(members, values))
    return {part: np.array(rows, dtype=np.float64) for part, rows in parts.items()}


def plain(key: str, value: dict | np.ndarray) -> dict | int | float:
    """Without numpy; counts are int where they are whole (VQA's soft sums are not)."""
    if isinstance(value, dict):
        return {inner: plain(inner, content) for inner, content in value.items()}
    count = key == "n" or key.startswith("n_") or key.endswith("correct")
    return int(value) if count and float(value).is_integer() else float(value)


def bootstrap(benchmark: str, records: list[dict], draws: int = 1000,
              seed: int = 0) -> dict[str, tuple[float, float]]:
    """{column: 95 % confidence interval} from resampled units, within each part.

    Drawing U units with repetition is drawing how often each kind of row occurs.
    """
    task, generator, sums = find(benchmark), np.random.default_rng(seed), {}
    for part, units in tally(task, records, scores_of(benchmark, records)).items():
        rows, counts = np.unique(units, axis=0, return_counts=True)          # [kinds, K], [kinds]
        drawn = generator.multinomial(len(units), counts / len(units), size=draws)  # [R, kinds]
        sums[part] = drawn @ rows                                            # [R, K]
    return {column: tuple(np.percentile(values, (2.5, 97.5)).tolist())
            for column, values in task.totals(sums)["table"].items()}
