"""`quadapt serve`: OpenAI's interface over HTTP, by the servers of llama.cpp and of transformers."""

from __future__ import annotations

import gc
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from quadapt.config import ServeConfig
from quadapt.data import PromptForm
from quadapt.errors import CheckpointError, ConfigError, ExportError, require
from quadapt.exporters.formats import EXPORTERS, Answer
from quadapt.exporters.llama_cpp import Serving
from quadapt.exporters.llama_cpp import serve as start_llama_cpp
from quadapt.hf.folder import Folder, find_base, near, open_folder
from quadapt.hf.imported import one_file
from quadapt.hf.loading import over_any_base
from quadapt.hf.reading import reading
from quadapt.jobs.export import asked, loaded, show, write
from quadapt.jobs.listening import check_port
from quadapt.jobs.source import check_writes, device_of, load_as_asked
from quadapt.jobs.tasking import kind_in
from quadapt.model.quantize import bits_of, quantized_layers
from quadapt.report.ui import UI


@dataclass(frozen=True, kw_only=True)
class _File:
    """What llama.cpp is to serve."""

    path: Path
    """The GGUF file."""

    exact: str
    """How exactly it holds the model, in words."""

    template: str | None
    """The chat template to use in the place of the file's own, if any."""

    besides: tuple[Path, ...] = ()
    """The files beside it that belong to it: an adapter, offsets for which it has no room."""


def serve(config: ServeConfig, ui: UI) -> NoReturn:
    """Run `quadapt serve` until Ctrl-C, which ends it with the exit code 130; a SIGTERM does with 143.

    Raises:
        QuadaptError: The model cannot be served, the port is taken, or a package is missing; see the message.
    """
    check_writes(kind_in(config.model, config.base, trust_remote_code=config.trust_remote_code), config.model, "serve")
    check_port(config.host, config.port)
    folder = tempfile.TemporaryDirectory(prefix="quadapt-serve-", ignore_cleanup_errors=True)
    with _terminating(), folder as place:
        file = _file(config, Path(place), ui)
        try:
            (_by_transformers(config, ui) if file is None else _by_llama_cpp(config, file, ui))()
        except KeyboardInterrupt:
            ui.say("stopped")
            raise SystemExit(130) from None
    raise SystemExit(0)


