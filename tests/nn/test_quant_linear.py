"""The quantized layer is an ordinary frozen `nn.Linear` to all around it: torch, checkpoints, compilers, DDP, FSDP2."""

from __future__ import annotations

import copy
import io
import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from quadapt.nn.adapters import Pooled
from quadapt.nn.adapters.codes import MergedForm
from quadapt.nn.quant_linear import QuantLinear
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

Make = Callable[..., QuantWeight]

KINDS: dict[str, tuple[Format, Storage]] = {
    "int4": (Format(bits=4), Storage()),
    "int3-zp": (Format(bits=3, zero="integer"), Storage(offsets="integer")),
    "nf4-double": (Format(levels="nf", bits=4, group_size=64), Storage(scales="double", offsets="absent")),
    "int8-fp32": (Format(bits=8), Storage(scales="fp32", offsets="fp32")),
    "int4-q4k": (Format(bits=4), Storage(scales="q4_k", offsets="q4_k-min")),
    "int6-q6k": (Format(bits=6, group_size=16, zero="none"), Storage(scales="q6_k", offsets="absent")),
    "nf8-fp32": (Format(levels="nf", bits=8), Storage(scales="fp32", offsets="absent")),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def layer_of(kind: str, *, bias: bool = True, permuted: bool = False, out: int = 24, columns: int = 80) -> QuantLinear:
    format, storage = KINDS[kind]
    torch.manual_seed(0)
    layout = Layout(format=format, storage=storage, out=out, columns=columns)
    weight = Nearest()(0.1 * torch.randn(out, columns), layout)
    if permuted:
        layout = Layout(format=format, storage=storage, out=out, columns=columns, permuted=True)
        weight = QuantWeight(layout, {**weight.tensors, "perm": torch.randperm(columns).int()})
    return QuantLinear.of(weight, torch.randn(out) if bias else None)


# --- what it is -------------------------------------------------------------------------------------------------------


@kinds
def test_it_is_a_linear_layer_of_frozen_bytes(kind: str) -> None:
    layer = layer_of(kind)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (80, 24)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert {name: parameter.dtype for name, parameter in layer.named_parameters() if name != "bias"} == dict.fromkeys(
        layer.layout.shapes, torch.uint8
    )
    assert list(layer.buffers()) == []


@kinds
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("permuted", [True, False])
def test_it_computes_the_product_with_the_dequantized_weight(kind: str, bias: bool, permuted: bool) -> None:
    layer = layer_of(kind, bias=bias, permuted=permuted)
    x = torch.randn(2, 3, 80, dtype=torch.float64)
    want = x @ layer.quant_weight.dequantize(torch.float64).T + (layer.bias.double() if bias else 0)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_the_bias_is_added_in_the_dtype_of_the_output() -> None:
    layer = layer_of("int4")
    x = torch.randn(20, 80).bfloat16()
    want = quant_matmul(x, layer.quant_weight) + layer.bias.bfloat16()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer(x), want)


def test_nothing_about_it_is_random() -> None:
    layer = layer_of("int4")
    digest = layer.quant_weight.digest()
    layer.reset_parameters()
    layer.apply(lambda module: module.reset_parameters())
    assert layer.quant_weight.digest() == digest


def test_it_can_be_made_on_the_meta_device() -> None:
    format, storage = KINDS["int4"]
    layer = QuantLinear(
        Layout(format=format, storage=storage, out=7, columns=33), bias=True, device="meta", dtype=torch.float16
    )
    assert {parameter.device.type for parameter in layer.parameters()} == {"meta"}
    assert {name: tuple(parameter.shape) for name, parameter in layer.named_parameters()} == {
        **layer.layout.shapes,
        "bias": (7,),
    }
    assert layer.bias.dtype == torch.float16


def test_its_description_says_what_it_costs() -> None:
    text = repr(layer_of("int4", columns=64))
    assert "in_features=64, out_features=24, bias=True, format=int4-g32, bits_per_weight=5.000" in text


def test_taking_over_another_weight_replaces_every_tensor(quant_weight: Make) -> None:
    layer = layer_of("nf4-double")
    for format in (Format(bits=8), Format(bits=4, zero="none"), Format(levels="nf", bits=3, zero="float")):
        weight = quant_weight(format)
        layer.quant_weight = weight
        assert set(dict(layer.named_parameters())) == {*weight.layout.shapes, "bias"}
        assert layer.quant_weight.digest() == weight.digest()
        assert not any(parameter.requires_grad for parameter in layer.parameters())


