"""What the campaign's commands read, and the commands."""

from __future__ import annotations

import os
from pathlib import Path

from commands import SHORT, byte_tokenizer, quadapt, write_data

_DENSE = ("tune", "{}/dense", "--data", "{}/sums.jsonl", "--bits", "4", "--group-size", "32")
_TUNE = (*_DENSE, "--method", "qa-lora")
_STAGES = (
    "--method",
    "recover",
    "--calibration-length",
    "32",
    "--calibration-sequences",
    "8",
    "--calibration-epochs",
    "1",
)
_STEPS = ("--max-steps", "4", "--save-steps", "2", *SHORT)
_FEW = ("--target-modules", "q_proj", "--target-modules", "down_proj")
"""Every layer has the same events, and each takes a plan half a second."""

COMMANDS: dict[str, tuple[tuple[str, ...], str | None]] = {
    "quantize": (("quantize", "{}/dense", "--rounding", "nearest", "--output", "out"), None),
    "quantize --overwrite": (("quantize", "{}/dense", "--rounding", "nearest", "--output", "out", "--overwrite"), "hf"),
    "merge --overwrite": (("merge", "{}/adapter", "--output", "out", "--overwrite"), "q4"),
    "plan": (("plan", "{}/dense", "--budget", "4", "--method", "qlora", *_FEW, "--output", "out.json"), None),
    "eval --output": (("eval", "{}/q4", "--data", "{}/sums.jsonl", "--limit", "2", "--output", "out.json"), None),
    "export gguf --overwrite": (("export", "{}/merged", "--output", "out", "--overwrite"), "out.gguf"),
    "export hf --overwrite": (("export", "{}/merged", "--format", "hf", "--output", "out", "--overwrite"), "hf"),
    "export compressed-tensors": (("export", "{}/whole", "--format", "compressed-tensors", "--output", "out"), None),
    "export nf8": (("export", "{}/qlora", "--format", "nf8", "--output", "out"), None),
    "export lora": (("export", "{}/adapter", "--format", "lora", "--output", "out"), None),
    "tune": ((*_TUNE, *_STEPS, "--output", "out"), None),
    "tune by recover": ((*_DENSE, *_STAGES, *_STEPS, "--first-share", "0.5", "--output", "out"), None),
    "run": (("run", "{}/job.yaml"), None),
}
"""By title: the command, in which `{}` is the folder of inputs, and the old output that it is to replace."""

_JOB = """\
output: out
tune: {{model: {0}/dense, data: {0}/sums.jsonl, method: qa-lora, group_size: 32, max_steps: 4, save_steps: 2,
  seq_len: 32, batch_size: 2, gradient_accumulation: 1, rank: 2, learning_rate: 0.02}}
merge: {{}}
eval: {{data: {0}/sums.jsonl, limit: 2}}
export: {{}}
"""
"""All stages of `run`."""


def fill(folder: Path) -> Path:
    """Make the inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.trainer_utils import set_seed

    folder.mkdir(parents=True)
    set_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=258,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    write_data(folder)
    os.chdir(folder)
    quadapt("quantize", "dense", "--rounding", "nearest", "--bits", "3", "--group-size", "32", "--output", "q4")
    quadapt(*(word.replace("{}", str(folder)) for word in (*_TUNE, *_STEPS)), "--output", "adapter")
    quadapt("tune", "q4", "--data", "sums.jsonl", "--method", "qlora", *_STEPS, "--output", "qlora")
    quadapt("merge", "adapter", "--output", "merged")
    quadapt("export", "q4", "--format", "hf", "--output", "hf")
    quadapt("export", "q4", "--output", "out.gguf")
    quadapt("quantize", "dense", "--rounding", "nearest", "--zero", "integer", "--output", "whole")
    (folder / "job.yaml").write_text(_JOB.format(folder))
    # Each trial is forked from this process: what plan and eval import is imported once, here, and not in all of them.
    quadapt("eval", "q4", "--data", "sums.jsonl", "--limit", "1")
    quadapt("plan", "dense", "--budget", "4", "--method", "qlora", "--target-modules", "q_proj", "--output", "one.json")
    return folder
