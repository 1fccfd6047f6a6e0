"""Broken input, a lot of it: does every failure end in words of ours, and is nothing lost?

    python benchmarks/faults.py [--images 2000] [--configs 500] [--checkpoints 300] [--seed 0] [--json FILE]

Files of every format that is read, configs and checkpoints of small runs and exports of these are damaged at random: cut off, bits
turned over, stretches zeroed or repeated, parts of other files put in. Then

- images go through a training run of two workers. Each is also read alone: the run must end, and its ledger must name exactly those that
  cannot be read alone.
- configs are trained with for a step, checkpoints and exports are gone on with, read and adopted, each in a process of its own. It must
  end by itself within two minutes, with or without an error, and an error must be of ours: a line that says what is wrong, no traceback.
  (A config that lost its network trains the default one, a ViT-S, whose steps take longer here: "trains, slowly".)

Prints what did not hold, each with the command that shows it, and exits with 1 if there is anything. Linux only.
"""

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from dino_lightning import DINOModule, MultiCropDataModule, VisionTransformer, cli  # noqa: F401 (cli: once, before the forks)
from dino_lightning.__main__ import main
from dino_lightning.data.decode import UnreadableImage, read_image

_SECONDS = 120  # that a command on a damaged file may take
_HEALTHY = 3  # whole images for each damaged one
_BATCH = 32


def damaged(data: bytes, others: list[bytes], random: np.random.Generator) -> bytes:
    """The bytes of a file after one to three accidents."""
    for _ in range(random.integers(1, 4)):
        data = _ACCIDENTS[random.integers(len(_ACCIDENTS))](bytearray(data), others, random)
    return bytes(data)


def _cut(data: bytearray, others: list[bytes], random: np.random.Generator) -> bytes:
    return bytes(data[: random.integers(len(data) + 1)])


def _bits(data: bytearray, others: list[bytes], random: np.random.Generator) -> bytes:
    """Some of the first bytes as often as some of all: headers are where it hurts."""
    end = min(len(data), 64) if random.random() < 0.5 else len(data)
    for place in random.integers(0, end, random.integers(1, 12)) if end else []:
        data[place] ^= 1 << random.integers(8)
    return bytes(data)


def _bytes(data: bytearray, others: list[bytes], random: np.random.Generator) -> bytes:
    place, length = random.integers(0, len(data) + 1), int(random.integers(1, 32))
    data[place : place + length] = random.bytes(length)
    return bytes(data)


def _zeros(data: bytearray, others: list[bytes], random: np.random.Generator) -> bytes:
    place, length = random.integers(0, len(data) + 1), int(random.integers(1, 400))
    data[place : place + length] = bytes(length)
    return bytes(data)


def _repeated(data: bytearray, others: list[bytes], random: np.random.Generator) -> bytes:
    begin, end = sorted(random.integers(0, len(data) + 1, 2))
    return bytes(data[:end] + data[begin:end] + data[end:])


def _spliced(data: bytearray, others: list[bytes], random: np.random.Generator) -> bytes:
    other = others[random.integers(len(others))]
    return bytes(data[: random.integers(len(data) + 1)]) + other[random.integers(len(other) + 1) :]


_ACCIDENTS: list[Callable[[bytearray, list[bytes], np.random.Generator], bytes]] = [_cut, _bits, _bits, _bytes, _zeros, _repeated, _spliced]


