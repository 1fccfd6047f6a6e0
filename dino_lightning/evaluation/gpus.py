"""What GPUs can do at most: the peaks by which a run's speed is judged and estimated."""

import re
from typing import NamedTuple

import torch


class Device(NamedTuple):
    """A GPU as its data sheet has it: dense products, without structured sparsity.

    Attributes:
        title: for people.
        called: pattern of ``torch.cuda.get_device_name()``, which it must match to its end: an H100 PCIe is no H100.
        half: 10¹² operations a second in bfloat16 and float16 with float32 sums, tensor cores.
        tf32: the same of float32 products by TF32; None where there is none.
        float32: the same of true float32; None where we are not sure.
        has_bfloat16: false before Ampere, whose ``half`` is of float16 alone.
        memory: GiB. The sheets say GB; that is what the driver reports in GiB, to a per cent.
        bandwidth: 10⁹ bytes a second of its memory.
        link: 10⁹ bits a second, one way, to the next GPU of the machine: half of what the sheet says of NVLink or PCIe, both ways together.
        source: where the numbers stand.
    """

    title: str
    called: str
    half: float
    tf32: float | None
    float32: float | None
    has_bfloat16: bool
    memory: int
    bandwidth: float
    link: float
    source: str

    def peak(self, dtype: torch.dtype, tf32: bool = False) -> float | None:
        """Operations a second of products in a type, float32 by TF32 if that is allowed; None where there is no such number."""
        if dtype == torch.float32:
            found = self.tf32 if tf32 and self.tf32 else self.float32
        else:
            found = None if dtype == torch.bfloat16 and not self.has_bfloat16 else self.half
        return None if found is None else found * 1e12


_PCIE3, _PCIE4, _PCIE5 = 128, 256, 512  # 16 lanes: 32, 64 and 128 GB/s both ways

DEVICES = {
    "v100-16": Device("V100 16 GB", r"V100-SXM2-16GB", 125, None, 15.7, False, 16, 900, 1200, "NVIDIA data sheet, V100 SXM2"),
    "v100-32": Device("V100 32 GB", r"V100-SXM2-32GB", 125, None, 15.7, False, 32, 900, 1200, "NVIDIA data sheet, V100 SXM2"),
    "t4": Device("T4", r"T4", 65, None, 8.1, False, 16, 320, _PCIE3, "NVIDIA data sheet, T4"),
    "a10": Device("A10", r"A10", 125, 62.5, 31.2, True, 24, 600, _PCIE4, "NVIDIA data sheet, A10"),
    "a100-40": Device("A100 40 GB", r"A100-(SXM4|PCIE)-40GB", 312, 156, 19.5, True, 40, 1555, 2400, "NVIDIA data sheet, A100 40GB"),
    "a100-80": Device("A100 80 GB", r"A100(-SXM4-80GB| 80GB PCIe)", 312, 156, 19.5, True, 80, 2039, 2400, "NVIDIA data sheet, A100 80GB"),
    "a6000": Device("RTX A6000", r"RTX A6000", 154.8, 77.4, 38.7, True, 48, 768, _PCIE4, "NVIDIA data sheet, RTX A6000"),
    "l4": Device("L4", r"L4", 121, 60, 30.3, True, 24, 300, _PCIE4, "NVIDIA data sheet, L4"),
    "l40s": Device("L40S", r"L40S", 362, 183, 91.6, True, 48, 864, _PCIE4, "NVIDIA data sheet, L40S"),
    "rtx3090": Device("RTX 3090", r"RTX 3090", 71, 35.6, 35.6, True, 24, 936, _PCIE4, "NVIDIA data sheet, RTX 3090"),
    "rtx4090": Device("RTX 4090", r"RTX 4090", 165.2, 82.6, 82.6, True, 24, 1008, _PCIE4, "NVIDIA data sheet, RTX 4090"),
    "rtx5090": Device("RTX 5090", r"RTX 5090", 209.5, 104.8, 104.8, True, 32, 1792, _PCIE5, "NVIDIA data sheet, RTX 5090"),
    "h100": Device("H100", r"H100( SXM\d?)? 80GB HBM3", 989.4, 494.7, 67, True, 80, 3350, 3600, "NVIDIA data sheet, H100 SXM"),
    "h100-pcie": Device("H100 PCIe", r"H100 PCIe", 756, 378, 51, True, 80, 2000, _PCIE5, "NVIDIA data sheet, H100 PCIe"),
    "h200": Device("H200", r"H200", 989.4, 494.7, 67, True, 141, 4800, 3600, "NVIDIA data sheet, H200 SXM"),
    "b200": Device("B200", r"B200", 2250, 1125, None, True, 180, 8000, 7200, "NVIDIA data sheet, HGX B200"),
}  # fmt: skip


def device(name: str) -> Device:
    """A device by its key in ``DEVICES``, in any case.

    Raises:
        ValueError: if there is none of this name.
    """
    if name.lower() not in DEVICES:
        raise ValueError(f"unknown gpu {name!r}; there are {', '.join(DEVICES)}")
    return DEVICES[name.lower()]


def device_called(name: str) -> Device | None:
    """The device that ``torch.cuda.get_device_name()`` calls by this name; None for one that is not in the table.

    Relatives with a word more (H100 NVL, RTX 4090 D, a laptop's) have other peaks and are not taken for it.
    """
    return next((one for one in DEVICES.values() if re.search(rf"(?:^|\s){one.called}$", name)), None)


def dtype_of(precision: str | int | None) -> torch.dtype:
    """Of the products at a Trainer's precision, such as ``bf16-mixed``."""
    named = str(precision)
    return torch.bfloat16 if named.startswith("bf16") else torch.float16 if named.startswith("16") else torch.float32
