"""Files that others wrote, or that were damaged on the way: whatever is wrong with one becomes a CheckpointError.

What a library raises over a damaged file is hardly foreseeable: any error of Python's own may come out of transformers.
So the rule is by origin: an error raised in another library's code while it reads is the file's fault; one raised in
our code is a bug of ours, and stays what it is.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError

from quadapt.errors import CheckpointError, QuadaptError, locate
from quadapt.limits import limit_of
from quadapt.model.layer import LayerRow

_HERE = str(Path(__file__).parents[1])
_FORESEEN = (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError)
"""What the loaders raise on purpose, wherever."""


def reading(name: str, load: Any, *args: Any, **kwargs: Any) -> Any:
    """Call one of the libraries' loaders; what it raises for bad input becomes a CheckpointError.

    Raises:
        CheckpointError: It cannot be loaded; the message says why.
        ResourceError: The machine lacks memory, disk or threads for it.
    """
    try:
        return load(*args, **kwargs)
    except QuadaptError as error:
        with locate(name):
            raise error
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # what Rust panics with is no Exception
        raise _blamed(error, f"{name!r} cannot be loaded: {{}}") from error


def generating(model: Any, **settings: Any) -> Any:
    """`model.generate`; what a damaged `config.json` or `generation_config.json` makes of it is a CheckpointError.

    Raises:
        CheckpointError: transformers cannot generate with them.
    """
    try:
        return model.generate(**settings)
    except (KeyboardInterrupt, SystemExit, GeneratorExit, QuadaptError):
        raise
    except Exception as error:
        name = getattr(model, "name_or_path", "") or "the model"
        words = f"{name}: cannot generate: {{}}. Its generation_config.json is damaged, or belongs to another model"
        raise _blamed(error, words) from error


def _blamed(error: BaseException, words: str) -> BaseException:
    """What to raise in place of an error: the limit that it tells of, the file's fault (in `words`), or itself."""
    limit = limit_of(error)
    if limit is not None:
        return limit
    if not isinstance(error, _FORESEEN) and _raised_here(error):
        return error
    return CheckpointError(words.format(reason_of(error)))


def _raised_here(error: BaseException) -> bool:
    """Whether our own code raised it, rather than a library that it called."""
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and frames[-1].filename.startswith(_HERE)


def reason_of(error: BaseException) -> str:
    """What an error says, on one line; with its kind, where the words alone say little."""
    words = " ".join(str(error).split())[:500]
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    plain = isinstance(error, OSError | ValueError | RuntimeError | SafetensorError) and " " in words
    return words if plain else f"{type(error).__name__}: {words}" if words else type(error).__name__


def check_tokenizer(tokenizer: Any) -> None:
    """Use a tokenizer once, since much that is damaged in its files shows only then.

    Raises:
        CheckpointError: Its chat template does not compile, or stumbles over a plain message. One that refuses such
            a message on purpose is none of these.
    """
    from jinja2 import TemplateError, TemplateSyntaxError

    tokenizer.decode(tokenizer("a")["input_ids"])
    if tokenizer.chat_template is None:
        return
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    except TemplateSyntaxError as error:
        raise CheckpointError(f"its chat template is damaged: line {error.lineno}: {reason_of(error)}") from error
    except TemplateError:
        return
    except Exception as error:
        raise CheckpointError(f"its chat template is damaged: {reason_of(error)}") from error


def check_generation(model: Any) -> None:
    """Check the token ids in a model's generation config, which transformers reads without a look.

    Raises:
        CheckpointError: One is no number, or none at all.
    """
    config = getattr(model, "generation_config", None)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(each) is int for each in ids):
            raise CheckpointError(
                f"generation_config.json: {name}={value!r:.80} is no token id. Copy the file again from its source"
            )


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: It is missing or damaged.
    """
    return _object(path, _text(path))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: is damaged ({reason_of(error)}). Copy it again from its source") from error


def _object(path: Path, text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is damaged ({reason_of(error)}). Copy it again from its source") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds no JSON object. It is foreign, or damaged")
    return value


# --- the note ---------------------------------------------------------------------------------------------------------


class _Part(BaseModel):
    """Part of `quadapt.json`: what is read has the type that was written; what a later version added is let be."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class _Base(_Part):
    relative: str | None = None
    absolute: str | None = None
    hub: str | None = None
    fingerprint: str | None = None


class _Settings(_Part):
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    data: str | list[str] | None = None


class _MergedLayer(_Part):
    name: str
    difference: float
    codes_changed: int


class _MergedPart(_Part):
    name: str
    kind: str
    untied: bool


class _Certificate(_Part):
    verdict: Literal["exact", "equivalent", "lossy"]
    dtype: str
    probe: str
    logits_equal: bool
    effect_lost: float
    kl: float
    argmax_changed: float
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    layers: list[_MergedLayer]
    besides: list[_MergedPart] = []


class _Adapter(_Part):
    kind: Annotated[str, Field(min_length=1)] = "PEFT"


class _Digests(_Part):
    layers: dict[str, str] = {}
    tensors: dict[str, str] = {}
    files: dict[str, str] = {}
    note: dict[str, str] = {}


class Note(_Part):
    """`quadapt.json`: what a folder is, where its base is, how it was made, what was measured."""

    kind: str | None = None
    made: dict[str, Any] = {}
    left: dict[str, str] = {}
    bits_per_weight: float | None = None
    bits: dict[str, float] = {}
    rows: list[LayerRow] = []
    digests: _Digests = _Digests()
    certificate: _Certificate | None = None
    base: _Base = _Base()
    settings: _Settings | None = None
    adapter: _Adapter = _Adapter()
    method: str | None = None
    recipe: dict[str, Any] | None = None
    steps: int | None = None
    final_loss: float | None = None
    eval_loss: float | None = None
    trainable_parameters: int | None = None
    losses: list[Any] = []
    trained: dict[str, Any] = {}


def read_note(path: Path) -> dict[str, Any]:
    """Read `quadapt.json`, quadapt's own note in a folder.

    Raises:
        CheckpointError: It is damaged: no JSON, or something in it is not of the kind that quadapt writes.
    """
    text = _text(path)
    value = _object(path, text)
    try:
        Note.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise CheckpointError(
            f"{path}: is damaged ({where}: {first['msg'][0].lower()}{first['msg'][1:]}). Copy it again from its source"
        ) from error
    return value
