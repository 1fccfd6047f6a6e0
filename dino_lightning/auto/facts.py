"""What the settings of a run depend on: its images, its device, its time."""

import statistics
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from dino_lightning.data.datamodule import MultiCropDataModule
from dino_lightning.data.views import UNREADABLE, load
from dino_lightning.data.workers import cores
from dino_lightning.tools.fit_options import device_count, first_device

_LOOKED_AT = 32  # images whose size is read


class Facts(NamedTuple):
    """What the images and devices of a run are.

    Attributes:
        images: that are trained on.
        bank, queries: labelled ones that a validation takes; 0 without labels.
        side: pixels of the shorter side of an image, the median of some.
        gpu: name of the GPU, or None where the run has a CPU alone.
        memory: bytes of a GPU's memory; 0 without.
        devices: that train, in all.
        half: whether they multiply bfloat16 faster than float32.
        threads: of a CPU that compute.
    """

    images: int
    bank: int
    queries: int
    side: int
    gpu: str | None
    memory: int
    devices: int
    half: bool
    threads: int = 1

    def __str__(self) -> str:
        count = cores()
        device = f"{self.devices} × {self.gpu}" if self.gpu else f"{count} CPU core{'s' * (count > 1)}"
        return f"{self.images} images, the shorter side {self.side} pixels; {device}"


def look(data: Mapping[str, Any], trainer: Mapping[str, Any]) -> Facts:
    """Looks at the images and devices of a run with these options of ``MultiCropDataModule`` and of the Trainer.

    Raises:
        ValueError, FileNotFoundError: as the data module would say.
    """
    module = MultiCropDataModule(**{**data, "batch_size": 1})
    module.setup("fit")
    source = module.train_dataloader().dataset.source
    bank, queries = [len(loader.dataset) for loader in module.val_dataloader()] or (0, 0)
    gpu = torch.cuda.is_available() and trainer["accelerator"] in ("auto", "gpu", "cuda")
    index = first_device(trainer["devices"])
    return Facts(
        images=len(source),
        bank=bank,
        queries=queries,
        side=_shorter_side(source, module.in_chans),
        gpu=torch.cuda.get_device_name(index) if gpu else None,
        memory=torch.cuda.get_device_properties(index).total_memory if gpu else 0,
        devices=device_count(trainer["devices"], torch.cuda.device_count() if gpu else 1) * trainer["num_nodes"],
        half=torch.cuda.is_bf16_supported(including_emulation=False) if gpu else _cpu_has_bfloat16(),
        threads=torch.get_num_threads(),
    )


def _shorter_side(source: Dataset, in_chans: int) -> int:
    """The median of some images; unreadable ones tell nothing, as in training.

    Raises:
        ValueError: if none of them can be read.
    """
    sides = []
    for index in range(0, len(source), max(1, -(-len(source) // _LOOKED_AT))):
        try:
            sides.append(min(load(source, index, in_chans)[0].shape[:2]))
        except UNREADABLE as error:
            failure = error
    if not sides:
        raise ValueError(f"none of the images that --config auto looked at can be read, the last of them because: {failure}")
    return int(statistics.median(sides))


def _cpu_has_bfloat16() -> bool:
    """Others emulate it, many times slower than float32. torch has no public name for these questions."""
    return any(getattr(torch.cpu, question, bool)() for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
