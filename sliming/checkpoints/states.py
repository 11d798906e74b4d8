"""States: what an interrupted run goes on from.

A state holds the trained weights, the optimizer's moments, the number of steps done and of records
skipped. It needs no random state: the order of the records and the noise of training follow from
the seed and the place in the order (data.py), on any number of ranks. It is written by
torch.distributed.checkpoint, every rank its own part, under a temporary name, and renamed when it
is whole; so a kill at any moment leaves the one before. Any number of ranks may read it.
"""

import json
import os
import re
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from sliming.distributed import barrier, is_main

# What may differ between a run and its continuation.
FREE = ("stage", "resume", "save_every", "keep", "workers", "eval_questions", "tensorboard",
        "micro_batch", "token_budget", "shard", "attention", "compile", "recompute", "init_from",
        "out")
# Said of every state of a single process.
warnings.filterwarnings("ignore", "torch.distributed is disabled")


class States:
    """The last `keep` states of a run in `folder`: step-00000200, step-00000400, ..."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, config: dict,
                 keep: int):
        self.folder, self.model, self.optimizer, self.keep = folder, model, optimizer, keep
        self.config = {name: value for name, value in config.items() if name not in FREE}
        # The thread that writes talks to the other ranks' while training does: over a group of its
        # own.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        # (future, temporary folder, final folder) of a state that is being written.
        self.writing = None

    def found(self) -> list[Path]:
        """Whole states, oldest first."""
        return sorted(path for path in self.folder.glob("step-*")
                      if re.fullmatch(r"step-\d{8}", path.name))

    def last(self) -> str:
        """The last good state, in words."""
        found = self.found()
        return f"the last good state is {found[-1]}" if found else "no state was saved yet"

    def tensors(self) -> dict:
        """Trained weights and moments by name, made where the optimizer has none yet: what is
        written and read in place."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                moments = self.optimizer.state[parameter]
                if not moments:
                    place = parameter.device if group["fused"] else "cpu"  # as AdamW has it
                    moments |= {"step": torch.zeros((), device=place),
                                "exp_avg": torch.zeros_like(parameter),
                                "exp_avg_sq": torch.zeros_like(parameter)}
                state[names[parameter]] = {"weight": parameter.detach(), **moments}
        return state

    def save(self, step: int, skipped: int) -> None:
        """Copies a state to the CPU and begins to write it in the background."""
        self.settle()
        final = self.folder / f"step-{step:08d}"
        temporary = self.folder / f".writing-{step:08d}"
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while writing
            temporary.mkdir(parents=True)
            progress = {"step": step, "skipped": skipped, "config": self.config}
            (temporary / "progress.json").write_text(json.dumps(progress))
        barrier()
        future = dcp.async_save(self.tensors(), checkpoint_id=temporary, process_group=self.group,
                                no_dist=self.group is None)
        self.writing = future, temporary, final

    def settle(self, wait: bool = True) -> None:
        """Gives a state that is being written its name: waits for it, or only looks whether it is
        whole already."""
        if self.writing is None or not (wait or self.writing[0].done()):
            return
        (future, temporary, final), self.writing = self.writing, None
        try:
            future.result()
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise OSError(f"{temporary}: cannot save the state ({reason}); the one before is "
                          "unchanged") from error
        if is_main():  # whose future ends when every rank has written its part
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in self.found()[:-self.keep]:
                shutil.rmtree(old)

    def restore(self) -> tuple[int, int]:
        """Reads the last state: (steps done, records skipped), (0, 0) where there is none.

        Raises ValueError where it belongs to a run with other settings.
        """
        barrier()  # every rank finds the same
        if not self.found():
            return 0, 0
        path = self.found()[-1]
        progress = json.loads((path / "progress.json").read_text())
        before, now = progress["config"], json.loads(json.dumps(self.config))
        changed = [f"{name} {before.get(name)!r}, now {value!r}" for name, value in now.items()
                   if before.get(name) != value]
        if changed:
            raise ValueError(f"{path} is of a run with other flags ({'; '.join(changed)}): give "
                             "the same ones to go on, or --resume never to start anew, or another "
                             "--out")
        state = self.tensors()
        dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
        return progress["step"], progress["skipped"]

    def discard(self) -> tuple[int, int]:
        """Removes all states: the run begins anew."""
        self.settle()
        barrier()
        if is_main():
            shutil.rmtree(self.folder, ignore_errors=True)
        barrier()
        return 0, 0
