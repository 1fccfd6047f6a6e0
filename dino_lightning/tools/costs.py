"""What a run of fit costs, from its options: the networks are built without memory, and their sizes put into the formulas."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from dino_lightning import recipes
from dino_lightning.backbones import VisionTransformer
from dino_lightning.backbones.block import drop_path_subset
from dino_lightning.backbones.positions import height_width
from dino_lightning.data.roots import find_splits, open_images
from dino_lightning.door.errors import UsageError
from dino_lightning.evaluation.estimate import Head, Rows, Step, ViT, centre_bytes, logits_bytes, loss_bytes
from dino_lightning.evaluation.gpus import dtype_of
from dino_lightning.evaluation.kept import kept_bytes
from dino_lightning.methods import method_class
from dino_lightning.methods.base import Method
from dino_lightning.tools.fit_options import built, device_count, parsed
from dino_lightning.training.checks import check_crops

_EPOCHS = 100  # of fit, unless said
KNOWN = ("dino", "dinov2")


class Run(NamedTuple):
    """A run of fit.

    Attributes:
        title: what it trains, for people.
        step: what an optimizer step costs on one device.
        dtype: of the products.
        counted: whether operations and activations were counted by a call of the backbone, which is none of our ViTs.
        crop_bytes: of an image's crops, as they come from a worker.
        images: of the whole run, over all devices and epochs; None where nothing says how many an epoch has.
        workers: worker processes of a device, where they are said.
    """

    title: str
    step: Step
    dtype: torch.dtype
    counted: bool
    crop_bytes: int
    images: int | None
    workers: int | None


def run_of(options: Sequence[str], devices: int | None = None, images: int | None = None) -> Run:
    """The run that ``dino-lightning fit`` would make of these options.

    Args:
        devices: in all; by default what the options say, else 1.
        images: of an epoch; by default as many as the options' data hold.

    Raises:
        ValueError: for options that the method refuses, or numbers below 1.
        UsageError: for a method whose costs no formula knows.
    """
    config = parsed(recipes.resolve_in(options), "estimate")
    model, data, trainer = config["model"], config["data"], config["trainer"]
    if config["method"] not in KNOWN:
        raise UsageError(f"estimate knows the costs of {' and '.join(KNOWN)}, not yet those of {config['method']}")
    counts = {
        "devices": devices,
        "images": images,
        "data.batch_size": data["batch_size"],
        "trainer.accumulate_grad_batches": trainer["accumulate_grad_batches"],
        "trainer.num_nodes": trainer["num_nodes"],
    }
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if data["local_crops_number"] < 0:
        raise ValueError(f"data.local_crops_number must not be negative, got {data['local_crops_number']}")
    dtype = dtype_of(trainer["precision"])
    with torch.device("meta"):
        module = method_class(config["method"])(**{name: built(value) for name, value in model.items()})
        crops = ["global_crops_size", *(["local_crops_size"] if data["local_crops_number"] else [])]
        check_crops(module.trained.backbone, {f"data.{name}": height_width(data[name]) for name in crops})
        views = _views(data)
        costs = _costs(module, views, data["batch_size"], dtype)
    student, teacher = module.trained, module.evaluated
    per_step = data["batch_size"] * trainer["accumulate_grad_batches"]
    devices = devices or device_count(trainer["devices"], 1) * trainer["num_nodes"]
    head_rows = costs.rows
    step = Step(
        batch=data["batch_size"],
        accumulated=trainer["accumulate_grad_batches"],
        parameters=_count(student),
        trainable=_count(student, trainable=True),
        teacher=_count(teacher),
        cast=sum(_count(part) for part in student.modules() if isinstance(part, nn.Linear | nn.Conv2d)) if dtype.itemsize == 2 else 0,
        flops=costs.flops,
        image_bytes=4 * sum(view.numel() for view in views),
        activation_bytes=costs.activations,
        logits_bytes=sum(map(logits_bytes, head_rows)),
        loss_bytes=sum(map(loss_bytes, head_rows)),
        optimizer=module.options["optimizer"],
        centre_bytes=centre_bytes(
            module.method, [rows.head.prototypes for rows in head_rows], module.options.get("centering") == "sinkhorn_knopp"
        ),
        devices=devices,
        calls=2 if views[2:] and views[2].shape != views[0].shape else 1,
        sharded=trainer["strategy"] == "sharded",
    )
    sizes = ", ".join(f"{len(group)} × {group[0].shape[-2]}×{group[0].shape[-1]}" for group in (views[:2], views[2:]) if group)
    backbone = model["backbone"] if isinstance(model["backbone"], str) else type(student.backbone).__name__
    patch = f"/{student.backbone.patch_size}" if isinstance(student.backbone, VisionTransformer) else ""
    return Run(
        title=f"{module.title}, {backbone}{patch}, crops {sizes}, K = {', '.join(str(rows.head.prototypes) for rows in head_rows)}",
        step=step,
        dtype=dtype,
        counted=not isinstance(student.backbone, VisionTransformer),
        crop_bytes=sum(view.numel() for view in views),
        images=_images_of_run(data, trainer, images, per_step * devices),
        workers=data["num_workers"],
    )


class _Costs(NamedTuple):
    """Of an image: ``flops``, ``activations`` in bytes without what the loss adds, and the ``rows`` of each head's call."""

    flops: int
    activations: int
    rows: list[Rows]


