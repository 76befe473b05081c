"""transformers' own server around a model that is loaded already: `transformers serve` would load it by its name."""

from __future__ import annotations

from typing import Any

import uvicorn
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState

from quadapt.jobs.listening import listening

_Keeper: Any = ModelManager  # its signatures are those of a keeper that loads


class _Loaded(_Keeper):
    """The keeper of transformers' models, with one model, under one name; requests for others are refused."""

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        super().__init__(device="cpu")  # where it would load a model, which it never does
        self.force_model, self._pair = name, (model, processor)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, *_: Any, **__: Any) -> tuple[Any, Any]:
        return self._pair

    def get_gen_models(self, *_: Any) -> list[dict[str, Any]]:
        return [{"id": self.force_model, "object": "model", "created": 0, "owned_by": "quadapt"}]


class Server:
    """transformers' server, listening; requests wait until :meth:`run` is called.

    Args:
        name: The name by which requests call the model.
        model: A causal language model of transformers, with adapters or without.
        processor: Its tokenizer, or the processor of a model that sees.
        host: The address to listen on.
        port: The port; 0 takes a free one.
        temperature: For requests that name none; None leaves it as the model's `generation_config` has it.

    Raises:
        ConfigError: The port cannot be listened on.
    """

    address: str
    """Where the server answers, as a URL."""

    def __init__(
        self, name: str, model: Any, processor: Any, *, host: str, port: int, temperature: float | None = None
    ) -> None:
        about = model.generation_config
        about.do_sample = temperature != 0  # without it, transformers leaves out the temperature that a request names
        if temperature:
            about.temperature = temperature
        keeper, self._state = _Loaded(name, model, processor), GenerationState()
        parts: dict[str, Any] = {
            "chat_handler": ChatCompletionHandler(model_manager=keeper, generation_state=self._state),
            "completion_handler": CompletionHandler(model_manager=keeper, generation_state=self._state),
            "response_handler": ResponseHandler(model_manager=keeper, generation_state=self._state),
            "transcription_handler": TranscriptionHandler(keeper, self._state),
            "systemone_handler": SystemOneHandler(model_manager=keeper, generation_state=self._state),
        }
        app = build_server(keeper, generation_state=self._state, **parts)
        self._socket = listening(host, port)
        self.address = f"http://{host}:{self._socket.getsockname()[1]}"
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="error"))

    def run(self) -> None:
        """Answer requests until Ctrl-C comes."""
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._state.shutdown()
            self._socket.close()
