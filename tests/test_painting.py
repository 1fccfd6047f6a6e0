"""painting.paint against real PIL and torchvision-on-PIL, level by level."""

import os
import subprocess
import sys
from itertools import permutations

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps

from dino_lightning.data import painting
from dino_lightning.data.paint_records import PAINT
from dino_lightning.data.painting import SCHEDULE, paint

FACTORS = [0.0, 0.1, 0.6, 0.7999, 0.999, 1.001, 1.2, 1.4, 2.0, 3.7]
HUES = [-0.5, -0.31, -0.1, -0.05, -1e-6, 1e-6, 0.003, 0.05, 0.1, 0.25, 0.5]
SIGMAS = [0.001, 0.1, 0.5, 1.0, 1.41, 1.42, 2.0, 2.83, 4.6, 11.0]


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """A natural-ish image (H, W, C): gradients with noise, some pure gray pixels, and black, white, vivid patches."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(height, width)
    waves = np.stack([np.sin(3 * rng.random() + 4 * x * rng.random() + 5 * y * rng.random()) for _ in range(channels)], axis=-1)
    image = 128 + 110 * waves + rng.normal(0, 12, waves.shape)
    gray = rng.random((height, width)) < 0.1
    image[gray] = image[gray][:, :1]
    h, w = height // 4 + 1, width // 4 + 1
    image[:h, :w], image[-h:, :w] = 0, 255
    image[:h, -w:] = rng.choice([0, 255], (min(h, height), min(w, width), channels))  # primary colours
    return image.clip(0, 255).astype(np.uint8)


def record(**numbers) -> np.ndarray:
    """One PAINT record in which only what is named happens."""
    recipe = np.zeros(1, PAINT)
    recipe["jitter"], recipe["order"] = True, [0, 1, 2, 3]
    for name in ("brightness", "contrast", "saturation"):
        recipe[name] = 1
    for name, number in numbers.items():
        recipe[name] = number
    return recipe


def random_recipe(n: int, seed: int = 0) -> np.ndarray:
    """Records in which every operation is on for some crops and off for others."""
    rng = np.random.default_rng(seed)
    recipe = np.concatenate([record() for _ in range(n)])
    recipe["jitter"] = rng.random(n) < 0.8
    recipe["order"] = rng.permuted(np.tile(np.arange(4), (n, 1)), axis=1)
    for name in ("brightness", "contrast", "saturation"):
        recipe[name] = np.where(rng.random(n) < 0.8, rng.uniform(0.2, 1.8, n), 1)
    recipe["hue"] = np.where(rng.random(n) < 0.8, rng.uniform(-0.5, 0.5, n), 0)
    recipe["gray"] = rng.random(n) < 0.2
    recipe["blur_sigma"] = np.where(rng.random(n) < 0.5, rng.uniform(0.1, 3, n), 0)
    recipe["solarize"] = rng.random(n) < 0.3
    return recipe


def oracle(image: Image.Image, row: np.void) -> np.ndarray:
    """What PIL and torchvision make of one image under one record."""
    jitter = [
        (F.adjust_brightness, "brightness", 1),
        (F.adjust_contrast, "contrast", 1),
        (F.adjust_saturation, "saturation", 1),
        (F.adjust_hue, "hue", 0),
    ]
    for code in row["order"] if row["jitter"] else []:
        operation, name, neutral = jitter[code]
        if row[name] != neutral:
            image = operation(image, float(row[name]))
    if row["gray"]:
        image = F.to_grayscale(image, 3)
    if row["blur_sigma"] > 0:
        image = image.filter(ImageFilter.GaussianBlur(float(row["blur_sigma"])))
    if row["solarize"]:
        image = ImageOps.solarize(image, threshold=128)
    return np.asarray(image)


def batch(*images: np.ndarray) -> torch.Tensor:
    return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in images]).contiguous()


def levels(crops: torch.Tensor, recipe: np.ndarray) -> np.ndarray:
    """paint's result before normalisation: (N, H, W, C) uint8."""
    channels = crops.shape[1]
    painted = paint(crops, recipe, [0] * channels, [1] * channels) * 255
    assert (painted - painted.round()).abs().max() < 1e-3
    return painted.round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def assert_as_pil(images: list[np.ndarray], recipe: np.ndarray) -> None:
    for result, image, row in zip(levels(batch(*images), recipe), images, recipe, strict=True):
        expected = oracle(Image.fromarray(image), row)
        assert np.array_equal(result, expected), f"{row}: {np.mean(result != expected):.2%} of the values differ"


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", FACTORS)
def test_factor_as_pil(name, factor):
    assert_as_pil([picture(61, 87)], record(**{name: factor}))


