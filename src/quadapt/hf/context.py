"""How many tokens a model takes."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

MOST_CONTEXT = 2048
"""Longest default context for calibration and evaluation, in tokens; also taken for models that do not name theirs."""


def context_of(config: Any) -> int:
    """Positions that a model was made for."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return int(getattr(text, "max_position_embeddings", None) or MOST_CONTEXT)


def positions_of(model: nn.Module) -> int:
    """Tokens that a model takes at once: its positions, but for rows of the table that are for padding (RoBERTa)."""
    table = learnt_positions(model)
    owner = model.get_submodule(table) if table is not None and hasattr(model, table.partition(".")[0]) else None
    padding = owner.padding_idx if isinstance(owner, nn.Embedding) else None
    return context_of(model.config) - (0 if padding is None else padding + 1)


_POSITION = re.compile(r"(^|_)(wpe|pos|position|positions)(_|$)")


def learnt_positions(model: nn.Module) -> str | None:
    """Name of the table that holds a row for each position, if a model has one: it cannot go beyond; else None."""
    most = context_of(model.config)
    modules = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Embedding)]
    tables = {name: part.num_embeddings for name, part in modules}
    tables |= {name: len(buffer) for name, buffer in model.named_buffers() if buffer.ndim == 2}
    for name, rows in tables.items():  # some keep a few rows in front for padding
        if _POSITION.search(name.rpartition(".")[2]) and most <= rows <= most + 8:
            return name
    return None
