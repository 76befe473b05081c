"""All experts of transformers that say how they stack: what the linear form computes is what their own loop does."""

from __future__ import annotations

import ast
import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from quadapt.model.linear_form import linear_form
from quadapt.nn.experts import Experts

MODELS = Path(transformers.__file__).parent / "models"


def _decorated() -> list[tuple[str, str]]:
    """Module and class of all experts that are declared with `use_experts_implementation`."""
    found = []
    for file in sorted(MODELS.glob("*/modeling_*.py")):
        text = file.read_text(encoding="utf-8")
        if "use_experts_implementation" not in text:
            continue
        for node in ast.parse(text).body:
            names = [ast.unparse(each) for each in getattr(node, "decorator_list", [])]
            if isinstance(node, ast.ClassDef) and any(name.startswith("use_experts_impl") for name in names):
                found.append((f"transformers.models.{file.parent.name}.{file.stem}", node.name))
    return found


class _Config:
    """Answers whatever sizes a class asks its config for."""

    _experts_implementation = "eager"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        kinds: dict[str, Any] = {
            "latent": None,
            "act": "silu",
            "alpha": 1.7,
            "limit": 7.0,
            "beta": 1.0,
            "eps": 1e-6,
            "intermediate": 48,
            "ffn": 48,
            "expert": 4,
            "hidden": 64,
            "size": 64,
        }
        return next((value for kind, value in kinds.items() if kind in name), 0)

    def __getitem__(self, at: int) -> int:
        return 4


@pytest.mark.parametrize(("module", "name"), _decorated(), ids=lambda value: value.rpartition(".")[2])
def test_what_they_compute_is_what_their_own_loop_does(module: str, name: str) -> None:
    own: Any = getattr(importlib.import_module(module), name)(_Config())
    for parameter in own.parameters():
        nn.init.normal_(parameter, std=0.3)
    holder = nn.ModuleDict({"experts": copy.deepcopy(own).eval()})
    other: Any = linear_form(holder)["experts"]  # type: ignore[index]
    assert isinstance(other, Experts)
    hidden, chosen = torch.randn(20, other[0].up_proj.in_features), torch.randint(0, 4, (20, 2))
    chosen[:, 1] = (chosen[:, 0] + 1) % 4  # no token is sent to one expert twice
    chosen[chosen == 2] = 0  # and none to this one
    chosen[:, 1] = torch.where(chosen[:, 1] == chosen[:, 0], 3 - chosen[:, 0], chosen[:, 1])
    weights = torch.rand(20, 2)
    with torch.no_grad():
        torch.testing.assert_close(other(hidden, chosen, weights), own.eval()(hidden, chosen, weights))
