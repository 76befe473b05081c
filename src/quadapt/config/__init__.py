"""Every setting of every command, typed once: flags, YAML and Python all pass through here."""

from quadapt.config.check import checked
from quadapt.config.commands import (
    ChatConfig,
    DemoConfig,
    EvalConfig,
    InspectConfig,
    MergeConfig,
    PlanConfig,
    QuantizeConfig,
    RunConfig,
)
from quadapt.config.export import ExportConfig
from quadapt.config.fields import Grid, Machine, MethodName, Settings, Target, Walk
from quadapt.config.job import read_job
from quadapt.config.tune import Adapting, PrepareConfig, TuneConfig
from quadapt.setting import Flag

__all__ = [
    "Adapting",
    "ChatConfig",
    "DemoConfig",
    "EvalConfig",
    "ExportConfig",
    "Flag",
    "Grid",
    "InspectConfig",
    "Machine",
    "MergeConfig",
    "MethodName",
    "PlanConfig",
    "PrepareConfig",
    "QuantizeConfig",
    "RunConfig",
    "Settings",
    "Target",
    "TuneConfig",
    "Walk",
    "checked",
    "read_job",
]
