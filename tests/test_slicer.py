"""Slicing against slow, obvious twins and recorded data; opening every odd kind of image file.
Sizes and grids are (width, height)."""

import hashlib
import io
import json
import math
import random
import re
import struct
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image
from reference import reference_folder

from sliming.images import open_image
from sliming.slicer import choose_grid, slice_image

# ---- slow twins ----------------------------------------------------------------------------------


def paper_merit(size, grid, crop_size):
    """(utilised, wasted) pixels of one grid, Sec. 2.1, in whole pixels."""
    width, height = size
    canvas_width, canvas_height = grid[0] * crop_size, grid[1] * crop_size
    scale = min(canvas_width / width, canvas_height / height)
    utilised = min(width * height, int(width * scale) * int(height * scale))
    return utilised, canvas_width * canvas_height - utilised


def paper_grid(size, crop_size, max_side, max_crops):
    """The paper's rule read aloud: keep the best so far in a double loop."""
    best, best_utilised, best_wasted = None, -1, -1
    for columns in range(1, max_side + 1):
        for rows in range(1, max_side + 1):
            if columns * rows > max_crops:
                continue
            utilised, wasted = paper_merit(size, (columns, rows), crop_size)
            if utilised > best_utilised or (utilised == best_utilised and wasted < best_wasted):
                best, best_utilised, best_wasted = (columns, rows), utilised, wasted
    return best


def exact_utilised(size, grid, crop_size):
    """The paper's formula in rational numbers, without whole pixels."""
    width, height = size
    scale = min(Fraction(grid[0] * crop_size, width), Fraction(grid[1] * crop_size, height))
    return min(Fraction(width * height), width * scale * height * scale)


def crop_by_crop(image, grid, crop_size):
    """(canvas, crops) by Pillow only: resize, paste on black, then crop() each cell, row by row."""
    width, height = grid[0] * crop_size, grid[1] * crop_size
    if width / image.width < height / image.height:
        size = width, min(math.ceil(image.height * (width / image.width)), height)
    else:
        size = min(math.ceil(image.width * (height / image.height)), width), height
    canvas = Image.new("RGB", (width, height), (0, 0, 0))
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), (left, top))
    return canvas, [canvas.crop((x, y, x + crop_size, y + crop_size))
                    for y in range(0, height, crop_size) for x in range(0, width, crop_size)]


