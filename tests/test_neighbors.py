"""Nearest features, near duplicates, and the commands that draw them."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_images
from PIL import Image
from torch.nn import functional as F

from dino_lightning.cli import main
from dino_lightning.evaluation import near_duplicates, nearest
from dino_lightning.evaluation import neighbors as search
from dino_lightning.pictures import captioned
from dino_lightning.tools.duplicates import duplicates
from dino_lightning.tools.extract import extract
from dino_lightning.tools.feature_folder import read_features
from dino_lightning.tools.neighbors import neighbors
from dino_lightning.tools.thumbnails import ShortNames, Thumbnails


def some(count, width=16, seed=0):
    return 5 * torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def cosines(a, b):
    return F.cosine_similarity(a.double()[:, None], b.double()[None], dim=-1)


@pytest.mark.parametrize("chunk", [1, 7, 50, 4096])
def test_nearest_is_brute_force_whatever_the_chunk(chunk):
    bank, queries = some(101), some(23, seed=1)
    similarities, indices = nearest(bank, queries, 9, chunk=chunk)
    expected, where = cosines(queries, bank).sort(dim=1, descending=True)
    assert torch.equal(indices, where[:, :9])
    torch.testing.assert_close(similarities, expected[:, :9].float())


def test_of_equally_similar_features_the_first_is_first():
    bank = torch.ones(12, 3)
    for chunk in (5, 100):
        similarities, indices = nearest(bank, torch.ones(2, 3), 12, chunk=chunk)
        assert indices.tolist() == [list(range(12))] * 2 and similarities.max() <= 1


def test_more_neighbours_than_there_are_is_said(caplog):
    similarities, indices = nearest(some(4), some(2), 6)
    assert indices.shape == (2, 4) and "k = 6 is more than the 4 features" in caplog.text


@pytest.mark.parametrize("chunk", [7, 13, 60, 4096])
def test_near_duplicates_are_brute_force_whatever_the_chunk(chunk):
    features = some(60)
    features[[7, 50]] = 3 * features[[21, 20]]
    similarities, pairs = near_duplicates(features, 0.4, chunk=chunk)
    everything = cosines(features, features)
    expected = {(i, j) for i in range(60) for j in range(i + 1, 60) if everything[i, j] >= 0.4}
    assert len(pairs) == len(expected) > 20 and set(map(tuple, pairs.tolist())) == expected
    assert pairs[:2].tolist() == [[7, 21], [20, 50]] or pairs[:2].tolist() == [[20, 50], [7, 21]]
    assert similarities.diff().max() <= 0
    torch.testing.assert_close(similarities, everything[pairs[:, 0], pairs[:, 1]].float())
    assert len(near_duplicates(features[:1], 0.4)[1]) == len(near_duplicates(features, 1.0 - 1e-9, chunk=chunk)[1]) - 2 == 0


def test_search_keeps_to_its_memory():
    """No matrix of more than chunk × chunk similarities is made, nor a whole copy of the bank."""
    largest = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                largest.append(out.numel())
            return out

    bank, queries = some(1000, 4), some(100, 4, seed=1)
    with Watch():
        nearest(bank, queries, 5, chunk=50)
        near_duplicates(bank, 0.99999, chunk=50)
    assert max(largest) == 50 * 50


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: nearest(some(3), some(2, 5), 1), "width 16, queries 5"),
        (lambda: nearest(some(0), some(2), 1), r"expected bank \(N, D\) with N ≥ 1, got \(0, 16\)"),
        (lambda: nearest(some(3), some(2), 0), "k must be at least 1, got 0"),
        (lambda: nearest(some(3) / 0, some(2), 1), "not finite"),
        (lambda: near_duplicates(some(3), 95), "got 95: it is a cosine"),
        (lambda: near_duplicates(some(3)[0], 0.5), "expected features"),
    ],
)
def test_what_cannot_be_searched(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_threshold_that_nearly_all_reach_is_refused(monkeypatch):
    monkeypatch.setattr(search, "_MOST_PAIRS", 40)
    assert len(near_duplicates(torch.ones(9, 2), 0.9, chunk=4)[1]) == 36
    with pytest.raises(ValueError, match="more than 40 pairs .* at least 0.9; raise the threshold"):
        near_duplicates(torch.ones(10, 2), 0.9, chunk=4)


@pytest.fixture(scope="module")
def photos(tmp_path_factory, checkpoints):
    """photos/a and photos/b with 0000.jpg to 0005.jpg each, b/0002.jpg a copy of a/0004.jpg; features/ of them."""
    root = tmp_path_factory.mktemp("photos")
    write_images(root / "photos/a", 6)
    for i in range(6):
        write_images(root / "other", 1, first=10 + i)
        (root / "photos/b").mkdir(exist_ok=True)
        shutil.copy(root / f"other/{10 + i:04d}.jpg", root / f"photos/b/{i:04d}.jpg")
    shutil.copy(root / "photos/a/0004.jpg", root / "photos/b/0002.jpg")
    extract(str(root / "photos"), checkpoint=checkpoints[0], output=str(root / "features"))
    return root


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def thumbnails(root, lines):
    return Thumbnails((32, 32), 3, lines), ShortNames([str(path) for path in root.rglob("photos/*/*.jpg")])


def contains(page, cell):
    """Where on the page (top, left) the cell is, to the pixel."""
    windows = np.lib.stride_tricks.sliding_window_view(page, cell.shape)[..., 0, :, :, :]
    likely = np.argwhere((windows[:, :, ::40, ::40] == cell[::40, ::40]).all(axis=(2, 3, 4)))
    return [(int(y), int(x)) for y, x in likely if (page[y : y + cell.shape[0], x : x + cell.shape[1]] == cell).all()]


def test_neighbours_are_found_and_drawn_in_order(photos, checkpoints):
    queries = [str(photos / "photos/a/0004.jpg"), str(photos / "other/0013.jpg")]
    main(["neighbors", *queries, "--features", str(photos / "features"), "--checkpoint", checkpoints[0], "--k", "3"])
    features, paths, _ = read_features(photos / "features")
    rows = list(csv.DictReader(open("neighbors/neighbors.csv")))
    page = np.asarray(Image.open("neighbors/neighbors.png"))
    draw, shown = thumbnails(photos, lines=4)
    for query, same in zip(queries, (queries[0], str(photos / "photos/b/0003.jpg"))):
        ranked = cosines(features[[paths.index(same)]], features)[0].argsort(descending=True, stable=True).tolist()
        expected = [paths[i] for i in ranked if paths[i] != query][:3]
        mine = [row for row in rows if row["query"] == query]
        assert [row["path"] for row in mine] == expected and [row["rank"] for row in mine] == ["1", "2", "3"]
        places = [contains(page, draw.draw(query, f"query\n{Path(query).name}"))]
        places += [contains(page, draw.draw(r["path"], f"{float(r['similarity']):.4f}\n{shown(r['path'])}")) for r in mine]
        places = [found[0] for found in places]
        assert len({y for y, _ in places}) == 1 and places == sorted(places), "in one row, from left to right"
    assert rows[0]["path"].endswith("b/0002.jpg") and float(rows[0]["similarity"]) > 0.99999, "the copy, not the query itself"
    assert float(rows[3]["similarity"]) > 0.9999 and rows[3]["path"].endswith("b/0003.jpg"), "a query from elsewhere"
    height, width = draw.cell()
    assert page.shape[1] == 6 + 4 * (width + 6) and 2 * height < page.shape[0] < 2 * height + 100


def test_neighbours_of_fewer_images_than_asked_for(photos, checkpoints, caplog):
    query = photos / "photos/a/0000.jpg"
    Path("broken.jpg").write_text("no image")
    found = neighbors(str(query), "broken.jpg", features=str(photos / "features"), checkpoint=checkpoints[0], k=50)
    assert [len(others) for others in found.values()] == [11] and "broken.jpg" in caplog.text
    linked = Path("link.jpg")
    linked.symlink_to(query)
    found = neighbors(str(linked), features=str(photos / "features"), checkpoint=checkpoints[0], k=2)
    assert str(query) not in {path for path, _ in found[str(linked.absolute())]}, "a link to it is the query itself, too"


def test_images_that_are_gone_are_said_to_be(photos, checkpoints, caplog):
    shutil.copytree(photos / "photos", "gone")
    extract("gone", checkpoint=checkpoints[0], output="features")
    shutil.rmtree("gone/b")
    found = neighbors("gone/a/0004.jpg", features="features", checkpoint=checkpoints[0], k=2)
    assert len(*found.values()) == 2 and "not drawn: cannot read" in caplog.text and "b/0002.jpg" in caplog.text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"checkpoint": 1}, ValueError, "is not of the weights of .*features of different networks"),
        ({"queries": "nowhere.jpg"}, FileNotFoundError, "no image or folder 'nowhere.jpg'"),
        ({"k": 0}, ValueError, "k must be at least 1, got 0"),
        ({"features": "."}, FileNotFoundError, "has no features.json"),
        ({"queries": "many"}, ValueError, "at most 100, got 101; name fewer"),
    ],
)
def test_neighbors_names_what_is_wrong(photos, checkpoints, options, error, message):
    Path("many").mkdir()
    for i in range(101):
        Path(f"many/{i}.jpg").touch()
    given = {"queries": str(photos / "photos/a/0000.jpg"), "features": str(photos / "features"), "checkpoint": 0, **options}
    given["checkpoint"] = checkpoints[given["checkpoint"]]
    with pytest.raises(error, match=message):
        neighbors(given.pop("queries"), **given)
    assert not Path("neighbors").exists()


def test_duplicates_are_listed_and_drawn(photos, capsys):
    main(["duplicates", "--features", str(photos / "features"), "--threshold", "0.99999"])
    (row,) = csv.DictReader(open("duplicates/duplicates.csv"))
    pair = [str(photos / name) for name in ("photos/a/0004.jpg", "photos/b/0002.jpg")]
    assert [row["path"], row["other"]] == pair and row["similarity"] == "1.000000"
    draw, shown = thumbnails(photos, lines=4)
    page = np.asarray(Image.open("duplicates/duplicates.png"))
    drawn = (draw.draw(path, f"{cosine}\n{shown(path)}") for path, cosine in zip(pair, ("1.0000", "")))
    left, right = (contains(page, cell) for cell in drawn)
    assert left[0][0] == right[0][0] and left[0][1] < right[0][1]
    said = capsys.readouterr().out
    assert "at least 0.99999: 1, among 12 images" in said and "drawn at random: median" in said
    assert "raise --threshold" not in said
    features, paths, _ = read_features(photos / "features")
    found = duplicates(str(photos / "features"), threshold=-0.9)
    assert len(found) == 12 * 11 // 2 and found[0][:2] == tuple(pair)
    assert "raise --threshold" in capsys.readouterr().out
    assert [cosine for _, _, cosine in found] == sorted((cosine for _, _, cosine in found), reverse=True)


def test_no_duplicates_leave_no_picture(photos, checkpoints):
    extract(str(photos / "photos/a"), checkpoint=checkpoints[0], output="features")
    duplicates("features", threshold=-0.9)
    assert Path("duplicates/duplicates.png").exists()
    assert duplicates("features", threshold=1.0) == []
    assert not Path("duplicates/duplicates.png").exists() and Path("duplicates/duplicates.csv").read_text().count("\n") == 1


def test_captions_have_their_room():
    image = np.full((40, 90, 3), 200, dtype=np.uint8)
    page = captioned(image, "W" * 200, lines=2)
    assert page.shape[1] == 90 and (page[:40] == image).all() and (page[40:] < 128).any() and (page[40:, 86:] == 255).all()
    assert page.shape == captioned(image, "", lines=2).shape and (captioned(image, "", lines=2)[40:] == 255).all()
    assert (captioned(image, "i\nj\nk", lines=2) != captioned(image, "i\nj", lines=2)).any(), "what is cut off is marked"
