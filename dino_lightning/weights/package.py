"""What is handed on to other tools."""

from typing import NamedTuple

from torch import Tensor, nn


class Package(NamedTuple):
    """A ``backbone`` in evaluation mode for images (``in_chans``, *``size``) that are normalised by ``mean`` and ``std``; and where
    it is kept for further training, the ``head``'s weights and the ``center``.
    """

    backbone: nn.Module
    size: tuple[int, int]
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    head: dict[str, Tensor] | None = None
    center: Tensor | None = None

    @property
    def batch(self) -> tuple[int, ...]:
        """The shape of two such images."""
        return 2, self.in_chans, *self.size
