"""Loading models, tokenizers and adapters: whole, or not at all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from quadapt.errors import CheckpointError, ConfigError, locate
from quadapt.hf.checkpoint import auto_class, check_loaded, skeleton, stored_tensors
from quadapt.hf.compressed import NF8_FILE, read_nf8
from quadapt.hf.config import QuadaptConfig
from quadapt.hf.dense import in_linear_form
from quadapt.hf.ending import set_ends
from quadapt.hf.folder import Folder, find_base, near, open_folder
from quadapt.hf.head import Head, without_heads
from quadapt.hf.imported import Imported, importer_of, one_file
from quadapt.hf.kinds import Kind, kind_of_model
from quadapt.hf.quantizer import adopt, base_config, content_of
from quadapt.hf.reading import check_generation, check_tokenizer, read_json, reading
from quadapt.hf.stored_form import changes
from quadapt.hf.vocabulary import check_vocabulary, embedding_rows, without_additions
from quadapt.importers import FileImporter
from quadapt.importers.gguf import configured
from quadapt.importers.gguf_tokenizer import tokenizer_of
from quadapt.model.quantize import quantized_layers
from quadapt.model.trial import check_runs

GENERATION = "generation_config.json"


def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    trust_remote_code: bool = False,
    head: Head | None = None,
) -> nn.Module:
    """Load a model, dense or quantized, in evaluation mode with nothing trainable.

    Weights stay mapped from their file where they need no cast. On the device "meta" all is checked and nothing read.

    Args:
        name: Folder, hub name or file.
        dtype: The dtype of what is not quantized: auto (as stored), float32, bfloat16 or float16.
        device: The device to load to, by its name in torch.
        trust_remote_code: Run code that comes with the model.
        head: A new head that the model gets, drawn at random; only over a dense model.

    Raises:
        CheckpointError: It cannot be loaded, or a tensor is missing, too many, or has
            another shape or dtype than the model; the message says which.
    """
    folder = open_folder(name)
    if folder.importer is not None:
        dtype = folder.importer.dtype if dtype == "auto" else dtype
        found = _imported(folder, trust_remote_code=trust_remote_code)
        config, stored = found.translated(), dict[str, Any]()
        made: Any = type(found.skeleton)  # transformers' own class, which takes tensors from memory
        call = partial(made.from_pretrained, None, config=config, state_dict=found.tensors(read=device != "meta"))
    else:
        config = read_config(name, trust_remote_code=trust_remote_code, head=head)
        stored = {} if _foreign(config) else reading(name, stored_tensors, folder.path)
        call = partial(auto_class(config).from_pretrained, name)
        call = call if head is None else partial(call, config=config)
        if not getattr(config, "quantization_config", None) and changes(
            skeleton(config, name=name, trust_remote_code=trust_remote_code)
        ):
            call = partial(in_linear_form, call, config)
    with nullcontext() if head is None else head.drawn():
        model, info = reading(
            name,
            call,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            device_map=None if device == "cpu" else device,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the check below names them
        )
    with locate(name):
        check_loaded(model, info if head is None else without_heads(info, model), stored)
        check_generation(model)
    if head is not None:
        head.draw(model)
    if folder.importer is not None and device != "meta":
        about = base_config(model)
        adopt(model, left=about.left, made=about.made)
        model.name_or_path = name
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def read_config(name: str, *, trust_remote_code: bool = False, head: Head | None = None) -> Any:
    """Read transformers' configuration of a model; of one that others have quantized, as quadapt holds it.

    With a `head` it is that of the model which it becomes by it.

    Raises:
        CheckpointError: There is none, or it names no class that transformers loads, or comes with code.
    """
    folder = open_folder(name)
    if folder.importer is not None:
        return _imported(folder, trust_remote_code=trust_remote_code).translated()
    config = _config(name, trust_remote_code=trust_remote_code)
    return config if head is None else reading(name, head.onto, config)


def read_quantization(name: str, *, trust_remote_code: bool = False) -> QuadaptConfig | None:
    """What each layer of a quantized folder is, without loading it; None for a dense model.

    Raises:
        CheckpointError: What the folder says about it is damaged.
    """
    return quantization_of(name, read_config(name, trust_remote_code=trust_remote_code))


def quantization_of(name: str, config: Any) -> QuadaptConfig | None:
    """What transformers' configuration of a model says about its quantized layers; None if quadapt holds none.

    Raises:
        CheckpointError: What it says is damaged; the message begins with `name`.
    """
    about = getattr(config, "quantization_config", None)
    if not isinstance(about, dict):
        return about if isinstance(about, QuadaptConfig) else None
    return reading(name, lambda: QuadaptConfig(**about)) if about.get("quant_method") == "quadapt" else None


def _config(name: str, *, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    place, file = _place(name)
    config = reading(name, AutoConfig.from_pretrained, place, trust_remote_code=trust_remote_code, **file)
    with locate(name):
        auto_class(config)
    return config


def _place(name: str) -> tuple[str, dict[str, str]]:
    """What transformers' loaders are given for a name: a folder, and the GGUF file in it if it is one."""
    path = Path(name)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (name, {})


