"""Imports go down only, train.py loads none of the other trades, the reading path stays small."""

import ast
import os
import subprocess
import sys
from pathlib import Path

from sliming import guard

ROOT = Path(__file__).resolve().parents[1]
# From the ground up. Files of one floor do not import each other, but files of one folder may.
FLOORS = ["guard",
          "config records images chat fused_attention",
          "slicer qformer hub",
          "inputs router moe_adapter backbones distributed",
          "data generate watch",
          "checkpoints.lora",
          "checkpoints.files",
          "checkpoints.pretrained checkpoints.states checkpoints.card",
          "checkpoints.released",
          "model explain",
          "tiny checkpoints.__main__",
          "samples tour page",
          "trainer",
          "evaluation",
          "smr bench lab demo"]
READING_PATH = ["train.py", "sample.py", *(f"sliming/{name}.py" for name in (
    "slicer", "qformer", "moe_adapter", "router", "model", "trainer"))]


def floor(module):
    """Number of the floor that `module` (without "sliming.") stands on."""
    names = [set(floor.split()) for floor in FLOORS]
    parts = module.split(".")
    return next(number for number, on_it in enumerate(names)
                for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in on_it)


def imports(path):
    """Modules of the package that a file imports anywhere, without "sliming."."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sliming"):
            inside = node.module.removeprefix("sliming").removeprefix(".")
            for alias in node.names:
                name = f"{inside}.{alias.name}".strip(".")
                there = ROOT / "sliming" / Path(*name.split("."))
                yield name if there.with_suffix(".py").exists() or there.is_dir() else inside


def test_imports_go_down():
    for path in sorted((ROOT / "sliming").rglob("*.py")):
        module = ".".join(path.relative_to(ROOT / "sliming").with_suffix("").parts)
        if module in ("__init__", "__main__") or module.endswith(".__init__"):
            continue
        for other in imports(path):
            same_room = "." in module and module.split(".")[0] == other.split(".")[0]
            assert floor(other) < floor(module) or same_room, f"{module} imports {other}"


def test_no_circles():
    """Within a room neither: every module can be imported alone, in any order."""
    graph = {}
    for path in (ROOT / "sliming").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "sliming").with_suffix("").parts)
        graph[module] = {other for other in imports(path) if other != module}
    done = set()
    while graph:
        free = [module for module, others in graph.items() if not others & graph.keys()]
        assert free, f"a circle among {sorted(graph)}"
        done |= set(free)
        graph = {module: others for module, others in graph.items() if module not in done}


def test_train_loads_no_other_trade():
    code = ("import sys, train, sliming.trainer, sliming.tiny.held_out; others = tuple("
            "f'sliming.{room}' for room in ('evaluation', 'smr', 'bench', 'lab', 'page', 'demo'))"
            " + ('pyarrow',);"
            "print(*(m for m in sys.modules if m.startswith(others)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "", done.stdout + done.stderr


def test_the_reading_path_is_small():
    texts = {name: (ROOT / name).read_text() for name in READING_PATH}
    assert sum(text.count("\n") for text in texts.values()) <= 1250
    assert sum(len(text.encode()) for text in texts.values()) <= 72_000
    for name, text in texts.items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{name}: {node.name}"


def test_ranks_of_torchrun_share_the_cores(monkeypatch):
    """torchrun itself gives each of several one thread."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    for flags, told, threads in (("--nproc_per_node 2", None, "4"), ("", None, None),
                                 ("--nproc-per-node=16", None, "1"),
                                 ("--nproc_per_node 2", "3", "3"),
                                 ("--nproc_per_node 1", None, None)):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if told:
            monkeypatch.setenv("OMP_NUM_THREADS", told)
        monkeypatch.setattr(sys, "argv", ["torchrun", *flags.split(), str(ROOT / "train.py")])
        guard.in_torchrun()
        assert os.environ.get("OMP_NUM_THREADS") == threads, flags


def test_threads_wait_as_they_are_told_and_else_briefly():
    """Set when the package is imported, which is before torch; what the user says stands."""
    code = ("import os, sliming; print(*(os.environ.get(n) for n in "
            "('GOMP_SPINCOUNT', 'OMP_WAIT_POLICY', 'OMP_NUM_THREADS')))")
    base = {name: value for name, value in os.environ.items()
            if "OMP_" not in name and name != "LOCAL_WORLD_SIZE"}
    for given, expected in (({}, "4000 None None"),
                            ({"OMP_WAIT_POLICY": "ACTIVE"}, "None ACTIVE None"),
                            ({"GOMP_SPINCOUNT": "7"}, "7 None None"),
                            ({"LOCAL_WORLD_SIZE": str(os.cpu_count())}, "4000 None 1"),
                            ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, "4000 None 3")):
        done = subprocess.run([sys.executable, "-c", code], env=base | given, cwd=ROOT,
                              capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr
