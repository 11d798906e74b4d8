"""Opening an image, in any of the usual formats, upright, in 8-bit RGB. Resizing it."""

import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from sliming.guard import open_file

# What is decoded. EPS, which starts another program, and rare formats are not.
Image.init()
FORMATS = [name for name in ("AVIF", "BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX",
                             "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
           if name in Image.OPEN]
ImageSource = str | os.PathLike | BinaryIO | Image.Image

ORIENTATION = 0x0112  # of EXIF; from 5 on, width and height change places


def open_image(source: ImageSource,
               enough: Callable[[int, int], tuple[int, int]] | None = None) -> Image.Image:
    """Reads a path, binary file or Pillow image as an upright 8-bit RGB image; the first frame of
    many.

    EXIF orientation is applied. Transparency shows white. Greyscale of over 8 bits is scaled, not
    clipped: its white is 65535 for integers, and for floats the smallest of 1, 255 and 65535 that
    no pixel exceeds. Colour profiles are not applied. An RGB image that needs no change is returned
    as it is, without a copy.

    `enough`: the size that suffices for a picture of a width and height. A JPEG file is then
    decoded at half, a quarter or an eighth of its size where that is no smaller; `full_size` still
    tells its own.

    Raises FileNotFoundError for a missing file, TypeError for another kind of source, and
    ValueError for one that is damaged, no image, or larger than Pillow decodes safely; each is one
    line that names the file.
    """
    if not isinstance(source, (str, os.PathLike, Image.Image)) and not hasattr(source, "read"):
        raise TypeError("an image is a path, a binary file or a Pillow image, "
                        f"not {type(source).__name__}")
    name = source
    if not isinstance(source, (str, os.PathLike)):
        names = (getattr(source, attribute, None) for attribute in ("filename", "name"))
        name = next(filter(None, names), "image without a name")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they name no file; real damage is an error below
            opened = isinstance(source, Image.Image)
            given = opened or hasattr(source, "read")
            with (nullcontext(source) if given else open_file(source) as file,
                  nullcontext(file) if opened else Image.open(file, formats=FORMATS) as image):
                turned = image.getexif().get(ORIENTATION, 1) >= 5
                size = image.size[::-1] if turned else image.size
                if enough is not None and not opened and 0 not in size:
                    image.draft(None, enough(*size)[::-1 if turned else 1])
                image.load()
                image = to_rgb(image)
                if image.size != size:
                    image.full_size = size
                return image
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such image file; check the path and the image "
                                "folder") from error
    except Exception as error:  # there is no end to what Pillow's decoders raise on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no image of a known format"
        raise ValueError(f"{name}: unreadable image ({reason}); replace it or drop its "
                         "record") from error


def full_size(image: Image.Image) -> tuple[int, int]:
    """Width and height of an opened image, as if it had been decoded whole."""
    return getattr(image, "full_size", image.size)


def to_rgb(image: Image.Image) -> Image.Image:
    """The loaded image, upright and RGB; raises ValueError where its values have no known
    meaning."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image)
        low, high = values.min(), values.max()
        whites = (1, 255, 65535) if image.mode == "F" else (65535,)
        white = next((white for white in whites if high <= white), None)
        if white is None or not low >= 0:  # also where a value is not a number
            raise ValueError(f"grey values from {low} to {high} have no known white, "
                             "save it with 8 bits")
        image = Image.fromarray(np.rint(values * (255 / white)).astype(np.uint8))
    if image.has_transparency_data:
        white_sheet = Image.new("RGB", image.size, "white")
        image = image.convert("RGBA")
        white_sheet.paste(image, mask=image)
        return white_sheet
    return image if image.mode == "RGB" else image.convert("RGB")


def resizer(image: Image.Image, how: str) -> Callable[[tuple[int, int]], Tensor]:
    """A function from a size to the image in that size: uint8 [height, width, 3], bicubic with
    antialiasing.

    "pillow": the pixels that the released models were trained on. "torch": a few times as fast; of
    its values under 1 % differ, by 1 or 2 of 255. ValueError for another way.
    """
    if how == "pillow":
        return lambda size: torch.from_numpy(np.array(image.resize(size, Image.Resampling.BICUBIC)))
    if how != "torch":
        raise ValueError(f'unknown resize {how!r}: use "pillow" or "torch"')
    pixels = torch.from_dlpack(np.asarray(image)).permute(2, 0, 1)[None]        # [1, 3, H, W]
    return lambda size: F.interpolate(pixels, size[::-1], mode="bicubic",
                                      antialias=True)[0].permute(1, 2, 0)
