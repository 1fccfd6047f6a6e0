"""Counts the images that could not be read, names them at the end of an epoch, and stops a run that has too many."""

import logging

from lightning.pytorch import Trainer

from dino_lightning.data.views import Unpainted
from dino_lightning.losses.ranks import gather_objects

log = logging.getLogger(__name__)

_NAMED = 20
_CHECK_EVERY = 500  # batches


class UnreadableImagesError(RuntimeError):
    """More of the images could not be read than is allowed."""


class UnreadableLedger:
    """What could not be read in the running epoch, over all ranks at its end."""

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self._lines: list[str] = []
        self._named: set[str] = set()  # in earlier epochs
        self._images = self._batches = 0

    def note(self, trainer: Trainer, batch: Unpainted) -> None:
        """Counts a training batch; with the last one of an epoch or a run the unreadable images are named in the log.

        Raises:
            UnreadableImagesError: on all ranks, if they are more than the allowed share of the images; in mid-epoch, if
                they are more than that of the whole epoch.
        """
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # batches before this one
        if done == 0:
            self._lines, self._images, self._batches = [], 0, 0
        self._lines += batch.unreadable
        self._images += len(batch.labels)
        self._batches += 1  # of a resumed epoch, not all that are done
        is_last = done + 1 >= trainer.num_training_batches or trainer.global_step + 1 == trainer.max_steps
        if not is_last and (done + 1) % _CHECK_EVERY:
            return
        lines, images = self._over_all_ranks()
        if not is_last:
            images = images * int(trainer.num_training_batches) // self._batches
        if not lines or (not is_last and len(lines) <= self.max_share * images):
            return
        too_many = len(lines) > self.max_share * images
        new = lines if too_many else [line for line in lines if line not in self._named]
        self._named.update(new[:_NAMED])
        named = "\n".join(new[:_NAMED]) + (f"\n... and {len(new) - _NAMED} more" if len(new) > _NAMED else "")
        if trainer.is_global_zero and new:
            log.warning(
                "%d of the %d images of epoch %d could not be read and were replaced by others (each is named once):\n%s",
                *(len(lines), images, trainer.current_epoch, named),
            )
        if too_many:
            raise UnreadableImagesError(
                f"{len(lines)} of {images} images could not be read, more than max_unreadable={self.max_share:.3g} of them; "
                f"remove or repair them, or raise --data.max_unreadable:\n{named}"
            )

    def _over_all_ranks(self) -> tuple[list[str], int]:
        ranks = gather_objects((self._lines, self._images))
        return sorted({line for lines, _ in ranks for line in lines}), sum(images for _, images in ranks)
