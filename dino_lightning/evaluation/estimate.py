"""What training costs, on paper: operations, memory and bytes over the network, as functions of sizes. Nothing is run.

Operations are multiply-adds times two, of matrix products, convolutions and attention (as torch's FlopCounterMode counts them);
memory is what the tensors take that autograd keeps (Korthikanti et al. 2022, section 4, with attention that is fused); all is
derived from the networks' own files and compared with them in ``tests/test_estimate.py``. What a library allocates for its own work,
and what an allocator wastes, is in none of it.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

from dino_lightning.backbones.head import DINOHead
from dino_lightning.backbones.vit import VisionTransformer

_FULL = 4  # bytes of a float32


class ViT(NamedTuple):
    """The sizes of a vision transformer: ``dim`` is its width D, ``hidden`` its MLP's, ``prefix`` the tokens before the patches."""

    dim: int
    depth: int
    heads: int
    hidden: int
    gated: bool
    layer_scale: bool
    prefix: int
    patch_size: int
    in_chans: int
    recomputed: bool

    @classmethod
    def of(cls, network: VisionTransformer) -> "ViT":
        """The shape of a network."""
        block: Any = network.blocks[0]  # a module's attributes have no types
        gated = hasattr(block.mlp, "w3")
        return cls(
            network.embed_dim,
            len(network.blocks),
            block.attn.num_heads,
            block.mlp.w3.in_features if gated else block.mlp.fc1.out_features,
            gated,
            network.layer_scale is not None,
            network.prefix_tokens,
            network.patch_size,
            network.patch_embed.proj.in_channels,
            network.activation_checkpointing,
        )

    def tokens(self, height: int, width: int) -> int:
        """Of a crop of this size in pixels."""
        return self.prefix + (height // self.patch_size) * (width // self.patch_size)

    def flops(self, tokens: int, all_tokens: bool = False, kept: float = 1.0) -> int:
        """Operations of a forward pass of one crop.

        Args:
            tokens: T of the crop.
            all_tokens: whether the last block's output is asked for of all tokens, as for masked patches, or of the class token alone.
            kept: share of the samples for which a branch is computed, where stochastic depth drops whole samples before it.
        """
        d, h = self.dim, self.hidden
        embedding = 2 * (tokens - self.prefix) * self.in_chans * self.patch_size**2 * d
        after = 2 * d * d + (6 if self.gated else 4) * d * h  # the projection and the MLP, of a token
        attention = 4 * tokens * d  # of a token that asks all
        block = tokens * (6 * d * d + after + attention)
        asking = tokens if all_tokens else 1
        last = tokens * 6 * d * d + asking * (after + attention)
        return round(embedding + kept * ((self.depth - 1) * block + last))

    def activations(self, tokens: int, width: int, all_tokens: bool = False, kept: float = 1.0, fused: bool = True) -> int:
        """Bytes that autograd keeps of one crop from its forward pass, the crop itself included; where blocks are recomputed, their
        inputs, and besides what one of them needs while its backward pass runs.

        The stream between the branches, and what the layer norms read, is float32 whatever the autocast.

        Args:
            tokens, all_tokens, kept: as for ``flops``.
            width: bytes of a number in the products: 4, or 2 under autocast.
            fused: attention keeps a number for each row of scores; else the T × T scores.
        """
        d, asking = self.dim, tokens if all_tokens else 1
        norm = 4 * d + 8 + width * d  # what it read, its mean and deviation, and what the product after it read
        qkv = 3 * d * width
        scores = self.heads * (4 if fused else width * tokens)  # of a token that asks
        unasked = 0 if fused else (tokens - asking) * d * width  # fused attention keeps q, k and v as one tensor, with the q of all tokens
        branch = (width * d if self.layer_scale else 0) + (_FULL * d if kept < 1 else 0)  # index_add keeps what it adds
        after = norm + d * width + branch + self.hidden * width * (4 if self.gated else 2) + branch + scores
        block, last = tokens * (norm + qkv + after), tokens * (norm + qkv) + asking * after - unasked
        image = width * self.in_chans * (tokens - self.prefix) * self.patch_size**2
        final_norm = asking * (_FULL * d + 8)
        if self.recomputed:
            return round(image + final_norm + self.depth * tokens * _FULL * d + kept * block)
        return round(image + final_norm + kept * ((self.depth - 1) * block + last))


class Head(NamedTuple):
    """The sizes of a projection head: ``widths`` of its MLP from the features to the bottleneck, and its prototypes K."""

    widths: tuple[int, ...]
    prototypes: int

    @classmethod
    def of(cls, network: DINOHead) -> "Head":
        """The shape of a head."""
        linear = [layer for layer in network.mlp.modules() if isinstance(layer, nn.Linear)]
        return cls((linear[0].in_features, *(layer.out_features for layer in linear)), network.last_layer.weight_v.shape[0])

    def flops(self) -> int:
        """Operations of a forward pass of one row."""
        return sum(2 * a * b for a, b in zip(self.widths, (*self.widths[1:], self.prototypes)))

    def activations(self, width: int) -> int:
        """Bytes that autograd keeps of one row, without the logits; ``width`` as for a ViT. GELU and the product after it keep one
        hidden layer each."""
        hidden, bottleneck = sum(self.widths[1:-1]), self.widths[-1]
        return width * (self.widths[0] + 2 * hidden) + 2 * _FULL * bottleneck  # the bottleneck before and after its norm


class Rows(NamedTuple):
    """Rows of one image that go through a head: of the student, of the teacher, and how many of the teacher's logits stay."""

    head: Head
    student: float
    teacher: float
    kept: float


def logits_bytes(rows: Rows) -> int:
    """Of one image: the logits of the student and those of the teacher that stay, float32 whatever the autocast."""
    return round(_FULL * rows.head.prototypes * (rows.student + rows.kept))


def loss_bytes(rows: Rows) -> int:
    """Of one image, what the loss adds: the targets and the gradient of the student's logits, float32."""
    return round(_FULL * rows.head.prototypes * (rows.teacher + rows.student))


def optimizer_bytes(trainable: int, optimizer: str) -> int:
    """Of the moments of so many parameters, float32: two of AdamW, one of SGD and LARS."""
    return {"adamw": 2, "sgd": 1, "lars": 1}[optimizer] * _FULL * trainable


class Memory(NamedTuple):
    """Bytes on one device at the beginning of the backward pass, when most is held at once. Gradients come as activations go, so the
    sum is a little more than the peak."""

    parameters: int
    teacher: int
    gradients: int
    optimizer: int
    half_weights: int
    images: int
    activations: int
    logits: int
    loss: int

    @property
    def total(self) -> int:
        """In bytes."""
        return sum(self)


class Step(NamedTuple):
    """What one optimizer step on one device costs, whatever the device.

    Attributes:
        batch: images of a micro-batch.
        accumulated: micro-batches of a step.
        parameters, trainable, teacher: numbers of the student, of those of it that are trained, of the teacher.
        cast: numbers of the student's matrices that autocast copies to half precision; 0 without.
        flops: operations for an image.
        image_bytes: float32 bytes of all views of an image on the device.
        activation_bytes, logits_bytes, loss_bytes: for an image.
        optimizer: its name.
        centre_bytes: that the devices add up beside the gradients.
        devices: how many there are, in all.
        calls: of the student's backbone in a micro-batch, one for each size of crops.
        sharded: whether each device has its share of weights, gradients and moments only.
    """

    batch: int
    accumulated: int
    parameters: int
    trainable: int
    teacher: int
    cast: int
    flops: int
    image_bytes: int
    activation_bytes: int
    logits_bytes: int
    loss_bytes: int
    optimizer: str
    centre_bytes: int
    devices: int
    calls: int = 1
    sharded: bool = False

    @property
    def images(self) -> int:
        """Of a step, over all devices."""
        return self.batch * self.accumulated * self.devices

    @property
    def gradient_bytes(self) -> int:
        """That every device adds up with the others in a step, float32."""
        return _FULL * self.trainable

    def memory(self) -> Memory:
        """The same on one device and on several, whose gradients are views of what is sent; of shards, beside the block or head under way."""
        parts = self.devices if self.sharded else 1
        return Memory(
            parameters=_FULL * self.parameters // parts,
            teacher=_FULL * self.teacher // parts,
            gradients=self.gradient_bytes // parts,
            optimizer=optimizer_bytes(self.trainable, self.optimizer) // parts,
            half_weights=2 * self.cast,
            images=self.batch * self.image_bytes,
            activations=self.batch * self.activation_bytes,
            logits=self.batch * self.logits_bytes,
            loss=self.batch * self.loss_bytes,
        )

    def sent_bytes(self) -> float:
        """That each device sends in a step, around a ring: gradients and centres added up; of shards, instead of the former, the weights
        for every pass through them (the student's forward and backward, the teacher's forward) and the gradients to where they belong."""
        if not self.sharded:
            return ring_bytes(self.gradient_bytes + self.centre_bytes, self.devices)
        passes = self.calls * (2 * self.parameters + self.trainable) + self.teacher
        return (self.devices - 1) / self.devices * _FULL * self.accumulated * passes + ring_bytes(self.centre_bytes, self.devices)

    def largest_batch(self, room: float) -> int:
        """The most images of a micro-batch for which ``memory`` takes no more than ``room`` bytes; 0 if not even one fits."""
        fixed = self._replace(batch=0).memory().total
        return max(0, math.floor((room - fixed) / (self._replace(batch=1).memory().total - fixed)))

    def moved_bytes(self) -> int:
        """That the device's memory moves in a step at the least: what is kept of the forward pass is written and read once, AdamW reads
        four and writes three numbers for each parameter (SGD three and two), the teacher's average reads two and writes one."""
        kept = self.memory()
        update = 7 if self.optimizer == "adamw" else 5
        wide = 2 * self.accumulated * (kept.activations + kept.logits + kept.loss)
        return wide + _FULL * (update * self.trainable + 3 * self.teacher)


def compute_seconds(step: Step, peak: float, mfu: float) -> float:
    """Of a step, at the share ``mfu`` of ``peak`` operations a second."""
    return step.flops * step.batch * step.accumulated / (mfu * peak)


def data_seconds(step: Step, worker_seconds: float, workers: int) -> float:
    """In which a device's workers make the images of a step, each ``worker_seconds`` for one."""
    return step.batch * step.accumulated * worker_seconds / workers


def ring_bytes(payload: int, devices: int) -> float:
    """That each device sends in an all-reduce of ``payload`` bytes around a ring: 2 (n − 1) / n of it (Patarasuk and Yuan 2009)."""
    return 2 * (devices - 1) / devices * payload


def network_seconds(step: Step, link_gbps: float) -> float:
    """Of what is sent in a step, over links of so many 10⁹ bits a second."""
    return 8 * step.sent_bytes() / (link_gbps * 1e9)


def workers_needed(images_per_s: float, worker_seconds: float) -> int:
    """Worker processes that make so many images a second."""
    return math.ceil(images_per_s * worker_seconds)


def centre_bytes(method: str, prototypes: Sequence[int], sinkhorn: bool) -> int:
    """That a step's centres, of K prototypes each, add up over the devices: DINO's sum of logits, the number of rows and of failures;
    DINOv2's means; or Sinkhorn's largest exponents and three times the sums over prototypes."""
    each: Callable[[int], int] = (lambda k: 4 * k) if sinkhorn else (lambda k: k + 2) if method == "dino" else (lambda k: k)
    return _FULL * sum(map(each, prototypes))
