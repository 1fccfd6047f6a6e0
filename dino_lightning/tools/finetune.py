"""``dino-lightning finetune``: trains the backbone of a checkpoint further, with labels."""

from typing import Literal

from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

from dino_lightning.classifiers.classification import Standing
from dino_lightning.classifiers.finetune import FineTune
from dino_lightning.data.labelled import LabelledDataModule
from dino_lightning.tools.checkpoint import images_of, load_module, untrained
from dino_lightning.tools.folders import labelled_folders
from dino_lightning.tools.training import new_file, print_standings, train_classifier
from dino_lightning.training.randomness import seeded


def finetune(
    checkpoint: str,
    root: str,
    queries: str | None = None,
    output: str = "finetuned.ckpt",
    epochs: int = 100,
    lr: float = 5e-4,
    layer_decay: float = 0.75,
    min_lr: float = 1e-6,
    warmup_epochs: int = 5,
    weight_decay: float = 0.05,
    label_smoothing: float = 0.1,
    batch_size: int = 128,
    precision: Literal["32-true", "bf16-mixed", "16-mixed"] = "32-true",
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    num_workers: int = 0,
    seed: int = 0,
    compare: bool = False,
) -> dict[str, Standing]:
    """Trains the teacher's backbone and a linear classifier on labelled images, random crops flipped or not.

    Args:
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        root: folder with train/ and a folder of queries, each with class folders.
        queries: name of the query folder; by default the first of val, validation and test that there is.
        output: a new file, the checkpoint of the last epoch (of the newest one, while it trains).
        epochs: passes over the training images.
        lr: learning rate of the classifier, for 256 images a step.
        layer_decay: factor of the learning rate from one block of a ViT to the one before it.
        min_lr: learning rate at the end, for 256 images a step.
        warmup_epochs: epochs of the linear warm-up of the learning rate.
        weight_decay: not on biases and norms.
        label_smoothing: share of the target that is spread over all classes.
        batch_size: images of a step.
        precision: bf16-mixed is faster on most GPUs.
        image_size: pixels of the images' side; by default that of the training's global crops.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        num_workers: worker processes.
        seed: of the classifier's first weights, the order, the crops and the stochastic depth.
        compare: also the same network from scratch, what the training without labels must beat.

    Returns:
        For "trained" (and "untrained"): accuracies in the last epoch and in the best, as fractions.
    """
    path = new_file(output)
    module = load_module(checkpoint)
    shown = images_of(module, image_size, mean, std)
    train, query = labelled_folders(root, queries, shown.in_chans)

    def tune(title: str, backbone: nn.Module, *callbacks: ModelCheckpoint) -> Standing:
        with seeded(module.device, seed):
            tuned = FineTune(
                backbone,
                len(train.classes),
                lr=lr,
                layer_decay=layer_decay,
                min_lr=min_lr,
                warmup_epochs=warmup_epochs,
                weight_decay=weight_decay,
                label_smoothing=label_smoothing,
                seed=seed,
                classes=train.classes,
            )
        data = LabelledDataModule(train, query, **shown._asdict(), batch_size=batch_size, num_workers=num_workers, seed=seed)
        train_classifier(tuned, data, epochs=epochs, title=title, callbacks=callbacks, precision=precision)
        return tuned.results()

    results = {"untrained": tune("untrained", untrained(module))} if compare else {}
    # With a fixed name and nothing to monitor, it keeps the newest.
    keep = ModelCheckpoint(path.parent, filename=path.stem, enable_version_counter=False, save_on_train_epoch_end=True)
    results["trained"] = tune("trained", module.evaluated.backbone, keep)
    print(
        f"{len(train)} images of {train.root}, {len(query)} queries of {query.root}, {shown.size[0]}×{shown.size[1]} pixels; "
        "top-1 / top-5 in per cent"
    )
    print_standings(list(results.items()), chosen="epoch")
    print(f"the checkpoint of the last epoch is {path}; FineTune.load_from_checkpoint({str(path)!r}, backbone=...) loads it")
    return results
