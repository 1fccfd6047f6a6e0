"""How well features classify where few labels are given: k-NN and logistic regression on a few labels of each class, drawn several times."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dino_lightning.evaluation.knn import knn_accuracy
from dino_lightning.evaluation.spread import doubled
from dino_lightning.training.randomness import generator

_ROUNDS = 200  # of L-BFGS
_ROWS = 65_536  # of the bank at a time: a second one is not kept


class LowShot(NamedTuple):
    """Top-1 accuracies as fractions, the means over the draws of labels, and half of each mean's 95 % interval (NaN of one draw).

    The interval is Student's over the draws: it says how much the choice of labels matters, not that of the queries.
    """

    shots: float
    labels: int  # in a draw
    knn: float
    knn_margin: float
    logistic: float
    logistic_margin: float


def low_shot(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    shots: Sequence[float] = (0.01, 0.1, 5),
    *,
    draws: int = 5,
    k: int = 20,
    l2: float = 1e-4,
    seed: int = 0,
) -> list[LowShot]:
    """Accuracy of classifiers that know few labels (section 4.1 of the paper has 1 % and 10 %; others n of each class).

    Features are centred and scaled by the whole bank, which needs no labels, for the logistic regression.

    Args:
        bank: (N, D) features, of which some labels are given.
        bank_labels: (N,) all of them, integers from 0.
        queries: (M, D) features to classify.
        query_labels: (M,) their labels.
        shots: below 1 the share of each class's labels (rounded, at least one), else how many of each class (at most all).
        draws: of labels, each with a generator of its own.
        k: neighbours, at most as many as there are labels.
        l2: of the logistic regression (``logistic_regression``).
        seed: of the draws.

    Raises:
        ValueError: for shots that are no such number, no draw, or shapes that do not fit.
    """
    check_shots(shots, draws)
    mean = bank.float().mean(dim=0)
    squares = torch.stack([(some.float() - mean).square().sum() for some in bank.split(_ROWS)]).sum()
    scale = (squares / len(bank)).sqrt().clamp(min=1e-12)

    def points(features: Tensor) -> Tensor:
        return (features.float() - mean) / scale

    asked = points(queries)
    found = []
    for n in shots:
        accuracies = []
        for draw in range(draws):
            some = torch.from_numpy(_drawn(bank_labels.cpu().numpy(), n, seed, draw)).to(bank.device)
            voted, _ = knn_accuracy(bank[some], bank_labels[some], queries, query_labels, k=min(k, len(some)))
            weights, biases = logistic_regression(points(bank[some]), bank_labels[some], l2)
            right = (asked @ weights.T + biases).argmax(dim=1) == query_labels.to(bank.device)
            accuracies.append((voted, right.float().mean().item()))
        means, margins = np.mean(accuracies, axis=0).tolist(), _margins(np.array(accuracies)).tolist()
        found.append(LowShot(n, len(some), means[0], margins[0], means[1], margins[1]))
    return found


def check_shots(shots: Sequence[float], draws: int) -> None:
    """Raises ValueError for what ``low_shot`` does not take."""
    wrong = [n for n in shots if not (0 < n < 1 or (n >= 1 and n == int(n)))]
    if wrong or draws < 1:
        raise ValueError(f"shots are shares below 1, such as 0.01, or whole numbers of labels, and draws at least 1; got {wrong or draws}")


def logistic_regression(features: Tensor, labels: Tensor, l2: float) -> tuple[Tensor, Tensor]:
    """Weights (C, D) and biases (C,) that minimise the mean cross-entropy + l2/2 · ‖weights‖², by L-BFGS in float64.

    Args:
        features: (N, D).
        labels: (N,), integers below C; the greatest says what C is.
        l2: strength of the penalty.
    """
    x = doubled(features)
    y = labels.to(x.device)
    weights = torch.zeros(int(y.max()) + 1, x.shape[1], dtype=x.dtype, device=x.device, requires_grad=True)
    biases = torch.zeros(len(weights), dtype=x.dtype, device=x.device, requires_grad=True)
    solver = torch.optim.LBFGS(
        [weights, biases], max_iter=_ROUNDS, tolerance_grad=1e-7, tolerance_change=1e-12, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        solver.zero_grad()
        value = F.cross_entropy(x @ weights.T + biases, y) + l2 / 2 * weights.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        solver.step(loss)
    return weights.detach().float().to(features.device), biases.detach().float().to(features.device)


def _drawn(labels: np.ndarray, shots: float, seed: int, draw: int) -> np.ndarray:
    """Indices of the labels that are given, class by class."""
    random = generator(seed, draw)
    places = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    counts = [max(1, round(shots * len(where))) if shots < 1 else min(int(shots), len(where)) for where in places]
    return np.concatenate([random.permutation(where)[:count] for where, count in zip(places, counts)])


def _margins(values: np.ndarray) -> np.ndarray:
    """Half of the 95 % intervals of the means of (draws, kinds)."""
    n = len(values)
    if n < 2:
        return np.full(values.shape[1], np.nan)
    return _student(n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)


def _student(degrees: int) -> float:
    """The 97.5 % quantile of Student's distribution: where its density, from 0 on, has come to 0.475."""
    t = np.linspace(0, 13, 130_001)  # 12.7 with one degree of freedom
    density = (1 + t**2 / degrees) ** (-(degrees + 1) / 2)
    density *= math.exp(math.lgamma((degrees + 1) / 2) - math.lgamma(degrees / 2)) / math.sqrt(degrees * math.pi)
    return float(np.interp(0.475, np.cumsum((density[1:] + density[:-1]) / 2) * (t[1] - t[0]), t[1:]))
