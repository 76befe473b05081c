"""Whether a model keeps packed examples apart.

Packing relies on what transformers does where there is no attention mask and `position_ids` restart: it masks what lies
before the restart. Models with an attention, or positions, of their own do not read `position_ids` so, and nothing
fails: the second example just sees the first. So it is not looked up by name but tried, on the very model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from quadapt.data.collate import Collator
from quadapt.errors import ConfigError
from quadapt.hf.context import context_of

TOLERANCE = 1e-4
"""Largest relative difference that is put down to rounding in float32."""

_FIRST, _SECOND = 11, 20


def check_packing(model: nn.Module) -> None:
    """Try one packed pair of examples.

    Raises:
        ConfigError: The second example depends on the first, or on its place in the sequence; or it cannot be tried.
    """
    name = type(model.get_base_model() if hasattr(model, "get_base_model") else model).__name__  # type: ignore[operator]
    try:
        found = crossing(model)
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        raise ConfigError(
            f"packing: {name} cannot be given packed examples ({' '.join(str(error).split())[:200]}). Leave --packing "
            "out"
        ) from error
    if found:
        raise ConfigError(
            f"packing: {name} does not keep packed examples apart: {found}. Leave --packing out; a larger --batch-size "
            "fills as much"
        )


@torch.no_grad()
def crossing(model: nn.Module) -> str:
    """What is wrong with the second of two packed examples; empty if nothing is.

    Its logits must be those that it has alone (up to rounding, which bfloat16 does more coarsely), and must not change
    with the tokens of the first example (where all shapes are equal, so that no rounding excuses a difference).
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        second = min(_SECOND, context_of(model.config))
        ids = torch.randint(0, _vocabulary(model), (3, max(_FIRST, second)), generator=torch.Generator().manual_seed(0))
        one, other, ours = ids[0, :_FIRST].tolist(), ids[1, :_FIRST].tolist(), ids[2, :second].tolist()
        alone = _logits(model, [ours])
        packed, changed = _logits(model, [one, ours]), _logits(model, [other, ours])
    finally:
        for module, mode in modes.items():
            module.training = mode
    if _distance(packed, changed) > TOLERANCE:
        return f"the logits of the second move by {_distance(packed, changed):.1g} of their norm with the first"
    eps = torch.finfo(alone.dtype).eps
    if _distance(alone, packed) > max(TOLERANCE, 8 * eps if eps > 1e-5 else 0):
        return f"the logits of the second differ by {_distance(alone, packed):.1g} of their norm from itself alone"
    return ""


def _logits(model: nn.Module, parts: Sequence[Sequence[int]]) -> Tensor:
    """Logits of the last of some packed examples."""
    sequence = {
        "input_ids": [token for part in parts for token in part],
        "labels": [token for part in parts for token in part],
        "position_ids": [at for part in parts for at in range(len(part))],
    }
    batch = Collator(0)([sequence])
    del batch["labels"]
    device = next(model.parameters()).device
    tensors = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}
    logits: Tensor = model(**tensors).logits[0, -len(parts[-1]) :]
    return logits


def _vocabulary(model: nn.Module) -> int:
    return int(model.get_input_embeddings().weight.shape[0])  # type: ignore[operator]


def _distance(one: Tensor, other: Tensor) -> float:
    first, second = one.float(), other.float()
    return float((first - second).norm() / first.norm().clamp_min(1e-30))
