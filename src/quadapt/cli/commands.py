"""The command line. Flags, types and words of `--help` come from `config.py`; the work is done in `jobs/`."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperGroup

from quadapt import cli, config
from quadapt.config import Flag, Settings, checked
from quadapt.errors import ConfigError, QuadaptError
from quadapt.limits import limit_of
from quadapt.report.ui import UI

COMMANDS: dict[str, tuple[str, str, str]] = {
    "init": (
        "InitConfig",
        "quadapt.jobs.init:init",
        "Write a commented job file for `quadapt run`, by four questions; options answer them without a terminal.",
    ),
    "quantize": ("QuantizeConfig", "quadapt.jobs.quantize:quantize", "Quantize a model to low bits."),
    "convert": (
        "ConvertConfig",
        "quadapt.jobs.convert:convert",
        "Write a model that others have quantized in quadapt's own form, with the same numbers.",
    ),
    "plan": (
        "PlanConfig",
        "quadapt.jobs.plan:plan",
        "Choose bits for every layer, so that a model fits a budget and errs least; quantize and tune take the plan.",
    ),
    "tune": (
        "TuneConfig",
        "quadapt.jobs.tune:tune",
        "Fine-tune a model: quantize it if it is not yet, train an adapter over it.",
    ),
    "merge": ("MergeConfig", "quadapt.jobs.merge:merge", "Merge an adapter into its quantized base."),
    "eval": ("EvalConfig", "quadapt.jobs.evaluate:evaluate", "Measure a model on held-out data."),
    "export": ("ExportConfig", "quadapt.jobs.export:export", "Write a model in a format that others serve."),
    "compare": (
        "CompareConfig",
        "quadapt.jobs.compare:compare",
        "Tune a model by several methods at several widths, and show what each keeps, on a page for a browser.",
    ),
    "report": (
        "ReportConfig",
        "quadapt.jobs.report:report",
        "Show what became of a run, or of a comparison, on a page for a browser.",
    ),
    "inspect": ("InspectConfig", "quadapt.jobs.inspect:inspect", "Say what a folder holds."),
    "doctor": (
        "DoctorConfig",
        "quadapt.jobs.doctor:doctor",
        "Say what is installed, what this machine has, and whether the kernels are right on it.",
    ),
    "chat": ("ChatConfig", "quadapt.jobs.chat:chat", "Talk to a model in the terminal."),
    "serve": (
        "ServeConfig",
        "quadapt.jobs.serve:serve",
        "Answer programs and browsers: an HTTP server with OpenAI's interface.",
    ),
    "demo": (
        "DemoConfig",
        "quadapt.jobs.demo:demo",
        "Tune the embedded model by every method at 4, 3 and 2 bits, and compare.",
    ),
}
"""For each command the class of its settings in `quadapt.config`, its function, and what it does. The class and the
function are imported when the command is given, so that `--help` stays quick."""


class _Commands(TyperGroup):
    """The commands, each built when it is given: the settings of a method's pieces come with torch."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name = args[0] if args else ""
        if name not in COMMANDS:
            return super().resolve_command(ctx, args)
        one = typer.Typer(add_completion=False, rich_markup_mode=app.rich_markup_mode, pretty_exceptions_enable=False)
        one.command(name)(_command(*COMMANDS[name][:2]))
        return name, typer.main.get_command(one), args[1:]


app = typer.Typer(
    name="quadapt",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Quantization-aware low-rank fine-tuning of language models: what you train is what you serve.",
)


def settings_of(name: str) -> type[Settings]:
    """The class that holds the settings of a command."""
    return getattr(config, COMMANDS[name][0])


def _command(class_name: str, where: str) -> Callable[..., None]:
    """A function that typer can read: one parameter for each field of the settings, and --json and --debug."""
    cls: type[Settings] = getattr(config, class_name)
    parameters = [_parameter(name, field) for name, field in cls.model_fields.items()]
    parameters.sort(key=lambda parameter: parameter.kind)  # arguments before options
    parameters += [
        _switch("json", "Print the result as JSON on stdout."),
        _switch("debug", "Show the traceback of an error."),
    ]

    def command(**given: Any) -> None:
        as_json, debug = given.pop("json"), given.pop("debug")
        values = {name: value for name, value in given.items() if value is not None and value != []}

        def work(ui: UI) -> dict[str, Any]:
            settings = checked(cls, values)  # what is wrong is said before anything is read
            return _load(where)(settings, ui)

        guarded(work, as_json=as_json, debug=debug)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = cls.__doc__
    return command


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    """One field as typer sees it. What is not given stays None: defaults are the settings' own affair."""
    flag = next((item for item in field.metadata if isinstance(item, Flag)), Flag())
    words = " ".join((field.description or "").split())
    if not field.is_required() and field.default not in (None, (), ""):
        shown = " ".join(map(str, field.default)) if isinstance(field.default, tuple) else field.default
        words += "" if "Default" in words or isinstance(shown, bool) else f" (default: {shown})"
    type_ = _plain(field.annotation)
    choices = get_args(type_) if get_origin(type_) is Literal else ()
    type_ = type(choices[0]) if choices else type_  # `checked` says what is allowed, and in one line
    words += (
        f" ({', '.join(map(str, choices))})" if choices and not all(str(choice) in words for choice in choices) else ""
    )
    if flag.positional:
        return inspect.Parameter(
            name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            annotation=Annotated[type_, typer.Argument(help=words, show_default=False)],
        )
    dashed = name.replace("_", "-")
    either = type_ is bool and (field.default is True or (flag.of_piece and field.default is None))
    names = [f"--{dashed}/--no-{dashed}"] if either else [f"--{dashed}", *flag.aliases]
    metavar = "" if type_ is bool else "CHOICE" if choices else {int: "N", float: "X"}.get(type_, "TEXT")
    option = typer.Option(*names, help=words, rich_help_panel=flag.panel, show_default=False, metavar=metavar)
    if field.is_required():
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=Annotated[type_, option])
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[type_ | None, option]
    )


