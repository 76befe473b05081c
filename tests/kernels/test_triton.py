"""The Triton kernels: what they compute, through Triton's interpreter, and that they compile for cards."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

pytest.importorskip("triton", reason="needs triton, which has no wheel for this platform")

from benchmarks.gpu import steps
from benchmarks.gpu.cases import Case, cases
from benchmarks.gpu.models import adapted, llama, triton_on

from quadapt.kernels import cuda, dispatch, fake_cuda, fake_reference, few, product, product_cuda, reference, tiles
from quadapt.kernels.fake_reference import Grid
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.format import Format
from quadapt.quant.weight import QuantWeight

CPU = torch.device("cpu")


@pytest.fixture
def launched() -> Iterator[list[str]]:
    """Names of the Triton kernels that were launched."""
    names: list[str] = []
    launch = tiles.launch

    def noted(kernel: Any, *arguments: Any, **settings: Any) -> None:
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **settings)

    modules = ("cuda", "entropy_cuda", "fake_cuda", "product_cuda")
    patches = [mock.patch(f"quadapt.kernels.{module}.launch", noted) for module in modules]
    for patch in patches:
        patch.start()
    yield names
    for patch in patches:
        patch.stop()


@pytest.mark.parametrize("case", cases(5, 76, 32), ids=lambda case: f"{case.kernel}: {case.name}")
def test_it_equals_the_reference(case: Case, launched: list[str]) -> None:
    case.check(CPU)
    assert len(launched) == 1 + (case.kernel == "entropy_shift")  # none was left to the reference; two group widths


def test_a_case_that_is_wrong_is_found() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x + 2.0**-20

    with pytest.raises(AssertionError, match=r"result 0 differs by .*, limit 0"):
        Case("kernel", "input", wrong, lambda x: x, (torch.ones(4),)).check(CPU)
    with pytest.raises(AssertionError, match="differs by nan"):
        Case("kernel", "input", lambda x: x * float("nan"), lambda x: x, (torch.ones(4),), (1.0,)).check(CPU)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_need_not_be_aligned_to_words(bits: int) -> None:
    flat = torch.randint(0, 256, (1 + 3 * 8 * bits,), dtype=torch.uint8)
    packed = flat[1:].view(3, 8 * bits)  # begins at an odd byte
    scales, offsets = torch.rand(3, 4), torch.randn(3, 4)
    case = (packed, scales, offsets, None, bits, 16, 64, torch.float32)
    assert not tiles.words_of(packed, bits)[1]
    assert tiles.words_of(packed.clone(), bits)[1]
    assert torch.equal(cuda.dequantize(*case), reference.dequantize(*case))


def test_what_is_not_a_number_stays_so() -> None:
    base, ones = torch.full((2, 16), float("nan")), torch.ones(2, 1)
    case = (base, None, None, ones, ones, None, Grid(4, 4, 16, 16))
    assert bool(fake_cuda.quantize(*case, torch.float32).isnan().all())
    assert bool(fake_reference.quantize(*case, torch.float32).isnan().all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_rounded_to_even(dtype: torch.dtype) -> None:
    step = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}[dtype]  # every second weight lies between two numbers
    packed = reference.pack(torch.arange(256, dtype=torch.uint8)[None], 8)
    case = (packed, torch.full((1, 1), step), torch.ones(1, 1), None, 8, 256, 256, dtype)
    assert torch.equal(cuda.dequantize(*case), reference.dequantize(*case))


def test_float64_is_the_references() -> None:
    packed, grid = reference.pack(torch.zeros(2, 16, dtype=torch.uint8), 4), torch.ones(2, 1)
    case = (packed, grid, grid, None, 4, 16, 16, torch.float64)
    assert torch.equal(cuda.dequantize(*case), reference.dequantize(*case))
    weight = torch.randn(2, 16, dtype=torch.float64)
    want = reference.nearest_codes(weight, grid.double(), None, None, 4, 16)
    assert torch.equal(cuda.nearest_codes(weight, grid.double(), None, None, 4, 16), want)


IN_EVERY_RUN = {
    *((check, "qa-lora") for check in ("decoding", "merged")),
    ("checkpointed", "l4q"),
    ("generated", "qlora"),
}
"""Of the checks that interpret several steps of a model; the rest are for `make test-deep`."""


def _depth(check: str, name: str) -> Any:
    shallow = check in ("step", "rounding") or (check, name) in IN_EVERY_RUN
    return pytest.param(check, name, marks=() if shallow else pytest.mark.deep)


@pytest.mark.parametrize(("check", "name"), [_depth(*each) for each in steps.named(CPU)])
def test_steps_of_models_are_those_of_the_cpu(check: str, name: str, launched: list[str]) -> None:
    steps.CHECKS[check](name, CPU)
    assert launched
    if check in ("decoding", "merged"):
        assert "_product" in launched


def test_a_step_that_differs_is_found() -> None:
    with (
        mock.patch("quadapt.kernels.cuda.dequantize", lambda *args: reference.dequantize(*args) * 1.01),
        pytest.raises(steps.DifferenceError, match="differs by"),
    ):
        steps.step("qlora", CPU)


@pytest.mark.parametrize("method", ["qa-lora", pytest.param("l4q", marks=pytest.mark.deep)])
def test_a_step_and_a_token_are_one_graph(method: str, launched: list[str]) -> None:
    counters.clear()
    steps.compiled(method, CPU, backend="aot_eager")
    assert counters["stats"]["unique_graphs"] == 2
    assert "_product" in launched


class TestFewTokens:
    """Which product is taken, and what it gives."""

    @pytest.mark.parametrize(
        ("shape", "dtype", "group", "taken"),
        [
            ((1, 64), torch.bfloat16, 16, True),
            ((1, 1, 64), torch.float16, 64, True),
            ((1, 2, 64), torch.float16, 64, False),
            ((0, 64), torch.float32, 16, False),
            ((1, 64), torch.float64, 16, False),
            ((1, 60), torch.float32, 60, True),
        ],
    )
    def test_rule(self, shape: tuple[int, ...], dtype: torch.dtype, group: int, taken: bool) -> None:
        with triton_on(CPU):
            assert few(torch.zeros(shape, dtype=dtype), group, shape[-1]) == taken

    def test_gradients_take_the_other(self, quant_weight: Callable[..., QuantWeight], launched: list[str]) -> None:
        weight, x = quant_weight(Format(bits=4, group_size=16)), torch.randn(1, 80, requires_grad=True)
        with triton_on(CPU):
            quant_matmul(x, weight).sum().backward()
            assert "_product" not in launched
            with torch.no_grad():
                found = quant_matmul(x, weight)
        assert launched[-1] == "_product"
        torch.testing.assert_close(found, x.detach() @ weight.dequantize().T)

    def test_axes_and_order_of_inputs(self, quant_weight: Callable[..., QuantWeight]) -> None:
        weight, x = quant_weight(Format(bits=3, group_size=16), permuted=True), torch.randn(1, 1, 80)
        with triton_on(CPU), torch.no_grad():
            found = quant_matmul(x, weight)
        assert found.shape == (1, 1, 24)
        torch.testing.assert_close(found, x @ weight.dequantize().T)

    def test_operator(self, quant_weight: Callable[..., QuantWeight]) -> None:
        weight = quant_weight(Format(levels="nf", bits=4, group_size=16))
        table = weight.format.table(weight.packed)
        held = weight.held("scales"), weight.held("offsets")
        arguments = (torch.randn(2, 80), weight.packed, *held, table, 4, 16, 80)
        torch.library.opcheck(torch.ops.quadapt.product.default, arguments)
        torch.testing.assert_close(product(*arguments), arguments[0] @ weight.dequantize().T)


def test_weight_is_never_made_whole(quant_weight: Callable[..., QuantWeight], launched: list[str]) -> None:
    weight = quant_weight(Format(bits=4, group_size=16))
    with triton_on(CPU), torch.no_grad():
        quant_matmul(torch.randn(1, 80), weight)
    assert launched == ["_product"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**kept, **environment},
    )


def test_they_compile_for_cards(tmp_path: Path) -> None:
    """An H100's machine code of some variants of each kernel: no register is spilled, and all round as the CPU does."""
    done = run("--compile", "90", "--every", "16", TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [line.split() for line in done.stdout.splitlines()[3:]]
    kernels = {case.kernel for case in cases(5, 76, 32)}
    assert {row[0] for row in rows} == kernels
    assert all(int(row[2]) <= 255 and int(row[3]) == 0 for row in rows), rows
    assert {row[0] for row in rows if int(row[5])} == {"product"}  # which sums in another order anyway


def test_without_triton_the_reason_is_said(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
    )
    done = run(PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith("make gpu: triton: not installed for ")


def test_steps_begin_away_from_zero() -> None:
    model = adapted(llama(CPU), "qlora", rank=4)
    assert all(float(each.norm()) > 0 for each in steps.moved(model).parameters() if each.requires_grad)


def test_the_interpreter_is_on() -> None:
    assert product_cuda._product.__class__.__name__ == "InterpretedFunction"
    assert dispatch.set_for(CPU) == "cpu"
