"""Every row of the rule in dino_lightning.data.decode, with pixel values worked out here by other means."""

import io
import logging
import multiprocessing
import os
import pickle
import struct
import time
import warnings
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from dino_lightning.data import ChannelMismatch, UnreadableImage, as_array, decode, jpeg, read_image, slow_reads

GRADIENT = np.arange(24, dtype=np.uint8).reshape(2, 4, 3) * 10  # RGB, 2 high, 4 wide, no two values alike
COLOURS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]]], dtype=np.uint8)
COLOURS_LUMA = np.array([[76, 150, 29, 255]])  # 0.299 R + 0.587 G + 0.114 B, rounded


def saved(image, path, **options):
    """The path of an array or PIL image that was written there."""
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)
    return path


def saved_npy(data, path):
    np.save(path, data)
    return path


def gray3(values):
    """(H, W) values as the (H, W, 3) that a gray image becomes."""
    return np.stack([values] * 3, axis=-1)


def assert_pixels(actual, expected, tolerance=0):
    assert actual.dtype == np.uint8
    assert actual.shape == np.shape(expected)
    assert actual.flags.c_contiguous and actual.flags.writeable
    np.testing.assert_allclose(actual.astype(int), expected, rtol=0, atol=tolerance)


# 8-bit images, three channels and one


@pytest.mark.parametrize("extension", ["png", "bmp", "ppm", "tif", "PNG"])
def test_rgb_is_kept(tmp_path, extension):
    assert_pixels(read_image(saved(GRADIENT, tmp_path / f"a.{extension}")), GRADIENT)


def test_rgb_jpeg(tmp_path):
    flat = np.full((40, 30, 3), (200, 100, 50), dtype=np.uint8)
    assert_pixels(read_image(str(saved(flat, tmp_path / "a.jpg", quality=95))), flat, tolerance=3)


def test_result_goes_to_torch_without_a_warning(tmp_path):
    for chans in (1, 3):
        array = read_image(saved(GRADIENT, tmp_path / "a.jpg"), chans)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.from_numpy(array)


def test_gray_and_one_bit_become_rgb(tmp_path):
    gray = GRADIENT[..., 0]
    assert_pixels(read_image(saved(gray, tmp_path / "gray.png")), gray3(gray))
    bits = np.array([[True, False, True]])
    assert_pixels(read_image(saved(bits, tmp_path / "bits.png")), gray3([[255, 0, 255]]))
    assert_pixels(read_image(tmp_path / "bits.png", 1), [[[255], [0], [255]]])


def palette_image():
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8)).convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    return image


@pytest.mark.parametrize("extension", ["png", "gif", "bmp", "tif"])
def test_palette_becomes_its_colours(tmp_path, extension):
    path = saved(palette_image(), tmp_path / f"a.{extension}")
    assert_pixels(read_image(path), [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]])


def test_cmyk(tmp_path):
    inks = np.array([[[0, 0, 0, 0], [255, 0, 0, 0], [0, 255, 0, 0], [0, 0, 0, 255]]], dtype=np.uint8)
    path = saved(Image.fromarray(inks, "CMYK"), tmp_path / "a.tif")
    assert_pixels(read_image(path), [[[255, 255, 255], [0, 255, 255], [255, 0, 255], [0, 0, 0]]])


def test_ycbcr_and_lab():
    ycc = Image.fromarray(np.array([[[128, 128, 128], [76, 85, 255]]], dtype=np.uint8), "YCbCr")
    assert_pixels(as_array(ycc), [[[128, 128, 128], [255, 0, 0]]], tolerance=2)
    lab = Image.fromarray(np.array([[[0, 0, 0], [255, 0, 0]]], dtype=np.uint8), "LAB")
    assert_pixels(as_array(lab), [[[0, 0, 0], [255, 255, 255]]], tolerance=2)
    assert_pixels(as_array(lab, 1), [[[0], [255]]], tolerance=2)


