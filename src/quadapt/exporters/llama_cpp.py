"""Ask llama.cpp, through the `xllamacpp` package, what it makes of an exported file.

What is measured is llama.cpp as it is served. Its CPU kernels round the inputs of a product with Q4_1 blocks to 8 bits,
in blocks of 32, so its log-probabilities differ from torch's by some hundredths (more for improbable tokens) although
the weights are the same bit for bit. Inputs of products with F32 tensors are not rounded: there they agree to 1e-4.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.error import HTTPError
from urllib.request import ProxyHandler, Request, build_opener

import torch
from torch import Tensor, nn

from quadapt.errors import ExportError, require


class LlamaCpp:
    """llama.cpp with a model loaded, in this process; a context manager. Answers are greedy, and the same every time.

    Args:
        path: A GGUF file.
        context: Tokens that prompt and answer may have together.
        lora: A GGUF adapter to apply.
        threads: Threads to compute with. For small models one is fastest: threads wait for each other in a busy loop.

    Raises:
        ExportError: llama.cpp cannot load the file.
        MissingDependency: `xllamacpp` is not installed.
    """

    def __init__(
        self, path: str | Path, *, context: int = 512, lora: str | Path | None = None, threads: int = 1
    ) -> None:
        xllamacpp = require("xllamacpp", "demo")
        params = xllamacpp.CommonParams()
        params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32  # F16 would round once more
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.port, params.verbosity = False, 0, -1  # any free port; silent
        self._server = _started(params, path, *([] if lora is None else [lora]))
        self._open = build_opener(ProxyHandler({})).open  # never through a proxy: the server is in this process
        self._request("/slots")  # waits for its loop, which for a server closed before it runs would never end

    def __enter__(self) -> LlamaCpp:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Unload the model and free what it took."""
        del self._server

    def _request(self, route: str, question: dict[str, Any] | None = None) -> Any:
        """Ask the server: a GET without a question, else a POST of it as JSON."""
        data = None if question is None else json.dumps(question).encode()
        request = Request(self._server.listening_address + route, data, {"Content-Type": "application/json"})
        try:
            with self._open(request) as answer:
                return json.load(answer)
        except HTTPError as error:
            raise ExportError(f"llama.cpp: {route} failed: {error.read().decode(errors='replace')}") from error

    def tokenize(self, text: str, *, add_special: bool = True) -> list[int]:
        """The ids of a text, with those that the file says to add before and after it."""
        answer = self._request("/tokenize", {"content": text, "add_special": add_special})
        return [int(token) for token in answer["tokens"]]

    def complete(self, prompt: Sequence[int], max_tokens: int) -> list[int]:
        """The most probable continuation of token ids, up to and with the token that ends the text."""
        return [int(token) for token in self._ask(prompt, max_tokens)["tokens"]]

    def timings(self, prompt: Sequence[int], max_tokens: int) -> dict[str, float]:
        """What reading token ids and writing up to `max_tokens` took, by llama.cpp's own clock: its field `timings`."""
        found: dict[str, float] = self._ask(prompt, max_tokens)["timings"]
        return found

    def token_logprobs(self, ids: Sequence[int], *, top: int = 1024) -> list[dict[int, float]]:
        """After each of `ids`, natural log-probabilities of the `top` most probable next tokens, by their id.

        llama.cpp's server hands out probabilities only where it generates, so each prefix is asked for one token; its
        cache makes that one step each. It hands out none with a token that ends the text or half a character, so it is
        biased towards an ordinary token; the probabilities are those from before the bias.
        """
        bias = [[self.tokenize("a", add_special=False)[-1], 1e6]]
        rows = []
        for end in range(1, len(ids) + 1):
            answer = self._ask(ids[:end], 1, n_probs=top, logit_bias=bias)["completion_probabilities"][0]
            rows.append({int(token["id"]): float(token["logprob"]) for token in answer["top_logprobs"]})
        return rows

    def _ask(self, prompt: Sequence[int], max_tokens: int, **more: Any) -> dict[str, Any]:
        question = {
            "prompt": [int(token) for token in prompt],
            "n_predict": max_tokens,
            "temperature": 0.0,
            "samplers": ["temperature"],
            "return_tokens": True,
            "cache_prompt": True,
        }
        return dict(self._request("/completion", question | more))


def complete(
    path: str | Path, prompt_ids: Sequence[int], max_tokens: int, *, lora: str | Path | None = None, threads: int = 1
) -> list[int]:
    """Load a file and continue token ids greedily; see :meth:`LlamaCpp.complete`."""
    with LlamaCpp(path, context=len(prompt_ids) + max_tokens + 1, lora=lora, threads=threads) as llama:
        return llama.complete(prompt_ids, max_tokens)


