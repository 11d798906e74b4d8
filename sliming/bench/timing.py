"""What all subjects share: medians of runs that take turns, the device's name, a plain picture,
processes of their own."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import numpy as np
import torch
from PIL import Image

from sliming.watch import table


def device_line(device: torch.device) -> str:
    """What the numbers below it were measured on: device or CPU threads, version."""
    name = f"{torch.get_num_threads()} CPU threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}"


def median_ms(run: Callable[[], object], device: torch.device, repeats: int = 20,
              warmup: int = 3) -> float:
    """Median milliseconds of one call of `run`; see `medians_ms`."""
    return medians_ms({"": run}, device, repeats, warmup)[""]


def medians_ms(runs: dict[str, Callable[[], object]], device: torch.device, repeats: int = 20,
               warmup: int = 3, queued: bool = False) -> dict[str, float]:
    """Median milliseconds of one call of each of `runs`: CUDA events on a GPU, the clock on a CPU.

    They take turns, so that whatever else the machine does meets all of them alike; warm-up calls
    are not counted. `queued`: the GPU is kept busy while the host launches, so that the time is the
    device's alone.
    """
    times = {name: [] for name in runs}
    work = torch.ones(8192, 8192, device=device, dtype=torch.bfloat16) if queued else None
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            if device.type == "cuda":
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                for _ in range(12 * queued):           # 1.4 ms each on an H200, at least
                    work @ work
                start.record()
                run()
                end.record()
                torch.cuda.synchronize(device)
                elapsed = start.elapsed_time(end)
            else:
                begin = time.perf_counter()
                run()
                elapsed = 1e3 * (time.perf_counter() - begin)
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


def show(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n{table(header, rows)}", flush=True)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of copying 256 MB."""
    source = torch.zeros(64_000_000, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (1e-3 * median_ms(lambda: target.copy_(source), device, repeats=10))


def picture(width: int, height: int) -> Image.Image:
    """Smooth colours, the same ones every time."""
    size = (max(1, height // 8), max(1, width // 8), 3)
    pixels = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


def own_process() -> ProcessPoolExecutor:
    """A process that has nothing of this one's: `submit` runs functions in it."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))
