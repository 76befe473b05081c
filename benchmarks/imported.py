"""Peak anonymous memory and seconds while a sharded GPTQ checkpoint of 1 B parameters is converted.

Limit: packed size + 600 MB, above what is there after import, as in `benchmarks/memory.py`; with act-order and without.
The codes are random; what they mean does not matter here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from benchmarks.measure import store, table
from benchmarks.memory import CONFIG, above_import
from quadapt.hf.loading import load_tokenizer

GROUP = 128


def child(source: str, target: str) -> None:
    """Convert, in a process of its own, and print what it took."""
    import transformers.trainer  # noqa: F401 - all that loading imports

    from quadapt.config import ConvertConfig
    from quadapt.jobs.convert import convert
    from quadapt.report.ui import UI

    config = ConvertConfig(model=source, output=target)
    _, most, seconds = above_import(lambda: convert(config, UI(quiet=True)))
    packed = sum(file.stat().st_size for file in Path(source).glob("*.safetensors"))
    print(json.dumps({"above_import": most, "packed": packed, "seconds": seconds}))


def layer(out: int, columns: int, *, act_order: bool) -> dict[str, Tensor]:
    """The tensors of a layer of 4 bits with random codes and zero-points."""
    groups = torch.arange(columns) // GROUP
    return {
        "qweight": torch.randint(-(2**31), 2**31, (columns // 8, out), dtype=torch.int32),
        "qzeros": torch.randint(-(2**31), 2**31, (-(-columns // GROUP), out // 8), dtype=torch.int32),
        "scales": (0.002 * (1 + torch.rand(-(-columns // GROUP), out))).half(),
        "g_idx": (groups[torch.randperm(columns)] if act_order else groups).int(),
    }


def write(folder: Path, *, act_order: bool) -> int:
    """Write the checkpoint, a file for each block; how many parameters the model has."""
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(CONFIG)
    folder.mkdir()
    shards: dict[str, dict[str, Tensor]] = {}
    for name, module in model.named_modules():
        shard = shards.setdefault(".".join(name.split(".")[:3]) if "layers." in name else "rest", {})
        if isinstance(module, nn.Linear) and name != "lm_head":
            parts = layer(module.out_features, module.in_features, act_order=act_order)
            shard |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        elif name != "lm_head":
            shard |= {
                f"{name}.{key}": (0.02 * torch.randn(each.shape)).half()
                for key, each in module.named_parameters(recurse=False)
            }
    weight_map = {}
    for at, tensors in enumerate(filter(None, shards.values())):
        file = f"model-{at:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    about = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": act_order, "sym": False}
    config = {**CONFIG.to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": "float16"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": about}))
    load_tokenizer(str(files("quadapt.demo") / "model")).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def main() -> dict[str, Any]:
    """Measure, print and store."""
    rows, figures = [], dict[str, Any]()
    for act_order in (False, True):
        name = "act-order" if act_order else "groups in order"
        with tempfile.TemporaryDirectory() as place:
            source = Path(place) / "gptq"
            parameters = write(source, act_order=act_order)
            command = [sys.executable, "-m", "benchmarks.imported", str(source), str(Path(place) / "ours")]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(said.splitlines()[-1])
        limit = found["packed"] / 1e6 + 600
        rows.append(
            (name, parameters / 1e6, found["packed"] / 1e6, found["above_import"] / 1e6, limit, found["seconds"])
        )
        figures[name] = found
    columns = ("GPTQ, 4 bits, groups of 128", "million parameters", "packed, MB", "peak, MB", "limit, MB", "seconds")
    table("converting a sharded checkpoint", columns, rows)
    figures = {"limit": "packed size + 600 MB", "parameters": parameters, **figures}
    store("imported", figures)
    return figures


if __name__ == "__main__":
    child(*sys.argv[1:])
