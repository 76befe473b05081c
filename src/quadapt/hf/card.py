"""Model cards: the README.md of a folder, for people, with the metadata that the hub reads.

The hub refuses a card that names a base which it does not have. So `base_model` stands in the metadata only if the base
came from there; where it was a folder, the text says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from quadapt.hf.config import QuadaptConfig
from quadapt.hf.notes import NOTE
from quadapt.hf.reading import read_note

CARD = "README.md"
"""The name of the file that is a folder's card."""

Relation = Literal["adapter", "finetune", "quantized"]
"""What a model is to its base, in the hub's words."""

_ASKED = {
    "prompt": "as they stand in the data, without any template",
    "alpaca": "in Stanford Alpaca's template",
    "chat": "through the tokenizer's chat template",
}

_PIPELINES = {
    "causal-lm": "text-generation",
    "image-text-to-text": "image-text-to-text",
    "seq2seq": "text2text-generation",
    "masked-lm": "fill-mask",
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "question-answering": "question-answering",
    "image-classification": "image-classification",
    "features": "feature-extraction",
}
"""The hub's words for what a model does, by the names of `kinds.py`."""


_LIBRARIES = {name: name for name in ("mlx", "onnx", "openvino")}
"""The hub's names of libraries that load what is exported, by format, where that is not transformers."""


def adapter_card(note: Mapping[str, Any], base: Path) -> str:
    """The card of an adapter.

    Args:
        note: The content of its `quadapt.json`.
        base: The folder of its base.
    """
    about = note["base"]
    where = about["hub"] or about["relative"] or about["absolute"]
    task = note.get("task", "causal-lm")
    lines = [
        f"An adapter ({note['method']}) over {where}, written by quadapt. Load both with `quadapt.load(folder)`.",
        *_training(note),
    ]
    if task != "causal-lm":
        lines.append(f"It was trained for {task}; `quadapt eval` measures it on data of that kind.")
    asked = _ASKED.get(note["prompt"]["kind"]) if task == "causal-lm" else None
    if asked:
        lines.append(f"Prompts were put {asked}; `quadapt chat` and `quadapt eval` ask likewise.")
    bits = note.get("bits") or {}
    if "with_adapter" in bits:
        lines.append(
            f"True bits per quantized weight: {bits['base']:.3f} for the base, {bits['with_adapter']:.3f} with the "
            "adapter."
        )
    lines += _data(_sources(note.get("settings")))
    return _card(
        f"An adapter ({note['method']})",
        lines,
        source=about["hub"] or _origin(base),
        relation="adapter",
        library="peft",
        tags=["lora", "quadapt"],
        task=task,
        data=_sources(note.get("settings")),
    )


def _training(note: Mapping[str, Any]) -> list[str]:
    """How far it was trained, and how it then did."""
    loss, kept, task = note.get("eval_loss"), note["kept"], note.get("task", "causal-lm")
    unit = " nats per token" if task in ("causal-lm", "seq2seq", "masked-lm") else ""
    lines = [
        f"Trained for {note['steps']} steps; the loss at the end was {note['final_loss']:.4f}{unit}."
        + (f" Loss on held-out data: {loss:.4f}, at step {kept['step']}, which is what is here." if loss else ""),
    ]
    if "from" in note:
        earlier = note["from"]
        lines.append(f"It goes on from the adapter {earlier['adapter']}, trained for {earlier['steps']} steps.")
    return lines


def quantized_card(config: QuadaptConfig, note: Mapping[str, Any], kind: str | None) -> str:
    """The card of a quantized model, merged or not.

    Args:
        config: Its quantization config.
        note: The content of its `quadapt.json`.
        kind: What it does, by the name of its kind; None if that is not known.
    """
    about = {key: note[key] for key in ("made", "bits_per_weight") if key in note}
    formats = ", ".join(sorted({layout.name for layout in config.layouts.values()}))
    trained, made = note.get("trained") or {}, note.get("made") or {}
    lines = [
        "Written by quadapt. Load it with `quadapt.load(folder)`, or with transformers after `import quadapt`; without "
        "that import transformers cannot read the weights.",
        "```bash\nquadapt serve FOLDER    # OpenAI's interface over HTTP\nquadapt export FOLDER --format ?    # which "
        "formats of others hold it exactly\n```",
    ]
    if "bits_per_weight" in note:
        lines.append(f"{note['bits_per_weight']:.3f} true bits per quantized weight.")
    if trained.get("method"):
        lines.append(
            f"An adapter ({trained['method']}), trained for {trained.get('steps')} steps, is merged into it. "
            f"{_certified(note.get('certificate') or {})}".rstrip()
        )
    lines += [*_data(trained.get("data") or ()), f"```json\n{json.dumps(about, indent=2)}\n```"]
    return _card(
        f"A quantized model ({formats})",
        lines,
        source=made.get("source"),
        relation="finetune" if trained.get("method") else "quantized",
        library="quadapt",
        tags=["quantized", "quadapt"],
        task=note.get("task") or kind,
        data=trained.get("data") or (),
    )


