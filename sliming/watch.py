"""What a training run shows of itself: arithmetic, memory, metrics.jsonl, the loss curve.

Legend: P parameters, T packed tokens of a micro-batch, V its views, L patches per view.
"""

import json
import os
import resource
from pathlib import Path

import torch

from sliming.checkpoints.states import barrier, is_main
from sliming.model import Batch, SliME

PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense bfloat16, from the data sheets


def peak_flops(device: torch.device) -> float | None:
    """The device's floating-point operations per second at best; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for key, value in PEAK_FLOPS.items() if key in name), None)


def step_flops(model: SliME, batch: Batch, parts: str, tokens: int) -> float:
    """Floating-point operations of one micro-batch without recomputation: 2 P T forward, as much again for gradients of
    activations and of trained weights each; the tower forward only. Attention's score products and the output layer, run at
    supervised positions only, are left out."""
    crops = sum(columns * rows for columns, rows in batch.grids)
    views = {"global": len(batch.grids), "local": crops, "both": len(batch.grids) + crops}[parts]
    tower = 2 * sum(p.numel() for p in model.vision.parameters()) * views * model.adapter.num_tokens
    llm = [p for p in model.llm.get_decoder().layers.parameters() if p.dim() == 2]
    return tower + sum((6 if p.requires_grad else 4) * p.numel() for p in llm) * tokens


def memory(device: torch.device) -> float:
    """Peak memory so far in GB: allocated on a GPU, resident elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def cut_metrics(path: Path, first: int) -> list[dict]:
    """The rows of metrics.jsonl before step `first`; what an interrupted run wrote after its last state is dropped."""
    rows = []
    for line in path.read_text().splitlines() if first and path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break  # the line that was being written when the run was killed
    rows = [row for row in rows if row["step"] < first]
    if is_main():  # in one go: a kill leaves the old rows or the new ones
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in rows))
        os.replace(new, path)
    barrier()
    return rows


def plot_loss(history: list[dict], title: str, path: Path) -> None:
    """The loss per step, faint, and its running mean."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    from matplotlib import pyplot as plt  # heavy, and needed once per stage
    losses, means, mean = [row["loss"] for row in history], [], None
    for loss in losses:
        mean = loss if mean is None else 0.95 * mean + 0.05 * loss
        means.append(mean)
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    axes.plot(losses, color="0.75", linewidth=1, label="per step")
    axes.plot(means, color="tab:blue", linewidth=2, label="running mean")
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", yscale="log", title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
