"""Backbones as graphs, without their Python code: ONNX and torch.export. Any batch, one image size."""

import importlib
from pathlib import Path

import torch

from dino_lightning.weights.package import Package

_TOLERANCE = 1e-4


def write_onnx(package: Package, folder: Path) -> str:
    """``model.onnx``, run once by onnxruntime to see that it gives the same features.

    Raises:
        ModuleNotFoundError: without onnx, onnxscript and onnxruntime.
        RuntimeError: if onnxruntime gives other features.
    """
    try:
        onnxruntime = importlib.import_module("onnxruntime")
        importlib.import_module("onnxscript")  # torch's exporter needs it
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"onnx needs {error.name}: pip install onnx onnxruntime onnxscript", name=error.name) from error
    path = folder / "model.onnx"
    torch.onnx.export(
        package.backbone,
        (_images(package),),
        path,
        input_names=["images"],
        output_names=["features"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = _images(package, count=3)
    with torch.no_grad():
        expected = package.backbone(images)
    (features,) = session.run(None, {"images": images.numpy()})
    difference = (torch.from_numpy(features) - expected).abs().max().item()
    if not difference < _TOLERANCE * max(1, expected.abs().max().item()):
        raise RuntimeError(f"onnxruntime gives features that differ by {difference:.2e}: this network cannot be exported to ONNX")
    return f"""import numpy
import onnxruntime

session = onnxruntime.InferenceSession("FOLDER/model.onnx")
images = numpy.random.rand(*{package.batch}).astype(numpy.float32)  # yours, normalised as said above
(features,) = session.run(None, {{"images": images}})"""


def write_torch_export(package: Package, folder: Path) -> str:
    """``model.pt2``."""
    program = torch.export.export(package.backbone, (_images(package),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, folder / "model.pt2")
    return f"""import torch

backbone = torch.export.load("FOLDER/model.pt2").module()
images = torch.rand({package.batch})  # yours, normalised as said above
features = backbone(images)"""


def _images(package: Package, count: int = 2) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(count, package.in_chans, *package.size, generator=random)
