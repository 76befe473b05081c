"""The product that trains its quantizer: merges bit for bit, what it keeps and makes, its dtypes, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from reference.straight_through import (
    BITS,
    IN,
    OUT,
    Case,
    case,
    gradients,
    straight_through,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quadapt.errors import ConfigError, ShapeError
from quadapt.kernels import pack
from quadapt.kernels.fake import fake_gradients
from quadapt.quant import fake_quant, products
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.fake_quant import FakeQuant, fake_quant_codes, fake_quant_weight
from quadapt.quant.format import Format
from quadapt.quant.storage import STORAGES, Storage
from quadapt.quant.weight import Layout, QuantWeight

# --- merging ----------------------------------------------------------------------------------------------------------


def merged(each: Case) -> QuantWeight:
    """The stored form of what a case computes with (fp16 scales and offsets)."""
    out, columns = each.scales.shape[0], each.how.columns
    layout = Layout(format=each.how.format, storage=Storage(), out=out, columns=columns)
    codes = fake_quant_codes(*each.grid, how=each.how, **each.low_rank)
    return QuantWeight.build(layout, pack(codes, each.how.format.bits), each.scales.detach(), each.offsets.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("domain", ["weight", "codes", "fixed", "plain"])
def test_codes_scales_and_offsets_are_the_weight_of_forward_bit_for_bit(
    domain: str, bits: int, dtype: torch.dtype
) -> None:
    """Of one layer: what a merge stores is what forward multiplied with."""
    kind = "weight" if domain == "weight" else "codes"
    base_bits, rank = (8 if domain == "fixed" else None), 0 if domain == "plain" else 5
    for group_size, columns in ((32, 80), (-1, 77), (16, 33)):
        each = case(kind, bits=bits, base_bits=base_bits, rank=rank, group_size=group_size, columns=columns)
        each = each.to(torch.float32, x=dtype)
        each = replace(each, scales=STORAGES["fp16"].snap(each.scales), offsets=STORAGES["fp16"].snap(each.offsets))
        stored = merged(each)
        assert torch.equal(stored.scales, each.scales)
        assert torch.equal(stored.offsets, each.offsets)
        dense = stored.dequantize(dtype)
        found = fake_quant_weight(*each.grid, how=each.how, dtype=dtype, **each.low_rank)
        assert torch.equal(found.view(torch.uint8), dense.view(torch.uint8))
        assert torch.equal(each(), quant_matmul(each.x, stored))


def test_tables_merge_with_the_codes_that_they_have() -> None:
    each = case("codes", levels="nf", rank=0, bits=4).to(torch.float32)
    each = replace(each, scales=STORAGES["fp16"].snap(each.scales), offsets=STORAGES["fp16"].snap(each.offsets))
    each = replace(each, how=replace(each.how, format=replace(each.how.format, zero="float")))
    assert torch.equal(each(), torch.nn.functional.linear(each.x, merged(each).dequantize()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("domain", ["weight", "codes"])
def test_training_ends_in_a_merge_that_computes_the_same(domain: str, dtype: torch.dtype) -> None:
    """Scales stay positive, the loss falls, and the merged layer is the trained one."""
    each = case(domain, "round-clamp", bits=2, lead=(64,)).to(torch.float32, x=dtype)
    start, rho, shift = each.scales.detach(), torch.zeros_like(each.scales), torch.zeros_like(each.scales)
    target = torch.nn.functional.linear(each.x.detach(), torch.randn(OUT, IN).to(dtype))

    def now() -> Case:
        scales = STORAGES["fp16"].snap(start * rho.exp())
        return replace(each, scales=scales, offsets=STORAGES["fp16"].snap(shift - 2 * scales))

    trained = [rho.requires_grad_(), shift.requires_grad_(), each.A, each.B]
    optimizer, losses = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0), []
    for _ in range(40):
        loss = (now()() - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    after = now()
    assert losses[-1] < 0.8 * losses[0]
    assert bool((after.scales > 0).all() & after.scales.isfinite().all())
    assert torch.equal(after(), quant_matmul(each.x, merged(after)))


def test_snap_rounds_and_passes_gradients_on() -> None:
    values = torch.tensor([0.1, 1e-9, 7e4, -3.14159], requires_grad=True)
    found = STORAGES["fp16"].snap(values)
    assert torch.equal(found, values.half().float())
    assert torch.equal(STORAGES["fp32"].snap(values), values)
    assert torch.equal(torch.autograd.grad((found * torch.arange(4)).sum(), values)[0], torch.arange(4.0))
    assert STORAGES["fp16"].snap(values.double()).dtype == torch.float64


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_by(work: Callable[[], Tensor]) -> list[Tensor]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        work().sum().backward()
    return kept


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("domain", ["weight", "codes"])
def test_backward_keeps_nothing_but_what_exists(domain: str, dtype: torch.dtype) -> None:
    """Inputs, base, grid and factors exist anyway; nothing else is kept, and inputs only where factors train."""
    each = case(domain, columns=512).to(torch.float32, x=dtype)
    if domain == "weight":
        each = replace(each, base=each.base.to(torch.bfloat16))
    known = {tensor.data_ptr() for tensor in (*each.grid, each.x, each.A, each.B)}
    kept = saved_by(each)
    assert {tensor.data_ptr() for tensor in kept} == known
    frozen = {name: getattr(each, name).detach() for name in ("scales", "offsets", "A", "B")}
    assert each.x.data_ptr() not in {tensor.data_ptr() for tensor in saved_by(lambda: each(**frozen))}
    assert len(saved_by(lambda: straight_through(each.to(torch.float64)))) > len(kept)


class Made(TorchDispatchMode):
    """Notes the bytes of each storage that operators make, but for views and what is given."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.alive: list[Any] = []

    def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {
            t.untyped_storage().data_ptr()
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(t, Tensor)
        }
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.alive.append(tensor)  # so that no address is used twice
                self.sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return result