def pixels(image):
    """uint8 [3, H, W] of an RGB image."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def noise(width, height, channels=3):
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), np.uint8)
    return Image.fromarray(values)


def encode(image, format, **options):
    """The image as a file in memory."""
    file = io.BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


def random_sizes(count, seed):
    """Widths and heights from 1 to 8000, evenly over the logarithm: small and thin are common."""
    draw = random.Random(seed)
    return [(round(8000 ** draw.random()), round(8000 ** draw.random())) for _ in range(count)]


# ---- the grid ------------------------------------------------------------------------------------


@pytest.mark.parametrize("crop_size, max_side, max_crops", [
    (336, 6, None), (336, 6, 9), (336, 4, 7), (64, 3, None), (336, 6, 1), (7, 1, None)])
def test_paper_rule_equals_the_double_loop(crop_size, max_side, max_crops):
    for size in random_sizes(3000, seed=crop_size + max_side):
        grid = choose_grid(*size, crop_size=crop_size, max_side=max_side, max_crops=max_crops)
        assert grid == paper_grid(size, crop_size, max_side, max_crops or max_side**2), size
        assert max(grid) <= max_side and grid[0] * grid[1] <= (max_crops or max_side**2)


def test_paper_rule_is_the_best_in_rational_numbers_to_within_whole_pixels():
    for size in random_sizes(500, seed=1):
        grids = [(columns, rows) for columns in range(1, 7) for rows in range(1, 7)]
        best = max(exact_utilised(size, grid, 336) for grid in grids)
        chosen = exact_utilised(size, choose_grid(*size), 336)
        # Whole pixels lose less than a column and a row of the scaled image, float64 no more again.
        scaled_width = math.sqrt(best * Fraction(size[0], size[1]))
        assert best - chosen <= 2 * (scaled_width + best / scaled_width), size


def test_paper_rule_never_ties():
    for size in random_sizes(1000, seed=2) + [(side, side) for side in range(1, 2500, 97)]:
        merits = [paper_merit(size, (c, r), 336) for c in range(1, 7) for r in range(1, 7)]
        best = max(merits, key=lambda merit: (merit[0], -merit[1]))
        assert merits.count(best) == 1, size


def test_grids_that_can_be_checked_by_hand():
    assert choose_grid(336, 336) == (1, 1)  # no larger than one crop: no special case
    assert choose_grid(10, 20) == (1, 1)
    assert choose_grid(337, 336) == (2, 1)
    assert choose_grid(672, 1008) == (2, 3)
    assert choose_grid(2016, 2016) == (6, 6)
    assert choose_grid(100, 64, crop_size=64) == (2, 1)
    assert choose_grid(2016, 2016, max_crops=8) == (2, 2)
    assert choose_grid(20000, 50) == (6, 1)
    assert choose_grid(1, 1, rule="official") == (1, 2)  # the released rule never gives one crop
    assert choose_grid(1000, 1000, rule="official") == (2, 3)  # 6 crops either way: the first wins
    assert choose_grid(3000, 430, rule="official") == (7, 1)


@pytest.mark.reference
def test_both_rules_equal_the_recorded_grids():
    records = json.loads(reference_folder("golden/slicing.json").read_text())["records"]
    assert records
    for record in records:
        for rule, key in (("paper", "paper36"), ("official", "uhd")):
            columns, rows = choose_grid(*record["size"], rule=rule)
            assert [336 * columns, 336 * rows] == record[key], (rule, record["size"])


@pytest.mark.parametrize("arguments, message", [
    (dict(rule="other"), "unknown slicing rule 'other'"), (dict(max_crops=0), "at least 1"),
    (dict(max_side=0), "at least 1"), (dict(crop_size=0), "at least 1"),
    (dict(rule="official", max_crops=4), "official"),
    (dict(rule="official", max_side=4), "official")])
def test_bad_arguments_are_refused_in_one_line(arguments, message):
    with pytest.raises(ValueError, match=message) as caught:
        choose_grid(500, 400, **arguments)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=message):
        slice_image(noise(50, 40), **arguments)
    with pytest.raises(ValueError, match="at least 1"):
        choose_grid(0, 5)
    with pytest.raises(ValueError, match="unknown global view 'crop'"):
        slice_image(noise(50, 40), global_view="crop")


# ---- the pixels ----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["paper", "official"])
@pytest.mark.parametrize("crop_size, width, height", [
    (24, 150, 60), (24, 60, 150), (24, 71, 73), (24, 9, 5), (7, 1, 1), (24, 1, 300),
    (336, 500, 401), (30, 20000, 50), (16, 97, 31)])
def test_slices_equal_crop_by_crop(rule, crop_size, width, height):
    image = noise(width, height)
    slices = slice_image(image, rule=rule, crop_size=crop_size)
    for views in (slices.global_view, slices.crops):
        assert views.dtype == torch.uint8 and views.is_contiguous()
    assert slices.grid == choose_grid(width, height, rule=rule, crop_size=crop_size)
    canvas, crops = crop_by_crop(image, slices.grid, crop_size)
    assert torch.equal(slices.crops, torch.stack([pixels(crop) for crop in crops]))
    # Padding the global view is the canvas of one crop; squashing it is a plain resize.
    assert torch.equal(slices.global_view, pixels(crop_by_crop(image, (1, 1), crop_size)[0]))
    squashed = slice_image(image, rule=rule, crop_size=crop_size, global_view="squash")
    resized = image.resize((crop_size, crop_size), Image.Resampling.BICUBIC)
    assert torch.equal(squashed.global_view, pixels(resized))
    assert torch.equal(squashed.crops, slices.crops)
    # Reassembled, the crops are the canvas.
    lines = [torch.cat(list(line), dim=2) for line in slices.crops.split(slices.grid[0])]
    assert torch.equal(torch.cat(lines, dim=1), pixels(canvas))


def test_thin_images_leave_a_visible_strip_on_black():
    for width, height in ((20000, 50), (50, 20000), (1, 4000), (4000, 1), (1, 1)):
        white = Image.new("RGB", (width, height), "white")
        for rule in ("paper", "official"):
            slices = slice_image(white, rule=rule)
            for views in (slices.global_view, slices.crops):
                assert set(views.unique().tolist()) <= {0, 255} and (views == 255).any()


def test_max_crops_and_max_side_bound_the_crops():
    image = noise(400, 300)
    assert len(slice_image(image, crop_size=50).crops) > 6
    assert len(slice_image(image, crop_size=50, max_crops=6).crops) <= 6
    assert len(slice_image(image, crop_size=50, max_crops=1).crops) == 1
    assert max(slice_image(image, crop_size=50, max_side=3).grid) <= 3


@pytest.mark.reference
def test_official_views_equal_the_recorded_ones_bit_for_bit():
    folder = reference_folder("golden/preprocess")
    records = json.loads((folder / "preprocess.json").read_text())["images"]
    assert records
    for record in records:
        name = record["name"]
        slices = slice_image(folder / f"{name}.png", rule="official", global_view="squash")
        views = torch.cat([slices.global_view[None], slices.crops])              # [1 + P, 3, S, S]
        assert list(slices.grid) == record["grid_cols_rows"]
        assert list(views.shape) == record["shape"]
        assert hashlib.sha256(views.numpy().tobytes()).hexdigest() == record["sha256_uint8"], name


# ---- opening -------------------------------------------------------------------------------------


def opened(image, format, **options):
    """uint8 [H, W, 3] of the image after going through a file; checks that Pillow does not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = open_image(encode(image, format, **options))
    assert result.mode == "RGB"
    return np.array(result)


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "WEBP"])
def test_path_file_and_image_give_the_same_pixels(format, tmp_path):
    image = noise(30, 20)
    path = tmp_path / f"picture.{format.lower()}"
    image.save(path, **({"lossless": True} if format == "WEBP" else {}))
    with open(path, "rb") as file:
        for source in (path, str(path), file, Image.open(path), image, open_image(path)):
            assert np.array_equal(open_image(source), image)
        assert not file.closed  # what the caller opened is the caller's to close
    assert torch.equal(slice_image(path, crop_size=9).crops, slice_image(image, crop_size=9).crops)
    assert open_image(image) is image


