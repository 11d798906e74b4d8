"""The READMEs' commands, word for word, in the order in which they stand: one end-to-end training
that must reach its accuracy, and everything that is done with a trained model."""

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from flows import in_process

from sliming.tiny.pictures import generator, render, sample_scene

ROOT = Path(__file__).resolve().parents[1]
READMES = [ROOT / "README.md", ROOT / "sliming" / "README.md",
           *sorted(ROOT.glob("sliming/*/README.md")), ROOT / "theory" / "README.md"]


def commands_of(path):
    """The shell commands that a page shows, one a line."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", path.read_text(), flags=re.S | re.M)
    return [line.split("  #")[0].strip()
            for block in blocks for line in block.replace("\\\n", "").splitlines()
            if line.strip() and not line.strip().startswith("#")]


COMMANDS = list(dict.fromkeys(command for path in READMES for command in commands_of(path)))
MAIN = next(command for command in COMMANDS if "train.py --stage all" in command)


def run(command, cwd, timeout=1800, **environment):
    """A command as a person in an activated environment would run it."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(command, shell=True, cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PATH": path, **environment}, timeout=timeout)


def train(work, **environment):
    """Runs the README's main command (without making the environment again) in a copy of the
    repository."""
    for name in ("sliming", "theory", "train.py", "sample.py"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, work / name)
    done = run(MAIN.split("&&")[-1].strip(), work, **environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_three_stages_reach_their_accuracy(tmp_path):
    """Thresholds lie below the README's numbers (standard error 1.1 points at 94 % of 512). Other
    processors and threads add up in another order, which makes another training of the same seed:
    five trainings, of three seeds, gave 94.5 to 97.3 % (global), 93.4 to 95.7 % (detail)."""
    started, cores = time.monotonic(), os.cpu_count()
    beside = "PYTEST_XDIST_WORKER" in os.environ  # half of the cores are for other tests
    # In two ranks.
    train(tmp_path, **{"OMP_NUM_THREADS": str(max(1, cores // 4))} if beside else {})
    print(f"the main command took {time.monotonic() - started:.0f} s")
    results = json.loads((tmp_path / "out/stage3/eval.json").read_text())
    print({name: round(row["accuracy"], 3) for name, row in results.items()})
    accuracy = {name: row["accuracy"] for name, row in results.items()}
    assert all(row["n"] >= 500 for row in results.values())
    assert accuracy["global_gamma_1"] >= 0.93 and accuracy["detail_gamma_1"] >= 0.92
    assert accuracy["detail_without_local"] <= 0.05
    assert abs(accuracy["detail"] - accuracy["detail_gamma_1"]) <= 0.02
    assert accuracy["detail_gamma_1"] - accuracy["detail_gamma_025"] <= 0.03
    assert accuracy["detail_gamma_025"] - accuracy["detail_random_025"] >= 0.15


def here(command, cwd):
    """A command in this process, which has imported what each would wait for."""
    words = shlex.split(command)[1:]
    words = words[2:] if words[0] == "--nproc_per_node" else words
    with pytest.MonkeyPatch.context() as patch:
        if words[0] == "-m":
            words = words[1:]
            program = partial(runpy.run_module, words[0], run_name="__main__")
        else:  # by itself, sample.py would end the process
            patch.syspath_prepend((ROOT / words[0]).parent)
            program = runpy.run_path(str(ROOT / words[0]), run_name="readme")["main"]
        return in_process(program, *words[1:], cwd=cwd)


def test_every_other_command_runs(tmp_path):
    """All commands that use the package or the trained model (here one that is hardly trained);
    those that set up or need other files are listed here."""
    few = " --max-steps 2 --eval-questions 4"
    done = here(MAIN.split("&&")[-1] + few, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    rng = generator("held-out", 9)
    render(sample_scene(rng), rng).save(tmp_path / "picture.png")
    folder = tmp_path / "images"
    folder.mkdir()
    shutil.copy(tmp_path / "picture.png", folder / "a.png")
    text = "How many bars are there?"
    turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "three"}]
    records = [{"id": "a", "image": "a.png", "conversations": turns}] * 4
    (tmp_path / "records.json").write_text(json.dumps(records))
    questions = [{"question_id": number, "image": "a.png", "text": text} for number in range(2)]
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, questions)))
    # Run by other tests, on small files: presets, benchmarks, SMR's sources; and what takes
    # minutes, a GPU or the network.
    elsewhere = ("--preset small", "hf download", "unzip", "venv", "--pretrain", "pytest",
                 "nproc_per_node", "theory/", "--stage all", "SLIMING_REFERENCE", "yifanzhang114",
                 "sliming.bench", "sliming.lab", "--benchmark", "--score-only", "sliming.smr",
                 "smr.jsonl", "lmms_eval", "pip install", "sliming.demo")
    ran = 0
    for command in COMMANDS:
        if any(word in command for word in elsewhere):
            continue
        if "train.py" in command:
            command += few
        if "sliming.evaluation" in command:
            command += " --questions 4"
        done = here(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
        ran += 1
    assert ran >= 15
    assert (tmp_path / "page.html").exists()


def test_readmes_name_only_flags_that_exist():
    """Flags of commands that are not run here are at least in the program's help."""
    helps = {}
    for command in COMMANDS:
        words = shlex.split(command.split("&&")[-1])
        program = next((w for w in words if w.startswith("sliming.") or w.endswith(".py")), None)
        if program is None:
            continue
        ways = {"build", "stats", "run", "report"} & set(words)
        module = "-m " if program.startswith("sliming.") else ""
        start = f"python {module}{program} {' '.join(ways)}"
        if start not in helps:
            helps[start] = here(f"{start} --help", ROOT).stdout
        for flag in (w for w in words[words.index(program) + 1:] if w.startswith("--")):
            assert flag in helps[start], command


def test_links_and_pictures_are_there():
    for path in READMES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"
