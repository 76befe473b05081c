"""`quadapt inspect`: what a folder holds, and whether it is still what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quadapt.config import InspectConfig
from quadapt.data.source import listing
from quadapt.errors import CheckpointError
from quadapt.hf.config import QuadaptConfig
from quadapt.hf.folder import Folder, find_base, open_folder
from quadapt.hf.head import labels_of
from quadapt.hf.kinds import kind_of
from quadapt.hf.loading import load_model, read_config, read_quantization
from quadapt.hf.quantizer import base_config
from quadapt.hf.reading import reading
from quadapt.hf.verify import unverified, verify
from quadapt.jobs.quantize import show_layers, show_left
from quadapt.model.layer import LayerRow
from quadapt.model.quantize import bits_of
from quadapt.report.ui import UI


def inspect(config: InspectConfig, ui: UI) -> dict[str, Any]:
    """Run `quadapt inspect` and return what was found in the folder.

    Raises:
        CheckpointError: The folder is not what quadapt writes; or with `verify`, some tensor is not what was written.
    """
    folder = open_folder(config.model)
    if folder.kind == "adapter":
        return _adapter(folder, config, ui)
    if folder.kind == "model":
        raise CheckpointError(
            f"{config.model!r} is a dense model, not written by quadapt. Give what quantize, tune or merge wrote"
        )
    found = read_quantization(folder.name)
    assert found is not None  # the folder is quantized
    layouts = found.layouts
    bits = bits_of(list(layouts.values()))
    named = f", fingerprint {found.fingerprint[:12]}" if found.fingerprint else ""
    ui.show(f"{folder.name}: {len(layouts)} quantized layers, {bits:.3f} true bits per weight{named}")
    about = read_config(folder.name)
    kind = kind_of(about)
    if not kind.writes:
        ui.show(f"task: {kind.name}{f' ({listing(labels_of(about))})' if kind.labels else ''}")
    for name, value in found.made.items():
        ui.show(f"{name}: {value}")
    known = LayerRow.__dataclass_fields__
    rows = [LayerRow(**{key: row[key] for key in row if key in known}) for row in folder.note.get("rows", [])]
    if rows and sorted(row.name for row in rows) != sorted(layouts):
        raise CheckpointError(f"{folder.name}: quadapt.json reports other layers than config.json has. Copy both again")
    show_layers(layouts, ui, rows=rows, every=config.layers)
    show_left(found.left, ui)
    _show_certificate(folder, ui)
    result = {
        "kind": folder.kind,
        "bits_per_weight": bits_of(list(layouts.values())),
        "fingerprint": found.fingerprint,
        "made": found.made,
        "layers": {name: layout.name for name, layout in layouts.items()},
        "left": found.left,
        "certificate": folder.note.get("certificate"),
    }
    if config.verify and folder.importer is not None:
        raise CheckpointError(
            f"{folder.name}: was written by others ({folder.importer.name}), who keep no digests to verify. Convert it "
            f"(quadapt convert {folder.name} --output FOLDER), and verify that"
        )
    if config.verify:
        _verify(folder, found, ui)
        result["verified"] = True
    return result


def _verify(folder: Folder, found: QuadaptConfig | None, ui: UI) -> None:
    wrong = reading(folder.name, verify, folder.path, folder.note, found)
    if wrong:
        lost = " The certificate does not hold." if folder.note.get("certificate") else ""
        raise CheckpointError(
            f"{folder.name}: {', '.join(wrong[:5])}{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}: "
            f"not what was written.{lost} Write the folder again, or copy it from its source"
        )
    missing = unverified(folder.note)
    ui.show(f"verified: every tensor is what was written{'' if missing else ', and so is all that is said of it'}")
    if missing:
        ui.show(f"not verified: {', '.join(missing)}, of which the version that wrote this kept no digests")


def _show_certificate(folder: Folder, ui: UI) -> None:
    certificate = folder.note.get("certificate")
    if not certificate:
        return
    worst = max(certificate["layers"], key=lambda layer: layer["difference"], default={"difference": 0, "name": "none"})
    changed = sum(layer["codes_changed"] for layer in certificate["layers"])
    ui.show(
        f"merge: {certificate['verdict']} in {certificate['dtype']} on {certificate['probe']}; effect lost "
        f"{certificate['effect_lost']:.2%}, largest weight difference {worst['difference']:.2g} steps "
        f"({worst['name']}), codes changed {changed}, KL {certificate['kl']:.1e}"
    )
    for part in certificate.get("besides", ()):
        ui.show(f"merged besides: {part['name']}, {part['kind']}{', untied' if part['untied'] else ''}")


def _adapter(folder: Folder, config: InspectConfig, ui: UI) -> dict[str, Any]:
    note = folder.note
    try:
        base = find_base(folder)
    except CheckpointError:  # it can still be described
        base = "a base that is not where it was"
    kind = note.get("adapter", {}).get("kind", "PEFT")
    ui.show(
        f"{folder.name}: {'an' if kind[0] in 'aeiou' else 'a'} {kind} adapter "
        f"({note.get('method', 'unknown method')}) over {base}"
    )
    for name in ("task", "adapter", "recipe", "bits", "steps", "final_loss", "eval_loss", "trainable_parameters"):
        if note.get(name) is not None:
            ui.show(f"{name}: {note[name]}")
    if config.verify:
        _verify_adapter(folder, base, ui)
    return {
        **{name: value for name, value in note.items() if name != "losses"},
        "kind": "adapter",
        "base": base,
        **({"verified": True} if config.verify else {}),
    }


def _verify_adapter(folder: Folder, base: str, ui: UI) -> None:
    """Check an adapter: its settings against their own digest, all else against the digests, its base by its name."""
    from peft import LoraConfig, PeftConfig

    from quadapt.hf.adapter_config import identity_of

    about = reading(folder.name, PeftConfig.from_pretrained, folder.name)
    _verify(folder, None, ui)
    wanted = identity_of(about).get("base_fingerprint") if isinstance(about, LoraConfig) else None
    found = _fingerprint(base)
    if wanted and found and wanted != found:
        raise CheckpointError(
            f"{folder.name}: was trained over another base (fingerprint {wanted[:12]}) than {base} ({found[:12]})"
        )
    if wanted and found:
        ui.show(f"its base {base} has the fingerprint that it names; inspect --verify checks that one, too")


def _fingerprint(base: str) -> str:
    """The fingerprint that a base has; empty if it is dense, or not there."""
    if not Path(base).exists():
        return ""
    about = read_quantization(base)
    if about is None or about.fingerprint:
        return "" if about is None else about.fingerprint
    return base_config(load_model(base)).fingerprint  # of an imported one its tensors tell
