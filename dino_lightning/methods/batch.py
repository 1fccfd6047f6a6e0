"""What is in a batch: views to train on, labelled images to evaluate, images to predict."""

from typing import Any

from torch import Tensor


def split_views(batch: Any) -> list[Tensor]:
    """The views of a training batch: a list of tensors, or (views, anything).

    Raises:
        TypeError: for anything else.
        ValueError: if there are fewer than two views, or they are not (B, C, H, W) with one B and C.
    """
    is_sequence = isinstance(batch, list | tuple) and len(batch) > 0
    views = batch[0] if is_sequence and isinstance(batch[0], list | tuple) else batch
    if not isinstance(views, list | tuple) or not all(isinstance(view, Tensor) for view in views):
        raise TypeError(
            "expected a batch that is a list of views (B, C, H, W), or (views, anything), "
            f"got {type(batch).__name__}" + (f" of {[type(item).__name__ for item in batch]}" if is_sequence else "")
        )
    shapes = [tuple(view.shape) for view in views]
    if len(views) < 2 or any(len(shape) != 4 or shape[:2] != shapes[0][:2] for shape in shapes):
        raise ValueError(f"expected at least two views (B, C, H, W) with the same B and C, the first two the global crops, got {shapes}")
    return list(views)


def global_views(batch: Any) -> list[Tensor]:
    """The two global views of a training batch, for methods that have no use for local ones."""
    return split_views(batch)[:2]


def labelled_images(batch: Any) -> tuple[Tensor, Tensor]:
    """Images (B, C, H, W) and labels (B,) of a batch of validation or test.

    Raises:
        TypeError: for anything else.
    """
    pair = tuple(batch[:2]) if isinstance(batch, list | tuple) else ()
    if len(pair) < 2 or not all(isinstance(part, Tensor) for part in pair) or pair[0].ndim != 4 or pair[1].ndim != 1:
        raise TypeError(
            f"validation takes batches (images (B, C, H, W), labels (B,)) of two loaders, [bank, queries], got {_described(batch)}; "
            "these methods have no validation loss"
        )
    return pair


def images_and_rest(batch: Any) -> tuple[Tensor, Any]:
    """Images (B, C, H, W) of a batch of prediction, and what comes with them: (images, anything), or images alone, None.

    Raises:
        TypeError: for anything else.
    """
    match batch:
        case [images, rest]:
            pass
        case [images] | images:
            rest = None
    if not isinstance(images, Tensor) or images.ndim != 4:
        raise TypeError(f"prediction takes batches of images (B, C, H, W), or (images, anything), got {_described(batch)}")
    return images, rest


def _described(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, list | tuple):
        return f"{type(batch).__name__} of {', '.join(_described(item) for item in batch[:4])}"
    return type(batch).__name__
