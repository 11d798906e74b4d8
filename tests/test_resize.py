"""The second way of resizing: nearly Pillow's pixels, its grid, JPEGs no larger than needed."""

import numpy as np
import pytest
import torch
from PIL import Image

from sliming.images import full_size, open_image
from sliming.inputs import Processor
from sliming.model import SliME
from sliming.slicer import slice_image


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours."""
    shape = (height // 8 + 2, width // 8 + 2, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(300, 200), (97, 301), (1024, 1024), (700, 40), (1, 1)])
@pytest.mark.parametrize("global_view", ["pad", "squash"])
def test_torch_resizes_to_nearly_pillow_s_pixels(size, global_view):
    one, other = (slice_image(picture(*size), crop_size=96, global_view=global_view, resize=resize)
                  for resize in ("pillow", "torch"))
    assert one.grid == other.grid
    for a, b in zip((one.global_view, one.crops), (other.global_view, other.crops), strict=True):
        apart = (a.int() - b.int()).abs()
        assert b.is_contiguous() and apart.max() <= 2 and (apart > 0).float().mean() < 0.25
    assert min(size) < 9 or not torch.equal(one.global_view, other.global_view)  # the twins are two


def test_an_unknown_way_of_resizing_is_refused():
    with pytest.raises(ValueError, match="unknown resize 'fast': use \"pillow\" or \"torch\""):
        slice_image(picture(64, 64), resize="fast")


@pytest.fixture
def processor(model) -> Processor:
    model.config.resize = "torch"
    return model.processor  # crops of 64 pixels, 6 along a side at most


@pytest.mark.parametrize("side, decoded",
                         [(500, 500), (760, 760), (768, 384), (1520, 760), (1536, 384)])
def test_a_jpeg_is_decoded_at_a_fraction_where_its_canvas_is_half_of_it(processor, tmp_path, side,
                                                                        decoded):
    """Its canvas has 384 pixels a side."""
    path = tmp_path / "a.jpg"
    picture(side, side).save(path, quality=95)
    image = processor.open(path)
    assert image.size == (decoded, decoded) and full_size(image) == (side, side)
    slices, whole = processor.slice(path), processor.slice(open_image(path))
    assert slices.grid == whole.grid == (6, 6)
    assert (slices.crops.float() - whole.crops.float()).abs().mean() < 3
    again = processor.slice(image)
    assert torch.equal(again.crops, slices.crops)
    assert torch.equal(again.global_view, slices.global_view)
    processor.config.resize = "pillow"
    assert processor.open(path).size == (side, side)
    picture(side, side).save(tmp_path / "a.png")
    assert processor.open(tmp_path / "a.png").size == (side, side)


def test_a_turned_jpeg_too(processor, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright
    picture(2000, 500).save(tmp_path / "a.jpg", exif=exif, quality=95)
    image = processor.open(tmp_path / "a.jpg")
    assert full_size(image) == (500, 2000) and image.size == (125, 500)
    assert processor.slice(image).grid == processor.grid(500, 2000)
    assert full_size(image.crop((0, 0, 50, 50))) == (50, 50)  # what is made of it has its own size


def test_a_checkpoint_keeps_its_way_of_resizing(model, tmp_path):
    for resize in ("pillow", "torch"):
        model.config.resize = resize
        model.save_pretrained(tmp_path)
        assert SliME.from_pretrained(tmp_path).processor.config.resize == resize
