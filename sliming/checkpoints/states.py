"""States: what an interrupted run goes on from.

A state holds the trained weights, the optimizer's moments, the number of steps done and of records
skipped. It needs no random state: the order of the records and the noise of training follow from
the seed and the place in the order (data.py), on any number of ranks.

    step-00000200/rank-00000.safetensors   a rank's rows of every tensor
    step-00000200/progress.json            steps, records skipped, settings of the run, and per
                                           file its checksum, its tensors' shapes and its rows

It is written in the background under a temporary name and renamed when it is whole; so a kill at
any moment leaves the one before. Any number of ranks may read it. A damaged one is passed over.
"""

import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sliming.checkpoints.files import CheckpointError, read_json
from sliming.distributed import barrier, gather, is_main, own_rows, rank_and_world
from sliming.guard import checksum
from sliming.records import inside
from sliming.watch import say

# What may differ between a run and its continuation.
FREE = ("stage", "resume", "save_every", "keep", "workers", "eval_questions", "report",
        "micro_batch", "token_budget", "shard", "attention", "compile", "recompute", "init_from",
        "out", "strict_data")


class States:
    """The last `keep` states of a run in `folder`: step-00000200, step-00000400, ..."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, config: dict,
                 keep: int):
        self.folder, self.model, self.optimizer, self.keep = folder, model, optimizer, keep
        self.config = {name: value for name, value in config.items() if name not in FREE}
        # The thread that writes talks to the other ranks' over a group of its own.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.writer = ThreadPoolExecutor(1)
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

    def tensors(self) -> dict[str, Tensor]:
        """Trained weights and moments by name, made where the optimizer has none yet."""
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
                state |= {f"{names[parameter]}/{what}": tensor for what, tensor in
                          {"weight": parameter.detach(), **moments}.items()}
        return state

    def save(self, step: int, skipped: int) -> None:
        """Copies a state to the CPU and begins to write it in the background."""
        self.settle()
        temporary = self.folder / f".writing-{step:08d}"
        if is_main():
            shutil.rmtree(temporary, ignore_errors=True)  # of a run that was killed while writing
            temporary.mkdir(parents=True)
        barrier()
        own, shapes = {}, {}
        for name, tensor in self.tensors().items():
            local, first, rows = own_rows(tensor)
            if hasattr(tensor, "to_local") or is_main():
                own[name] = local.detach().to("cpu", copy=True).contiguous()
                shapes[name] = [list(tensor.shape), first, first + rows]
        progress = {"step": step, "skipped": skipped, "config": self.config}
        future = self.writer.submit(self.write, temporary, own, shapes, progress)
        self.writing = future, temporary, self.folder / f"step-{step:08d}"

    def write(self, folder: Path, own: dict[str, Tensor], shapes: dict, progress: dict) -> None:
        """This rank's file and, on the first rank when all have theirs, progress.json. OSError on
        every rank where one could not write."""
        mine = {"file": f"rank-{rank_and_world()[0]:05d}.safetensors", "tensors": shapes}
        try:
            if broken := [name for name, tensor in own.items() if not tensor.isfinite().all()]:
                raise ValueError(f"{broken[0]} holds numbers that are not finite")
            save_file(own, folder / mine["file"])
            mine["checksum"] = checksum(folder / mine["file"])
        except Exception as error:  # the writer's own kind of a full disk's, too
            mine["complaint"] = str(error)
        parts = [mine]
        if self.group is not None:
            parts = [None] * dist.get_world_size()
            dist.all_gather_object(parts, mine, self.group)
        for part in parts:
            if "complaint" in part:
                raise OSError(f"{folder}: cannot save the state ({part['complaint']}); the one "
                              "before is unchanged")
        if is_main():
            progress["parts"] = parts
            progress["checksum"] = zlib.crc32(json.dumps(progress).encode())
            (folder / "progress.json").write_text(json.dumps(progress))
            checksum(folder / "progress.json")  # it is on the disk itself then

    def settle(self, wait: bool = True) -> None:
        """Gives a state that is being written its name: waits for it, or only looks whether it is
        whole already."""
        if self.writing is None or not (wait or self.writing[0].done()):
            return
        (future, temporary, final), self.writing = self.writing, None
        future.result()
        if is_main():  # whose future ends when every rank has written its part
            shutil.rmtree(final, ignore_errors=True)
            os.replace(temporary, final)
            for old in self.found()[:-self.keep]:
                shutil.rmtree(old)

    def restore(self) -> tuple[int, int]:
        """Reads the last state that is whole: (steps done, records skipped), (0, 0) where there is
        none.

        CheckpointError where it belongs to a run with other settings, and where all are damaged.
        """
        if is_main():  # what a save left that was killed
            for left in (*self.folder.parent.glob(".saving-*"), *self.folder.glob(".writing-*")):
                shutil.rmtree(left, ignore_errors=True)
        barrier()  # every rank finds the same
        for path in reversed(self.found()):
            progress, complaint = look_at(path)
            complaints = list(filter(None, gather([complaint])))
            if not complaints:
                try:
                    return self.read(path, progress)
                except (KeyError, TypeError, IndexError, RuntimeError, SafetensorError) as error:
                    raise CheckpointError(f"{path}: not a state ({error!r})") from error
            say(f"{path} is passed over: {complaints[0]}")
        if self.found():
            raise CheckpointError(f"{self.folder}: no state in it can be read; --resume never "
                                  "begins anew")
        return 0, 0

    def read(self, path: Path, progress: dict) -> tuple[int, int]:
        """Reads a state that is whole into model and optimizer."""
        before, now = progress["config"], json.loads(json.dumps(self.config))
        changed = [f"{name} {before.get(name)!r}, now {now.get(name)!r}"
                   for name in {**now, **before} if before.get(name) != now.get(name)]
        if changed:
            raise CheckpointError(f"{path} is of a run with other flags or files "
                                  f"({'; '.join(changed)}): give the same ones to go on, or "
                                  "--resume never to start anew, or another --out")
        tensors = self.tensors()
        for part in progress["parts"]:
            with safe_open(path / part["file"], framework="pt") as file:
                for name, (shape, start, end) in part["tensors"].items():
                    if name not in tensors or list(tensors[name].shape) != shape:
                        raise CheckpointError(f"{path} is of another model: {name} differs")
                    local, first, rows = own_rows(tensors[name])
                    low, high = max(first, start), min(first + rows, end)
                    if low < high and shape:
                        rows = file.get_slice(name)[low - start:high - start]
                        local[low - first:high - first].copy_(rows)
                    elif low < high:
                        local.copy_(file.get_tensor(name))
        say(f"{self.folder.parent}: goes on at step {progress['step']}")
        return progress["step"], progress["skipped"]


def left_to_do(out: Path, wanted: list[int], resume: str) -> list[int]:
    """The stages that a run has still to train. "auto": from the one that was interrupted on;
    "never": all of them, and the states of all are removed at once."""
    if resume == "never":
        discard(out, wanted)
    begun = [stage for stage in wanted if list(out.glob(f"stage{stage}/resume/step-*"))]
    return wanted[wanted.index(begun[-1]):] if begun else wanted


def discard(out: Path, stages: list[int]) -> None:
    """Removes the states of stages in `out`: there is nothing to go on from."""
    barrier()
    for stage in stages if is_main() else ():
        shutil.rmtree(out / f"stage{stage}" / "resume", ignore_errors=True)
    barrier()


def look_at(path: Path) -> tuple[dict, str]:
    """A state's progress.json, and what is wrong with the state: each rank looks at its share."""
    rank, world = rank_and_world()
    try:
        progress = read_json(path / "progress.json")
        if progress.pop("checksum", None) != zlib.crc32(json.dumps(progress).encode()):
            return {}, "progress.json is damaged, or of another version"
        for part in progress["parts"][rank::world]:
            if checksum(inside(path, part["file"])) != part["checksum"]:
                return {}, f"{part['file']} is damaged"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {}, f"unreadable ({error})"
    return progress, ""
