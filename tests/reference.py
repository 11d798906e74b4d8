"""The one way to recorded reference data: numbers and files that this project does not ship.

The folder is the environment variable `SLIMING_REFERENCE`, else `../shared` beside the repository.
Tests that need it carry the marker `reference` and are skipped with the reason where it is absent;
under `CI=true` that is a failure.
"""

import json
import os
from pathlib import Path

import pytest
from safetensors.torch import load_file


def reference_folder(name: str) -> Path:
    """The file or folder `name` of the reference folder; skips (under CI, fails) without it."""
    root = Path(os.environ.get("SLIMING_REFERENCE", Path(__file__).resolve().parents[2] / "shared"))
    path = root / name
    if not path.exists():
        reason = f"no reference data at {path}: set SLIMING_REFERENCE to a folder that holds {name}"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def part_of(tensors: dict, prefix: str) -> dict:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()
            if name.startswith(prefix)}


def recorded_modules(kind: str) -> list[tuple[dict, dict]]:
    """(settings and gradient norms, tensors) of every recorded module of a released class."""
    folder = reference_folder("golden")
    tensors = load_file(folder / "modules.safetensors")
    record = json.loads((folder / "modules.json").read_text())
    found = [(info | {"grads": record.get(f"{case}_grads")}, part_of(tensors, f"{case}/"))
             for case, info in record["cases"].items() if info["cls"].startswith(kind)]
    assert found, f"the folder holds no {kind}"
    return found
