"""k-means clusters, their agreement with labels, and the command that draws them."""

import csv
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dino_lightning.cli import main
from dino_lightning.evaluation.clusters import by_chance, kmeans, nmi, purity
from dino_lightning.tools.clusters import clusters
from dino_lightning.tools.extract import extract
from dino_lightning.tools.feature_folder import read_features
from dino_lightning.tools.thumbnails import ShortNames, Thumbnails

pytest.importorskip("sklearn")


def directions(counts, seed=0):
    """Features around as many orthogonal directions, of any length, and which: (N, 8) and (N,)."""
    generator = torch.Generator().manual_seed(seed)
    which = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features = torch.eye(8)[which] + 0.05 * torch.randn(len(which), 8, generator=generator)
    return features * (0.1 + 10 * torch.rand(len(which), 1, generator=generator)), which


def test_purity_and_mutual_information_of_a_case_by_hand():
    clusters = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])
    labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 3, 3, 3])
    assert purity(clusters, labels) == pytest.approx((3 + 2 + 3) / 10)
    assert purity(labels, labels) == 1.0 and purity(torch.zeros(10, dtype=torch.long), labels) == pytest.approx(0.3)
    halves, quarters = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 2, 3])
    assert nmi(halves, quarters) == pytest.approx(2 / 3, abs=1e-6), "ln 2 of information, (ln 2 + ln 4) / 2 of entropy"
    assert nmi(halves, torch.tensor([0, 1, 0, 1])) == pytest.approx(0, abs=1e-6)
    from sklearn.metrics import normalized_mutual_info_score

    assert nmi(clusters, labels) == pytest.approx(normalized_mutual_info_score(labels, clusters), abs=1e-6)


def test_chance_keeps_the_sizes_of_the_clusters():
    clusters, labels = torch.arange(600) // 300, torch.arange(600) % 3
    sizes = []
    by_chance(lambda dealt, _: sizes.append(dealt.bincount().tolist()) or 0.0, clusters, labels, draws=3)
    assert sizes == [[300, 300]] * 3
    assert 1 / 3 < by_chance(purity, clusters, labels) < 0.4 and by_chance(nmi, clusters, labels) < 0.02
    assert by_chance(purity, clusters, labels) == by_chance(purity, clusters, labels)
    assert by_chance(purity, torch.arange(600), labels) == 1.0, "what a cluster for each sample is worth"


@pytest.mark.parametrize("seed", range(3))  # of some, k-means itself has another order
def test_kmeans_finds_directions_the_largest_first(seed):
    features, which = directions([30, 60, 50, 10, 25])
    found, centres = kmeans(features, 5, seed)
    assert found.bincount().tolist() == [60, 50, 30, 25, 10]
    assert purity(found, which) == 1.0 and nmi(found, which) == pytest.approx(1)
    assert F.cosine_similarity(centres, torch.eye(8)[[1, 2, 0, 4, 3]]).min() > 0.99, "centres in the order of the clusters"
    again, _ = kmeans(features, 5, seed)
    assert torch.equal(found, again)


def test_many_features_are_clustered_in_mini_batches(monkeypatch):
    monkeypatch.setattr("dino_lightning.evaluation.clusters._LARGE", 100)
    features, which = directions([30, 60, 50])
    found, _ = kmeans(features, 3)
    assert purity(found, which) == 1.0 and found.bincount().tolist() == [60, 50, 30]


@pytest.mark.parametrize("k", [0, 11])
def test_as_many_clusters_as_there_can_be(k):
    with pytest.raises(ValueError, match=f"between 1 and the 10 features, got {k}"):
        kmeans(torch.randn(10, 4), k)


def test_without_scikit_learn_it_is_said_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match="pip install scikit-learn"):
        clusters("features")


@pytest.fixture
def features(tmp_path, checkpoints, monkeypatch):
    """Features of train/ and val/ with reddish and bluish plain images each, one of them read no more."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 3)):
        for name, color in (("red", (220, 40, 30)), ("blue", (20, 50, 210))):
            Path(f"photos/{split}/{name}").mkdir(parents=True)
            for i in range(count + (name == "red")):
                pixels = np.clip(np.array(color) + rng.normal(0, 25, (40, 40, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(f"photos/{split}/{name}/{i}.jpg")
    extract("photos", checkpoint=checkpoints[0], output="features")
    return Path("features")


def test_clusters_are_written_drawn_and_compared_with_the_folders(features, capsys):
    main(["clusters", "--features", "features", "--k", "2"])
    rows = list(csv.DictReader(open("clusters/clusters.csv")))
    vectors, paths, _ = read_features("features")
    assert [row["path"] for row in rows] == paths
    assert {(Path(row["path"]).parent.name, row["cluster"]) for row in rows} == {("red", "0"), ("blue", "1")}
    said = capsys.readouterr().out
    assert "20 images in 2 clusters of 11, 9" in said and "2 folders in which the images lie (blue, red)" in said
    assert "purity  1.000   by chance 0." in said and "nmi     1.000   by chance 0." in said
    page = np.asarray(Image.open("clusters/clusters.png"))
    thumbnails, shown = Thumbnails((32, 32), 3, lines=3), ShortNames(paths)
    height, width = thumbnails.cell()
    unit = F.normalize(vectors, dim=1)
    top = page.shape[0] - 2 * (height + 6)
    for row, (name, count) in enumerate((("red", 11), ("blue", 9))):
        members = [i for i, path in enumerate(paths) if f"/{name}/" in path]
        centre = unit[members].mean(dim=0)
        order = sorted(members, key=lambda i: -float(unit[i] @ centre / centre.norm()))
        assert len(members) == count
        for column, i in enumerate(order[:10], start=1):
            y, x = top + row * (height + 6), 6 + column * (width + 6)
            assert (page[y : y + height, x : x + width] == thumbnails.draw(paths[i], shown(paths[i]))).all(), (name, column)


def test_a_folder_without_classes_has_nothing_to_compare(checkpoints, image_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    extract("images", checkpoint=checkpoints[0], output="features")
    assert clusters("features", k=24) == {}
    assert "purity" not in capsys.readouterr().out and Path("clusters/clusters.png").exists()
    with pytest.raises(ValueError, match="between 1 and the 24 features, got 25"):
        clusters("features", k=25, output="more")
    assert not Path("more").exists()
