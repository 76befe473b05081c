"""Peak anonymous memory while a sharded model of 1 B parameters is quantized, above that after import.

Limit: packed size + 600 MB. Pages mapped from the checkpoint are not anonymous: the system drops them when memory is
short.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import store, table
from quadapt.hf.loading import load_tokenizer

CONFIG = LlamaConfig(
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_hidden_layers=20,
    num_attention_heads=16,
    num_key_value_heads=16,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
)


def anonymous() -> int:
    """Anonymous bytes of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def above_import(work: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], int, float]:
    """What some work gives, the most anonymous bytes above those from before it, and its seconds."""
    base = most = anonymous()
    stop, start = threading.Event(), time.monotonic()

    def watch() -> None:
        nonlocal most
        while not stop.is_set():
            most = max(most, anonymous())
            time.sleep(0.01)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    result = work()
    stop.set()
    watcher.join()
    return result, most - base, time.monotonic() - start


def child(source: str, target: str) -> None:
    """Quantize, in a process of its own, and print what it took."""
    import transformers.trainer  # noqa: F401 - all that quantizing imports

    from quadapt.config import QuantizeConfig
    from quadapt.jobs.quantize import quantize
    from quadapt.report.ui import UI

    config = QuantizeConfig(model=source, output=target, method="qa-lora", rounding="nearest")
    result, most, _ = above_import(lambda: quantize(config, UI(quiet=True)))
    print(json.dumps({"above_import": most, "packed": result["file_bytes"], "weights": result["quantized_weights"]}))


def main() -> dict[str, Any]:
    """Measure, print and store."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "dense", Path(folder) / "quantized"
        torch.manual_seed(0)
        with torch.device("meta"):
            model = LlamaForCausalLM(CONFIG).to(torch.bfloat16)
        model = model.to_empty(device="cpu")
        model.tie_weights()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        model.save_pretrained(source, max_shard_size="500MB")
        load_tokenizer(str(files("quadapt.demo") / "model")).save_pretrained(source)
        del model
        command = [sys.executable, "-m", "benchmarks.memory", str(source), str(target)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    rows = [
        ("parameters", parameters / 1e6),
        ("packed checkpoint, MB", found["packed"] / 1e6),
        ("peak above import, MB", found["above_import"] / 1e6),
        ("limit, MB", found["packed"] / 1e6 + 600),
    ]
    table("quantizing a sharded bf16 model, nearest int4", ("what", "million"), rows)
    figures = {"limit": "packed size + 600 MB", "parameters": parameters, **found}
    store("memory", figures)
    return figures


if __name__ == "__main__":
    child(*sys.argv[1:])