def _plain(annotation: Any) -> Any:
    """The type as typer knows it: without None, and lists for tuples."""
    types = (
        [each for each in get_args(annotation) if each is not type(None)]
        if type(None) in get_args(annotation)
        else [annotation]
    )
    type_ = types[0]
    if get_origin(type_) is Annotated:  # a range: `checked` says what is allowed
        return _plain(get_args(type_)[0])
    if get_origin(type_) is tuple:
        item = _plain(get_args(type_)[0])
        return list[type(get_args(item)[0]) if get_origin(item) is Literal else item]  # type: ignore[misc]
    return type_


def _switch(name: str, words: str) -> inspect.Parameter:
    option = typer.Option(f"--{name}", help=words, rich_help_panel="Output")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def _load(where: str) -> Callable[[Any, UI], dict[str, Any]]:
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(module), name)


def guarded(work: Callable[[UI], dict[str, Any]], *, as_json: bool, debug: bool) -> None:
    """Do some work for the command line: result on stdout, errors on stderr in one line, exit codes 0, 1, 2 and 130."""
    ui = UI(as_json=as_json)
    _quiet(debug)
    cli.begun = True
    try:
        _refuse_several()
        ui.result(work(ui))
        sys.stdout.flush()  # a full disk behind it is noticed here
    except KeyboardInterrupt:
        _fail(_INTERRUPTED, 130, as_json=as_json, debug=debug)
    except BrokenPipeError:  # nobody reads any more, as in `| head`: typer ends quietly
        raise
    except BaseException as error:  # what Rust panics with is no Exception
        if isinstance(error, (SystemExit, typer.Exit, GeneratorExit)):
            raise
        _fail(*_said(error), as_json=as_json, debug=debug)


def _refuse_several() -> None:
    """Raise ConfigError if a launcher has started this command in several processes, which would each do all of it."""
    if {"RANK", "LOCAL_RANK"} <= os.environ.keys() and os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        raise ConfigError(
            f"this command was started in {os.environ['WORLD_SIZE']} processes (by torchrun or accelerate launch), and "
            "does its work in one. Give it by itself. To train in several, quantize first (quadapt quantize), and put "
            "the adapter on in a script of your own with a trainer (quadapt.AdapterConfig), as the guide to trainers "
            "shows"
        )


def _said(error: BaseException) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if cli.interrupted:
        return _INTERRUPTED, 130
    limit = limit_of(error)
    if limit is not None and not isinstance(error, QuadaptError):
        return str(limit), limit.exit_code
    if isinstance(error, QuadaptError):
        return str(error), error.exit_code
    if isinstance(error, OSError) and (error.strerror or str(error)):
        text = f"{error.filename or 'the disk'}: {error.strerror}" if error.strerror else str(error)
        return text, 2 if error.errno in _PATH_ERRORS else 1
    words = f"{type(error).__name__}: {error}"
    return f"{words[:1000]}\nThis is a bug, or unforeseen. --debug shows where it happened", 1


_INTERRUPTED = "interrupted. Give the same command again to go on"
_PATH_ERRORS = (
    *(errno.EACCES, errno.EPERM, errno.ENOENT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EROFS, errno.ELOOP),
    *(errno.ENAMETOOLONG, errno.EINVAL, errno.ENOTEMPTY, errno.EBUSY, errno.EXDEV),
)
"""Numbers of the errors of the system that say that a path cannot be used as asked, which the user can mend."""


def _fail(text: str, code: int, *, as_json: bool, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    if as_json:
        print(json.dumps({"error": text, "exit_code": code}))  # noqa: T201
    print(f"quadapt: {text}", file=sys.stderr)  # noqa: T201
    raise typer.Exit(code)


def _quiet(debug: bool) -> None:
    """Our own messages through, those of libraries only with --debug."""
    logging.basicConfig(format="%(message)s", level=logging.WARNING if debug else logging.CRITICAL)
    logging.getLogger("quadapt").setLevel(logging.DEBUG if debug else logging.INFO)
    if not debug:
        import warnings

        warnings.filterwarnings("ignore")
        for name, value in (
            ("TORCH_LOGS", "-all"),  # errors only; torch's loggers do not ask the root
            ("TRANSFORMERS_VERBOSITY", "error"),
            ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
            ("TOKENIZERS_PARALLELISM", "false"),
            ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
            ("TQDM_DISABLE", "1"),
        ):
            os.environ.setdefault(name, value)


def _listed() -> None:
    """What stands for a command in the list of them."""


for _name, (_, _, _words) in COMMANDS.items():
    app.command(_name, help=_words)(_listed)


@app.command("run")
def _run(
    job: Annotated[str, typer.Argument(help="YAML file with the sections tune, and if wanted merge, eval and export.")],
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="Replace a setting of the file: tune.max_steps=5. May be given several times."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Do a whole job from one file; given again after an interruption, it goes on."""
    from quadapt.config import read_job
    from quadapt.jobs.run import run

    guarded(lambda ui: run(read_job(job, set or ()), job, ui), as_json=json, debug=debug)


def _version(wanted: bool) -> None:
    if wanted:
        import quadapt

        print(f"quadapt {quadapt.__version__}")  # noqa: T201
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass
