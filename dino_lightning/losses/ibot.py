"""The iBOT loss: what stood at a masked patch, as the teacher sees it (Zhou et al. 2022)."""

from torch import Tensor, nn

from dino_lightning.losses.cross_entropy import cross_entropy


class IBOTLoss(nn.Module):
    """Cross-entropy H(teacher, student) of masked patches, the mean of each masked image, added up and divided by all images.

    Images without a mask count in the divisor, as in DINOv2, and every masked image weighs the same however large its mask.
    Computed in float32 whatever the autocast.
    """

    def __init__(self, student_temp: float = 0.1) -> None:
        super().__init__()
        if student_temp <= 0:
            raise ValueError(f"student_temp must be positive, got {student_temp}")
        self.student_temp = student_temp

    def forward(self, student: Tensor, targets: Tensor, masks: Tensor) -> Tensor:
        """Loss of the M masked patches of a (micro-)batch; 0 where M is 0.

        Args:
            student: (M, K) logits, in the order of ``masks.flatten().nonzero()``.
            targets: (M, K), the teacher's distributions at the same patches.
            masks: (2·B, h·w) bool, true where a patch of a global crop is masked. On the device of the logits nothing waits; on the
                host their number is compared with M.

        Raises:
            ValueError: if the shapes do not fit together.
        """
        rows = len(student)
        if masks.dim() != 2 or student.dim() != 2 or targets.shape != student.shape:
            raise ValueError(
                "expected the student's logits and the targets (M, K) and masks (2·B, h·w), "
                f"got {tuple(student.shape)}, {tuple(targets.shape)} and {tuple(masks.shape)}"
            )
        counts = masks.sum(dim=1)
        if counts.device.type == "cpu" and counts.sum() != rows:
            raise ValueError(f"expected one row for each of {counts.sum()} masked patches, got {rows}")
        losses = cross_entropy(student, targets, self.student_temp)
        counts = counts.to(losses.device)
        weights = counts.to(losses.dtype).reciprocal().repeat_interleave(counts, output_size=rows)
        return (losses * weights).sum() / len(masks)
