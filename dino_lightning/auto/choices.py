"""From facts to settings, each with its reason. Nothing is read and nothing is run here."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import yaml

from dino_lightning.auto.facts import Facts
from dino_lightning.door import faces
from dino_lightning.evaluation.collapse import fitting_prototypes

_EPOCHS = 20  # of a run, at least: warm-ups are in epochs
_WHOLE_EPOCHS = 4  # from which on full resolution pays
_VALIDATIONS, _VALIDATING = 12, 0.1  # at most so many, in so much of the time
_EVALUATED = 6  # images are evaluated in the time that one is trained on: two views forward and backward, and two of the teacher
_FEW = 10_000  # images of a bank that is quickly evaluated
_SHARP = 64  # pixels: smaller images have nothing to blur
_LARGE = 128  # pixels from which on a GPU trains the paper's network at the paper's size
_OURS = "benchmarks/recipes.md"
_PROTOTYPES = {20_000: 1024, 50_000: 2048, 100_000: 4096, 200_000: 16384, 500_000: 32768}  # below so many images
_VIEWS = {"color_jitter": [0.4, 0.4, 0.2, 0.1], "blur_p": [1.0, 0.1, 0.5], "solarize_p": 0.2}
_ADAMW = {"optimizer": "adamw", "weight_decay": 0.04, "weight_decay_end": 0.4}  # as DINO has it
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
    """The ``value`` of an ``option``, and ``why`` it has that."""

    option: str
    value: Any
    why: str


class Choices(list[Choice]):
    """Those made so far. What the user said is no choice: it stands, and the rest follows it."""

    def __init__(self, said: Mapping[str, Any]) -> None:
        super().__init__()
        self.said = {name: _parsed(value) for name, value in said.items()}

    def make(self, option: str, value: Any, why: str) -> Any:
        """The value that holds: what the user said, else an earlier choice, else this one."""
        if self.has(option):
            return self.of(option)
        self.append(Choice(option, value, why))
        return value

    def has(self, option: str) -> bool:
        said = option in self.said or f"{option}.class_path" in self.said
        return said or any(choice.option == option for choice in self)

    def of(self, option: str, default: Any = None) -> Any:
        """The value that holds, or the default."""
        chosen = {choice.option: choice.value for choice in self}
        return self.said.get(option, self.said.get(f"{option}.class_path", chosen.get(option, default)))

    def shrink_batch(self, most: int, why: str) -> None:
        """Batches of a power of two images that fit, as many accumulated to a step as make up the batch that was chosen."""
        index = next((index for index, choice in enumerate(self) if choice.option == "data.batch_size"), None)
        if index is None or self[index].value <= most:
            return
        asked, fits = self[index].value, 2 ** max(0, most.bit_length() - 1)
        self[index] = Choice("data.batch_size", fits, why)
        self.make("trainer.accumulate_grad_batches", max(1, asked // fits), f"{asked} images a step")


def _parsed(value: Any) -> Any:
    """A text of the command line as YAML has it; what is none, such as a folder called "[2023] trip", as it is."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return value


def settings(facts: Facts, said: Mapping[str, Any], seconds: float | None = None) -> tuple[str, Choices]:
    """The method, and all but the length of the run.

    Args:
        facts: of the run.
        said: what the user gave, by the names of options.
        seconds: that the run may take, where that is how its length was said.
    """
    choices = Choices(said)
    small = not facts.gpu or facts.side < _LARGE  # a small network, instead of the paper's at its size
    method = _method(choices, facts)
    side = _views(choices, facts, method, small)
    is_vit = _backbone(choices, facts, method, side, small, seconds)
    if small:
        for option, value in _ADAMW.items():
            choices.make(f"model.{option}", value, "DINO's, for all methods")
        for option, value in _SMALL[method].items():
            choices.make(f"model.{option}", value, "for a small network")
    elif method in ("simclr", "byol"):
        for option, value in {**_ADAMW, "lr": 5e-4}.items():
            choices.make(f"model.{option}", value, "DINO's for a ViT, instead of LARS, which is for large batches")
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


