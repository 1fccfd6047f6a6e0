"""``dino-lightning knn``: k-NN accuracy of a checkpoint."""

from collections.abc import Callable

from torch import Tensor

from dino_lightning.evaluation import knn_accuracy
from dino_lightning.evaluation.features import extract_features, raw_pixels
from dino_lightning.tools.checkpoint import images_of, load_module, untrained
from dino_lightning.tools.folders import labelled_folders


def knn(
    checkpoint: str,
    root: str,
    queries: str | None = None,
    k: tuple[int, ...] = (10, 20, 100, 200),
    temperature: float = 0.07,
    image_size: int | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    compare: bool = False,
) -> dict[str, list[tuple[float, float]]]:
    """Weighted k-NN accuracy of the teacher's features on labelled images. The log names unreadable ones, which are left out.

    Args:
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        root: folder with train/ (the bank) and a folder of queries, each with class folders.
        queries: name of the query folder; by default the first of val, validation and test that there is.
        k: numbers of neighbours.
        temperature: of the votes.
        image_size: pixels of the images' side; by default that of the training's global crops.
        mean: per channel; by default the training's.
        std: per channel, likewise.
        batch_size: images at a time.
        num_workers: worker processes.
        compare: also the raw pixels and the same network untrained, what the features must beat.

    Returns:
        For "trained" (and "raw pixels", "untrained"): (top-1, top-5) as fractions for each k.
    """
    module = load_module(checkpoint)
    shown = images_of(module, image_size, mean, std)
    bank, query = labelled_folders(root, queries, shown.in_chans)

    def accuracies(title: str, network: Callable[[Tensor], Tensor]) -> list[tuple[float, float]]:
        features = []
        for source in (bank, query):
            vectors, labels = extract_features(
                network,
                source,
                **shown._asdict(),
                batch_size=batch_size,
                num_workers=num_workers,
                device=module.device,
                progress=title,
            )
            readable = labels >= 0
            features.append((vectors[readable], labels[readable]))
        return [knn_accuracy(*features[0], *features[1], k=n, temperature=temperature) for n in k]

    results = {}
    if compare:
        results["raw pixels"] = accuracies("raw pixels", raw_pixels)
        results["untrained"] = accuracies("untrained", untrained(module))
    results["trained"] = accuracies("trained", module)
    print(
        f"{len(bank)} images of {bank.root}, {len(query)} queries of {query.root}, {shown.size[0]}×{shown.size[1]} pixels; top-1 / top-5 in per cent"
    )
    print(" " * 12 + "".join(f"{f'k = {n}':>14}" for n in k))
    for name, values in results.items():
        print(f"{name:12}" + "".join(f"{100 * top1:7.1f} /{100 * top5:5.1f}" for top1, top5 in values))
    return results