def token_logprobs(
    path: str | Path, ids: Sequence[int], *, lora: str | Path | None = None, threads: int = 1, top: int = 1024
) -> list[dict[int, float]]:
    """Load a file and take the log-probabilities after each token; see :meth:`LlamaCpp.token_logprobs`."""
    with LlamaCpp(path, context=len(ids) + 2, lora=lora, threads=threads) as llama:
        return llama.token_logprobs(ids, top=top)


def differences(
    path: str | Path,
    model: nn.Module,
    ids: Sequence[int],
    *,
    lora: str | Path | None = None,
    threads: int = 1,
    top: int = 1024,
) -> Tensor:
    """How far llama.cpp's log-probabilities are from a model's, after each of `ids`.

    Returns:
        Absolute differences, float32 `[ids, vocabulary]`; NaN for tokens that are not among the `top` most probable.
    """
    with torch.no_grad():
        ours = model(torch.tensor([list(ids)], device=next(model.parameters()).device)).logits[0]
    ours = ours.float().log_softmax(-1).cpu()
    theirs = torch.full_like(ours, torch.nan)
    for at, row in enumerate(token_logprobs(path, ids, lora=lora, threads=threads, top=top)):
        theirs[at, list(row)] = torch.tensor(list(row.values()))
    return (theirs - ours).abs()


def tokenize(path: str | Path, text: str) -> list[int]:
    """Load a file and tokenize a text; see :meth:`LlamaCpp.tokenize`."""
    with LlamaCpp(path) as llama:
        return llama.tokenize(text)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How llama.cpp's own server is to serve a file."""

    name: str
    """The name of the model in answers."""

    host: str = "127.0.0.1"
    """The address to listen on."""

    port: int = 0
    """The port to listen on; 0 takes a free one."""

    template: str | None = None
    """A chat template in the place of the file's own."""

    loras: tuple[Path, ...] = ()
    """GGUF adapters to apply over the model."""

    context: int | None = None
    """Tokens that prompt and answer may have together. None: the model's context, if there is memory for it."""

    temperature: float | None = None
    """The temperature for requests that name none; None leaves it as llama.cpp has it."""

    threads: int = 1
    """How many threads compute an answer."""

    device: str = "cpu"
    """The device that computes: cpu, or a GPU by its name in torch, if xllamacpp was built for it."""


def serve(path: str | Path, serving: Serving) -> Any:
    """Start llama.cpp's own server, with its page for browsers, in threads of this process.

    Of the pages that a browser shows, those of this machine alone may read answers; llama.cpp itself would let all.

    Args:
        path: A GGUF file.
        serving: How it is to be served.

    Returns:
        `xllamacpp.Server`: it answers at its `listening_address` until it is deleted.

    Raises:
        ExportError: llama.cpp cannot load the file, or listen there.
        MissingDependency: `xllamacpp` is not installed.
    """
    xllamacpp = require("xllamacpp", "serve")
    params, device = xllamacpp.CommonParams(), torch.device(serving.device)
    params.hostnames, params.port, params.model_alias = [serving.host], serving.port, {serving.name}
    params.n_ctx, params.n_gpu_layers = serving.context or 0, 0 if device.type == "cpu" else -1
    if device.index is not None:
        params.main_gpu, params.split_mode = device.index, xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = serving.threads
    params.cors_origins, params.verbosity = "localhost", 0
    if serving.template is not None:
        params.chat_template = serving.template
    if serving.temperature is not None:
        params.sampling.temp = serving.temperature
    return _started(params, path, *serving.loras)


def _started(params: Any, path: str | Path, *loras: str | Path) -> Any:
    """A server with a model loaded, and with adapters over it."""
    xllamacpp = require("xllamacpp", "serve")
    params.model.path, adapters = str(path), []
    for lora in loras:
        adapter = xllamacpp.CommonAdapterLoraInfo()
        adapter.path, adapter.scale = str(lora), 1.0
        adapters.append(adapter)
    params.lora_adapters = adapters
    try:
        return xllamacpp.Server(params)
    except RuntimeError as error:
        with_lora = f" with the adapter {', '.join(map(str, loras))}" if loras else ""
        raise ExportError(
            f"{path}: llama.cpp cannot load it{with_lora} ({error}). Is it a whole GGUF file, of a "
            "family that this llama.cpp knows?"
        ) from error
    finally:
        _restore_signals()


def _restore_signals() -> None:
    """Give Ctrl-C back to Python: the server has taken it, and would keep it when it is gone."""
    if threading.current_thread() is not threading.main_thread():
        return  # Python can set handlers in the main thread alone
    for number in (signal.SIGINT, signal.SIGTERM):
        handler = signal.getsignal(number)
        if handler is not None:
            signal.signal(number, handler)
