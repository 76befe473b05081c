"""How many tokens a model takes."""

from __future__ import annotations

from typing import Any

MOST_CONTEXT = 2048
"""Longest default context for calibration and evaluation, in tokens; also taken for models that do not name theirs."""


def context_of(config: Any) -> int:
    """Positions that a model was made for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", None) or MOST_CONTEXT)
