"""``dino-lightning track``: objects of a first frame, followed through a film."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from dino_lightning.data.frames import FolderFrames, VideoFrames, open_frames
from dino_lightning.data.painting import normalize
from dino_lightning.evaluation.spatial import side_multiple, spatial_features
from dino_lightning.evaluation.tracking import Propagation, contour_accuracy, region_similarity
from dino_lightning.tools.checkpoint import images_of, load_module, networks_of
from dino_lightning.tools.films import FOLDER_RATE, film_writer
from dino_lightning.tools.masks import read_mask

_DAVIS_SIDE, _DAVIS_STD = 480, (0.228, 0.224, 0.225)  # of the reference, whose first deviation is not ImageNet's
_DAVIS_LIST = Path("ImageSets", "2017", "val.txt")
_COARSE = 64  # pixels of which the longer side is a multiple there


class _Vote(NamedTuple):
    """Options of ``Propagation``."""

    frames: int
    radius: int
    k: int
    temperature: float


def track(
    *frames: str,
    checkpoint: str,
    mask: str | None = None,
    truth: str | None = None,
    output: str = "track",
    image_size: int | None = None,
    latest: int = 7,
    radius: int = 12,
    k: int = 5,
    temperature: float = 0.1,
    fps: float | None = None,
    mean: tuple[float, ...] | None = None,
    std: tuple[float, ...] | None = None,
    compare: bool = False,
) -> dict[str, tuple[float, float]]:
    """Follows what a mask marks in the first frame of a film: each patch is what the most similar ones of earlier frames were.

    Nothing is trained for it (section 4.2.2 of the paper). A few frames are in memory at a time, however long the film is.

    Args:
        frames: one folder of images, in the order of the numbers in their names, or one video file (with PyAV installed: pip install av);
            or the folder of DAVIS 2017 (``JPEGImages/480p``, ``Annotations/480p``, ``ImageSets/2017/val.txt``), all of whose films are
            followed and measured, the longer side of a frame cut to a multiple of 64 pixels as in the reference.
        checkpoint: of dino-lightning fit, or another source of weights: a file, a folder, a name such as dino_vits16.
        mask: image of the first frame's size with one channel: 0 is the background, and each other value an object. DAVIS has its own.
        truth: folder of such masks of all frames, to measure with: J, F and their mean, without the first and the last frame.
        output: new or empty folder: ``masks/`` with a PNG of each frame, and ``overlay.mp4`` (with PyAV; else pictures in ``overlay/``).
        image_size: pixels of the frames' shorter side; by default twice that of the training's global crops, for DAVIS 480.
        latest: frames that are asked beside the first.
        radius: patches by which something may have moved since any of them.
        k: patches that decide what a patch is.
        temperature: of their votes.
        fps: frames per second of the overlay; by default those of the video file, or 25.
        mean: per channel; by default the training's.
        std: per channel, likewise; for DAVIS that of the reference.
        compare: also how well the same network does untrained; with masks to measure by only.

    Returns:
        For "trained" (and "untrained") (J, F), the means over all objects; empty without truth.
    """
    if len(frames) != 1:
        raise ValueError(f"give one folder of frames, one video file, or the folder of DAVIS 2017, got {len(frames)}")
    is_davis = holds_davis(Path(frames[0]))
    if is_davis == (mask is not None):
        raise ValueError(
            "DAVIS has masks of its own; leave --mask out" if is_davis else "say by --mask MASK.png what to follow from the first frame on"
        )
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be at least 1 pixel, got {image_size}")
    if Path(output).exists() and (not Path(output).is_dir() or any(Path(output).iterdir())):
        raise FileExistsError(f"{output} exists and is no empty folder; choose another output")
    if fps is not None and not 0.1 <= fps <= 1000:
        raise ValueError(f"fps must lie between 0.1 and 1000 frames per second, got {fps}")
    if compare and not (is_davis or truth):
        raise ValueError("--compare measures, and needs --truth FOLDER, masks of all frames")
    vote = _Vote(latest, radius, k, temperature)
    module = load_module(checkpoint)
    asked = image_size or (_DAVIS_SIDE if is_davis else None)
    shown = images_of(module, asked, mean, std if std or not is_davis else _DAVIS_STD)
    side = asked or 2 * min(shown.size)
    if is_davis:
        films = list(_davis(Path(frames[0])))
    else:
        films = [_Film("", open_frames(frames[0]), Path(mask), _masks(Path(truth)) if truth else {})]
    networks = networks_of(module, compare)
    objects: dict[str, list[tuple[float, float]]] = {title: [] for title in networks}
    count = 0
    for film in films:
        first = read_mask(film.mask)
        numbers = [label for label in np.unique(first).tolist() if label]
        if not numbers:
            raise ValueError(f"the mask {film.mask} marks nothing: all its pixels are 0")
        for title, network in networks.items():
            look = _Look(network, module.device, shown.mean, shown.std, side, _COARSE if is_davis else None)
            begin = film.frames.paths[0].stem if isinstance(film.frames, FolderFrames) else None
            followed = _followed(look, film.frames.named(shown.in_chans), begin, first, vote)
            bar = tqdm(followed, desc=" ".join(filter(None, (film.name, title))), total=film.frames.count, leave=False)
            folder = Path(output) / film.name if title == "trained" else None
            found = _measured(bar, film, numbers, folder, fps or film.frames.rate or FOLDER_RATE)
            count += found.frames if folder else 0
            objects[title] += found.scores
    results = {title: tuple(np.mean(scores, axis=0).tolist()) for title, scores in objects.items() if scores}
    print(f"{count} frames in {output}")
    for title, (j, f) in results.items():
        print(f"{title:12}J {100 * j:5.1f}, F {100 * f:5.1f}, J&F {50 * (j + f):5.1f}, of {len(objects[title])} objects")
    return results


class _Film(NamedTuple):
    name: str
    frames: FolderFrames | VideoFrames
    mask: Path
    truths: dict[str, Path]  # by the frames' names; none without any


class _Followed(NamedTuple):
    frames: int
    scores: list[tuple[float, float]]  # J and F of each object


class _Look(NamedTuple):
    """How a network sees a frame (H, W, C): ``features`` of its places, (D, h, w), at ``side`` pixels of the shorter side."""

    network: nn.Module
    device: torch.device
    mean: Sequence[float]
    std: Sequence[float]
    side: int
    coarse: int | None  # pixels to a multiple of which the longer side is cut

    def size(self, height: int, width: int) -> tuple[int, int]:
        """In pixels."""
        patch = side_multiple(self.network)
        shorter = max(patch, self.side // patch * patch)
        step = self.coarse or patch
        longer = max(shorter, int(shorter * max(height, width) / min(height, width)) // step * step) // patch * patch
        return (longer, shorter) if height > width else (shorter, longer)

    def features(self, pixels: np.ndarray) -> Tensor:
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
        image = F.interpolate(image, self.size(*pixels.shape[:2]), mode="bilinear", align_corners=False).round().clamp(0, 255)
        return spatial_features(self.network, normalize(image.to(torch.uint8).to(self.device), self.mean, self.std))[0]


def holds_davis(root: Path) -> bool:
    """Whether it holds films in DAVIS 2017's layout."""
    return (root / _DAVIS_LIST).is_file()