@pytest.mark.parametrize("format", ["JPEG", "PNG", "TIFF"])
def test_exif_orientation_is_applied(format):
    image = Image.new("RGB", (32, 16), "black")
    image.paste("white", (0, 0, 16, 16))  # the left half is white
    exif = Image.Exif()
    expected = {1: np.s_[:, :16], 2: np.s_[:, 16:], 3: np.s_[:, 16:], 4: np.s_[:, :16],
                5: np.s_[:16], 6: np.s_[:16], 7: np.s_[16:], 8: np.s_[16:]}
    for orientation, white_part in expected.items():
        exif[0x0112] = orientation
        kept = Image.open(encode(image, format, exif=exif))
        result = opened(image, format, exif=exif).astype(int)
        assert result.shape[:2] == ((16, 32) if orientation < 5 else (32, 16)), orientation
        assert result[white_part].min() > 240 and result.mean() < 140, orientation  # half black
        assert np.array_equal(open_image(kept), result)
        assert np.array_equal(open_image(open_image(kept)), result)  # turned once, not twice
        assert kept.size == (32, 16) or format == "TIFF"  # not in place; Pillow itself turns a TIFF


def test_cmyk_is_converted_not_inverted():
    image = Image.new("RGB", (16, 16), (200, 30, 60))
    result = opened(image.convert("CMYK"), "JPEG", quality=100).astype(int)
    assert np.abs(result - [200, 30, 60]).max() <= 4


