"""What training costs, on paper: each formula against what the real networks do."""

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dino_lightning import DINOHead, VisionTransformer
from dino_lightning.backbones.block import drop_path_subset
from dino_lightning.evaluation.estimate import Head, ViT, ring_bytes

VITS = {
    "tiny": {"embed_dim": 192, "num_heads": 3, "depth": 3},
    "small, patch 8": {"embed_dim": 384, "num_heads": 6, "depth": 2, "patch_size": 8},
    "dinov2": {
        "embed_dim": 192, "num_heads": 3, "depth": 3, "ffn": "swiglu", "registers": 4, "layer_scale": 0.1, "mask_token": True,
    },
}  # fmt: skip


def kept_bytes(call, parameters):
    """What autograd keeps of a call, in bytes: each storage once, and no parameters."""
    storages, known = {}, {parameter.untyped_storage().data_ptr() for parameter in parameters}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()
    return sum(storages.values()), result


@pytest.mark.parametrize(("size", "all_tokens", "half"), list(itertools.product(VITS, (False, True), (False, True))))
def test_what_autograd_keeps_of_a_vit_and_its_operations(size, all_tokens, half):
    torch.manual_seed(0)
    network = VisionTransformer(**VITS[size])
    images, vit = torch.rand(2, 3, 112, 96), ViT.of(network)
    tokens = vit.tokens(112, 96)

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network.forward_features(images)[0].patches if all_tokens else network(images)

    weights = 2 * sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d))
    kept, _ = kept_bytes(call, network.parameters())
    # Under autocast also the weights in half precision, and on a CPU, where our attention is not fused then, the scores.
    assert kept - half * weights == pytest.approx(2 * vit.activations(tokens, 4 - 2 * half, all_tokens, fused=not half), rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    assert counter.get_total_flops() == pytest.approx(2 * vit.flops(tokens, all_tokens), rel=1e-6)


@pytest.mark.parametrize("half", [False, True])
def test_what_dinov2s_drop_path_saves(half):
    """It computes a branch for a subset of the samples only."""
    torch.manual_seed(0)
    network = VisionTransformer(**VITS["dinov2"], drop_path_rate=0.4, drop_path_uniform=True).train()
    images, vit = torch.rand(10, 3, 64, 64), ViT.of(network)
    share = drop_path_subset(10, 0.4)[0] / 10

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(images)

    weights = 2 * sum(layer.weight.numel() for layer in network.modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d))
    kept, _ = kept_bytes(call, network.parameters())
    expected = 10 * vit.activations(vit.tokens(64, 64), 4 - 2 * half, kept=share, fused=not half)
    assert kept - half * weights == pytest.approx(expected, rel=0.02)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    assert counter.get_total_flops() == pytest.approx(10 * vit.flops(vit.tokens(64, 64), kept=share), rel=1e-6)


@pytest.mark.parametrize(("half", "layers"), [(False, 3), (True, 3), (False, 1)])
def test_what_autograd_keeps_of_a_head_and_its_operations(half, layers):
    network = DINOHead(192, 2048, nlayers=layers, hidden_dim=512, bottleneck_dim=64)
    head, features = Head.of(network), torch.rand(64, 192, requires_grad=True)
    weights = 2 * sum(layer.weight.numel() for layer in network.mlp.modules() if isinstance(layer, torch.nn.Linear))

    def call():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(features)

    kept, logits = kept_bytes(call, [*network.parameters()])
    assert logits.dtype == torch.float32
    logits_and_norms = 4 * (64 + 1) * 2048
    assert kept - half * weights - logits_and_norms == pytest.approx(64 * head.activations(4 - 2 * half), rel=0.01)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    assert counter.get_total_flops() == 64 * head.flops()
