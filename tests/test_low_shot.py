"""Few labels, drawn several times; and features as points of a plane."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from dino_lightning.evaluation import knn_accuracy
from dino_lightning.evaluation.embedding import has_umap, plane_pca, plane_umap
from dino_lightning.evaluation.low_shot import _drawn, _student, logistic_regression, low_shot


def blobs(n, classes=4, width=12, seed=0):
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, width, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    return centres[labels] + 1.2 * torch.randn(n, width, generator=random), labels


def test_logistic_regression_is_scikit_learns():
    features, labels = blobs(60)
    weights, biases = logistic_regression(features, labels, 1e-2)
    theirs = LogisticRegression(C=1 / (1e-2 * 60), tol=1e-10, max_iter=10_000).fit(features.double().numpy(), labels.numpy())
    # Theirs also lets a constant be added to all classes' biases.
    assert np.allclose(weights, theirs.coef_, atol=1e-4) and np.allclose(
        biases - biases.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-4
    )


def test_labels_are_drawn_class_by_class():
    labels = np.array([0] * 250 + [1] * 40 + [2])
    for shots, counts in ((0.01, [2, 1, 1]), (0.1, [25, 4, 1]), (3, [3, 3, 1])):
        some = _drawn(labels, shots, 0, 0)
        assert len(set(some.tolist())) == len(some) and np.bincount(labels[some]).tolist() == counts
        assert some.tolist() == _drawn(labels, shots, 0, 0).tolist() != _drawn(labels, shots, 0, 1).tolist()


def test_students_quantiles():
    assert [round(_student(n), 3) for n in (1, 2, 4, 30, 1000)] == [12.706, 4.303, 2.776, 2.042, 1.962]  # tables


def test_accuracies_and_their_intervals():
    (bank, bank_labels), (queries, query_labels) = blobs(200), blobs(100, seed=1)
    few, more = low_shot(bank, bank_labels, queries, query_labels, (1, 0.2), draws=3, k=5, seed=4)
    assert (few.labels, more.labels) == (4, 40) and few.logistic < more.logistic and few.knn < more.knn
    mean, scale = bank.mean(dim=0), (bank - bank.mean(dim=0)).norm(dim=1).square().mean().sqrt()
    voted, told = [], []
    for draw in range(3):
        some = _drawn(bank_labels.numpy(), 0.2, 4, draw)
        voted.append(knn_accuracy(bank[some], bank_labels[some], queries, query_labels, k=5)[0])
        model = LogisticRegression(C=1 / (1e-4 * 40), tol=1e-10, max_iter=100_000).fit(
            ((bank - mean) / scale)[some].numpy(), bank_labels[some].numpy()
        )
        told.append(model.score(((queries - mean) / scale).numpy(), query_labels.numpy()))
    margins = [4.303 * np.std(values, ddof=1) / 3**0.5 for values in (voted, told)]
    assert more.knn == pytest.approx(np.mean(voted)) and more.knn_margin == pytest.approx(margins[0], rel=1e-3) and margins[0] > 0.01
    # Two ways to the same optimum may differ in one of 300 votes.
    assert more.logistic == pytest.approx(np.mean(told), abs=0.004) and more.logistic_margin == pytest.approx(margins[1], abs=0.02)
    (alone,) = low_shot(bank, bank_labels, queries, query_labels, (1,), draws=1)
    assert np.isnan(alone.knn_margin)
    for shots, draws in (((0,), 3), ((1.5,), 3), ((2,), 0)):
        with pytest.raises(ValueError, match="shots are shares below 1"):
            low_shot(bank, bank_labels, queries, query_labels, shots, draws=draws)


@pytest.mark.parametrize("shape", [(40, 7), (5, 30)])
def test_points_of_a_plane_are_principal_components(shape):
    features = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    found = plane_pca(features).numpy()
    expected = PCA(2).fit_transform(torch.nn.functional.normalize(features, dim=1).double().numpy())
    assert np.allclose(abs(found), abs(expected), atol=1e-5) and np.allclose(found, plane_pca(features.flip(0)).flip(0).numpy(), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not has_umap(), reason="umap-learn is not installed")
def test_umap_keeps_neighbours():
    _, labels = blobs(80)  # well apart in twelve dimensions: all neighbours there are of one class
    features = 4 * torch.eye(4, 12)[labels] + 0.5 * torch.randn(80, 12, generator=torch.Generator().manual_seed(0))
    found = plane_umap(features)
    order = torch.cdist(found, found).argsort(dim=1)
    assert found.shape == (80, 2) and (labels[order[:, 1]] == labels).float().mean() > 0.95, "by chance a quarter"
