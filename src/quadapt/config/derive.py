"""Settings of commands made of the settings of pieces: each is typed, documented and defaulted where its piece is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, replace
from typing import Annotated, Any, Literal, TypeVar, get_args, get_type_hints

from pydantic import BaseModel, Field, ValidatorFunctionWrapHandler, WrapValidator, create_model

from quadapt.registry import Registry
from quadapt.setting import settings_of, words_of

S = TypeVar("S", bound=BaseModel)
Fields = dict[str, tuple[Any, Any]]
"""Fields as pydantic makes a model of them: type and default, by name."""


def fields_of(*pieces: type, own_defaults: bool = False, owners: Mapping[str, Sequence[str]] | None = None) -> Fields:
    """The declared settings of some dataclasses, as fields of a command.

    Args:
        pieces: The dataclasses; if several have a setting of the same name, the first counts.
        own_defaults: Whether what is not given is the dataclass's default. Otherwise it is None: the method's choice.
        owners: Names that stand in front of a setting's words: of the pieces or methods that have it.
    """
    found: Fields = {}
    for piece in pieces:
        hints, words = get_type_hints(piece, include_extras=True), words_of(piece)
        for name, field in settings_of(piece).items():
            if name in found:
                continue
            flag = replace(field.metadata["flag"], of_piece=not own_defaults)
            type_, said = hints[field.name], words[field.name]
            if owners is not None:
                said = f"{', '.join(owners[name])}: {said}"
            if own_defaults:
                default = ... if field.default is MISSING else field.default
            else:
                type_, default = _without(type_, field.default) | None, None
                said += "" if "Default" in said else " Default: the method's."
            found[name] = (Annotated[type_, flag], Field(default, description=said))
    return found


def _without(type_: Any, default: object) -> Any:
    """A type without the word that stands for its default."""
    if default != "default":
        return type_
    words = [word for each in get_args(type_) for word in (get_args(each) or (each,)) if word != default]
    return Literal[tuple(words)]


def choice(name: str, registry: Registry[Any], words: str, flag: Any) -> Fields:
    """A setting that chooses a piece by its name, or, from Python, is the piece itself."""

    def known(value: Any, check: ValidatorFunctionWrapHandler) -> Any:
        return value if type(value) in classes else check(value)

    classes = {cls for cls in registry.values() if isinstance(cls, type)}
    each = "; ".join(f"{name}: {cls.summary}" for name, cls in registry.items() if getattr(cls, "summary", ""))
    said = f"{words} {each}. Default: the method's."
    names: Any = Literal[tuple(registry)]
    type_: Any = Annotated[names | None, WrapValidator(known), replace(flag, of_piece=True)]
    return {name: (type_, Field(None, description=said))}


def of_pieces(registry: Mapping[str, type], users: Callable[[str], Sequence[str]] | None = None) -> Fields:
    """The declared settings of all pieces of an axis; the words begin with the names of those that have them."""
    owners: dict[str, list[str]] = {}
    for name, cls in registry.items():
        for setting in settings_of(cls):
            owners.setdefault(setting, []).extend(users(name) if users else [name])
    return fields_of(*registry.values(), owners=owners)


def adding(fields: Fields) -> Callable[[type[S]], type[S]]:
    """A class decorator that adds fields to a class of settings."""

    def add(cls: type[S]) -> type[S]:
        made: Any = create_model(  # type: ignore[call-overload] # what pydantic takes is not known to mypy
            cls.__name__, __base__=cls, __module__=cls.__module__, __doc__=cls.__doc__, **fields
        )
        return made

    return add
