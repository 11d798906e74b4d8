"""SliME, the vision-language model of "Beyond LLaVA-HD", small enough to read.

`python -m sliming` lists what there is to run; the README has the reading path.
"""

import importlib

__version__ = "0.2.0"

_HOMES = {"SliME": "model", "SliMEConfig": "config", "Batch": "inputs", "Sample": "inputs",
          "Slices": "slicer", "choose_grid": "slicer", "slice_image": "slicer",
          "open_image": "images"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    """Loads a public name when it is first asked for: `--help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'sliming' has no attribute {name!r}")
    return getattr(importlib.import_module(f"sliming.{_HOMES[name]}"), name)
