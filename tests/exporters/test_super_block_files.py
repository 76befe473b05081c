"""GGML's K-quants: bit for bit the weights that they are made of, by `gguf` and by llama.cpp's own C functions."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from export_models import quantized, tiny
from gguf.quants import dequantize

from quadapt.exporters.ggml import BY_NAME, bytes_of, type_for, why_not, why_not_layout
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.llama_cpp import differences
from quadapt.exporters.super_blocks import SUPER_BLOCKS
from quadapt.model.embeddings import round_embeddings
from quadapt.model.quantize import quantized_layers
from quadapt.quant.format import Format, Zero
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

KINDS: dict[str, tuple[str, int, int, Zero]] = {
    "Q2_K": ("q2_k", 2, 16, "float"),
    "Q3_K": ("q3_k", 3, 16, "none"),
    "Q4_K": ("q4_k", 4, 32, "float"),
    "Q5_K": ("q4_k", 5, 32, "float"),
    "Q6_K": ("q6_k", 6, 16, "none"),
}
"""The storage, the width, the group and the zero of each type."""

FILE_TYPES = {"Q2_K": "Q2_K", "Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S", "Q5_K": "Q5_K_S", "Q6_K": "Q6_K"}


def grid_of(kind: str) -> tuple[Format, Storage]:
    scales, bits, group_size, zero = KINDS[kind]
    return Format(bits=bits, group_size=group_size, zero=zero), Storage.floating(scales, zero)


def weight(kind: str, columns: int = 768, *, size: float = 0.02, permuted: bool = False) -> QuantWeight:
    torch.manual_seed(0)
    format, storage = grid_of(kind)
    layout = Layout(format=format, storage=storage, out=48, columns=columns)
    stored = Nearest()(torch.randn(48, columns) * size * torch.rand(48, 1), layout)
    if not permuted:
        return stored
    perm = torch.randperm(columns)
    layout = Layout(format=format, storage=storage, out=48, columns=columns, permuted=True)
    return QuantWeight.build(layout, stored.packed, stored.scales, stored.offsets, perm)


def engine() -> ctypes.CDLL:
    """llama.cpp's library, whose C functions are the oracle."""
    found = importlib.util.find_spec("xllamacpp")
    if found is None or not found.submodule_search_locations:
        pytest.skip("needs xllamacpp (pip install 'quadapt[demo]')")
    return ctypes.CDLL(str(next(Path(found.submodule_search_locations[0]).glob("xllamacpp*.so"))))


