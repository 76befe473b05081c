"""quadapt from Python: the same work as the command line's, on models in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from peft import PeftModel

    from quadapt.calibrate import Batch
    from quadapt.config import PrepareConfig
    from quadapt.exporters.report import ExportReport
    from quadapt.hf.merge import Certificate
    from quadapt.methods import Method


def prepare(
    model: str | nn.Module,
    *,
    method: str | Method = "qa-lora",
    calibration: str | Sequence[str] | Sequence[Batch] = (),
    target_modules: Sequence[str] = (),
    skip: Sequence[str] = (),
    device: str = "auto",
    dtype: str = "auto",
    seed: int = 0,
    **settings: Any,
) -> PeftModel:
    """Quantize a model in memory and put a method's adapter over it, ready for any trainer.

    ::

        from quadapt.methods import qa_lora

        model = quadapt.prepare("model", method=qa_lora(bits=3, act_order=True), calibration="text.txt")

    Args:
        model: A folder or hub name; or a transformers model (quantized in place), dense or quantized by quadapt. It may
            be of any kind: a language model, an encoder-decoder, a classifier, a detector; the head of one that is no
            language model trains with the adapter, and merges.
        method: A name as in `quadapt tune` (qa-lora, l4q, qlora, ..), or a :class:`quadapt.methods.Method`, of which
            every piece and every field can be chosen.
        calibration: Text for roundings and starts that are calibrated: files or hub names (only if `model` is a name),
            or batches: token ids `[sequences, length]`, or a model's inputs by name.
        target_modules: The layers that get adapters, by name or a part of it; by default all that are quantized.
        skip: The layers to leave unquantized, by name or a part of it.
        device: A device of torch; auto is a GPU if there is one. A model in memory stays where it is; with
            `offload="cpu"` this device quantizes it, block by block.
        dtype: The dtype of what is not quantized: auto (as stored), float32, bfloat16 or float16.
        seed: The seed of the adapter's initialization and of the choice of calibration text.
        settings: Further settings of the method, as `quadapt tune` names them: bits, group_size, levels, rounding,
            rank, alpha, pooling, ..

    Returns:
        A PEFT model whose adapter is trainable.

    Raises:
        ConfigError: A setting is wrong, a calibrated rounding has no data, the model is quantized by something else,
            or its code reads weights that would be codes.
        ShapeError: A layer cannot be quantized; the message names it.
    """
    from transformers.trainer_utils import set_seed

    from quadapt.config import PrepareConfig, checked
    from quadapt.errors import ConfigError
    from quadapt.hf.loading import load_tokenizer
    from quadapt.hf.start import set_grids, set_start
    from quadapt.hf.vocabulary import token_ids
    from quadapt.jobs.adapt import adapt
    from quadapt.jobs.embeddings import rounded_embeddings
    from quadapt.model.quantize import quantized_layers
    from quadapt.model.select import select
    from quadapt.nn.starts import Zero

    named = {"skip": tuple(skip), "target_modules": tuple(target_modules), "device": device, "dtype": dtype}
    config = checked(PrepareConfig, {"method": method, "seed": seed, **named, **settings})
    chosen, name = config.spec.method, model if isinstance(model, str) else ""
    if chosen.tune_first.tunes:
        raise ConfigError(
            f"method={chosen.name!r} tunes the dense model before it is quantized, on data that prepare does not have. "
            "Use quadapt tune, or tune the model yourself, and prepare it with tune_first='none'"
        )
    model, there = _placed(model, config)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    quantized = bool(quantized_layers(model))
    if quantized and chosen.start != Zero():
        raise ConfigError(
            f"start={chosen.start.name!r} fits what quantization changes, and the model is quantized already. Give the "
            "dense model, or start='zero'"
        )
    if quantized and config.embeddings != "float":
        raise ConfigError(
            f"embeddings={config.embeddings!r} are rounded before a model is quantized, and this one is. Leave it out, "
            "or give the dense model"
        )
    grids: dict[str, Tensor] = {}
    if not quantized and chosen.adapter.base == "float" and not chosen.begins_rounded:
        rounded_embeddings(model, config, select(model, skip=config.skip, part=config.part).chosen)
    elif not quantized:
        factors, grids = _quantized(model, config, calibration, name, there)
    set_seed(seed)
    by_name = config.train_tokens and not all(token.isdecimal() for token in config.train_tokens)
    tokens = token_ids(config.train_tokens, load_tokenizer(name) if name and by_name else None)
    adapted = adapt(model.to(there) if name and there else model, config.spec, tokens=tokens)
    set_start(adapted, factors)
    set_grids(adapted, grids)
    return adapted


def _quantized(
    model: nn.Module,
    config: PrepareConfig,
    calibration: str | Sequence[str] | Sequence[Batch],
    name: str,
    device: str | None,
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Quantize a model in place; the factors, or the first grids, that its adapter starts from, by layer.

    Over dense matrices the model is dense again in the end, with the numbers that were rounded.
    """
    from quadapt.hf.quantizer import adopt
    from quadapt.jobs.embeddings import rounded_embeddings
    from quadapt.model.begun import dense_again
    from quadapt.model.quantize import quantize_model
    from quadapt.model.select import select
    from quadapt.model.trial import check_reads, check_runs
    from quadapt.statistics import StatisticsFiles, gather

    quantization = config.spec.quantization
    batches = _batches(calibration, name, model, config) if quantization.needs_text else []
    selection = select(model, skip=config.skip, part=config.part)
    check_reads(model, selection.chosen)
    rounded = rounded_embeddings(model, config, selection.chosen)
    with TemporaryDirectory(prefix="quadapt-") as folder:
        statistics = StatisticsFiles(Path(folder), quantization.start.needs)
        gather(quantization.start.needs, model.eval(), selection.chosen, batches, statistics, device=device)
        done = quantize_model(
            model, selection.chosen, quantization, batches=batches, statistics=statistics, device=device
        )
    if config.spec.dense_base:
        dtypes = {layer: linear.weight.dtype for layer, linear in selection.chosen.items()}
        return {}, dense_again(model, done.weights, quantization, dtypes)
    made = {"method": config.spec.method.name, **rounded.made}
    adopt(model, left=selection.left, made=made, besides=rounded.digest)
    check_runs(model)
    return done.factors, {}


def _placed(model: str | nn.Module, config: PrepareConfig) -> tuple[nn.Module, str | None]:
    """The model, loaded if it is a name, and the device to quantize it on if that is another than it lies on."""
    from quadapt.hf.folder import open_folder
    from quadapt.hf.loading import load_model
    from quadapt.jobs.dry import place_of
    from quadapt.jobs.source import device_of
    from quadapt.report.ui import UI

    if not isinstance(model, str):
        return model, device_of(config) if config.offload == "cpu" else None
    folder, device = open_folder(model), device_of(config)
    if folder.kind != "model" or config.spec.method.adapter.base == "float":
        return load_model(model, dtype=config.dtype, device=device), None
    place = place_of(config, folder.name, device, UI())
    return load_model(model, dtype=config.dtype, device=place.home), place.device


def _batches(
    calibration: str | Sequence[str] | Sequence[Batch], name: str, model: nn.Module, config: PrepareConfig
) -> list[Batch]:
    from quadapt.calibrate import named
    from quadapt.errors import ConfigError
    from quadapt.jobs.tasking import calibrated_on
    from quadapt.nn.resident import moved

    device = next(model.parameters()).device
    names = [calibration] if isinstance(calibration, str) else [each for each in calibration if isinstance(each, str)]
    batches: list[Batch] = [each for each in calibration if not isinstance(each, str)]
    if names:
        batches = [*calibrated_on(names, name, model, config).batches]
    if not batches:
        quantization = config.spec.quantization
        what, else_ = ("rounding", "nearest") if quantization.needs_data else ("start", "zero")
        raise ConfigError(
            f"{what}={getattr(quantization, what).name!r} needs text to calibrate on. Give calibration='FILE', or "
            f"{what}={else_!r}"
        )
    return [moved(batch if isinstance(batch, Tensor) else named(batch), device) for batch in batches]


