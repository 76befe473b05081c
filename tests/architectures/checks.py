"""What is checked of one architecture: quantized or listed, walked, saved, merged; or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tests.architectures.tiny import class_of, tiny_model
from torch import Tensor, nn

import quadapt
from quadapt.calibrate import Batch, BlockWalk, call_of, sequences_in
from quadapt.calibrate.walk import LEAST_TOKENS
from quadapt.errors import QuadaptError
from quadapt.hf.quantizer import adopt
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import Selection, find_blocks, select
from quadapt.model.trial import check_reads, inputs_for, logits_of
from quadapt.nn.resident import tensors_in
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest, Rounding
from quadapt.quant.storage import Storage

FORMAT = Format(bits=4, group_size=16)
Row = dict[str, Any]


class NotBuilt(Exception):  # noqa: N818
    """A tiny model of an architecture cannot be made here."""


def examined(model_type: str, folder: Path) -> Row:
    """All that is to be known of one architecture.

    Args:
        model_type: Its name in transformers' mappings.
        folder: An empty one, for the model that is saved.

    Returns:
        A row of the table; `fault` is in it if something is wrong, `not_built` if there is no tiny model of it.
    """
    row: Row = dict(zip(("task", "class"), class_of(model_type), strict=True))
    try:
        model, batch = _built(model_type)
    except NotBuilt as error:
        return row | {"not_built": str(error)}
    row |= dict(zip(("task", "class"), class_of(model_type, type(model).__name__), strict=True))
    row |= {"inputs": sorted(call_of(model, batch).keys() - {"use_cache"})}
    try:
        selection, skip = _selected(model)
    except QuadaptError as error:
        return row | {"refused": str(error)}
    with _noted(row, "walk"):
        selection = _walked(model, batch, selection, skip)
        row["walk"] = "equal"
    row |= _counts(model, selection, skip)
    with _noted(row, "saved"):
        _saved(model, batch, selection, folder, calibrated=row["walk"] == "equal")
        row["saved"] = "equal"
    with _noted(row, "merge"):
        _merged(model_type, skip)
        row["merge"] = "exact"
    return row


@contextmanager
def _noted(row: Row, what: str) -> Iterator[None]:
    """What is raised inside stands in the row: refusals under their step, all else as a fault."""
    try:
        yield
    except QuadaptError as error:
        row[what] = f"refused: {error}"
    except Exception as error:
        row[what] = "fault"
        row.setdefault("fault", f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _built(model_type: str) -> tuple[Any, Batch]:
    try:
        model = tiny_model(model_type)
        batch = inputs_for(model, 2, 12)
        again, first = logits_of(model, batch), logits_of(model, batch)
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error
    if not torch.equal(again, first):
        raise NotBuilt("it gives other numbers each time that it is run")
    return model, batch


def _selected(model: Any) -> tuple[Selection, list[str]]:
    """What is quantized; where a refusal says what to skip, that is skipped."""
    skip: list[str] = []
    while True:
        try:
            selection = select(model, skip=skip)
            check_reads(model, selection.chosen)
        except QuadaptError as error:
            advised = [name for name in re.findall(r"--skip ([\w.]+)", str(error)) if name not in skip]
            if not advised:
                raise
            skip += advised
        else:
            return selection, skip


def _counts(model: Any, selection: Selection, skip: list[str]) -> Row:
    matrices = {
        name.removesuffix(".weight")
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.ndim > 1
    }
    listed = set(selection.chosen) | set(selection.left)
    row: Row = {"quantized": len(selection.chosen), "left": len(selection.left), "skipped": skip}
    stacks: dict[str, int] = {}
    for name in find_blocks(model):
        stacks[name.rpartition(".")[0]] = stacks.get(name.rpartition(".")[0], 0) + 1
    row["stacks"] = [f"{name} ({count})" for name, count in stacks.items()]
    if listed != matrices:
        row["fault"] = f"neither quantized nor listed: {sorted(matrices ^ listed)[:3]}"
    return row


def _walked(model: Any, batch: Batch, selection: Selection, skip: list[str]) -> Selection:
    """Walk; what a refusal says is not used, and may be skipped, is skipped. Returns what is left to quantize."""
    while True:
        try:
            _walk(model, batch, selection)
        except QuadaptError as error:
            name, _, words = str(error).partition(": ")
            if "under skip" not in words:
                raise
            skip.append(name)
            selection = select(model, skip=skip)
        else:
            return selection


@torch.no_grad()
def _walk(model: Any, batch: Batch, selection: Selection) -> None:
    """Everything that the walk gathers, and hands on, is what hooks see when the model runs as ever."""
    blocks = find_blocks(model)
    units = {block: [name for name in selection.chosen if name.startswith(f"{block}.")] for block in blocks}
    units = {block: names for block, names in units.items() if names}
    if not units:
        quantize_model(model, selection.chosen, _plan(GPTQ()), batches=[batch])
        raise AssertionError("it has no blocks, and was quantized by a walk through them")
    inputs, given = _run_whole(
        model,
        batch,
        {name: selection.chosen[name] for names in units.values() for name in names},
        {name: blocks[name] for name in units},
    )
    with BlockWalk(model, {name: blocks[name] for name in units}, [batch], size=sequences_in(batch)) as walk:
        for block in walk.order:
            walk.advance_dense(block)
            [example] = walk.examples()
            assert torch.equal(example.target, given[block]), f"{block}: gives something else in the walk"
            for names, moment in walk.advance_and_gather(
                block, {name: selection.chosen[name] for name in units[block]}
            ):
                for name in names:
                    x = torch.cat(inputs[name]) if inputs[name] else torch.empty(0, 1)
                    if moment is None:  # an expert
                        assert len(x) < LEAST_TOKENS, f"{name}: has no second moment"
                        continue
                    expected = x.T @ x / len(x)
                    error = float((moment - expected).norm() / expected.norm().clamp(min=1e-30))
                    assert error < 1e-4, f"{name}: its second moment differs by {error:.1e}"


def _run_whole(
    model: Any, batch: Batch, layers: dict[str, nn.Linear], blocks: dict[str, nn.Module]
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """What layers are given (float64 `[tokens, in]`), and what blocks give, when the model runs as ever."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in layers}
    given: dict[str, Tensor] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            inputs[name].append((args[0] if args else kwargs["input"]).flatten(0, -2).double())

        return hook

    def keep(name: str) -> Callable[..., None]:
        return lambda _, _args, output: given.__setitem__(name, next(tensors_in(output)).clone())

    hooks = [layer.register_forward_pre_hook(note(name), with_kwargs=True) for name, layer in layers.items()]
    hooks += [block.register_forward_hook(keep(name)) for name, block in blocks.items()]
    model(**call_of(model, batch))
    for hook in hooks:
        hook.remove()
    return inputs, given