@pytest.mark.parametrize("hue", HUES)
def test_hue_as_pil(hue):
    assert_as_pil([picture(61, 87)], record(hue=hue))


def test_hue_of_every_coarse_colour_as_pil():
    """Ties between channels, black, white and full saturation all occur in a cube of 52**3 colours."""
    axis = np.arange(0, 256, 5, dtype=np.uint8)
    cube = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), axis=-1).reshape(52, -1, 3)
    assert_as_pil([cube], record(hue=0.07))


def test_gray_and_solarize_as_pil():
    assert_as_pil([picture(61, 87)], record(gray=True))
    assert_as_pil([picture(61, 87)], record(solarize=True))


@pytest.mark.parametrize("sigma", SIGMAS)
def test_blur_as_pil(sigma):
    assert_as_pil([picture(61, 87)], record(blur_sigma=sigma))


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 3), (7, 4)])
@pytest.mark.parametrize("sigma", [0.7, 3.0, 25.0])
def test_blur_wider_than_the_crop_as_pil(size, sigma):
    assert_as_pil([picture(*size)], record(blur_sigma=sigma))


def test_many_blurs_in_one_batch_as_pil():
    """Each crop has its own sigma and box radius, some so small that all but the centre weight nearly vanish."""
    sigmas = np.geomspace(0.01, 6, 60)
    recipe = np.concatenate([record(blur_sigma=sigma) for sigma in sigmas])
    assert_as_pil([picture(20, 23, seed=seed) for seed in range(len(sigmas))], recipe)


def test_all_orders_as_pil():
    recipe = np.concatenate(
        [record(order=order, brightness=1.3, contrast=0.6, saturation=1.5, hue=-0.08) for order in permutations(range(4))]
    )
    assert_as_pil([picture(33, 29, seed=seed) for seed in range(24)], recipe)


def test_orders_give_different_pictures():
    """Else the test above could not tell one order from another."""
    recipe = np.concatenate(
        [record(order=order, brightness=1.3, contrast=0.6, saturation=1.5, hue=-0.08) for order in permutations(range(4))]
    )
    results = levels(batch(*[picture(33, 29)] * 24), recipe)
    assert len({result.tobytes() for result in results}) == 24


def test_schedule_holds_every_order():
    for order in permutations(range(4)):
        rest = iter(SCHEDULE)
        assert all(code in rest for code in order), order


@pytest.mark.parametrize("size", [(32, 32), (37, 53), (224, 97)])
def test_full_chain_as_pil(size):
    n = 48 if size[0] < 100 else 6
    assert_as_pil([picture(*size, seed=seed) for seed in range(n)], random_recipe(n, seed=sum(size)))


def test_everything_on_as_pil():
    row = record(order=[3, 1, 0, 2], brightness=1.4, contrast=1.3, saturation=0.7, hue=0.1, gray=True, blur_sigma=1.1, solarize=True)
    assert_as_pil([picture(45, 61)], row)


def test_one_channel_as_mode_l():
    """Brightness, contrast and blur equal PIL's on mode L; the colour operations leave the crop alone."""
    image = picture(37, 53, channels=1)
    for numbers in (
        {"brightness": 1.3},
        {"contrast": 0.4},
        {"contrast": 1.9},
        {"blur_sigma": 1.7},
        {"order": [1, 0, 2, 3], "brightness": 0.7, "contrast": 1.4, "blur_sigma": 0.9},
    ):
        result = levels(batch(image), record(**numbers))[0]
        assert np.array_equal(result[..., 0], oracle(Image.fromarray(image[..., 0]), record(**numbers)[0])), numbers
    ignored = record(saturation=0.2, hue=0.3, gray=True, solarize=True)
    assert np.array_equal(levels(batch(image), ignored)[0], image)


