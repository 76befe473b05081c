"""What every export format promises: what it accepts reads back exactly, what it refuses is refused with its reason."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import logits, quantized, tiny, with_adapter
from peft import PeftModel
from safetensors.torch import load_file
from test_awq_folders import read_back as from_awq
from test_bitsandbytes_folders import read_back as from_bitsandbytes
from test_compressed_tensors import read_back as from_compressed_tensors
from test_gguf import read_back as from_gguf
from test_gptq_folders import read_back as from_gptq
from test_hqq_folders import read_back as from_hqq
from test_mlx_folders import read_back as from_mlx
from test_torchao_folders import read_back as from_torchao
from transformers import AutoModelForCausalLM

import quadapt
from quadapt.errors import ConfigError, ExportError
from quadapt.exporters.dense import export_hf
from quadapt.exporters.formats import EXPORTERS, Answer, Exporter
from quadapt.exporters.survey import Subject, formats_page, merged_layout, survey
from quadapt.hf.compressed import attach
from quadapt.hf.merge import merge
from quadapt.hf.peft_layer import adapted_layers
from quadapt.methods import METHODS, method_named
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import LoRA, Pooled
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

IDS = torch.randint(2, 300, (24,), generator=torch.Generator().manual_seed(0)).tolist()

MODELS: dict[str, tuple[Format, Storage | None]] = {
    "int4": (Format(bits=4, group_size=32), None),
    "int4 in fp32": (Format(bits=4, group_size=32), Storage(scales="fp32", offsets="fp32")),
    "int4 with zero-points": (Format(bits=4, group_size=32, zero="integer"), None),
    "int4 symmetric": (Format(bits=4, group_size=32, zero="none"), None),
    "int4 in short groups": (Format(bits=4, group_size=80, zero="none"), None),
    "int8 with zero-points": (
        Format(bits=8, group_size=32, zero="integer"),
        Storage(scales="fp32", offsets="integer"),
    ),
    "nf4": (Format(levels="nf", bits=4, group_size=64), Storage(scales="double", offsets="absent")),
    "nf4 of bitsandbytes": (
        Format(levels="nf-qlora", bits=4, group_size=32),
        Storage(scales="double", offsets="absent"),
    ),
}

INTEGERS, ZEROS = ("compressed-tensors", "awq", "bitsandbytes", "gptq"), ("hqq", "onnx", "openvino", "torchao")
"""Formats without offsets of floats, and those that round them."""

GRAPHS = {"onnx": ("onnxscript",), "openvino": ("onnxscript", "openvino")}
"""Formats that are a graph, and what writes them."""


def from_hf(folder: Path) -> Any:
    """The model, by transformers alone."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


def weights_in(path: Path, name: str) -> dict[str, torch.Tensor]:
    """The dense weight of every linear layer in an exported model, by software that is not ours."""
    if name == "compressed-tensors":
        return from_compressed_tensors(path, wide=True)
    readers = {"awq": from_awq, "bitsandbytes": from_bitsandbytes, "gptq": from_gptq}
    readers |= {"hqq": from_hqq, "mlx": from_mlx, "torchao": from_torchao}
    if name in readers:
        return readers[name](path)
    model = from_gguf(path) if name == "gguf" else from_hf(path)
    return {key.removesuffix(".weight"): tensor for key, tensor in model.state_dict().items()}


def whole(exporters: dict[str, type[Exporter]]) -> list[str]:
    return [name for name, kind in exporters.items() if kind.takes == "model"]