def _costs(module: Method, views: Sequence[torch.Tensor], batch: int, dtype: torch.dtype) -> _Costs:
    """Of a module and views (1, C, H, W) of one image, both on the meta device."""
    backbone = module.trained.backbone
    masks = getattr(backbone, "mask_token", None) is not None
    groups = [(views[0].shape[-2:], 2, masks), *([(views[2].shape[-2:], len(views) - 2, False)] if views[2:] else [])]
    rows = _rows(module, views)
    width = dtype.itemsize
    activations = sum(of.student * of.head.activations(width) for of in rows)
    if isinstance(backbone, VisionTransformer):
        vit, heads = ViT.of(backbone), [of.head for of in rows]
        flops = sum(of.teacher * head.flops() + 3 * of.student * head.flops() for of, head in zip(rows, heads))
        for size, count, all_tokens in groups:
            tokens, kept = vit.tokens(*size), _kept(backbone, count * batch)
            passes = 4 if vit.recomputed else 3  # forward, backward, and what is computed anew
            flops += passes * count * vit.flops(tokens, all_tokens, kept)
            activations += count * vit.activations(tokens, width, all_tokens, kept)
        flops += 2 * vit.flops(vit.tokens(*groups[0][0]), masks)
    else:
        flops = module.flops_per_image(views)
        half = copy.deepcopy(backbone).to(dtype)
        for size, count, _ in groups:
            pair = torch.empty(2, views[0].shape[1], *size, dtype=dtype)  # batch norms want two
            activations += count * kept_bytes(half, lambda: half(pair)) / 2
    return _Costs(round(flops), round(activations), rows)


def _rows(module: Method, views: Sequence[torch.Tensor]) -> list[Rows]:
    """Of each head's call. DINO keeps the teacher's logits for its callbacks; masked patches are as many as there are on average."""
    student, options = module.trained, module.options
    if hasattr(student, "head"):
        return [Rows(Head.of(student.head), len(views), 2, kept=2)]
    rows = [Rows(Head.of(student.dino_head), len(views), 2, kept=0)]
    if options["ibot_loss_weight"] > 0:
        vit = ViT.of(student.backbone)
        patches = vit.tokens(*views[0].shape[-2:]) - vit.prefix
        masked = 2 * patches * options["mask_probability"] * sum(options["mask_ratio"]) / 2
        rows.append(Rows(Head.of(getattr(student, "ibot_head", student.dino_head)), masked, masked, kept=0))
    return rows


def _kept(backbone: VisionTransformer, crops: int) -> float:
    """The share of a batch for which a branch is computed. DINO's drop path computes all on a GPU."""
    rate = backbone.blocks[-1].drop_path
    return drop_path_subset(crops, rate)[0] / crops if backbone.drop_path_uniform and rate else 1.0


def _views(data: Mapping[str, Any]) -> list[torch.Tensor]:
    def view(which: str) -> torch.Tensor:
        return torch.empty(1, data["in_chans"], *height_width(data[which]))

    return [view("global_crops_size")] * 2 + [view("local_crops_size")] * data["local_crops_number"]


def _images_of_run(data: Mapping[str, Any], trainer: Mapping[str, Any], images: int | None, per_step: int) -> int | None:
    if trainer["max_steps"] and trainer["max_steps"] > 0:
        return trainer["max_steps"] * per_step
    if images is None and data["root"] is not None:
        images = len(open_images(find_splits(data["root"])[0]))
    if images is None and data["dataset"] is not None:
        images = len(built(data["dataset"]))
    epochs = trainer["max_epochs"] or _EPOCHS
    return None if images is None or epochs < 0 else images * epochs


def _count(network: nn.Module, trainable: bool = False) -> int:
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad or not trainable)
