"""Block-AP: train a block's weights, scales and offsets until the quantized block does what the dense one did."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from quadapt.errors import CalibrationError, ConfigError
from quadapt.nn.adapters.l4q import L4Q
from quadapt.nn.quant_linear import autocast
from quadapt.nn.resident import moved, tensors_in
from quadapt.quant.fixed import mean, total
from quadapt.quant.grids import as_float, implied_offsets
from quadapt.quant.rounding import ROUNDINGS, BlockRounding, Nearest, Statistics, find_grid, real_codes
from quadapt.quant.weight import Layout, QuantWeight
from quadapt.setting import Count, setting


class Example(NamedTuple):
    """A few sequences on their way through a block."""

    args: tuple[Any, ...]
    """Arguments of the block's forward by position, as they come from the quantized blocks before it."""

    kwargs: Mapping[str, Any]
    """Arguments of the block's forward by name."""

    target: Tensor
    """What the dense block gives behind dense blocks, the first of its tensors: `[sequences, length, hidden]`."""

    def on(self, device: torch.device) -> Example:
        """The sequences with all their tensors on a device."""
        return Example(*moved(tuple(self), device))


@ROUNDINGS.register("block-ap")
@dataclass(frozen=True, kw_only=True)
class BlockAP(BlockRounding):
    """Block-AP, EfficientQAT's first stage (Chen et al. 2024, arXiv:2407.11062, §3.2): block-wise training of all.

    Weights, scales and offsets of a block train by AdamW to lower the mean squared error of its output; then the codes
    are fixed. Inputs come from the already quantized blocks, targets from the dense model. After each epoch the error
    on held-out sequences is measured, and the best state is kept, the first one (nearest rounding) included.

    Differs: learning rates are relative, for scales and offsets to the scale, for weights to the matrix's root mean
        square; the paper's (1e-4, and 2e-5 at 2 bits, 1e-5 above) are absolute, for scales and weights of about 0.01
        and 0.02. Its data are 4096 sequences of 2048 tokens.
    """

    summary: ClassVar[str] = "trains block by block on the calibration text"
    needs: ClassVar[frozenset[str]] = frozenset({"hidden_states"})

    range: str = "minmax"
    """What a group's levels span at the start, by the name of a range as in `Nearest`."""

    epochs: Count = setting(panel="Quantization", name="calibration_epochs", default=2)
    """How often training passes over the calibration sequences."""

    learning_rate: float = 1e-2
    """The learning rate of scales and offsets, relative to the scale."""

    weight_learning_rate: float = 5e-3
    """The learning rate of weights, relative to their root mean square; above 2 bits half of it is taken."""

    held_out: float = 0.125
    """The share of the sequences that chooses the epoch instead of training."""

    def check(self, layout: Layout) -> None:
        Nearest(range=self.range).check(layout)
        if layout.format.levels != "int":
            raise ConfigError(f"levels={layout.format.levels!r}: block-ap trains even steps. Use levels='int'")
        if _quantizer(layout).layout(layout.out, layout.columns) != layout:
            raise ConfigError(
                f"block-ap cannot hold scales as {layout.storage.scales} and offsets as {layout.storage.offsets}. "
                "Use fp16 or fp32 for both"
            )
        if self.epochs < 1 or self.batch_size < 1 or not 0 < self.held_out < 1:
            raise ConfigError("block-ap: epochs and batch_size must be 1 or more, held_out between 0 and 1")

    def __call__(self, weight: Tensor, layout: Layout, statistics: Statistics) -> QuantWeight:
        """The first state: nearest rounding. A block as a whole is quantized by :meth:`fit`."""
        self.check(layout)
        return Nearest(range=self.range)(weight, layout)

    def layer(self, linear: nn.Linear, layout: Layout) -> BlockAPLinear:
        return BlockAPLinear(linear, layout, self.range)

    def of_layer(self, layer: BlockAPLinear) -> QuantWeight:
        return layer.quantized()

    def fit(
        self, block: nn.Module, layers: Sequence[BlockAPLinear], examples: Sequence[Example]
    ) -> tuple[float, float]:
        """Train `layers`, which stand in `block`, in place.

        Args:
            block: Gives hidden states, or a tuple that starts with them.
            layers: Those of its layers that are to be quantized.
            examples: At least two. They are brought to the layers' device as they are used.

        Returns:
            Relative error of the block's output on the held-out examples, before and after: norm of the difference over
            norm of the target.

        Raises:
            CalibrationError: There are too few examples, or the outputs are not finite.
        """
        if len(examples) < 2:
            raise CalibrationError(
                f"block-ap needs at least {2 * self.batch_size} calibration sequences, to train on and to choose by. "
                "Give more text, or a smaller --calibration-length"
            )
        count = min(len(examples) - 1, max(1, round(self.held_out * len(examples))))
        measured, seen, device = examples[:count], examples[count:], layers[0].source.device
        first = best = _error(block, measured, device)
        if not math.isfinite(first):
            raise CalibrationError("the block's outputs are not finite. Calibrate in float32 (--dtype float32)")
        kept = [layer.state() for layer in layers]
        optimizer = self.optimizer(layers)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(seen))
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.epochs):
            for at in torch.randperm(len(seen), generator=generator).tolist():
                step(block, seen[at].on(device), optimizer)
                schedule.step()
            error = _error(block, measured, device)
            if error < best:
                best, kept = error, [layer.state() for layer in layers]
        for layer, state in zip(layers, kept, strict=True):
            layer.restore(state)
        return first, best

    def optimizer(self, layers: Sequence[BlockAPLinear]) -> torch.optim.Optimizer:
        """AdamW over all that trains in some layers, at the learning rates of the first step.

        It is fused: one pass over weights, gradients and moments, where else there are ten, each as long as a product.
        """
        groups = [group for layer in layers for group in self._groups(layer)]
        return torch.optim.AdamW(groups, weight_decay=0, fused=True)

    def _groups(self, layer: BlockAPLinear) -> list[dict[str, Any]]:
        share = 1.0 if layer.adapter.bits == 2 else 0.5
        size = float(mean(layer.source.detach().square()).sqrt())
        return [
            {"params": [layer.source], "lr": share * self.weight_learning_rate * size},
            {"params": list(layer.trained.values()), "lr": self.learning_rate},
        ]


