"""The programs run as their users run them, for the tests of whole flows.

Starting a process costs seconds of imports. So `run_train` takes several command lines and runs
them one after another in one process, or set of ranks, which are forked from one that has imported
what they need; and `in_process` runs a program in the process of the test.
"""

import io
import json
import multiprocessing
import os
import runpy
import socket
import sys
import tempfile
import time
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["flows", "sliming.trainer", "sliming.evaluation.run",
                               "torch._dynamo", "transformers.models.llama.modeling_llama",
                               "transformers.models.clip.modeling_clip", "matplotlib.pyplot"])
LLAMA3_TOKENS = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def run_train(*commands, program=ROOT / "train.py", ranks=None, limit=None, cwd=ROOT,
              **environment):
    """train.py, or the `main` of another file, with each command line (a list of flags) in turn, in
    a process of its own, or in `ranks` as torchrun starts them; on the CPU unless `environment`
    shows it GPUs. `limit` bounds the size of files in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        processes = []
        for rank in map(str, range(ranks or 1)):
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks),
                    "MASTER_ADDR": "localhost", "MASTER_PORT": port} if ranks else {}
            processes.append(begin(*commands, program=program, folder=folder, cwd=cwd, limit=limit,
                                   **environment, **told))
        deadline = time.monotonic() + 300
        while any(process.is_alive() for process in processes):
            if any(process.exitcode for process in processes) or time.monotonic() > deadline:
                for process in processes:
                    process.kill()
            processes[0].join(0.02)
        out, err = ((Path(folder) / name).read_text() for name in ("out", "err"))
    codes = [process.exitcode for process in processes]
    return SimpleNamespace(returncode=next(filter(None, codes), 0), stdout=out, stderr=err)


def begin(*commands, folder, program=ROOT / "train.py", cwd=ROOT, limit=None, **environment):
    """Starts one process of `run_train`, whose output and errors go to the files out and err in
    `folder`."""
    environment = {**ENVIRONMENT, "CUDA_VISIBLE_DEVICES": "", **environment}
    commands = [[str(flag) for flag in command] for command in commands]
    process = SERVER.Process(target=child, args=(str(program), commands, environment, str(cwd),
                                                 limit, str(folder)))
    process.start()
    return process


def child(program, commands, environment, cwd, limit, folder):
    """What such a process does."""
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    torch.set_num_threads(1)
    if limit is not None:
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main = runpy.run_path(program)["main"]
    join, destroy = dist.init_process_group, dist.destroy_process_group  # once for all commands
    dist.init_process_group = lambda *how, **more: dist.is_initialized() or join(*how, **more)
    dist.destroy_process_group = lambda: None
    for command in commands:
        sys.argv = [Path(program).name, *command]
        with stop_after(os.environ.get("SLIMING_TEST_STOP"), "down" in " ".join(command)):
            main()
    if dist.is_initialized():
        destroy()


def until(holds, seconds=120):
    """Waits until `holds()`, or that long."""
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.005)


def in_process(main, *arguments, cwd=ROOT, typed=""):
    """A program's `main` in this process: code, output and errors as a process of its own gives."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (pytest.MonkeyPatch.context() as patch, mock.patch.dict(os.environ),
          redirect_stdout(out), redirect_stderr(err)):
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
