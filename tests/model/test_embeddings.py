"""Embeddings on the values of GGML's blocks: rounding twice changes nothing, and codes are found again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from quadapt.errors import ConfigError
from quadapt.model.embeddings import TYPES, quantized, recognized, round_embeddings


class Model(nn.Module):
    """An embedding and a head, as transformers' models hand them out."""

    def __init__(self, columns: int = 256, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(40, columns, dtype=dtype), nn.Linear(columns, 40, bias=False, dtype=dtype)
        self.embed.weight.data *= 0.02 * torch.rand(40, 1).to(dtype)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head


@pytest.mark.parametrize("kind", TYPES)
@given(
    values=arrays(
        np.float32,
        (2, 256),
        elements=st.one_of(st.floats(-4, 4, width=32), st.floats(-(2.0**-12), 2.0**-12, width=32), st.just(0.0)),
    ),
    narrow=st.booleans(),
)
def test_rounding_twice_changes_nothing(kind: str, values: np.ndarray, narrow: bool) -> None:
    narrow = narrow and not TYPES[kind].wide
    once = quantized(torch.from_numpy(values), kind, narrow=narrow).dequantize()
    assert bool(torch.isfinite(once).all())
    assert torch.equal(quantized(once, kind, narrow=narrow).dequantize(), once)
    found = recognized(once, kind)
    assert found is not None
    assert torch.equal(found.dequantize(), once)
    if narrow:
        assert torch.equal(once.bfloat16().float(), once)


@pytest.mark.parametrize(
    ("kind", "dtype", "most"),
    [
        ("q8_0", torch.float32, 0.006),
        ("q8_0", torch.bfloat16, 0.009),
        ("q8_0", torch.float16, 0.009),
        ("q6_k", torch.float32, 0.025),
    ],
)
@pytest.mark.parametrize("tied", [False, True])
def test_embedding_and_head_are_rounded_in_place(kind: str, dtype: torch.dtype, most: float, tied: bool) -> None:
    model, before = Model(tied=tied, dtype=dtype), Model(tied=tied, dtype=dtype)
    assert recognized(model.embed.weight, kind) is None
    layouts = round_embeddings(model, kind, {})
    assert list(layouts) == (["embed"] if tied else ["embed", "head"])
    assert {each.bits_per_weight for each in layouts.values()} == {{"q8_0": 8.5, "q6_k": 6.5625}[kind]}
    assert (model.head.weight is model.embed.weight) == tied
    for name in layouts:
        new, old = model.get_submodule(name).weight, before.get_submodule(name).weight
        assert new.dtype == dtype
        assert recognized(new, kind) is not None
        assert 0 < float((new.float() - old.float()).norm() / old.float().norm()) < most


def test_a_quantized_head_stays() -> None:
    model = Model()
    head = model.head.weight.clone()
    assert list(round_embeddings(model, "q8_0", {"head": model.head})) == ["embed"]
    assert torch.equal(model.head.weight, head)


@pytest.mark.parametrize(
    ("model", "kind", "dtype", "why"),
    [
        (Model(80), "q8_0", None, "80 numbers a row are no multiple of 32, as q8_0 needs. Use embeddings='float'"),
        (Model(96), "q6_k", None, "96 numbers a row are no multiple of 256, as q6_k needs. Use embeddings='q8_0'"),
        (Model(dtype=torch.bfloat16), "q6_k", None, "bfloat16 does not hold the values of q6_k"),
        (Model(), "q6_k", torch.float16, "float16 does not hold the values of q6_k"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(model: Model, kind: str, dtype: torch.dtype | None, why: str) -> None:
    before = model.embed.weight.clone()
    with pytest.raises(ConfigError, match=why):
        round_embeddings(model, kind, {}, dtype)
    assert torch.equal(model.embed.weight, before)


def test_a_model_that_is_cast_later_gets_values_that_fit() -> None:
    model = Model()
    round_embeddings(model, "q8_0", {}, torch.bfloat16)
    once = model.embed.weight.clone()
    assert torch.equal(model.to(torch.bfloat16).embed.weight.float(), once)


def test_values_that_are_not_finite_are_refused() -> None:
    model = Model()
    model.embed.weight.data[3, 3] = torch.nan
    with pytest.raises(ConfigError, match="NaN or infinite"):
        round_embeddings(model, "q8_0", {})
