"""What is wrong with a run, in words: a verdict from a few numbers of its last steps."""

import math
from typing import NamedTuple


class Signs(NamedTuple):
    """Means over a window of steps.

    ``loss``, ``entropy`` (the teacher's) and ``kl`` in nats; ``feature_std``, ``feature_rank`` and ``view_agreement`` as in
    ``spread``; ``prototypes``: effective number of those that the teacher chose, the perplexity of their counts.

    Of DINOv2 as well, else NaN: ``patch_entropy`` of the teacher's distributions of masked patches, ``patch_prototypes`` as above within
    a batch, ``koleo_distance`` of class tokens to their nearest neighbour in the batch, ``masked``, the share of masked patches.
    """

    loss: float
    entropy: float
    kl: float
    feature_std: float
    feature_rank: float
    view_agreement: float
    prototypes: float
    patch_entropy: float = math.nan
    patch_prototypes: float = math.nan
    koleo_distance: float = math.nan
    masked: float = math.nan


class Verdict(NamedTuple):
    """``name`` as in the log's keys, ``text`` for people: what is seen, and what helps."""

    name: str
    text: str


def diagnose(
    signs: Signs, out_dim: int, *, first_loss: float, first_rank: float, first_std: float, patch_out_dim: int | None = None
) -> Verdict | None:
    """The verdict on a window of steps, None if nothing is wrong. One bad window is no illness: see how long it lasts.

    Args:
        signs: of the window.
        out_dim: number of prototypes K.
        first_loss: mean over the run's first window.
        first_rank: effective rank before the first step. That of an untrained CNN is close to 1 already.
        first_std: ``feature_std`` before the first step, which learning makes larger.
        patch_out_dim: K of the patches, if it is another.
    """
    ln_k = math.log(out_dim)
    if signs.feature_std < 0.02:
        return Verdict(
            "dead_features",
            f"dead features: the backbone gives the same feature for every image (their spread is {signs.feature_std:.3f} of 1). "
            "Lower lr, lengthen warmup_epochs, and see that the images are not all alike or black",
        )
    # Before the collapses, which it can bring about.
    on_a_line = signs.feature_rank < 1.2 and signs.feature_rank - 1 < 0.25 * (first_rank - 1)
    shrunk = signs.feature_std < 0.25 * first_std
    if on_a_line or shrunk or signs.loss > 1.3 * max(ln_k, first_loss):
        return Verdict(
            "divergence",
            f"divergence: the loss is {signs.loss:.2f} (it began with {first_loss:.2f}), the effective rank of the features "
            f"{signs.feature_rank:.2f} (it began with {first_rank:.2f}; 1: all on a line), their spread {signs.feature_std:.2f} (it "
            f"began with {first_std:.2f}): the weights are thrown about. Lower lr, lengthen warmup_epochs, keep clip_grad at 3",
        )
    if signs.entropy > ln_k - 0.25:
        return Verdict(
            "uniform_collapse",
            f"uniform collapse: the teacher gives all {out_dim} prototypes the same share (its entropy is {signs.entropy:.2f}, "
            f"ln K = {ln_k:.2f}), so there is nothing to learn from it. Lower teacher_temp and warmup_teacher_temp (0.04, or 0.02), "
            "and leave center_momentum at 0.9",
        )
    if signs.prototypes < 4 and signs.entropy < 0.1 * ln_k:
        return Verdict(
            "one_prototype_collapse",
            f"collapse to one prototype: the teacher puts all images on about {signs.prototypes:.1f} of {out_dim} prototypes and is "
            f"sure of it (entropy {signs.entropy:.2f} of {ln_k:.2f}). Leave center_momentum at 0.9 (1 switches centring off), "
            "raise teacher_temp (0.04), raise momentum_teacher",
        )
    if signs.view_agreement > 0.999:
        return Verdict(
            "nothing_to_learn",
            f"nothing to learn: the features of the two global views of an image are the same (agreement {signs.view_agreement:.3f} of 1; "
            "different images differ). Switch the augmentation on: crop scales below 1, color_jitter, blur_p",
        )
    return _diagnose_patches(signs, math.log(patch_out_dim or out_dim))


