"""The PEFT layer of adapters that train the grid itself, over a dense layer or a :class:`QuantLinear`.

The forward quantizes, so one such adapter is active at a time. Besides `lora_A` and `lora_B` it keeps `lora_rho` and
`lora_shift` (trained), and over a dense matrix `lora_start` (the first scales and shifts), which PEFT saves and loads
like any adapter weight.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn

from quadapt.errors import ConfigError, MergeError, locate
from quadapt.nn.adapters import Adapter, GridAdapter
from quadapt.nn.adapters.base import add_low_rank
from quadapt.nn.adapters.grid import Source
from quadapt.nn.quant_linear import QuantLinear, autocast
from quadapt.quant.weight import Layout, QuantWeight

PARTS = ("lora_rho", "lora_shift", "lora_start")


def initialize(adapter: Adapter, A: Tensor, B: Tensor, how: bool | str | None) -> None:
    """Initialize an adapter's factors as its method does, or normally distributed as PEFT's "gaussian"."""
    if A.device.type == "meta":
        return
    if how is True:
        adapter.reset(A.data, B.data)
    elif how == "gaussian":
        nn.init.normal_(A, std=1 / len(A))


class GridLoraLinear(nn.Module, LoraLayer):
    """One adapter that trains the grid of a linear layer.

    Args:
        base_layer: Dense, or quantized.
        adapter_name: PEFT's name of the adapter.
        adapter: What trains.
        config: PEFT's configuration.
        r: Rank.
        lora_alpha: Alpha.
        kwargs: What PEFT passes on to `LoraLayer`.
    """

    adapter_layer_names = (*LoraLayer.adapter_layer_names, *PARTS)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        adapter: GridAdapter,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer)
        self.fan_in_fan_out = False
        self.adapters: dict[str, GridAdapter] = {adapter_name: adapter}
        self.lora_rho, self.lora_shift, self.lora_start = (nn.ParameterDict() for _ in PARTS)
        self.frozen_peft_weight_names = {}
        self._active_adapter = adapter_name
        self.dense_steps = False
        self._unmerged: nn.Module | None = None
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Add the adapter (PEFT's hook)."""
        if adapter_name not in self.adapters:
            self.adapters[adapter_name] = self._another(config)
        adapter, source = self.adapters[adapter_name], self.source
        device = self.get_base_layer().get_parameter("weight").device
        with locate(kwargs.get("target_name") or "layer"):
            if config.lora_bias:
                raise ConfigError(f"LoraConfig.lora_bias: {adapter.kind} adapters have no bias. Leave it unset")
            layout = adapter.product(source)
            adapter.check(layout, r, config.lora_dropout)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)  # type: ignore[arg-type]
        self._factors(adapter_name, adapter.inputs(layout), r, config.init_lora_weights)
        grid = (layout.out, layout.groups)
        for name in adapter.names:
            getattr(self, f"lora_{name}")[adapter_name] = nn.Parameter(torch.zeros(grid, device=device))
        if adapter.base == "float":
            start = torch.empty(2, *grid, device=device) if device.type == "meta" else adapter.start(source)
            self.lora_start[adapter_name] = nn.Parameter(start, requires_grad=False)
            self.frozen_peft_weight_names[adapter_name] = ("lora_start",)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _another(self, config: LoraConfig) -> GridAdapter:
        """A further adapter over the same layer, such as the frozen reference of a preference trainer."""
        from quadapt.hf.peft_layer import adapter_of

        adapter = adapter_of(config)
        fits = isinstance(self.source, QuantWeight) != (adapter.base == "float")
        if not isinstance(adapter, GridAdapter) or not fits or self.merged:
            raise ConfigError(
                f"this layer's grid is trained by {', '.join(self.adapters) or 'an adapter'}; a further adapter must "
                f"train it too, over the same weights, with none merged, and {adapter.kind} cannot. Merge or delete "
                "the other first"
            )
        return adapter

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Set the active adapter (PEFT's hook).

        Raises:
            ConfigError: More than one of them would train this layer's grid at once.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        ours = [name for name in names if name in self.adapters]
        if len(ours) > 1:
            raise ConfigError(
                f"adapters {', '.join(ours)} each train the grid of this layer; set one of them at a time"
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter (PEFT's hook)."""
        super().delete_adapter(adapter_name)
        self.adapters.pop(adapter_name, None)

    def _factors(self, adapter_name: str, inputs: int, r: int, how: Any) -> None:
        """Give `lora_A` the shape that the adapter has, or take both factors away."""
        if not inputs:
            del self.lora_A[adapter_name], self.lora_B[adapter_name]
            return
        A = self.lora_A[adapter_name].get_parameter("weight")
        if inputs != self.in_features:
            self.lora_A[adapter_name] = nn.Linear(inputs, r, bias=False, device=A.device, dtype=A.dtype)
            A = self.lora_A[adapter_name].get_parameter("weight")
        initialize(self.adapters[adapter_name], A, self.lora_B[adapter_name].get_parameter("weight"), how)

    @property
    def source(self) -> Source:
        """What is trained over: the quantized weight, or the dense one."""
        layer = self.get_base_layer()
        return layer.quant_weight if isinstance(layer, QuantLinear) else layer.get_parameter("weight")

    @property
    def adapter_name(self) -> str:
        """PEFT's name of the active adapter, or of the first if none is."""
        return next(iter(self.active()), next(iter(self.adapters), ""))

    @property
    def adapter(self) -> GridAdapter:
        """The active adapter, or the first."""
        return self.adapters[self.adapter_name]

    @property
    def product(self) -> Layout:
        """Layout of the quantized matrix that a merge gives."""
        return self.adapter.product(self.source)

    def trained(self, name: str = "") -> dict[str, Tensor]:
        """What an adapter (by default the active one) has trained, by name."""
        name = name or self.adapter_name
        found = {part: getattr(self, f"lora_{part}")[name] for part in self.adapters[name].names}
        if name in self.lora_A:
            found |= {"A": self.lora_A[name].weight, "B": self.lora_B[name].weight}
        return found

    def parts(self, name: str = "") -> tuple[Source, Tensor | None, dict[str, Tensor], float]:
        """What an adapter (by default the active one) computes from: source, start, trained tensors, scaling."""
        name = name or self.adapter_name
        return self.source, self.lora_start.get(name), self.trained(name), float(self.scaling[name])

    @property
    def on(self) -> bool:
        """Whether the adapter is part of the forward."""
        return not self.disable_adapters and not self.merged and bool(self.active())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, with the adapter if it is active."""
        self._check_forward_args(x, *args, **kwargs)
        if not self.on:
            base: Any = self._unmerged if self.disable_adapters and self.merged else self.base_layer
            return base(x)
        if self.dense_steps:
            _, _, trained, scaling = self.parts()
            return add_low_rank(self.base_layer(x), autocast(x), trained["A"], trained["B"], scaling)
        y = self.adapter.forward(autocast(x), *self.parts())
        bias: Any = self.get_base_layer().bias
        return y if bias is None else y + bias.to(y.dtype)

    @torch.no_grad()
    def begin_quantizing(self) -> None:
        """Leave the dense steps: the grid starts from the matrix as these have changed it."""
        source, start, trained, scaling = self.parts()
        assert isinstance(source, Tensor)
        assert start is not None
        start.copy_(self.adapter.start(source.float() + scaling * (trained["B"].float() @ trained["A"].float())))
        self.dense_steps = False

    def active(self) -> list[str]:
        """Names of the adapters of this layer that are active: one, or none."""
        return [name for name in self.active_adapters if name in self.adapters]

    def merged_weight(self, name: str = "") -> QuantWeight:
        """The quantized weight that training of an adapter (by default the active one) arrived at.

        Raises:
            MergeError: The adapter cannot merge.
        """
        return self.adapters[name or self.adapter_name].merge(*self.parts(name))

    def check_merge(self, names: list[str] | None = None) -> None:
        """Raise MergeError if more than one adapter is to merge; each alone can."""
        names = [name for name in (self.active() if names is None else names) if name in self.adapters]
        if len({*names, *self.merged_adapters}) > 1:
            raise MergeError(f"adapters {', '.join(names)} each give this layer a grid of its own. Merge one of them")

    def first_weight(self) -> QuantWeight:
        """The quantized weight from before the first step."""
        return self.adapter.untrained(*self.parts())

    def dense_adapted(self) -> Tensor:
        """The weight that the layer computes with, float32 `[out, in]`."""
        return self.adapter.dense(*self.parts())

    def merged_bias(self) -> Tensor | None:
        """The layer's bias, `[out]`: adapters of this kind have none."""
        bias: Any = self.get_base_layer().bias
        return bias

    def settle(self, weight: QuantWeight, bias: Tensor | None) -> None:
        """Put a quantized weight in the place of the base layer, for good."""
        self.base_layer = QuantLinear.of(weight, bias)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Put the quantized product in the place of the base layer.

        Raises:
            MergeError: The adapter cannot merge. Nothing has been changed then.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) or [] if name in self.adapters]
        if names:
            self.check_merge(names)
            weight, self._unmerged = self.merged_weight(names[0]), self.get_base_layer()
            self.settle(weight, self.merged_bias())
            self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Put back the base layer."""
        if self._unmerged is not None:
            self.base_layer = self._unmerged
        self._unmerged = None
        self.merged_adapters.clear()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What training changed about the weight, float32 `[out, in]`."""
        source = self.source
        base = source.dequantize() if isinstance(source, QuantWeight) else source.float()
        return self.dense_adapted() - base

    def __repr__(self) -> str:
        return "lora." + super().__repr__()
