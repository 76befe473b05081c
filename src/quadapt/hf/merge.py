"""Merge adapters into a quantized model, and certify what the merge did.

* **exact**: trained in the merged form, and the logits on the probe are equal bit for bit in the named dtype.
* **equivalent**: the adapter was a side branch; the merge rounds its offsets, and the certificate says how much of what
  the adapter does was lost.
* **lossy**: the adapted weights were quantized anew, by name (`requantize`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quadapt.errors import ConfigError, MergeError, locate
from quadapt.hf.context import context_of
from quadapt.hf.identity import check_merging
from quadapt.hf.peft_layer import AdaptedLayer, adapted_layers, adapters_off
from quadapt.hf.quantizer import adopt, base_config
from quadapt.model.layer import Plan, quantize_layer
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import left_over
from quadapt.quant.rounding import Rounding
from quadapt.quant.weight import QuantWeight, largest_move

Verdict = Literal["exact", "equivalent", "lossy"]


@dataclass(frozen=True, kw_only=True)
class MergedLayer:
    """What the merge did to one layer."""

    name: str
    """Full name."""

    difference: float
    """Largest difference between a merged and an adapted weight, in quantization steps of its group."""

    codes_changed: int
    """Codes that are not those of the base."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What a merge kept, measured."""

    verdict: Verdict
    """exact, equivalent or lossy."""

    dtype: str
    """Dtype in which the probe was run; the verdict holds for it."""

    probe: str
    """What the models were compared on."""

    logits_equal: bool
    """Whether all logits are equal bit for bit."""

    effect_lost: float
    """`||merged - adapted|| / ||adapted - base||` over the logits: the share of what the adapter does that the merge
    lost."""

    kl: float
    """Mean KL divergence of the merged model's predictions from the adapted one's, in nats."""

    argmax_changed: float
    """Share of positions where the likeliest token changed."""

    perplexity_before: float
    """Of the adapted model on the probe (meaningless on random tokens)."""

    perplexity_after: float
    """Of the merged model on the probe."""

    layers: tuple[MergedLayer, ...]
    """Layer by layer."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def __str__(self) -> str:
        worst = max(self.layers, key=lambda layer: layer.difference)
        lost = "logits bit-equal" if self.logits_equal else f"{self.effect_lost:.2%} of the effect lost"
        return (
            f"{self.verdict}: {lost} in {self.dtype} on {self.probe}; largest weight difference {worst.difference:.2g} "
            f"steps, {sum(layer.codes_changed for layer in self.layers)} codes changed, KL {self.kl:.1e}"
        )


def random_probe(vocabulary: int, *, sequences: int = 2, length: int = 128) -> Tensor:
    """Token ids `[sequences, length]` from a fixed seed: enough to tell equal from unequal."""
    return torch.randint(0, vocabulary, (sequences, length), generator=torch.Generator().manual_seed(0))


def merge(
    model: Any,
    *,
    probe: Tensor | None = None,
    probe_name: str = "",
    requantize: Rounding | None = None,
    batches: Sequence[Tensor] = (),
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> tuple[nn.Module, Certificate]:
    """Merge all active adapters of a PEFT model into its quantized base.

    Args:
        model: A `PeftModel` over a quantized model; it is used up.
        probe: Token ids `[sequences, length]` to compare the models on; by default random ones.
        probe_name: What they are, for the certificate.
        requantize: Quantize the adapted weights anew where adapters cannot merge. Never done unasked.
        batches: Token ids to calibrate the requantization on, if it needs any.
        progress: Wraps the list of layers.

    Returns:
        The merged model, an ordinary transformers model, and the certificate.

    Raises:
        MergeError: There is no adapter, or it cannot merge and `requantize` is None. The model is unchanged then.
        CheckpointError: An adapter was trained over another base than lies under it (read from its tensors).
    """
    layers = adapted_layers(model)
    if not layers:
        raise MergeError(f"{type(model).__name__} has no adapter over a quantized layer, so there is nothing to merge")
    if requantize is None:
        _check_mergeable(layers)
    own = not quantized_layers(model) or any(layer.merged for layer in layers.values()) or check_merging(model)
    model.eval()
    if probe is None:
        probe = random_probe(model.config.get_text_config().vocab_size, length=min(128, context_of(model.config)))
        probe_name = f"{probe.numel()} random tokens"
    exact = all(layer.adapters[name].merged_form for layer in layers.values() for name in layer.active())
    adapted = _logits(model, probe)
    with adapters_off(model):
        base = _logits(model, probe)
    made, left = _about(model)
    if requantize is not None and requantize.needs:
        merged, rows = _round_again(model, layers, requantize, batches)
    else:
        rows = []
        for name in progress(list(layers)):
            with locate(name), torch.no_grad():
                rows.append(_merge_layer(name, layers[name], requantize))
        merged = model.unload()
    made["merge"] = "requantized" if requantize else "exact" if exact else "equivalent"
    if not own:
        made["base"] = "another than the adapter was trained over, as asked"
    adopt(merged, left=left or left_over(merged, "no adapter trained over it"), made=made)
    after = _logits(merged, probe)
    equal = bool(torch.equal(adapted, after))
    verdict: Verdict = "lossy" if requantize else "exact" if exact and equal else "equivalent"
    return merged, _compare(adapted, after, base, probe, verdict=verdict, probe_name=probe_name, rows=rows)


def _about(model: Any) -> tuple[dict[str, Any], Mapping[str, str]]:
    """How a quantized base was made and what it leaves unquantized; of a dense base there is nothing to say."""
    if not quantized_layers(model):
        kinds = {layer.adapters[name].kind for layer in adapted_layers(model).values() for name in layer.adapters}
        return {"method": ", ".join(sorted(kinds))}, {}
    config = base_config(model)
    return dict(config.made), config.left


def _check_mergeable(layers: dict[str, AdaptedLayer]) -> None:
    for name, layer in layers.items():
        if any(layer.lora_bias[active] or layer.adapters[active].exactness == "none" for active in layer.active()):
            with locate(name), torch.no_grad():
                layer.merged_weight()


def _merge_layer(name: str, layer: AdaptedLayer, requantize: Rounding | None) -> MergedLayer:
    """Give the layer its merged weight; say how it differs from the adapted one."""
    before, adapted = layer.first_weight(), layer.dense_adapted()
    if requantize is None:
        merged = layer.merged_weight()
    else:
        plan = Plan(format=before.format, storage=before.layout.storage, rounding=requantize)
        merged = quantize_layer(name, adapted, plan, {})[0].weight
    layer.settle(merged)
    return _difference(name, before, merged, adapted)


def _difference(name: str, base: QuantWeight, merged: QuantWeight, adapted: Tensor) -> MergedLayer:
    changed = int((merged.codes() != base.codes()).sum())
    return MergedLayer(name=name, difference=largest_move(merged, adapted, merged.dequantize()), codes_changed=changed)


def _round_again(
    model: Any, layers: dict[str, AdaptedLayer], rounding: Rounding, batches: Sequence[Tensor]
) -> tuple[nn.Module, list[MergedLayer]]:
    """Requantize with a rounding that must see the model run: every layer dense first, then block by block."""
    bases = {name: layer.first_weight() for name, layer in layers.items()}
    adapted = {name: layer.dense_adapted().detach() for name, layer in layers.items()}
    biases: dict[str, Any] = {name: layer.get_base_layer().bias for name, layer in layers.items()}
    model = model.unload()
    linears = {}
    for name, weight in adapted.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=biases[name] is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(next(model.parameters()).dtype), requires_grad=False)
        linear.bias = biases[name]
        model.set_submodule(name, linear)
        linears[name] = linear
    first = next(iter(bases.values())).layout
    plan = Plan(
        format=first.format,
        storage=first.storage,
        rounding=rounding,
        layers={name: (weight.format, weight.layout.storage) for name, weight in bases.items()},
    )
    quantize_model(model, linears, plan, batches=batches)
    again = quantized_layers(model)
    return model, [_difference(name, base, again[name].quant_weight, adapted[name]) for name, base in bases.items()]


@torch.no_grad()
def _logits(model: nn.Module, probe: Tensor) -> Tensor:
    device = next(model.parameters()).device
    rows = [model(input_ids=row[None].to(device), use_cache=False).logits[0].cpu() for row in probe]
    return torch.stack(rows)


def _compare(
    adapted: Tensor,
    merged: Tensor,
    base: Tensor,
    probe: Tensor,
    *,
    verdict: Verdict,
    probe_name: str,
    rows: list[MergedLayer],
) -> Certificate:
    if not bool(torch.isfinite(adapted).all()):
        raise ConfigError(
            "the adapted model gives NaN or infinite logits on the probe. Training diverged; lower the learning rate"
        )
    effect = float((adapted - base).float().norm())
    lost = float((merged - adapted).float().norm())
    before, after = adapted.float().log_softmax(-1), merged.float().log_softmax(-1)
    return Certificate(
        verdict=verdict,
        dtype=str(adapted.dtype).removeprefix("torch."),
        probe=probe_name,
        logits_equal=bool(torch.equal(adapted, merged)),
        effect_lost=lost / effect if effect else float(lost > 0),
        kl=max(0.0, float((before.exp() * (before - after)).sum(-1).mean())),
        argmax_changed=float((before.argmax(-1) != after.argmax(-1)).float().mean()),
        perplexity_before=_perplexity(before, probe),
        perplexity_after=_perplexity(after, probe),
        layers=tuple(rows),
    )


def _perplexity(log_probabilities: Tensor, probe: Tensor) -> float:
    picked = log_probabilities[:, :-1].gather(-1, probe[:, 1:, None])
    return float((-picked.mean()).exp())