def in_c(kind: str, rows: np.ndarray) -> np.ndarray:
    """Rows of blocks as `dequantize_row_q4_K` and its like read them, float32."""
    values = np.empty(rows.size // BY_NAME[kind].nbytes * 256, np.float32)
    blocks = np.ascontiguousarray(rows)
    read = getattr(engine(), f"dequantize_row_{kind[0].lower()}{kind[1:]}")
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    read(blocks.ctypes.data, values.ctypes.data, values.size)
    return values.reshape(len(rows), -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [0.02, 30.0])
def test_super_blocks_are_the_weight_bit_for_bit(kind: str, size: float) -> None:
    stored = weight(kind, size=size)
    assert why_not(stored) == why_not_layout(stored.layout) == ""
    block, rows = type_for(stored.layout), bytes_of(stored)
    assert block is not None
    assert (block.name, block.bits_per_weight) == (kind, stored.layout.bits_per_weight)
    assert rows.nbytes * 8 == stored.layout.bits  # a file takes what the model takes
    assert len(stored.codes().unique()) == 2 ** KINDS[kind][1]  # all of them are tried
    want = stored.dequantize().numpy()
    np.testing.assert_array_equal(dequantize(rows, gguf.GGMLQuantizationType[kind]), want, strict=True)
    np.testing.assert_array_equal(in_c(kind, rows), want, strict=True)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_move_whole_and_are_made_in_chunks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = weight(kind)
    whole, want = bytes_of(stored), stored.dequantize().numpy()
    order = np.random.default_rng(0).permutation(len(want))
    np.testing.assert_array_equal(in_c(kind, whole[order]), want[order])
    monkeypatch.setattr("quadapt.exporters.super_blocks.rows_per_chunk", lambda _: 7)
    np.testing.assert_array_equal(bytes_of(stored), whole)


def test_says_what_super_blocks_cannot_hold() -> None:
    for stored, why in [
        (weight("Q4_K", 384), "384 inputs are not a multiple of 256"),
        (weight("Q6_K", permuted=True), "permuted"),
        (weight("Q4_K").with_offsets(torch.zeros(48, 24), "fp16"), "its scales (q4_k)"),
    ]:
        assert why in why_not(stored)
        assert why in why_not_layout(stored.layout)


def test_ours_err_about_as_little_as_llama_cpps_own_quantizer() -> None:
    """In as many bytes, made by `ggml_quantize_chunk`; ours have the range of least squares."""
    make = engine().ggml_quantize_chunk
    make.argtypes = [ctypes.c_int, *2 * [ctypes.c_void_p], *3 * [ctypes.c_int64], ctypes.c_void_p]
    make.restype = ctypes.c_size_t
    torch.manual_seed(0)
    dense = torch.randn(48, 1024) * 0.02
    for kind in KINDS:
        format, storage = grid_of(kind)
        layout = Layout(format=format, storage=storage, out=48, columns=1024)
        rows = np.empty((48, layout.bits // 8 // 48), np.uint8)
        make(int(gguf.GGMLQuantizationType[kind]), dense.numpy().ctypes.data, rows.ctypes.data, 0, 48, 1024, None)
        theirs = np.linalg.norm(in_c(kind, rows) - dense.numpy())
        ours = float((Nearest(range="least-squares")(dense, layout).dequantize() - dense).norm())
        print(f"{kind}: error {ours / float(dense.norm()):.4f} of the weights, llama.cpp's {theirs / dense.norm():.4f}")
        assert ours < 1.02 * theirs


def test_the_page_about_exports_lists_the_super_blocks() -> None:
    page = (Path(__file__).parents[2] / "docs" / "guide" / "export.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| Q") and "_K" in line]
    assert [(name, float(bits)) for name, _, bits in rows] == [
        (each.name, each.bits_per_weight) for each in SUPER_BLOCKS
    ]
    for (_, codes, _), block in zip(rows, SUPER_BLOCKS, strict=True):
        assert codes == f"{'with offsets' if block.shifted else 'symmetric'}, of {block.bits} bits"


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_holds_the_model(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    model = tiny(hidden_size=256, intermediate_size=512, num_hidden_layers=1)
    model = quantized(model, *grid_of(kind))
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    linear = [row for row in report.tensors if row.linear]
    assert {row.type for row in linear} == {kind}
    assert not any("left as" in note for note in report.notes)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{FILE_TYPES[kind]}"]
    found = {each.name: each for each in reader.tensors}
    layer = quantized_layers(model)["model.layers.0.mlp.down_proj"].quant_weight
    down = found["blk.0.ffn_down.weight"]
    np.testing.assert_array_equal(dequantize(down.data, down.tensor_type), layer.dequantize().numpy())
    assert sum(row.nbytes for row in linear) * 8 == sum(each.layout.bits for each in quantized_layers(model).values())


@pytest.mark.parametrize("kind", ["q8_0", "q6_k"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_llama_cpp_serves_rounded_embeddings(kind: str, tied: bool, tokenizer: Any, tmp_path: Path) -> None:
    """All else is left as F32: what differs is llama.cpp's rounding of the head's inputs to 8 bits."""
    pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install 'quadapt[demo]')")
    model = tiny(hidden_size=256, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=tied)
    layouts = round_embeddings(model, kind, {})
    model = quantized(model, Format(levels="nf", bits=4))
    path = tmp_path / "model.gguf"
    ids = torch.randint(2, 300, (60,), generator=torch.Generator().manual_seed(3)).tolist()
    report = export_gguf(model, tokenizer, path)
    types = {row.name: row.type for row in report.tensors}
    ends = ["token_embd.weight", *([] if tied else ["output.weight"])]
    assert [types[name] for name in ends] == [kind.upper()] * len(ends)
    reader = {each.name: each for each in gguf.GGUFReader(path).tensors}
    for name, held in zip(ends, ("model.embed_tokens", "lm_head"), strict=False):
        read = dequantize(reader[name].data, reader[name].tensor_type)
        np.testing.assert_array_equal(read, model.get_submodule(held).weight.detach().numpy())
        assert reader[name].n_bytes * 8 == layouts[held].bits
    apart = differences(path, model, ids)
    print(f"{kind}: log-probabilities differ by at most {apart.max():.3f}, {apart.mean():.4f} on average")
    assert apart.max() < 0.5
    assert apart.mean() < 0.1


@pytest.mark.parametrize(("kind", "lost"), [("q8_0", 0.01), ("q6_k", 0.04)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_embeddings_are_rounded_on_the_way_out_if_asked(
    kind: Any, lost: float, tied: bool, tokenizer: Any, tmp_path: Path
) -> None:
    model = tiny(hidden_size=256, intermediate_size=256, num_hidden_layers=1, tie_word_embeddings=tied)
    model, path = quantized(model), tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path, embeddings=kind)
    reader = {each.name: each for each in gguf.GGUFReader(path).tensors}
    ends = {"token_embd.weight": "model.embed_tokens", **({} if tied else {"output.weight": "lm_head"})}
    for name, held in ends.items():
        assert reader[name].tensor_type.name == kind.upper()
        dense = model.get_submodule(held).weight.detach().numpy()
        apart = np.linalg.norm(dequantize(reader[name].data, reader[name].tensor_type) - dense) / np.linalg.norm(dense)
        assert 0 < apart < lost
        (note,) = [note for note in report.notes if note.startswith(name)]
        assert f"moves it by {100 * apart:.2f} % of its norm" in note
    assert ("output.weight" in reader) != tied


def test_rows_that_no_block_fits_stay_floats_and_are_named(tokenizer: Any, tmp_path: Path) -> None:
    report = export_gguf(quantized(tiny()), tokenizer, tmp_path / "model.gguf", embeddings="q6_k")
    assert "token_embd.weight: 64 numbers a row are no multiple of 256: left as F32" in report.notes
