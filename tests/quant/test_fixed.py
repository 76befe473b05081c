"""Sums and factorizations do not depend on the number of threads, and neither does what is quantized with them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from quadapt.nn.starts import LQ, STARTS, LoftQ
from quadapt.nn.starts.fit import objective
from quadapt.quant import fixed
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ, inverse_factor
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

THREADS = (1, 2, 3)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def on_each(work: Callable[[], Tensor]) -> list[Tensor]:
    found = []
    for threads in THREADS:
        torch.set_num_threads(threads)
        found.append(work())
    return found


def same(found: list[Tensor]) -> bool:
    return all(torch.equal(each, found[0]) for each in found)


def moment_of(columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = torch.randn(2 * columns, columns, dtype=dtype) * torch.rand(columns, dtype=dtype).add(0.1)
    return x.T @ x / len(x)


@pytest.fixture
def products_are_fixed() -> None:
    """torch promises nothing about them: where a library cuts even short sums, there is nothing to be seen here."""
    for dtype, rows, columns in product((torch.float32, torch.float64), range(16, 401, 64), (64, 336, 400)):
        a, b = torch.randn(rows, 64, dtype=dtype), torch.randn(64, columns, dtype=dtype)
        if not same(on_each(lambda a=a, b=b: a @ b)):
            pytest.skip("products of matrices depend on the number of threads on this machine")


@pytest.mark.parametrize("shape", [(), (1,), (1023,), (1024,), (1025,), (300, 700), (3, 0)])
def test_a_total_is_the_exact_sum_in_float64(shape: tuple[int, ...]) -> None:
    values = torch.randint(-1000, 1000, shape).float()
    found = fixed.total(values)
    assert (found.dtype, found.ndim) == (torch.float64, 0)
    assert float(found) == values.double().sum()
    if values.numel():
        assert float(fixed.mean(values)) == pytest.approx(float(values.double().mean()), rel=1e-12)


def test_a_total_is_added_up_in_runs_that_one_thread_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch shares out sums of 32,768 numbers and more."""
    values, lengths, sums = torch.rand(70_000), [], Tensor.sum

    def noted(each: Tensor, *axes: int, **options: torch.dtype) -> Tensor:
        lengths.append(each.shape[-1])
        return sums(each, *axes, **options)

    monkeypatch.setattr(Tensor, "sum", noted)
    fixed.total(values)
    assert lengths == [1024, 69]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("columns", [1, 63, 64, 65, 130, 300, 700])
def test_the_factor_is_choleskys(columns: int, dtype: torch.dtype) -> None:
    matrix = moment_of(columns, dtype) + 0.01 * torch.eye(columns, dtype=dtype)
    before = matrix.clone()
    lower, found = fixed.cholesky(matrix)
    assert found
    assert torch.equal(matrix, before)
    assert torch.equal(lower, lower.tril())
    limit = {torch.float32: 1e-5, torch.float64: 1e-13}[dtype]
    assert float((lower @ lower.T - matrix).norm() / matrix.norm()) < limit


@pytest.mark.parametrize("at", [0, 100, 299])
def test_what_is_not_positive_definite_has_no_factor(at: int) -> None:
    matrix = moment_of(300).add_(0.01 * torch.eye(300))
    matrix[at, at] = -1
    assert not fixed.cholesky(matrix)[1]


def test_lapack_is_given_what_one_thread_factors(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, whole = [], torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda m: (sizes.append(len(m)), whole(m))[1])
    fixed.cholesky(moment_of(700) + torch.eye(700))
    assert max(sizes) == 64


def test_inside_one_thread_works_and_afterwards_as_many_as_before() -> None:
    torch.set_num_threads(3)

    def fails() -> None:
        with fixed.one_thread():
            assert torch.get_num_threads() == 1
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("columns", [1, 64, 200, 400])
def test_the_inverse_is_that_of_the_factor(columns: int) -> None:
    lower = torch.randn(columns, columns, dtype=torch.float64).tril() / 8 + torch.eye(columns, dtype=torch.float64)
    found = fixed.inverse_of_lower(lower)
    assert torch.equal(found, found.tril())
    assert float((lower @ found - torch.eye(columns, dtype=torch.float64)).abs().max()) < 1e-9


@pytest.mark.usefixtures("products_are_fixed")
def test_gptqs_codes_are_the_same_on_any_number_of_threads() -> None:
    weight, moment = 0.05 * torch.randn(96, 400), moment_of(400)
    layout = Layout(format=Format(bits=3, group_size=16), storage=Storage(), out=96, columns=400)
    assert same(on_each(lambda: inverse_factor(moment, 0.01)))
    assert same(on_each(lambda: GPTQ()(weight, layout, {"second_moment": moment}).dequantize()))


@pytest.mark.parametrize("name", sorted(set(STARTS) - {"zero"}))
def test_starts_factor_in_one_thread(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever LAPACK would make of more; and as many as before work on the products in between."""
    torch.set_num_threads(3)
    seen: dict[str, set[int]] = {}

    def noted(called: str) -> Callable[..., Any]:
        whole = getattr(torch.linalg, called)
        return lambda *given, **how: (
            seen.setdefault(called, set()).add(torch.get_num_threads()),
            whole(*given, **how),
        )[1]

    for called in ("svd", "qr", "eigh", "solve"):
        monkeypatch.setattr(torch.linalg, called, noted(called))
    format = Format(levels="nf", bits=2, group_size=16)
    layout = Layout(format=format, storage=Storage.default(format), out=300, columns=320)
    start = {"lq": partial(LQ, iterations=2, fisher=True), "loftq": partial(LoftQ, iterations=2)}.get(
        name, STARTS[name]
    )()
    known = {"dense_second_moment": moment_of(320, torch.float64), "fisher": torch.rand(300, 320)}
    for pooled in (False, True):
        start(0.05 * torch.randn(300, 320), lambda each: Nearest()(each, layout), 8, known, pooled=pooled)
    assert seen
    assert set().union(*seen.values()) == {1}
    assert torch.get_num_threads() == 3


def test_doubly_quantized_scales_are_the_same_on_any_number_of_threads() -> None:
    """Their mean is taken over more numbers than torch leaves to one thread."""
    weight = torch.randn(600, 1024)
    format = Format(levels="nf", bits=4, group_size=16)
    layout = Layout(format=format, storage=Storage(scales="double", offsets="absent"), out=600, columns=1024)
    assert same(on_each(lambda: Nearest()(weight, layout).tensors["scales_mean"]))
    assert same(on_each(lambda: torch.tensor(objective(weight, None))))
