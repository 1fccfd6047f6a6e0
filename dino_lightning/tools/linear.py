"""``dino-lightning linear``: accuracy of linear classifiers on the frozen features of a checkpoint."""

import torch
from torch import Tensor, nn

from dino_lightning.classifiers.classification import Standing
from dino_lightning.classifiers.probe import RATES, LinearProbe
from dino_lightning.data import ImageFolder, Shards
from dino_lightning.data.labelled import CachedFeatures, LabelledDataModule
from dino_lightning.evaluation.features import extract_features
from dino_lightning.evaluation.linear import linear_protocol, probe_features
from dino_lightning.tools.checkpoint import images_of, load_module, untrained
from dino_lightning.tools.folders import labelled_folders
from dino_lightning.tools.training import new_file, print_standings, train_classifier
from dino_lightning.training.randomness import seeded


def linear(
    checkpoint: str,
    root: str,
    queries: str | None = None,
    epochs: int = 100,
    rates: tuple[float, ...] = RATES,
    batch_size: int = 128,
    augment: bool = False,
    n_blocks: int | None = None,
    mean_patch: bool | None = None,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    num_workers: int = 0,
    seed: int = 0,
    compare: bool = False,
    output: str | None = None,
) -> dict[str, dict[float, Standing]]:
    """Accuracy of linear classifiers on the teacher's frozen features, one for each learning rate.

    Args:
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        root: folder with train/ and a folder of queries, each with class folders.
        queries: name of the query folder; by default the first of val, validation and test that there is.
        epochs: passes over the training images; the learning rates fall to 0 over them.
        rates: learning rates for 256 images a step (the reference's is 0.001, but the best one depends on features and data).
        batch_size: images of a step.
        augment: train on random crops, flipped or not, as the paper does: each epoch then runs the network on all images. By
            default the features of the centre views are extracted once, and the classifiers train on these in seconds.
        n_blocks: class tokens of so many last blocks; by default the reference's: 4 of a ViT narrower than 768, 1 of others.
        mean_patch: also the mean patch token; by default of a ViT of width 768 or more.
        image_size: pixels of the images' side; by default that of the training's global crops.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        num_workers: worker processes.
        seed: of the classifiers' first weights, the order and the crops.
        compare: also the same network untrained, what the features must beat.
        output: a new file for the classifiers of the last epoch (weights, biases, rates, names of the classes).

    Returns:
        For "trained" (and "untrained"): for each rate its accuracies in the last epoch and in the best, as fractions.
    """
    path = new_file(output) if output else None
    module = load_module(checkpoint)
    shown = images_of(module, image_size, mean, std)
    train, query = labelled_folders(root, queries, shown.in_chans)
    usual = linear_protocol(module.evaluated.backbone)
    tokens = {
        "n_blocks": usual[0] if n_blocks is None else n_blocks,
        "mean_patch": usual[1] if mean_patch is None else mean_patch,
    }
    images = {**shown._asdict(), "num_workers": num_workers}

    def probe(title: str, backbone: nn.Module) -> LinearProbe:
        backbone.eval()
        if augment:
            data = LabelledDataModule(train, query, batch_size=batch_size, seed=seed, **images)
            options = {"backbone": backbone, **tokens}
        else:
            cached = [_cache(title, backbone, source, tokens, batch_size, module.device, images) for source in (train, query)]
            data = (cached[0].loader(batch_size, shuffle=True, seed=seed), cached[1].loader(batch_size))
            options = {"backbone": None, "in_features": cached[0].features.shape[1]}
        with seeded(module.device, seed):
            trained = LinearProbe(num_classes=len(train.classes), rates=rates, **options)
        train_classifier(trained, data, epochs=epochs, title=title)
        return trained

    probes = {"untrained": probe("untrained", untrained(module))} if compare else {}
    probes["trained"] = probe("trained", module.evaluated.backbone)
    results = {name: trained.results() for name, trained in probes.items()}
    width = probes["trained"].heads[0].in_features
    print(
        f"{len(train)} images of {train.root}, {len(query)} queries of {query.root}, {shown.size[0]}×{shown.size[1]} pixels, "
        f"{width} features; top-1 / top-5 in per cent"
    )
    rows = [(f"{name:9}  lr {rate:<6g}", result) for name, found in results.items() for rate, result in found.items()]
    print_standings(rows, chosen="rate and the best epoch")
    if path:
        saved = {"classes": train.classes, "rates": list(rates), "size": list(shown.size), **tokens}
        torch.save(saved | {"heads": [head.state_dict() for head in probes["trained"].heads.cpu()]}, path)
        print(f"the classifiers of the last epoch are in {path}")
    return results


def _cache(
    title: str,
    backbone: nn.Module,
    source: ImageFolder | Shards,
    tokens: dict[str, int | bool],
    batch_size: int,
    device: torch.device,
    images: dict,
) -> CachedFeatures:
    """Features and labels of the readable images, on the host: those of a million images would fill a GPU."""

    def network(batch: Tensor) -> Tensor:
        return probe_features(backbone, batch, **tokens).cpu()

    features, labels = extract_features(network, source, batch_size=batch_size, device=device, progress=f"{title}: features", **images)
    labels = labels.cpu()
    if not (labels >= 0).any():
        raise ValueError(f"none of the {len(labels)} images of {source.root} could be read")
    return CachedFeatures(features[labels >= 0], labels[labels >= 0])
