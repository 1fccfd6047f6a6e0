"""The projection head: an MLP, an L2-normalised bottleneck, weight-normalised prototypes (paper, section 3.1, appendix C)."""

from torch import Tensor, nn
from torch.nn import functional as F

from dino_lightning.backbones.prototypes import Prototypes
from dino_lightning.losses.precision import full


class DINOHead(nn.Module):
    """Features (N, ``in_dim``) → logits (N, ``out_dim``) of the prototypes.

    Args:
        in_dim: width of the backbone's features.
        out_dim: number of prototypes K.
        use_bn: batch norm before each GELU.
        norm_last_layer: keep the prototypes' gains at 1; the logits are then cosines.
        nlayers: layers of the MLP; 1 is a single linear layer to the bottleneck.
        hidden_dim: width of the MLP.
        bottleneck_dim: width of the L2-normalised bottleneck.

    Raises:
        ValueError: for a size below 1.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        use_bn: bool = False,
        norm_last_layer: bool = True,
        nlayers: int = 3,
        hidden_dim: int = 2048,
        bottleneck_dim: int = 256,
    ) -> None:
        super().__init__()
        sizes = {"in_dim": in_dim, "out_dim": out_dim, "nlayers": nlayers, "hidden_dim": hidden_dim, "bottleneck_dim": bottleneck_dim}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_dim = in_dim
        self.mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, nlayers, use_bn)
        for module in self.mlp.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.last_layer = Prototypes(bottleneck_dim, out_dim)
        self.last_layer.weight_g.requires_grad_(not norm_last_layer)

    def forward(self, x: Tensor) -> Tensor:
        """(N, in_dim) → (N, out_dim)."""
        return self.last_layer(F.normalize(full(self.mlp(x)), dim=-1))


def _mlp(in_dim: int, hidden_dim: int, out_dim: int, nlayers: int, use_bn: bool) -> nn.Module:
    if nlayers == 1:
        return nn.Linear(in_dim, out_dim)
    layers: list[nn.Module] = []
    for width in [in_dim] + [hidden_dim] * (nlayers - 2):
        layers.append(nn.Linear(width, hidden_dim))
        if use_bn:
            layers.append(nn.BatchNorm1d(hidden_dim))
        layers.append(nn.GELU())
    layers.append(nn.Linear(hidden_dim, out_dim))
    return nn.Sequential(*layers)
