"""Merge adapters into a quantized model, and certify what the merge did.

* **exact**: all that trained did so in the merged form, and the logits on the probe are equal bit for bit in the named
  dtype.
* **equivalent**: something was a side branch (an adapter over codes, LoRA over a dense weight); the merge rounds, and
  the certificate says how much of what the adapter does was lost.
* **lossy**: the adapted weights were quantized anew, by name (`requantize`).

What trained besides the adapters over quantized layers is merged too (`trained.py`), and listed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadapt.calibrate import Batch
from quadapt.errors import ConfigError, MergeError, locate
from quadapt.hf.identity import check_merging
from quadapt.hf.peft_layer import QuantLoraLinear, adapted_layers
from quadapt.hf.probe import answers, perplexity, random_for, with_tokens
from quadapt.hf.quantizer import adopt
from quadapt.hf.trained import (
    Part,
    adapters_off,
    changed_besides,
    check_state,
    listed,
    merge_parts,
    parts_of,
    settle_ties,
    trained_tokens,
)
from quadapt.hf.tuner import about
from quadapt.hf.wrapped import unwrapped
from quadapt.model.layer import Quantization, quantize_layer
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import left_over
from quadapt.quant.rounding import Rounding
from quadapt.quant.weight import QuantWeight, largest_move

Verdict = Literal["exact", "equivalent", "lossy"]


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """What the merge did to one layer."""

    name: str
    """The full name of the layer in the model."""

    difference: float
    """The largest difference between a merged and an adapted weight, in quantization steps of its group."""

    codes_changed: int
    """How many codes are not those of the base."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a merge kept of the adapted model, as measured on a probe."""

    verdict: Verdict
    """The result in a word: exact, equivalent or lossy."""

    dtype: str
    """The dtype in which the probe was run; the verdict holds for it."""

    probe: str
    """What the models were compared on, in words."""

    logits_equal: bool
    """Whether all logits are equal bit for bit."""

    effect_lost: float
    """`||merged - adapted|| / ||adapted - base||` over the logits: the share of what the adapter does that the merge
    lost."""

    kl: float
    """The mean KL divergence of the merged model's predictions from the adapted one's, in nats."""

    argmax_changed: float
    """The share of positions where the likeliest token changed."""

    perplexity_before: float | None
    """The perplexity of the adapted model on the probe; it means nothing if the probe is random tokens. None where a
    model does not say what comes next."""

    perplexity_after: float | None
    """The perplexity of the merged model on the probe, likewise."""

    layers: tuple[MergedLayer, ...]
    """What the merge did to each quantized layer."""

    besides: tuple[Part, ...] = ()
    """What else trained, and is part of the merged model."""

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as they are written to JSON."""
        return asdict(self)

    def __str__(self) -> str:
        worst = max((layer.difference for layer in self.layers), default=0.0)
        lost = "logits bit-equal" if self.logits_equal else f"{self.effect_lost:.2%} of the effect lost"
        besides = listed(self.besides)
        return (
            f"{self.verdict}: {lost} in {self.dtype} on {self.probe}; largest weight difference {worst:.2g} "
            f"steps, {sum(layer.codes_changed for layer in self.layers)} codes changed, KL {self.kl:.1e}"
            f"{f'; merged besides: {besides}' if besides else ''}"
        )


def merge(
    model: Any,
    *,
    probe: Batch | None = None,
    probe_name: str = "",
    requantize: Rounding | None = None,
    batches: Sequence[Batch] = (),
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> tuple[nn.Module, Certificate]:
    """Merge all that trained in a PEFT model into its quantized base.

    Args:
        model: A `PeftModel` over a quantized model, in whatever a trainer has put around it; it is used up.
        probe: What to compare the models on: token ids `[sequences, length]`, to which those whose embeddings trained
            are added; or a model's inputs by name. By default random tokens.
        probe_name: What the probe is, in words, for the certificate.
        requantize: Quantize the adapted weights anew where adapters cannot merge. Never done unasked.
        batches: What to calibrate the requantization on, if it needs any.
        progress: A function that wraps the list of layers, to show how far the work is.

    Returns:
        The merged model, an ordinary transformers model, and the certificate.

    Raises:
        MergeError: There is no adapter, or something that trained cannot merge (adapters over codes: and `requantize`
            is None). The model is unchanged then.
        CheckpointError: An adapter was trained over another base than lies under it (read from its tensors).
    """
    with unwrapped(model) as inside:
        return _merge(inside, probe, probe_name, requantize, batches, progress)


def _merge(
    model: Any,
    given: Batch | None,
    probe_name: str,
    requantize: Rounding | None,
    batches: Sequence[Batch],
    progress: Callable[[Sequence[Any]], Iterable[Any]],
) -> tuple[nn.Module, Certificate]:
    layers = {name: layer for name, layer in adapted_layers(model).items() if layer.active()}
    besides = _check(model, layers, requantize)
    own = not quantized_layers(model) or check_merging(model)
    if given is None:
        given, probe_name = random_for(model)
    tokens = trained_tokens(model)
    probe = with_tokens(given, tokens)
    model.eval()
    exact = all(layer.adapters[name].merged_form for layer in layers.values() for name in layer.active())
    exact = exact and all(part.exact for part in besides)
    adapted = answers(model, probe)
    if bool((adapted.isnan() | (adapted == torch.inf)).any()):  # some models say -inf of what cannot be
        raise ConfigError(
            "the adapted model gives NaN or infinite logits on the probe. Training diverged; lower the learning rate"
        )
    with adapters_off(model):
        base = answers(model, probe)
    made, left = about(model)
    merge_parts(model)
    if requantize is not None and requantize.needs:
        merged, rows = _round_again(model, layers, requantize, batches)
    else:
        rows = []
        for name in progress(list(layers)):
            with locate(name), torch.no_grad():
                rows.append(_merge_layer(name, layers[name], requantize))
        merged = model.unload()
    besides = settle_ties(merged, besides)
    after = answers(merged, probe)
    verdict: Verdict = "lossy" if requantize else "exact" if exact and torch.equal(adapted, after) else "equivalent"
    made["merge"] = "requantized" if requantize else verdict
    if not own:
        made["base"] = "another than the adapter was trained over, as asked"
    left = left or left_over(merged, "no adapter trained over it")
    adopt(merged, left=left, made=made, besides=changed_besides(merged, besides))
    if tokens:
        probe_name += f" and {len(tokens)} tokens whose embeddings trained"
    return merged, _compare(
        (adapted, after, base), given, merged, verdict=verdict, probe_name=probe_name, rows=rows, besides=besides
    )


def _check(model: Any, layers: dict[str, QuantLoraLinear], requantize: Rounding | None) -> list[Part]:
    """What trained besides `layers`. Raises MergeError if the model cannot be merged; nothing has been changed yet."""
    if layers and not hasattr(model, "unload"):
        raise MergeError(
            f"{type(model).__name__} has adapters, but is no PeftModel, which alone can take them off. Load the base, "
            "and the adapter with PeftModel.from_pretrained(base, FOLDER); or use quadapt merge FOLDER"
        )
    besides = parts_of(model) if hasattr(model, "unload") else []
    if not layers and not (besides and quantized_layers(model)):
        raise MergeError(f"{type(model).__name__} has no adapter over a quantized layer, so there is nothing to merge")
    check_state(model)
    for name, layer in layers.items():
        with locate(name), torch.no_grad():
            layer.merged_bias() if requantize is not None else layer.check_merge()
    return besides


def _merge_layer(name: str, layer: QuantLoraLinear, requantize: Rounding | None) -> MergedLayer:
    """Give the layer its merged weight; say how it differs from the adapted one."""
    before, adapted = layer.first_weight(), layer.dense_adapted()
    if requantize is None:
        merged = layer.merged_weight()
    else:
        quantization = Quantization(format=before.format, storage=before.layout.storage, rounding=requantize)
        merged = quantize_layer(name, adapted, quantization, {})[0].weight
    layer.settle(merged, layer.merged_bias())
    return _difference(name, before, merged, adapted)


def _difference(name: str, base: QuantWeight, merged: QuantWeight, adapted: Tensor) -> MergedLayer:
    changed = int((merged.codes() != base.codes()).sum())
    return MergedLayer(name=name, difference=largest_move(merged, adapted, merged.dequantize()), codes_changed=changed)


def _round_again(
    model: Any, layers: dict[str, QuantLoraLinear], rounding: Rounding, batches: Sequence[Batch]
) -> tuple[nn.Module, list[MergedLayer]]:
    """Requantize with a rounding that must see the model run: every layer dense first, then block by block."""
    bases = {name: layer.first_weight() for name, layer in layers.items()}
    adapted = {name: layer.dense_adapted().detach() for name, layer in layers.items()}
    model = with_dense(model, layers, next(model.parameters()).dtype)
    linears: dict[str, nn.Linear] = {name: model.get_submodule(name) for name in adapted}
    first = next(iter(bases.values())).layout
    quantization = Quantization(
        format=first.format,
        storage=first.storage,
        rounding=rounding,
        layers={name: (weight.format, weight.layout.storage) for name, weight in bases.items()},
    )
    quantize_model(model, linears, quantization, batches=batches)
    again = quantized_layers(model)
    return model, [_difference(name, base, again[name].quant_weight, adapted[name]) for name, base in bases.items()]


@torch.no_grad()
def with_dense(model: Any, layers: Mapping[str, QuantLoraLinear], dtype: torch.dtype | None = None) -> Any:
    """The base model with a dense layer, adapters added up, in the place of each adapted one; ties are not settled."""
    made = {}
    for name, layer in layers.items():
        weight, bias = layer.dense_adapted().to(dtype), layer.merged_bias()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach(), requires_grad=False)
        made[name] = linear
    plain = model.unload()
    for name, linear in made.items():
        plain.set_submodule(name, linear)
    return plain


def _distance(one: Tensor, other: Tensor) -> float:
    """The norm of a difference; where both are -inf there is none."""
    return float((one - other).float().where(one != other, 0.0).norm())


def _compare(
    logits: tuple[Tensor, Tensor, Tensor],
    given: Batch,
    model: Any,
    *,
    verdict: Verdict,
    probe_name: str,
    rows: list[MergedLayer],
    besides: Sequence[Part],
) -> Certificate:
    """Compare logits of the adapted, the merged and the base model; perplexities are of the probe that was given."""
    adapted, merged, base = logits
    effect, lost = _distance(adapted, base), _distance(merged, adapted)
    before, after = adapted.float().log_softmax(-1), merged.float().log_softmax(-1)
    return Certificate(
        verdict=verdict,
        dtype=str(adapted.dtype).removeprefix("torch."),
        probe=probe_name,
        logits_equal=bool(torch.equal(adapted, merged)),
        effect_lost=lost / effect if effect else float(lost > 0),
        kl=max(0.0, float((before.exp() * (before - after)).nan_to_num(0.0).sum(-1).mean())),
        argmax_changed=float((before.argmax(-1) != after.argmax(-1)).float().mean()),
        perplexity_before=perplexity(model, before, given),
        perplexity_after=perplexity(model, after, given),
        layers=tuple(rows),
        besides=tuple(besides),
    )
