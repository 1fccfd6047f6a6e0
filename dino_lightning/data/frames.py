"""The frames of a film, one after the other: from a folder of images or a video file (optional extra ``video``)."""

import logging
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from dino_lightning.data.decode import UnreadableImage, as_array, read_image
from dino_lightning.listing import IMAGE_EXTENSIONS

log = logging.getLogger(__name__)


class FolderFrames:
    """The images in a folder (not below it) as frames, in the order of the numbers in their names: frame10 after frame9.

    ``rate`` (frames per second) is None, since a folder does not tell.

    Raises:
        FileNotFoundError: for a folder without images.
    """

    rate: Fraction | None = None

    def __init__(self, folder: Path) -> None:
        images = (path for path in folder.iterdir() if path.suffix.lower() in IMAGE_EXTENSIONS and path.name[0] != ".")
        self.paths = sorted(images, key=_natural)
        self.count = len(self.paths)
        if not self.paths:
            raise FileNotFoundError(f"there are no images in {folder}; the frames must lie in it, not in folders below it")

    def read(self, in_chans: int = 3) -> Iterator[np.ndarray]:
        """One frame at a time, uint8 (H, W, in_chans). An unreadable one is named in the log and left out."""
        return (pixels for _, pixels in self.named(in_chans))

    def named(self, in_chans: int = 3) -> Iterator[tuple[str, np.ndarray]]:
        """The same behind the names of the files, without their extensions."""
        for path in self.paths:
            try:
                yield path.stem, read_image(path, in_chans)
            except UnreadableImage as error:
                log.warning("left out: %s", error)


class VideoFrames:
    """The frames of the first video stream of a file, turned upright as its metadata say.

    ``rate`` (frames per second, on average) and ``count`` are None where the file does not tell.

    Raises:
        ModuleNotFoundError: without PyAV, saying how to install it.
        ValueError: for a file that is no video.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        av = import_av()
        try:
            with av.open(str(path)) as container:
                stream = container.streams.video[0]
                self.rate: Fraction | None = stream.average_rate
                self.count: int | None = stream.frames or None
        except (av.error.FFmpegError, IndexError) as error:
            raise ValueError(f"{path} cannot be read as a video: {error}") from error

    def read(self, in_chans: int = 3) -> Iterator[np.ndarray]:
        """One frame at a time, uint8 (H, W, in_chans). Of a file that breaks off those before; the log says so."""
        av, done = import_av(), 0
        with av.open(str(self.path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            try:
                for frame in container.decode(stream):
                    upright = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))  # both counterclockwise
                    yield as_array(Image.fromarray(upright), in_chans)
                    done += 1
                reason = f"it has {self.count} by its header" if done < (self.count or 0) else ""
            except av.error.FFmpegError as error:
                reason = str(error)
        if reason:
            log.warning("left out: %s behind its first %d frames, where it breaks off: %s", self.path, done, reason)

    def named(self, in_chans: int = 3) -> Iterator[tuple[str, np.ndarray]]:
        """The same behind their numbers."""
        return ((f"{number:05d}", pixels) for number, pixels in enumerate(self.read(in_chans)))


def open_frames(source: str) -> FolderFrames | VideoFrames:
    """The frames of a folder of images or of a video file.

    Raises:
        FileNotFoundError: if there is no such file, or no image in the folder.
        ValueError: for one image, or a file that is no video.
        ModuleNotFoundError: for a video file without PyAV.
    """
    path = Path(source)
    if path.is_dir():
        return FolderFrames(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no folder of frames and no video file {source!r}")
    if path.suffix.lower() in IMAGE_EXTENSIONS - {".gif"}:
        raise ValueError(f"{source} is one image; pass the folder of the frames, or use dino-lightning attention")
    return VideoFrames(path)


def import_av() -> ModuleType:
    """PyAV, or an error that says how to install it."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("video files need PyAV: pip install av (or use folders of frames)", name="av") from error
    return av


def _natural(path: Path) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", path.name)  # every other one is a number
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name