@contextmanager
def _terminating() -> Iterator[None]:
    """End by an exception on SIGTERM, so that what is temporary is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python can set handlers in the main thread alone
        return
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminated(number: int, _frame: Any) -> NoReturn:
    raise SystemExit(128 + number)


def _file(config: ServeConfig, place: Path, ui: UI) -> _File | None:
    """The file for llama.cpp, written if there is none yet; None if transformers is to serve.

    Raises:
        QuadaptError: llama.cpp was asked for, and GGUF cannot hold the model.
    """
    if config.engine == "transformers":
        return None
    path = one_file(Path(config.model)) or Path(config.model)
    if path.suffix == ".gguf":
        return _as_it_is(config, path)
    folder = open_folder(config.model)
    if folder.kind == "model":
        if config.engine == "auto":
            return None
        raise ConfigError(
            f"engine='llama-cpp' serves GGUF files, and {config.model!r} is a dense model. Quantize or tune it first, "
            "or use --engine transformers"
        )
    require("xllamacpp", "serve")  # before the work, not after it
    with over_any_base(config.any_base):
        return _exported(config, folder, place, ui)


def _as_it_is(config: ServeConfig, path: Path) -> _File:
    """A file that is there already."""
    from gguf import GGUFReader

    if not path.is_file():
        raise CheckpointError(f"{config.model!r} does not exist.{near(path)}")
    own = "tokenizer.chat_template" in reading(str(path), GGUFReader, path).fields
    kind = ("chat" if own else "prompt") if config.prompt_form == "auto" else config.prompt_form
    besides = tuple(EXPORTERS["gguf"]().besides(path))
    exact = " with ".join(["the file as it is", *(file.name for file in besides)])
    return _File(path=path, exact=exact, template=PromptForm(kind).jinja(), besides=besides)


def _exported(config: ServeConfig, folder: Folder, place: Path, ui: UI) -> _File | None:
    """Write a folder as GGUF, if that holds it as is asked for; None if transformers is to serve it."""
    exporter = EXPORTERS["gguf"]()
    where = find_base(folder, config.base) if folder.kind == "adapter" else folder.name
    model, tokenizer = loaded(config, folder, where)
    answer = asked(model, tokenizer, folder, [exporter])[0]
    if answer.holds == "no" and config.engine == "llama-cpp":
        raise ExportError(f"{config.model}: GGUF cannot hold it: {answer.words}. Use --engine transformers")
    if config.engine == "auto" and (answer.holds != "exactly" or answer.layers):
        ui.say(f"GGUF does not hold the codes as they are ({answer.words}): transformers serves the folder itself")
        return None
    path = place / f"{_name(config)}.gguf"
    ui.say(f"llama.cpp serves a GGUF file, which is written to {path} and removed at the end (TMPDIR says where)")
    template = _form(config, folder, tokenizer).jinja()
    show(write(model, tokenizer, exporter, path, ui), ui)
    return _File(path=path, exact=_exactness(answer), template=template, besides=tuple(exporter.besides(path)))


def _exactness(answer: Answer) -> str:
    return f"{'exactly' if answer.holds == 'exactly' else 'changed'}: {answer.words}"


def _form(config: ServeConfig, folder: Folder | None, tokenizer: Any) -> PromptForm:
    """The form in which messages reach the model."""
    if config.prompt_form != "auto":
        form = PromptForm(config.prompt_form)
    else:
        form = PromptForm.recorded({} if folder is None else folder.note, tokenizer)
    form.check(tokenizer)
    return form


def _name(config: ServeConfig) -> str:
    """The name by which requests call the model."""
    path = Path(config.model)
    return config.name or (path.resolve().name.removesuffix(".gguf") if path.exists() else config.model)


def _announce(config: ServeConfig, engine: str, address: str, exact: str, ui: UI, page: str) -> None:
    """Say what is served, where, and how exact it is; for programs as one JSON object, before the first request."""
    ui.show(f"{_name(config)}: {exact}")
    ui.show(f"{engine} answers at {address} ({page}OpenAI's interface under {address}/v1). Ctrl-C ends it")
    ui.result({"address": address, "engine": engine, "model": config.model, "name": _name(config), "exact": exact})
    sys.stdout.flush()


def _by_llama_cpp(config: ServeConfig, file: _File, ui: UI) -> Callable[[], None]:
    """llama.cpp's server, started; what is given back waits until it is to end."""
    gc.collect()  # the model that was exported
    serving = Serving(
        name=_name(config),
        host=config.host,
        port=config.port,
        template=file.template,
        loras=file.besides,
        context=config.context,
        temperature=config.temperature,
        threads=torch.get_num_threads(),
        device=device_of(config),
    )
    server = start_llama_cpp(file.path, serving)
    _announce(config, "llama.cpp", server.listening_address, file.exact, ui, "a page for browsers; ")

    def wait() -> None:
        nonlocal server
        try:
            threading.Event().wait()
        finally:
            del server

    return wait


def _by_transformers(config: ServeConfig, ui: UI) -> Callable[[], None]:
    """The server of transformers around a model that quadapt has loaded; what is given back runs it."""
    for package in ("fastapi", "uvicorn", "openai"):
        require(package, "serve")
    from quadapt.jobs.transformers_server import Server

    if config.context is not None:
        raise ConfigError(f"context={config.context} is llama.cpp's, and transformers serves here. Leave it out")
    is_file = (one_file(Path(config.model)) or Path(config.model)).suffix == ".gguf"
    model, processor = load_as_asked(config)
    tokenizer = getattr(processor, "tokenizer", processor)
    form = _form(config, None if is_file else open_folder(config.model), tokenizer)
    template = form.jinja(tokenizer)
    if template is not None:
        tokenizer.chat_template = template
    layouts = [layer.quant_weight.layout for layer in quantized_layers(model).values()]
    bits = f", {bits_of(layouts):.3f} true bits per quantized weight" if layouts else ", dense"
    server = Server(_name(config), model, processor, host=config.host, port=config.port, temperature=config.temperature)
    _announce(config, "transformers", server.address, f"as quadapt loads it{bits}", ui, "")
    return server.run
