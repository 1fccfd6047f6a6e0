"""Pictures of what the teacher looks at and tells apart, of the same images throughout a run."""

from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from dino_lightning.backbones import VisionTransformer
from dino_lightning.callbacks.images import keep_picture
from dino_lightning.callbacks.run_folder import run_folder
from dino_lightning.data.datamodule import MultiCropDataModule
from dino_lightning.data.painting import normalize
from dino_lightning.evaluation.attention import mass_mask
from dino_lightning.evaluation.spatial import NoSpatialMapError, spatial_features, spatial_maps
from dino_lightning.pictures import attention_sheet, pca_sheet
from dino_lightning.training.sharding import is_sharded


class AttentionMaps(Callback):
    """Draws ``pictures/attention_STEP.png`` and ``pictures/pca_STEP.png`` into the run folder: before training, every n
    epochs, and at the end; W&B and TensorBoard get them as well, as ``pictures/attention`` and ``pictures/pca``.

    Of a ViT of this package the attention of each head, of other backbones the norm of the last feature map; and the
    principal components of the patch features. Needs a backbone with such a map and a MultiCropDataModule; with others it
    does nothing, and says so.

    Args:
        every_n_epochs: how often it draws during training.
        count: number of images.
        mass: share of a map that the marked patches hold.
    """

    def __init__(self, every_n_epochs: int = 10, count: int = 4, mass: float = 0.6) -> None:
        if every_n_epochs < 1 or count < 1:
            raise ValueError(f"every_n_epochs and count must be at least 1, got {every_n_epochs} and {count}")
        self.every_n_epochs, self.count, self.mass = every_n_epochs, count, mass
        self._images: torch.Tensor | None = None
        self._drawn = -1  # the step of the newest picture

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._images = None
        backbone, data = pl_module.evaluated.backbone, trainer.datamodule
        if trainer.fast_dev_run:
            return
        if not isinstance(data, MultiCropDataModule):
            rank_zero_info("no pictures of attention: the data do not come from a MultiCropDataModule")
        elif is_sharded(trainer):  # a rank alone has no whole network
            rank_zero_info("no pictures of attention from a sharded run; dino-lightning attention draws them of its checkpoints")
        elif trainer.is_global_zero and not _splits_patches(backbone, data.multicrop.global_crops_size):
            self._images = data.examples(self.count)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.global_step == 0:  # only now is it sure that the run begins
            self._draw(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._drawn != trainer.global_step:
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(run_folder(trainer)) / "pictures"
        step = self._drawn = trainer.global_step
        if self._images is None or not len(self._images):
            return
        data, backbone = trainer.datamodule, pl_module.evaluated.backbone
        images = trainer.precision_plugin.convert_input(normalize(self._images.to(pl_module.device), data.mean, data.std))
        try:
            (maps, names, what), features = spatial_maps(backbone, images), spatial_features(backbone, images)
        except NoSpatialMapError as error:
            rank_zero_info("no pictures of attention: %s", error)
            self._images = None
            return
        maps = maps.cpu()
        coarse = "; few places, attention --image_size 256 shows more" if max(maps.shape[-2:]) < 4 else ""
        title = f"step {step}; masks: the patches that hold {self.mass:.0%} of {what}{coarse}"
        pictures = {
            "attention": attention_sheet(self._images, maps, mass_mask(maps, self.mass), names, [""] * len(maps), title),
            "pca": pca_sheet(self._images, features.cpu(), f"step {step}"),
        }
        for name, picture in pictures.items():
            keep_picture(trainer, folder / f"{name}_{step:07d}.png", f"pictures/{name}", picture)


def _splits_patches(backbone: torch.nn.Module, size: tuple[int, int]) -> bool:
    return isinstance(backbone, VisionTransformer) and any(side % backbone.patch_size for side in size)
