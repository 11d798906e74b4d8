"""train.py run as its user runs it, for the tests of whole flows.

Starting a process costs seconds of imports, so `run_train` takes several command lines and runs
them one after another in one process (or one set of ranks).
"""

import io
import json
import os
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
LLAMA3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def run_train(*commands, ranks=None, limit=None, cwd=ROOT, **environment):
    """train.py with each command line (a list of flags) in turn, in processes of their own, under
    torchrun if `ranks` is given; on the CPU unless `environment` shows it GPUs. `limit` bounds the
    size of files in bytes."""
    launch, before = [sys.executable], None
    if ranks is not None:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    if limit is not None:
        import resource
        before = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", **environment}
    commands = json.dumps([[str(flag) for flag in command] for command in commands])
    return subprocess.run([*launch, __file__, commands], capture_output=True, text=True,
                          preexec_fn=before, env=environment, cwd=cwd, timeout=300)


def until(holds, seconds=120):
    """Waits until `holds()`, or that long."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)


def in_process(main, *arguments, cwd=ROOT, typed=""):
    """A program's `main` in this process: code, output and errors as a process of its own gives."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", ["program", *map(str, arguments)])
        patch.setattr(sys, "stdin", io.StringIO(typed))
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    last = f"\n{code}\n" if isinstance(code, str) else ""  # behind what a progress bar leaves
    return SimpleNamespace(returncode=int(bool(code)), stdout=out.getvalue(),
                           stderr=err.getvalue() + last)


def losses(folder):
    """The loss of every step in a stage's folder."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


class Interrupted(BaseException):
    """Nobody's business but the test's."""


@contextmanager
def stop_after(step, here):
    """Stops the training, `here`, when the state of `step` steps has been saved."""
    from sliming.checkpoints.states import States
    save = States.save

    def stopping(self, done, skipped):
        save(self, done, skipped)
        if here and done == int(step):
            self.settle()
            raise Interrupted

    States.save = stopping if step else save
    try:
        yield
    except Interrupted:
        pass
    finally:
        States.save = save


if __name__ == "__main__":
    import torch.distributed as dist

    import train
    destroy = dist.destroy_process_group
    dist.destroy_process_group = lambda: None  # one group for all commands
    for command in json.loads(sys.argv[1]):
        sys.argv = ["train.py", *command]
        with stop_after(os.environ.get("SLIMING_TEST_STOP"), "down" in " ".join(command)):
            train.main()
    if dist.is_initialized():
        destroy()