def asked(exporter: Exporter, model: Any, tokenizer: Any, adapter: Any = None) -> Answer:
    """What a format says of a model, its numbers known."""
    matrices = {name: (lambda layer=layer: layer.quant_weight) for name, layer in quantized_layers(model).items()}
    subject = Subject(matrices=matrices, model=model, tokenizer=tokenizer, adapter=adapter)
    (answer,) = survey(subject, [exporter])
    return answer


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        (name, options)
        for name in whole(dict(EXPORTERS))
        for options in ({}, {"dtype": "float32"}, {"dense": "f16"})
        if set(options) <= set(EXPORTERS[name].options())
    ],
    ids=str,
)
def test_a_format_does_as_it_says(
    name: str, kind: str, options: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    if name in GRAPHS:
        pytest.skip("has no weights that are read without running it: see test_onnx_models.py")
    exporter = EXPORTERS[name].made(**options)
    model = quantized(tiny(), *MODELS[kind])
    answer = asked(exporter, model, tokenizer)
    path = tmp_path / f"out{exporter.suffix}"
    layers = {name: layer.quant_weight for name, layer in quantized_layers(model).items()}
    if answer.holds == "no":
        assert answer.layers
        with pytest.raises(ExportError) as refused:
            exporter.write(model, tokenizer, path)
        layer, _, why = str(refused.value).partition(": ")
        assert answer.layers[layer] == why
        assert list(tmp_path.iterdir()) == []
        return
    report = exporter.write(model, tokenizer, path)
    assert report.format == name
    assert path.is_file() == bool(exporter.suffix)
    found = weights_in(path, name)
    assert set(layers) <= set(found)
    same = [torch.equal(found[key].float(), weight.dequantize()) for key, weight in layers.items()]
    assert all(same) == (answer.holds == "exactly"), answer
    for key, weight in layers.items():
        torch.testing.assert_close(found[key].float(), weight.dequantize(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("name", whole(dict(EXPORTERS)))
def test_a_layout_that_is_accepted_is_held_whatever_its_numbers(name: str, kind: str) -> None:
    """And what can never be held is refused by its numbers too."""
    exporter = EXPORTERS[name]()
    for layer in quantized_layers(quantized(tiny(), *MODELS[kind])).values():
        weight = layer.quant_weight
        if exporter.accepts(weight.layout) is None:
            assert exporter.holds(weight) is None
            assert exporter.never(weight.layout) is None
        if exporter.never(weight.layout) is not None:
            assert exporter.holds(weight) is not None
            assert exporter.instead(weight.layout) is None


def test_an_adapter_goes_out_as_stock_lora_or_in_8_bits(tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny(), Format(levels="nf", bits=4)), LoRA())
    ours = logits(model, IDS)
    assert asked(EXPORTERS["lora"](), model, tokenizer, LoRA()).holds == "exactly"
    assert asked(EXPORTERS["nf8"](), model, tokenizer, LoRA()).holds == "changed"
    EXPORTERS["lora"]().write(model, tokenizer, tmp_path / "lora")
    EXPORTERS["nf8"]().write(model, tokenizer, tmp_path / "nf8")
    base = model.unload()
    export_hf(base, tokenizer, tmp_path / "dense", dtype="float32")
    theirs = PeftModel.from_pretrained(from_hf(tmp_path / "dense"), tmp_path / "lora").eval()
    assert (logits(theirs, IDS) - ours).abs().max() < 1e-3
    small = attach(base, tmp_path / "nf8").eval()
    assert 0 < (logits(small, IDS) - ours).norm() < 0.02 * (logits(base, IDS) - ours).norm() + 1e-2 * ours.norm()


@pytest.mark.parametrize("name", EXPORTERS)
def test_what_a_format_does_with_an_adapter(name: str, tokenizer: Any) -> None:
    """One that merges exactly stays exact, one that does not is refused, added up, or written beside."""
    for needed in GRAPHS.get(name, ()):
        pytest.importorskip(needed, reason=f"needs {needed} (pip install 'quadapt[{name}]')")
    exporter = EXPORTERS[name].made(**({"dtype": "float32"} if "dtype" in EXPORTERS[name].options() else {}))
    model = with_adapter(quantized(tiny()), Pooled())
    said = {
        "pooled": asked(exporter, model, tokenizer, Pooled()),
        "lora": asked(exporter, with_adapter(quantized(tiny()), LoRA()), tokenizer, LoRA()),
    }
    assert {key: (each.holds, each.words) for key, each in said.items()} == {
        "gguf": {
            "pooled": ("exactly", "codes as they are, the adapter merged first"),
            "lora": ("exactly", "codes as they are, the adapter in a file beside it"),
        },
        "hf": {
            "pooled": ("exactly", "dense weights, the adapter merged first"),
            "lora": (
                "changed",
                "dense weights, the adapter added up in them; base and adapter are added up, which rounds",
            ),
        },
        **{key: {"pooled": ("no", said["pooled"].words), "lora": ("no", said["lora"].words)} for key in INTEGERS},
        **{key: {"pooled": ("changed", said["pooled"].words), "lora": ("no", said["lora"].words)} for key in ZEROS},
        "mlx": {
            "pooled": ("exactly", "codes as they are, the adapter merged first"),
            "lora": ("no", said["lora"].words),
        },
        "lora": {"pooled": ("changed", said["pooled"].words), "lora": ("exactly", "LoRA factors in float32")},
        "nf8": {
            "pooled": ("no", said["pooled"].words),
            "lora": ("changed", "LoRA factors in 8 bits; its factors are rounded to 8 bits"),
        },
    }[name]
    reasons = {
        **dict.fromkeys(INTEGERS, (f"s that {name} cannot hold", "cannot merge into codes")),
        **dict.fromkeys(ZEROS, ("each is rounded once, so that weights differ", "cannot merge into codes")),
        "mlx": ("", "cannot merge into codes"),
        "nf8": ("takes no bits at all", ""),
        "lora": ("trained in the merged form", ""),
    }.get(name, ("", ""))
    assert reasons[0] in said["pooled"].words
    assert reasons[1] in said["lora"].words


def test_a_merged_adapter_is_held_as_the_answer_before_the_merge_says(tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny()), Pooled())
    matrices = {name: layer.merged_weight for name, layer in adapted_layers(model).items()}
    subject = Subject(matrices=matrices, model=model, tokenizer=tokenizer, adapter=Pooled())
    (answer,) = survey(subject, [EXPORTERS["gguf"]()])
    assert answer.holds == "exactly"
    merged, _ = merge(model)
    EXPORTERS["gguf"]().write(merged, tokenizer, tmp_path / "m.gguf")
    found = weights_in(tmp_path / "m.gguf", "gguf")
    for name, layer in quantized_layers(merged).items():
        assert torch.equal(found[name], layer.quant_weight.dequantize())


def test_the_architecture_and_the_tokenizer_are_asked_too(tokenizer: Any) -> None:
    model = quantized(tiny("OPT", ffn_dim=96, word_embed_proj_dim=64, pad_token_id=0))
    assert "OPTForCausalLM" in asked(EXPORTERS["gguf"](), model, tokenizer).words
    assert asked(EXPORTERS["hf"](), model, tokenizer).holds == "changed"

    class Slow:
        is_fast = False

    assert "Slow: is not a fast tokenizer" in asked(EXPORTERS["gguf"](), quantized(tiny()), Slow()).words


def test_options_belong_to_formats(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"dense='f16' is no option of format='hf', which has dtype\. .* gguf$"):
        quadapt.export(quantized(tiny()), tokenizer, tmp_path / "x", format="hf", dense="f16")
    with pytest.raises(ConfigError, match=r"rank='8' is no option of format='lora', which has none\. No format has"):
        quadapt.export(quantized(tiny()), tokenizer, tmp_path / "x", format="lora", rank="8")
    with pytest.raises(ConfigError, match=r"dtype='int8' is unknown\. Use bfloat16, float16, float32"):
        quadapt.export(quantized(tiny()), tokenizer, tmp_path / "x", format="hf", dtype="int8")
    for name, kind in EXPORTERS.items():
        assert (kind.name, kind.words().keys()) == (name, kind.options().keys())
        assert all(getattr(kind(), option) in choices for option, choices in kind.options().items())


def test_the_page_of_the_docs_says_what_the_formats_say() -> None:
    layouts = {
        name: Layout(format=format, storage=storage or Storage.default(format), out=64, columns=128)
        for name, (format, storage) in MODELS.items()
    }
    lines = formats_page(layouts).splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    table = {row[0]: row[1:] for row in rows}
    names = table["layout"]
    assert names == whole(dict(EXPORTERS))
    for name, layout in layouts.items():
        for exporter, cell in zip(names, table[name], strict=True):
            why = EXPORTERS[exporter]().accepts(layout)
            if why is None:
                assert cell.startswith("exactly: ")
            else:
                (line,) = [each for each in lines if each.startswith(f"* `{exporter}`, ") and f"{why}." in each]
                assert name in line.partition(": ")[0].split(", ")
    assert dict(zip(names, table["int4"], strict=True)) == {
        "awq": "no",
        "bitsandbytes": "no",
        "compressed-tensors": "no",
        "gguf": "exactly: codes as they are",
        "gptq": "no",
        "hf": "changed: dense weights rounded to bfloat16",
        "mlx": "exactly: codes as they are",
        **dict.fromkeys(ZEROS, "changed: codes and scales as they are, offsets as zero-points of floats"),
    }
    assert table["nf4"][names.index("gguf")] == "exactly: dense F32"


MERGED = [name for name in METHODS if method_named(name).adapter.exactness == "exact"]


@pytest.mark.parametrize("name", MERGED)
def test_the_layout_of_a_merge_is_known_before_it(name: str) -> None:
    """From the layout of the base alone; against real merges of whole matrices by adapters that do something."""
    method = method_named(name)
    format, storage, rounding = method.base()
    wanted = Layout(format=format, storage=storage, out=24, columns=128)
    base = rounding.stored(wanted)
    torch.manual_seed(0)
    dense = torch.randn(24, 128)
    over_dense = method.adapter.base == "float"
    source = dense if over_dense else rounding.without_data()(dense, wanted, {})
    params = {}
    for key, param in method.adapter.params(method.adapter.layout_of(source), 2).items():
        params[key] = torch.zeros(param.shape)
        param.init(params[key], source)
        params[key] += 0.01 * torch.randn(param.shape)
    merged = method.adapter.merge(source, params, 0.5)
    assert merged_layout(method.adapter, base) == merged.layout
    assert merged.layout.out == 24


OTHER = '''
from dataclasses import dataclass
from typing import ClassVar, Literal
from quadapt.exporters.formats import EXPORTERS, Exporter

@EXPORTERS.register("names")
@dataclass(frozen=True, kw_only=True)
class Names(Exporter):
    """A list of the layers."""

    summary: ClassVar[str] = "names of the layers"
    form: ClassVar[str] = "names"
    served_by: ClassVar[str] = "nobody"
    suffix: ClassVar[str] = ".txt"

    case: Literal["lower", "upper"] = "lower"
    """Of the letters."""

    def accepts(self, layout):
        return None if layout.format.bits < 8 else "eight bits are too many"

    def write(self, model, tokenizer, path, *, origin=None, progress=iter):
        from quadapt.exporters.report import ExportReport
        from quadapt.model.quantize import quantized_layers
        text = "\\n".join(progress(list(quantized_layers(model))))
        path.write_text(text.upper() if self.case == "upper" else text)
        return ExportReport(format="names", path=str(path), bytes=1, tensors=(), bits_per_weight=0.0)
'''


@pytest.fixture
def another(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs quadapt where another package has registered a format."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "other.py").write_text(OTHER)
    about = tmp_path / "site" / "other-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[quadapt.exporters]\nnames = other:Names\n")

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        code = f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); from quadapt.cli import main; main()"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


