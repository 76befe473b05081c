"""Adapters by name: what they are on disk, what they declare, what they promise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest

from quadapt.errors import CheckpointError, ConfigError
from quadapt.nn.adapters import ADAPTERS, Adapter, LoRA, Param, Pooled, adapter_from
from quadapt.nn.adapters.base import FIRST
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

Make = Callable[..., QuantWeight]

# --- identity ---------------------------------------------------------------------------------------------------------


ALL: list[tuple[type[Adapter], dict[str, Any]]] = [
    (LoRA, {}),
    (Pooled, {}),
    (Pooled, {"pooling": "mean", "form": "side"}),
    (Pooled, {"offsets": "fp32"}),
]


@pytest.mark.parametrize(("kind", "settings"), ALL)
def test_an_adapter_is_known_again_by_its_identity(kind: type[Adapter], settings: dict[str, Any]) -> None:
    adapter = kind(**settings)
    assert adapter.identity() == {"kind": kind.kind, **asdict(adapter)}
    assert adapter_from(adapter.identity()) == adapter
    assert set(settings.items()) <= set(adapter.identity().items())


def test_every_kind_is_listed_under_its_name() -> None:
    assert {name: adapter.kind for name, adapter in ADAPTERS.items()} == {name: name for name in ADAPTERS}


@pytest.mark.parametrize("identity", [{"kind": "l5q"}, {}, {"kind": None}, {"pooling": "sum"}])
def test_unknown_kinds_are_refused(identity: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"is unknown. Known are .*elastic, elastic-pooled, l4q, lora"):
        adapter_from(identity)


@pytest.mark.parametrize("settings", [{"shape": "round"}, {"group_size": 32}])
def test_settings_of_another_version_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="Was it saved by another version"):
        adapter_from({"kind": "pooled", **settings})


@pytest.mark.parametrize("settings", [{"pooling": "max"}, {"form": "both"}, {"offsets": "bf16"}])
def test_settings_that_do_not_exist_are_refused(settings: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="is unknown"):
        Pooled(**settings)


def test_dropout_in_the_merged_form_is_refused(quant_weight: Make) -> None:
    layout = quant_weight(Format(bits=4)).layout
    with pytest.raises(ConfigError, match="no branch to drop"):
        Pooled().check(layout, 8, 0.1)
    Pooled(form="side").check(layout, 8, 0.1)
    LoRA().check(layout, 8, 0.1)


def test_what_a_merge_promises() -> None:
    assert (Pooled().exactness, Pooled(form="side").exactness, LoRA().exactness) == ("exact", "equivalent", "none")
    assert (Pooled().merged_form, Pooled(form="side").merged_form, LoRA().merged_form) == (True, False, False)


# --- declarations -----------------------------------------------------------------------------------------------------

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "scales": [{"pooled": True}],
    "l4q": [{"offsets": "none"}, {"offsets": "integer"}],
    "pooled": [{"form": "side"}],
    "code-lora": [{"train_scales": True}, {"train_scales": True, "train_offsets": True}],
    "lota": [{"shift_offsets": False}],
    "lora": [{"train_start": False}],
    "lora-fa": [{"train_start": False}],
    "elastic": [{"train_start": False}],
}
EVERY = [ADAPTERS[name](**settings) for name in ADAPTERS for settings in ({}, *SETTINGS.get(name, []))]
every = pytest.mark.parametrize("adapter", EVERY, ids=lambda adapter: str(adapter.identity()))


def declared(adapter: Adapter, *, started: bool = False) -> dict[str, Param]:
    layout = Layout(format=Format(bits=4, group_size=32), storage=Storage(), out=24, columns=96)
    return adapter.params(layout, 4, started=started)


@every
def test_what_is_declared_is_listed_for_the_kind(adapter: Adapter) -> None:
    """Files are known to be adapters of ours by these names."""
    names = {"A", "B", *adapter.extra}
    assert set(declared(adapter)) <= names
    extra = set(declared(adapter, started=True)) - names
    assert extra == (set(FIRST) if adapter.begins == "factors" else set())


@every
def test_what_is_from_before_training_is_frozen_and_what_moves_the_grid_is_not(adapter: Adapter) -> None:
    found = declared(adapter, started=True)
    frozen = {name for name, param in found.items() if not param.trains}
    assert {"start", *FIRST} & set(found) <= frozen
    assert not {"B", "beta", "rho", "shift"} & frozen
    idle = set(FIRST) & set(found) if getattr(adapter, "train_start", True) else set()
    assert {name for name, param in found.items() if not param.serves} == idle


@every
def test_scales_and_offsets_are_of_their_own_group(adapter: Adapter) -> None:
    grid = {name for name, param in declared(adapter).items() if param.trains and param.group == "grid"}
    assert grid == set(declared(adapter)) & {"rho", "shift"}


@every
def test_shapes_are_as_they_always_were(adapter: Adapter) -> None:
    """Old files hold them."""
    inputs = 3 if "pooled" in adapter.kind or getattr(adapter, "pooled", False) else 96
    want = {"A": (4, inputs), "B": (24, 4), "beta": (2,), "rho": (24, 3), "shift": (24, 3), "start": (2, 24, 3)}
    found = {name: param.shape for name, param in declared(adapter).items()}
    assert found == {name: want.get(name, shape) for name, shape in found.items()}
    assert adapter.inputs(Layout(format=Format(bits=4), storage=Storage(), out=24, columns=96)) == (
        inputs if "A" in found else 0
    )
