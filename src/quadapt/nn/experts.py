"""Experts as linear layers: a stack of matrices taken apart, run for the tokens that a router sends to each.

transformers holds the experts of a layer in stacked parameters, `[experts, out, in]`, and multiplies with all of them
at once. Here each matrix of each expert is an `nn.Linear` whose weight is a view into the stack. So all that is done
with linear layers can be done with experts: they are quantized, adapted and merged one by one, and of a step only
those take part to which tokens were sent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._subclasses.fake_tensor import FakeTensor


@dataclass(frozen=True)
class Stack:
    """How a stacked parameter holds one matrix of each expert, or several below each other."""

    parts: tuple[str, ...]
    """The linear layers of an expert whose matrices it holds, by name, in order."""

    transposed: bool = False
    """Whether matrices are stored `[in, out]`."""

    interleaved: bool = False
    """Whether rows of several matrices take turns, instead of standing one matrix below the other."""

    folded: bool = False
    """Whether it has no axis for experts: the matrices of all of them stand below each other."""

    def opened(self, stack: Tensor, count: int) -> Tensor:
        """A stored tensor with an axis for experts, of which there are `count`."""
        return stack.unflatten(0, (count, -1)) if self.folded else stack

    def matrix(self, stack: Tensor, expert: int, part: str) -> Tensor:
        """The matrix `[out, in]` of one layer of an expert, a view into the stack."""
        whole = stack[expert].T if self.transposed else stack[expert]
        return self._rows(whole, part)

    def bias(self, stack: Tensor, expert: int, part: str) -> Tensor:
        """The bias `[out]` of one layer of an expert, a view into the stack `[experts, out]` of biases."""
        return self._rows(stack[expert], part)

    def _rows(self, whole: Tensor, part: str) -> Tensor:
        at, count = self.parts.index(part), len(self.parts)
        if self.interleaved:
            return whole[at::count]
        rows = len(whole) // count
        return whole[at * rows : (at + 1) * rows]

    def whole(self, pieces: Sequence[Tensor]) -> Tensor:
        """The rows of all parts of one expert, as the stack orders them; the inverse of `matrix`, and of `bias`."""
        if len(pieces) == 1:
            return pieces[0]
        return torch.stack(list(pieces), 1).flatten(0, 1) if self.interleaved else torch.cat(list(pieces))

    def stacked(self, pieces: Sequence[Sequence[Tensor]]) -> Tensor:
        """The stacked parameter again, from the matrices (or biases) of all parts, each a sequence by expert."""
        wholes = [self.whole(each) for each in zip(*pieces, strict=True)]
        transposed = self.transposed and wholes[0].ndim == 2
        made = torch.stack([each.T if transposed else each for each in wholes])
        return made.flatten(0, 1) if self.folded else made


def linear_over(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer over a tensor `[out, in]` and a bias `[out]`, which it does not copy; trainable if they are."""
    layer = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)  # not nn.Linear's, which would allocate a weight
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    kept = None if bias is None else nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    layer.register_parameter("bias", kept)
    return layer


class Expert(nn.Module):
    """The linear layers of one expert, by name; its experts' module knows how they follow each other."""


class Experts(nn.Module):
    """The experts of a layer, each with linear layers of its own; `self[3].down_proj` is one of them.

    A module of transformers becomes one where it is (:func:`take_apart`): it keeps its class, as a base, and with it
    its settings and its gate; its stacked parameters go.
    """

    stacks: Mapping[str, Stack]
    """The stacked parameters that it had, by name."""

    count: int
    """How many experts have matrices."""

    def __getitem__(self, expert: int) -> Any:
        return self._modules[str(range(self.count)[expert])]

    def __len__(self) -> int:
        return self.count

    def stages(self) -> list[tuple[str, ...]]:
        """Layers of one expert by name, in the order in which it runs them; those that share their input together."""
        names = tuple(self[0]._modules)
        return [names[:-1], names[-1:]] if len(names) > 1 else [names]

    def run(self, expert: int, x: Tensor) -> Tensor:
        """What one expert gives for some tokens `[tokens, in]`."""
        own: Any = self
        layers = self[expert]
        if hasattr(layers, "gate_proj"):
            hidden = self.gated(layers.gate_proj(x), layers.up_proj(x))
        else:
            hidden = own.act_fn(layers.up_proj(x))
        y: Tensor = layers.down_proj(hidden)
        return own.post_expert_norm(y) if getattr(self, "has_post_expert_norm", False) else y

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What goes into `down_proj`, by the model's own function where it has one."""
        apply: Callable[[Tensor], Tensor] | None = getattr(self, "_apply_gate", None)
        if apply is None or getattr(apply, "__name__", "") == "_default_apply_gate":
            own: Any = self
            product: Tensor = own.act_fn(gate) * up
            return product
        if any(stack.interleaved for stack in self.stacks.values()):
            return apply(torch.stack([gate, up], -1).flatten(-2))
        return apply(torch.cat([gate, up], -1))


