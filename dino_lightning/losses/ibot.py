"""The iBOT loss: what the student says of masked patches against what the teacher, which sees them, says (Zhou et al. 2022)."""

import torch
from torch import Tensor, nn

from dino_lightning.losses.cross_entropy import row_cross_entropy


class IBOTLoss(nn.Module):
    """Cross-entropy of masked patches with the teacher's at the same place of the same view: a mean over the patches of each masked
    image, added up over these and divided by the number of all of them, masked or not (as DINOv2 does).

    Float32 whatever the autocast.
    """

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        if student_temp <= 0:
            raise ValueError(f"student_temp must be positive, got {student_temp}")
        self.student_temp = student_temp

    def forward(self, student: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
        """The loss of one (micro-)batch; without a masked patch it is 0.

        Args:
            student: (M, K), logits of the M masked patches, in the order of ``masks.flatten().nonzero()``.
            targets: (M, K), the teacher's distributions.
            masks: bool (2·B, h·w), on the host if it shall not wait for the device.

        Raises:
            ValueError: if the shapes do not fit together.
        """
        if student.shape != targets.shape or student.ndim != 2:
            raise ValueError(f"expected logits and targets (M, K), got {tuple(student.shape)} and {tuple(targets.shape)}")
        counts = masks.sum(dim=1)  # (2·B,)
        if masks.device.type == "cpu" and counts.sum() != len(student):
            raise ValueError(f"{int(counts.sum())} patches are masked, but there are logits of {len(student)}")
        weights = torch.repeat_interleave(1 / counts, counts, output_size=len(student))  # 1 / 0 is repeated 0 times
        losses = row_cross_entropy(student, lambda: [(slice(0, len(student)), targets.detach(), 1)], self.student_temp)
        return (losses * weights.to(losses, non_blocking=True)).sum() / len(masks)
