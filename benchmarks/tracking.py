"""Objects of generated films, followed by patch features: J after twenty frames; and what it takes at 480 pixels.

    python benchmarks/tracking.py CHECKPOINT [--films 16] [--frames 21] [--json FILE]
    python benchmarks/tracking.py --size          # seconds a frame and peak memory of 480×832 frames on an untrained ViT-S/8

In a film an object of the generated scenes (`data.Scenes`) moves along a curve, grows or shrinks and turns, over clutter that moves
slowly the other way. The quickstart's checkpoint never saw films, nor these scenes. In clean films colours alone tell the object from the
rest, and an untrained network follows it as well; so the films are also shown as by a camera in the dark, with noise on every pixel of every
frame, which no training has shown to the network.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np
import torch
from pairing import save
from torch import Tensor, nn
from torch.nn import functional as F

from dino_lightning import VisionTransformer, load_backbone
from dino_lightning.backbones import redrawn
from dino_lightning.data import Scenes
from dino_lightning.data.painting import IMAGENET_MEAN, IMAGENET_STD, normalize
from dino_lightning.evaluation.tracking import Propagation, region_similarity

SIDE, FIRST = 128, 3 * 10**6  # pixels of a frame; scenes that no quickstart trains or measures on


def film(number: int, frames: int, noise: float) -> tuple[Tensor, np.ndarray]:
    """Frames (T, 3, side, side) of uint8 with noise of so many levels, and where the object is, bool (T, side, side)."""
    scenes, random = Scenes(2, FIRST + 2 * number, SIDE), np.random.default_rng(number)
    scene, ground = (torch.from_numpy(scenes[i][0]).permute(2, 0, 1).float() for i in (0, 1))
    mask = torch.from_numpy(scenes.mask(0)).float()
    rows, columns = np.nonzero(scenes.mask(0))
    centre = torch.tensor([columns.mean(), rows.mean()]) * 2 / SIDE - 1
    turn, growth, phase = random.uniform(-0.6, 0.6), random.uniform(-0.35, 0.35), random.uniform(0, 2 * np.pi)
    pictures, masks = [], []
    for t in np.linspace(0, 1, frames):
        angle, scale = turn * t, 0.6 * np.exp(growth * t)
        place = 0.35 * torch.tensor([np.sin(phase + 3 * t), np.cos(phase + 3 * t)])
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        matrix = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float32)  # from the frame to the scene
        offset = centre.float() - matrix @ place.float()
        grid = F.affine_grid(torch.cat([matrix, offset[:, None]], dim=1)[None], [1, 1, SIDE, SIDE], align_corners=False)
        moved = F.grid_sample(torch.cat([scene, mask[None]])[None], grid, align_corners=False)[0]
        where = moved[3] > 0.5
        behind = torch.roll(ground, (int(8 * t), int(-12 * t)), dims=(1, 2))
        pictures.append(torch.where(where, moved[:3], behind).clamp(0, 255).to(torch.uint8))
        masks.append(where.numpy())
    clean = torch.stack(pictures).float()
    levels = clean + noise * torch.randn(clean.shape, generator=torch.Generator().manual_seed(number))
    return levels.clamp(0, 255).to(torch.uint8), np.stack(masks)


@torch.no_grad()
def followed(backbone: nn.Module, frames: Tensor, first: np.ndarray, side: int) -> np.ndarray:
    """Where the object is found at last, bool (side of the frames)²."""
    large = F.interpolate(frames.float(), (side, side), mode="bilinear", antialias=True).round().to(torch.uint8)
    features = (backbone.forward_features(normalize(frame[None], IMAGENET_MEAN, IMAGENET_STD))[0].patches[0] for frame in large)
    patches = side // backbone.patch_size
    known = F.interpolate(torch.from_numpy(first)[None, None].float(), (patches, patches), mode="area")[0]
    propagation = Propagation(next(features), torch.cat([1 - known, known]))
    *_, last = map(propagation, features)
    whole = F.interpolate(last[None], frames.shape[-2:], mode="bilinear")[0]
    return (whole[1] > whole[0]).numpy()


def size() -> dict[str, float]:
    """Of frames as DAVIS has them."""
    network, seconds = VisionTransformer(img_size=224, patch_size=8, embed_dim=384, depth=12, num_heads=6).eval(), []
    propagation = None
    with torch.no_grad():
        for _ in range(12):
            frame = torch.rand(1, 3, 480, 832)
            begin = time.perf_counter()
            features = network.forward_features(frame)[0].patches[0]
            if propagation is None:
                propagation = Propagation(features, torch.rand(4, 60, 104))
            else:
                propagation(features)
                seconds.append(time.perf_counter() - begin)
    return {"seconds a frame": float(np.median(seconds)), "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("checkpoint", nargs="?")
    arguments.add_argument("--films", type=int, default=16)
    arguments.add_argument("--frames", type=int, default=21)
    arguments.add_argument("--side", type=int, default=192, help="pixels of the frames as the network sees them")
    arguments.add_argument("--noise", type=float, default=40.0, help="standard deviation in the noisy films, of 256 levels")
    arguments.add_argument("--size", action="store_true")
    arguments.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    arguments.add_argument("--json", type=Path)
    args = arguments.parse_args()
    found: dict[str, object] = size() if args.size else {}
    if args.checkpoint:
        backbone = load_backbone(args.checkpoint)
        networks = {"trained": backbone, "untrained": redrawn(backbone)}
        kinds = {"clean": 0.0, "noisy": args.noise}
        scores: dict[str, list[float]] = {f"{kind}, {name}": [] for kind in kinds for name in networks} | {"first mask": []}
        for number in range(args.films):
            for kind, noise in kinds.items():
                frames, masks = film(number, args.frames, noise)
                for name, network in networks.items():
                    scores[f"{kind}, {name}"].append(region_similarity(followed(network, frames, masks[0], args.side), masks[-1]))
            scores["first mask"].append(region_similarity(masks[0], masks[-1]))  # that of an object that stood still
        found |= {name: float(np.mean(values)) for name, values in scores.items()} | {"films": args.films}
    print({name: round(value, 3) for name, value in found.items()})
    save(args.json, found)
