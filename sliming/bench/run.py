"""Speed and memory beside named peers, measured in one run on this machine.

    python -m sliming.bench --what attention        the query former, bare and whole
    python -m sliming.bench --what router           image by image, or all images padded
    python -m sliming.bench --what preprocessing    pictures to views
    python -m sliming.bench --what inference        first token, the next ones, an image's cost
    python -m sliming.bench --what train            gradients of a step
    python -m sliming.bench --what data             starting on two million records
    python -m sliming.bench --what memory           of each preset, on paper
    python -m sliming.bench --what gpu              all that a GPU can tell, in minutes
    python -m sliming.bench --what busy             two trainings at once
    python -m sliming.bench --what resizing         pictures to views, by how they are resized
    python -m sliming.bench --what features         a step on pixels, and on features of the tower
    python -m sliming.bench --what answers          questions a second, one by one and in batches
    python -m sliming.bench --what starting         seconds until a program does something
"""

import argparse
import sys
from pathlib import Path

from sliming.config import Parser

SUBJECTS = ("attention", "router", "preprocessing", "inference", "train", "data", "memory", "busy",
            "gpu", "resizing", "features", "answers", "starting")


def main() -> None:
    parser = Parser(prog="python -m sliming.bench", description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=SUBJECTS, required=True, help="what to measure")
    parser.add_argument("--out", type=Path, default=Path("out/bench"),
                        help="folder for attention.png (default: out/bench)")
    arguments = parser.parse_args()

    # torch is loaded when the flags are known to be right.
    from sliming.bench import (
        attention,
        busy,
        data,
        gpu,
        inference,
        laptop,
        memory,
        router,
        training,
    )
    from sliming.bench.timing import device_line
    from sliming.distributed import rank_device
    device = rank_device()
    measures = (attention.attention, router.router, data.preprocessing, inference.inference,
                training.train, data.data, memory.memory, busy.busy, gpu.gpu,
                laptop.resizing, laptop.features, laptop.answers, laptop.starting)
    measure = dict(zip(SUBJECTS, measures, strict=True))[arguments.what]
    print(device_line(device), flush=True)
    try:
        measure(device, arguments.out)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"sliming.bench: {' '.join(str(error).split())}")