def test_five_channels():
    """Brightness and blur act on each channel as on mode L; contrast pivots on the mean over all five."""
    image = picture(31, 26, channels=5)
    for numbers in ({"brightness": 1.3}, {"blur_sigma": 1.7}):
        result = levels(batch(image), record(**numbers))[0]
        for channel in range(5):
            expected = oracle(Image.fromarray(image[..., channel].copy()), record(**numbers)[0])
            assert np.array_equal(result[..., channel], expected), numbers
    pivot = Image.new("L", (26, 31), int(image.mean() + 0.5))
    result = levels(batch(image), record(contrast=0.4))[0]
    for channel in range(5):
        expected = Image.blend(pivot, Image.fromarray(image[..., channel].copy()), 0.4)
        assert np.array_equal(result[..., channel], np.asarray(expected))
    ignored = record(saturation=0.2, hue=0.3, gray=True, solarize=True)
    assert np.array_equal(levels(batch(image), ignored)[0], image)


def test_contrast_rounds_a_half_up():
    """A mean of exactly 100.5 pivots on 101."""
    crops = torch.tensor([100, 101], dtype=torch.uint8).view(1, 1, 1, 2)
    assert levels(crops, record(contrast=0))[0, 0, :, 0].tolist() == [101, 101]


def test_neutral_numbers_leave_the_crop_out():
    """Hue 0.0 is no hue operation at all, whereas PIL's round trip through 8-bit HSV would change colours."""
    image = picture(61, 87)
    assert np.array_equal(levels(batch(image), record())[0], image)
    assert not np.array_equal(levels(batch(image), record(hue=1e-6))[0], image)


def test_jitter_off_ignores_factors_and_order():
    image = picture(20, 30)
    off = record(jitter=False, order=[0, 0, 0, 0], brightness=0.1, contrast=0.1, saturation=0.1, hue=0.4)
    assert np.array_equal(levels(batch(image), off)[0], image)


def test_normalises_per_channel():
    crops, mean, std = batch(picture(9, 11)), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    painted = paint(crops, record(), mean, std)
    assert painted.dtype == torch.float32 and painted.is_contiguous()
    torch.testing.assert_close(painted, F.normalize(crops / 255, mean, std), rtol=0, atol=1e-6)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "expanded"])
def test_any_strides_and_input_unmodified(layout):
    recipe, images = random_recipe(12, seed=3), [picture(24, 31, seed=seed) for seed in range(12)]
    crops = batch(*images)
    if layout == "channels_last":
        crops = crops.to(memory_format=torch.channels_last)
    elif layout == "strided":
        crops = crops.repeat_interleave(2, dim=3)[..., ::2]
    else:
        crops = crops[:1].expand(12, -1, -1, -1)
    assert not crops.is_contiguous()
    before = crops.clone()
    painted = paint(crops, recipe, [0.5] * 3, [0.2] * 3)
    assert painted.is_contiguous()
    assert torch.equal(crops, before)
    assert torch.equal(painted, paint(before.contiguous(), recipe, [0.5] * 3, [0.2] * 3))


def test_recipe_unmodified():
    recipe = random_recipe(8)
    before = recipe.copy()
    levels(batch(*[picture(8, 9)] * 8), recipe)
    assert np.array_equal(recipe, before)


@pytest.mark.parametrize("side", [40, 200])
def test_result_does_not_depend_on_the_batch(side):
    """200 is large enough for paint to cut the batch into pieces on the CPU, 40 is not."""
    crops = batch(*[picture(side, side, seed=seed) for seed in range(9)])
    recipe, mean, std = random_recipe(9, seed=5), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    together = paint(crops, recipe, mean, std)
    apart = torch.cat([paint(crops[i : i + 1], recipe[i : i + 1], mean, std) for i in range(9)])
    assert torch.equal(together, apart)


def test_no_crops():
    assert paint(torch.empty(0, 3, 8, 8, dtype=torch.uint8), np.zeros(0, PAINT), [0] * 3, [1] * 3).shape == (0, 3, 8, 8)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_as_cpu_and_without_waiting():
    crops = batch(*[picture(64, 48, seed=seed) for seed in range(32)])
    recipe, mean, std = random_recipe(32, seed=8), [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    on_gpu = crops.cuda()
    expected = paint(crops, recipe, mean, std)
    for form in (painting.paint, painting._paint_at_once):
        form(on_gpu, recipe, mean, std)  # kernels are compiled and compared
        torch.cuda.set_sync_debug_mode("error")
        try:
            painted = form(on_gpu, recipe, mean, std)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(painted.cpu(), expected, rtol=0, atol=1e-5)
    assert painting._kernels(on_gpu.device), "one of the forms was Triton's"


@pytest.mark.slow
def test_kernels_for_gpus_give_the_same_levels():
    """In Triton's interpreter, which is read at its import. One crop is of two blocks of pixels, one colour, all gray."""
    pytest.importorskip("triton")
    program = """if True:
        import numpy as np, torch
        from dino_lightning.data import painting, painting_triton
        from test_painting import batch, picture, random_recipe
        for (height, width), n in (((5, 6), 30), ((33, 32), 2)):
            crops, recipe = batch(*[picture(height, width, seed=seed) for seed in range(n)]), random_recipe(n, seed=n)
            crops[1], before = 7, crops.clone()
            given = crops.repeat_interleave(2, dim=3)[..., ::2]  # not contiguous
            painted = painting_triton.paint(given, recipe, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
            assert painted.is_contiguous() and torch.equal(given, crops)
            assert torch.equal(painted, painting.paint(crops, recipe, [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]))
            plain = painting_triton.paint(crops, np.zeros(n, recipe.dtype), [0.5] * 3, [0.2] * 3)
            assert torch.equal(plain, painting.normalize(crops, [0.5] * 3, [0.2] * 3))
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_kernels_for_gpus_compile_without_fusing_products_and_sums():
    """For an H100, which need not be there: NVIDIA's assembly, whose own compiler comes with Triton."""
    triton = pytest.importorskip("triton")
    compiler = pytest.importorskip("triton.backends.compiler")
    from dino_lightning.data import painting_triton as kernels

    types = {
        "levels": "*u8",
        "source": "*u8",
        "target": "*u8",
        "records": "*i32",
        "table": "*fp32",
        "sums": "*i32",
        "normal": "*fp32",
        "image": "*fp32",
        "stride": "i32",
        "pixels": "i32",
        "step": "i32",
        "size": "i32",
    }
    constants = {"TAPS": 4, "BLOCK": kernels._BLOCK}
    for kernel in (kernels._add_up, kernels._colour, kernels._box, kernels._finish):
        signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, {name: constants[name] for name in kernel.arg_names if name in constants})
        built = triton.compile(source, target=compiler.GPUTarget("cuda", 90, 32), options=kernels._EXACT)
        assert "fma.rn" not in built.asm["ptx"] and built.asm["cubin"], kernel


def test_a_gpu_on_which_the_kernels_fail_is_painted_by_torch():
    painting._kernels.cache_clear()
    with pytest.warns(UserWarning, match="do not work on cpu"):  # Triton has no kernels for it
        assert painting._kernels(torch.device("cpu")) is None
    painting._kernels.cache_clear()


def changed(**numbers) -> np.ndarray:
    return np.concatenate([record(), record(**numbers)])


@pytest.mark.parametrize(
    "crops, recipe, mean, message",
    [
        (torch.zeros(2, 3, 8, 8), changed(), [0] * 3, r"uint8.*float32"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), changed(), [0] * 3, r"\(N, C, H, W\).*\(3, 8, 8\)"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), changed(), [0] * 3, "at least one pixel"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), changed()[:1], [0] * 3, r"each of the 2 crops.*\(1,\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), np.zeros(2), [0] * 3, "float64"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), changed(), [0.5], "mean has 1 entries.*3 channels"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), changed(order=[0, 1, 1, 3]), [0] * 3, r"\[0, 1, 1, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), changed(hue=np.nan), [0] * 3, "hue must be finite, got nan"),
    ],
)
def test_wrong_arguments_are_named(crops, recipe, mean, message):
    with pytest.raises(ValueError, match=message):
        paint(crops, recipe, mean, [1] * 3)
