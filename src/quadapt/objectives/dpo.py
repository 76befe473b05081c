"""Preferences: of two answers to a prompt, the model is to think the one likelier that people prefer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor

from quadapt.nn.objective import OBJECTIVES, PairObjective
from quadapt.setting import Positive, Share, setting


@OBJECTIVES.register("dpo")
@dataclass(frozen=True, kw_only=True)
class DPO(PairObjective):
    r"""Direct preference optimization: the chosen answer gains more likelihood than the rejected one.

    $$
    L = -(1 - \epsilon) \log \sigma(\beta m) - \epsilon \log \sigma(-\beta m), \qquad
    m = \log \frac{\pi(c)}{\pi_0(c)} - \log \frac{\pi(r)}{\pi_0(r)}
    $$

    with the likelihoods of the chosen answer `c` and the rejected one `r` after their prompt, under the model that
    trains, `pi`, and under the one from before training, `pi_0`, which is the same model with its adapter switched off.

    Source: Rafailov et al. 2023, arXiv:2305.18290, equation 7; label smoothing is that of conservative DPO (Mitchell
    2023, "A note on DPO with noisy preferences").
    """

    summary: ClassVar[str] = "the preference of one answer over another, against the model from before training"

    beta: Positive = setting(panel="Training", default=0.1, name="dpo_beta")
    """How closely the model is held to the one from before training; larger is closer."""

    label_smoothing: Share = setting(panel="Training", default=0.0)
    """Share of the pairs that are taken to be the wrong way round."""

    def losses(self, margins: Tensor) -> Tensor:
        scaled = self.beta * margins
        right = -(1 - self.label_smoothing) * F.logsigmoid(scaled)
        return right - self.label_smoothing * F.logsigmoid(-scaled) if self.label_smoothing else right