def _method(choices: Choices, facts: Facts) -> str:
    named = {name.split(".")[1] for name in choices.said if name.startswith("model.")}
    if choices.of("method") or facts.gpu or not named <= (faces.options("fit", "simclr").groups["model"] or set()):
        return choices.of("method", "dino")
    return choices.make("method", "simclr", f"learns more than DINO in the time that a CPU has ({_OURS}); --method dino for DINO")


def _views(choices: Choices, facts: Facts, method: str, small: bool) -> int:
    """The side of the global crops, the shorter one."""
    most, why = (224, "the paper's") if facts.gpu else (_SHARP, f"on a CPU larger ones taught no more in the same time ({_OURS})")
    size = choices.make("data.global_crops_size", max(16, min(most, facts.side) // 16 * 16), f"at most {most} pixels, {why}")
    side = size if isinstance(size, int) else min(size)
    most = 64 if not small else 256 if facts.gpu else 128
    while most > 2 and most * facts.devices * 10 > facts.images:
        most //= 2
    choices.make("data.batch_size", most, "as many as pay on this device, and at least ten steps an epoch")
    if small:
        choices.make("data.local_crops_number", 0, f"two global crops taught a small network more in the same time ({_OURS})")
        why = "wide, as there are no local crops; JPEGs are read at half their size where that is enough"
        choices.make("data.global_crops_scale", [0.25, 1.0], why)
    elif side < 224:
        choices.make("data.local_crops_size", max(16, side * 3 // 7 // 16 * 16), "96 of 224, as in the paper")
    if side < _SHARP and method != "mae":
        choices.make("data.blur_p", [0.0, 0.0, 0.0], "images of so few pixels need none (lightly and solo-learn on CIFAR-10)")
    if small and method == "simclr":
        for option, value in _VIEWS.items():
            choices.make(f"data.{option}", value, "DINO's, with which it was compared")
    return side


def _backbone(choices: Choices, facts: Facts, method: str, side: int, small: bool, seconds: float | None) -> bool:
    """Whether it is a ViT, as far as its name tells."""
    if not small:
        name = choices.make("model.backbone", "vit_small", "the paper's smallest network, 22 million parameters")
    elif method == "mae":
        patch = next(pixels for pixels in range(max(1, side // 8), 0, -1) if side % pixels == 0)
        options = {"patch_size": patch, "embed_dim": 192, "depth": 6, "num_heads": 3, "img_size": side}
        why = "only a ViT has patches to hide; a small one"
        name = choices.make("model.backbone", {"class_path": "dino_lightning.VisionTransformer", "init_args": options}, why)
    else:
        options = {"stem_stride": max(1, side // 32)}
        if not facts.gpu:
            options = {"stem_stride": min(4, max(1, side // 16)), "grid": 2 if side >= 16 else 1}
        why = f"few images and little time teach a CNN more than a ViT ({_OURS})"
        cost = 5 if facts.half else 10  # ms of a thread for an image at full resolution
        whole = _WHOLE_EPOCHS * facts.images * cost / 1000 / facts.threads
        if method == "simclr" and not facts.gpu and options["stem_stride"] == 2 and seconds and seconds >= whole:
            options["stem_stride"] = 1
            why += f"; at full resolution, as there is time to see each image {_WHOLE_EPOCHS} times, at {cost} ms of a thread each"
        name = choices.make(
            "model.backbone", {"class_path": "dino_lightning.backbones.small_resnet.SmallResNet", "init_args": options}, why
        )
    choices.make("model.img_size", side, "that of the global crops")
    return any(word in str(name) for word in ("vit", "VisionTransformer"))


def length(choices: Choices, facts: Facts, minutes: float, images_per_s: float) -> None:
    """How long a run is at a measured pace: it, and its validations, take the minutes."""
    available = 60 * minutes
    evaluated = _validation(choices, facts, available * _VALIDATING, images_per_s)
    first = choices.of("trainer.num_sanity_val_steps", -1) != 0 and evaluated > 0  # before the first step
    validations = min(_VALIDATIONS, max(1, int(available * _VALIDATING / evaluated))) if evaluated else 0
    accumulated = int(choices.of("trainer.accumulate_grad_batches", 1))
    step = int(choices.of("data.batch_size")) * accumulated * facts.devices
    steps = max(_EPOCHS, int((available - (validations + first) * evaluated) * images_per_s / step))
    whole = max(1, facts.images // step)  # steps that see every image
    limit = choices.of("trainer.limit_train_batches", 1.0) or 1.0
    in_epoch = max(1, int(limit * whole) if isinstance(limit, float) else limit // accumulated)
    if steps < _EPOCHS * in_epoch and not choices.has("trainer.limit_train_batches"):
        in_epoch = steps // _EPOCHS
        why = f"all images are seen {steps / whole:.1f} times, so an epoch is {in_epoch} of their {whole} steps"
        choices.make("trainer.limit_train_batches", in_epoch * accumulated, why)
    epochs = max(1, round(steps / in_epoch))
    asked = choices.of("trainer.check_val_every_n_epoch")
    if validations and asked:
        each = in_epoch * step / images_per_s + evaluated / asked
        epochs = max(1, round((available - first * evaluated) / each))
    elif validations:
        every = max(1, round(epochs / validations))
        why = f"a validation takes about {evaluated:.0f} s; all of them a tenth of the time"
        choices.make("trainer.check_val_every_n_epoch", every, why)
        epochs = max(1, round(epochs / every)) * every  # so that the last one is validated
    steps = epochs * in_epoch
    choices.make("trainer.log_every_n_steps", min(50, in_epoch, max(1, steps // 100)), "a hundred points of a curve, or more")
    why = f"{steps} steps take {minutes:g} minutes at the {images_per_s:.3g} images a second that were measured; no limit, which is --trainer.max_time"
    choices.make("trainer.max_epochs", epochs, why)
    schedules(choices, epochs, steps)


def _validation(choices: Choices, facts: Facts, available: float, images_per_s: float) -> float:
    """Seconds of one; the bank is made smaller, and the one before the first step left out, where all of them have few seconds."""
    if choices.of("trainer.limit_val_batches", 1.0) == 0:
        return 0.0

    def seconds(bank: int) -> float:
        return (bank + facts.queries) / (_EVALUATED * images_per_s)

    bank = facts.bank
    if bank > _FEW and seconds(bank) > available / 2:
        bank = min(bank, choices.make("data.max_bank", _FEW, f"a validation with all {bank} would take {seconds(bank):.0f} s") or bank)
    if seconds(bank) > available:
        choices.make("trainer.num_sanity_val_steps", 0, f"a validation before the first step would take {seconds(bank):.0f} s")
    return seconds(bank)


def schedules(choices: Choices, epochs: int, steps: int | None) -> None:
    """Warm-ups and momentum of a run of so many epochs and, where they are known, steps."""
    method = choices.of("method", "dino")
    choices.make("model.warmup_epochs", max(1, epochs // 10), "a tenth of the run (lightly-train)")
    if method in ("dino", "dinov2"):
        choices.make("model.warmup_teacher_temp_epochs", max(1, epochs * 3 // 10), "three tenths of the run (lightly-train)")
        choices.make("model.freeze_last_layer", max(1, epochs // 20), "the paper's one epoch, or a twentieth of the run")
    if method in ("dino", "dinov2", "byol", "moco_v3") and steps:
        momentum = round(min(0.996, max(0.99, 1 - 20 / steps)), 4)
        why = f"the teacher averages over {1 / (1 - momentum):.0f} of {steps} steps; the paper's 0.996 is for 250,000"
        choices.make("model.momentum_teacher", momentum, why)
