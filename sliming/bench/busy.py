"""Two trainings at once on one machine, beside one alone, by how OpenMP's threads wait.

A thread that waits for its team spins, then sleeps. Where two teams share the cores it spins while
the thread that it waits for has none. GOMP_SPINCOUNT bounds the spin, OMP_WAIT_POLICY=PASSIVE is no
spin at all; both are read when torch is loaded, so every training here is a process of its own.
"""

import os
import statistics
import tempfile
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import torch

from sliming.bench.timing import own_process, show
from sliming.bench.training import trained
from sliming.config import PRESETS, TrainConfig
from sliming.model import SliME

# libgomp's own count is 300,000 (its manual, "GOMP_SPINCOUNT"); this package sets 4,000.
SETTINGS = (*({"GOMP_SPINCOUNT": count} for count in ("300000", "10000", "5000", "4000", "3000",
                                                         "1000")),
            {"OMP_WAIT_POLICY": "PASSIVE"})


def training_seconds(folder: str, steps: int) -> float:
    """Seconds of `steps` steps of the tiny preset's stage III, data and optimizer included, from
    the checkpoint in `folder`; one more before them warms up."""
    with tempfile.TemporaryDirectory() as out:
        config = TrainConfig(init_from=folder, out=out, max_steps=steps + 1)
        return sum(row["seconds"] for row in trained(config, 3, torch.device("cpu"))[1:])


def at_once(count: int, setting: dict[str, str], folder: str, steps: int) -> float:
    """Mean seconds of `count` trainings side by side under a setting, with every core's threads."""
    others = {name: value for name, value in os.environ.items() if "OMP_" not in name}
    with ExitStack() as stack, patch.dict(os.environ, others | setting, clear=True):
        pools = [stack.enter_context(own_process()) for _ in range(count)]
        for pool in [pool.submit(training_seconds, folder, 1) for pool in pools]:
            pool.result()                              # all have loaded what they need
        runs = [pool.submit(training_seconds, folder, steps) for pool in pools]
        return statistics.mean(run.result() for run in runs)


def busy(device: torch.device, out: Path, settings: tuple = SETTINGS, steps: int = 20,
         repeats: int = 3) -> None:
    """Median seconds of one training alone and of each of two at once, under every setting."""
    with tempfile.TemporaryDirectory() as folder:
        SliME.from_backbones(PRESETS["tiny"].model).save_pretrained(folder)
        turns = [[(at_once(1, setting, folder, steps), at_once(2, setting, folder, steps))
                  for setting in settings] for _ in range(repeats)]
    medians = [[*map(statistics.median, zip(*seconds, strict=True))]
               for seconds in zip(*turns, strict=True)]
    first = medians[0][0]
    show(f"{steps} steps of the tiny preset's stage III on {os.cpu_count()} cores, "
         f"{repeats} times in turn",
         ["setting", "alone s", "/ first", "two at once s, each", "/ first alone"],
         [["=".join(*setting.items()), f"{alone:.1f}", f"{alone / first:.2f}", f"{two:.1f}",
           f"{two / first:.2f}"]
          for setting, (alone, two) in zip(settings, medians, strict=True)])
