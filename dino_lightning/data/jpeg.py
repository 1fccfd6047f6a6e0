"""JPEG files decoded faster where simplejpeg is installed (the extra ``jpeg``), with the same pixels as PIL's."""

import numpy as np

try:
    import simplejpeg
except ImportError:
    simplejpeg = None


def decode(data: bytes, mode: str) -> np.ndarray | None:
    """A JPEG file of PIL's mode RGB or L → uint8 (H, W, 3 or 1), not turned; None for what is better left to PIL.

    Both decode with libjpeg-turbo at its exact settings. What the decoder so much as warns of (cut off, damaged) is PIL's to judge.
    """
    if simplejpeg is None or mode not in ("RGB", "L"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "RGB" if mode == "RGB" else "GRAY", fastdct=False, fastupsample=False, strict=True)
    except ValueError:
        return None