# --- what survives ----------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("permuted", [True, False])
def test_its_state_goes_through_a_checkpoint(kind: str, permuted: bool) -> None:
    layer = layer_of(kind, permuted=permuted)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    fresh = QuantLinear(layer.layout, bias=True)
    fresh.load_state_dict(torch.load(file))
    assert fresh.quant_weight.digest() == layer.quant_weight.digest()
    x = torch.randn(3, 80)
    assert torch.equal(fresh(x), layer(x))


@kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_a_cast_of_the_model_changes_no_bit_of_the_weight(kind: str, dtype: torch.dtype) -> None:
    layer = layer_of(kind)
    digest, dense = layer.quant_weight.digest(), layer.quant_weight.dequantize()
    for cast in (
        lambda module: module.to(dtype),
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.float(),
    ):
        layer = cast(layer)
        assert layer.quant_weight.digest() == digest
        assert torch.equal(layer.quant_weight.dequantize(), dense)
    assert layer.bias.dtype == torch.float32


@kinds
def test_a_plain_linear_layer_refuses_its_weight(kind: str) -> None:
    """At eight bits there are as many bytes as weights; a third axis tells them apart."""
    layer = layer_of(kind, columns=64)
    plain = nn.Linear(64, 24)
    with pytest.raises(RuntimeError, match=r"size mismatch for weight"):
        plain.load_state_dict(layer.state_dict(), strict=False)


@kinds
def test_a_layer_of_another_layout_refuses_its_state(kind: str) -> None:
    layer = layer_of(kind)
    for other in (name for name in KINDS if KINDS[name] != KINDS[kind]):
        with pytest.raises(RuntimeError, match="Error\\(s\\) in loading"):
            layer_of(other).load_state_dict(layer.state_dict())


@kinds
def test_a_copy_is_equal_and_separate(kind: str) -> None:
    layer = layer_of(kind)
    digest = layer.quant_weight.digest()
    twin = copy.deepcopy(layer)
    assert twin.quant_weight.digest() == digest
    twin.weight.data.flatten()[0] ^= 1
    assert layer.quant_weight.digest() == digest
    assert twin.quant_weight.digest() != digest


# --- compiled ---------------------------------------------------------------------------------------------------------


class Merged(nn.Module):
    """A quantized layer with an adapter in the merged form over it."""

    def __init__(self, layer: QuantLinear, rank: int = 3) -> None:
        super().__init__()
        self.layer = layer
        self.lora_A = nn.Parameter(0.1 * torch.randn(rank, layer.layout.groups))
        self.lora_B = nn.Parameter(0.1 * torch.randn(layer.out_features, rank))
        self.move = MergedForm(((Pooled(), 0.5),))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.with_bias(quant_matmul(x, self.layer.quant_weight, self.move, (self.lora_A, self.lora_B)))