def _certified(certificate: Mapping[str, Any]) -> str:
    """What the certificate of a merge says, in a sentence."""
    if not certificate:
        return ""
    equal, lost = certificate.get("logits_equal"), float(certificate.get("effect_lost") or 0)
    kept = "all logits are bit-equal" if equal else f"{lost:.2%} of what was trained is lost"
    return (
        f"Certificate of the merge: {certificate.get('verdict')}; {kept} in {certificate.get('dtype')} on "
        f"{certificate.get('probe')}. `quadapt inspect --verify FOLDER` checks that the files are still those."
    )


def exported_card(
    note: Mapping[str, Any], *, format: str, served_by: str, bits: float, notes: Iterable[str], adapter: bool
) -> str:
    """The card of a folder that was exported for other software.

    Args:
        note: The content of `quadapt.json` in the folder that was exported.
        format: The name of the format.
        served_by: The programs that read it, in words.
        bits: Stored bits per weight of the layers that are quantized in the model.
        notes: What the export says of what it wrote.
        adapter: Whether it is an adapter without its base.
    """
    trained, made = note.get("trained") or {}, note.get("made") or {}
    method = trained.get("method") or note.get("method")
    lines = [
        f"{'An adapter' if adapter else 'A model'} in the format {format}, exported by quadapt. Read by {served_by}.",
        *(
            [f"Trained by the method {method}, for {trained.get('steps') or note.get('steps')} steps."]
            if method
            else []
        ),
        *([f"{bits:.3f} bits {'more for each' if adapter else 'per'} weight of the quantized layers."] if bits else []),
        *([_certified(note["certificate"])] if note.get("certificate") else []),
        *(f"{each[:1].upper()}{each[1:]}." for each in notes),
    ]
    data = trained.get("data") or _sources(note.get("settings"))
    return _card(
        f"{'An adapter' if adapter else 'A model'} for {served_by}",
        [*lines, *_data(data)],
        source=made.get("source"),
        relation="adapter" if adapter else "finetune" if method else "quantized",
        library="quadapt" if served_by == "quadapt" else "peft" if adapter else _LIBRARIES.get(format, "transformers"),
        tags=[format, "quadapt"],
        task=note.get("task"),
        data=data,
    )


def _card(
    title: str,
    lines: Sequence[str],
    *,
    source: str | None,
    relation: Relation,
    library: str,
    tags: list[str],
    task: str | None,
    data: Iterable[str],
) -> str:
    from huggingface_hub import ModelCardData

    base = hub_name(source)
    about = ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        pipeline_tag=_PIPELINES.get(task or ""),
        tags=tags,
        datasets=[name for name in data if hub_name(name, "dataset")] or None,
        **_license(source),
    )
    told = f"Base model: {base or Path(source).name}." if source else ""
    body = "\n\n".join([f"# {title}", *filter(None, [told, *lines])])
    return f"---\n{about.to_yaml()}\n---\n\n{body}\n"


def noted(folder: str | Path) -> dict[str, Any]:
    """What `quadapt.json` says in a folder; empty if there is none, as in those of others."""
    file = Path(folder) / NOTE
    return read_note(file) if file.exists() else {}


def _origin(base: Path) -> str:
    """The dense model that an adapter's base was made of; the base itself, if that is dense or nobody knows."""
    return str((noted(base).get("made") or {}).get("source") or base)


def _sources(settings: object) -> list[str]:
    """The data that settings of a training name."""
    named = settings.get("data") if isinstance(settings, Mapping) else None
    return [named] if isinstance(named, str) else list(named or ())


def _data(sources: Iterable[str]) -> list[str]:
    """Which data it was trained on; of files their names alone, since nobody else has their folders."""
    named = [Path(name).name if Path(name).exists() or name.startswith((".", "/")) else name for name in sources]
    return [f"Trained on {', '.join(named)}."] if named else []


def hub_name(name: str | None, kind: Literal["model", "dataset"] = "model") -> str | None:
    """The name on the hub of what was downloaded from there; None for a folder or file of this machine.

    Args:
        name: A name as it was given, or the folder in the hub's cache.
        kind: What is called so.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.file_download import repo_folder_name

    if not name:
        return None
    for part in Path(name).parts:
        if part.startswith(f"{kind}s--"):
            return part.removeprefix(f"{kind}s--").replace("--", "/")
    if Path(name).exists() or name.startswith((".", "/", "~")):
        return None
    try:
        folder = repo_folder_name(repo_id=name, repo_type=kind)
    except HFValidationError:  # words of people, or a folder that is gone
        return None
    return name if Path(HF_HUB_CACHE, folder).is_dir() else None


def _license(source: str | None) -> dict[str, Any]:
    """What the card of the base says about its license, if there is one."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if not source:
        return {}
    file = Path(source) / CARD
    if not file.is_file():
        cached = try_to_load_from_cache(hub_name(source) or "", CARD) if hub_name(source) else None
        file = Path(cached) if isinstance(cached, str) else file
    if not file.is_file():
        return {}
    try:
        about = ModelCard.load(file, ignore_metadata_errors=True).data
    except Exception:  # a card of others, in whatever state
        return {}
    said = {name: getattr(about, name, None) for name in ("license", "license_name", "license_link")}
    return {name: value for name, value in said.items() if isinstance(value, str)}