def _diagnose_patches(signs: Signs, ln_k: float) -> Verdict | None:
    if signs.masked == 0:
        return Verdict(
            "no_masks",
            "no patch is masked, so the patches' loss is 0: raise mask_probability (of 2 global crops × batch_size, this share is masked, "
            "rounded down) and mask_ratio, or the crops, if they have fewer than 4×4 patches; or set ibot_loss_weight to 0",
        )
    if signs.patch_entropy > ln_k - 0.25:
        return Verdict(
            "uniform_patch_collapse",
            f"uniform collapse of the patches: the teacher gives all prototypes the same share (its entropy over masked patches is "
            f"{signs.patch_entropy:.2f}, ln K = {ln_k:.2f}). Lower teacher_temp and warmup_teacher_temp (0.04), or lower ibot_loss_weight",
        )
    if signs.patch_prototypes < 1.5 and signs.patch_entropy < 0.1 * ln_k:
        return Verdict(
            "one_patch_prototype_collapse",
            f"collapse of the patches to one prototype: the teacher puts those of a batch on about {signs.patch_prototypes:.1f} prototypes "
            f"and is sure of it (entropy {signs.patch_entropy:.2f} of {ln_k:.2f}). Raise teacher_temp, or try the other centering",
        )
    if signs.koleo_distance < 0.02:
        return Verdict(
            "twins",
            f"twins: class tokens of a batch are all but equal to their nearest neighbour's (mean distance {signs.koleo_distance:.3f}, of "
            "at most 2), and KoLeo pulls at nothing else. Are images twice in the data (dino-lightning duplicates)? Else lower lr",
        )
    return None


def forgetting(before: float, now: float) -> Verdict | None:
    """Of the k-NN accuracy of a run that began with trained weights, against that before its first step."""
    if now >= 0.8 * before:
        return None
    return Verdict(
        "forgetting",
        f"forgetting: k-NN finds {100 * now:.1f} % where it found {100 * before:.1f} % before the first step: the weights that the run began "
        "with are being ruined. Lower lr (a tenth), lengthen warmup_epochs, raise momentum_teacher (0.9995), and with DINOv2 train new "
        "heads first (freeze_backbone_epochs)",
    )


def is_stuck(signs: Signs, out_dim: int) -> bool:
    """Whether the student is still uniform although the teacher is not: a loss at ln K."""
    ln_k = math.log(out_dim)
    return abs(signs.loss - ln_k) < 0.02 * ln_k and signs.entropy < ln_k - 0.25


def stuck(signs: Signs, out_dim: int, steps: int) -> Verdict:
    """The verdict on a run that ``is_stuck`` for long."""
    return Verdict(
        "stuck",
        f"stuck: after {steps} steps the loss is still {signs.loss:.2f}, ln K = {math.log(out_dim):.2f}: the student has learned "
        "nothing. Raise lr, shorten warmup_epochs and freeze_last_layer, or train longer; is the backbone frozen?",
    )


def fitting_prototypes(images: int) -> int:
    """K for so many training images: 8 or more of them for each prototype; the paper has 20."""
    return max(64, 2 ** int(math.log2(max(1, images / 8))))


def too_many_prototypes(out_dim: int, images: int) -> Verdict | None:
    """Of K against the number of training images."""
    fitting = fitting_prototypes(images)
    if out_dim <= max(images, fitting):
        return None
    return Verdict(
        "too_many_prototypes",
        f"out_dim={out_dim} prototypes for {images} training images: most can never be used. Set out_dim to about {fitting}, "
        "and momentum_teacher to 0.99 for so few images",
    )


def off_the_curve(loss: float, expected: float, step: int) -> Verdict | None:
    """Of the loss at a step of a recipe whose course is known."""
    if abs(loss - expected) < 0.35 * expected:
        return None
    return Verdict(
        "off_the_curve",
        f"off the recipe's curve: at step {step} the loss is {loss:.2f}, where this recipe had {expected:.2f}. If you did not change "
        "the recipe on purpose, look at the images that the run reads (see docs/views.png) and at the options in config.yaml",
    )