def test_another_package_adds_a_format(
    another: Callable[..., subprocess.CompletedProcess[str]], tokenizer: Any, tmp_path: Path
) -> None:
    model = quantized(tiny())
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert "--case" in another("export", "--help").stdout
    listed = json.loads(another("export", tmp_path / "model", "--format", "?", "--json").stdout)
    assert next(row for row in listed["formats"] if row["format"] == "names")["holds"] == "exactly"
    output = tmp_path / "names.txt"
    done = another("export", tmp_path / "model", "--format", "names", "--case", "upper", "-o", output)
    assert done.returncode == 0, done.stderr
    assert output.read_text().splitlines() == [name.upper() for name in quantized_layers(model)]
    eight = quantized(tiny(), Format(bits=8, group_size=32))
    eight.save_pretrained(tmp_path / "eight")
    tokenizer.save_pretrained(tmp_path / "eight")
    refused = another("export", tmp_path / "eight", "--format", "names", "-o", tmp_path / "no")
    assert "down_proj: eight bits are too many" in refused.stderr
    assert not (tmp_path / "no").exists()
    refused = another("export", tmp_path / "model", "--format", "gguf", "--case", "upper", "-o", tmp_path / "no")
    assert "case='upper': is no option of format='gguf', which has dense, gguf_type, embeddings" in refused.stderr
    assert refused.returncode == 2
    assert not (tmp_path / "no").exists()


