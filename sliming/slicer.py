"""Adaptive slicing: one image becomes one global view and a grid of local crops (Sec. 2.1, "Scaling Input
Resolution by Adaptive Slicing").

    image (PIL) --open_image--> RGB --choose_grid--> (columns, rows) --slice_image--> Slices

Two rules choose the grid. "paper" is the text: of all grids up to 6 x 6 the most utilised resolution, then
the least wasted. "official" is the rule of the released code (github.com/yfzhang114/SliME, llava/mm_utils.py,
select_best_resolution_uhd): only the factorisations of about W H / S^2 crops. Pixels stay uint8: a quarter of
the bytes of float32 to move, and scaling and normalising are cheap on the device.

Shapes: W, H width and height of the image in pixels; S side of a crop in pixels; P = columns * rows crops.
A grid and a size are (width, height) as in the paper and Pillow; an array is [height, width].
"""

import math
import os
import struct
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps

ImageSource = str | os.PathLike | BinaryIO | Image.Image


@dataclass(frozen=True, eq=False)
class Slices:
    """What the vision tower sees of one image: ``global_view`` uint8 [3, S, S]; ``crops`` uint8 [P, 3, S, S],
    row by row from the top left; ``grid`` = (columns, rows), columns * rows = P. Both are contiguous."""

    global_view: torch.Tensor
    crops: torch.Tensor
    grid: tuple[int, int]


