"""Shards of images: what ``dino-lightning shard`` writes trains as the folder does, in an order that knows the shards."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images, write_labelled
from torch.utils.data import DistributedSampler

from dino_lightning import MultiCropDataModule
from dino_lightning.__main__ import main
from dino_lightning.data import Shards, find_splits, open_images
from dino_lightning.data.sampler import EpochSampler

pytest.importorskip("litdata")
SMALL = {"global_crops_size": 16, "local_crops_number": 0, "batch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """train/ and val/ of two classes, one image of which is broken and one a pipe, and their shards, two of each."""
    root = write_labelled(tmp_path_factory.mktemp("shards"))
    (root / "images" / "train" / "class1" / "broken.jpg").write_text("no image")
    os.mkfifo(root / "images" / "train" / "class1" / "pipe.jpg")
    main(["shard", "--root", str(root / "images"), "--output", str(root / "shards"), "--num_workers", "2"])
    return root


def batches(root, epoch=0, **options):
    data = MultiCropDataModule(root, **SMALL, max_unreadable=1.0, **options)
    data.setup("fit")
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)
    return [(data.paint(batch), batch.labels, batch.unreadable) for batch in loader]


def test_shards_hold_the_folder_here_and_at_an_address(folder, tmp_path):
    for split in ("train", "val"):
        images = open_images(folder / "images" / split)
        where = {os.path.relpath(images.path(i), images.root): i for i in range(len(images))}
        here, there = open_images(folder / "shards" / split), Shards(f"local:{folder}/shards/{split}", cache=str(tmp_path))
        assert isinstance(here, Shards) and len(here) == len(there) == len(images) and len(here.shard_ends) == 3
        names = [here.path(i).removeprefix(f"{here.root}/") for i in range(len(here))]
        assert sorted(names) == sorted(where) != names
        for i, name in enumerate(names):
            if name.endswith(("broken.jpg", "pipe.jpg")):
                continue
            (pixels, label), *others = images[where[name]], here[i], there[i]
            assert all(np.array_equal(pixels, other) and label == same for other, same in others)
        assert here.classes == there.classes == ["class0", "class1"]
    lines = (folder / "shards" / "train" / "SHA256SUMS").read_text().splitlines()
    for digest, name in map(str.split, lines):
        assert hashlib.sha256((folder / "shards" / "train" / name).read_bytes()).hexdigest() == digest
    assert find_splits(f"local:{folder}/shards") == (f"local:{folder}/shards/train", [f"local:{folder}/shards/val"])


def test_training_is_a_function_of_seed_and_epoch(folder):
    """Whatever the workers, and wherever the shards lie; unreadable images are named by where they lay."""
    here = batches(folder / "shards", epoch=1, num_workers=0)
    for other in (batches(folder / "shards", epoch=1, num_workers=2), batches(f"local:{folder}/shards", epoch=1, num_workers=2)):
        for (views, labels, _), (same, same_labels, _) in zip(here, other, strict=True):
            assert torch.equal(labels, same_labels) and all(map(torch.equal, views, same))
    first = batches(folder / "shards", num_workers=0)
    assert not torch.equal(first[0][0][0], here[0][0][0])
    lines = {line.partition(":")[0].removeprefix(f"{folder}/shards/train/class1/") for _, _, lines in first for line in lines}
    assert lines == {"broken.jpg", "pipe.jpg"}


def test_the_order_takes_one_shard_after_the_other(folder):
    shards = open_images(folder / "shards" / "train")
    for epoch in range(3):
        order = EpochSampler(shards, 4, seed=1)._order(epoch)
        assert sorted(order) == list(range(len(shards)))
        of_block = np.searchsorted(shards.shard_ends, order, side="right")
        assert (np.diff(of_block) != 0).sum() == len(shards.shard_ends) - 2
    ranks = [EpochSampler(shards, 2, num_replicas=2, rank=rank, seed=1) for rank in range(2)]
    assert isinstance(ranks[0], DistributedSampler)
    together = [index for pair in zip(*ranks) for index in pair]
    assert together == list(EpochSampler(shards, 4, seed=1))[: len(together)]


def test_a_run_on_shards_is_monitored_and_the_tools_take_them(folder, tmp_path, capsys):
    vit = {
        "class_path": "dino_lightning.VisionTransformer",
        "init_args": {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2},
    }
    options = {
        "data.num_workers": 0,
        "data.max_unreadable": 1.0,
        "model.backbone": json.dumps(vit),
        "model.out_dim": 16,
        "model.hidden_dim": 16,
    }
    options |= {f"data.{name}": value for name, value in SMALL.items()} | {"trainer.max_epochs": 2, "trainer.accelerator": "cpu"}
    main(
        [
            "fit",
            f"--data.root={folder}/shards",
            f"--trainer.default_root_dir={tmp_path}",
            *(f"--{name}={value}" for name, value in options.items()),
        ]
    )
    said = capsys.readouterr()
    assert "20 in 2 classes" in said.out + said.err and "val asked for the k-NN accuracy" in said.out + said.err
    main(["knn", "--checkpoint", str(next(tmp_path.rglob("last.ckpt"))), "--root", f"{folder}/shards", "--k", "3"])
    here = capsys.readouterr().out
    main(["knn", "--checkpoint", str(next(tmp_path.rglob("last.ckpt"))), "--root", f"local:{folder}/shards", "--k", "3"])
    assert "7 queries of" in here and here.splitlines()[1:] == capsys.readouterr().out.splitlines()[1:], "at an address too"


@pytest.mark.slow
def test_a_killed_shard_command_goes_on(tmp_path):
    write_images(tmp_path / "images", 1)
    (image,) = (tmp_path / "images").iterdir()
    for i in range(4000):
        (tmp_path / "images" / f"{i}{image.suffix}").write_bytes(image.read_bytes())
    output = tmp_path / "shards"
    options = ["--root", str(tmp_path / "images"), "--output", str(output), "--megabytes", "1", "--num_workers", "1"]
    command = [sys.executable, "-m", "dino_lightning", "shard", *options]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (output / "chunk-0-2.bin").exists():
        assert process.poll() is None
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "index.json").exists()
    first = (output / "chunk-0-0.bin").stat().st_mtime_ns
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    shards = Shards(output)
    assert (output / "chunk-0-0.bin").stat().st_mtime_ns == first
    assert len(shards) == 4001 == len({shards.path(i) for i in range(4001)})


def test_a_command_interrupted_behind_the_shards_goes_on(folder, tmp_path, capsys):
    args = ["shard", "--root", str(folder / "images" / "val"), "--output", str(tmp_path / "out"), "--num_workers", "1"]
    main(args)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    facts = index.pop("dino_lightning")
    (tmp_path / "out" / "index.json").write_text(json.dumps(index))
    (tmp_path / "out" / "SHA256SUMS").unlink()
    (tmp_path / "out" / ".begun.json").write_text(json.dumps({**{k: v for k, v in facts.items() if k != "bytes"}, "workers": 1}))
    main([*args[:-1], "2"])  # of another machine
    assert len(Shards(tmp_path / "out")) == 7 and (tmp_path / "out" / "SHA256SUMS").exists()
    with pytest.raises(SystemExit):
        main([*args, "--shorter", "8"])
    with pytest.raises(SystemExit):
        main([*args, "--shorter", "-5"])
    said = capsys.readouterr().err
    assert "by these options; name a new folder" in said and "shorter must be at least 1 pixel, got -5" in said


def test_what_is_wrong_is_named(folder, tmp_path, capsys):
    shards = folder / "shards" / "val"
    main(["shard", "--root", str(folder / "images"), "--output", str(folder / "shards"), "--num_workers", "2"])
    assert capsys.readouterr().out.count("are there already") == 2
    with pytest.raises(FileNotFoundError, match="no shards in .*: no index.json; dino-lightning shard writes them"):
        Shards(tmp_path)
    with pytest.raises(ValueError, match="has the classes class0, class1, and only these are known: class0"):
        Shards(shards, classes=["class0"])
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in shards.iterdir():
        (copied / file.name).write_bytes(file.read_bytes()[: -3 if file.name == "chunk-1-0.bin" else None])
    with pytest.raises(ValueError, match=r"chunk-1-0.bin has \d+ bytes instead of \d+: copy the folder again"):
        Shards(copied)
    index = json.loads((copied / "index.json").read_text())
    facts = index.pop("dino_lightning")
    pickled = {**index, "dino_lightning": facts, "config": {**index["config"], "data_format": ["pickle", "int", "no_header_numpy:1"]}}
    elsewhere = {**index, "dino_lightning": facts, "chunks": [{**chunk, "filename": "../chunk.bin"} for chunk in index["chunks"]]}
    for wrong in (index, pickled, elsewhere, [1], {"chunks": 3, "config": {}}):
        (copied / "index.json").write_text(json.dumps(wrong))
        for root in (copied, f"local:{copied}"):
            with (
                pytest.raises(ValueError, match="holds samples of another kind") if root == copied else pytest.raises(Exception, match=".")
            ):
                Shards(root, cache=str(tmp_path / "cache"))
    write_images(copied, 3)
    (copied / "index.json").write_text('{"photographer": "somebody"}')
    assert len(open_images(copied)) == 3, "a folder of images with an index of its own"
    for output, kind, words in (
        (folder / "images" / "train" / "shards", 1, "must lie outside of each other"),
        ("s3://bucket/shards", 1, "writes from folder to folder"),
        (Path(copied), 1, "holds something else than these images by these options"),
    ):
        with pytest.raises(SystemExit) as end:
            main(["shard", "--root", str(folder / "images" / "train"), "--output", str(output)])
        assert end.value.code == kind and words in capsys.readouterr().err
