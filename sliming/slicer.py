"""Adaptive slicing: one image becomes a global view and a grid of local crops (Sec. 2.1, "Scaling
Input Resolution by Adaptive Slicing").

    image --images.open_image--> RGB --choose_grid--> (columns, rows) --slice_image--> Slices

Two rules choose the grid. "paper" is the text: of all grids up to 6 x 6 the most utilised
resolution, then the least wasted. "official" is the rule of the released code (yfzhang114/SliME,
llava/mm_utils.py, select_best_resolution_uhd): only the factorisations of about W H / S^2 crops.

Legend: W, H width and height of the image in pixels; S side of a crop in pixels; P = columns * rows
crops. A grid and a size are (width, height), as in the paper and in Pillow; an array is [height,
width].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from sliming.images import ImageSource, full_size, open_image, resizer


@dataclass(frozen=True, eq=False)
class Slices:
    """What the vision tower sees of one image. Pixels stay uint8: a quarter of float32's bytes to
    move. Or what it has said already: features [L, Dv] in the place of pixels [3, S, S]."""

    global_view: Tensor | None  # uint8 [3, S, S], contiguous; None where it was not asked for
    crops: Tensor | None        # uint8 [P, 3, S, S], row by row from the top left; None likewise
    grid: tuple[int, int]       # (columns, rows)


@lru_cache(maxsize=4096)  # data sets repeat sizes
def choose_grid(width: int, height: int, *, rule: str = "paper", crop_size: int = 336,
                max_side: int = 6, max_crops: int | None = None) -> tuple[int, int]:
    """The (columns, rows) of crops for an image of `width` x `height` pixels: of the grids that
    `weigh_grids` lists, the one that utilises most and, of equals, wastes least."""
    weighed = weigh_grids(width, height, rule, crop_size, max_side, max_crops)
    # max keeps the first of equals, which the official rule relies on: a square takes the taller
    # canvas. The paper's grids never tie: of two equals, the fewer columns by the fewer rows waste
    # less.
    return max(weighed, key=lambda grid: (weighed[grid][0], -weighed[grid][1]))


def weigh_grids(width: int, height: int, rule: str = "paper", crop_size: int = 336,
                max_side: int = 6, max_crops: int | None = None) -> dict[tuple, tuple[int, int]]:
    """Every grid (columns, rows) that the rule may choose, with its (utilised, wasted) pixels.

    A canvas of m x n crops scales the image by s = min(m S / W, n S / H). Its utilised resolution
    is min(W H, W s H s), as enlarging the image adds no detail; its wasted resolution is m S n S -
    utilised.

    `rule` "paper": m, n <= `max_side`, and m n <= `max_crops` where that is given. "official": m n
    in {N-1, N, N+1} with N = ceil(W H / S^2) clipped to [2, 6], so 2 to 7 crops; it has nothing to
    bound, and `max_side` and `max_crops` must keep their defaults. Raises ValueError for any other
    argument.
    """
    if min(width, height, crop_size, max_side) < 1 or (max_crops is not None and max_crops < 1):
        raise ValueError("sizes and bounds must be at least 1, not "
                         f"{width=} {height=} {crop_size=} {max_side=} {max_crops=}")
    if rule == "paper":
        grids = [(m, n) for m in range(1, max_side + 1) for n in range(1, max_side + 1)
                 if max_crops is None or m * n <= max_crops]
    elif rule == "official":
        if max_side != 6 or max_crops is not None:
            raise ValueError('max_side and max_crops bound nothing in rule "official": use "paper"')
        count = min(max(math.ceil(width * height / (crop_size * crop_size)), 2), 6)
        totals = range(max(count - 1, 2), count + 2)  # a single crop is never a candidate
        grids = [(m, total // m) for total in totals for m in range(1, total + 1) if total % m == 0]
    else:
        raise ValueError(f'unknown slicing rule {rule!r}: use "paper" or "official"')
    weighed = {}
    for grid in grids:
        canvas_width, canvas_height = grid[0] * crop_size, grid[1] * crop_size
        # float64 and the cut to whole pixels belong to the rule: they decide strips a pixel or two
        # wide.
        scale = min(canvas_width / width, canvas_height / height)
        utilised = min(int(width * scale) * int(height * scale), width * height)
        weighed[grid] = utilised, canvas_width * canvas_height - utilised
    return weighed


def slice_image(image: ImageSource, *, rule: str = "paper", global_view: str = "pad",
                crop_size: int = 336, max_side: int = 6, max_crops: int | None = None,
                parts: str = "both", resize: str = "pillow") -> Slices:
    """Cuts an image (anything `open_image` takes) into its global view and its local crops.

    `rule`, `crop_size`, `max_side` and `max_crops` choose the grid, see `weigh_grids`. The local
    canvas keeps the aspect ratio and is black around the image, as in the released code. The global
    view is the whole image in S x S: "pad" likewise (the paper pads and resizes, and names no
    colour), "squash" without its aspect ratio, as in the released code. `parts` "global" or "local"
    makes only the one. `resize`: see `images.resizer`. Raises ValueError for a wrong argument, and
    what `open_image` raises.
    """
    if global_view not in ("pad", "squash"):
        raise ValueError(f'unknown global view {global_view!r}: use "pad" or "squash"')
    image, size = open_image(image), crop_size
    full = full_size(image)                                                      # (W, H)
    columns, rows = choose_grid(*full, rule=rule, crop_size=size, max_side=max_side,
                                max_crops=max_crops)
    resized, view, crops = resizer(image, resize), None, None
    if parts != "global":
        # One resize for all crops; the resizes take nearly all of the time.
        canvas = fit(resized, full, columns * size, rows * size)      # [rows * S, columns * S, 3]
        crops = canvas.view(rows, size, columns, size, 3)               # [rows, S, columns, S, 3]
        crops = crops.permute(0, 2, 4, 1, 3).flatten(0, 1).contiguous()               # [P, 3, S, S]
    if parts != "local":
        view = fit(resized, full, size, size) if global_view == "pad" else resized((size, size))
        view = view.permute(2, 0, 1).contiguous()                                      # [3, S, S]
    return Slices(view, crops, (columns, rows))


def fit(resized: Callable[[tuple[int, int]], Tensor], full: tuple[int, int], width: int,
        height: int) -> Tensor:
    """The largest image of the same aspect ratio as `full`, centred on a black canvas: uint8
    [height, width, 3]."""
    size = inner(full, width, height)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    canvas = torch.zeros(height, width, 3, dtype=torch.uint8)
    canvas[top:top + size[1], left:left + size[0]] = resized(size)
    return canvas


def inner(full: tuple[int, int], width: int, height: int) -> tuple[int, int]:
    """The largest size of the same aspect ratio as `full` in `width` x `height`."""
    scale_x, scale_y = width / full[0], height / full[1]
    if scale_x < scale_y:  # ceil keeps the free side of a very thin image at one pixel or more
        return width, min(math.ceil(full[1] * scale_x), height)
    return min(math.ceil(full[0] * scale_y), width), height