@lru_cache(maxsize=4096)  # data sets repeat sizes, and lengths are asked for before any image is opened
def choose_grid(width: int, height: int, *, rule: str = "paper", crop_size: int = 336, max_side: int = 6,
                max_crops: int | None = None) -> tuple[int, int]:
    """The (columns, rows) of crops for an image of ``width`` x ``height`` pixels.

    A canvas of m x n crops scales the image by s = min(m S / W, n S / H). Its utilised resolution is
    min(W H, W s H s), as enlarging the image adds no detail; its wasted resolution is m S n S - utilised.

    ``rule`` "paper": m, n <= ``max_side``, and m n <= ``max_crops`` where that is given. "official": m n in
    {N-1, N, N+1} with N = ceil(W H / S^2) clipped to [2, 6], so 2 to 7 crops; it has nothing to bound, and
    ``max_side`` and ``max_crops`` must keep their defaults. Raises ValueError for any other argument.
    """
    if min(width, height, crop_size, max_side) < 1 or (max_crops is not None and max_crops < 1):
        raise ValueError("sizes and bounds must be at least 1, not "
                         f"{width=} {height=} {crop_size=} {max_side=} {max_crops=}")
    if rule == "paper":
        grids = [(m, n) for m in range(1, max_side + 1) for n in range(1, max_side + 1)
                 if max_crops is None or m * n <= max_crops]
    elif rule == "official":
        if max_side != 6 or max_crops is not None:
            raise ValueError('max_side and max_crops bound nothing in rule "official": use rule "paper"')
        count = min(max(math.ceil(width * height / (crop_size * crop_size)), 2), 6)
        totals = range(max(count - 1, 2), count + 2)  # a single crop is never a candidate
        grids = [(m, total // m) for total in totals for m in range(1, total + 1) if total % m == 0]
    else:
        raise ValueError(f'unknown slicing rule {rule!r}: use "paper" or "official"')

    def utilised_then_not_wasted(grid: tuple[int, int]) -> tuple[int, int]:
        canvas_width, canvas_height = grid[0] * crop_size, grid[1] * crop_size
        # float64 and the cut to whole pixels belong to the rule: they decide strips a pixel or two wide.
        scale = min(canvas_width / width, canvas_height / height)
        utilised = min(int(width * scale) * int(height * scale), width * height)
        return utilised, utilised - canvas_width * canvas_height

    # max keeps the first of equals, which the official rule relies on: a square takes the taller canvas. The
    # paper's grids never tie: of two equals, the fewer columns by the fewer rows utilise as much on less.
    return max(grids, key=utilised_then_not_wasted)


def slice_image(image: ImageSource, *, rule: str = "paper", global_view: str = "pad", crop_size: int = 336,
                max_side: int = 6, max_crops: int | None = None) -> Slices:
    """Cuts an image (anything ``open_image`` takes) into its global view and its local crops.

    ``rule``, ``crop_size``, ``max_side`` and ``max_crops`` choose the grid as in ``choose_grid``. The local
    canvas keeps the aspect ratio and is black around the image, as in the released code. The global view
    is the whole image in S x S: "pad" in the same way (the paper pads and resizes, and names no colour),
    "squash" without its aspect ratio, as in the released code.
    Raises ValueError for a wrong argument, and what ``open_image`` raises.
    """
    if global_view not in ("pad", "squash"):
        raise ValueError(f'unknown global view {global_view!r}: use "pad" or "squash"')
    image = open_image(image)
    size = crop_size
    columns, rows = choose_grid(image.width, image.height, rule=rule, crop_size=size, max_side=max_side,
                                max_crops=max_crops)
    # One resize and one copy for all crops; the resizes, in Pillow, take nearly all of the time.
    canvas = _fit(image, columns * size, rows * size)                           # [rows * S, columns * S, 3]
    crops = canvas.reshape(rows, size, columns, size, 3)                        # [rows, S, columns, S, 3]
    crops = crops.permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous()             # [P, 3, S, S]
    if global_view == "pad":
        view = _fit(image, size, size)                                          # [S, S, 3]
    else:
        view = torch.from_numpy(np.array(image.resize((size, size), Image.Resampling.BICUBIC)))  # [S, S, 3]
    return Slices(view.permute(2, 0, 1).contiguous(), crops, (columns, rows))


def _fit(image: Image.Image, width: int, height: int) -> torch.Tensor:
    """The largest image of the same aspect ratio, centred on a black canvas: uint8 [height, width, 3]."""
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:  # ceil keeps the free side of a very thin image at one pixel or more
        size = width, min(math.ceil(image.height * scale_x), height)
    else:
        size = min(math.ceil(image.width * scale_y), width), height
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    canvas = np.zeros((height, width, 3), dtype=np.uint8)
    canvas[top : top + size[1], left : left + size[0]] = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(canvas)


def open_image(source: ImageSource) -> Image.Image:
    """Reads a path, binary file or Pillow image as an upright 8-bit RGB image; the first frame of many.

    EXIF orientation is applied. Transparency shows white. Greyscale of over 8 bits is scaled, not clipped:
    its white is 65535 for integers, and for floats the smallest of 1, 255 and 65535 that no pixel exceeds.
    Colour profiles are not applied. An RGB image that needs no change is returned as it is, without a copy.
    Raises FileNotFoundError for a missing file, TypeError for another kind of source, and ValueError for one
    that is damaged, no image, or larger than Pillow decodes safely; each is one line that names the file.
    """
    if not isinstance(source, (str, os.PathLike, Image.Image)) and not hasattr(source, "read"):
        raise TypeError(f"an image is a path, a binary file or a Pillow image, not {type(source).__name__}")
    name = source if isinstance(source, (str, os.PathLike)) else (
        getattr(source, "filename", None) or getattr(source, "name", None) or "image without a name")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's warnings name no file; real damage is an error below
            with nullcontext(source) if isinstance(source, Image.Image) else Image.open(source) as image:
                image.load()
                return _to_rgb(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such image file; check the path and the image folder") from error
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error,
            Image.DecompressionBombError) as error:  # what Pillow's decoders raise on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{name}: unreadable image ({reason}); replace it or drop its record") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    """The loaded image, upright and RGB; raises ValueError where its values have no known meaning."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.getexif().get(0x0112, 1) != 1:  # the orientation tag of EXIF
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        white = next((w for w in ((1, 255, 65535) if image.mode == "F" else (65535,)) if high <= w), None)
        if white is None or not low >= 0:  # also where a value is not a number
            raise ValueError(f"grey values from {low} to {high} have no known white, save it with 8 bits")
        image = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        white_sheet = Image.new("RGB", image.size, "white")
        image = image.convert("RGBA")
        white_sheet.paste(image, mask=image)
        return white_sheet
    return image if image.mode == "RGB" else image.convert("RGB")
