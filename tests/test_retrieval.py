"""Rankings and tracked labels against the definitions, gone through one by one."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dino_lightning import VisionTransformer
from dino_lightning.__main__ import main
from dino_lightning.evaluation.retrieval import Whitening, average_precision, gem, rank, score
from dino_lightning.evaluation.tracking import Propagation, contour_accuracy, region_similarity
from dino_lightning.evaluation.whole import SQUARE_ROOTS, thumbnail, whole_features
from dino_lightning.tools import copies, retrieval
from dino_lightning.tools.checkpoint import load_module


def precision_and_recall(ranked, wanted, n):
    found = sum(image in wanted for image in ranked[:n])
    return (found / n if n else 1.0), found / len(wanted)


def test_average_precision_is_the_area_under_precision_and_recall():
    rng = np.random.default_rng(0)
    for _ in range(20):
        ranked = rng.permutation(30)
        wanted = set(rng.choice(40, rng.integers(1, 9), replace=False).tolist())  # some of which are not in the database
        ranks = np.array([place for place, image in enumerate(ranked) if image in wanted], dtype=int)
        points = [precision_and_recall(ranked, wanted, n) for n in range(31)]
        area = sum((p1 + p0) / 2 * (r1 - r0) for (p0, r0), (p1, r1) in zip(points, points[1:]))
        usual = sum(p1 * (r1 - r0) for (_, r0), (p1, r1) in zip(points, points[1:]))
        assert average_precision(ranks, len(wanted)) == pytest.approx(area, abs=1e-12)
        assert average_precision(ranks, len(wanted), trapezoid=False) == pytest.approx(usual, abs=1e-12)


def test_junk_is_taken_out_and_queries_without_positives_do_not_count():
    order = np.array([[3, 0, 1, 2, 4], [0, 1, 2, 3, 4], [4, 3, 2, 1, 0]])
    found = score(order, [np.array([0, 2]), np.array([], int), np.array([0])], [np.array([3, 1]), np.array([]), np.array([])], at=(1, 2, 4))
    assert np.isnan(found.aps[1]) and found.aps[0] == 1.0 and found.aps[2] == pytest.approx((0 + 1 / 5) / 2)
    assert found.mean_ap == pytest.approx(np.nanmean(found.aps))
    assert found.precisions == pytest.approx([0.5, 0.5, 0.5])  # the first query has found all behind two, the last finds none in four
    with pytest.raises(ValueError, match="no query has positives"):
        score(order[:1], [np.array([])])


def test_a_ranking_is_by_falling_similarity():
    bank, queries = torch.tensor([[1.0, 0], [0, 1], [0, 1], [-1, 0]]), torch.tensor([[0.0, 1], [1, 0.5]])
    assert rank(bank, queries).tolist() == [[1, 2, 0, 3], [0, 1, 2, 3]] and rank(bank, queries, 2).shape == (2, 2)


def test_whitened_features_have_unit_variance_about_what_was_asked():
    random = torch.Generator().manual_seed(0)
    features = torch.randn(500, 6, generator=random) @ torch.randn(6, 6, generator=random) + 3
    white = Whitening(features, centred=True)(features).double()
    torch.testing.assert_close(white.T @ white / 500, torch.eye(6, dtype=torch.double), rtol=0, atol=1e-5)
    about_zero = Whitening(features)
    variances = torch.linalg.eigvalsh((features.T @ features / 500).double())
    torch.testing.assert_close(about_zero.scales.double() ** -2, variances, rtol=1e-5, atol=0)
    assert about_zero(about_zero.mean.float()[None]).abs().max() < 1e-4
    flat = Whitening(torch.cat([features, torch.zeros(500, 2)], dim=1), centred=True)
    assert flat.scales.max() == pytest.approx((1e-5 * (flat.scales**-2).max().item()) ** -0.5)
    patches = torch.rand(2, 3, 4, 5, generator=random) - 0.2
    expected = [[max(v, 1e-6) ** 4 for v in channel.flatten().tolist()] for channel in patches.flatten(0, 1)]
    torch.testing.assert_close(gem(patches).flatten(), torch.tensor([(sum(c) / 20) ** 0.25 for c in expected]))


def brute_force(frames, first, n, radius, k, temperature):
    """The labels of all frames, place by place."""
    height, width = frames[0].shape[1:]
    labels = [first]
    for t in range(1, len(frames)):
        context = [0, *range(max(1, t - n), t)] if n else [0]
        found = torch.zeros_like(first)
        for y in range(height):
            for x in range(width):
                votes = []
                for c in context:
                    for i in range(max(0, y - radius), min(height, y + radius + 1)):
                        for j in range(max(0, x - radius), min(width, x + radius + 1)):
                            cosine = F.cosine_similarity(frames[t][:, y, x], frames[c][:, i, j], dim=0).item()
                            votes.append((math.exp(cosine / temperature), labels[c][:, i, j]))
                best = sorted(votes, key=lambda vote: -vote[0])[:k]
                total = sum(weight for weight, _ in best)
                found[:, y, x] = sum(weight / total * label for weight, label in best)
        labels.append(found)
    return labels[1:]


@pytest.mark.parametrize(("n", "radius", "k"), [(2, 1, 5), (0, 2, 3), (7, 9, 4)])
def test_labels_are_carried_on_as_an_explicit_loop_would(n, radius, k, monkeypatch):
    monkeypatch.setattr("dino_lightning.evaluation.tracking._SCORES", 300)  # a row or two at a time
    random = torch.Generator().manual_seed(0)
    frames = list(torch.randn(5, 6, 5, 4, generator=random))
    first = torch.rand(3, 5, 4, generator=random)
    propagation = Propagation(frames[0], first, frames=n, radius=radius, k=k)
    for mine, expected in zip(map(propagation, frames[1:]), brute_force(frames, first, n, radius, k, 0.1), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


def test_wrong_numbers_of_a_propagation_are_named():
    features, labels = torch.rand(4, 3, 3), torch.rand(2, 3, 3)
    for options, words in (
        ({"frames": -1}, "frames"),
        ({"radius": -1}, "radius"),
        ({"k": 0}, "k must be"),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=words):
            Propagation(features, labels, **options)
    with pytest.raises(ValueError, match=r"features are of \(3, 3\) places, labels of \(3, 2\)"):
        Propagation(features, labels[:, :, :2])


def contour_by_hand(mask):
    height, width = mask.shape
    return {
        (y, x)
        for y in range(height)
        for x in range(width)
        if any(mask[y, x] != mask[min(y + dy, height - 1), min(x + dx, width - 1)] for dy, dx in ((0, 1), (1, 0), (1, 1)))
    }


def test_j_and_f_are_their_definitions():
    rng = np.random.default_rng(0)
    for size in ((30, 40), (90, 120)):
        y, x = np.mgrid[: size[0], : size[1]]
        for _ in range(3):
            masks = []
            for _ in range(2):
                cy, cx, r = rng.uniform(0.3, 0.7) * size[0], rng.uniform(0.3, 0.7) * size[1], rng.uniform(0.1, 0.4) * size[0]
                masks.append((y - cy) ** 2 + (x - cx) ** 2 < r**2)
            found, truth = masks
            assert region_similarity(found, truth) == pytest.approx((found & truth).sum() / (found | truth).sum())
            radius, contours = math.ceil(0.008 * math.hypot(*size)), [contour_by_hand(mask) for mask in masks]
            shares = [
                sum(any((a - c) ** 2 + (b - d) ** 2 <= radius**2 for c, d in other) for a, b in one) / len(one)
                for one, other in (contours, contours[::-1])
            ]
            expected = 2 * shares[0] * shares[1] / sum(shares) if sum(shares) else 0.0
            assert contour_accuracy(found, truth) == pytest.approx(expected, abs=1e-12)
    nothing, something = np.zeros((9, 9), bool), np.eye(9, dtype=bool)
    assert region_similarity(nothing, nothing) == contour_accuracy(nothing, nothing) == contour_accuracy(something, something) == 1
    assert region_similarity(nothing, something) == contour_accuracy(nothing, something) == contour_accuracy(something, nothing) == 0


def test_features_of_whole_images_at_several_sizes():
    network = VisionTransformer(img_size=32, patch_size=8, embed_dim=24, depth=2, num_heads=2).eval()
    images = torch.rand(1, 3, 45, 70)
    found = whole_features(network, images, SQUARE_ROOTS, "cls+gem")
    expected = []
    for factor, (height, width) in zip((1, 0.5**0.5, 0.5), ((40, 64), (24, 48), (16, 32))):  # 45 × 70, 31 × 49, 22 × 35
        scaled = images if factor == 1 else F.interpolate(images, scale_factor=factor, mode="bilinear")
        tokens = network.forward_features(scaled[..., :height, :width])[0]
        expected.append(torch.cat([tokens.cls, gem(tokens.patches)], dim=1))
    torch.testing.assert_close(found, sum(expected) / 3)
    assert whole_features(network, torch.rand(2, 3, 5, 9), pooling="gem").shape == (2, 24), "an image smaller than a patch"
    photo = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    assert thumbnail(photo, 45).shape == (3, 45, 30) and torch.equal(thumbnail(photo, 99), torch.from_numpy(photo).permute(2, 0, 1))
    assert thumbnail(photo[..., :2], 45).shape == (2, 45, 30)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """jpg/ with twelve photographs, in three class folders too."""
    root, rng = tmp_path_factory.mktemp("retrieval"), np.random.default_rng(0)
    (root / "jpg").mkdir()
    for i in range(12):
        (root / "classes" / f"class{i % 3}").mkdir(parents=True, exist_ok=True)
        colours = np.clip(rng.normal(60 * (i % 3 + 1), 50, (4, 5, 3)), 0, 255).astype(np.uint8)
        image = Image.fromarray(colours).resize((50, 40))
        for path in (root / "jpg" / f"building_{i:02}.jpg", root / "classes" / f"class{i % 3}" / f"{i:02}.png"):
            image.save(path)
    return root


def own_features(checkpoint, paths, longest):
    module, found = load_module(checkpoint), []
    for path in paths:
        image = Image.open(path)
        image.thumbnail((longest, longest), Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        pixels = (pixels - torch.tensor(module.images["mean"])[:, None, None]) / torch.tensor(module.images["std"])[:, None, None]
        height, width = (side // 8 * 8 for side in pixels.shape[1:])
        with torch.no_grad():
            found.append(module.evaluated.backbone(pixels[None, :, :height, :width])[0])
    return F.normalize(torch.stack(found), dim=1).numpy()


def by_hand(similarities, positives, ignored):
    """The area under precision and recall of one query."""
    ranked = [i for i in np.argsort(-similarities, kind="stable").tolist() if i not in ignored]
    points = [precision_and_recall(ranked, set(positives), n) for n in range(len(ranked) + 1)]
    return sum((p1 + p0) / 2 * (r1 - r0) for (p0, r0), (p1, r1) in zip(points, points[1:]))


def test_each_image_of_a_class_finds_the_others(photographs, small_checkpoint, capsys):
    found = retrieval(small_checkpoint, str(photographs / "classes"), compare=True)
    paths = sorted((photographs / "classes").glob("*/*.png"))
    features = own_features(small_checkpoint, paths, 32)
    labels = [path.parent.name for path in paths]
    aps = [by_hand(features @ features[i], [j for j in range(12) if labels[j] == labels[i] and j != i], [i]) for i in range(12)]
    assert found["trained"]["classes"][0] == pytest.approx(np.mean(aps), abs=1e-6)
    assert "12 queries among 12 images, longest side 32" in capsys.readouterr().out and "untrained" in found


def test_revisited_buildings_from_a_pickle_that_runs_no_code(photographs, small_checkpoint, tmp_path, capsys):
    names = [f"building_{i:02}" for i in range(12)]
    truths = [
        {"bbx": [5.0, 5, 45, 35], "easy": np.array([4, 5]), "hard": [6], "junk": np.array([7, 0])},
        {"bbx": [0, 0, 50, 40], "easy": [], "hard": np.array([4, 8]), "junk": []},
    ]
    root = tmp_path / "oxford"
    root.mkdir()
    (root / "jpg").symlink_to(photographs / "jpg")
    truth = {"imlist": names[2:], "qimlist": names[:2], "gnd": truths}
    (root / "gnd_roxford5k.pkl").write_bytes(pickle.dumps(truth, protocol=2))
    found = retrieval(small_checkpoint, str(root))["trained"]
    features = own_features(small_checkpoint, [root / "jpg" / f"{name}.jpg" for name in names], 224)
    similarities = [features[2:] @ features[query] for query in range(2)]
    expected = {
        "easy": [by_hand(similarities[0], [4, 5], [7, 0, 6])],
        "medium": [by_hand(similarities[0], [4, 5, 6], [7, 0]), by_hand(similarities[1], [4, 8], [])],
        "hard": [by_hand(similarities[0], [6], [7, 0, 4, 5]), by_hand(similarities[1], [4, 8], [])],
    }
    for setting, aps in expected.items():
        assert found[setting][0] == pytest.approx(np.mean(aps), abs=1e-6), setting
    plain = {**truth, "gnd": [{name: np.asarray(value).tolist() for name, value in query.items()} for query in truths]}
    (root / "gnd_roxford5k.pkl").unlink()
    (root / "gnd_roxford5k.json").write_text(json.dumps(plain))
    assert retrieval(small_checkpoint, str(root))["trained"] == found
    cropped = retrieval(small_checkpoint, str(root), crop_queries=True, image_size=32, scales=SQUARE_ROOTS, pooling="gem",
                        whiten_with=str(photographs / "classes"), trapezoid=False)["trained"]  # fmt: skip
    assert 0 < cropped["medium"][0] <= 1 and cropped != found
    (root / "gnd_roxford5k.json").unlink()

    class Trap:
        def __reduce__(self):
            return (tmp_path / "sprung").mkdir, ()

    for content, words in (
        (pickle.dumps({"gnd": Trap()}), "cannot be read safely: .*, which may be code"),
        (b"\x80\x02}q", "cannot be read safely"),
        (pickle.dumps({"imlist": [], "qimlist": []}), "no ground truth of revisited"),
        (pickle.dumps({**truth, "imlist": ["nowhere"]}), "1 images that gnd_roxford5k.pkl names are not there"),
        (pickle.dumps({**truth, "imlist": truth["imlist"][:2]}), "says of query 0 that image .* is what it means, but has 2 images"),
        (pickle.dumps({**truth, "gnd": []}), "has 2 queries, but the truth of 0"),
    ):
        (root / "gnd_roxford5k.pkl").write_bytes(content)
        with pytest.raises((ValueError, FileNotFoundError), match=words):
            retrieval(small_checkpoint, str(root))
    assert not (tmp_path / "sprung").exists()
    with pytest.raises(SystemExit):
        main(["retrieval", "--checkpoint", small_checkpoint, "--root", str(photographs / "jpg")])
    assert "has no class folders, and no gnd_roxford5k" in capsys.readouterr().err


def test_copies_are_found_by_the_letters_of_their_originals(tmp_path, small_checkpoint, capsys):
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((48, 36)) for _ in range(9)]
    for folder in ("original", "strong", "jpegqual/3"):
        (tmp_path / "copydays" / folder).mkdir(parents=True)
    for folder in ("others", "white"):
        (tmp_path / folder).mkdir()
    for i, photo in enumerate(photos[:4]):
        photo.save(tmp_path / "copydays" / "original" / f"20{i:02}00.jpg", quality=95)
        photo.save(tmp_path / "copydays" / "jpegqual/3" / f"20{i:02}00.jpg", quality=30)
        for j in (1, 2):
            photo.rotate(20 * j).crop((4, 4, 40, 30)).save(tmp_path / "copydays" / "strong" / f"20{i:02}0{j}.jpg")
    for i, photo in enumerate(photos[4:]):
        photo.save(tmp_path / "others" / f"{i}.png")
        photo.rotate(90).save(tmp_path / "white" / f"{i}.png")
    root = str(tmp_path / "copydays")
    options = {"distractors": str(tmp_path / "others"), "image_size": 32}
    found = copies(small_checkpoint, root, **options, ranked=3)["trained"]
    assert set(found) == {"strong", "jpegqual/3"} and found["jpegqual/3"] == 1.0
    # By hand, without whitening.
    module = load_module(small_checkpoint)

    def features(paths):
        rows = []
        for path in paths:
            pixels = (
                torch.from_numpy(np.array(Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC))).permute(2, 0, 1)
                / 255
            )
            mean, std = (torch.tensor(module.images[name])[:, None, None] for name in ("mean", "std"))
            with torch.no_grad():
                tokens = module.evaluated.backbone.forward_features(((pixels - mean) / std)[None])[0]
            rows.append(torch.cat([tokens.cls[0], gem(tokens.patches)[0]]))
        return F.normalize(torch.stack(rows), dim=1).numpy()

    bank = features(sorted((tmp_path / "copydays" / "original").iterdir()) + sorted((tmp_path / "others").iterdir()))
    aps = []
    for query, path in zip(features(queries := sorted((tmp_path / "copydays" / "strong").iterdir())), queries):
        ranked = np.argsort(-(bank @ query), kind="stable").tolist()[:3]
        points = [precision_and_recall(ranked, {int(path.name[2:4])}, n) for n in range(4)]
        aps.append(sum((p1 + p0) / 2 * (r1 - r0) for (p0, r0), (p1, r1) in zip(points, points[1:])))
    assert found["strong"] == pytest.approx(np.mean(aps), abs=1e-6)
    white = copies(small_checkpoint, root, **options, whiten_with=str(tmp_path / "white"), centred_whitening=True, compare=True)
    assert set(white) == {"trained", "untrained"} and "copies of 4 originals among 9 images" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="root must hold original/"):
        copies(small_checkpoint, str(tmp_path))
    for path in (tmp_path / "copydays" / "strong").iterdir():
        path.rename(path.with_name(f"x{path.name}"))
    with pytest.raises(ValueError, match="has the first 4 letters of an original, such as 200000.jpg"):
        copies(small_checkpoint, root, **options)