@pytest.mark.parametrize("dtype, mode", [("<u2", "I;16"), (">u2", "I;16B")])
def test_16_bit_grey_is_scaled(dtype, mode):
    values = np.linspace(0, 65535, 40 * 30).round().reshape(30, 40)
    grey = np.array([[round(v / 257) for v in line] for line in values])
    expected = np.repeat(grey[:, :, None], 3, axis=2)
    image = Image.frombytes(mode, (40, 30), values.astype(dtype).tobytes())
    assert np.array_equal(open_image(image), expected)
    if mode == "I;16":
        assert np.array_equal(opened(image, "PNG"), expected)
        assert np.array_equal(opened(image, "TIFF"), expected)
        wide = Image.fromarray(values.astype(np.int32))  # mode I
        assert np.array_equal(opened(wide, "TIFF"), expected)
    dark = Image.fromarray((values / 1000).astype(np.uint16))  # stays dark: never stretched
    assert np.array(open_image(dark)).max() == 0


@pytest.mark.parametrize("white", [1, 255, 65535])
def test_float_grey_is_scaled(white):
    values = np.linspace(0, white, 12, dtype=np.float32).reshape(3, 4)
    expected = np.repeat(np.rint(np.linspace(0, 255, 12)).reshape(3, 4, 1), 3, axis=2)
    assert np.array_equal(opened(Image.fromarray(values), "TIFF"), expected)


@pytest.mark.parametrize("values", [
    np.float32([[-1, 1]]), np.float32([[0, 70000]]), np.float32([[0, np.nan]]),
    np.float32([[0, np.inf]]), np.int32([[-5, 5]]), np.int32([[0, 65536]])])
def test_grey_values_without_a_known_white_are_refused(values, tmp_path):
    path = tmp_path / "depth.tiff"
    Image.fromarray(values).save(path)
    with pytest.raises(ValueError, match="depth.tiff.*no known white"):
        open_image(path)


def test_transparency_shows_white():
    colour = noise(6, 5, channels=4)
    values = np.array(colour).astype(float)
    alpha = values[:, :, 3:] / 255
    expected = values[:, :, :3] * alpha + 255 * (1 - alpha)
    assert np.abs(opened(colour, "PNG") - expected).max() <= 1
    assert (opened(Image.new("LA", (4, 4), (90, 0)), "PNG") == 255).all()
    palette, key = Image.new("P", (4, 4), 1), Image.new("RGB", (4, 4), (1, 2, 3))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((0, 0), 0)
    key.putpixel((0, 0), (10, 20, 30))
    # A transparent index, an alpha for each index, a transparent colour.
    for image, transparent in ((palette, 1), (palette, bytes([255, 0])), (key, (1, 2, 3))):
        result = opened(image, "PNG", transparency=transparent)
        assert result[0, 0].tolist() == [10, 20, 30] and (result.reshape(-1, 3)[1:] == 255).all()


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr", "HSV"])
def test_other_modes_become_rgb(mode):
    image = noise(8, 6).convert(mode)
    assert np.array_equal(open_image(image), image.convert("RGB"))


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_animated_gives_the_first_frame(format, tmp_path):
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue", "lime")]
    path = tmp_path / f"film.{format.lower()}"
    options = {"lossless": True} if format == "WEBP" else {}
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert np.array_equal(open_image(path), frames[0])
    slices = slice_image(path, crop_size=10)  # the file is closed by now, its other frames unread
    assert slices.grid == (2, 1)
    assert torch.equal(slices.crops, slice_image(frames[0], crop_size=10).crops)