def whole_images(random: np.random.Generator) -> dict[str, bytes]:
    """A small file of every format that is read, by what follows the name."""
    rgb = Image.fromarray(np.kron(random.integers(0, 256, (6, 8, 3), dtype=np.uint8), np.ones((7, 7, 1), np.uint8)))
    gray, deep = rgb.convert("L"), Image.fromarray(np.asarray(rgb.convert("L"), np.uint16) * 200)
    files = {}

    def keep(suffix: str, image: Image.Image, kind: str, **options) -> None:
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        files[suffix] = buffer.getvalue()

    for suffix in (".jpg", ".jpeg", ".jfif"):
        keep(suffix, rgb, "JPEG")
    keep("-progressive.jpg", rgb, "JPEG", progressive=True)
    keep("-gray.jpg", gray, "JPEG")
    keep("-cmyk.jpg", rgb.convert("CMYK"), "JPEG")
    keep("-turned.jpg", rgb, "JPEG", exif=_turned())
    for mode in ("RGB", "L", "P", "1", "RGBA", "LA"):
        keep(f"-{mode}.png", rgb.convert(mode), "PNG")
    keep("-16.png", deep, "PNG")
    keep(".bmp", rgb, "BMP")
    keep(".webp", rgb, "WEBP")
    keep("-whole.webp", rgb.convert("RGBA"), "WEBP", lossless=True)
    keep("-moving.webp", rgb, "WEBP", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)])
    keep(".tif", rgb, "TIFF")
    keep("-16.tif", deep, "TIFF")
    keep("-pages.tiff", gray, "TIFF", save_all=True, append_images=[gray, gray])
    for compression in ("tiff_lzw", "tiff_deflate", "packbits", "jpeg"):
        keep(f"-{compression}.tiff", rgb, "TIFF", compression=compression)
    keep(".gif", rgb, "GIF")
    keep("-moving.gif", rgb, "GIF", save_all=True, append_images=[rgb.rotate(90), rgb.rotate(180)])
    keep(".ppm", rgb, "PPM")
    keep(".pgm", gray, "PPM")
    keep(".pbm", gray.convert("1"), "PPM")
    keep(".jp2", rgb, "JPEG2000")
    for name, array in (
        ("", np.asarray(rgb)),
        ("-float", np.asarray(rgb, np.float32) / 255),
        ("-planes", np.asarray(rgb).transpose(2, 0, 1)),
    ):
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[f"{name}.npy"] = buffer.getvalue()
    return files


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def readable(path: Path) -> tuple[bool, float]:
    """Whether an image can be read alone, and the seconds that takes; any error but ours goes through."""
    begin = time.perf_counter()
    try:
        read_image(path)
    except UnreadableImage:
        return False, time.perf_counter() - begin
    return True, time.perf_counter() - begin