@pytest.mark.parametrize("domain", ["weight", "codes"])
def test_backward_makes_nothing_larger_than_a_tile(domain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(fake_quant, "_TILE", {"cpu": 5 * 512})
    monkeypatch.setattr(fake_quant, "_LEAST_ROWS", 1)
    each = case(domain, columns=512, lead=(4,)).to(torch.float32, x=torch.bfloat16)
    y = each()
    with Made() as made:
        torch.autograd.grad(y, each.leaves, torch.ones_like(y))
    tile, inputs = 5 * 512 * 4, 4 * 512 * 4  # a bfloat16 weight would have 24 * 512 * 2
    assert max(made.sizes.values()) == max(tile, inputs)
    assert list(made.sizes.values()).count(tile) == 2  # the gradient and the weights


def test_tiles_of_wide_rows_have_rows_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tile reads and writes the whole gradient of the inputs: few rows a tile would cost more than the product."""
    taken: list[int] = []

    def counted(G: Tensor, *rest: Any) -> Tensor:
        taken.append(len(G))
        return fake_gradients(G, *rest)

    monkeypatch.setattr(fake_quant, "_TILE", {"cpu": 5 * 512})
    monkeypatch.setattr(fake_quant, "_LEAST_ROWS", 16)
    monkeypatch.setattr(fake_quant, "fake_gradients", counted)
    for columns, rows in ((512, [16, 8]), (64, [24])):
        each = case(columns=columns, lead=(4,)).to(torch.float32)
        y = each()
        torch.autograd.grad(y, each.leaves, torch.ones_like(y))
        assert taken == rows
        taken.clear()


# --- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("domain", ["weight", "codes"])
def test_gradients_of_parameters_are_not_rounded_to_the_dtype_of_the_inputs(
    domain: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: False)
    each = case(domain).to(torch.float32, x=dtype)
    dy = torch.randn(2, 5, OUT).to(dtype)
    y = each()
    assert y.dtype == dtype
    found = torch.autograd.grad(y, each.leaves, dy)
    assert [mine.dtype for mine in found] == [dtype] + [torch.float32] * 4
    exact = each.to(torch.float64)
    want = torch.autograd.grad(straight_through(exact), exact.leaves, dy.double())
    for mine, other in zip(found[1:], want[1:], strict=True):
        assert float((mine - other).norm() / other.norm()) < 1e-5
    assert float((found[0] - want[0]).norm() / want[0].norm()) < 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("domain", ["weight", "codes"])
def test_accelerators_multiply_in_the_dtype_of_the_inputs(
    domain: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: False)
    each = case(domain).to(torch.float32, x=dtype)
    dy = torch.randn(2, 5, OUT).to(dtype)
    want = gradients(each, dy)
    monkeypatch.setattr(fake_quant, "large_operand_dtype", lambda dy, _: dy.dtype)
    monkeypatch.setattr(fake_quant, "_TOKENS", {"cpu": 3})
    monkeypatch.setattr(fake_quant, "_TILE", {"cpu": 7 * IN})
    monkeypatch.setattr(fake_quant, "_LEAST_ROWS", 1)
    for mine, other in zip(gradients(each, dy), want, strict=True):
        assert mine.dtype == other.dtype
        assert float((mine - other).norm() / other.norm()) < (2e-2 if dtype == torch.bfloat16 else 1e-5)


def test_factors_and_bases_may_have_other_dtypes() -> None:
    each = case().to(torch.float32)
    low = replace(each, A=each.A.detach().bfloat16().requires_grad_(), B=each.B.detach().half().requires_grad_())
    for base in (torch.bfloat16, torch.float16, torch.float64):
        given = replace(low, base=each.base.to(base).requires_grad_())
        same = replace(given, base=given.base.detach().float(), A=low.A.detach().float(), B=low.B.detach().float())
        assert torch.equal(given(), same())
        dy = torch.randn(2, 5, OUT)
        found = torch.autograd.grad(given(), (given.base, given.A, given.B), dy)
        assert [mine.dtype for mine in found] == [base, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("domain", ["weight", "codes"])
def test_under_autocast_nothing_is_cast_behind_our_back(domain: str) -> None:
    """The layer casts its inputs, as for `quant_matmul`; backward may run inside autocast too."""
    for dtype in (torch.bfloat16, torch.float32):
        each = case(domain).to(torch.float32, x=dtype)
        dy = torch.randn(2, 5, OUT).to(dtype)
        want = (each(), *gradients(each, dy))
        with torch.autocast("cpu", torch.bfloat16):
            found = (each(), *gradients(each, dy))
        assert [mine.dtype for mine in found] == [other.dtype for other in want]
        assert all(torch.equal(mine, other) for mine, other in zip(found, want, strict=True))


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"domain": "weights"},
        {"order": "round"},
        {"base_bits": 5},
        {"format": Format(levels="nf", bits=4)},
        {"format": Format(levels="nf", bits=4), "domain": "codes", "base_bits": 8},
    ],
    ids=str,
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        FakeQuant(**{"format": Format(bits=4), "columns": 64, **changes})


def test_tensors_that_do_not_fit_are_refused() -> None:
    each = case()
    for name in ("scales", "offsets", "A", "B", "base"):
        with pytest.raises(ShapeError, match=name):
            each(**{name: getattr(each, name)[:, :-1]})
    for kind in (torch.bfloat16, torch.float32):  # float32 beside float64
        with pytest.raises(ShapeError, match="both must be float32"):
            each(scales=each.scales.to(kind))
    with pytest.raises(ShapeError, match="together"):
        each(B=None)
    with pytest.raises(ShapeError, match="domain"):
        each(base=torch.zeros(OUT, IN, dtype=torch.uint8))
    table = case("codes", levels="nf", rank=0)
    with pytest.raises(ConfigError, match="cannot move"):
        replace(table, A=each.A, B=each.B)()
