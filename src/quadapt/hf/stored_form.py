"""How a model in the linear form is read from, and written to, the checkpoints that transformers knows.

transformers lists, for each family, how the tensors of its files become those of the model: names that change, matrices
of experts that are stacked. For the linear form the list is another one. Where files have a tensor for each matrix of
each expert, as most have, only names change, and nothing is copied. Where they hold stacks, these are taken apart into
views; `Conv1D` is turned around. Written out it all goes the other way, so that a dense model is again an ordinary
checkpoint of its family. A quantized one keeps the names of the linear form.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PrefixChange,
    Transpose,
    WeightConverter,
    WeightRenaming,
    WeightTransform,
    apply_renamings,
)

from quadapt.model.linear_form import turned
from quadapt.model.quantize import quantized_layers
from quadapt.nn.experts import Experts, Stack


def conversions(model: nn.Module, given: Sequence[WeightTransform], *, dense: bool) -> list[WeightTransform]:
    """Transformers' list for a model, changed so that it leads from files to the linear form.

    Args:
        model: In the linear form.
        given: The list of transformers.
        dense: Whether the files hold the dense model; those of a quantized one have the names of the linear form.
    """
    kept, own, done = list[WeightTransform](), list[WeightTransform](), set[str]()
    for each in given:
        found = _stack_of(model, each)
        if found is None or not isinstance(each, WeightConverter):
            kept.append(each)
            continue
        done.add(found.name)
        if dense:
            own += _by_name(each, found) or [_taken_apart(each, found)]
    if dense:
        own += [_from(stack) for stack in _once(stacks_of(model)) if stack.name not in done]
        tails = dict.fromkeys(".".join(name.split(".")[-2:]) for name in turned(model))
        own += [_Turned([f"{tail}.weight"], [f"{tail}.weight"], [_Turn()]) for tail in tails]
    return kept + own


@dataclass(frozen=True)
class Stacked:
    """A stacked parameter that experts have in transformers, their weights or their biases."""

    path: str
    """Where the experts are in the model."""

    name: str
    """The name of the parameter."""

    stack: Stack
    """How it holds their matrices."""

    count: int
    """How many experts there are."""

    @property
    def leaf(self) -> str:
        """What it is to each of the linear layers."""
        return "bias" if self.name.endswith("_bias") else "weight"

    def pieces(self) -> list[str]:
        """The names of the tensors that it is made of: for each part those of all experts."""
        return [f"{self.path}.{expert}.{part}.{self.leaf}" for part in self.stack.parts for expert in range(self.count)]

    def joined(self, pieces: list[Tensor]) -> Tensor:
        """The parameter, from all its pieces one after the other."""
        count = self.count
        return self.stack.stacked([pieces[at : at + count] for at in range(0, len(pieces), count)])


def stacks_of(model: nn.Module) -> Iterator[Stacked]:
    """The stacked parameters that a model in the linear form has in transformers."""
    for path, module in model.named_modules():
        if isinstance(module, Experts):
            for name, stack in module.stacks.items():
                yield Stacked(path, name, stack, module.count)
                if getattr(module[0], stack.parts[0]).bias is not None:
                    yield Stacked(path, f"{name}_bias", stack, module.count)


def _once(stacks: Iterable[Stacked]) -> list[Stacked]:
    """One of all that have the same name in modules of the same name."""
    return list({(each.path.rpartition(".")[2], each.name): each for each in stacks}.values())


def _stack_of(model: nn.Module, each: WeightTransform) -> Stacked | None:
    """The stacked parameter that an entry of transformers' list leads to, if it does."""
    if len(each.target_patterns) != 1:
        return None
    place, _, wanted = each.target_patterns[0].rpartition(".")
    fits = (found for found in stacks_of(model) if found.name == wanted and f".{found.path}".endswith(place))
    return next(fits, None)


class _ByName(WeightRenaming):
    """Each matrix of each expert under another name, and whatever belongs to it."""

    __slots__ = ()


