"""What a training run leaves behind besides its checkpoint: states to resume from, LoRA adapters, whole tensors of shards.

A state holds the trained weights, the optimizer's moments, the number of steps done and of records skipped. It needs no
random state: the order of the records and the noise of training follow from the seed and the place in the order (data.py),
on any number of ranks. It is written by torch.distributed.checkpoint, every rank its own part, under a temporary name, and
renamed when it is whole; so a kill at any moment leaves the one before. Any number of ranks may read it.

    python -m sliming.checkpoints --merge out/stage3 FOLDER      a checkpoint with LoRA adapters, as plain weights
"""

import argparse
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

# What may differ between a run and its continuation.
FREE = ("stage", "resume", "save_every", "keep", "workers", "eval_questions", "tensorboard", "micro_batch", "token_budget",
        "shard", "attention", "compile", "recompute", "init_from", "out")
warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said of every state of a single process
RANK, ALPHA = 128, 256  # of LoRA, as in the released scripts


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def is_main() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


class States:
    """The last `keep` states of a run in `folder`: step-00000200, step-00000400, ..."""

    def __init__(self, folder: Path, model: nn.Module, optimizer: torch.optim.AdamW, config: dict, keep: int):
        self.folder, self.model, self.optimizer, self.keep = folder, model, optimizer, keep
        self.config = {name: value for name, value in config.items() if name not in FREE}
        # The thread that writes talks to the other ranks' while training does: over a group of its own.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.writing = None  # (future, temporary folder, final folder) of a state that is being written in the background

    def found(self) -> list[Path]:
        """Whole states, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if re.fullmatch(r"step-\d{8}", path.name))

    def last(self) -> str:
        """The last good state, in words."""
        return f"the last good state is {self.found()[-1]}" if self.found() else "no state was saved yet"

    def tensors(self) -> dict:
        """Trained weights and moments by name, made where the optimizer has none yet: what is written and read in place."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        state = {}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                moments = self.optimizer.state[parameter]
                if not moments:
                    moments |= {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(parameter),
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
            (temporary / "progress.json").write_text(json.dumps({"step": step, "skipped": skipped, "config": self.config}))
        barrier()
        future = dcp.async_save(self.tensors(), checkpoint_id=temporary, process_group=self.group, no_dist=self.group is None)
        self.writing = future, temporary, final

    def settle(self, wait: bool = True) -> None:
        """Gives a state that is being written its name: waits for it, or only looks whether it is whole already."""
        if self.writing is None or not (wait or self.writing[0].done()):
            return
        (future, temporary, final), self.writing = self.writing, None
        try:
            future.result()
        except CheckpointException as error:
            reason = next(iter(error.failures.values()))[0]
            raise OSError(f"{temporary}: cannot save the state ({reason}); the one before is unchanged") from error
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
        changed = [f"{name} {progress['config'].get(name)!r}, now {value!r}" for name, value in
                   json.loads(json.dumps(self.config)).items() if progress["config"].get(name) != value]
        if changed:
            raise ValueError(f"{path} is of a run with other flags ({'; '.join(changed)}): give the same ones to go on, or "
                             "--resume never to start anew, or another --out")
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


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors by name, gathered from all ranks; on the CPU of the first rank, empty on the others."""
    whole = {}
    for name, tensor in model.tensors().items():
        if isinstance(tensor, DTensor):
            tensor = tensor.full_tensor().clone()  # it may be the beginning of a padded one
        if is_main():
            whole[name] = tensor.detach().cpu()
    return whole


# --------------------------------------------------------------------------------------------------------------------- LoRA


def add_lora(llm: nn.Module) -> None:
    """Puts LoRA adapters beside the language model's linear layers, its output layer not included (peft, extra `lora`)."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ModuleNotFoundError as error:
        raise ValueError('LoRA needs the package peft: pip install "sliming[lora]"') from error
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", lora_dropout=0.0), llm)


def without_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a model as it was before `add_lora`, by the names of that time."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if ".lora_" not in name}


def write_lora(llm: nn.Module, tensors: dict[str, Tensor], folder: Path, base: str) -> None:
    """The adapters in peft's own format, for `PeftModel.from_pretrained(base model, folder)` as for `merge_lora`."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {f"base_model.model.{name.removeprefix('llm.').replace('.default.', '.')}": tensor.contiguous()
                for name, tensor in tensors.items() if ".lora_" in name}
    save_file(adapters, folder / "adapter_model.safetensors", {"format": "pt"})
    config = llm.peft_config["default"]
    config.base_model_name_or_path = base
    config.save_pretrained(folder)


def with_adapters(weight: Tensor, down: Tensor, up: Tensor, config: dict) -> Tensor:
    """W + B A alpha / r in W's dtype, summed in float32: W [out, in], A (`down`) [r, in], B (`up`) [out, r]."""
    return (weight.float() + config["lora_alpha"] / config["r"] * (up.float() @ down.float())).to(weight.dtype)


@torch.no_grad()
def merge_lora(llm: nn.Module, folder: Path) -> None:
    """Adds the adapters in `folder` to the language model's weights."""
    config, adapters = json.loads((folder / "adapter_config.json").read_text()), load_file(folder / "adapter_model.safetensors")
    weights = dict(llm.named_parameters())
    for name in [name for name in adapters if name.endswith(".lora_A.weight")]:
        stem = name.removesuffix(".lora_A.weight")
        weight = weights[f"{stem.removeprefix('base_model.model.')}.weight"]
        weight.copy_(with_adapters(weight, adapters[name], adapters[f"{stem}.lora_B.weight"], config))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sliming.checkpoints", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--merge", nargs=2, metavar=("CHECKPOINT", "FOLDER"), required=True,
                        help="read a checkpoint with LoRA adapters and write it to FOLDER with plain weights")
    source, folder = parser.parse_args().merge
    from sliming.model import SliME  # which uses this file
    try:
        SliME.from_pretrained(source).save_pretrained(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"sliming.checkpoints: {error}")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