@pytest.mark.parametrize("format, mode", [
    ("PNG", "RGB"), ("JPEG", "RGB"), ("JPEG", "CMYK"), ("GIF", "P"), ("BMP", "RGB"),
    ("WEBP", "RGB"), ("TIFF", "RGB"), ("PNG", "LA")])
def test_truncated_file_is_an_error_and_never_half_an_image(format, mode, tmp_path):
    data = encode(noise(64, 48).convert(mode), format).getvalue()
    whole, path, failures = np.array(open_image(io.BytesIO(data))), tmp_path / "cut.image", 0
    for fraction in np.linspace(0, 0.99, 34):
        path.write_bytes(data[: int(len(data) * fraction)])
        try:
            assert np.array_equal(open_image(path), whole)  # only bytes after the last pixel lost
        except ValueError as error:
            assert re.fullmatch(".*cut.image: .*; replace it or drop its record", str(error))
            failures += 1
    assert failures >= 30


@pytest.mark.parametrize("data", [
    b"", b"no image", b"<html>404</html>", b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_no_image_is_an_error_that_names_the_file(data, tmp_path):
    path = tmp_path / "page.jpg"
    path.write_bytes(data)
    message = r"page\.jpg: unreadable image \(.+\); replace it or drop"
    for source in (path, str(path), open(path, "rb")):
        with pytest.raises(ValueError, match=message):
            open_image(source)
    with pytest.raises(ValueError, match="^image without a name: unreadable"):
        open_image(io.BytesIO(data))


@pytest.mark.parametrize("error, reason", [
    (RuntimeError("no planes\nin it"), "no planes in it"), (struct.error("short"), "short"),
    (SyntaxError("bad chunk"), "bad chunk"), (EOFError(), "EOFError"),
    (OSError("bad strip"), "bad strip")])
def test_whatever_a_decoder_raises_becomes_one_line(error, reason, monkeypatch):
    def fail(_):
        raise error

    monkeypatch.setattr(Image.Image, "load", fail)
    with pytest.raises(ValueError) as caught:
        open_image(Image.new("RGB", (4, 4)))
    assert re.fullmatch(rf".*unreadable image \({reason}\); replace it.*", str(caught.value))


def test_missing_folder_empty_and_wrong_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^\S*absent\.png: no such image file[^\n]*$"):
        slice_image(tmp_path / "absent.png")
    with pytest.raises(ValueError, match="unreadable image"):
        open_image(tmp_path)
    with pytest.raises(ValueError, match="no pixels"):
        open_image(Image.new("RGB", (0, 4)))
    for source in (None, 5, b"\x89PNG", ["a.png"]):
        with pytest.raises(TypeError, match="not (NoneType|int|bytes|list)"):
            open_image(source)


def test_decompression_bomb_is_one_line(monkeypatch, tmp_path):
    path = tmp_path / "bomb.png"
    noise(40, 30).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)  # Pillow refuses more than twice this
    with pytest.raises(ValueError, match=r"bomb\.png: unreadable image \([^\n]*bomb[^\n]*$"):
        open_image(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # below that it only warns
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).size == (40, 30)


def test_global_view_never_builds_a_square_of_the_long_side(monkeypatch):
    """A 20,000-pixel strip padded to a square takes 1.2 GB; no canvas is larger than the crops."""
    image = Image.new("RGB", (20000, 50))
    sizes, zeros, resize = [], torch.zeros, Image.Image.resize
    monkeypatch.setattr(torch, "zeros", lambda *s, **k: sizes.append(s[:2]) or zeros(*s, **k))
    monkeypatch.setattr(Image.Image, "resize", lambda *args: sizes.append(args[1]) or resize(*args))
    monkeypatch.setattr(Image, "new", None)  # no canvas is made by Pillow
    slice_image(image)
    assert len(sizes) == 4 and max(math.prod(size) for size in sizes) == 6 * 336 * 336