def _by_name(each: Any, found: Stacked) -> list[WeightTransform]:
    """Changes of names alone, if the files have a tensor for each matrix of each expert; else nothing."""
    kinds, sources = [type(operation) for operation in each.operations], each._original_source_patterns
    stack, place = found.stack, each.target_patterns[0].rpartition(".")[0]
    simple = kinds in ([MergeModulelist], [MergeModulelist, Concatenate]) and len(sources) == len(stack.parts)
    if not simple or stack.transposed or stack.interleaved or not all(".*." in source for source in sources):
        return []
    made = list[WeightTransform]()
    for source, part in zip(sources, stack.parts, strict=True):
        before, _, after = source.partition(".*.")
        own = after.removesuffix(".weight")
        renaming = _ByName(rf"{before}\.(\d+)\.{own}\.", rf"{place}.\1.{part}.")
        made.append(_scoped(renaming, each))
    return made


def _scoped(made: Any, like: Any) -> WeightTransform:
    made.scope_prefix, made.base_model_prefix = like.scope_prefix, like.base_model_prefix
    scoped: WeightTransform = made
    return scoped


class _TakenApart(WeightConverter):
    """A stacked parameter of the files becomes linear layers."""

    __slots__ = ()

    def reverse_transform(self) -> WeightTransform:
        """Linear layers become the stacked parameter again."""
        apart: Any = self.operations[0]
        return _scoped(WeightConverter(apart.patterns, list(self._original_source_patterns), [_Stack(apart)]), self)


def _taken_apart(each: Any, found: Stacked) -> WeightTransform:
    """What transformers does to make a stack, and then taking it apart."""
    place = each.target_patterns[0].rpartition(".")[0]
    stock = [one for one in each.operations if not (isinstance(one, Transpose) and one.check_dims)]
    apart = _TakeApart(found, place, stock)
    return _scoped(_TakenApart(list(each._original_source_patterns), list(apart.names), [apart]), each)


def _from(found: Stacked) -> WeightTransform:
    """Taking apart a stack that lies in the files under the name that the model has for it."""
    apart = _TakeApart(found, found.path.rpartition(".")[2], [])
    return _TakenApart([apart.target], list(apart.names), [apart])


class _TakeApart(ConversionOps):
    """Makes views of what is stacked.

    Args:
        found: The stacked parameter.
        place: The end of the experts' path, by which names are found.
        stock: What transformers does to make the stack.
    """

    supports_many_to_many = True

    def __init__(self, found: Stacked, place: str, stock: Sequence[ConversionOps]) -> None:
        self.found, self.stock, self.target = found, list(stock), f"{place}.{found.name}"
        parts, leaf = found.stack.parts, found.leaf
        self.patterns = [f"{place}.*.{part}.{leaf}" for part in parts]
        self.names = {f"{place}.{at}.{part}.{leaf}": (at, part) for at in range(found.count) for part in parts}

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        for operation in self.stock:
            input_dict = operation.convert(
                input_dict, source_patterns=source_patterns, target_patterns=[self.target], **kwargs
            )
        whole = self.found.stack.opened(_one(input_dict), self.found.count)
        layer = kwargs["model"].get_submodule(kwargs["full_layer_name"].rpartition(".")[0])
        made = self._views(whole)
        first = next(iter(made.values()))
        if first.ndim == 2 and tuple(first.shape) != (layer.out_features, layer.in_features):
            made = self._views(whole.transpose(1, 2))  # some files of a family have them so
        return made

    def _views(self, whole: Tensor) -> dict[str, Any]:
        take = self.found.stack.bias if self.found.leaf == "bias" else self.found.stack.matrix
        return {name: take(whole, expert, part) for name, (expert, part) in self.names.items()}


class _Stack(ConversionOps):
    """The inverse of `_TakeApart`."""

    supports_many_to_many = True

    def __init__(self, apart: _TakeApart) -> None:
        self.apart = apart

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        whole = self.apart.found.stack.stacked([input_dict[pattern] for pattern in self.apart.patterns])
        if not self.apart.stock:
            return {target_patterns[0]: whole}
        found: dict[str, Any] = {self.apart.target: whole}
        for operation in reversed(self.apart.stock):
            found = operation.reverse_op.convert(
                found, source_patterns=[self.apart.target], target_patterns=target_patterns, **kwargs
            )
        return found


def _one(tensors: Mapping[str, Any]) -> Tensor:
    """The only tensor that a conversion is given."""
    (found,) = tensors.values()
    tensor: Tensor = found[0] if isinstance(found, list) else found
    return tensor