def _followed(
    look: _Look, frames: Iterable[tuple[str, np.ndarray]], begin: str | None, first: np.ndarray, vote: _Vote
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Each frame's name, pixels (H, W, C) and objects (H, W), the ``first`` one's as given; its name is ``begin``, where that is known."""
    propagation, labels = None, int(first.max()) + 1
    for name, pixels in frames:
        if propagation is None:
            if pixels.shape[:2] != first.shape:
                raise ValueError(
                    f"the mask has {first.shape[1]}×{first.shape[0]} pixels, the first frame {pixels.shape[1]}×{pixels.shape[0]}"
                )
            if begin not in (None, name):
                raise ValueError(f"the first frame, {begin}, cannot be read, and the mask is of it")
            features = look.features(pixels)
            small = Image.fromarray(first).resize(features.shape[:0:-1], Image.Resampling.NEAREST)
            known = F.one_hot(torch.from_numpy(np.array(small)).long(), labels).permute(2, 0, 1).float().to(features.device)
            propagation = Propagation(features, known, *vote)
            yield name, pixels, first
            continue
        if pixels.shape[:2] != first.shape:
            raise ValueError(
                f"the frame {name} has {pixels.shape[1]}×{pixels.shape[0]} pixels, the first one {first.shape[1]}×{first.shape[0]}"
            )
        found = propagation(look.features(pixels))
        size = look.size(*pixels.shape[:2])
        whole = F.interpolate(found[None], size, mode="bilinear", align_corners=False)[0]
        low, high = (extreme(whole, dim=(1, 2), keepdim=True) for extreme in (torch.amin, torch.amax))
        spread = torch.where(high > 0, (whole - low) / (high - low).clamp(min=1e-12), whole)  # each label from 0 to 1
        best = spread.argmax(dim=0).to(torch.uint8).cpu().numpy()
        yield name, pixels, np.array(Image.fromarray(best).resize(pixels.shape[1::-1], Image.Resampling.NEAREST))


def _measured(
    followed: Iterable[tuple[str, np.ndarray, np.ndarray]], film: _Film, objects: Sequence[int], folder: Path | None, rate: float
) -> _Followed:
    """Writes what was found where a folder is given, and compares it with the truth where there is one."""
    scores: dict[int, list[tuple[float, float]]] = {}
    measured = dict(list(film.truths.items())[1:-1])  # the first is given, and the last does not count
    done = 0
    with contextlib.ExitStack() as stack:
        write = None
        for name, pixels, found in followed:
            if folder is not None:
                _indexed(found, folder / "masks" / f"{name}.png")
                write = write or stack.enter_context(film_writer(_film_name(folder), pixels.shape[1::-1], rate))
                write(_overlay(pixels, found))
            if name in measured:
                true = read_mask(measured[name], pixels.shape[:2])
                for label in objects:
                    one, other = found == label, true == label
                    scores.setdefault(label, []).append((region_similarity(one, other), contour_accuracy(one, other)))
            done += 1
    if film.truths and not scores:
        raise ValueError(f"none of the masks of {film.name or 'the film'} has the name of a frame between the first and the last")
    if not done:
        raise ValueError(f"none of the frames of {film.name or 'the film'} can be read; the log says why")
    return _Followed(done, [tuple(np.mean(of, axis=0)) for of in scores.values()])


def _davis(root: Path) -> Iterator[_Film]:
    for name in (root / _DAVIS_LIST).read_text(encoding="utf-8").split():
        if Path(name).name != name:  # it names a folder of the output, too
            raise ValueError(f"{root / _DAVIS_LIST} names {name!r}, which is no name of a film")
        masks = _masks(root / "Annotations" / "480p" / name)
        yield _Film(name, FolderFrames(root / "JPEGImages" / "480p" / name), next(iter(masks.values())), masks)


def _masks(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in FolderFrames(folder).paths}


def _film_name(folder: Path) -> Path:
    with contextlib.suppress(ModuleNotFoundError):
        import av  # noqa: F401

        return folder / "overlay.mp4"
    return folder / "overlay"


def _palette() -> np.ndarray:
    """(256, 3): the colours of VOC and DAVIS, in which three bits of a number go to the highest bits of red, green and blue, then three more."""
    numbers, colours = np.arange(256), np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((numbers >> (3 * place + channel) & 1) << (7 - place)).astype(np.uint8)
    return colours


def _indexed(mask: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(mask)
    image.putpalette(_palette().tobytes())
    image.save(path)


def _overlay(pixels: np.ndarray, mask: np.ndarray) -> Image.Image:
    """A frame with its objects in their colours, half transparent."""
    rgb = pixels if pixels.shape[2] == 3 else np.repeat(pixels[..., :1], 3, axis=2)
    painted = np.where((mask > 0)[..., None], rgb // 2 + _palette()[mask] // 2, rgb)
    return Image.fromarray(painted.astype(np.uint8))
