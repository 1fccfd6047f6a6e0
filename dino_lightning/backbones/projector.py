"""The MLPs with batch norm that contrastive methods have behind their backbone."""

from torch import nn


def projector(in_dim: int, hidden_dim: int, out_dim: int, layers: int = 2, last_norm: str = "none") -> nn.Sequential:
    """(B, ``in_dim``) → (B, ``out_dim``) by so many linear layers, with batch norm and ReLU after all but the last.

    Args:
        in_dim: width of what comes in.
        hidden_dim: width between the layers.
        out_dim: width of what goes out.
        layers: of them, at least one.
        last_norm: batch norm after the last layer: "none", then that layer has a bias, "plain", without gain and bias, or "affine".

    Raises:
        ValueError: for a width or a number of layers below 1.
    """
    for name, value in {"in_dim": in_dim, "hidden_dim": hidden_dim, "out_dim": out_dim, "layers": layers}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    widths = [in_dim, *[hidden_dim] * (layers - 1)]
    parts: list[nn.Module] = []
    for before, width in zip(widths, widths[1:]):
        parts += [nn.Linear(before, width, bias=False), nn.BatchNorm1d(width), nn.ReLU(inplace=True)]
    parts.append(nn.Linear(widths[-1], out_dim, bias=last_norm == "none"))
    if last_norm != "none":
        parts.append(nn.BatchNorm1d(out_dim, affine=last_norm == "affine"))
    return nn.Sequential(*parts)
