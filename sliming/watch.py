"""What a run shows of itself: memory, arithmetic, metrics.jsonl, the loss curve, tables of text."""

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.distributed import ReduceOp
from tqdm import tqdm

from sliming.distributed import is_main, rank_and_world, reduce
from sliming.guard import Signals, naming
from sliming.inputs import Batch
from sliming.records import RecordError, resume

# Dense bfloat16 operations per second, from the data sheets.
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}


def peak_flops(device: torch.device) -> float | None:
    """The device's floating-point operations per second at best; None where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((value for key, value in PEAK_FLOPS.items() if key in name), None)


def step_flops(model: nn.Module, batch: Batch, parts: str, tokens: int) -> float:
    """Floating-point operations of one micro-batch without recomputation: with P weights and T
    tokens 2 P T forward, as much again for gradients of activations and of trained weights each;
    the tower forward only. Left out: attention's scores, and the output layer, which runs at
    supervised positions only."""
    shown = {"global": [batch.global_views], "local": [batch.crops]}.get(
        parts, [batch.global_views, batch.crops])
    views = sum(len(part) for part in shown if not part.is_floating_point())  # these are features
    tower = 2 * sum(p.numel() for p in model.vision.parameters()) * views * model.adapter.num_tokens
    llm = [p for p in model.llm.get_decoder().layers.parameters() if p.dim() == 2]
    return tower + sum((6 if p.requires_grad else 4) * p.numel() for p in llm) * tokens


def peak_memory(device: torch.device) -> float:
    """Peak memory so far in GB: allocated on a GPU, else resident; 0 where it cannot be asked."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    try:
        import resource
    except ModuleNotFoundError:  # not on Windows
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


class Log:
    """metrics.jsonl, the progress bar and, if wanted, a `report` elsewhere, of one stage on the
    first rank; and the signals that ask for an end. To be entered with `with`.

    `history` holds all rows, those before step `first` from the file.
    """

    def __init__(self, out: Path, name: str, first: int, steps: int,
                 report: str | None = None):
        self.path = out / "metrics.jsonl"
        self.history = cut_metrics(self.path, first) if is_main() else []
        self.file = open(self.path, "a") if is_main() else None
        self.progress = tqdm(total=steps, initial=first, desc=name, unit="step",
                             disable=not is_main())
        nowhere = (lambda row: None), (lambda: None)
        self.report, self.end = reporter(report, out) if report and is_main() else nowhere
        self.began = time.perf_counter()

    def __enter__(self) -> "Log":
        self.signals = Signals()
        return self

    def write(self, row: dict, device: torch.device) -> bool:
        """Adds the row of a step; True where a signal asks to end here, on any rank. The row's
        `flops` and `waited`, sums over the ranks, become `mfu` and `data_wait`, shares of the time
        since the last row."""
        now = time.perf_counter()
        took, self.began = now - self.began, now
        world = rank_and_world()[1]
        row["tokens_per_second"] = round(row["tokens"] / took, 1)
        row["data_wait"] = round(row.pop("waited") / world / took, 3)
        flops = row.pop("flops") / took / world
        if peak := peak_flops(device):
            row["mfu"] = round(flops / peak, 4)
        self.history.append(row)
        stop = reduce([self.signals.came], device, ReduceOp.MAX) == [1]
        if self.file is None:
            return stop
        with naming(self.path):
            self.file.write(json.dumps(row) + "\n")
            self.file.flush()
        notes = [f"loss {row['loss']:.3f}", f"norm {row['grad_norm']:.2f}", f"lr {row['lr']:.1e}",
                 f"{row['tokens_per_second']:.0f} tokens/s", f"{row['memory_gb']:.1f} GB",
                 f"data {100 * row['data_wait']:.0f} %"]
        notes += [f"MFU {100 * row['mfu']:.0f} %"] if "mfu" in row else []
        notes += [f"{row['skipped']} skipped"] if row["skipped"] else []
        self.progress.set_postfix_str(", ".join(notes), refresh=False)
        self.progress.update()
        self.report(row)
        return stop

    def __exit__(self, *error: object) -> None:
        self.signals.end()
        self.progress.close()
        if self.file is not None:
            self.file.close()
        self.end()


def reporter(where: str, out: Path) -> tuple[Callable[[dict], None], Callable[[], None]]:
    """How a row of metrics gets to wandb, trackio or TensorBoard, and how that ends. ValueError
    with what to type where the package is missing, or takes no run."""
    try:
        if where == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(out / "tensorboard")
            return (lambda row: [board.add_scalar(name, value, row["step"])
                                 for name, value in row.items()]), board.close
        package = importlib.import_module(where)  # the two have one interface
        package.init(project="sliming", name=str(out))
        return (lambda row: package.log(row, step=row["step"])), package.finish
    except ModuleNotFoundError as error:
        raise ValueError(f"--report {where} needs a package: pip install {where}") from error
    except Exception as error:  # not logged in, no network: whatever theirs raise
        raise ValueError(f"--report {where}: it takes no run ({error})") from error


def say(text: str, everyone: bool = False) -> None:
    """Prints on the first rank, or a complaint of every rank's own, without tearing a bar."""
    if everyone:
        tqdm.write(text, file=sys.stderr)
    elif is_main():
        tqdm.write(text, file=sys.stdout)


def cut_metrics(path: Path, first: int) -> list[dict]:
    """The rows of metrics.jsonl before step `first`, which are what the file holds afterwards: what
    an interrupted run wrote after its last state is dropped."""
    rows = resume(path) if first else []
    if any(not isinstance(row.get(key), kind) for row in rows
           for key, kind in (("step", int), ("loss", float))):
        raise RecordError(f"{path}: holds rows that are no training's; remove it")
    rows = [row for row in rows if row["step"] < first]
    new = path.with_suffix(".new")  # in one go: a kill leaves the old rows or the new ones
    new.write_text("".join(json.dumps(row) + "\n" for row in rows))
    os.replace(new, path)
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
    axes.set(xlabel="optimizer step", ylabel="loss (nats per supervised token)", yscale="log",
             title=title)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with naming(path):
        figure.savefig(path, dpi=120)
    plt.close(figure)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lines of text: the first column flush left, the others flush right."""
    lines = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])])
                     for line in lines)
