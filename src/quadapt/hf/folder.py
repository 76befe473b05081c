"""The folders that quadapt writes, and how any of them is loaded.

Beside what transformers and PEFT write stands `quadapt.json`: what the folder is, where its base is, how it was made,
what it measured, and the digests that `inspect --verify` checks.
"""

from __future__ import annotations

import difflib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from quadapt.errors import CheckpointError, ConfigError, locate
from quadapt.hf.checkpoint import auto_class, check_loaded, held_tensors, weight_files
from quadapt.hf.compressed import NF8_FILE, read_nf8
from quadapt.hf.config import QuadaptConfig
from quadapt.hf.ending import set_ends
from quadapt.hf.notes import NOTE as NOTE
from quadapt.hf.quantizer import base_config, content_of
from quadapt.hf.reading import check_generation, check_tokenizer, read_json, read_note, reading, reason_of
from quadapt.hf.verify import digests_of
from quadapt.hf.vocabulary import check_vocabulary, embedding_rows
from quadapt.hf.workspace import write_json
from quadapt.model.quantize import quantized_layers
from quadapt.model.trial import check_runs

Kind = Literal["model", "quantized", "adapter"]

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Folder:
    """A folder (or hub name) that holds a model or an adapter."""

    name: str
    """The path or hub name of the folder, as it was given."""

    kind: Kind
    """model: dense. quantized: by quadapt, merged or not. adapter: over a base that lies elsewhere."""

    note: Mapping[str, Any]
    """The content of `quadapt.json`; empty if there is no such file."""

    @property
    def path(self) -> Path:
        """The name of the folder as a path."""
        return Path(self.name)


def open_folder(name: str) -> Folder:
    """Look at a folder without loading it.

    Raises:
        CheckpointError: It does not exist, holds no model, or has a damaged file.
    """
    path = Path(os.path.expanduser(name))
    try:
        there = path.exists()
    except OSError as error:
        raise CheckpointError(f"{name!r} cannot be read ({reason_of(error)})") from error
    if not there:
        path = _from_hub(name)
    if path.is_file():
        raise CheckpointError(f"{name!r} is a file. Give the folder that holds config.json or adapter_config.json")
    adapter, model = (path / "adapter_config.json").exists(), (path / "config.json").exists()
    if not adapter and not model:
        partial = path.with_name(path.name + ".partial")
        hint = f" An unfinished run lies in {str(partial)!r}: give its command again" if partial.exists() else ""
        raise CheckpointError(
            f"{name!r} has neither config.json nor adapter_config.json: it is not a model folder.{hint}"
        )
    _check_files(path)
    note = read_note(path / NOTE) if (path / NOTE).exists() else {}
    about = read_json(path / "config.json").get("quantization_config") if model and not adapter else None
    if about is not None and not isinstance(about, dict):
        raise CheckpointError(f"{path / 'config.json'}: is damaged (quantization_config is no object). Copy it again")
    quantized = about is not None and about.get("quant_method") == "quadapt"
    return Folder(str(path), "adapter" if adapter else "quantized" if quantized else "model", note)


