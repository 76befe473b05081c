"""The programs that run what `quadapt export` writes: how each loads a file or folder, reads tokens and writes them.

An engine gives the logits after each of some token ids, and can decode tokens one at a time over its cache. Those that
are not installed are left out, by name. All compute in one thread of the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Read = Callable[[Sequence[int]], Tensor]
"""Logits after each token id, float32 `[length, vocabulary]`."""

Write = Callable[[Sequence[int], int], None]
"""Read a prompt, then decode so many tokens one at a time."""


@dataclass(frozen=True)
class Running:
    """A model as an engine holds it."""

    read: Read
    write: Write
    glance: Callable[[Sequence[int]], object] | None = None
    """Reads tokens at once as it does to go on with them, where :attr:`read` asks for each prefix by itself."""


Load = Callable[..., Any]
"""A context manager over a :class:`Running`: of a file or folder, and of the files beside it that belong to it."""


@dataclass(frozen=True)
class Engine:
    """A program that runs models, and how what it is given is exported."""

    name: str
    """What it is called in tables."""

    packages: tuple[str, ...]
    """The packages that it is made of; their versions are stored."""

    load: Load
    """Loads what was exported."""

    computes: str
    """What it computes in, in words."""

    options: Mapping[str, str] = field(default_factory=dict)
    """Settings of the export."""

    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if installed(name) is None]

    def versions(self) -> str:
        """Its packages with their versions, in words."""
        return ", ".join(f"{name} {installed(name)}" for name in self.packages)


def installed(package: str) -> str | None:
    """The version of an installed package; None if it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def of_torch(model: Any) -> Running:
    """A model of transformers, whatever its layers are."""
    from transformers import DynamicCache

    device = next(model.parameters()).device

    @torch.no_grad()
    def read(ids: Sequence[int]) -> Tensor:
        logits: Tensor = model(input_ids=torch.tensor([list(ids)], device=device)).logits[0].float()
        return logits

    @torch.no_grad()
    def write(prompt: Sequence[int], count: int) -> None:
        cache, given = DynamicCache(config=model.config), list(prompt)
        for _ in range(count + 1):
            logits = model(input_ids=torch.tensor([given], device=device), past_key_values=cache).logits
            given = [int(logits[0, -1].argmax())]

    return Running(read, write)


def _transformers(**settings: Any) -> Load:
    @contextmanager
    def load(path: Path, *_: Path) -> Iterator[Running]:
        from transformers import AutoModelForCausalLM

        yield of_torch(AutoModelForCausalLM.from_pretrained(path, **settings).eval())

    return load


@contextmanager
def _llama_cpp(path: Path, *besides: Path) -> Iterator[Running]:
    """Log-probabilities stand for logits, which its server does not give."""
    from quadapt.exporters.llama_cpp import LlamaCpp

    with LlamaCpp(path, lora=besides[0] if besides else None) as engine:

        def read(ids: Sequence[int]) -> Tensor:
            rows = engine.token_logprobs(ids, top=1 << 17)
            found = torch.full((len(rows), max(map(max, rows)) + 1), -torch.inf)
            for at, row in enumerate(rows):
                found[at, list(row)] = torch.tensor(list(row.values()))
            return found

        def write(prompt: Sequence[int], count: int) -> None:
            found = engine.complete(prompt, count + 1)
            if len(found) != count + 1:
                raise RuntimeError(f"llama.cpp wrote {len(found)} tokens, and {count + 1} were asked for")

        yield Running(read, write, lambda ids: engine.complete(ids, 1))


@contextmanager
def _gptqmodel(path: Path, *_: Path) -> Iterator[Running]:
    from gptqmodel import BACKEND, GPTQModel

    yield of_torch(GPTQModel.load(str(path), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16).model.eval())


@contextmanager
def _hqq(path: Path, *_: Path) -> Iterator[Running]:
    from hqq.models.hf.base import AutoHQQHFModel

    model = AutoHQQHFModel.from_quantized(str(path), compute_dtype=torch.float32, device="cpu")
    yield of_torch(model.eval())


@contextmanager
def _mlx(path: Path, *_: Path) -> Iterator[Running]:
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(path)

    def read(ids: Sequence[int]) -> Tensor:
        return torch.from_numpy(np.array(model(mx.array([list(ids)]))[0].astype(mx.float32)))

    def write(prompt: Sequence[int], count: int) -> None:
        cache, given = make_prompt_cache(model), list(prompt)
        for _ in range(count + 1):
            given = [int(mx.argmax(model(mx.array([given]), cache=cache)[0, -1]).item())]

    yield Running(read, write)


