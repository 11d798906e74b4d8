"""Ranks: who is first, what they add up, and what they divide among them (FSDP2).

Everything here also works in a single process without torchrun.
"""

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)


def rank_device() -> torch.device:
    """This process's own GPU where there is one, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name; by default bfloat16 on a GPU and float32 elsewhere."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def start(device: torch.device) -> None:
    """Joins the processes that torchrun has started."""
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def is_main() -> bool:
    return rank_and_world()[0] == 0


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def reduce(values: list[float], device: torch.device, how=dist.ReduceOp.SUM) -> list[float]:
    """Numbers summed (or otherwise reduced) over the ranks."""
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(tensor, how)
    return tensor.tolist()


def gather(texts: list[str]) -> list[str]:
    """The texts of all ranks."""
    everyone = [texts]
    if dist.is_initialized():
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, texts)
    return sum(everyone, [])


def sum_gradients(parameters: list[nn.Parameter]) -> None:
    """Sums gradients over the ranks in one call; a rank that had nothing to learn adds zeros."""
    if not dist.is_initialized():
        return
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                      for p in parameters])
    dist.all_reduce(flat)
    parts = flat.split([p.numel() for p in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.grad = part.view_as(parameter)


def shard(units: list[nn.Module], how: str, bf16: bool, device: torch.device) -> None:
    """Divides parameters, gradients and optimizer state among the ranks (FSDP2).

    Each of `units`, the whole model last, is gathered when it runs. `how`, of config.SHARDING:
    "grads" keeps what was gathered until the backward pass has used it; "params" and "offload"
    gather it again. Gradients are summed, not averaged, as each rank's loss is divided by the
    global batch's tokens already.
    """
    options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
               "reshard_after_forward": how != "grads", "offload_policy": OffloadPolicy()}
    if how == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    if bf16:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16,
                                                    reduce_dtype=torch.float32)
    for unit in units:
        fully_shard(unit, **options)
    for module in units[-1].modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor whole again, where it is divided among the ranks; each of them must ask."""
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor
