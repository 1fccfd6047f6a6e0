"""What the workers decide: geometry equal to PIL's, distributions equal to the reference's."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as tv

from dino_lightning import MultiCropDataModule
from dino_lightning.data.geometry import center_view, resize
from dino_lightning.data.multicrop import BOX, MultiCrop, crop_boxes
from dino_lightning.data.paint_records import PAINT
from dino_lightning.data.painting import paint
from dino_lightning.training.randomness import generator

IMAGE = np.random.default_rng(0).integers(0, 256, (97, 131, 3)).astype(np.uint8)


def smooth_image(height=90, width=120):
    y, x = np.mgrid[0:height, 0:width]
    waves = [128 + 120 * np.sin(x / 9 + c) * np.cos(y / (7 + c)) for c in range(3)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def kolmogorov_smirnov(a, b):
    """The two-sample statistic over its threshold at a significance of 0.001; above 1 the distributions differ."""
    a, b = np.sort(a), np.sort(b)
    points = np.concatenate([a, b])
    distance = np.abs(np.searchsorted(a, points, "right") / len(a) - np.searchsorted(b, points, "right") / len(b)).max()
    return distance / (1.95 * math.sqrt((len(a) + len(b)) / (len(a) * len(b))))


def assert_rate(hits, p):
    """A share of hits that is p to within four standard deviations; p = 0 and 1 exactly."""
    share, n = np.mean(hits), len(hits)
    assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / n), f"{share} is not {p}"


def assert_pixels_equal(got, expected):
    """Within one level; this image is noise, where one pixel in a thousand may be two levels off."""
    difference = np.abs(got.numpy().astype(int) - np.asarray(expected))
    assert difference.max() <= 2 and (difference > 1).mean() < 1e-3 and (difference > 0).mean() < 0.25


@pytest.mark.parametrize("box, size", [((0, 0, 97, 131), (224, 224)), ((10, 20, 60, 50), (96, 96)), ((3, 5, 90, 120), (48, 64))])
def test_crops_are_resized_as_pil_does(box, size):
    for image in (IMAGE, np.ascontiguousarray(IMAGE[..., :1])):
        top, left, height, width = box
        crop = image[top : top + height, left : left + width]
        expected = Image.fromarray(crop.squeeze()).resize(size[::-1], Image.Resampling.BICUBIC)
        got = resize(torch.from_numpy(image)[top : top + height, left : left + width], size)
        assert got.shape == (image.shape[2], *size) and got.dtype == torch.uint8
        assert_pixels_equal(got.permute(1, 2, 0).squeeze(), expected)


def test_evaluation_view_is_resize_256_and_centre_crop_224():
    for height, width in ((300, 500), (500, 300), (97, 131), (256, 256)):
        image = np.asarray(Image.fromarray(IMAGE).resize((width, height)))
        expected = tv.center_crop(tv.resize(Image.fromarray(image), 256, tv.InterpolationMode.BICUBIC), 224)
        assert_pixels_equal(center_view(image.copy(), (224, 224)).permute(1, 2, 0), expected)
    assert center_view(IMAGE, (32, 80)).shape == (3, 32, 80)


@pytest.mark.parametrize("scale", [(0.4, 1.0), (0.05, 0.4)])
def test_crop_boxes_are_distributed_as_torchvisions(scale):
    torch.manual_seed(0)
    image = torch.empty(3, 300, 400)
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), [3 / 4, 4 / 3]) for _ in range(4000)])
    draws = generator(1).random((4000, BOX))
    ours = crop_boxes(300, 400, [scale] * 4000, draws)
    for name, measure in {
        "area": lambda b: b[:, 2] * b[:, 3],
        "ratio": lambda b: b[:, 3] / b[:, 2],
        "top": lambda b: b[:, 0],
        "left": lambda b: b[:, 1],
    }.items():
        assert kolmogorov_smirnov(measure(ours), measure(theirs)) < 1, name
    assert (ours[:, 0] + ours[:, 2] <= 300).all() and (ours[:, 1] + ours[:, 3] <= 400).all()
    other = crop_boxes(300, 400, [(scale[0], scale[1] * 0.85)] * 4000, draws)
    assert kolmogorov_smirnov(other[:, 2] * other[:, 3], theirs[:, 2] * theirs[:, 3]) > 1, "the test can tell them apart"


def test_an_image_too_long_for_any_box_gives_the_central_one():
    ((top, left, height, width),) = crop_boxes(10, 1000, [(0.9, 1.0)], generator(0).random((1, BOX)))
    assert (top, height, width) == (0, 10, 13) and left == (1000 - 13) // 2


@pytest.fixture(scope="module")
def records():
    """What 4,000 images have painted: (4000, 4) records of global 1, global 2 and two local views."""
    multicrop = MultiCrop((8, 8), (0.4, 1.0), 2, (8, 8))
    image = smooth_image(16, 16)
    return np.stack([multicrop(image, 0, 0, i)[1] for i in range(4000)])


def test_rates_are_the_references(records):
    for view, (blur, solarize) in enumerate([(1.0, 0.0), (0.1, 0.2), (0.5, 0.0), (0.5, 0.0)]):
        assert_rate(records[:, view]["jitter"], 0.8)
        assert_rate(records[:, view]["gray"], 0.2)
        assert_rate(records[:, view]["blur_sigma"] > 0, blur)
        assert_rate(records[:, view]["solarize"], solarize)


def test_ranges_are_the_references(records):
    uniform = np.random.default_rng(1).uniform(size=20000)
    for name, low, high in [("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.8, 1.2), ("hue", -0.1, 0.1)]:
        assert kolmogorov_smirnov(records[name].ravel(), low + (high - low) * uniform) < 1, name
    sigma = records["blur_sigma"].ravel()
    assert kolmogorov_smirnov(sigma[sigma > 0], 0.1 + 1.9 * uniform) < 1


def test_all_orders_of_the_jitter_are_equally_likely(records):
    orders, counts = np.unique(records["order"].reshape(-1, 4), axis=0, return_counts=True)
    assert len(orders) == 24
    expected = records.size / 24
    assert ((counts - expected) ** 2 / expected).sum() < 60, "chi-square with 23 degrees of freedom, beyond 0.0001"


def test_flips():
    image = np.zeros((12, 16, 3), np.uint8)
    image[:6, 8:] = 255
    multicrop = MultiCrop((8, 8), (1.0, 1.0), 0, hflip_p=0.5, vflip_p=0.25)
    corners = torch.stack([multicrop(image, 0, 0, i)[0][0][0, [0, 0, -1, -1], [0, -1, 0, -1]] for i in range(2000)]) > 128
    at_left, at_bottom = corners[:, 0] | corners[:, 2], corners[:, 2] | corners[:, 3]
    assert_rate(at_left.numpy(), 0.5)
    assert_rate(at_bottom.numpy(), 0.25)
    still = MultiCrop((8, 8), (1.0, 1.0), 0, hflip_p=0, vflip_p=0)
    assert all(still(image, i)[0][0][0, 0, -1] > 128 for i in range(20))


def test_views_depend_on_the_key_alone_and_differ_from_each_other():
    multicrop = MultiCrop((32, 32), local_crops_number=3, local_crops_size=(16, 24))
    image = smooth_image()
    crops, recipe = multicrop(image, 3, 1, 7)
    again, same = multicrop(image, 3, 1, 7)
    assert [tuple(c.shape) for c in crops] == [(3, 32, 32)] * 2 + [(3, 16, 24)] * 3
    assert all(torch.equal(a, b) for a, b in zip(crops, again)) and (recipe == same).all()
    assert not torch.equal(crops[0], crops[1]) and not torch.equal(crops[2], crops[3])
    for key in ((4, 1, 7), (3, 2, 7), (3, 1, 8)):
        assert not torch.equal(multicrop(image, *key)[0][0], crops[0]), "seed, epoch and index each matter"


def test_whole_views_equal_pil_given_the_same_numbers():
    multicrop = MultiCrop((64, 64), local_crops_number=2, local_crops_size=(32, 32))
    image, mean, std = smooth_image(), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for i in range(30):
        crops, recipe = multicrop(image, 0, 0, i)
        for crop, record in zip(crops, recipe):
            expected = paint_with_pil(Image.fromarray(crop.permute(1, 2, 0).numpy()), record)
            got = paint(crop[None], record[None], mean, std)[0]
            levels = (got * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]) * 255
            difference = levels.round().permute(1, 2, 0).numpy() - np.asarray(expected).astype(float)
            assert np.abs(difference).max() <= 1


def paint_with_pil(image: Image.Image, record: np.void) -> Image.Image:
    from PIL import ImageFilter, ImageOps

    jitter = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    names = ("brightness", "contrast", "saturation", "hue")
    if record["jitter"]:
        for i in record["order"]:
            image = jitter[i](image, float(record[names[i]]))
    if record["gray"]:
        image = tv.rgb_to_grayscale(image, 3)
    if record["blur_sigma"] > 0:
        image = image.filter(ImageFilter.GaussianBlur(radius=float(record["blur_sigma"])))
    return ImageOps.solarize(image, 128) if record["solarize"] else image


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(jitter_p=1.5), "jitter_p is a probability, got 1.5"),
        (dict(blur_p=(0.5, 0.5)), "blur_p must be three"),
        (dict(local_crops_scale=(0.5, 0.1)), "local_crops_scale"),
        (dict(global_crops_scale=(0.0, 1.0)), "global_crops_scale"),
        (dict(blur_sigma=(2.0, 0.1)), "blur_sigma"),
        (dict(blur_sigma=(0.1, 1.0, 2.0)), "blur_sigma"),
        (dict(color_jitter=(0.4, 0.4, 0.2, 0.6)), "hue at most 0.5"),
        (dict(local_crops_number=-1), "local_crops_number"),
        (dict(local_crops_size=(0, 96)), "local_crops_size"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        MultiCrop(**options)


def test_paint_records_are_small():
    assert PAINT.itemsize <= 32


@pytest.mark.parametrize("height, width, expected", [(375, 500, 1), (1200, 1600, 1), (1500, 2000, 2), (3000, 4000, 4), (6000, 8000, 8)])
def test_reduction_leaves_every_crop_something_to_shrink(height, width, expected):
    multicrop = MultiCrop()
    assert multicrop.reduction(height, width) == expected
    scales = [multicrop.local_crops_scale] * 2000
    sides = crop_boxes(height // expected, width // expected, scales, generator(0).random((2000, BOX)))[:, 2:]
    assert expected == 1 or sides.min() >= 1.5 * 96
    without_local = MultiCrop(local_crops_number=0, global_crops_size=(150, 150))
    assert without_local.reduction(1500, 2000) == 4, "the smallest global crop has 949 pixels"
    assert multicrop.reduction(900, 10_000) == 2, "no crop of a panorama is higher than it"


def test_crops_of_a_reduced_photograph_are_those_of_the_whole(tmp_path):
    """The bound that scaled_decoding states: less than a level of 255 on average, whatever the crop."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((2000, 1500), Image.Resampling.BICUBIC)
    pixels = np.asarray(small).astype(int) + rng.normal(0, 6, (1500, 2000, 3))
    pixels[::7, ::5] += 40  # detail that a crop cannot show
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(tmp_path / "a.jpg", quality=92)
    (tmp_path / "b.jpg").write_bytes((tmp_path / "a.jpg").read_bytes())
    data = [MultiCropDataModule(tmp_path, batch_size=1, num_workers=0, scaled_decoding=scaled) for scaled in (True, False)]
    for module in data:
        module.setup("fit")
    reduced, whole = (module.train_dataloader().dataset for module in data)
    assert reduced._load(0, 0)[0][0].shape == (750, 1000, 3) and whole._load(0, 0)[0][0].shape == (1500, 2000, 3)
    pictures = [torch.from_numpy(views._load(0, 0)[0][0]) for views in (reduced, whole)]
    for size, scale in ((224, (0.4, 1.0)), (96, (0.05, 0.4))):
        for top, left, height, width in 2 * crop_boxes(750, 1000, [scale] * 20, generator(size).random((20, BOX))):
            ours = resize(pictures[0][top // 2 : (top + height) // 2, left // 2 : (left + width) // 2], (size, size)).float()
            theirs = resize(pictures[1][top : top + height, left : left + width], (size, size)).float()
            difference = (ours - theirs).abs()
            assert difference.mean() < 1 and (difference > 8).float().mean() < 1e-3, (size, height, width)
    crops, recipe, _, _ = reduced[0, 0]
    again, _, _, _ = reduced[0, 0]
    assert [tuple(crop.shape[1:]) for crop in crops] == [(224, 224)] * 2 + [(96, 96)] * 8
    assert all(torch.equal(crop, same) for crop, same in zip(crops, again))
