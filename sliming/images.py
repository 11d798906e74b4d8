"""Opening an image, in any of the usual formats, upright, in 8-bit RGB."""

import os
import warnings
from contextlib import nullcontext
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from sliming.guard import open_file

# What is decoded. EPS, which starts another program, and rare formats are not.
Image.init()
FORMATS = [name for name in ("AVIF", "BMP", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "PCX",
                             "PNG", "PPM", "QOI", "SGI", "TGA", "TIFF", "WEBP")
           if name in Image.OPEN]
ImageSource = str | os.PathLike | BinaryIO | Image.Image


def open_image(source: ImageSource) -> Image.Image:
    """Reads a path, binary file or Pillow image as an upright 8-bit RGB image; the first frame of
    many.

    EXIF orientation is applied. Transparency shows white. Greyscale of over 8 bits is scaled, not
    clipped: its white is 65535 for integers, and for floats the smallest of 1, 255 and 65535 that
    no pixel exceeds. Colour profiles are not applied. An RGB image that needs no change is returned
    as it is, without a copy. Raises FileNotFoundError for a missing file, TypeError for another
    kind of source, and ValueError for one that is damaged, no image, or larger than Pillow decodes
    safely; each is one line that names the file.
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
            if isinstance(source, Image.Image):
                source.load()
                return to_rgb(source)
            with (nullcontext(source) if hasattr(source, "read") else open_file(source) as file,
                  Image.open(file, formats=FORMATS) as image):
                image.load()
                return to_rgb(image)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{name}: no such image file; check the path and the image "
                                "folder") from error
    except Exception as error:  # there is no end to what Pillow's decoders raise on damaged files
        reason = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, UnidentifiedImageError):
            reason = "no image of a known format"
        raise ValueError(f"{name}: unreadable image ({reason}); replace it or drop its "
                         "record") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The loaded image, upright and RGB; raises ValueError where its values have no known
    meaning."""
    if 0 in image.size:
        raise ValueError("it has no pixels")
    if image.getexif().get(0x0112, 1) != 1:  # the orientation tag of EXIF
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