def _plan(rounding: Rounding) -> Quantization:
    return Quantization(format=FORMAT, storage=Storage(), rounding=rounding)


def _saved(model: Any, batch: Batch, selection: Selection, folder: Path, *, calibrated: bool) -> None:
    """Quantized, saved and loaded again, it gives the same bits."""
    quantize_model(model, selection.chosen, _plan(GPTQ() if calibrated else Nearest()), batches=[batch])
    adopt(model, left=selection.left, made={})
    logits = logits_of(model, batch)
    assert set(quantized_layers(model)) == set(selection.chosen), "not all are quantized"
    model.save_pretrained(folder)
    again = type(model).from_pretrained(folder).eval()
    assert torch.equal(logits_of(again, batch), logits), "what is loaded gives other logits"


def _merged(model_type: str, skip: list[str]) -> None:
    """QA-LoRA's adapters, moved at random, merge exactly."""
    model, batch = _built(model_type)
    adapted = quadapt.prepare(model, method="qa-lora", rounding="nearest", bits=4, group_size=16, rank=2, skip=skip)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad and "lora" in name:
            parameter.data.normal_(std=0.02, generator=generator)
    trained = logits_of(adapted.eval(), batch)
    merged, certificate = quadapt.merge(adapted, probe=batch)
    assert certificate.verdict == "exact", str(certificate)
    assert torch.equal(logits_of(merged, batch), trained), "the merged model gives other logits"