Session = Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]
"""Runs a graph: its outputs by name, of its inputs by name."""


def of_graph(inputs: Mapping[str, tuple[int, int] | None], run: Session) -> Running:
    """A graph with Optimum's names of inputs and outputs.

    Args:
        inputs: Its inputs by name; of keys and values of past tokens the number of heads and their size.
        run: Runs it.
    """

    def empty() -> dict[str, np.ndarray]:
        shapes = {name: shape for name, shape in inputs.items() if shape is not None}
        return {name: np.zeros((1, shape[0], 0, shape[1]), np.float32) for name, shape in shapes.items()}

    def step(ids: Sequence[int], past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        before = next(iter(past.values())).shape[2]
        given = {
            "input_ids": np.array([list(ids)]),
            "attention_mask": np.ones((1, before + len(ids)), np.int64),
            "position_ids": before + np.arange(len(ids))[None],
            **past,
        }
        found = run({name: each for name, each in given.items() if name in inputs})
        return found["logits"][0], {name: found[name.replace("past_key_values", "present")] for name in past}

    def read(ids: Sequence[int]) -> Tensor:
        return torch.from_numpy(step(ids, empty())[0].copy()).float()

    def write(prompt: Sequence[int], count: int) -> None:
        past, given = empty(), list(prompt)
        for _ in range(count + 1):
            rows, past = step(given, past)
            given = [int(rows[-1].argmax())]

    return Running(read, write)


@contextmanager
def _onnx(path: Path, *_: Path) -> Iterator[Running]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(path / "model.onnx", options, providers=["CPUExecutionProvider"])
    inputs = {
        each.name: (each.shape[1], each.shape[3]) if "past" in each.name else None for each in session.get_inputs()
    }
    names = [each.name for each in session.get_outputs()]
    yield of_graph(inputs, lambda given: dict(zip(names, session.run(None, given), strict=True)))


@contextmanager
def _openvino(path: Path, *_: Path) -> Iterator[Running]:
    import openvino

    exact = {
        "INFERENCE_PRECISION_HINT": "f32",
        "KV_CACHE_PRECISION": "f32",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "INFERENCE_NUM_THREADS": "1",
    }
    model = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", exact)
    shapes = {each.get_any_name(): each.partial_shape for each in model.inputs}
    inputs = {
        name: (shape[1].get_length(), shape[3].get_length()) if "past" in name else None
        for name, shape in shapes.items()
    }
    yield of_graph(inputs, lambda given: {each.get_any_name(): np.array(value) for each, value in model(given).items()})


FLOAT32 = {"dtype": "float32"}
ENGINES: dict[str, Engine] = {
    "hf": Engine("transformers", ("transformers",), _transformers(dtype=torch.float32), "float32", FLOAT32),
    "gguf": Engine("llama.cpp", ("xllamacpp",), _llama_cpp, "inputs of quantized layers in 8 bits"),
    "gptq": Engine("GPTQModel", ("gptqmodel",), _gptqmodel, "float16"),
    "awq": Engine("GPTQModel", ("gptqmodel",), _gptqmodel, "float16"),
    "compressed-tensors": Engine(
        "transformers with compressed-tensors",
        ("compressed-tensors",),
        _transformers(dtype=torch.float32),
        "float32",
        FLOAT32,
    ),
    "bitsandbytes": Engine(
        "transformers with bitsandbytes",
        ("bitsandbytes",),
        _transformers(dtype="auto", device_map="cpu"),
        "bfloat16",
        FLOAT32,
    ),
    "mlx": Engine("mlx-lm", ("mlx-lm", "mlx"), _mlx, "float32", FLOAT32),
    "torchao": Engine("transformers with torchao", ("torchao",), _transformers(dtype="auto"), "float32", FLOAT32),
    "hqq": Engine("hqq", ("hqq",), _hqq, "float32", FLOAT32),
    "onnx": Engine("ONNX Runtime", ("onnxruntime",), _onnx, "float32"),
    "openvino": Engine("OpenVINO", ("openvino",), _openvino, "float32"),
}
"""What runs each format of whole models, by the name of the format."""
