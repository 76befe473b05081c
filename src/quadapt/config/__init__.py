"""Every setting of every command, typed once: flags, YAML and Python all pass through here.

The settings of the pieces of a method (grid.py, tune.py) come with the pieces, and so with torch: they are imported
when they are first asked for. The others cost nothing.
"""

from typing import TYPE_CHECKING, Any

from quadapt.config.check import checked
from quadapt.config.fields import Machine, Published, Settings, Target, Walk
from quadapt.setting import Flag

if TYPE_CHECKING:
    from quadapt.config.commands import (
        ChatConfig,
        ConvertConfig,
        DemoConfig,
        DoctorConfig,
        EvalConfig,
        InitConfig,
        InspectConfig,
        MergeConfig,
        RunConfig,
        ServeConfig,
    )
    from quadapt.config.compare import CompareConfig, ReportConfig
    from quadapt.config.export import ExportConfig
    from quadapt.config.grid import Grid, PlanConfig, QuantizeConfig
    from quadapt.config.job import read_job
    from quadapt.config.spec import Spec
    from quadapt.config.tune import Adapting, PrepareConfig, TuneConfig

_PLACES = {
    "commands": (
        "ChatConfig",
        "ConvertConfig",
        "DemoConfig",
        "DoctorConfig",
        "EvalConfig",
        "InitConfig",
        "InspectConfig",
        "MergeConfig",
        "RunConfig",
        "ServeConfig",
    ),
    "compare": ("CompareConfig", "ReportConfig"),
    "export": ("ExportConfig",),
    "grid": ("Grid", "PlanConfig", "QuantizeConfig"),
    "job": ("read_job",),
    "spec": ("Spec",),
    "tune": ("Adapting", "PrepareConfig", "TuneConfig"),
}

__all__ = [
    "Adapting",
    "ChatConfig",
    "CompareConfig",
    "ConvertConfig",
    "DemoConfig",
    "DoctorConfig",
    "EvalConfig",
    "ExportConfig",
    "Flag",
    "Grid",
    "InitConfig",
    "InspectConfig",
    "Machine",
    "MergeConfig",
    "PlanConfig",
    "PrepareConfig",
    "Published",
    "QuantizeConfig",
    "ReportConfig",
    "RunConfig",
    "ServeConfig",
    "Settings",
    "Spec",
    "Target",
    "TuneConfig",
    "Walk",
    "checked",
    "read_job",
]


def __getattr__(name: str) -> Any:
    """The settings of a command, imported when they are first asked for."""
    from importlib import import_module

    for module, names in _PLACES.items():
        if name in names:
            return getattr(import_module(f"quadapt.config.{module}"), name)
    raise AttributeError(f"module 'quadapt.config' has no attribute {name!r}")
