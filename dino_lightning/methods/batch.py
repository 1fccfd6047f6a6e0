"""The views in a training batch."""

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
