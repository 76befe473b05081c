"""Figures of tasks against their definitions, computed the slow way, and against scikit-learn where it is installed."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from quadapt.tasks import metrics

DICE = np.random.default_rng(0)
CASES = [(DICE.integers(0, classes, 60), DICE.integers(0, classes, 60), classes) for classes in (2, 3, 5)]
CASES += [(np.array([0, 0, 1]), np.array([0, 0, 0]), 2), (np.array([2, 2]), np.array([2, 2]), 3)]


def _f1(true: Any, found: Any, label: int) -> float:
    hits = sum(t == f == label for t, f in zip(true, found, strict=True))
    said, there = sum(f == label for f in found), sum(t == label for t in true)
    if not hits:
        return 0.0
    precision, recall = hits / said, hits / there
    return 2 * precision * recall / (precision + recall)


def _matthews(true: Any, found: Any, classes: int) -> float:
    """Gorodkin's correlation of indicator matrices, summed over classes."""
    one, other = np.eye(classes)[true], np.eye(classes)[found]
    covariance = ((one - one.mean(0)) * (other - other.mean(0))).sum()
    scale = math.sqrt(((one - one.mean(0)) ** 2).sum() * ((other - other.mean(0)) ** 2).sum())
    return covariance / scale if scale else 0.0


@pytest.mark.parametrize("case", range(len(CASES)))
def test_one_label(case: int) -> None:
    true, found, classes = CASES[case]
    got = metrics.single_label(true, found, classes)
    there = sorted(set(true) | set(found))
    macro = float(np.mean([_f1(true, found, label) for label in there]))
    assert got["accuracy"] == pytest.approx(np.mean(true == found))
    assert got["f1_macro"] == pytest.approx(macro)
    assert got["f1"] == pytest.approx(_f1(true, found, 1) if classes == 2 else macro)
    assert got["matthews"] == pytest.approx(_matthews(true, found, classes), abs=1e-12)


def test_matthews_of_two_classes_is_the_textbook_one() -> None:
    true, found = np.array([1] * 6 + [0] * 4), np.array([1, 1, 1, 1, 0, 0, 1, 0, 0, 0])
    tp, fn, fp, tn = 4, 2, 1, 3
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert metrics.single_label(true, found, 2)["matthews"] == pytest.approx(wanted)


def test_several_labels() -> None:
    true, found = DICE.random((40, 4)) < 0.4, DICE.random((40, 4)) < 0.4
    got = metrics.multi_label(true, found)
    each = [_f1(true[:, label].astype(int), found[:, label].astype(int), 1) for label in range(4)]
    assert got["accuracy"] == pytest.approx(np.mean([list(t) == list(f) for t, f in zip(true, found, strict=True)]))
    assert got["f1_macro"] == pytest.approx(np.mean(each))
    assert got["f1"] == pytest.approx(_f1(true.ravel().astype(int), found.ravel().astype(int), 1))


def test_values() -> None:
    true = DICE.normal(size=30)
    found = 0.5 * true + 0.1 * DICE.normal(size=30)
    got = metrics.regression(true, found)
    assert got["mse"] == pytest.approx(((true - found) ** 2).sum() / 30)
    one, other = true - true.mean(), found - found.mean()
    assert got["pearson"] == pytest.approx((one @ other) / math.sqrt((one @ one) * (other @ other)))
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (true, found)]
    spread = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (30 * (900 - 1))  # without ties
    assert got["spearman"] == pytest.approx(spread)
    assert metrics.regression(true, np.zeros(30))["pearson"] == 0.0


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        (["B-PER", "I-PER", "O", "B-LOC"], {("PER", 0, 2), ("LOC", 3, 4)}),
        (["I-PER", "I-PER", "B-PER"], {("PER", 0, 2), ("PER", 2, 3)}),
        (["B-PER", "I-LOC", "I-LOC"], {("PER", 0, 1), ("LOC", 1, 3)}),
        (["O", "O"], set()),
        (["B-A", "B-A", "I-A"], {("A", 0, 1), ("A", 1, 3)}),
    ],
)
def test_entities_of_tags(tags: list[str], wanted: set[tuple[str, int, int]]) -> None:
    assert metrics.spans(tags) == wanted
    covered = sorted((start, end) for _, start, end in metrics.spans(tags))
    assert all(one[1] <= other[0] for one, other in pairwise(covered))


def test_entities_count_whole_ones() -> None:
    true = [["B-PER", "I-PER", "O", "B-LOC"], ["O", "B-PER"]]
    found = [["B-PER", "O", "O", "B-LOC"], ["B-LOC", "B-PER"]]
    got = metrics.entities(true, found)
    assert got == pytest.approx({"precision": 2 / 4, "recall": 2 / 3, "f1": 2 * 2 / (4 + 3)})
    assert metrics.entities([["O"]], [["O"]]) == {"precision": 0.0, "recall": 0.0, "f1": 0.0}


@pytest.mark.parametrize("case", range(len(CASES)))
def test_the_same_as_scikit_learn(case: int) -> None:
    sklearn: Any = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")
    true, found, classes = CASES[case]
    got = metrics.single_label(true, found, classes)
    assert got["accuracy"] == pytest.approx(sklearn.accuracy_score(true, found))
    assert got["f1_macro"] == pytest.approx(sklearn.f1_score(true, found, average="macro"))
    assert got["matthews"] == pytest.approx(sklearn.matthews_corrcoef(true, found))
