"""The one PEFT layer: every adapter of ours, and stock LoRA, over a :class:`QuantLinear`.

PEFT sees an ordinary LoRA adapter (`peft_type` is LORA), so saving, loading, `load_adapter` and resuming are its own.
Which adapter of ours it is, and over which base, is said in its config: see `hf/identity.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from quadapt.errors import ConfigError, MergeError, locate
from quadapt.hf.doors import into_peft
from quadapt.hf.grid_layer import GridLoraLinear, initialize
from quadapt.hf.identity import KEY, QuadaptLoraConfig, admit, identity_of, settings_of
from quadapt.hf.tuner import finish_injection, into_tuners
from quadapt.model.select import refuse_foreign
from quadapt.nn.adapters import Adapter, CodesAdapter, GridAdapter, LoRA, adapter_from
from quadapt.nn.adapters.base import MergedForm
from quadapt.nn.quant_linear import QuantLinear, autocast
from quadapt.quant.autograd import quant_matmul
from quadapt.quant.weight import QuantWeight

BETA = "lora_beta"
"""Parameters of elastic connections, which PEFT saves and loads like any adapter weight."""


def lora_config(
    adapter: Adapter,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    target_modules: list[str] | str = "all-linear",
    base_fingerprint: str = "",
    start: str = "zero",
) -> LoraConfig:
    """A PEFT config for one of our adapters.

    Args:
        adapter: What trains.
        rank: Rank of the adapter.
        alpha: The adapter is multiplied by `alpha / rank`.
        dropout: On the adapter's input.
        target_modules: As in PEFT.
        base_fingerprint: Of the base, over which alone the adapter loads later. Empty: it is filled in when the
            adapter is put over a base.
        start: Name of the start, if it sets the factors: then the first ones are kept beside the trained.
    """
    about = {
        **adapter.identity(),
        "base_fingerprint": base_fingerprint,
        **({} if start == "zero" else {"start": start}),
    }
    return QuadaptLoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int, and takes any number
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
        auto_mapping={KEY: about},
    )


def adapter_of(config: LoraConfig) -> Adapter:
    """The adapter that a PEFT config asks for: ours where it names one, else LoRA.

    Raises:
        ConfigError: It asks for a variant of LoRA that has no meaning over codes.
    """
    for option, advice in (
        ("use_dora", "DoRA rescales the dense weight"),
        ("use_qalora", "use quadapt's qa-lora, which merges"),
        ("alora_invocation_tokens", "activated LoRA is not supported"),
    ):
        if getattr(config, option, None):
            raise ConfigError(f"LoraConfig.{option}: {advice}. Leave it unset")
    if config.init_lora_weights not in (True, False, "gaussian", "eva"):
        raise ConfigError(
            f"LoraConfig.init_lora_weights={config.init_lora_weights!r}: needs the dense weight, which a quantized "
            "layer no longer has. Use True or 'gaussian'"
        )
    return adapter_from(settings_of(config))


FIRST = ("lora_first_A", "lora_first_B")


class QuantLoraLinear(nn.Module, LoraLayer):
    """Adapters over a quantized linear layer.

    Besides `lora_A` and `lora_B` it keeps `lora_beta`, for adapters that have such numbers. An adapter that starts from
    more than zero keeps its first factors, frozen (`lora_first_A`, `lora_first_B`). With the adapter disabled the layer
    computes with these: that is the model from before training, which DPO and other losses take as their reference; the
    quantized matrix alone is not.

    Args:
        base_layer: The quantized layer (or PEFT's layer over one).
        adapter_name: PEFT's name of the first adapter.
        config: Its configuration.
        r: Its rank.
        lora_alpha: Its alpha.
        kwargs: What PEFT passes on to `LoraLayer`.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, BETA, *FIRST)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self.adapters: dict[str, CodesAdapter] = {}
        self.lora_first_A, self.lora_first_B = nn.ParameterDict(), nn.ParameterDict()
        self.frozen_peft_weight_names = {}
        self.lora_beta = nn.ParameterDict()
        self._unmerged: list[tuple[QuantWeight, Any]] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add an adapter (PEFT's hook)."""
        adapter = adapter_of(config)
        with locate(kwargs.get("target_name") or "layer"):
            adapter.check(self.quant.layout, r, config.lora_dropout)
            if not isinstance(adapter, CodesAdapter):
                raise ConfigError(
                    f"a {adapter.kind} adapter trains the grid itself, and this layer has adapters over its codes "
                    f"({', '.join(self.adapters)}). Delete or merge these first"
                )
        self.adapters[adapter_name] = adapter
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)  # type: ignore[arg-type]
        inputs = adapter.inputs(self.quant.layout)
        A, B = self._trained(adapter_name)
        if inputs != self.in_features:
            pooled = nn.Linear(inputs, r, bias=False, device=A.device, dtype=A.dtype)
            self.lora_A[adapter_name] = pooled.requires_grad_(A.requires_grad)
            A = pooled.weight
        if adapter.betas:
            beta = torch.zeros(adapter.betas, device=A.device, dtype=A.dtype)
            self.lora_beta[adapter_name] = nn.Parameter(beta, requires_grad=A.requires_grad)
        initialize(adapter, A, B, config.init_lora_weights)
        if identity_of(config).get("start"):
            for part, factor in zip(FIRST, (A, B), strict=True):
                getattr(self, part)[adapter_name] = nn.Parameter(torch.zeros_like(factor), requires_grad=False)
            self.frozen_peft_weight_names[adapter_name] = FIRST
            self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    @torch.no_grad()
    def begin(self, adapter_name: str, up: Tensor, down: Tensor) -> None:
        """Start an adapter from `up @ down`: the factors absorb the scaling."""
        root = float(self.scaling[adapter_name]) ** 0.5
        for factor, first, value in zip(
            self._trained(adapter_name),
            (self.lora_first_A[adapter_name], self.lora_first_B[adapter_name]),
            (down, up),
            strict=True,
        ):
            factor.copy_(value / root)
            first.copy_(value / root)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter (PEFT's hook)."""
        super().delete_adapter(adapter_name)
        self.adapters.pop(adapter_name, None)

    @property
    def quant(self) -> QuantLinear:
        """The quantized layer below."""
        layer = self.get_base_layer()
        assert isinstance(layer, QuantLinear)
        return layer

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """`A` and `B` of an adapter, as they act: with what `lora_beta` adds to them, where there is one."""
        beta = self.lora_beta.get(name, None)
        return self.adapters[name].factors(*self._trained(name), beta)

    def _trained(self, name: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[name].get_parameter("weight"), self.lora_B[name].get_parameter("weight")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with all active adapters."""
        self._check_forward_args(x, *args, **kwargs)
        if kwargs.pop("adapter_names", None) is not None:
            raise ConfigError(
                "adapter_names: a batch that mixes adapters is not supported over quantized layers. "
                "Run one batch per adapter"
            )
        active = [] if self.disable_adapters or self.merged else self.active()
        x = autocast(x)
        weight, bias = self._base()
        inside = [name for name in active if self.adapters[name].merged_form]
        move = (
            MergedForm(tuple((self.adapters[name], float(self.scaling[name])) for name in inside)) if inside else None
        )
        factors = {name: self.factors(name) for name in active}
        y = quant_matmul(x, weight, move, tuple(factor for name in inside for factor in factors[name]))
        for name in active:
            adapter, dropped = self.adapters[name], self.lora_dropout[name](x)
            y = adapter.side(dropped, y, weight, *factors[name], self.scaling[name])
            if adapter.betas and self.training and dropped is not x:
                beta, (_, B) = self.lora_beta[name], factors[name]
                y = adapter.undropped(x - dropped, y, weight, B, beta, self.scaling[name])
            if self.lora_bias[name]:
                y = y + self.scaling[name] * self.lora_B[name].bias.to(y.dtype)
        if self.disable_adapters:
            y = self._as_at_first(x, y)
        return y if bias is None else y + bias.to(y.dtype)

    def _base(self) -> tuple[QuantWeight, Any]:
        """Weight and bias to compute with: from before the merges, where adapters are merged and switched off."""
        if self.disable_adapters and self._unmerged:
            return self._unmerged[0]
        return self.quant.quant_weight, self.quant.bias

    def _as_at_first(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` of the quantized matrix alone, plus what the active adapters started from."""
        for name in self.active():
            if name in self.lora_first_A:
                first = self.lora_first_A[name], self.lora_first_B[name]
                y = self.adapters[name].side(x, y, self._base()[0], *first, self.scaling[name])
        return y

    def active(self) -> list[str]:
        """Names of the adapters of this layer that are active."""
        return [name for name in self.active_adapters if name in self.adapters]

    def merged_weight(self) -> QuantWeight:
        """The quantized weight with all active adapters merged into it; codes do not move.

        Raises:
            MergeError: An adapter cannot merge into codes.
        """
        return self._merged(self.active())

    def _merged(self, names: list[str]) -> QuantWeight:
        weight = self.quant.quant_weight
        for name in names:
            weight = self.adapters[name].merge(weight, *self.factors(name), self.scaling[name])
        return weight

    def merged_bias(self, names: list[str] | None = None) -> Tensor | None:
        """The layer's bias with those of the active adapters (`lora_bias`) added, `[out]`; None if there is none.

        Raises:
            MergeError: An adapter has a bias where the layer, as its model defines it, has none.
        """
        bias: Any = self.get_base_layer().bias
        for name in self.active() if names is None else names:
            if self.lora_bias[name]:
                if bias is None:
                    raise MergeError(
                        f"the adapter {name!r} has a bias (lora_bias), and the layer has none that it could merge "
                        "into. Train with lora_bias=False, or serve the adapter beside its base (quadapt export "
                        "--format lora)"
                    )
                bias = (bias + self.scaling[name] * self.lora_B[name].bias).to(bias.dtype)
        return bias

    def check_merge(self, names: list[str] | None = None) -> None:
        """Raise MergeError if an adapter (an active one, unless named) cannot merge into codes, or its bias."""
        names = [name for name in self.active() if name not in self.merged_adapters] if names is None else names
        names = [name for name in names if name in self.adapters]
        self.merged_bias(names)
        if any(self.adapters[name].exactness == "none" for name in names):
            self._merged(names)

    def first_weight(self) -> QuantWeight:
        """The quantized weight from before the first step: the base's."""
        return self.quant.quant_weight

    @torch.no_grad()
    def dense_adapted(self) -> Tensor:
        """The weight that the layer computes with, adapters included, as float32 `[out, in]`."""
        weight, active = self.quant.quant_weight, self.active()
        for name in active:
            if self.adapters[name].merged_form:
                weight = self.adapters[name].merge(weight, *self.factors(name), self.scaling[name])
        dense = weight.dequantize()
        for name in active:
            if not self.adapters[name].merged_form:
                dense = dense + self.get_delta_weight(name)
        return dense

    def settle(self, weight: QuantWeight, bias: Tensor | None) -> None:
        """Replace the quantized weight and the bias, for good."""
        self.quant.quant_weight = weight
        if bias is not None:
            self.quant.bias = nn.Parameter(bias.detach(), requires_grad=False)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge adapters into the quantized weight; codes do not move.

        Raises:
            MergeError: An adapter cannot merge into codes. Nothing has been merged then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.adapters]
        if names:
            weight, bias = self._merged(names), self.merged_bias(names)
            self._unmerged.append((self.quant.quant_weight, self.quant.bias))
            self.settle(weight, bias)
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the weight from before the merges."""
        if self._unmerged:
            self.quant.quant_weight, self.quant.bias = self._unmerged[0]
        self._unmerged.clear()
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What an adapter adds to the dense weight, float32 `[out, in]`."""
        A, B = self.adapters[adapter].as_lora(self.quant.quant_weight, *self.factors(adapter))
        return self.scaling[adapter] * (B.float() @ A.float())

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def register() -> None:
    """Make PEFT put our layer over quantized ones, once: wrappers, since PEFT has no public registry of layers."""
    stock: Callable[..., nn.Module] = LoraModel._create_new_module
    if getattr(stock, "_quadapt", False):
        return

    def create(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        quantized = isinstance(base, QuantLinear)
        if not quantized and identity_of(lora_config)["kind"] == LoRA.kind:
            return stock(lora_config, adapter_name, target, **kwargs)
        kwargs = {name: kwargs[name] for name in ("r", "lora_alpha", "target_name") if name in kwargs}
        adapter = adapter_of(lora_config)
        with locate(kwargs.get("target_name") or "layer"):
            refuse_foreign(base)
            _check_base(adapter, quantized=quantized)
        if isinstance(adapter, GridAdapter):
            return GridLoraLinear(target, adapter_name, adapter, lora_config, **kwargs)
        return QuantLoraLinear(target, adapter_name, lora_config, **kwargs)

    create._quadapt = True  # type: ignore[attr-defined]
    LoraModel._create_new_module = staticmethod(create)  # type: ignore[method-assign]
    inject: Callable[..., None] = BaseTuner.inject_adapter

    def inject_admitted(self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        given = self.peft_config[adapter_name]
        self.peft_config[adapter_name] = admit(model, given)
        inject(self, model, adapter_name, *args, **kwargs)
        finish_injection(self, model, adapter_name, given)

    BaseTuner.inject_adapter = inject_admitted  # type: ignore[method-assign]
    into_peft()
    into_tuners()


def _check_base(adapter: Adapter, *, quantized: bool) -> None:
    if quantized == (adapter.base == "float"):
        have = "quantized" if quantized else "dense"
        raise ConfigError(
            f"{adapter.kind} adapters train over {adapter.base} weights, and this layer is {have}. Give the "
            + ("dense model" if quantized else "model that quadapt has quantized")
        )


AdaptedLayer = QuantLoraLinear | GridLoraLinear


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers of a model that carry adapters of ours, by their name in the base model."""
    prefix = "base_model.model."
    return {
        name.removeprefix(prefix): module for name, module in model.named_modules() if isinstance(module, AdaptedLayer)
    }


register()