def test_the_stored_tensors_of_a_lora_are_the_factors(tokenizer: Any, tmp_path: Path) -> None:
    model = with_adapter(quantized(tiny()), LoRA())
    EXPORTERS["lora"]().write(model, tokenizer, tmp_path / "lora")
    found = load_file(tmp_path / "lora" / "adapter_model.safetensors")
    for name, layer in adapted_layers(model).items():
        for part in ("A", "B"):
            stored = found[f"base_model.model.{name}.lora_{part}.weight"]
            assert torch.equal(stored, getattr(layer, f"lora_{part}")["default"].weight)


def test_what_is_refused_is_refused_from_python_before_anything_is_written(tokenizer: Any, tmp_path: Path) -> None:
    class Never(Exporter):
        name = "never"

        def accepts(self, layout: Layout) -> str | None:
            return "it holds nothing"

        def write(self, *_: Any, **__: Any) -> Any:
            raise AssertionError("written though it was refused")

    with pytest.raises(ExportError, match="q_proj: it holds nothing"):
        Never().check(quantized(tiny()), tokenizer)
    with pytest.raises(ExportError, match="q_proj: int4-g32 has offsets that compressed-tensors cannot hold"):
        quadapt.export(quantized(tiny()), tokenizer, tmp_path / "x", format="compressed-tensors")
    assert list(tmp_path.iterdir()) == []
