"""The video command: frames from folders and real video files, in order, one at a time."""

import sys
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import write_images
from lightning.pytorch import Trainer
from PIL import Image

from dino_lightning import DINOModule, MultiCropDataModule
from dino_lightning.cli import main
from dino_lightning.data import frames
from dino_lightning.data.frames import FolderFrames, VideoFrames, open_frames
from dino_lightning.tools.video import _SteadySpan, video

av = pytest.importorskip("av")


def gray(level, size=(64, 48)):
    return Image.new("RGB", size, (level, level, level))


def write_film(path, levels, size=(64, 48), rate=Fraction(12), rotation=0):
    """A film whose frames are gray, each a level of its own, and white in the upper left quarter."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "10"})
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        if rotation:
            stream.set_display_rotation(rotation)
        for level in levels:
            image = gray(level, size)
            image.paste((255, 255, 255), (0, 0, size[0] // 2, size[1] // 2))
            container.mux(stream.encode(av.VideoFrame.from_image(image)))
        container.mux(stream.encode())
    return path


def levels_of(path):
    """Of each frame of a film the level in its lower right corner."""
    return [int(frame[-5:, -5:].mean().round()) for frame in VideoFrames(path).read()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    module = DINOModule(backbone="vit_tiny", img_size=16, patch_size=8, out_dim=64, hidden_dim=32, warmup_epochs=0)
    trainer = Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    views = {"global_crops_size": 16, "local_crops_size": 8, "local_crops_number": 1, "batch_size": 2, "num_workers": 0}
    trainer.fit(module, MultiCropDataModule(write_images(folder / "images", 4), **views))
    trainer.save_checkpoint(folder / "module.ckpt")
    return str(folder / "module.ckpt")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_folder_of_frames_is_in_the_order_of_its_numbers():
    Path("film").mkdir()
    numbers = [1, 2, 9, 10, 11, 100, 9_999, 10_000, 10_001, 100_000]
    for level, number in enumerate(reversed(numbers)):
        gray(10 * level).save(f"film/frame{number}.png")
    (Path("film/.hidden.png")).write_bytes(b"")
    (Path("film/notes.txt")).write_text("12")
    found = FolderFrames(Path("film"))
    assert [path.stem for path in found.paths] == [f"frame{number}" for number in numbers] and found.count == 10
    assert [frame[0, 0, 0] for frame in found.read()] == list(range(90, -10, -10))
    mixed = ["10_b.png", "9_b.png", "a2.png", "09_b.png", "b.png", "a10.png", "2.png"]
    assert sorted(map(Path, mixed), key=frames._natural) == [
        Path(name) for name in ("2.png", "09_b.png", "9_b.png", "10_b.png", "a2.png", "a10.png", "b.png")
    ]


def test_an_unreadable_frame_is_named_and_left_out(caplog):
    Path("film").mkdir()
    for number in range(3):
        gray(number).save(f"film/{number}.png")
    Path("film/1.png").write_bytes(b"no image")
    assert [frame[0, 0, 0] for frame in FolderFrames(Path("film")).read()] == [0, 2]
    assert "film/1.png" in caplog.text


def test_a_video_file_gives_its_frames_in_order():
    levels = list(range(20, 200, 15))
    film = open_frames(str(write_film("film.mp4", levels, rate=Fraction(30000, 1001))))
    assert film.count == 12 and film.rate == Fraction(30000, 1001)
    assert np.allclose(levels_of("film.mp4"), levels, atol=2)
    assert next(film.read(in_chans=1)).shape == (48, 64, 1)


@pytest.mark.parametrize(("rotation", "corner"), [(90, (1, 0)), (-90, (0, 1)), (180, (1, 1))])
def test_a_video_is_turned_upright(rotation, corner):
    """The white quarter, stored in the upper left, goes to the lower left by a quarter turn counterclockwise."""
    (frame,) = VideoFrames(write_film("film.mp4", [50], rotation=rotation)).read()
    assert frame.shape == ((48, 64, 3) if rotation == 180 else (64, 48, 3))
    middles = [[frame[int(y * frame.shape[0]), int(x * frame.shape[1])].mean() > 150 for x in (0.25, 0.75)] for y in (0.25, 0.75)]
    assert np.argwhere(middles).tolist() == [list(corner)]


def test_a_video_that_breaks_off_gives_the_frames_before(caplog):
    noise = np.random.default_rng(0).integers(0, 255, (20, 96, 128, 3), dtype=np.uint8)
    with av.open("film.mp4", "w", options={"movflags": "faststart"}) as container:  # the list of the frames comes first
        stream = container.add_stream("libx264", rate=12, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        for frame in noise:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame)))
        container.mux(stream.encode())
    data = Path("film.mp4").read_bytes()
    Path("film.mp4").write_bytes(data[: len(data) // 2])
    done = len(levels_of("film.mp4"))
    assert 0 < done < 20 and f"left out: film.mp4 behind its first {done} frames, where it breaks off" in caplog.text


def test_frames_and_pages_are_let_go_before_the_next_are_made(checkpoint, monkeypatch):
    module = sys.modules["dino_lightning.tools.video"]
    frames_made, pages_made, most = [], [], [0]

    def watched(made, thing):
        made.append(weakref.ref(thing))
        most[0] = max(most[0], sum(reference() is not None for reference in made))
        return thing

    class Film:
        rate, count = None, 12

        def read(self, in_chans):
            for level in range(self.count):
                yield watched(frames_made, np.full((16, 16, 3), level, dtype=np.uint8))

    draw = module.sheet
    monkeypatch.setattr(module, "open_frames", lambda source: Film())
    monkeypatch.setattr(module, "sheet", lambda *rows, **options: watched(pages_made, draw(*rows, **options)))
    assert video("film", checkpoint=checkpoint, image_size=16) == len(frames_made) == len(pages_made) == 12
    assert most[0] <= 3


def test_a_film_is_decoded_as_it_is_read(monkeypatch):
    decoded = []

    class Container:
        def __init__(self, path):
            self.opened = av.open(path)
            self.streams = self.opened.streams

        def decode(self, stream):
            for frame in self.opened.decode(stream):
                decoded.append(frame.pts)
                yield frame

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.opened.close()

    film = VideoFrames(write_film("film.mp4", [30] * 40))
    monkeypatch.setattr(frames, "import_av", lambda: SimpleNamespace(open=Container, error=av.error))
    reading = film.read()
    next(reading), next(reading)
    assert len(decoded) == 2
    assert len(list(reading)) == 38 and len(decoded) == 40


def test_video_command_from_a_film_to_a_film(checkpoint, capsys):
    write_film("film.mp4", [40, 90, 140, 190], size=(64, 36))
    main(["video", "film.mp4", "--checkpoint", checkpoint, "--output", "out/attention.mp4", "--image_size", "48"])
    assert "4 frames in out/attention.mp4" in capsys.readouterr().out
    film = VideoFrames(Path("out/attention.mp4"))
    pages = list(film.read())
    assert len(pages) == film.count == 4 and film.rate == 12
    shown = [page[page.shape[0] - 20, 200].mean() for page in pages]  # in the lower right of the frame, which comes first
    assert np.allclose(shown, [40, 90, 140, 190], atol=4)
    video("film.mp4", checkpoint=checkpoint, output="slow.mp4", fps=3.5)
    assert VideoFrames(Path("slow.mp4")).rate == Fraction(7, 2)


def test_video_command_from_a_folder_to_a_folder(checkpoint):
    Path("film").mkdir()
    for number in (9, 10, 11):
        gray(10 * number, size=(40, 40) if number < 11 else (80, 40)).save(f"film/{number}.png")
    assert video("film", checkpoint=checkpoint, output="out", head=2) == 3
    pages = [np.asarray(Image.open(path)) for path in sorted(Path("out").iterdir())]
    assert [path.name for path in sorted(Path("out").iterdir())] == ["0000001.png", "0000002.png", "0000003.png"]
    assert len({page.shape for page in pages}) == 1, "also of frames of another shape"
    assert [int(page[-120, 120].mean()) for page in pages] == [90, 100, 110]
    with pytest.raises(FileExistsError, match="out exists and is no empty folder"):
        video("film", checkpoint=checkpoint, output="out")


def test_heads_and_mass_are_taken_to_heart(checkpoint):
    write_film("film.mp4", [80], size=(64, 64))
    pages = []
    normalised = {"mean": (0.1, 0.1, 0.9), "std": (0.9, 0.1, 0.1)}
    for number, options in enumerate([{}, {"head": 1}, {"head": 3}, {"mass": 0.2}, normalised]):
        video("film.mp4", checkpoint=checkpoint, output=f"out{number}", image_size=64, **options)
        pages.append(np.asarray(Image.open(f"out{number}/0000001.png"))[-200:])
    for i in range(len(pages)):
        for other in pages[:i]:
            assert (pages[i] != other).any()


def test_the_range_of_the_colours_is_steady():
    """One bright frame among equal ones changes the colours of the next by a twenty-fifth of its difference."""
    span, maps = _SteadySpan(), torch.tensor([[0.1, 0.5]])
    for _ in range(100):
        low, high = span.follow(maps)
    assert (low, high) == pytest.approx((0.1, 0.5))
    span.follow(torch.tensor([[0.1, 3.0]]))
    assert span.follow(maps) == pytest.approx((0.1, 0.596))
    for _ in range(200):
        low, high = span.follow(2 * maps)
    assert (low, high) == pytest.approx((0.2, 1.0), rel=0.01), "and follows what changes for good"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["none.mp4"], FileNotFoundError, "no folder of frames and no video file 'none.mp4'"),
        (["empty"], FileNotFoundError, "no images in empty"),
        (["photo.png"], ValueError, "photo.png is one image"),
        (["text.mp4"], ValueError, "text.mp4 cannot be read as a video"),
        (["film", "film"], ValueError, "got 2"),
        (["film", "--head", "4"], ValueError, "head must lie between 1 and 3 .* got 4"),
        (["film", "--mass", "60"], ValueError, "it is a share"),
        (["film", "--fps", "0"], ValueError, "fps must lie between"),
        (["film", "--image_size", "0"], ValueError, "at least 1 pixel"),
        (["film", "--output", "out.avi"], ValueError, "written as .mp4; rename the output out.avi"),
        (["film.mp4", "--output", "film.mp4"], ValueError, "is the film itself"),
        (["broken"], ValueError, "none of the frames of broken can be read"),
    ],
)
def test_video_command_names_what_is_wrong(checkpoint, arguments, error, message):
    for folder in ("film", "empty", "broken"):
        Path(folder).mkdir()
    gray(9).save("film/1.png")
    gray(9).save("photo.png")
    Path("broken/1.png").write_bytes(b"no image")
    Path("text.mp4").write_text("no film")
    write_film("film.mp4", [1])
    with pytest.raises(error, match=message):
        main(["video", *arguments, "--checkpoint", checkpoint])
    assert not Path("attention_video").exists()


def test_without_pyav_folders_work_and_films_say_what_to_install(checkpoint, monkeypatch):
    write_film("film.mp4", [1])
    Path("film").mkdir()
    gray(9).save("film/1.png")
    monkeypatch.setitem(sys.modules, "av", None)
    for arguments in (["film.mp4"], ["film", "--output", "out.mp4"]):
        with pytest.raises(ModuleNotFoundError, match="pip install av"):
            main(["video", *arguments, "--checkpoint", checkpoint])
    assert video("film", checkpoint=checkpoint) == 1
