"""From JPEG files to the ten views of an image: 2 × 224 and 8 × 96 pixels, one thread.

    python benchmarks/data.py FOLDER [--images 32] --reference PATH --lightly

Ours is timed in its two parts: the worker's (decode, crop, resize, flip, decide) and with it the painting, which a GPU would do,
here on the CPU. Others do everything in the worker. Before that, our views must be those that PIL makes: painted to the level, and
resized to within one level but for one value in a thousand.
"""

import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from others import import_reference
from pairing import compare, interleaved, parser, save, seconds
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from dino_lightning import MultiCropDataModule
from dino_lightning.data.geometry import resize
from dino_lightning.data.paint_records import PAINT
from dino_lightning.data.painting import paint
from dino_lightning.data.views import collate_views

CPU = torch.device("cpu")


def ours(data: MultiCropDataModule, count: int, painted: bool) -> None:
    dataset = data.train_dataloader().dataset
    for start in range(0, count, data.batch_size):
        samples = [dataset[(0, index)] for index in range(start, min(start + data.batch_size, count))]
        if painted:
            data.paint(collate_views(samples))


def others(transform: Callable, files: list[Path]) -> None:
    """As torchvision's ImageFolder reads them, and a collated batch."""
    views = []
    for file in files:
        with open(file, "rb") as opened:
            image = Image.open(opened).convert("RGB")
        views.append(transform(image))
    for view in range(len(views[0])):
        torch.stack([crops[view] for crops in views])


def transforms_of(args) -> dict[str, Callable]:
    found = {}
    if args.reference:
        found["reference"] = import_reference(args.reference)["main_dino"].DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
    if args.lightly:
        from lightly.transforms.dino_transform import DINOTransform

        found["lightly"] = DINOTransform(global_crop_scale=(0.4, 1.0), local_crop_scale=(0.05, 0.4), n_local_views=8)
    return found


def gate(file: Path) -> dict[str, float]:
    """Raises SystemExit where our pixels are not PIL's."""
    image = Image.open(file).convert("RGB")
    box = (10, 20, min(image.width, 210), min(image.height, 300))
    theirs = np.asarray(image.crop(box).resize((224, 224), Image.Resampling.BICUBIC))
    crop = resize(torch.from_numpy(np.array(image.crop(box))), (224, 224))
    beyond = (np.abs(crop.permute(1, 2, 0).numpy().astype(int) - theirs) > 1).mean()
    recipe = np.zeros(1, PAINT)
    recipe["jitter"], recipe["order"], recipe["solarize"], recipe["blur_sigma"] = True, [2, 0, 1, 3], True, 1.3
    recipe["brightness"], recipe["contrast"], recipe["saturation"], recipe["hue"] = 1.2, 0.7, 1.3, 0.0
    painted = paint(crop[None], recipe, (0, 0, 0), (1, 1, 1))[0].mul(255).round().permute(1, 2, 0).numpy()
    expected = Image.fromarray(crop.permute(1, 2, 0).numpy())
    for enhance, factor in ((ImageEnhance.Color, 1.3), (ImageEnhance.Brightness, 1.2), (ImageEnhance.Contrast, 0.7)):
        expected = enhance(expected).enhance(float(np.float32(factor)))
    expected = ImageOps.solarize(expected.filter(ImageFilter.GaussianBlur(float(np.float32(1.3)))))
    differs = int((painted != np.asarray(expected)).sum())
    print(f"{beyond:.2%} of a resized crop is more than a level off PIL's, and {differs} of its painted values differ", flush=True)
    if beyond > 1e-3 or differs:
        raise SystemExit("no timing: our views are not PIL's")
    return {"resized beyond a level": float(beyond), "painted otherwise": differs}


if __name__ == "__main__":
    arguments = parser(__doc__)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--images", type=int, default=32)
    args = arguments.parse_args()
    torch.set_num_threads(1)
    data = MultiCropDataModule(args.folder, batch_size=1, num_workers=0)
    data.setup("fit")
    data.batch_size = min(32, args.images)
    source = data.train_dataloader().dataset.source
    files = [Path(source.path(index)) for index in range(min(args.images, len(source)))]
    results = {"gate": gate(files[0])}

    def timed(work: Callable[[], None]) -> float:
        start = seconds(CPU)
        work()
        return seconds(CPU) - start

    variants = {
        "ours, worker": functools.partial(ours, data, len(files), False),
        "ours, painted on the CPU": functools.partial(ours, data, len(files), True),
        **{name: functools.partial(others, transform, files) for name, transform in transforms_of(args).items()},
    }
    for work in variants.values():
        work()
    found = interleaved({name: functools.partial(timed, work) for name, work in variants.items()}, args.rounds)
    milliseconds = {name: [1e3 * value / len(files) for value in values] for name, values in found.items()}
    for base in ("ours, worker", "ours, painted on the CPU"):
        results[base] = compare(f"milliseconds for the ten views of an image, against {base}", milliseconds, "ms", base=base)
    save(args.json, {**results, "rounds": milliseconds})
