"""The data side: from a decoded picture to views, starting on two million records, files beside
parquet."""

import json
import math
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from PIL import Image
from torch import Tensor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from sliming.backbones import PIXEL_MEAN, PIXEL_STD
from sliming.bench.timing import medians_ms, own_process, picture, show
from sliming.data import open_mixture
from sliming.hub import images_of
from sliming.images import open_image
from sliming.slicer import slice_image

SIZE, SIZES = 336, ((336, 336), (640, 480), (1024, 1024), (2016, 1344), (4000, 3000))

# ------------------------------------------------------------------------------------ preprocessing


def resizes(image: Image.Image, grid: tuple[int, int]) -> list[Image.Image]:
    """Pillow's part, which every way needs: the whole view, and what the crops are cut from."""
    scale = min(count * SIZE / side for count, side in zip(grid, image.size, strict=True))
    inner = [min(math.ceil(side * scale), count * SIZE)
             for count, side in zip(grid, image.size, strict=True)]
    return [image.resize(size, Image.Resampling.BICUBIC) for size in ((SIZE, SIZE), inner)]


def per_crop(image: Image.Image, grid: tuple[int, int], processor) -> Tensor:
    """The released code's way (llava/mm_utils.py, process_anyres_image): a black canvas, and every
    view by itself through transformers' image processor: float32 [1 + P, 3, S, S]."""
    (columns, rows), (whole, inner) = grid, resizes(image, grid)
    canvas = Image.new("RGB", (columns * SIZE, rows * SIZE))
    canvas.paste(inner, ((canvas.width - inner.width) // 2, (canvas.height - inner.height) // 2))
    views = [whole, *(canvas.crop((x * SIZE, y * SIZE, (x + 1) * SIZE, (y + 1) * SIZE))
                      for y in range(rows) for x in range(columns))]
    return torch.cat([processor(view, return_tensors="pt")["pixel_values"] for view in views])


def normalised(image: Image.Image) -> Tensor:
    """Ours with the tower's first lines, which else run on its device: float32 [1 + P, 3, S, S]."""
    slices = slice_image(image, rule="official", global_view="squash")
    views = torch.cat([slices.global_view[None], slices.crops]).float()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return views.div_(255).sub_(mean).div_(std)


def preprocessing(device: torch.device, out: Path, sizes: tuple = SIZES, repeats: int = 9) -> None:
    """Images per second, one thread's work. "uint8" is what the model takes; "two resizes" is
    Pillow's work alone: no other code around it could be faster than that."""
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    lines = []
    for width, height in sizes:
        image = picture(width, height)
        ours = partial(slice_image, image, rule="official", global_view="squash")
        grid = ours().grid
        if (per_crop(image, grid, processor) - normalised(image)).abs().max() > 1e-6:
            raise RuntimeError(f"{width} x {height}: the released way gives other pixels")
        times = medians_ms({"ours": ours, "normalised": partial(normalised, image),
                            "per crop": partial(per_crop, image, grid, processor),
                            "resizes": partial(resizes, image, grid)},
                           torch.device("cpu"), repeats, 2)
        lines.append([f"{width} x {height}", str(grid[0] * grid[1]),
                      *(f"{1e3 / times[key]:.1f}" for key in times),
                      *(f"{times['per crop'] / times[key]:.2f}" for key in ("ours", "normalised"))])
    show("preprocessing, images per second; equal pixels in all ways",
         ["image", "crops", "ours, uint8", "ours, normalised", "CLIPImageProcessor per crop",
          "two resizes alone", "ratio", "normalised"], lines)


# ------------------------------------------------------------------------------------------ records


def data_side(path: str) -> tuple[float, float]:
    """In a process of its own: seconds to open a file of records and read the first, GB resident
    that it adds with 2,000 records read in training's order."""
    def resident() -> float:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e9

    before, began = resident(), time.perf_counter()
    records = open_mixture([path], seed=0)
    records[0]
    ready = time.perf_counter() - began
    for place in range(2000):
        records[place]
    return ready, resident() - before


def starts(name: str, path: Path, count: int, size: int) -> list[str]:
    """A line of the table: what the first start on `path` costs, and the next."""
    both = []
    for _ in range(2):
        with own_process() as pool:
            both.append(pool.submit(data_side, str(path)).result())
    (first, _), (later, added) = both
    return [name, f"{count:,}", f"{size / 1e9:.2f}", f"{first:.1f}", f"{later:.2f}",
            f"{1e3 * added:.0f}"]


def write_shards(folder: Path, count: int, shards: int = 40) -> int:
    """`count` records in parquet files, each with an image of a kilobyte: their bytes."""
    import pyarrow
    from pyarrow import parquet
    folder.mkdir()
    image, each = os.urandom(1000), count // shards
    said = {"conversations": [{"from": "human", "value": "<image>\nWhat is shown?"},
                              {"from": "gpt", "value": "a picture of some kind"}],
            "image": {"bytes": image, "path": None}}
    table = pyarrow.Table.from_pylist([{"id": str(index), **said} for index in range(each)])
    for shard in range(shards):
        parquet.write_table(table, folder / f"train-{shard:05d}.parquet", row_group_size=1000)
    return sum(path.stat().st_size for path in folder.iterdir())


def beside_files(folder: Path, count: int, repeats: int = 5) -> None:
    """Pictures sliced per second from JPEG files named in JSON, and from parquet."""
    import pyarrow
    from pyarrow import parquet
    rows, turns = [], [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "that"}]
    for index in range(count):
        picture(640, 480 + index).save(folder / f"{index}.jpg")
        rows.append({"id": str(index), "image": f"{folder}/{index}.jpg", "conversations": turns})
    (folder / "files.json").write_text(json.dumps(rows))
    for row in rows:
        row["image"] = {"bytes": Path(row["image"]).read_bytes(), "path": None}
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "a.parquet", row_group_size=16)

    def slice_all(name: str) -> None:
        records = open_mixture([str(folder / name)], seed=0)
        for place in range(count):
            for image in images_of(records[place]):
                slice_image(open_image(image))

    times = medians_ms({name: partial(slice_all, name) for name in ("files.json", "a.parquet")},
                       torch.device("cpu"), repeats, 1)
    show("records read and sliced, per second", ["from", "640 x 480 and more"],
         [[name, f"{1e3 * count / took:.1f}"] for name, took in times.items()])


def data(device: torch.device, out: Path, count: int = 2_000_000) -> None:
    """Starting on a file of `count` records: the first time, and every time after it."""
    turn, lines = {"from": "human", "value": "<image>\nWhat is shown?"}, []
    for name, around in (("records.jsonl", ("", "\n", "\n")), ("records.json", ("[", ",\n", "]"))):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            with open(path, "w") as file:
                for index in range(count):
                    answer = {"from": "gpt", "value": f"picture {index} " * (1 + index % 20)}
                    record = {"id": str(index), "image": f"{index}.jpg",
                              "conversations": [turn, answer]}
                    file.write((around[1] if index else around[0]) + json.dumps(record))
                file.write(around[2])
            lines.append(starts(name, path, count, path.stat().st_size))
    with (tempfile.TemporaryDirectory() as folder,
          patch.dict(os.environ, XDG_CACHE_HOME=f"{folder}/cache")):
        size = write_shards(Path(folder) / "shards", count)
        lines.append(starts("40 shards of parquet", Path(folder) / "shards", count, size))
        beside_files(Path(folder), min(64, count // 100))
    show("starting on a file of records", ["file", "records", "GB", "first start s", "later s",
                                           "data side's resident MB"], lines)