def _from_hub(name: str) -> Path:
    """The folder to which a model of the hub is, or gets, downloaded."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    hint = _near(Path(name))
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise CheckpointError(f"{name!r} does not exist.{hint}")
    try:
        wanted = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
        path = Path(snapshot_download(name, allow_patterns=wanted))
        if not any(path.glob("*.safetensors")):  # older models have pickles alone
            path = Path(snapshot_download(name, allow_patterns=[*wanted, "pytorch_model*.bin", "adapter_model.bin"]))
        return path
    except (OSError, ValueError, HFValidationError) as error:
        reason = type(error).__name__
        raise CheckpointError(f"{name!r} is neither a folder here nor a model on the hub ({reason}).{hint}") from error


def _near(path: Path) -> str:
    """What may have been meant by a path that does not exist."""
    beside = [item.name for item in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside)
    return f" Did you mean {str(path.parent / near[0])!r}?" if near else ""


def _check_files(path: Path) -> None:
    """Raise CheckpointError if a weight file is truncated, or a shard of the index is missing."""
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file}: is damaged or truncated ({reason_of(error)}). Copy it again from its source"
            ) from error
    for index in path.glob("*.index.json"):
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise CheckpointError(f"{index}: is damaged (weight_map names no files). Copy it again from its source")
        for shard in sorted(set(shards.values())):
            if Path(shard).name != shard or "\0" in shard:
                raise CheckpointError(f"{index}: names {shard!r}, which is no file of this folder. It is damaged")
            if not (path / shard).exists():
                raise CheckpointError(f"{path}: {shard} is missing, though the index names it. Copy it from its source")
    if (path / "config.json").exists() and not (path / "adapter_config.json").exists() and not weight_files(path):
        raise CheckpointError(
            f"{str(path)!r} has no weights (model.safetensors or pytorch_model.bin). Copy them from the model's source"
        )


def find_base(folder: Folder, given: str | None = None) -> str:
    """Find an adapter's base: where told, or beside the adapter as recorded, or where it was when the adapter was made.

    Raises:
        CheckpointError: None of these exists.
    """
    if given:
        return open_folder(given).name
    base = folder.note.get("base", {})
    tried = []
    for candidate in (folder.path / base["relative"] if base.get("relative") else None, base.get("absolute")):
        if candidate and Path(candidate).exists():
            return os.path.normpath(candidate)
        if candidate:
            tried.append(str(candidate))
    named = base.get("hub") or read_json(folder.path / "adapter_config.json").get("base_model_name_or_path")
    if named is not None and not isinstance(named, str):
        raise CheckpointError(
            f"{folder.name}: base_model_name_or_path in adapter_config.json is no text. It is damaged"
        )
    if not named and not tried:
        raise CheckpointError(
            f"{folder.name}: names no base, since its base was quantized in memory. Save that one too "
            "(model.unload().save_pretrained(FOLDER)), and say where it is with --base (base= in Python)"
        )
    if named and (Path(named).exists() or (not tried and named.count("/") <= 1 and not named.startswith("/"))):
        return str(named)
    raise CheckpointError(
        f"{folder.name}: its base is neither at {' nor at '.join(repr(item) for item in [*tried, named] if item)}. "
        "Say where it is with --base"
    )


def load_model(name: str, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False) -> nn.Module:
    """Load a model, dense or quantized, in evaluation mode with nothing trainable.

    Weights stay mapped from their file where they need no cast. On the device "meta" all is checked and nothing read.

    Raises:
        CheckpointError: It is no causal language model, or cannot be loaded, or a tensor is missing, too many, or has
            another shape or dtype than the model; the message says which.
    """
    config = read_config(name, trust_remote_code=trust_remote_code)
    held = {} if _foreign(config) else reading(name, held_tensors, open_folder(name).path)
    wanted = dtype if dtype == "auto" else getattr(torch, dtype)
    model, info = reading(
        name,
        auto_class(config).from_pretrained,
        name,
        dtype=wanted,
        device_map=None if device == "cpu" else device,
        trust_remote_code=trust_remote_code,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # so that the check below names them
    )
    with locate(name):
        check_loaded(model, info, held)
        check_generation(model)
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def read_config(name: str, *, trust_remote_code: bool = False) -> Any:
    """Read transformers' configuration of a model.

    Raises:
        CheckpointError: There is none, or it is of a model that is not a causal language model, or comes with code.
    """
    from transformers import AutoConfig

    config = reading(name, AutoConfig.from_pretrained, name, trust_remote_code=trust_remote_code)
    with locate(name):
        auto_class(config)
    return config


def _foreign(config: Any) -> bool:
    """Whether a model is quantized by something else, in whose files other dtypes stand."""
    about = getattr(config, "quantization_config", None) or {}
    return bool(about) and isinstance(about, dict) and about.get("quant_method") != "quadapt"


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a folder or hub name.

    Raises:
        CheckpointError: There is none, or it cannot be loaded.
    """
    from transformers import AutoTokenizer

    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("tokenizer*")) and not any(folder.glob("*vocab*")):
        raise CheckpointError(
            f"{name!r} has no tokenizer (tokenizer.json, tokenizer.model, ..). Copy it from the model's source"
        )

    tokenizer = reading(name, AutoTokenizer.from_pretrained, name, trust_remote_code=trust_remote_code)
    reading(name, check_tokenizer, tokenizer)
    return tokenizer