class RoutedExperts(Experts):
    """Experts each of which runs on the tokens that were sent to it, as transformers' own eager loop has it."""

    @_disable_dynamo
    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up what experts give for tokens `[tokens, in]`, weighted by `[tokens, k]`.

        `top_k_index` names the experts of each token, `[tokens, k]`; numbers of no expert count for nothing.
        """
        final = torch.zeros_like(hidden_states)
        for expert, token, position in routed(top_k_index, self.count):
            given = self.run(expert, hidden_states[token]) * top_k_weights[token, position, None]
            final.index_add_(0, token, given.to(final.dtype))
        return final


class FoldedExperts(RoutedExperts):
    """Experts whose matrices, and whose activation, are those of a module in their module (DBRX)."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Add up what experts give for hidden states `[sequences, tokens, in]`, each weighted as the router says."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        return super().forward(flat, top_k_index, top_k_weights).view_as(hidden_states)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """What goes into `down_proj`, by the activation of the module inside."""
        inner: Any = self.mlp
        product: Tensor = inner.activation_fn(gate) * up
        return product


class EveryExpert(Experts):
    """Experts that are given all tokens, scaled by how much each is sent to them: mostly by nothing (Llama 4).

    A token of zeros gives zeros, so only the others are run.
    """

    @_disable_dynamo
    def forward(self, hidden_states: Tensor) -> Tensor:
        """What each expert gives for its part of `[experts * tokens, in]`."""
        found = []
        for expert, x in enumerate(hidden_states.view(self.count, -1, hidden_states.shape[-1])):
            rows = _not_zero(x, self.count)
            given = self.run(expert, x[rows]) if len(rows) else x[rows]
            found.append(torch.zeros_like(x).index_add(0, rows, given.to(x.dtype)))
        return torch.cat(found)


def _not_zero(x: Tensor, count: int) -> Tensor:
    """Numbers of the rows of `x` that are not zero; of fake tensors, of which that is unknown, one in `count`."""
    if isinstance(x, FakeTensor):
        return torch.arange(-(-len(x) // count), device=x.device)
    return x.detach().any(-1).nonzero().flatten()


def routed(top_k_index: Tensor, count: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Each expert that some token was sent to, with these tokens and the places they have given it.

    Of fake tensors, by which memory is estimated, nobody knows where tokens go: there they go evenly to as many experts
    as can have one.

    Args:
        top_k_index: The experts of each token, `[tokens, k]`.
        count: How many experts there are.
    """
    tokens, chosen = top_k_index.shape[0], top_k_index.T.reshape(-1)
    order = chosen.argsort(stable=True)
    if isinstance(top_k_index, FakeTensor):
        used = min(count, len(chosen))
        sizes = [len(chosen) // used + (each < len(chosen) % used) for each in range(used)] if used else []
    else:
        sizes = torch.bincount(chosen.clamp(max=count), minlength=count + 1)[:count].tolist()
    start = 0
    for expert, size in enumerate(sizes):
        if size:
            taken = order[start : start + size]
            yield expert, taken % tokens, taken // tokens
        start += size


@torch.no_grad()
def take_apart(module: nn.Module, kind: type[Experts], stacks: Mapping[str, Stack]) -> None:
    """Make a module of stacked experts one of linear layers, in place.

    Args:
        module: Has the stacked parameters; a bias stands beside each in `NAME_bias`, if it has one.
        kind: How its experts are run.
        stacks: How each stacked parameter holds its matrices, by name.
    """
    folded: Any = getattr(module, "num_experts", 0)
    taken, count = dict[str, tuple[Tensor, Tensor | None, bool]](), None
    for name, stack in stacks.items():
        owner, leaf = module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
        weights, biases = owner._parameters.pop(leaf), owner._parameters.pop(f"{leaf}_bias", None)
        assert weights is not None
        taken[name] = stack.opened(weights, folded), biases, weights.requires_grad
        count = len(taken[name][0])
        owner._is_hf_initialized = True  # type: ignore[assignment]  # nothing is drawn at random for what is gone
    assert count is not None
    for at in range(count):
        expert = Expert()
        for name, stack in stacks.items():
            opened, ends, trains = taken[name]
            for part in stack.parts:
                bias = None if ends is None else stack.bias(ends, at, part)
                layer = linear_over(stack.matrix(opened, at, part), bias)
                layer.requires_grad_(trains)
                expert.add_module(part, layer)
        module.add_module(str(at), expert)
    module.__class__ = _class_of(kind, type(module))
    made: Any = module
    made.stacks, made.count = dict(stacks), count


_CLASSES: dict[tuple[type[Experts], type[nn.Module]], type[nn.Module]] = {}


def _class_of(kind: type[Experts], stacked: type[nn.Module]) -> type[nn.Module]:
    """A kind of experts with the settings and the gate of transformers' class."""
    if (kind, stacked) not in _CLASSES:
        _CLASSES[kind, stacked] = type(f"{stacked.__name__}AsLinear", (kind, stacked), {"__module__": __name__})
    return _CLASSES[kind, stacked]
