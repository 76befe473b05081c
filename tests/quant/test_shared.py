"""Scales that neighbouring groups share: what is stored, how roundings choose them, and how they train."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import quadapt
from quadapt.errors import ConfigError
from quadapt.hf.peft_layer import adapted_layers
from quadapt.nn.adapters.l4q import L4Q
from quadapt.nn.adapters.scales import Scales
from quadapt.quant.format import Format, Zero
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import STORAGES, Storage
from quadapt.quant.weight import Layout, QuantWeight

NAMES = [name for name, each in STORAGES.items() if each.shared > 1]
OUT, IN = 12, 16 * 11  # the last run of four has three groups


def layout_of(zero: Zero = "float", bits: int = 4, scales: str = "fp16-shared4", columns: int = IN) -> Layout:
    format = Format(bits=bits, group_size=16, zero=zero)
    return Layout(format=format, storage=Storage.floating(scales, zero), out=OUT, columns=columns)


def test_there_are_some_and_they_take_the_bits_that_they_say() -> None:
    assert NAMES == ["fp16-shared2", "fp16-shared4", "fp16-shared8"]
    assert layout_of(columns=256).bits_per_weight == 4 + 16 / 16 + 16 / 64
    assert layout_of("integer", 3, "fp16-shared8", 256).bits_per_weight == 3 + 8 / 16 + 16 / 128
    assert layout_of("none", 2, "fp16-shared2", 256).bits_per_weight == 2 + 16 / 32


@pytest.mark.parametrize("name", NAMES)
@given(
    values=arrays(
        np.float32, st.tuples(st.integers(1, 3), st.integers(1, 19)), elements=st.floats(2.0**-14, 2.0**15, width=32)
    )
)
def test_the_largest_of_a_run_is_stored_for_all_of_it(name: str, values: np.ndarray) -> None:
    storage, size = STORAGES[name], STORAGES[name].shared
    kept = storage.encode(torch.from_numpy(values), centre=True)
    found = storage.decode(kept, tuple(values.shape))
    for at in range(0, values.shape[1], size):
        run = slice(at, at + size)
        want = values[:, run].max(1, keepdims=True).astype(np.float16).astype(np.float32)
        assert np.array_equal(found[:, run].numpy(), np.broadcast_to(want, values[:, run].shape))
    assert torch.equal(storage.rounded(found), found)
    assert torch.equal(storage.encode(found, centre=True)[""], kept[""])
    above = storage.above(torch.from_numpy(values))
    assert bool((above >= torch.from_numpy(values)).all())
    assert torch.equal(storage.rounded(above), above)


def runs(weight: np.ndarray, size: int = 64) -> list[slice]:
    return [slice(at, min(at + size, weight.shape[1])) for at in range(0, weight.shape[1], size)]


def numpy_nearest(weight: np.ndarray, zero: str, bits: int) -> np.ndarray:
    """One scale for four groups of 16, which spans the widest, and an offset for each; in float64."""
    found, top = np.empty_like(weight), 2**bits - 1
    for run in runs(weight):
        groups = [slice(at, at + 16) for at in range(run.start, run.stop, 16)]
        low = np.stack([weight[:, each].min(1) for each in groups], 1)
        high = np.stack([weight[:, each].max(1) for each in groups], 1)
        if zero == "integer":
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        span = (high - low) / top if zero != "none" else np.maximum(-low / (top // 2 + 1), high / (top // 2))
        scale = span.max(1).astype(np.float32).astype(np.float16).astype(np.float64)
        for at, each in enumerate(groups):
            if zero == "integer":
                offset = -scale * np.clip(np.rint(-low[:, at] / scale), 0, top)
            elif zero == "none":
                offset = -scale * (top // 2 + 1)
            else:  # the middle of the group's range is the middle of the levels
                offset = ((low[:, at] + high[:, at]) / 2 - scale * top / 2).astype(np.float16).astype(np.float64)
            codes = np.clip(np.rint((weight[:, each] - offset[:, None]) / scale[:, None]), 0, top)
            found[:, each] = codes * scale[:, None] + offset[:, None]
    return found


@pytest.mark.parametrize("zero", ["float", "integer", "none"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest_spans_the_widest_group_of_a_run(bits: int, zero: Zero) -> None:
    dense = torch.randn(OUT, IN) * torch.rand(OUT, IN // 16).repeat_interleave(16, 1) + 0.3
    weight = Nearest()(dense, layout_of(zero, bits))
    want = numpy_nearest(dense.double().numpy(), zero, bits)
    step = weight.scales.repeat_interleave(16, 1).double().numpy()
    off = np.abs(weight.dequantize().double().numpy() - want) / step
    assert (off < 1e-2).mean() > 0.98  # the rest lay in the middle between two codes, or two stored offsets
    assert off.max() < 1.1
    assert float((weight.dequantize() - dense).abs().div(torch.from_numpy(step)).max()) < 0.51 + (zero == "integer")


@pytest.mark.parametrize("zero", ["float", "integer", "none"])
@pytest.mark.parametrize("range_", ["mse", "icq-scale"])
def test_a_range_is_chosen_for_all_groups_that_share_a_scale(range_: str, zero: Zero) -> None:
    dense = torch.randn(OUT, IN) * torch.rand(OUT, IN // 16).repeat_interleave(16, 1)
    layout = layout_of(zero, 3)
    plain, chosen = (Nearest(range=each)(dense, layout) for each in ("minmax", range_))
    scales = chosen.scales[:, :8].unflatten(1, (2, 4))
    assert torch.equal(scales, scales[..., :1].expand_as(scales))
    if range_ == "mse":  # no run has a larger error than without the search
        errors = [
            (each.dequantize() - dense)[:, :128].square().unflatten(1, (2, 64)).sum(-1) for each in (plain, chosen)
        ]
        assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all())
        assert float(errors[1].sum()) < 0.98 * float(errors[0].sum())


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_chooses_one_scale_as_it_reaches_a_run(act_order: bool) -> None:
    dense, x = torch.randn(OUT, IN), torch.randn(400, IN) @ torch.randn(IN, IN)
    moment = (x.T @ x).double() / len(x)
    layout = layout_of("float", 3)
    found = GPTQ(act_order=act_order)(dense, layout, {"second_moment": moment})
    plain = Nearest()(dense, layout)

    def error(weight: QuantWeight) -> float:
        rest = weight.dequantize().double() - dense.double()
        return float((rest @ moment * rest).sum())

    assert error(found) < 0.7 * error(plain)
    scales = found.scales[:, :8].unflatten(1, (2, 4))
    assert torch.equal(scales, scales[..., :1].expand_as(scales))
    if not act_order:  # the first run's is chosen before anything has moved
        assert torch.equal(found.scales[:, :4], plain.scales[:, :4])


def test_groups_that_share_a_scale_train_one_number() -> None:
    weight = Nearest()(torch.randn(OUT, IN), layout_of("integer", 3))
    adapter = Scales()
    rho = torch.zeros(OUT, IN // 16, requires_grad=True)
    optimizer = torch.optim.AdamW([rho], lr=0.02)
    x, target = torch.randn(50, IN), torch.randn(50, OUT)
    for _ in range(5):
        (adapter.forward(x, weight, {"rho": rho}, 1.0) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    runs_ = rho.detach()[:, :8].unflatten(1, (2, 4))
    assert bool(runs_.any())
    assert torch.equal(runs_, runs_[..., :1].expand_as(runs_))
    merged = adapter.merge(weight, {"rho": rho}, 1.0)
    assert merged.layout.storage.scales == "fp16-shared4"
    assert torch.equal(
        adapter.forward(x, weight, {"rho": rho}, 1.0), torch.nn.functional.linear(x, merged.dequantize())
    )


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_l4q_begins_with_scales_that_are_shared(zero: Zero) -> None:
    dense = torch.randn(OUT, IN)
    dense[:, :64] = 0
    adapter = L4Q(group_size=16, offsets=zero, scales="fp16-shared4")
    first = adapter.start(dense)[0]
    assert bool((first > 0).all())
    assert torch.equal(STORAGES["fp16-shared4"].rounded(first), first)


@pytest.mark.parametrize("method", ["qa-lora", "qa-lora-scales", "l4q", "lota-qaf", "code-lora", "efficientqat"])
def test_methods_train_over_them_and_merge_exactly(method: str, tiny_llama: Callable[..., Any]) -> None:
    ids = torch.arange(2, 50).view(2, 24)
    settings = {"group_size": 16, "scales": "fp16-shared4", "rank": 4, "alpha": 4, "calibration": [ids, ids + 3]}
    model = quadapt.prepare(tiny_llama(initializer_range=0.1), method=method, **settings)
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.1)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    if method.startswith("qa-lora"):
        layer = next(iter(adapted_layers(model).values()))
        assert layer.params("default")["A"].shape[1] == layer.in_features // 16
    with torch.no_grad():
        trained = model.eval()(input_ids=ids).logits
        merged, certificate = quadapt.merge(model)
        assert certificate.verdict == "exact"
        assert torch.equal(merged(input_ids=ids).logits, trained)


def test_a_row_that_is_one_group_shares_nothing() -> None:
    with pytest.raises(ConfigError, match=r"'fp16-shared4' are shared by neighbouring groups.* Use a group size"):
        Storage(scales="fp16-shared4").check(Format(group_size=-1))
