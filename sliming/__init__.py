"""SliME, the vision-language model of "Beyond LLaVA-HD", small enough to read.

`python -m sliming` lists what there is to run; the README has the reading path.
"""

import importlib
import os
import sys

__version__ = "0.2.0"

_HOMES = {"SliME": "model", "SliMEConfig": "config", "Batch": "inputs", "Sample": "inputs",
          "Slices": "slicer", "choose_grid": "slicer", "slice_image": "slicer",
          "open_image": "images"}
__all__ = list(_HOMES)

# How OpenMP's threads share the cores; it is read when torch is loaded, so it stands here (and not
# where torch is loaded, as in a torchrun that looks here for what it may use). A thread
# that waits for its team spins, by default for milliseconds. That is no harm to a program that has
# the cores to itself, but of two at once each spins while the thread that it waits for has no core:
# they took fifteen times as long. So it spins for a fraction of a millisecond, then sleeps.
if "torch" not in sys.modules and not {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(os.environ):
    os.environ["GOMP_SPINCOUNT"] = "4000"


def share_cores(ranks: int) -> None:
    """Ranks of one machine share its cores, unless told otherwise."""
    if ranks > 1:
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))


share_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def __getattr__(name: str):
    """Loads a public name when it is first asked for: `--help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sliming' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sliming.{_HOMES[name]}"), name)
