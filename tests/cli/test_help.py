"""What the commands say of themselves: every setting, in its own words, at once."""

from __future__ import annotations

import ast
import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args

import pytest
from commands import give
from typer import rich_utils

import quadapt
from quadapt.cli import COMMANDS
from quadapt.cli.commands import settings_of
from quadapt.config import EvalConfig, ExportConfig, Flag, Settings, TuneConfig, checked, fields, grid, tune
from quadapt.errors import ConfigError
from quadapt.methods import Recipe, Run
from quadapt.methods.first import FIRSTS
from quadapt.nn.adapters import ADAPTERS
from quadapt.nn.objective import OBJECTIVES
from quadapt.nn.starts import STARTS
from quadapt.quant.format import Format
from quadapt.quant.rounding import ROUNDINGS
from quadapt.setting import Count
from quadapt.setting import settings_of as declared_settings


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rich_utils, "MAX_WIDTH", 400)


def plain(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_every_setting_with_its_words(command: str) -> None:
    said = plain(give(command, "--help", code=0).out)
    kind = settings_of(command)
    assert plain(kind.__doc__ or "?") in said
    assert plain(kind.__doc__ or "?") == COMMANDS[command][2]
    for name, field in kind.model_fields.items():
        flag = next(item for item in field.metadata if isinstance(item, Flag))
        assert field.description, name
        assert plain(field.description) in said, name
        assert (name if flag.positional else f"--{name.replace('_', '-')}") in said, name
        for alias in flag.aliases:
            assert alias in said
        for choice in choices(field.annotation):
            assert choice in said, (name, choice)
    assert "--json" in said
    assert "--debug" in said


def choices(annotation: Any) -> list[str]:
    kinds = [annotation, *get_args(annotation)]
    return [str(choice) for kind in kinds if getattr(kind, "__origin__", None) is Literal for choice in get_args(kind)]


def test_help_lists_every_command() -> None:
    said = give("--help", code=0).out
    for command in [*COMMANDS, "run"]:
        assert f" {command} " in said
    assert plain(said) == plain(give().out)
    assert "YAML file" in give("run", "--help", code=0).out


def test_help_is_quick(run_python: Callable[..., str]) -> None:
    code = """
import sys
from quadapt.cli import main
try:
    main()
except SystemExit as error:
    assert error.code == 0, error.code
assert not {"torch", "transformers", "peft", "numpy", "datasets"} & set(sys.modules)
"""
    assert "quantize" in run_python(code, "--help")
    assert "--requantize" in run_python(code, "merge", "--help")
    assert "--dense" in run_python(code, "export", "--help")


def test_version() -> None:
    assert give("--version", code=0).out == f"quadapt {quadapt.__version__}\n"


def test_no_setting_is_typed_twice() -> None:
    """What a piece declares comes from there alone, with its words, its type and its default."""
    pieces = [Format, Recipe, Run, *ROUNDINGS.values(), *STARTS.values(), *ADAPTERS.values(), *OBJECTIVES.values()]
    pieces += FIRSTS.values()
    declared = {name for piece in pieces for name in declared_settings(piece)}
    assert declared >= {"bits", "rank", "pooling", "init", "fisher", "keep_targets", "calibration_epochs", "batch_size"}
    typed: set[str] = set()
    for module in (fields, grid, tune):
        classes = [node for node in ast.parse(inspect.getsource(module)).body if isinstance(node, ast.ClassDef)]
        for node in classes if module is not grid else [each for each in classes if each.name == "Grid"]:
            own = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}  # type: ignore[union-attr]
            assert not own & declared, (node.name, own & declared)
            assert not typed & own - {"output", "method"}, (node.name, typed & own)  # with a default of tune's own
            typed |= own
    assert declared | typed | {"rounding", "range", "start", "objective", "tune_first"} == set(TuneConfig.model_fields)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_setting_has_a_default_that_is_allowed(command: str) -> None:
    kind = settings_of(command)
    needed = {
        name: 1.0 if field.annotation is float else "x"
        for name, field in kind.model_fields.items()
        if field.is_required()
    }
    if kind is ExportConfig:  # which needs an output for all formats but "?"
        needed["output"] = "x"
    if kind is EvalConfig:  # which needs data or tasks
        needed["data"] = "x"
    defaults = {name: field.default for name, field in kind.model_fields.items() if name not in needed}
    defaults = {name: value for name, value in defaults.items() if value != ""}  # a name that is made of the others
    defaults.pop("method", None)  # which is a part of that name, if it is given
    assert checked(kind, {**needed, **defaults}) == checked(kind, needed)


# --- from settings to flags -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        ((), {}),
        (("--bits", "3", "--max-seq-length", "64", "--lora-r", "8"), {"bits": 3, "seq_len": 64, "rank": 8}),
        (("--lr-scheduler-type", "cosine", "--num-train-epochs", "0.5"), {"schedule": "cosine", "epochs": 0.5}),
        (("--no-completion-only", "--packing"), {"completion_only": False, "packing": True}),
        (("--skip", "a,b", "--skip", "c"), {"skip": ("a", "b", "c")}),
        (("--torch-dtype", "bfloat16", "--quant-type", "nf"), {"dtype": "bfloat16", "levels": "nf"}),
        (("--output-dir", "other"), {"output": "other"}),
    ],
)
def test_flags_reach_the_settings(
    arguments: tuple[str, ...], want: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[TuneConfig] = []
    monkeypatch.setattr("quadapt.jobs.tune.tune", lambda config, _: got.append(config) or {})
    give("tune", "dense", "--data", "d", *([] if "--output-dir" in arguments else ["-o", "o"]), *arguments, code=0)
    given = {"model": "dense", "data": "d", "output": "o", **want}
    assert got == [TuneConfig(**given)]
    assert got[0].model_fields_set == set(given)


def test_what_is_not_json_is_null(monkeypatch: pytest.MonkeyPatch) -> None:
    result = {"loss": float("nan"), "all": [float("inf"), 1.5, {"deep": (float("-inf"),)}], "text": "größe"}
    monkeypatch.setattr("quadapt.jobs.inspect.inspect", lambda *_: result)
    said = give("inspect", "m", "--json", code=0)
    assert said.json == {"loss": None, "all": [None, 1.5, {"deep": [None]}], "text": "größe"}
    assert json.loads(said.out)


class Example(Settings):
    """Settings to check."""

    rank: Annotated[Count, Flag()] = 1
    """A number."""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rnk": 2}, r"^at: rnk is not a setting\. Did you mean rank\?$"),
        ({"other": 2}, r"^at: other is not a setting\. Known are rank$"),
        ({"rank": "a"}, r"^at: rank='a': must be a whole number, at least 1$"),
        ({"rank": 0}, r"^at: rank=0: must be a whole number, at least 1$"),
        ({"rank": "a", "rnk": 2}, r"^at: rnk is not a setting"),
    ],
)
def test_what_is_wrong_with_settings(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        checked(Example, values, "at: ")
