"""The quickstart's report: what a run on the generated scenes learned, in numbers and a picture."""

import shlex
from pathlib import Path
from typing import NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dino_lightning.backbones import VisionTransformer, redrawn
from dino_lightning.callbacks.images import keep_picture
from dino_lightning.callbacks.run_folder import run_folder
from dino_lightning.data import Scenes
from dino_lightning.data.painting import normalize
from dino_lightning.evaluation import knn_accuracy
from dino_lightning.evaluation.attention import mask_iou, mass_mask
from dino_lightning.evaluation.features import raw_pixels
from dino_lightning.pictures import cut_out, heat_map, rgb, sheet
from dino_lightning.training.sharding import is_sharded

_QUERIES_FIRST = 2 * 10**6  # far from any training scene
_SHOWN = 6


class _Sight(NamedTuple):
    """What one network makes of the query scenes: attention and its masks (N, heads, h, w), their overlap (N, heads)."""

    knn: float
    attention: Tensor
    masks: Tensor
    iou: Tensor

    def best(self, scene: int) -> tuple[Tensor, Tensor]:
        """Attention and mask of the head that overlaps best in a scene."""
        head = self.iou[scene].argmax()
        return self.attention[scene, head], self.masks[scene, head]


class SceneReport(Callback):
    """Prints k-NN accuracy and attention overlap of the teacher on scenes it never saw, beside those of raw pixels and of the
    untrained network, and draws ``pictures/before_after.png`` into the run folder (and for W&B and TensorBoard).

    Labels and masks are read here only, never in training.

    Args:
        bank: training scenes that vote in the k-NN.
        queries: scenes that training has not seen.
        k: neighbours.
    """

    def __init__(self, bank: int = 1024, queries: int = 512, k: int = 20) -> None:
        if min(bank, queries, k) < 1:
            raise ValueError(f"bank, queries and k must be at least 1, got {bank}, {queries} and {k}")
        self.bank, self.queries, self.k = bank, queries, k

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        scenes = getattr(trainer.datamodule, "dataset", None)
        backbone = pl_module.evaluated.backbone
        if not isinstance(scenes, Scenes) or not isinstance(backbone, VisionTransformer) or trainer.datamodule.in_chans != 3:
            raise TypeError(
                "SceneReport is for runs of a VisionTransformer on dino_lightning.data.Scenes in colour, got "
                f"{type(backbone).__name__} on {type(scenes).__name__}; leave this callback out"
            )
        if is_sharded(trainer):
            raise ValueError(
                "SceneReport looks at the whole network, of which each rank of strategy='sharded' has a part; leave one of them out"
            )
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        self._bank = Scenes(min(self.bank, len(scenes)), scenes.first, scenes.side).tensors()
        self._queries = Scenes(self.queries, _QUERIES_FIRST, scenes.side).tensors()
        self._data = trainer.datamodule
        (bank, labels, _), (queries, truth, _) = self._bank, self._queries
        self._raw, _ = knn_accuracy(raw_pixels(bank / 255), labels, raw_pixels(queries / 255), truth, k=self.k)
        self._before = self._look(redrawn(backbone))
        print(
            f"Before training, on {len(queries)} new scenes of {Scenes.n_classes} classes (chance: {1 / Scenes.n_classes:.0%}): "
            f"k-NN finds the class of {self._raw:.0%} from raw pixels, of {self._before.knn:.0%} from an untrained network, "
            f"whose attention overlaps with the object by {self._before.iou.amax(dim=1).mean():.2f}."
        )

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(run_folder(trainer))
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        after = self._look(pl_module.evaluated.backbone)
        path = folder / "pictures" / "before_after.png"
        keep_picture(trainer, path, "pictures/before_after", self._picture(after))
        saved = trainer.checkpoint_callback
        checkpoint = saved and (saved.last_model_path or saved.best_model_path)
        commands = ["fit --config auto --minutes 60 --data.root FOLDER    # learns from your own images"]
        if checkpoint:
            expect = "it has seen generated scenes alone: expect little of photographs"
            commands.insert(0, f"attention PHOTO.jpg --checkpoint {shlex.quote(checkpoint)}    # {expect}")
        next_steps = "".join(f"\n  dino-lightning {command}" for command in commands)
        before_iou, after_iou = (sight.iou.amax(dim=1).mean() for sight in (self._before, after))
        print(
            f"""
{"":28}  raw pixels   untrained     trained
{f"k-NN accuracy (k = {self.k})":28}{self._raw:12.1%}{self._before.knn:12.1%}{after.knn:12.1%}
{"attention on object (IoU)":28}{"-":>12}{before_iou:12.2f}{after_iou:12.2f}

k-NN: the share of scenes that have the class of most of their {self.k} nearest. IoU: of each scene the head that overlaps best with the true
object, 1 is perfect; both networks are measured so. No label was used in training. See what it looks at: {path}
Try next:{next_steps}
and read docs/tutorial.md and notebooks/02_how_dino_works.ipynb."""
        )

    @torch.no_grad()
    def _look(self, backbone: VisionTransformer) -> _Sight:
        """A teacher's backbone, which has no stochastic depth, or an untrained one."""
        weight = next(backbone.parameters())
        (bank, labels, _), (queries, truth, masks) = self._bank, self._queries

        def chunks(images: Tensor) -> list[Tensor]:
            return [normalize(chunk.to(weight.device), self._data.mean, self._data.std).to(weight.dtype) for chunk in images.split(256)]

        features = [torch.cat([backbone(chunk) for chunk in chunks(images)]).cpu() for images in (bank, queries)]
        accuracy, _ = knn_accuracy(features[0], labels, features[1], truth, k=self.k)
        # At twice the size, as in the paper's figures: the outlines are finer.
        large = F.interpolate(queries, scale_factor=2, mode="bicubic", antialias=True)
        attention = torch.cat([backbone.get_cls_attention(chunk).cpu() for chunk in chunks(large)])
        marked = mass_mask(attention)
        return _Sight(accuracy, attention, marked, mask_iou(marked, masks))

    def _picture(self, after: _Sight) -> Image.Image:
        """For the first query scenes: the object, and what the best head marks before and after; all heads after."""
        images, _, masks = self._queries
        rows = []
        for i in range(min(_SHOWN, len(images))):
            image, cells = images[i], [rgb(images[i]), cut_out(images[i], masks[i])]
            for sight in (self._before, after):
                attention, mask = sight.best(i)
                cells += [heat_map(image, attention), cut_out(image, mask)]
            rows.append(cells + [heat_map(image, attention) for attention in after.attention[i]])
        heads = range(after.attention.shape[1])
        return sheet(
            rows,
            [
                *("scene", "its object\n(never told)", "untrained:\nbest head*", "60 % of its\nattention"),
                *("trained:\nbest head*", "60 % of its\nattention", *(f"trained:\nhead {head + 1}" for head in heads)),
            ],
            cell=(112, 112),
            title="What the class token looks at in scenes that training has not seen (* of all heads, the one nearest to the object)",
        )