class _Turned(WeightConverter):
    """The weight of a `Conv1D` of the files becomes that of a linear layer, or the other way round."""

    __slots__ = ()


class _Turn(ConversionOps):
    """Transposes a matrix, without a copy."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        return {target_patterns[0]: _one(input_dict).T}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


_OWN = (_ByName, _TakenApart, _Turned)


def changes(model: nn.Module) -> bool:
    """Whether a model in the linear form is another than transformers would make."""
    return bool(turned(model)) or any(isinstance(module, Experts) for module in model.modules())


def revert(stock: Callable[..., Any], model: Any, state_dict: Mapping[str, Tensor]) -> Any:
    """Give a model's tensors the names and shapes that files have: transformers' `revert_weight_conversion`.

    A quantized model in the linear form keeps the names of it.
    """
    if not changes(model):
        return stock(model, state_dict)
    if quantized_layers(model):
        return state_dict
    before = getattr(model, "_weight_conversions", None)
    try:
        model._weight_conversions = conversions(model, known(model), dense=True)
        return stock(model, state_dict)
    finally:
        model._weight_conversions = before


@contextmanager
def names_alone(model: Any) -> Iterator[None]:
    """Inside, transformers gives tensors other names, and has nothing of ours to stack or to transpose."""
    if not changes(model):
        yield
        return
    before = getattr(model, "_weight_conversions", None)
    listed = list[WeightTransform]()
    for each in known(model):
        found = _stack_of(model, each)
        listed += (_by_name(each, found) if found is not None and isinstance(each, WeightConverter) else []) or [each]
    try:
        model._weight_conversions = listed
        yield
    finally:
        model._weight_conversions = before


def joins(model: Any) -> list[tuple[str, list[str], Callable[[list[Tensor]], Tensor]]]:
    """What the dense model has as one tensor: its name, what the linear form has for it by name, and how to join that.

    Stacks of which the files have each matrix by itself are none of these.
    """
    apart = set[str]()
    for each in known(model):
        found = _stack_of(model, each)
        if found is not None and isinstance(each, WeightConverter) and _by_name(each, found):
            apart.add(found.name)
    joined: list[tuple[str, list[str], Callable[[list[Tensor]], Tensor]]] = [
        (f"{stack.path}.{stack.name}", stack.pieces(), stack.joined)
        for stack in stacks_of(model)
        if stack.name not in apart
    ]
    return joined + [(f"{name}.weight", [f"{name}.weight"], _transposed) for name in turned(model)]


def _transposed(pieces: list[Tensor]) -> Tensor:
    return pieces[0].T


def names_in_model(model: Any, names: Iterable[str]) -> dict[str, str]:
    """The names of tensors in files of the dense model, by those that they have in a model in the linear form."""
    renamings = [each for each in conversions(model, known(model), dense=True) if isinstance(each, WeightRenaming)]
    return {apply_renamings(name, renamings): name for name in names}


def without_ties(stock: Callable[..., Any], state_dict: Mapping[str, Tensor], model: Any) -> Any:
    """Transformers' `remove_tied_weights_from_state_dict`, which takes no views: none of ours is tied."""
    views = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, Experts))
    views += tuple(f"{name}." for name in turned(model))
    if not views:
        return stock(state_dict, model)
    kept = stock({name: tensor for name, tensor in state_dict.items() if not name.startswith(views)}, model)
    return {
        name: kept.get(name, tensor) for name, tensor in state_dict.items() if name in kept or name.startswith(views)
    }


def known(model: Any) -> list[WeightTransform]:
    """Transformers' own list for a model: what was used when it was loaded, and all that makes stacks of experts.

    Of a quantized one, whose folder has the names of the linear form, all that its family has, but for prefixes, of
    which only loading knows whether they were there.
    """
    used = getattr(model, "_weight_conversions", None)
    every = [
        each for each in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(each, PrefixChange)
    ]
    if used is None:
        return every
    own = [each for each in used if not isinstance(each, _OWN)]
    if quantized_layers(model):
        return [each for each in own if isinstance(each, PrefixChange)] + every
    there = {str(each) for each in own}
    return own + [each for each in every if str(each) not in there and _stack_of(model, each)]
