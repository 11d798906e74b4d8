"""Ranks: who is first, what they add up, and what they divide among them (FSDP2).

Everything here also works in a single process without torchrun.
"""

import os
from collections.abc import Iterator
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh


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


def start(device: torch.device, sharded: bool) -> None:
    """Joins the processes that torchrun has started, where there are several or they shard."""
    world = int(os.environ.get("WORLD_SIZE", 0))
    if (world > 1 or world == 1 and sharded) and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


def end() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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
    gather it again, and the latter keeps parameters on the CPU between uses. Gradients are summed,
    not averaged, as each rank's loss is divided by the global batch's tokens already.
    """
    if how == "none":
        return
    options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)),
               "reshard_after_forward": how != "grads"}
    if how == "offload":
        options["offload_policy"] = fsdp.CPUOffloadPolicy(pin_memory=device.type == "cuda")
    if bf16:
        options["mp_policy"] = fsdp.MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for unit in units:
        fsdp.fully_shard(unit, **options)
        unit.set_force_sum_reduction_for_comms(True)
        unit.set_gradient_divide_factor(1.0)


@torch.no_grad()
def materialise(model: nn.Module, device: torch.device | str, offload: bool = False) -> None:
    """Gives memory to parameters on the meta device, or to this rank's part of them, to be filled;
    moves the others and the buffers. `offload`: parameters go to the CPU."""
    def everything():
        return chain(model.named_parameters(), model.named_buffers())

    kept = {name: tensor.detach() for name, tensor in everything() if not tensor.is_meta}
    model.to_empty(device="cpu" if offload else device)
    for name, tensor in everything():
        if name in kept:
            tensor.copy_(kept[name])
    if offload:
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)


def gathered(tensor: Tensor) -> Tensor:
    """A tensor whole again, where it is divided among the ranks; each of them must ask."""
    return tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor


def rows_of(tensor: Tensor) -> list[int]:
    """How FSDP divides a tensor's rows among the ranks: equal blocks, the last ones shorter."""
    world = rank_and_world()[1]
    block = -(-len(tensor) // world)
    return [max(0, min(block, len(tensor) - rank * block)) for rank in range(world)]


def own_rows(tensor: Tensor) -> tuple[Tensor, int, int]:
    """This rank's rows of a tensor, the first one's number and how many they are: all of them,
    where it is not divided. A scalar counts as one."""
    if not hasattr(tensor, "to_local"):
        return tensor, 0, len(tensor) if tensor.dim() else 1
    rows, rank = rows_of(tensor), rank_and_world()[0]
    return tensor.to_local(), sum(rows[:rank]), rows[rank]


def put(own: Tensor, value: Tensor) -> None:
    """Copies a whole tensor into `own` or, where that is divided among the ranks, its rows."""
    if hasattr(own, "to_local"):
        value, own = value.split(rows_of(value))[rank_and_world()[0]], own.to_local()
    own.copy_(value)


def collected(tensor: Tensor) -> Iterator[Tensor]:
    """On the first rank a tensor's rows in order, from all ranks, part by part; the others send
    theirs and get none. So no rank ever holds a whole one. Each of them must iterate."""
    if not hasattr(tensor, "to_local"):
        yield from [tensor] if is_main() else []
        return
    local = tensor.to_local()
    for rank, rows in enumerate(rows_of(tensor)):
        if rows and is_main():
            part = local
            if rank > 0:
                part = local.new_empty(rows, *local.shape[1:])
                dist.recv(part, rank)
            yield part
        elif rows and rank == rank_and_world()[0]:
            dist.send(local.contiguous(), 0)