def merge(model: nn.Module, *, probe: Batch | None = None, requantize: bool = False) -> tuple[nn.Module, Certificate]:
    """Merge the adapters of a PEFT model into its quantized base.

    Args:
        model: The model that `prepare` gave, after training; it is used up.
        probe: Token ids `[sequences, length]`, or a model's inputs by name, to compare the models on; by default random
            tokens.
        requantize: Whether to quantize anew what cannot merge, which is lossy.

    Returns:
        An ordinary transformers model (`save_pretrained` works), and the certificate of what the merge kept.

    Raises:
        MergeError: An adapter cannot merge into codes.
    """
    from quadapt.hf.merge import merge as merge_model
    from quadapt.quant.rounding import Nearest

    return merge_model(
        model,
        probe=probe,
        probe_name="the probe given" if probe is not None else "",
        requantize=Nearest() if requantize else None,
    )


def export(
    model: nn.Module, tokenizer: Any, output: str | Path, *, format: str = "gguf", **options: str
) -> ExportReport:
    """Write a model in a format that others serve.

    Args:
        model: A quantized or merged model, or a PEFT model (lora, nf8). What a trainer has put around it is taken off.
        tokenizer: The tokenizer of the model.
        output: The file (gguf) or folder (the other formats) to write.
        format: gguf; hf (dense); lora (a standard adapter); nf8 (an adapter in 8 bits, for quadapt alone: load it with
            `quadapt.load(output, base=..)`); gptq, awq, bitsandbytes and compressed-tensors (codes
            as they are); or one that another package has registered.
        options: The format's options: `dense` (gguf: f32 or f16), `gguf_type` (auto or fast), `embeddings` (of
            gguf: float, q8_0 or q6_k), `unknown` (gguf: fail or bytes), `dtype` (hf and formats of codes: bfloat16,
            float16 or float32), `checkpoint_format` (gptq: gptq_v2 or gptq).

    Raises:
        ConfigError: There is no such format, or it has no such option.
        ExportError: The format cannot hold the model; the message names the layer and the reason.
    """
    from quadapt.exporters.formats import EXPORTERS
    from quadapt.hf.wrapped import unwrapped

    exporter = EXPORTERS[format].made(**options)
    with unwrapped(model) as inside:
        exporter.check(inside, tokenizer)
        return exporter.write(inside, tokenizer, Path(output))


def load(
    name: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    base: str | None = None,
    any_base: bool = False,
    trust_remote_code: bool = False,
) -> tuple[nn.Module, Any]:
    """Load anything that quadapt has written: `(model, tokenizer)`, an ordinary transformers model.

    Args:
        name: The folder of a quantized or merged model, or of an adapter (whose base is loaded too), or a GGUF file.
        dtype: The dtype of computation and of what is not quantized: auto (as stored), float32, bfloat16 or float16.
        device: The device to load to, by its name in torch.
        base: The folder of an adapter's base, if it has moved since the adapter was made.
        any_base: Load an adapter though its base is not the one it was trained over. For PEFT's own loaders, and for
            `quadapt.merge`, the same is asked for by `with quadapt.any_base():`.
        trust_remote_code: Run code that comes with a model.

    Raises:
        CheckpointError: Something is missing, damaged, or belongs to another base.
    """
    from quadapt.hf import loading

    return loading.load(
        str(name), dtype=dtype, device=device, base=base, any_base=any_base, trust_remote_code=trust_remote_code
    )
