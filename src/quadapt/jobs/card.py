"""The model card of an adapter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_ASKED = {
    "prompt": "as they stand in the data, without any template",
    "alpaca": "in Stanford Alpaca's template",
    "chat": "through the tokenizer's chat template",
}


def adapter_card(note: Mapping[str, Any]) -> str:
    """What `quadapt.json` says of an adapter, for people."""
    base = note["base"]
    where = base["hub"] or base["relative"] or base["absolute"]
    loss, kept, task = note.get("eval_loss"), note["kept"], note.get("task", "causal-lm")
    unit = " nats per token" if task in ("causal-lm", "seq2seq", "masked-lm") else ""
    lines = [
        f"An adapter ({note['method']}) over {where}, written by quadapt. Load both with `quadapt.load(folder)`.",
        f"Trained for {note['steps']} steps; the loss at the end was {note['final_loss']:.4f}{unit}."
        + (f" Loss on held-out data: {loss:.4f}, at step {kept['step']}, which is what is here." if loss else ""),
    ]
    if "from" in note:
        lines.append(
            f"It goes on from the adapter {note['from']['adapter']}, trained for {note['from']['steps']} steps."
        )
    if task != "causal-lm":
        lines.append(f"It was trained for {task}; `quadapt eval` measures it on data of that kind.")
    asked = _ASKED.get(note["prompt"]["kind"]) if task == "causal-lm" else None
    if asked:
        lines.append(f"Prompts were put {asked}; `quadapt chat` and `quadapt eval` ask likewise.")
    body = "\n\n".join(lines)
    named = json.dumps(base["hub"] or base["absolute"], ensure_ascii=False)  # a quoted string of YAML, too
    about = f"base_model: {named}\nlibrary_name: peft\ntags: [lora, quadapt]"
    return f"---\n{about}\n---\n\n# An adapter ({note['method']})\n\n{body}\n"