def test_one_channel_is_luma(tmp_path):
    path = saved(COLOURS, tmp_path / "a.png")
    assert_pixels(read_image(path, 1), COLOURS_LUMA[..., None])
    gray = GRADIENT[..., 0]
    assert_pixels(read_image(saved(gray, tmp_path / "gray.png"), 1), gray[..., None])


# Transparency


def over_white(colour, alpha):
    colour, alpha = np.asarray(colour, dtype=float), np.asarray(alpha, dtype=float)[..., None] / 255
    return np.rint(colour * alpha + 255 * (1 - alpha))


def test_alpha_is_laid_over_white(tmp_path):
    alpha = np.array([[0, 64, 128, 255]], dtype=np.uint8)
    rgba = np.concatenate([COLOURS, alpha[..., None]], axis=-1)
    path = saved(rgba, tmp_path / "rgba.png")
    expected = over_white(COLOURS, alpha)
    assert_pixels(read_image(path), expected)
    assert_pixels(read_image(path, 1), (expected @ [0.299, 0.587, 0.114])[..., None], tolerance=0.51)
    la = np.array([[[0, 0], [0, 64], [100, 128], [100, 255]]], dtype=np.uint8)
    path = saved(Image.fromarray(la, "LA"), tmp_path / "la.png")
    expected = over_white(la[..., :1], la[..., 1])
    assert_pixels(read_image(path), np.repeat(expected, 3, axis=-1))
    assert_pixels(read_image(path, 1), expected)


@pytest.mark.parametrize("extension", ["png", "gif"])
def test_transparent_palette_entry_is_white(tmp_path, extension):
    path = saved(palette_image(), tmp_path / f"a.{extension}", transparency=1)
    assert_pixels(read_image(path), [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]])


def palette_image_with_alpha():
    image = palette_image().convert("PA")
    image.putalpha(Image.fromarray(np.array([[255, 0, 255]], dtype=np.uint8)))
    assert image.mode == "PA"
    return image


def test_palette_with_alpha_band():
    assert_pixels(as_array(palette_image_with_alpha()), [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]])


def test_transparent_colour_key_is_white(tmp_path):
    rgb = saved(COLOURS, tmp_path / "rgb.png", transparency=(0, 255, 0))
    assert_pixels(read_image(rgb), [[[255, 0, 0], [255, 255, 255], [0, 0, 255], [255, 255, 255]]])
    gray = saved(np.array([[7, 8]], dtype=np.uint8), tmp_path / "gray.png", transparency=7)
    assert_pixels(read_image(gray, 1), [[[255], [8]]])


@pytest.mark.parametrize("mode, pixel, expected", [("RGBa", (50, 0, 0, 100), (205, 155, 155)), ("La", (0, 100), (155, 155, 155))])
def test_premultiplied_alpha(mode, pixel, expected):
    assert_pixels(as_array(Image.new(mode, (1, 1), pixel)), [[expected]], tolerance=1)


# EXIF orientation


TURNED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),  # stored lying on its left side: a quarter turn clockwise makes it upright
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a),
}


