"""The benchmarks run, in their smallest form: each in a process of its own, as a person starts it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import two_colours
from PIL import Image

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(tmp_path, script, *arguments):
    """What the benchmark writes as JSON."""
    output = tmp_path / "out.json"
    command = [sys.executable, str(FOLDER / script), *map(str, arguments), "--rounds", "2", "--json", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(output.read_text())


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).resize((300, 240)).save(folder / f"{i}.jpg", quality=90)
    return folder


def test_views_of_photographs(tmp_path, photographs):
    found = run(tmp_path, "data.py", photographs)
    assert found["results"]["gate"]["painted otherwise"] == 0 and found["machine"]["torch"]
    worker, painted = (found["results"]["rounds"][name] for name in ("ours, worker", "ours, painted on the CPU"))
    assert len(worker) == len(painted) == 2 and min(painted) > min(worker) > 0


@pytest.mark.slow
def test_what_waits_for_a_gpu_runs_on_a_cpu(tmp_path):
    parts = run(tmp_path, "gpu.py", "--smoke")["results"]["parts"]
    assert list(parts) == ["tests", "painting", "vit_tiny, batch 2, eager", "end to end"]
    assert parts["tests"]["exit code"] == 0 and parts["end to end"]["eager"]["images/s"] > 0
    assert parts["vit_tiny, batch 2, eager"]["images/s"] > 0 and parts["painting"]["seconds"] > 0


@pytest.mark.slow
def test_what_a_gpu_will_learn_runs_on_a_cpu(tmp_path):
    root = two_colours(tmp_path / "images", counts=(16, 8))
    found = run(tmp_path, "gpu_results.py", "cifar10", "--network", "vit", "--root", root, "--minutes", 0.05, "--smoke")["results"]
    assert 0.4 <= found["k-NN"] <= 1 and found["images/s"] > 0 and found["peak MB"] > 100 and found["epochs"] >= 20


@pytest.mark.slow
def test_broken_input_ends_in_words_of_ours(tmp_path):
    found = run(tmp_path, "faults.py", "--images", 100, "--configs", 30, "--checkpoints", 30, "--seed", 1)["results"]
    assert found["images"]["of these unreadable"] > 30 and found["configs"]["our error"] > 5 and found["checkpoints"]["our error"] > 5


@pytest.mark.slow
def test_many_images_as_files_and_as_shards(tmp_path):
    found = run(tmp_path, "streams.py", "--images", 1000, "--listed", 2000)["results"]
    assert found["listing"]["warm, s"] < 5 and min(round["images/s"] for rounds in found["rounds"].values() for round in rounds) > 0


@pytest.mark.slow
def test_time_and_memory_of_the_loss(tmp_path):
    results = run(tmp_path, "loss.py", "--batch", 2, "--views", 4)["results"]
    assert all(value > 0 for what in ("time", "extra memory") for value in results[what]["rounds"]["ours"])


@pytest.mark.slow
@pytest.mark.skipif("DINO_REFERENCE" not in os.environ, reason="set DINO_REFERENCE to a checkout of facebookresearch/dino")
@pytest.mark.parametrize("script, arguments", [("step.py", ["--arch", "vit_tiny", "--k", 64, "--batch", 1]), ("loss.py", ["--batch", 2])])
def test_the_reference_agrees(tmp_path, script, arguments):
    results = run(tmp_path, script, *arguments, "--reference", os.environ["DINO_REFERENCE"])["results"]
    assert results["gate"] < 1e-6
