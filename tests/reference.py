"""The one way to recorded reference data: numbers and files that this project does not ship.

The folder is the environment variable ``SLIMING_REFERENCE``, else ``../shared`` beside the repository. Tests that need
it carry the marker ``reference`` and are skipped with the reason where it is absent; under ``CI=true`` that is a failure.
"""

import os
from pathlib import Path

import pytest


def reference_folder(name: str) -> Path:
    """Path of the file or folder ``name`` inside the reference folder; skips (or, under CI, fails) without it."""
    root = Path(os.environ.get("SLIMING_REFERENCE", Path(__file__).resolve().parents[2] / "shared"))
    path = root / name
    if not path.exists():
        reason = f"no reference data at {path}: set SLIMING_REFERENCE to a folder that holds {name}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path
