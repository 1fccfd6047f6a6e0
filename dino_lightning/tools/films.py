"""Films as the tools write them: an .mp4, or a folder of pictures."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

from PIL import Image

from dino_lightning.data.frames import import_av

FOLDER_RATE = 25  # frames per second of what comes from a folder


def check_film(output: Path, source: Path) -> None:
    """Raises if ``output`` cannot be, or would harm what is there: FileExistsError, ValueError, ModuleNotFoundError."""
    if output.suffix.lower() == ".mp4":
        import_av()
        if output.exists() and output.samefile(source):
            raise ValueError(f"{output} is the film itself; choose another output")
    elif output.suffix.lower() in (".avi", ".gif", ".m4v", ".mkv", ".mov", ".webm"):
        raise ValueError(f"a film is written as .mp4; rename the output {output}")
    elif output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{output} exists and is no empty folder, whose frames would mix with these; choose another output")


@contextlib.contextmanager
def film_writer(output: Path, size: tuple[int, int], rate: float | Fraction) -> Iterator[Callable[[Image.Image], None]]:
    """A function that adds a picture of this size (width, height) to the film, or any to the folder."""
    if output.suffix.lower() != ".mp4":
        output.mkdir(parents=True, exist_ok=True)
        numbers = itertools.count(1)
        yield lambda picture: picture.save(output / f"{next(numbers):07d}.png")
        return
    av = import_av()
    output.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(output), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001), options={"crf": "18"})
        stream.pix_fmt = "yuv420p"  # which all players play, and which needs even sides
        stream.width, stream.height = even = tuple(2 * math.ceil(side / 2) for side in size)

        def encode(picture: Image.Image) -> None:
            page = Image.new("RGB", even, "white")
            page.paste(picture)
            container.mux(stream.encode(av.VideoFrame.from_image(page)))

        yield encode
        container.mux(stream.encode())