def images(count: int, random: np.random.Generator, folder: Path) -> tuple[dict, list[str]]:
    from lightning.pytorch import Trainer

    whole = whole_images(random)
    suffixes, others = list(whole), list(whole.values())
    photographs = folder / "photographs"
    photographs.mkdir()
    damaged_files = [photographs / f"{i:05}{suffixes[i % len(suffixes)]}" for i in range(count)]
    for path, suffix in zip(damaged_files, suffixes * (count // len(suffixes) + 1)):
        path.write_bytes(damaged(whole[suffix], others, random))
    healthy = -(-count * (1 + _HEALTHY) // _BATCH) * _BATCH - count  # no batch is left over
    for i in range(healthy):
        (photographs / f"whole{i:05}.jpg").write_bytes(whole[".jpg"])

    with ProcessPoolExecutor(1) as pool:  # a decoder that crashes takes this process along, not ours
        found = list(pool.map(readable, damaged_files))
    expected = {str(path) for path, (is_readable, _) in zip(damaged_files, found) if not is_readable}

    data = MultiCropDataModule(
        photographs, batch_size=_BATCH, num_workers=2, global_crops_size=16, local_crops_number=0, max_unreadable=1.0
    )  # fmt: skip
    backbone = VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=1, num_heads=1)
    module = DINOModule(backbone, out_dim=16, hidden_dim=16, bottleneck_dim=8, warmup_epochs=0)
    trainer = Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False
    )  # fmt: skip
    with _at_most(60 + count):
        trainer.fit(module, data)
    named = {line.partition(": ")[0] for line in data._unreadable._lines}
    wrong = [f"{path} can be read, and the ledger names it" for path in sorted(named - expected)]
    wrong += [f"{path} cannot be read, and the ledger does not name it" for path in sorted(expected - named)]
    facts = {"damaged": count, "of these unreadable": len(expected), "steps": trainer.global_step}
    return facts | {"longest read, s": round(max(seconds for _, seconds in found), 3)}, wrong


_WORDS = ["null", "true", "-1", "0", "1e309", "nan", "1000", "[]", "{}", "[1, 2, 3, 4]", "''", "lorem", "os.system", "../..", "0x10", "1_0"]


def damaged_config(text: str, random: np.random.Generator) -> str:
    """Other values, other keys, lines lost, repeated, indented, exchanged; or accidents of the file."""
    lines = text.splitlines()
    for _ in range(random.integers(1, 4)):
        place = int(random.integers(len(lines)))
        key, colon, value = lines[place].partition(":")
        word = _WORDS[random.integers(len(_WORDS))]
        match random.integers(8):
            case 0 | 1 | 2 if colon and value.strip():
                lines[place] = f"{key}: {word}"
            case 3 if key.strip():
                letter = int(random.integers(len(key)))
                lines[place] = f"{key[:letter]}{key[letter + 1 :]}{colon}{value}"
            case 4 if len(lines) > 1:
                del lines[place]
            case 5:
                lines.insert(place, lines[random.integers(len(lines))])
            case 6:
                lines[place] = " " * random.integers(0, 7) + lines[place].lstrip()
            case 7 if random.random() < 0.3:
                raw = damaged("\n".join(lines).encode("utf-8", "surrogateescape"), [word.encode()], random)
                lines = raw.decode("utf-8", "surrogateescape").splitlines() or [""]
    return "\n".join(lines) + "\n"


def configs(count: int, random: np.random.Generator, folder: Path) -> tuple[dict, list[str]]:
    plain = _plain_config(_images(folder / "images"))
    wrong, ends = [], Counter()
    for i in range(count):
        path = folder / f"{i}.yaml"
        path.write_bytes(damaged_config(plain, random).encode("utf-8", "surrogateescape"))
        args = ["fit", "--config", str(path), "--trainer.max_steps", "1", "--trainer.default_root_dir", str(folder / "run")]
        _judge(args, [path], ends, wrong)
        shutil.rmtree(folder / "run", ignore_errors=True)
    return {"damaged": count} | dict(ends), wrong


def checkpoints(count: int, random: np.random.Generator, folder: Path) -> tuple[dict, list[str]]:
    """Each in its place, with what reads it there."""
    photographs = _images(folder / "images")
    config = folder / "run.yaml"
    config.write_text(_plain_config(photographs))
    train = ["fit", "--config", str(config), "--trainer.default_root_dir", str(folder / "run")]
    _check(train + ["--trainer.max_steps", "2"])
    last = next((folder / "run").rglob("last.ckpt"))
    exports = ["torchhub", "safetensors", "timm"]
    for to in exports:
        _check(["export", "--checkpoint", str(last), "--to", to, "--output", str(folder / to)])
    weights = [path for to in exports for path in (folder / to).iterdir() if path.suffix in (".safetensors", ".pth", ".json", ".bin")]
    uses = [(last, [*train, "--trainer.max_steps", "3", "--ckpt_path", str(last)])]
    for path in [last, *weights]:
        source = str(path if path.suffix != ".json" else path.parent)
        uses.append(
            (path, ["attention", next(str(p) for p in photographs.rglob("*.png")), "--checkpoint", source, "--output", str(folder / "a")])
        )
        uses.append((path, [*train, "--trainer.max_steps", "1", "--model.weights", source]))
    uses.append((last, ["adopt", "--checkpoint", str(last), "--output", str(folder / "adopted.ckpt")]))
    wrong, ends = [], Counter()
    for i in range(count):
        path, args = uses[i % len(uses)]
        before = path.read_bytes()
        path.write_bytes(damaged(before, [other.read_bytes() for other in (last, *weights)], random))
        _judge(args, [path], ends, wrong)
        path.write_bytes(before)
        for written in ("a", "adopted.ckpt"):
            shutil.rmtree(folder / written, ignore_errors=True)
            (folder / written).unlink(missing_ok=True)
        for run in sorted((folder / "run" / "lightning_logs").iterdir())[1:]:
            shutil.rmtree(run)
    return {"damaged": count} | dict(ends), wrong


def _images(folder: Path) -> Path:
    random = np.random.default_rng(0)
    for i in range(8):
        (folder / f"class{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(folder / f"class{i % 2}" / f"{i}.png")
    return folder


def _plain_config(photographs: Path) -> str:
    return f"""# A run of seconds.
seed_everything: 1
data:
  root: {photographs}
  batch_size: 4
  num_workers: 0
  global_crops_size: 16
  global_crops_scale: [0.4, 1.0]
  local_crops_number: 1
  local_crops_size: 8
  color_jitter: [0.4, 0.4, 0.2, 0.1]
  blur_p: [1.0, 0.1, 0.5]
  hflip_p: 0.5
model:
  backbone:
    class_path: dino_lightning.VisionTransformer
    init_args:
      img_size: 16
      patch_size: 8
      embed_dim: 16
      depth: 1
      num_heads: 2
  out_dim: 16
  hidden_dim: 16
  bottleneck_dim: 8
  teacher_temp: 0.04
  momentum_teacher: 0.99
  optimizer: adamw
  lr: 0.001
  warmup_epochs: 0
  clip_grad: 3.0
trainer:
  accelerator: cpu
  max_epochs: 3
  enable_progress_bar: false
  callbacks:
    - class_path: dino_lightning.callbacks.CollapseDoctor
      init_args:
        stop: false
"""


def _check(args: list[str]) -> None:
    code, said = _run(args)
    if code != 0:
        raise RuntimeError(f"{' '.join(args)} ended with {code}:\n{said}")


def _judge(args: list[str], files: list[Path], ends: Counter, wrong: list[str]) -> None:
    """Counts how a command ends; a wrong end is kept with its files."""
    code, said = _run(args)
    if code == -signal.SIGALRM and "Epoch" in said:
        ends["trains, slowly"] += 1
        return
    last = [line for line in said.splitlines() if line.strip()][-3:]
    ours = any(line.startswith("dino-lightning: error: ") and len(line) > 40 for line in said.splitlines())
    if code == 0 or (code in (1, 2) and ours and "Traceback" not in said):
        ends["no error" if code == 0 else "our error"] += 1
        return
    ends["wrong"] += 1
    kept = Path(tempfile.mkdtemp(prefix="faults-"))
    for file in files:
        shutil.copy(file, kept)
    (kept / "said.txt").write_text(said)
    wrong.append(f"{' '.join(args)}\n  ended with {code}, its files are in {kept}:\n  " + "\n  ".join(last))


def _run(args: list[str]) -> tuple[int, str]:
    """Exit code (negative: of a signal) and what was said, of a command in a process of its own, a fork that has torch already."""
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        pid = os.fork()
        if pid == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.stdin.close()
            signal.alarm(_SECONDS)
            code = 99
            try:
                main(args)
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(pid, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


@contextlib.contextmanager
def _at_most(seconds: int):
    """Ends the process by SIGALRM, which nothing here catches."""
    signal.alarm(seconds)
    yield
    signal.alarm(0)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"images": (images, 2000), "configs": (configs, 500), "checkpoints": (checkpoints, 300)}
    for name, (_, count) in parts.items():
        arguments.add_argument(f"--{name}", type=int, default=count, help="how many are damaged; 0 for none")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--json", type=Path)
    arguments.add_argument("--rounds", type=int, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    os.environ.setdefault("WANDB_MODE", "offline")
    found, anything = {}, False
    for number, (name, (part, _)) in enumerate(parts.items()):
        if count := getattr(args, name):
            with tempfile.TemporaryDirectory() as scratch:
                begin = time.perf_counter()
                facts, wrong = part(count, np.random.default_rng([args.seed, number]), Path(scratch))
            found[name] = facts | {"seconds": round(time.perf_counter() - begin), "wrong": wrong}
            anything |= bool(wrong)
            print(name, json.dumps(facts), *wrong, sep="\n", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"results": found}))
    sys.exit(anything)
