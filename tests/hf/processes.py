"""What `test_processes.py` runs, in one process and in several: a few steps of training, and their losses.

    torchrun --nproc_per_node 2 tests/hf/processes.py OUTPUT

OUTPUT is a folder; the first process writes `losses.json` into it.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import get_peft_model
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import quadapt
from quadapt.methods import method_named

METHODS: dict[str, dict[str, Any]] = {
    "qa-lora": {"offsets": "fp32"},
    "qlora": {"lora_dropout": 0.0},
    "l4q": {"scales": "fp32"},
}
STEPS, BATCH, RATE = 3, 4, 0.01


def model_of(method: str) -> Any:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=96, initializer_range=0.2, tie_word_embeddings=False)
    chosen = method_named(method).having(rank=2, group_size=32)
    dense = LlamaForCausalLM(config)
    if chosen.adapter.base == "float":
        return get_peft_model(dense, quadapt.AdapterConfig(method, r=2, group_size=32))
    base: Any = quadapt.prepare(dense, method=method, rounding="nearest", group_size=32, rank=2).unload()
    torch.manual_seed(1)
    return get_peft_model(base, quadapt.AdapterConfig(method, r=2, **METHODS[method]))


def rows() -> list[dict[str, torch.Tensor]]:
    random = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 90, (16,), generator=random) for _ in range(STEPS * BATCH)]
    return [{"input_ids": each, "labels": each} for each in ids]


def by_trainer(method: str, folder: Path, world: int) -> tuple[list[float], str]:
    """Losses of transformers' Trainer, by data parallelism where there are several processes; verdict of the merge."""
    about = TrainingArguments(
        str(folder / f"{method}-{world}"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // world,
        learning_rate=RATE,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        disable_tqdm=True,
    )
    trainer = Trainer(model_of(method), about, train_dataset=rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if method == "qlora":
        return losses, "exact"  # over all inputs: merges by rounding anew alone
    return losses, quadapt.merge(trainer.model_wrapped)[1].verdict


def by_shards(method: str, rank: int, world: int) -> list[float]:
    """Losses of a loop of its own, with all parameters, codes and scales too, sharded by FSDP2 if there are several."""
    model, data = model_of(method).train(), rows()
    if world > 1:
        inside = model.get_base_model()
        for block in inside.model.layers:
            fully_shard(block)
        fully_shard(model)
        assert _sharded(model) > 0.9
    trained: list[nn.Parameter] = [each for each in model.parameters() if each.requires_grad]
    optimizer, losses = torch.optim.AdamW(trained, RATE), []
    for step in range(STEPS):
        every = data[step * BATCH : (step + 1) * BATCH][rank::world]
        ids = torch.stack([each["input_ids"] for each in every])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        whole = loss.detach()
        if world > 1:
            dist.all_reduce(whole, dist.ReduceOp.AVG if dist.get_backend() == "nccl" else dist.ReduceOp.SUM)
            whole /= world
        losses.append(float(whole))
    return losses


def _sharded(model: nn.Module) -> float:
    """The share of all numbers of a model that are spread over processes."""
    from torch.distributed.tensor import DTensor

    every = list(model.parameters())
    return sum(each.numel() for each in every if isinstance(each, DTensor)) / sum(each.numel() for each in every)


def measured(folder: Path, rank: int = 0, world: int = 1) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for method in METHODS:
        found[f"{method} data-parallel"], found[f"{method} merge"] = by_trainer(method, folder, world)
        found[f"{method} sharded"] = by_shards(method, rank, world)
    return found


if __name__ == "__main__":
    output, own, processes = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    result = measured(output, own, processes)
    if own == 0:
        (output / "losses.json").write_text(json.dumps(result))
    dist.destroy_process_group()
