"""Rankings and tracked labels against the definitions, gone through one by one."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dino_lightning.evaluation.retrieval import Whitening, average_precision, gem, rank, score
from dino_lightning.evaluation.tracking import Propagation, contour_accuracy, region_similarity, track


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
        context = [0, *[c for c in range(max(1, t - n), t)]] if n else [0]
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
    found = list(track(iter(frames), first, frames=n, radius=radius, k=k))
    for mine, expected in zip(found, brute_force(frames, first, n, radius, k, 0.1), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-6)


def test_wrong_numbers_of_a_propagation_are_named():
    features, labels = torch.rand(4, 3, 3), torch.rand(2, 3, 3)
    for options, words in (({"frames": -1}, "frames"), ({"radius": -1}, "radius"), ({"k": 0}, "k must be"), ({"temperature": 0.0}, "temperature")):
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
        if any(
            mask[y, x] != mask[min(y + dy, height - 1), min(x + dx, width - 1)] for dy, dx in ((0, 1), (1, 0), (1, 1))
        )
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