def load(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    base: str | None = None,
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Load anything that quadapt has written: `(model, tokenizer)`, an ordinary transformers model.

    Args:
        name: Folder of a dense or quantized model, of an adapter (its base is found and loaded too), or a GGUF file.
        dtype: The dtype of computation and of what is not quantized: auto (as stored), float32, bfloat16 or float16.
        device: The device to load to, by its name in torch.
        base: The folder of an adapter's base, if it has moved since the adapter was made.
        any_base: Load an adapter though its base is another one than it was trained over.
        trust_remote_code: Run code that comes with a model.

    Raises:
        CheckpointError: Something is missing, damaged, or belongs to another base.
    """
    if name.endswith(".gguf"):
        return _load_gguf(Path(name), dtype, device)
    folder = open_folder(name)
    if folder.kind != "adapter":
        dense = load_model(folder.name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        _check_runs(folder.name, dense)
        return _ready(folder, dense, load_tokenizer(folder.name, trust_remote_code=trust_remote_code))
    where = find_base(folder, base)
    model: Any = load_model(where, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with over_any_base(any_base):
        _load_adapter(folder, model)
    model.eval()
    _check_runs(folder.name, model)
    holder = folder.name if (folder.path / "tokenizer_config.json").exists() else where
    return _ready(folder, model, load_tokenizer(holder, trust_remote_code=trust_remote_code))


def _ready(folder: Folder, model: nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Model and tokenizer, if they belong together; what ends an answer is known to the model."""
    with locate(folder.name):
        check_vocabulary(tokenizer, embedding_rows(model))
    own = folder.path / GENERATION
    ends = read_json(own).get("eos_token_id") if folder.kind == "adapter" and own.exists() else None
    set_ends(model, tokenizer, ends if isinstance(ends, list) else [ends])
    return model, tokenizer


def _check_runs(name: str, model: nn.Module) -> None:
    """Raise CheckpointError if a model, all of whose parts are there, cannot be run."""
    try:
        if all(parameter.device.type != "meta" for parameter in model.parameters()):
            check_runs(model)
    except ConfigError as error:
        raise CheckpointError(f"{name}: {error}") from error


def over_any_base(asked: bool) -> AbstractContextManager[None]:
    """`any_base()` if it was asked for."""
    from quadapt.hf.identity import any_base

    return any_base() if asked else nullcontext()


def _load_adapter(folder: Folder, model: Any) -> None:
    """Put an adapter over its base; whether it is its base, and whether the adapter is whole, is checked on the way."""
    from peft import PeftConfig

    if not (folder.path / NF8_FILE).exists():
        reading(folder.name, model.load_adapter, folder.name)
        return
    config = reading(folder.name, PeftConfig.from_pretrained, folder.name)
    factors = reading(folder.name, read_nf8, folder.path / NF8_FILE)
    factors = {name.removeprefix("base_model.model."): tensor for name, tensor in factors.items()}
    reading(folder.name, model.load_adapter, peft_config=config, adapter_state_dict=factors)


def check_content(folder: str, model: nn.Module) -> None:
    """Raise CheckpointError if a quantized model's tensors are not those whose fingerprint its config.json has.

    It reads them all, so it is done where something is written that claims to come of them.
    """
    if quantized_layers(model) and content_of(model) != (named := base_config(model).fingerprint):
        raise CheckpointError(
            f"{folder}: the quantized layers are not those that its config.json names (fingerprint {named[:12]}, they "
            f"have {content_of(model)[:12]}). A file was swapped or damaged. Copy the folder again from its source"
        )


def _load_gguf(path: Path, dtype: str, device: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} does not exist.{_near(path)}")
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model, info = reading(
        str(path),
        AutoModelForCausalLM.from_pretrained,
        str(path.parent),
        gguf_file=path.name,
        dtype=wanted,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    with locate(str(path)):
        check_loaded(model, info, {})
        check_generation(model)
    _check_runs(str(path), model.eval())
    tokenizer = reading(str(path), AutoTokenizer.from_pretrained, str(path.parent), gguf_file=path.name)
    reading(str(path), check_tokenizer, tokenizer)
    return model.to(device), tokenizer


def save_quantized(model: nn.Module, tokenizer: Any, folder: Path, note: Mapping[str, Any]) -> None:
    """Write a quantized model: transformers' files, tokenizer, model card, and `quadapt.json` with all digests.

    The folder should be one in the making, see `Workspace`.
    """
    config = base_config(model)
    set_ends(model, tokenizer)
    model.save_pretrained(folder, max_shard_size="4GB")  # type: ignore[operator]
    tokenizer.save_pretrained(folder)
    copy_processor(model, folder)
    layers = {name: layer.quant_weight.digest() for name, layer in quantized_layers(model).items()}
    write_note(folder, note, config, layers)
    (folder / "README.md").write_text(_card(config, note), encoding="utf-8")


def copy_processor(model: Any, folder: Path) -> None:
    """Copy how pictures and sound are prepared, where a model that takes them came with its folder."""
    source = Path(model.config.name_or_path or ".")
    for name in ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"):
        if model.config.get_text_config() is not model.config and (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def write_note(
    folder: Path, note: Mapping[str, Any], config: QuadaptConfig | None = None, layers: Mapping[str, str] | None = None
) -> None:
    """Write `quadapt.json`, with digests of all else that is in the folder by now; see :func:`digests_of`."""
    write_json(folder / NOTE, {**note, "digests": digests_of(folder, note, config, layers)})


def _card(config: QuadaptConfig, note: Mapping[str, Any]) -> str:
    about = {key: note[key] for key in ("made", "bits_per_weight") if key in note}
    formats = ", ".join(sorted({layout.name for layout in config.layouts.values()}))
    return (
        f"---\nlibrary_name: quadapt\ntags: [quantized, quadapt]\n---\n\n# A quantized model ({formats})\n\n"
        "Written by quadapt. Load it with `quadapt.load(folder)`, or with transformers after `import quadapt`; without "
        f"that import transformers cannot read the weights.\n\n```json\n{json.dumps(about, indent=2)}\n```\n"
    )