class BlockAPLinear(nn.Module):
    """A linear layer whose weight, scales and offsets train while forward quantizes them.

    Args:
        linear: The dense layer, which is not modified.
        layout: The layout of the quantized weight.
        range_: The range that the first grid spans, by its name as in `Nearest`.

    Raises:
        ScaleUnderflow: The scales do not fit their stored dtype.
    """

    def __init__(self, linear: nn.Linear, layout: Layout, range_: str = "minmax") -> None:
        super().__init__()
        weight = as_float(linear.weight.detach()).clone()
        scales, offsets = find_grid(weight, layout, range_)
        shift = implied_offsets(layout, scales, offsets)
        assert shift is not None  # integers have offsets, if only implied ones
        half = 2 ** (layout.format.bits - 1)
        self.adapter, self.bias = _quantizer(layout), linear.bias
        self.source = nn.Parameter(weight)
        self.start = torch.stack([scales, shift + half * scales])
        declared = self.adapter.grid_params(layout)
        self.trained = nn.ParameterDict({n: torch.zeros_like(scales) for n, param in declared.items() if param.trains})

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output with the quantized weight."""
        y = self.adapter.forward(autocast(x), self.source, self._params(), 1.0)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def quantized(self) -> QuantWeight:
        """The quantized weight that forward computes with."""
        return self.adapter.quantized(self.source, self._params(), 1.0)

    @torch.no_grad()
    def real_codes(self) -> Tensor:
        """The trained weight in units of the trained grid, float32 `[out, in]`: its roundings are the codes."""
        return real_codes(self.source.detach(), self.quantized())

    def _params(self) -> dict[str, Tensor]:
        """What the quantizer computes from; there is no `A` and `B`."""
        return {**dict(self.trained.items()), "start": self.start}

    def state(self) -> list[Tensor]:
        """A copy of all that trains."""
        return [parameter.detach().clone() for parameter in (self.source, *self.trained.values())]

    @torch.no_grad()
    def restore(self, state: Sequence[Tensor]) -> None:
        """Put a copy of the trained tensors, made earlier, back in place."""
        for parameter, kept in zip((self.source, *self.trained.values()), state, strict=True):
            parameter.copy_(kept)


def _quantizer(layout: Layout) -> L4Q:
    """L4Q's forward without `A` and `B`: over a weight that trains itself."""
    scales = layout.storage.of_scales.trained
    format = layout.format
    assert format.zero != "default"
    return L4Q(bits=format.bits, group_size=format.group_size, offsets=format.zero, order="round-clamp", scales=scales)


def step(block: nn.Module, example: Example, optimizer: torch.optim.Optimizer) -> None:
    """Lower the distance of a block's output from its target, by one step of an optimizer.

    Args:
        block: It holds the layers that train.
        example: On their device.
        optimizer: Over all that trains, which alone gets gradients: not biases and norms of the block.
    """
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _distance(block, example).backward(inputs=trained)
    optimizer.step()
    optimizer.zero_grad()


def _output(block: nn.Module, example: Example) -> Tensor:
    return next(tensors_in(block(*example.args, **example.kwargs)))


def _distance(block: nn.Module, example: Example) -> Tensor:
    with torch.enable_grad():
        return torch.nn.functional.mse_loss(_output(block, example).float(), example.target.float())


@torch.no_grad()
def _error(block: nn.Module, examples: Sequence[Example], device: torch.device) -> float:
    sums = [_squares(block, each.on(device)) for each in examples]  # read in the end: a GPU need not wait for each
    squares, norms = torch.stack(sums).sum(0).tolist()
    return math.sqrt(squares / norms) if norms else math.sqrt(squares)


def _squares(block: nn.Module, example: Example) -> Tensor:
    """Squared error of the block's output, and squared target; float64 `[2]`."""
    target = example.target.double()
    return torch.stack([total((_output(block, example).double() - target).square()), total(target.square())])
