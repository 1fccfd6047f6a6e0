"""The order of the training images: a function of (seed, epoch), exact under ranks, workers and interruptions."""

from collections.abc import Callable, Iterator, Sized

import numpy as np
from lightning.pytorch import Trainer
from torch.utils.data import DistributedSampler, SequentialSampler

from dino_lightning.training.randomness import generator


class EpochSampler(DistributedSampler):
    """Yields (epoch, index), so that workers that live on know the epoch.

    A DistributedSampler, so that Lightning keeps it and tells it the epoch. The ranks share out one permutation, image by
    image: what n ranks of B see in a step is what one process of n·B sees.

    Args:
        dataset: what is sampled.
        batch_size: images of a batch on one rank.
        num_replicas: number of ranks.
        rank: of this process.
        seed: of the permutations.
        position: gives (epoch, batches already done in it) when an epoch starts; without it the epoch is that of
            ``set_epoch`` and starts at its beginning.
    """

    def __init__(
        self,
        dataset: Sized,
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        position: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.batch_size = batch_size
        self.position = position

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, batches = self.position() if self.position else (self.epoch, 0)
        mine = self._order(epoch)[self.rank : self.total_size : self.num_replicas]
        return ((epoch, int(index)) for index in mine[batches * self.batch_size :])

    def _order(self, epoch: int) -> np.ndarray:
        """Of all images; of a dataset in shards (``data.shards``) one shard after the other, each in an order of its own."""
        random = generator(self.seed, epoch)
        ends = getattr(self.dataset, "shard_ends", None)
        if ends is None:
            return random.permutation(len(self.dataset))
        return np.concatenate([ends[i] + random.permutation(ends[i + 1] - ends[i]) for i in random.permutation(len(ends) - 1)])


class OrderedSampler(EpochSampler, SequentialSampler):
    """The same images in the same order in every epoch, as (epoch, index): their crops are others all the same.

    A SequentialSampler too, since a run with ``overfit_batches`` replaces any other by one that does not tell the epoch.
    """

    def _order(self, epoch: int) -> np.ndarray:
        return np.arange(len(self.dataset))


def training_sampler(dataset: Sized, batch_size: int, seed: int, trainer: Trainer | None) -> EpochSampler:
    """The order of a fit of this ``trainer``; without one, that of a single process whose epoch ``set_epoch`` tells."""
    if trainer is None:
        return EpochSampler(dataset, batch_size, seed=seed)
    kind = OrderedSampler if trainer.overfit_batches else EpochSampler
    return kind(dataset, batch_size, trainer.world_size, trainer.global_rank, seed, position=lambda: training_position(trainer))


def training_position(trainer: Trainer) -> tuple[int, int]:
    """(epoch, batches already done in it) of a fit that begins, goes on, or was resumed from any checkpoint."""
    epochs, batches = trainer.fit_loop.epoch_progress.current, trainer.fit_loop.epoch_loop.batch_progress
    if batches.is_last_batch:  # the checkpoint was written behind the last batch of its epoch
        return epochs.ready, 0
    return epochs.processed, batches.current.processed