def _imported(folder: Folder, *, trust_remote_code: bool) -> Imported:
    assert folder.importer is not None
    config = _config(folder.name, trust_remote_code=trust_remote_code)
    if isinstance(folder.importer, FileImporter):
        with locate(folder.name):
            config = folder.importer.completed(folder.path, config)
    return Imported(folder.path, folder.importer, config, trust_remote_code)


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

    place, file = _place(name)
    tokenizer = reading(name, tokenizer_of, folder) if file and folder.is_file() else None
    if tokenizer is None:
        tokenizer = reading(name, AutoTokenizer.from_pretrained, place, trust_remote_code=trust_remote_code, **file)
        tokenizer = reading(name, without_additions, tokenizer) if file else tokenizer
    reading(name, check_tokenizer, tokenizer)
    return tokenizer


def load_processor(name: str, kind: Kind | None, *, trust_remote_code: bool = False) -> Any:
    """Load what prepares the inputs of a model: its tokenizer, its image processor, or a processor of its own.

    Args:
        name: Folder or hub name.
        kind: The kind of the model; None for one of text.
        trust_remote_code: Run code that comes with a model.

    Raises:
        CheckpointError: There is none, or it cannot be loaded.
    """
    import transformers

    if kind is None or kind.reads == "text":
        return load_tokenizer(name, trust_remote_code=trust_remote_code)
    auto: Any = transformers.AutoImageProcessor if kind.reads == "images" else transformers.AutoProcessor
    return reading(name, auto.from_pretrained, name, trust_remote_code=trust_remote_code)


def holder_of(folder: Folder, base: str) -> str:
    """Where the tokenizer or processor of an adapter lies: beside it, or else beside its base."""
    own = ("tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
    return folder.name if any((folder.path / name).exists() for name in own) else base


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

    What comes in the place of the tokenizer for a model of pictures or sound is its processor.

    Args:
        name: Folder of a dense or quantized model, of an adapter (its base is found and loaded too), or a GGUF file
            (or the folder of nothing but one). A GGUF file's blocks are held as they are; where some of its layers are
            of a type that the stored form does not hold, all of it becomes dense numbers.
        dtype: The dtype of computation and of what is not quantized: auto (as stored), float32, bfloat16 or float16.
        device: The device to load to, by its name in torch.
        base: The folder of an adapter's base, if it has moved since the adapter was made.
        any_base: Load an adapter though its base is another one than it was trained over.
        trust_remote_code: Run code that comes with a model.

    Raises:
        CheckpointError: Something is missing, damaged, or belongs to another base.
    """
    file = one_file(Path(name))
    if name.endswith(".gguf") or file is not None:
        file = file or Path(name)
        if not _held(file):
            return _load_gguf(file, dtype, device)
    folder = open_folder(name)
    if folder.kind != "adapter":
        dense = load_model(folder.name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
        _check_runs(folder.name, dense)
        kind = kind_of_model(dense)
        return _ready(folder, dense, load_processor(folder.name, kind, trust_remote_code=trust_remote_code))
    where = find_base(folder, base)
    model: Any = load_model(where, dtype=dtype, device=device, trust_remote_code=trust_remote_code)
    with over_any_base(any_base):
        _load_adapter(folder, model)
    model.eval()
    _check_runs(folder.name, model)
    kind, holder = kind_of_model(model), holder_of(folder, where)
    return _ready(folder, model, load_processor(holder, kind, trust_remote_code=trust_remote_code))


def _ready(folder: Folder, model: nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    """Model and tokenizer, if they belong together; what ends an answer is known to the model."""
    if not hasattr(tokenizer, "get_vocab"):
        return model, tokenizer
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


def _held(file: Path) -> bool:
    """Whether the stored form holds a file as it is."""
    try:
        return importer_of(file) is not None
    except CheckpointError:
        return False


def _load_gguf(path: Path, dtype: str, device: str) -> tuple[nn.Module, Any]:
    from transformers import AutoModelForCausalLM

    if not path.is_file():
        raise CheckpointError(f"{str(path)!r} does not exist.{near(path)}")
    wanted = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    model, info = reading(
        str(path),
        AutoModelForCausalLM.from_pretrained,
        str(path.parent),
        gguf_file=path.name,
        config=reading(str(path), configured, path, _config(str(path), trust_remote_code=False)),
        dtype=wanted,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    with locate(str(path)):
        check_loaded(model, info, {})
        check_generation(model)
    _check_runs(str(path), model.eval())
    return model.to(device), load_tokenizer(str(path))