def assert_compiled_equals_eager(module: nn.Module, backend: str, dtype: torch.dtype) -> None:
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    grads = []
    for run in (module, compiled):
        x = torch.randn(4, 80, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        y = run(x)
        y.float().square().sum().backward()
        grads.append([y, x.grad, *(p.grad for p in module.parameters() if p.requires_grad)])
        module.zero_grad()
    for eager, fast in zip(*grads, strict=True):
        assert eager.dtype == fast.dtype
        torch.testing.assert_close(fast, eager)


@pytest.mark.parametrize("kind", ["int4", "nf4-double", "int8-fp32", "int4-q4k", "int6-q6k"])
def test_it_traces_as_one_graph_forward_and_backward(kind: str) -> None:
    torch.compiler.reset()
    assert_compiled_equals_eager(layer_of(kind), "aot_eager", torch.bfloat16)


def test_the_merged_form_traces_as_one_graph_forward_and_backward() -> None:
    torch.compiler.reset()
    assert_compiled_equals_eager(Merged(layer_of("int4")), "aot_eager", torch.float32)


@pytest.mark.slow
def test_compiled_code_computes_the_same() -> None:
    torch.compiler.reset()
    assert_compiled_equals_eager(
        nn.Sequential(layer_of("int4", out=80), nn.GELU(), layer_of("nf4-double")), "inductor", torch.float32
    )


# --- two processes ----------------------------------------------------------------------------------------------------


def _run(rank: int, meeting: str, results: str) -> None:
    """What each of two processes does; rank 0 writes down what came of each kind."""
    distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for kind in KINDS:
        for name, case in (("ddp", _under_ddp), ("fsdp2", _under_fsdp2)):
            try:
                found[f"{kind} {name}"] = case(kind, rank)
            except Exception as error:  # the tests will see it
                found[f"{kind} {name}"] = {"error": f"{type(error).__name__}: {error}"}
            distributed.barrier()
    if rank == 0:
        Path(results).write_text(json.dumps(found))
    distributed.destroy_process_group()


def _model(kind: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Merged(layer_of(kind, out=80)), nn.SiLU(), layer_of(kind), nn.Linear(24, 8))


def _inputs(rank: int) -> Tensor:
    return torch.randn(4, 80, generator=torch.Generator().manual_seed(rank))


def _watch(layers: list[QuantLinear]) -> list[bool]:
    """Whether each layer, each time it runs, has the very weight that it was made with."""
    seen: list[bool] = []
    for layer in layers:
        digest = layer.quant_weight.digest()
        layer.register_forward_hook(lambda module, *_, was=digest: seen.append(module.quant_weight.digest() == was))
    return seen


def _under_ddp(kind: str, rank: int) -> dict[str, Any]:
    plain, model = _model(kind), _model(kind)
    digests = [model[0].layer.quant_weight.digest(), model[2].quant_weight.digest()]
    wrapped = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    want = sum(torch.autograd.grad(plain(_inputs(each)).square().sum(), plain[0].lora_A)[0] for each in (0, 1)) / 2
    wrapped(_inputs(rank)).square().sum().backward()
    found = model[0].lora_A.grad.clone()
    optimizer.step()
    wrapped(_inputs(rank)).square().sum().backward()
    return {
        "exact": [model[0].layer.quant_weight.digest(), model[2].quant_weight.digest()] == digests,
        "gradient": float((found - want).norm() / want.norm()),
    }


def _under_fsdp2(kind: str, rank: int) -> dict[str, Any]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plain, model = _model(kind), _model(kind)
    seen = _watch([model[2]])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for part in (model[0], model[2], model):
        fully_shard(part, mp_policy=policy)
    y = model(_inputs(rank))
    y.float().square().sum().backward()
    kept = {name: parameter.full_tensor() for name, parameter in model.named_parameters()}
    want = plain.bfloat16()(_inputs(rank).bfloat16())
    same = [name for name, value in _model(kind).named_parameters() if torch.equal(kept[name].detach(), value)]
    return {
        "exact": seen == [True] and set(same) == set(kept),
        "output": float((y - want).float().norm() / want.float().norm()),
        "gradient": float(model[0].lora_A.grad.full_tensor().norm()),
    }


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(_run, (str(folder / "meeting"), str(folder / "results.json")), nprocs=2)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
@kinds
def test_ddp_trains_beside_the_very_same_weights(kind: str, together: dict[str, Any]) -> None:
    found = together[f"{kind} ddp"]
    assert "error" not in found
    assert found["exact"]
    assert found["gradient"] < 1e-5


@pytest.mark.slow
@kinds
def test_fsdp2_in_bfloat16_leaves_codes_scales_and_offsets_exact(kind: str, together: dict[str, Any]) -> None:
    found = together[f"{kind} fsdp2"]
    assert "error" not in found
    assert found["exact"]
    assert found["output"] < 0.01  # bfloat16, whose products may be summed in another order where weights lie elsewhere
    assert found["gradient"] > 0


def test_layouts_can_be_written_down() -> None:
    for format, storage in KINDS.values():
        layout = Layout(format=format, storage=storage, out=4, columns=64)
        fields = json.loads(json.dumps(asdict(layout)))
        again = Layout(**{**fields, "format": Format(**fields["format"]), "storage": Storage(**fields["storage"])})
        assert again == layout
        assert re.fullmatch(r"[0-9a-f]{64}", layer_of("int4").quant_weight.digest())
