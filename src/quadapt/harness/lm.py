"""The model of the harness that is loaded by quadapt, or is in memory already: `quadapt` by its name there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.models.huggingface import HFLM

from quadapt.errors import ConfigError, DataError
from quadapt.hf.kinds import kind_of_model
from quadapt.hf.loading import load

Tick = Callable[[int, int], None]
"""Takes how many requests have been answered, and how many there are."""


class QuadaptLM(HFLM):
    """A language model of the harness over anything that quadapt loads; it counts what it had to cut."""

    def __init__(  # noqa: PLR0913 - what the harness's command line names, by name
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        device: str | None = None,
        dtype: str = "auto",
        base: str | None = None,
        any_base: bool = False,
        trust_remote_code: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        tick: Tick | None = None,
    ) -> None:
        """Load a model, or take one.

        Args:
            pretrained: What :func:`quadapt.load` takes (a folder, of an adapter too, a hub name, a GGUF file); or a
                causal language model of transformers, with its tokenizer.
            tokenizer: The tokenizer of a model in memory.
            device: The device to load to, by its name in torch; without a GPU it is the CPU.
            dtype: The dtype of what is not quantized: auto (as stored), float32, bfloat16 or float16.
            base: The folder of an adapter's base, if it has moved.
            any_base: Take an adapter though its base is another one than it was trained over.
            trust_remote_code: Run code that comes with a model.
            batch_size: How many sequences go through the model at once; "auto" finds the most.
            max_batch_size: The most that "auto" tries.
            max_length: Tokens that the model sees at once; None for its own context.
            add_bos_token: Whether prompts begin with the tokenizer's BOS; None for the tokenizer's own habit.
            tick: Told of each answer.

        Raises:
            CheckpointError: The model cannot be loaded.
            ConfigError: It is no causal language model, or its tokenizer has no token to begin with.
        """
        if isinstance(pretrained, str):
            import torch

            if not torch.cuda.is_available():
                device = "cpu"  # the harness names cuda:0 where nothing is given, and its own models do the same
            pretrained, tokenizer = load(
                pretrained,
                dtype=dtype,
                device=device or "cuda",
                base=base,
                any_base=any_base,
                trust_remote_code=trust_remote_code,
            )
        check_kind(pretrained, tokenizer)
        super().__init__(
            pretrained=pretrained,
            tokenizer=tokenizer,
            backend="causal",
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
        )
        self.tick = tick
        self.cut = 0
        self.requests = 0
        self._answered = 0
        self.set_cache_hook(self)

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Take note of an answer: the harness calls this where answers may be kept for another run."""
        self._answered += 1
        if self.tick is not None:
            self.tick(self._answered, self.requests)

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm or self.tick is not None)

    def _loglikelihood_tokens(self, requests: Sequence[Any], *more: Any, **settings: Any) -> Any:
        room = self.max_length
        self.requests += len(requests)
        for (_, asked), before, after in requests:
            if len(after) > room:
                raise DataError(f"the answer {asked[:60]!r} has {len(after)} tokens, and the model's context is {room}")
            self.cut += len(before) + len(after) > room + 1
        return super()._loglikelihood_tokens(requests, *more, **settings)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> Any:
        self.requests += len(requests)
        for request in requests:
            prompt, how = request.args
            room = self.max_length - int(how.get("max_gen_toks", self.max_gen_toks))
            if room <= 0:
                raise ConfigError(
                    f"the model's context is {self.max_length} tokens, which leaves no room for a question beside "
                    f"{self.max_length - room} for the answer. Use a smaller --max-new-tokens"
                )
            self.cut += len(self.tok_encode(prompt)) > room
        return super().generate_until(requests, disable_tqdm=disable_tqdm or self.tick is not None)


def check_kind(model: Any, tokenizer: Any) -> None:
    """Raise ConfigError if a model is none that the harness can ask: text in, text out, token after token."""
    kind = kind_of_model(model)
    if kind is None or kind.name != "causal-lm":
        raise ConfigError(
            f"tasks of the harness are for causal language models, and this one is of the kind "
            f"{kind.name if kind else type(model).__name__}. Measure it on rows of its own task with --data"
        )
    if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
        raise ConfigError("the tokenizer has neither a token to begin with nor one to end. Name one in its config")
