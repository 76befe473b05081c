"""What one should know of a GGUF file before serving it: what each type costs, what it changed, what was left dense."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from quadapt.exporters.ggml import BY_NAME
from quadapt.exporters.gguf_entries import Entry, Stack, pieces_of
from quadapt.quant.weight import QuantWeight


def gguf_notes(entries: Sequence[Entry | Stack], offsets: Path | None) -> list[str]:
    """Notes on all tensors of a file.

    Args:
        entries: What is in it.
        offsets: The file beside it that has the offsets of some layers; None if there is none.
    """
    rows = [entry.row for entry in entries]
    used = [block for block in BY_NAME.values() if any(row.type == block.name and row.linear for row in rows)]
    notes = [f"{block.holds} cost {block.bits_per_weight} bits per weight in {block.name} blocks" for block in used]
    notes += _absorbed(entries) + _changes(entries)
    if offsets is not None:
        notes.append(
            f"{offsets.name} has the offsets of these layers: without it the model computes nothing of sense. Load it "
            f"together with the model (llama.cpp: --lora {offsets.name}; Ollama: ADAPTER ./{offsets.name})"
        )
    ends = [row for row in rows if row.type in BY_NAME and not row.linear and not row.note]
    notes += [f"{row.name}: its values are those of {row.type}, and held as such" for row in ends]
    notes += [f"{row.name}: {row.note}" for row in rows if row.note and not row.linear]
    return notes + _left_dense(entries)


def _absorbed(entries: Sequence[Entry | Stack]) -> list[str]:
    """A note if zero-points have gone into codes; none otherwise."""
    pieces = [piece for entry in entries for piece in pieces_of(entry) if isinstance(piece.source, QuantWeight)]
    whole = [piece for piece in pieces if piece.source.format.zero == "integer" and not piece.change]  # type: ignore[union-attr]
    if not any(piece.row.type in BY_NAME and not BY_NAME[piece.row.type].shifted for piece in whole):
        return []
    return ["codes less their whole zero-points need no offsets: the numbers are the same, bit for bit"]


def _changes(entries: Sequence[Entry | Stack]) -> list[str]:
    """What types do to the numbers of layers: one note for each type and each thing that is done."""
    found: dict[tuple[str, str], list[tuple[str, float, float]]] = {}
    for entry in entries:
        for piece in pieces_of(entry):
            if piece.change is not None:
                key = (piece.row.type, piece.change.words)
                found.setdefault(key, []).append((piece.row.name, *piece.change.moved))
    notes = []
    for (type_name, words), layers in found.items():
        worst = max(layers, key=lambda each: each[1])
        count = "1 matrix" if len(layers) == 1 else f"{len(layers)} matrices"
        notes.append(
            f"{count} in {type_name}: {words}. Weights move by up to {worst[1]:.4f} of a step (root mean square, "
            f"{worst[0]}), the furthest by {max(each[2] for each in layers):.3f}"
        )
    return notes


def _left_dense(entries: Sequence[Entry | Stack]) -> list[str]:
    rows, notes = [entry.row for entry in entries], []
    left = [row for row in rows if row.linear and row.type not in BY_NAME]
    for why in dict.fromkeys(row.note for row in left):
        names = [row.name for row in left if row.note == why]
        cost = "16 bits per weight, rounded" if left[0].type == "F16" else "32 bits per weight"
        notes.append(f"{why}: left as {left[0].type} ({cost}): {', '.join(names)}")
    return notes
