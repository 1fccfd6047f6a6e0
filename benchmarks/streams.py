"""Many images: the listing of a million files, and an epoch over small ones as files and as shards.

    python benchmarks/streams.py [--images 200000] [--listed 1000000] [--workers 1] [--rounds 2] [--json FILE]

Makes them below the temporary folder (1.2 GB and 1.2 million inodes for the numbers above; ``TMPDIR`` says where), and removes them. An
epoch is that of a training loader with two views of 32 pixels: reading, decoding, cropping. Cold is after the kernel's caches were dropped,
which needs root. A worker's memory is its own (the proportional share of anonymous pages, without mapped files, which the kernel takes
back) after a tenth of an epoch and at its end. Linux only.
"""

import io
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from pairing import parser, save
from PIL import Image

from dino_lightning import MultiCropDataModule
from dino_lightning.__main__ import main
from dino_lightning.data import ImageFolder

_A_FOLDER = 1000


def write(root: Path, count: int, contents: list[bytes]) -> None:
    for i in range(count):
        folder = root / f"{i // _A_FOLDER:05}"
        if i % _A_FOLDER == 0:
            folder.mkdir(parents=True)
        descriptor = os.open(folder / f"{i:07}.jpg", os.O_CREAT | os.O_WRONLY)
        os.write(descriptor, contents[i % len(contents)])
        os.close(descriptor)


def listing(count: int, scratch: Path) -> dict[str, float]:
    root = scratch / "listed"
    write(root, count, [b""])
    seconds = {}
    for name in ("warm", "cold"):
        if name == "cold":
            os.sync()
            try:
                Path("/proc/sys/vm/drop_caches").write_text("3")
            except PermissionError:
                continue
        begin = time.perf_counter()
        assert len(ImageFolder(root)) == count
        seconds[f"{name}, s"] = round(time.perf_counter() - begin, 2)
    return seconds


def epoch(root: Path, workers: int) -> dict[str, float]:
    data = MultiCropDataModule(
        root, batch_size=128, num_workers=workers, global_crops_size=32, local_crops_number=0, global_crops_scale=(0.25, 1.0)
    )  # fmt: skip
    data.setup("fit")
    loader = data.train_dataloader()
    batches, memory = len(loader), []
    begin = time.perf_counter()
    for number, batch in enumerate(loader):  # noqa: B007, looked at behind the loop
        if number == 1:
            begin = time.perf_counter()  # the workers have begun
        if workers and number in (batches // 10, batches - 2):
            memory.append(max(_own_mb(process.pid) for process in loader._iterator._workers))
    assert not batch.unreadable
    rate = (batches - 2) * data.batch_size / (time.perf_counter() - begin)
    return {"images/s": round(rate)} | dict(zip(("worker after a tenth, MB", "worker at the end, MB"), memory))


def _own_mb(pid: int) -> float:
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:")) / 1024, 1)


if __name__ == "__main__":
    arguments = parser(__doc__, others=False)
    arguments.add_argument("--images", type=int, default=200_000)
    arguments.add_argument("--listed", type=int, default=1_000_000, help="0 for no listing")
    arguments.add_argument("--workers", type=int, default=1)
    args = arguments.parse_args()
    random, contents = np.random.default_rng(0), []
    for _ in range(100):
        buffer = io.BytesIO()
        small = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        small.resize((32, 32), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        contents.append(buffer.getvalue())
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        found = {"listing": listing(args.listed, scratch)} if args.listed else {}
        print(found, flush=True)
        write(scratch / "files", args.images, contents)
        main(["shard", "--root", str(scratch / "files"), "--output", str(scratch / "shards")])
        rounds: dict[str, list[dict]] = {"files": [], "shards": []}
        for number in range(args.rounds):
            for name in list(rounds) if number % 2 == 0 else list(rounds)[::-1]:
                rounds[name].append(epoch(scratch / name, args.workers))
                print(name, rounds[name][-1], flush=True)
        ratios = [shards["images/s"] / files["images/s"] for files, shards in zip(rounds["files"], rounds["shards"])]
        print("shards / files:", [round(ratio, 2) for ratio in ratios])
    save(args.json, found | {"rounds": rounds, "shards / files": ratios})
