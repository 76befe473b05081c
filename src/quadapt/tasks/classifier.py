"""What classifiers of texts and of pictures have in common: a label for each example, or a value."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from quadapt.data.tables import Table
from quadapt.hf.head import Head
from quadapt.hf.kinds import Kind
from quadapt.tasks import metrics
from quadapt.tasks.base import Asking, Losses, Measured, Reading
from quadapt.tasks.examples import ByExamples, answered
from quadapt.tasks.labels import Labels, head_for, told
from quadapt.tasks.written import mean_loss


class Classifier(ByExamples):
    """A task in which each example has a label: one of several, any of several, or a value."""

    def head(self, config: Any, kind: Kind, data: Table, reading: Reading) -> Head | None:
        return head_for(self.kinds, config, kind, told(data), data.source, reading)

    def losses(self, config: Any) -> Losses:
        return Labels(config).losses()

    def measure(self, model: Any, prepare: Any, data: Table, asking: Asking) -> Measured:
        """Accuracy, F1 and Matthews correlation; of values the squared error and correlations.

        Raises:
            DataError: The loss is not finite.
        """
        labels, losses, logits, targets = Labels(model.config), list[Any](), list[Any](), list[Any]()
        found = self.encode(data, prepare, model.config, length=asking.length, reading=Reading())
        collate, of_labels = self.collator(prepare, model), labels.losses()
        for given, wanted in answered(model, found, collate, asking.batch_size, asking.progress("labels")):
            losses.append(of_labels(given, wanted))
            logits.append(given.float())
            targets.append(wanted)
        loss, _ = mean_loss(losses, found.report.source)
        figures = figures_of(labels, torch.cat(logits).numpy(), torch.cat(targets).numpy())
        words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
        asking.show(f"{words}, loss {loss:.4f} ({len(found.data):,} examples)")
        return {"loss": loss, "examples": len(found.data), "metrics": figures}


def figures_of(labels: Labels, logits: Any, targets: Any) -> dict[str, float]:
    """The figures of a classifier: of its likeliest labels, of all labels above one half, or of its values."""
    if labels.problem == "regression":
        return metrics.regression(targets.astype(np.float64), logits.reshape(-1).astype(np.float64))
    if labels.problem == "multi-label":
        return metrics.multi_label(targets > 0.5, logits > 0)
    return metrics.single_label(targets.astype(np.int64), logits.argmax(-1), len(labels.names))
