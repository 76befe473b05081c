"""What a plan is once it is made: a JSON object that names every layer, its grid, and what was promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import NoneType
from typing import Any

from quadapt.budget.candidates import Candidate
from quadapt.budget.program import Solution
from quadapt.errors import CheckpointError
from quadapt.quant.format import Format
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, from_fields

VERSION = 1
"""The version of a plan's file that this code writes; a file of a later version is refused."""


_FIELD_TYPES: dict[str, tuple[type, ...]] = {
    "method": (str,),
    "model": (dict,),
    "budget": (int, float),
    "rank": (int,),
    "adapters": (str, NoneType),
    "bits_per_weight": (int, float),
    "with_adapters": (int, float, NoneType),
    "objective": (int, float),
    "bound": (int, float),
}
"""What each field of the file may be."""


@dataclass(frozen=True)
class PlannedLayer:
    """How one layer is to be held."""

    layout: Layout
    """The grid, the storage and the shape that the layer is to have."""

    error: float
    """The squared error that was measured for the layer, with the low-rank part if the method starts with one."""


@dataclass(frozen=True, kw_only=True)
class BudgetPlan:
    """Bits for every layer of a model."""

    method: str
    """The name of the method that the plan was made for."""

    model: Mapping[str, Any]
    """The model that the plan was made for: its `name`, and `weights`, a digest of its weights."""

    budget: float
    """How many bits per weight were allowed."""

    rank: int
    """The rank of the low-rank part with which errors were measured; 0 if there was none."""

    adapters: str | None
    """How adapters were counted in the budget: fp16, nf8, or None: they were not."""

    bits_per_weight: float
    """True bits per weight of the quantized layers, all stored bytes counted, without adapters."""

    with_adapters: float | None
    """True bits per weight with adapters, which is then what the budget limits; None if adapters were not counted."""

    objective: float
    """The sum of the squared errors of all layers, which the plan makes small."""

    bound: float
    """A bound that the solver has proved, by the table of errors: no plan within the budget has a smaller sum of
    errors."""

    layers: Mapping[str, PlannedLayer]
    """How each layer is to be held, by the name of the layer."""

    @staticmethod
    def of(solution: Solution, shapes: Mapping[str, tuple[int, int]], **about: Any) -> BudgetPlan:
        """The plan that a solution is, for layers of these shapes `(out, in)`; `about` has the fields above."""
        layers = {
            name: PlannedLayer(option.candidate.layout(*shapes[name]), option.error)
            for name, option in solution.chosen.items()
        }
        weights = sum(out * columns for out, columns in shapes.values())
        bits = sum(layer.layout.bits for layer in layers.values())
        return BudgetPlan(
            bits_per_weight=bits / weights,
            with_adapters=solution.bits / weights if about.get("adapters") else None,
            objective=solution.objective,
            bound=solution.bound,
            layers=layers,
            **about,
        )

    def as_json(self) -> dict[str, Any]:
        """The plan as a JSON object, which is what its file holds."""
        about = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "layers"}
        layers = {
            name: {
                "out": layer.layout.out,
                "columns": layer.layout.columns,
                "bits_per_weight": layer.layout.bits_per_weight,
                "error": layer.error,
                "format": asdict(layer.layout.format),
                "storage": asdict(layer.layout.storage),
            }
            for name, layer in self.layers.items()
        }
        return {"kind": "quadapt plan", "version": VERSION, **about, "layers": layers}

    @staticmethod
    def from_json(value: Any) -> BudgetPlan:
        """The plan that a file's JSON object describes.

        Raises:
            CheckpointError: It is no plan, or damaged, or of a later version.
        """
        if not isinstance(value, dict) or value.get("kind") != "quadapt plan":
            raise CheckpointError("is no plan. Make one: quadapt plan MODEL --budget BITS --output plan.json")
        version = value.get("version")
        if type(version) is not int:
            raise CheckpointError(f"is damaged (version is {version!r:.80}). Make it anew")
        if version > VERSION:
            raise CheckpointError(f"is a plan of version {version}, this quadapt reads {VERSION}. Upgrade it")
        try:
            layers = {
                name: PlannedLayer(
                    Candidate(from_fields(Format, each["format"]), from_fields(Storage, each["storage"])).layout(
                        each["out"], each["columns"]
                    ),
                    float(each["error"]),
                )
                for name, each in value["layers"].items()
            }
            about = {name: value[name] for name in BudgetPlan.__dataclass_fields__ if name != "layers"}
            for name, types in _FIELD_TYPES.items():
                if not isinstance(about[name], types) or isinstance(about[name], bool):
                    raise TypeError(f"{name} is {about[name]!r:.80}")
            if not layers:
                raise ValueError("it has no layers")
            return BudgetPlan(**about, layers=layers)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"is damaged ({type(error).__name__}: {error}). Make it anew") from error