def orientation_tag(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("extension", ["png", "tif", "webp"])
def test_exif_orientation_is_applied_once(tmp_path, orientation, extension):
    options = {"lossless": True} if extension == "webp" else {}
    path = saved(GRADIENT, tmp_path / f"a.{extension}", exif=orientation_tag(orientation), **options)
    expected = TURNED[orientation](GRADIENT)
    assert_pixels(read_image(path), expected)
    assert_pixels(as_array(Image.open(path)), expected)
    assert_pixels(as_array(Image.open(path).convert("RGB")), expected)  # as a torchvision loader hands it over


@pytest.mark.parametrize("orientation", TURNED)
def test_exif_orientation_of_jpeg_and_of_high_bit(tmp_path, orientation):
    blocks = np.kron(np.array([[0, 50, 100], [150, 200, 250]]), np.ones((16, 16))).astype(np.uint8)
    path = saved(blocks, tmp_path / "a.jpg", exif=orientation_tag(orientation), quality=95)
    assert_pixels(read_image(path, 1)[..., 0], TURNED[orientation](blocks), tolerance=8)
    for extension in ("png", "tif"):
        path = saved(blocks.astype(np.uint16) * 4, tmp_path / f"a.{extension}", exif=orientation_tag(orientation))
        assert_pixels(read_image(path, 1)[..., 0], TURNED[orientation](np.rint(blocks * (255 / 250))))


def test_damaged_exif_is_no_reason_to_drop_the_pixels(tmp_path):
    path = saved(GRADIENT, tmp_path / "a.png", exif=b"Exif\x00\x00not a TIFF header")
    with pytest.raises(SyntaxError):
        Image.open(path).getexif()
    assert_pixels(read_image(path), GRADIENT)


# More than 8 bits


RAW = np.array([[100, 101], [612, 1124]])  # a span of 1024, far from both ends of 16 bits
STRETCHED = np.array([[0, 0], [128, 255]])  # 512 / 1024 * 255 = 127.5, rounded to even


@pytest.mark.parametrize(
    "dtype, extension, mode",
    [
        ("uint16", "png", "I;16"),
        ("uint16", "tif", "I;16"),
        (">u2", "tif", "I;16B"),
        ("int32", "tif", "I"),
        ("float32", "tif", "F"),
        ("uint16", "pgm", "I"),
    ],
)
@pytest.mark.parametrize("in_chans", [1, 3])
def test_high_bit_files_are_stretched(tmp_path, dtype, extension, mode, in_chans):
    path = saved(RAW.astype(dtype), tmp_path / f"a.{extension}")
    assert Image.open(path).mode == mode
    assert_pixels(read_image(path, in_chans), np.stack([STRETCHED] * in_chans, axis=-1))


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int16", "int32", "int64", "uint64", "float16", "float64"])
def test_high_bit_arrays_are_stretched(tmp_path, dtype):
    data = RAW.astype(dtype)
    assert_pixels(as_array(data), gray3(STRETCHED))
    assert_pixels(read_image(saved_npy(data, tmp_path / "a.npy")), gray3(STRETCHED))
    if dtype != ">u2":  # torch has native byte order only
        assert_pixels(as_array(torch.from_numpy(data)), gray3(STRETCHED))


def test_negative_values_are_stretched():
    assert_pixels(as_array(np.array([[-3.0, 0.0], [1.0, 2.0]]), 1)[..., 0], [[0, 153], [204, 255]])
    assert_pixels(as_array(np.array([[-128, 127]], dtype=np.int8), 1)[..., 0], [[0, 255]])


def test_all_channels_are_stretched_together():
    data = np.array([[[1000, 0, 2000], [500, 500, 500]]], dtype=np.uint16)
    assert_pixels(as_array(data), [[[128, 0, 255], [64, 64, 64]]])


@pytest.mark.parametrize("value", [5, 1000])
def test_an_image_of_one_value_is_black(tmp_path, value):
    data = np.full((3, 4), value, dtype=np.uint16)
    assert_pixels(read_image(saved(data, tmp_path / "a.png")), np.zeros((3, 4, 3)))
    assert_pixels(as_array(data.astype(np.float32)), np.zeros((3, 4, 3)))


def test_32_bit_integers_keep_their_low_bits():
    data = np.array([[2**30, 2**30 + 1, 2**30 + 5]], dtype=np.int32)
    assert_pixels(as_array(data, 1), [[[0], [51], [255]]])


def write_rgb16_png(path, pixels):
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def test_16_bit_colour_png_keeps_the_top_8_bits(tmp_path):
    pixels = np.array([[[0x1234, 0x8000, 0xFFFF], [0x00FF, 0x0100, 0xABCD]]])
    assert_pixels(read_image(write_rgb16_png(tmp_path / "a.png", pixels)), pixels >> 8)


# Floats within [0, 1], and bool


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_float_within_0_and_1_is_scaled_not_stretched(tmp_path, dtype):
    tensor = torch.tensor([[0.25, 0.5], [0.75, 0.375]], dtype=dtype)
    expected = gray3([[64, 128], [191, 96]])  # 63.75, 127.5 to even, 191.25, 95.625
    assert_pixels(as_array(tensor), expected)
    assert_pixels(as_array(tensor.float().numpy()), expected)
    assert_pixels(read_image(saved_npy(tensor.float().numpy(), tmp_path / "a.npy")), expected)
    assert_pixels(read_image(saved(tensor.float().numpy(), tmp_path / "a.tif")), expected)


def test_float_tensors_of_bytes_come_back_exactly():
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert_pixels(as_array(values.float() / 255, 1), values.numpy()[0, ..., None])


def test_float_just_outside_of_0_and_1_is_stretched():
    assert_pixels(as_array(np.array([[0.0, 1.5, 3.0]]), 1), [[[0], [128], [255]]])
    assert_pixels(as_array(np.array([[-0.5, 0.0, 0.5]]), 1), [[[0], [128], [255]]])


def test_integers_0_and_1_are_stretched_and_bool_is_0_and_255():
    assert_pixels(as_array(np.array([[0, 1]]), 1), [[[0], [255]]])
    assert_pixels(as_array(np.array([[1, 1]]), 1), [[[0], [0]]])
    assert_pixels(as_array(torch.tensor([[True, True]]), 1), [[[255], [255]]])
    assert_pixels(as_array(np.array([[False, False]]), 1), [[[0], [0]]])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_errors(tmp_path, bad):
    data = np.array([[0.0, 0.5], [bad, 1.0]], dtype=np.float32)
    for image in (data, torch.from_numpy(data)):
        with pytest.raises(ValueError, match="NaN or infinity"):
            as_array(image)
    for path in (saved(data, tmp_path / "a.tif"), saved_npy(data, tmp_path / "a.npy")):
        with pytest.raises(UnreadableImage, match="NaN or infinity"):
            read_image(path)


# Other numbers of channels, pages and frames


def test_rgba_is_kept_for_four_channels(tmp_path):
    rgba = np.arange(16, dtype=np.uint8).reshape(2, 2, 4)
    assert_pixels(read_image(saved(rgba, tmp_path / "a.png"), 4), rgba)
    path = saved(palette_image(), tmp_path / "p.png", transparency=1)
    expected = [[[10, 20, 30, 255], [40, 50, 60, 0], [70, 80, 90, 255]]]
    assert_pixels(read_image(path, 4), expected)
    assert_pixels(as_array(palette_image_with_alpha(), 4), expected)
    assert_pixels(as_array(Image.new("RGBa", (1, 1), (40, 20, 0, 51)), 4), [[[200, 100, 0, 51]]])


def test_la_is_kept_for_two_channels(tmp_path):
    la = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    assert_pixels(read_image(saved(Image.fromarray(la, "LA"), tmp_path / "a.png"), 2), la)


def tiff_of_pages(path, pages, **options):
    first, *rest = [Image.fromarray(page) for page in pages]
    first.save(path, save_all=True, append_images=rest, **options)
    return path


@pytest.mark.parametrize("count", [2, 3, 5])
def test_pages_of_a_tiff_are_channels(tmp_path, count):
    pages = np.arange(count * 6, dtype=np.uint8).reshape(count, 2, 3)
    path = tiff_of_pages(tmp_path / "a.tif", pages)
    assert_pixels(read_image(path, count), pages.transpose(1, 2, 0))
    assert_pixels(read_image(path, 1), pages[0][..., None])
    with Image.open(path) as image:
        assert_pixels(as_array(image, count), pages.transpose(1, 2, 0))
        assert image.tell() == 0


def test_high_bit_pages_are_stretched_together(tmp_path):
    pages = np.array([[[1000, 1500]], [[2000, 2500]]], dtype=np.uint16)
    assert_pixels(read_image(tiff_of_pages(tmp_path / "a.tif", pages), 2), [[[0, 170], [85, 255]]])


def test_pages_are_turned_upright(tmp_path):
    pages = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    path = tiff_of_pages(tmp_path / "a.tif", pages, exif=orientation_tag(6))
    assert_pixels(read_image(path, 2), np.rot90(pages.transpose(1, 2, 0), -1))


def test_pages_that_are_not_channels_leave_the_first_page(tmp_path):
    two = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert_pixels(read_image(tiff_of_pages(tmp_path / "two.tif", two)), gray3(two[0]))
    pyramid = [np.full((size, size), size, dtype=np.uint8) for size in (4, 2, 1)]
    assert_pixels(read_image(tiff_of_pages(tmp_path / "pyramid.tif", pyramid)), np.full((4, 4, 3), 4))
    colour = [COLOURS, COLOURS[:, ::-1], COLOURS // 2]
    assert_pixels(read_image(tiff_of_pages(tmp_path / "colour.tif", colour)), COLOURS)


@pytest.mark.parametrize("extension", ["gif", "png"])
def test_first_frame_of_an_animation(tmp_path, extension):
    path = tmp_path / f"a.{extension}"
    frames = [Image.new("L", (3, 2), value) for value in (40, 90, 200)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with Image.open(path) as image:
        assert image.n_frames == 3
    assert_pixels(read_image(path), np.full((2, 3, 3), 40))


@pytest.mark.parametrize("in_chans, found", [(2, 3), (4, 3), (5, 3)])
def test_file_of_another_channel_count(tmp_path, in_chans, found):
    path = saved(GRADIENT, tmp_path / "a.png")
    with pytest.raises(ValueError, match=rf"a\.png.* {found} channels .*in_chans={in_chans}: pass in_chans={found}"):
        read_image(path, in_chans)
    high_bit = saved(RAW.astype(np.uint16), tmp_path / "high.png")
    with pytest.raises(ChannelMismatch, match="1 channels"):
        read_image(high_bit, in_chans)


# Arrays, tensors and .npy


def test_arrays_are_channels_last_and_tensors_channels_first():
    assert_pixels(as_array(GRADIENT), GRADIENT)
    assert_pixels(as_array(torch.from_numpy(GRADIENT.transpose(2, 0, 1).copy())), GRADIENT)
    assert_pixels(as_array(tv_tensors.Image(torch.from_numpy(GRADIENT.transpose(2, 0, 1).copy()))), GRADIENT)
    six = np.arange(24, dtype=np.uint8).reshape(2, 2, 6)
    assert_pixels(as_array(six, 6), six)
    assert_pixels(as_array(torch.from_numpy(six.transpose(2, 0, 1).copy()), 6), six)


def test_gray_arrays_become_rgb_and_rgb_arrays_gray():
    gray = GRADIENT[..., 0]
    for image in (gray, gray[..., None], torch.from_numpy(gray.copy()), torch.from_numpy(gray.copy())[None]):
        assert_pixels(as_array(image), gray3(gray))
        assert_pixels(as_array(image, 1), gray[..., None])
    assert_pixels(as_array(COLOURS, 1), COLOURS_LUMA[..., None])
    assert_pixels(as_array(torch.from_numpy(COLOURS.transpose(2, 0, 1) / 255), 1), COLOURS_LUMA[..., None])


def test_an_array_that_fits_is_not_copied_and_any_other_layout_is_made_to_fit():
    fits = GRADIENT.copy()
    assert np.shares_memory(as_array(fits), fits)
    assert not np.shares_memory(as_array(fits[:, ::-1]), fits)
    assert_pixels(as_array(fits[:, ::-1]), GRADIENT[:, ::-1])
    assert_pixels(as_array(np.asarray(Image.fromarray(GRADIENT))), GRADIENT)  # read-only
    assert_pixels(as_array(torch.zeros(3, 2, 2, requires_grad=True)), np.zeros((2, 2, 3)))


@pytest.mark.parametrize("in_chans", [3, 5])
def test_npy_takes_channels_first_or_last(tmp_path, in_chans):
    data = np.arange(4 * 6 * in_chans, dtype=np.uint8).reshape(4, 6, in_chans)
    assert_pixels(read_image(saved_npy(data, tmp_path / "last.npy"), in_chans), data)
    assert_pixels(read_image(saved_npy(data.transpose(2, 0, 1), tmp_path / "FIRST.NPY.npy"), in_chans), data)
    os.rename(tmp_path / "last.npy", tmp_path / "last.NPY")
    assert_pixels(read_image(tmp_path / "last.NPY", in_chans), data)


def test_npy_with_two_channel_axes_takes_the_last(tmp_path):
    data = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    assert_pixels(read_image(saved_npy(data, tmp_path / "a.npy")), data)


def test_npy_gray(tmp_path):
    gray = GRADIENT[..., 0]
    for shape in ((2, 4), (2, 4, 1), (1, 2, 4)):
        path = saved_npy(gray.reshape(shape), tmp_path / "a.npy")
        assert_pixels(read_image(path), gray3(gray))
        assert_pixels(read_image(path, 1), gray[..., None])


def test_npy_in_fortran_order(tmp_path):
    assert_pixels(read_image(saved_npy(np.asfortranarray(GRADIENT), tmp_path / "a.npy")), GRADIENT)


def test_npy_of_another_channel_count(tmp_path):
    path = saved_npy(np.zeros((8, 20, 30), dtype=np.uint8), tmp_path / "a.npy")
    with pytest.raises(ChannelMismatch, match=r"a\.npy.* 8 channels \(shape \(8, 20, 30\)\).*in_chans=3.*in_chans=8"):
        read_image(path)


@pytest.mark.parametrize(
    "image, in_chans",
    [
        (np.zeros((4, 4, 4), np.uint8), 3),  # perhaps RGBA, perhaps four bands of a satellite
        (np.zeros((4, 4, 4), np.uint8), 1),
        (np.zeros((5, 6, 2), np.uint8), 4),
        (np.zeros((3, 5, 4), np.uint8), 3),  # channels first in numpy
        (torch.zeros(5, 4, 3), 3),  # channels last in torch
    ],
)
def test_arrays_of_another_channel_count(image, in_chans):
    axis = 0 if isinstance(image, torch.Tensor) else -1
    with pytest.raises(ValueError, match=rf"{image.shape[axis]} channels .*in_chans={in_chans}: pass in_chans="):
        as_array(image, in_chans)


@pytest.mark.parametrize("image", [None, "a.jpg", [[1, 2]], {"image": 1}, 3])
def test_other_types_are_named(image):
    with pytest.raises(TypeError, match=rf"PIL image.*torch tensor.*numpy array.*{type(image).__name__}"):
        as_array(image)


@pytest.mark.parametrize("dtype", ["complex64", "U3", "O", "M8[s]"])
def test_other_dtypes_are_named(dtype):
    with pytest.raises(TypeError, match=str(np.dtype(dtype)).replace("[", r"\[")):
        as_array(np.zeros((2, 2), dtype=dtype))


@pytest.mark.parametrize("shape", [(3,), (1, 3, 4, 4), ()])
def test_other_shapes_are_named(tmp_path, shape):
    data = np.zeros(shape, dtype=np.uint8)
    with pytest.raises(ValueError, match="2 or 3 axes"):
        as_array(data)
    with pytest.raises(UnreadableImage, match="2 or 3 axes"):
        read_image(saved_npy(data, tmp_path / "a.npy"))


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_images_without_pixels(tmp_path, dtype):
    data = np.zeros((0, 5, 3), dtype=dtype)
    with pytest.raises(ValueError, match="no pixels"):
        as_array(data)
    with pytest.raises(UnreadableImage, match="no pixels"):
        read_image(saved_npy(data, tmp_path / "a.npy"))
    with pytest.raises(UnreadableImage, match="no pixels"):
        as_array(Image.new("RGB", (0, 5)))


# Files that cannot be read


def noise_jpeg(path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return saved(noise, path)


def unreadable(path):
    with pytest.raises(UnreadableImage) as caught:
        read_image(path)
    error = caught.value
    assert error.source == str(path)
    assert error.reason
    assert error.source in str(error) and error.reason in str(error)
    assert error.__cause__ is not None
    return error


@pytest.mark.parametrize("extension", ["jpg", "png", "tif", "gif", "bmp", "webp", "ppm", "npy"])
@pytest.mark.parametrize("kept", [0.0, 0.5, 0.9])
def test_truncated_files(tmp_path, extension, kept):
    path = tmp_path / f"a.{extension}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    saved_npy(noise, path) if extension == "npy" else saved(noise, path)
    assert read_image(path).shape == (64, 64, 3)
    content = path.read_bytes()
    path.write_bytes(content[: int(kept * len(content))])
    unreadable(path)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.npy"])
def test_text_file_by_the_name_of_an_image(tmp_path, name):
    (tmp_path / name).write_text("this is no image\n" * 50)
    unreadable(tmp_path / name)


def test_missing_file_and_folder(tmp_path):
    assert "No such file" in unreadable(tmp_path / "missing.jpg").reason
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for name in ("folder.jpg", "pipe.jpg"):
        assert "a pipe, a device or a folder" in unreadable(tmp_path / name).reason


def test_a_file_that_is_read_for_long_is_named(tmp_path, monkeypatch, caplog):
    """By each process, also one that was forked while another read."""
    monkeypatch.setattr(slow_reads, "SECONDS", 0.1)
    read_image(saved(GRADIENT, tmp_path / "quick.png"))  # there is one now that sleeps for longer, or awakes at any moment
    monkeypatch.setattr(slow_reads, "_watcher", None)
    path = saved(GRADIENT, tmp_path / "slow.png")
    opened = open
    monkeypatch.setattr(decode, "open", lambda *names: time.sleep(0.5) or opened(*names), raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside a thread
        read_image(path)
        slow_reads._since[0] = "of another thread", time.monotonic()  # it is not there behind the fork
        with multiprocessing.get_context("fork").Pool(1) as pool:
            said = pool.apply(_said_while_reading, (path,))
        del slow_reads._since[0]
    for text in (caplog.text, said):
        assert f"{path} has been read for 0 s" in text and text.count(str(path)) <= 3
    assert "of another thread" not in said


def _said_while_reading(path):
    stream = io.StringIO()
    slow_reads.log.addHandler(logging.StreamHandler(stream))
    read_image(path)
    return stream.getvalue()


class MakesFolder:
    """Unpickling one of these makes a folder, as it might do anything else."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_npy_of_objects_is_not_unpickled(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, np.array([[MakesFolder(tmp_path / "made")]], dtype=object), allow_pickle=True)
    unreadable(path)
    assert not (tmp_path / "made").exists()


def test_npz_and_damaged_header_by_the_name_of_npy(tmp_path):
    np.savez(tmp_path / "a.npz", GRADIENT)
    os.rename(tmp_path / "a.npz", tmp_path / "a.npy")
    unreadable(tmp_path / "a.npy")
    content = saved_npy(GRADIENT, tmp_path / "b.npy").read_bytes()
    (tmp_path / "b.npy").write_bytes(content.replace(b"}", b"(", 1))
    unreadable(tmp_path / "b.npy")


def test_a_decompression_bomb_is_refused_before_it_unfolds(tmp_path):
    """30,000 × 30,000 black pixels in a file of 120 KB."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    side, packed = 30_000, zlib.compressobj()
    rows = b"".join(packed.compress(bytes(1000 * (1 + side // 8))) for _ in range(side // 1000)) + packed.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path = tmp_path / "bomb.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))
    assert path.stat().st_size < 200_000
    begin = time.monotonic()
    assert "900000000 pixels" in unreadable(path).reason and time.monotonic() - begin < 1


def test_a_pil_image_that_fails_on_first_use(tmp_path):
    path = noise_jpeg(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UnreadableImage) as caught:
        as_array(Image.open(path))
    assert caught.value.source == str(path)


def test_unreadable_image_crosses_processes(tmp_path):
    error = unreadable(tmp_path / "missing.jpg")
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is UnreadableImage
    assert (copy.source, copy.reason, str(copy)) == (error.source, error.reason, str(error))


# JPEG by another decoder, and reduced


def photograph(height, width, seed=0):
    """Smooth colours with edges and grain, as a photograph has them."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (height // 40 + 2, width // 40 + 2, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels[height // 3 : height // 2, width // 4 : width // 2] += 70
    return (pixels + rng.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8)


def jpegs(folder):
    """Files of many kinds that PIL calls JPEG."""
    image = Image.fromarray(photograph(101, 67))
    for name, options in {
        "444": {"subsampling": 0}, "422": {"subsampling": 1}, "420": {"subsampling": 2}, "progressive": {"progressive": True},
        "rgb": {"keep_rgb": True, "subsampling": 0}, "poor": {"quality": 5}, "icc": {"icc_profile": b"x" * 200}, "restarts": {"restart_marker_rows": 1},
    }.items():  # fmt: skip
        yield saved(image, folder / f"{name}.jpg", **options)
    for mode in ("L", "CMYK"):
        yield saved(image.convert(mode), folder / f"{mode}.jpg")
    for orientation in range(9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        yield saved(image, folder / f"turned{orientation}.jpg", exif=exif)
        yield saved(image.convert("L"), folder / f"gray{orientation}.jpg", exif=exif)
    whole = (folder / "420.jpg").read_bytes()
    rng = np.random.default_rng(0)
    for i in range(20):
        damaged = bytearray(whole)
        if i % 2:
            del damaged[int(rng.integers(200, len(whole))) :]
        else:
            damaged[int(rng.integers(700, len(whole)))] ^= 0xFF
        (folder / f"damaged{i}.jpg").write_bytes(damaged)
        yield folder / f"damaged{i}.jpg"


def outcome(path, in_chans):
    try:
        return read_image(path, in_chans)
    except UnreadableImage as error:
        return str(error)


def test_jpegs_are_the_same_by_both_decoders(tmp_path, monkeypatch):
    """simplejpeg where it is installed, PIL where it is not or where something is odd: equal pixels, equal errors."""
    fast = pytest.importorskip("simplejpeg")
    decoded = []
    for path in jpegs(tmp_path):
        for in_chans in (3, 1):
            monkeypatch.setattr(jpeg, "simplejpeg", fast)
            found = outcome(path, in_chans)
            if not path.name.startswith("damaged"):
                with Image.open(path) as image:
                    decoded.append(jpeg.decode(path.read_bytes(), image.mode) is not None)
            monkeypatch.setattr(jpeg, "simplejpeg", None)
            expected = outcome(path, in_chans)
            if isinstance(expected, str):
                assert found == expected
            else:
                assert_pixels(found, expected)
    assert decoded.count(False) == 2, "all but CMYK, and not by PIL"


def test_a_reduced_jpeg_has_the_upright_size_of_its_reduction(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    path = saved(Image.fromarray(photograph(400, 320)), tmp_path / "a.jpg", exif=exif, quality=95)
    asked = []
    reduced = read_image(path, reduction=lambda *size: asked.append(size) or 4)
    assert asked == [(400, 320)] and reduced.shape == (80, 100, 3)
    whole = np.asarray(Image.fromarray(read_image(path)).resize((100, 80), Image.Resampling.BOX))
    assert_pixels(reduced, whole, tolerance=8)
    assert np.abs(reduced.astype(int) - whole).mean() < 0.7
    png = saved(photograph(80, 80), tmp_path / "a.png")
    assert read_image(png, reduction=lambda *size: 4).shape == (80, 80, 3), "other formats keep their size"
