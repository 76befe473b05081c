"""Figures of classification and regression, defined as in scikit-learn, from a table of counts.

scikit-learn computes the same ones; it is no dependency, since what is needed of it are these few sums.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


def confusion(true: Ints, found: Ints, classes: int) -> Ints:
    """How often an example of a class was taken for which, as counts `[true class, found class]`."""
    table = np.zeros((classes, classes), dtype=np.int64)
    np.add.at(table, (true, found), 1)
    return table


def single_label(true: Ints, found: Ints, classes: int) -> dict[str, float]:
    """Accuracy, macro F1 and Matthews correlation, where each example has one label.

    F1 is the mean over the classes that occur, in the data or in the answers; with two classes `f1` is that of the
    second one, as is usual for yes and no, and `f1_macro` the mean of both.

    Args:
        true: The right class of each example, `[examples]`.
        found: The class that the model gives, `[examples]`.
        classes: How many classes there are.
    """
    table = confusion(true, found, classes)
    f1 = _f1(np.diag(table), table.sum(0), table.sum(1))
    occurs = (table.sum(0) + table.sum(1)) > 0
    macro = float(f1[occurs].mean())
    return {
        "accuracy": float(np.trace(table) / table.sum()),
        "f1": float(f1[1]) if classes == 2 else macro,
        "f1_macro": macro,
        "matthews": _matthews(table),
    }


def multi_label(true: NDArray[np.bool_], found: NDArray[np.bool_]) -> dict[str, float]:
    """How often all labels of an example are right, and micro and macro F1; both arguments are `[examples, labels]`."""
    hits, said, there = (true & found).sum(0), found.sum(0), true.sum(0)
    micro = _f1(hits.sum(keepdims=True), said.sum(keepdims=True), there.sum(keepdims=True))
    return {
        "accuracy": float((true == found).all(1).mean()),
        "f1": float(micro[0]),
        "f1_macro": float(_f1(hits, said, there).mean()),
    }


def regression(true: Floats, found: Floats) -> dict[str, float]:
    """Mean squared error, and the correlations of Pearson and Spearman (0 where one side is constant)."""
    from scipy.stats import rankdata

    return {
        "mse": float(np.square(true - found).mean()),
        "pearson": _correlation(true, found),
        "spearman": _correlation(rankdata(true), rankdata(found)),
    }


def spans(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """The entities in tags of the scheme BIO: kind, first word, and the word behind the last.

    An `I-` that goes on from nothing of its kind begins an entity, as CoNLL's own script has it.
    """
    found, kind, start = set[tuple[str, int, int]](), "", 0
    for at, tag in enumerate([*tags, "O"]):
        mark, _, of = tag.partition("-")
        goes_on = mark == "I" and of == kind
        if kind and not goes_on:
            found.add((kind, start, at))
            kind = ""
        if not goes_on and mark in ("B", "I"):
            kind, start = of, at
    return found


def entities(true: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> dict[str, float]:
    """Precision, recall and F1 of whole entities, each right if its kind and both its ends are."""
    pairs = [(spans(right), spans(said)) for right, said in zip(true, found, strict=True)]
    hits = sum(len(right & said) for right, said in pairs)
    said, there = (sum(len(pair[at]) for pair in pairs) for at in (1, 0))
    return {
        "precision": hits / said if said else 0.0,
        "recall": hits / there if there else 0.0,
        "f1": 2 * hits / (said + there) if said + there else 0.0,
    }


def _f1(hits: Ints, said: Ints, there: Ints) -> Floats:
    """`2 hits / (said + there)`; 0 where a class neither occurs nor is said to."""
    both = said + there
    found: Floats = np.divide(2.0 * hits, both, out=np.zeros(len(both)), where=both > 0)
    return found


def _matthews(table: Ints) -> float:
    """Gorodkin's form for any number of classes; 0 where all examples, or all answers, are of one class."""
    counts = table.astype(np.float64)
    true, found, total = counts.sum(1), counts.sum(0), counts.sum()
    covariance = np.trace(counts) * total - true @ found
    scale = (total**2 - found @ found) * (total**2 - true @ true)
    return float(covariance / np.sqrt(scale)) if scale > 0 else 0.0


def _correlation(one: Floats, other: Floats) -> float:
    if np.ptp(one) == 0 or np.ptp(other) == 0:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])
