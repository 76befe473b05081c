"""What all tests share: no network, fixed seeds, tiny models built from a config."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRITON_INTERPRET"] = "1"  # the Triton kernels run on the CPU here; on a card `make gpu` runs them
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that wait leave the cores to others

import numpy as np
import pytest
import torch
from hypothesis import settings
from torch import nn

from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest, Rounding
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may have inherited to ignore it

settings.register_profile("quadapt", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("quadapt")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """The same random numbers for every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def interrupted_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """`interrupted_at(1, 5)`: Ctrl-C when a loss of training is computed for the first and for the fifth time.

    It gives a list that has an entry for every time so far.
    """

    def at(*numbers: int) -> list[int]:
        from quadapt.train.trainer import AdapterTrainer

        real, steps = AdapterTrainer.compute_loss, list[int]()

        def compute(self: Any, *arguments: Any, **settings: Any) -> Any:
            steps.append(1)
            if len(steps) in numbers:
                raise KeyboardInterrupt
            return real(self, *arguments, **settings)

        monkeypatch.setattr(AdapterTrainer, "compute_loss", compute)
        return steps

    return at


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and texts beside the repository."""
    path = Path(__file__).parents[2] / "shared"
    if not path.is_dir():
        pytest.skip("needs the folder shared beside the repository")
    return path


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """`tiny_llama(**config)`: a random Llama of two layers in evaluation mode, the same for the same config."""

    def make(**changes: Any) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        sizes = {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_hidden_layers": 2,
            "vocab_size": 96,
            "max_position_embeddings": 64,
            "initializer_range": 0.2,
            "bos_token_id": 1,
            "eos_token_id": 2,
        }
        dtype = changes.pop("dtype", torch.float32)
        torch.manual_seed(changes.pop("seed", 0))
        model = LlamaForCausalLM(LlamaConfig(**(sizes | changes)))
        for parameter in model.parameters():
            if parameter.ndim == 1:  # norms that are not all ones, biases that are not all zeros
                parameter.data += 0.2 * torch.randn_like(parameter)
        return model.to(dtype).eval()

    return make


@pytest.fixture(scope="session")
def quantized_llama(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    """`quantized_llama(format, storage=, skip=, **config)`: a tiny Llama, rounded to nearest, known to transformers."""

    def make(
        format: Format | None = None,
        *,
        storage: Storage | None = None,
        rounding: Rounding | None = None,
        skip: tuple[str, ...] = (),
        **changes: Any,
    ) -> nn.Module:
        from quadapt.hf.quantizer import adopt
        from quadapt.model.layer import Quantization
        from quadapt.model.quantize import quantize_model
        from quadapt.model.select import select

        model = tiny_llama(**changes)
        format = format or Format(bits=4, group_size=32)
        selection = select(model, skip=skip)
        plan = Quantization(format=format, storage=storage or Storage.default(format), rounding=rounding or Nearest())
        quantize_model(model, selection.chosen, plan)
        return adopt(model, left=selection.left, made={"rounding": "nearest"})

    return make


@pytest.fixture(scope="session")
def quant_weight() -> Callable[..., QuantWeight]:
    """`quant_weight(format, out=, columns=)`: a random matrix rounded to nearest; `permuted` shuffles its inputs."""

    def make(
        format: Format,
        out: int = 24,
        columns: int = 80,
        *,
        storage: Storage | None = None,
        permuted: bool = False,
        std: float = 0.05,
    ) -> QuantWeight:
        random_ = torch.Generator().manual_seed(1000 * out + columns)
        dense = std * torch.randn(out, columns, generator=random_)
        layout = Layout(format=format, storage=storage or Storage.default(format), out=out, columns=columns)
        weight = Nearest()(dense, layout)
        if not permuted:
            return weight
        perm = torch.randperm(columns, generator=random_).int()
        return QuantWeight(replace(layout, permuted=True), {**weight.tensors, "perm": perm})

    return make


@pytest.fixture
def run_python(tmp_path: Path) -> Callable[..., str]:
    """`run_python(code, **environment)`: what a fresh interpreter prints; an error there fails the test."""

    def run(code: str, *arguments: str, cwd: Path | None = None, timeout: int = 300, **environment: str) -> str:
        script = tmp_path / "script.py"
        script.write_text(code)
        found = subprocess.run(
            [sys.executable, str(script), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=timeout,
            cwd=cwd or tmp_path,
            env={**os.environ, **environment},
        )
        assert found.returncode == 0, found.stderr[-4000:] or f"ended with {found.returncode}"
        return found.stdout

    return run
