"""From facts to settings, each with its reason. Nothing is read and nothing is run here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from dino_lightning.auto.facts import Facts
from dino_lightning.evaluation.collapse import fitting_prototypes

_EPOCHS = 20  # of a run, at least: warm-ups are in epochs
_VALIDATIONS, _VALIDATING = 12, 0.1  # at most so many, in so much of the time
_EVALUATED = 6  # images are evaluated in the time that one is trained on: two views forward and backward, and two of the teacher
_FEW = 10_000  # images of a bank that is quickly evaluated
_SHARP = 64  # pixels: smaller images have nothing to blur
_OURS = "benchmarks/recipes.md"
_PROTOTYPES = {20_000: 1024, 50_000: 2048, 100_000: 4096, 200_000: 16384, 500_000: 32768}  # below so many images
_VIEWS = {"color_jitter": [0.4, 0.4, 0.2, 0.1], "blur_p": [1.0, 0.1, 0.5], "solarize_p": 0.2}
_ADAMW = {"optimizer": "adamw", "weight_decay": 0.04, "weight_decay_end": 0.4}  # as DINO has it, for all methods
_SMALL: dict[str, dict[str, Any]] = {  # of a small network; the learning rate as applied is the same for all methods
    "dino": {"lr": 2e-3, "hidden_dim": 512, "bottleneck_dim": 128, "use_bn_in_head": True},
    # Its rule is the square root: this gives the same rate at 128 images.
    "dinov2": {"lr": 2.8e-3, "hidden_dim": 512, "bottleneck_dim": 128, "layer_scale": None, "drop_path_rate": 0.0, "layerwise_decay": 1.0},
    "simclr": {"lr": 2e-3, "hidden_dim": 512, "temperature": 0.1},
    "byol": {"lr": 2e-3, "hidden_dim": 512},
    "moco_v3": {"lr": 2e-3, "hidden_dim": 512},
    "mae": {"lr": 2e-3, "decoder_dim": 128, "decoder_depth": 2, "decoder_heads": 4},
}  # fmt: skip


class Choice(NamedTuple):
    option: str
    value: Any
    why: str


class Choices(list[Choice]):
    """Those made so far. What the user said is no choice: it stands, and the rest follows it."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__()
        self.said = said

    def shrink_batch(self, most: int, why: str) -> None:
        """Batches of a power of two images that fit, as many accumulated to a step as make up the batch that was chosen."""
        index = next((index for index, choice in enumerate(self) if choice.option == "data.batch_size"), None)
        if index is None or self[index].value <= most:
            return
        asked, fits = self[index].value, 2 ** max(0, most.bit_length() - 1)
        self[index] = Choice("data.batch_size", fits, why)
        self.make("trainer.accumulate_grad_batches", max(1, asked // fits), f"{asked} images a step")

    def make(self, option: str, value: Any, why: str) -> Any:
        """The value that holds: what the user said, else this one; an earlier choice stays."""
        if option in self.said:
            said = self.said[option]
            return yaml.safe_load(said) if isinstance(said, str) else said
        earlier = next((choice for choice in self if choice.option == option), None)
        if earlier:
            return earlier.value
        self.append(Choice(option, value, why))
        return value


def _method(choices: Choices, facts: Facts) -> str:
    """Which objective, unless that was said, or options of one."""
    if "method" in choices.said or facts.gpu or any(name.startswith("model.") for name in choices.said):
        return choices.said.get("method") or "dino"
    return choices.make("method", "simclr", f"learns more than DINO in the time that a CPU has ({_OURS}); --method dino for DINO")


def settings(facts: Facts, said: Mapping[str, Any]) -> tuple[str, Choices]:
    """The method, and all but the length of the run."""
    choices = Choices(said)
    method = _method(choices, facts)
    small = not facts.gpu or facts.side < _SHARP  # a small network, instead of the paper's at its size
    most, why = (224, "the paper's") if facts.gpu else (_SHARP, f"larger ones teach no more in the same time ({_OURS})")
    size = choices.make("data.global_crops_size", max(16, min(most, facts.side) // 16 * 16), f"at most {most} pixels, {why}")
    side = size if isinstance(size, int) else min(size)
    choices.make("data.batch_size", _batch(facts, small), "as many as pay on this device, and at least ten steps an epoch")
    if small:
        choices.make("data.local_crops_number", 0, f"two global crops teach a small network more in the same time ({_OURS})")
        why = "wide, as there are no local crops; JPEGs are read at half their size where that is enough"
        choices.make("data.global_crops_scale", [0.25, 1.0], why)
    if side < _SHARP and method != "mae":
        choices.make("data.blur_p", [0.0, 0.0, 0.0], "images of so few pixels need none (lightly and solo-learn on CIFAR-10)")
    if small and method == "simclr":
        for option, value in _VIEWS.items():
            choices.make(f"data.{option}", value, f"DINO's, for all methods ({_OURS})")
    is_vit = _backbone(choices, facts, method, side, small)
    if small:
        for option, value in {**_ADAMW, **_SMALL[method]}.items():
            choices.make(f"model.{option}", value, f"of a small network ({_OURS})")
    if method == "dinov2" and not is_vit:
        choices.make("model.ibot_loss_weight", 0.0, "only a ViT has patches to hide")
    if method in ("dino", "dinov2"):
        few = min(fitting_prototypes(facts.images), next((k for below, k in _PROTOTYPES.items() if facts.images < below), 65_536))
        choices.make("model.out_dim", few, "no more prototypes than so many images can fill (lightly-train's rule, and 8 images for each)")
        choices.make("model.warmup_teacher_temp", 0.04, "the paper's")
        choices.make("model.teacher_temp", 0.04 if facts.images < 200_000 else 0.07, "lower is safer; the paper's long runs end at 0.07")
    if facts.half:
        choices.make("trainer.precision", "bf16-mixed", "this device multiplies bfloat16 faster than float32, and it takes half the memory")
    return method, choices


def _batch(facts: Facts, small: bool) -> int:
    most = 256 if facts.gpu and small else 128 if small else 64
    while most > 8 and most * facts.devices * 10 > facts.images:
        most //= 2
    return most


def _backbone(choices: Choices, facts: Facts, method: str, side: int, small: bool) -> bool:
    """Whether it is a ViT, as far as its name tells."""
    needs_patches = method == "mae"
    if not small:
        name = choices.make("model.backbone", "vit_small", "the paper's smallest network, 22 million parameters")
    elif needs_patches:
        options = {"patch_size": max(1, side // 8), "embed_dim": 192, "depth": 6, "num_heads": 3, "img_size": side}
        why = "only a ViT has patches to hide; a small one"
        name = choices.make("model.backbone", {"class_path": "dino_lightning.VisionTransformer", "init_args": options}, why)
    else:
        options = {"stem_stride": max(1, side // 32)} if facts.gpu else {"widths": [24, 48, 96, 192], "stem_stride": max(1, side // 16), "grid": 2}
        why = f"few images and little time teach a CNN more than a ViT ({_OURS})"
        name = choices.make("model.backbone", {"class_path": "dino_lightning.backbones.small_resnet.SmallResNet", "init_args": options}, why)
    choices.make("model.img_size", side, "that of the global crops")
    return any(word in str(name) for word in ("vit", "VisionTransformer"))


def _seconds(images: int, images_per_s: float) -> float:
    """Of a validation."""
    return images / (_EVALUATED * images_per_s)


def length(choices: Choices, facts: Facts, method: str, minutes: float, images_per_s: float) -> None:
    """How long a run is at a measured pace, and what depends on that."""
    holds = {choice.option: choice.value for choice in choices} | choices.said
    step = int(holds["data.batch_size"]) * int(holds.get("trainer.accumulate_grad_batches", 1)) * facts.devices
    available = _VALIDATING * 60 * minutes
    bank = facts.bank
    if bank > _FEW and _seconds(bank + facts.queries, images_per_s) > available / 2:
        bank = choices.make("data.max_bank", _FEW, f"all {bank} would take {_seconds(bank, images_per_s):.0f} s in every validation")
    evaluated = _seconds(bank + facts.queries, images_per_s)
    validations = min(_VALIDATIONS, max(1, int(available / evaluated))) if evaluated else 0
    first = evaluated < available
    if evaluated and not first:
        choices.make("trainer.num_sanity_val_steps", 0, f"a validation before the first step would take {evaluated:.0f} s")
    seconds = 60 * minutes - (validations + first) * evaluated
    steps = max(_EPOCHS, int(seconds * images_per_s / step))
    whole = facts.images // step  # steps that see every image
    pace = f"{images_per_s:.3g} images a second were measured"
    epochs = max(_EPOCHS, round(steps / whole))
    if steps < _EPOCHS * whole:
        why = f"all images are seen {steps / whole:.1f} times, so an epoch is a part of their {whole} batches"
        choices.make("trainer.limit_train_batches", steps // _EPOCHS * int(holds.get("trainer.accumulate_grad_batches", 1)), why)
    choices.make("trainer.log_every_n_steps", min(50, max(1, steps // 100)), "a hundred points of a curve, or more")
    choices.make("trainer.max_epochs", epochs, f"{pace}: {steps} steps in {minutes:g} minutes")
    every = max(1, round(epochs / validations)) if validations else epochs
    choices.make("trainer.check_val_every_n_epoch", every, f"validation takes about {evaluated:.0f} s, and may take a tenth of the time")
    choices.make("model.warmup_epochs", max(1, epochs // 10), "a tenth of the run (lightly-train)")
    if method in ("dino", "dinov2"):
        choices.make("model.warmup_teacher_temp_epochs", max(1, epochs * 3 // 10), "three tenths of the run (lightly-train)")
        choices.make("model.freeze_last_layer", max(1, epochs // 20), "as long as the paper's, of a hundred epochs, at most a twentieth")
    if method in ("dino", "dinov2", "byol", "moco_v3"):
        momentum = min(0.996, max(0.99, 1 - 20 / steps))
        why = f"a teacher of the last {1 / (1 - momentum):.0f} of {steps} steps ({_OURS})"
        choices.make("model.momentum_teacher", round(momentum, 4), why)
