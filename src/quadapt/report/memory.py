"""How much memory a job will take, before anything is loaded.

The training step is run on fake tensors, which have shapes and no content, and the bytes that are alive are counted as
tensors come and go. So the estimate knows the model's own code, whatever its architecture, and not a formula for some
of them.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from quadapt.calibrate import MOMENTS_AT_ONCE, call_of, named
from quadapt.hf.kinds import kind_of_model
from quadapt.model.inputs import random_inputs
from quadapt.model.select import find_blocks
from quadapt.model.trial import answer_of
from quadapt.nn.experts import Experts
from quadapt.quant.weight import Layout


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of a job by what it is for, in bytes."""

    libraries: int
    """What this process holds already: Python, torch, transformers and the rest, once imported."""

    weights: int
    """The model: packed weights, scales, offsets and what is not quantized."""

    adapters: int
    """The adapters with their gradients and their optimizer state."""

    step: int
    """The activations, gradients and temporaries at the fullest moment of a step."""

    teacher: int = 0
    """What is learnt from, where an objective has a teacher: beyond the rest, at the fullest moment."""

    @property
    def total(self) -> int:
        """The peak memory in bytes, all parts together."""
        return self.libraries + self.weights + self.adapters + self.step + self.teacher

    def as_dict(self) -> dict[str, int]:
        """The parts and the total in bytes, by name, as they are written to JSON."""
        return {**asdict(self), "total": self.total}


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the fake tensors made inside it that are alive, and the most there were at once.

    Args:
        besides: Tensors from before, views of which are no new memory.
    """

    def __init__(self, besides: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in besides}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, FakeTensor):
                self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        size = storage.nbytes()
        self._known.add(storage._cdata)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, storage._cdata, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def step_bytes(model: nn.Module, batch: int, length: int, *, trains: bool = True) -> int:
    """Most bytes alive at once, beyond the parameters, in a pass over token ids `[batch, length]`.

    Args:
        model: On the meta device, with its adapters if it has any; it is used up.
        batch: Sequences.
        length: Tokens in each.
        trains: Forward and backward; otherwise forward alone, without gradients and without the head.
    """
    model.train(trains)
    inside: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    shapes = _shapes(inside, batch, length)
    with FakeTensorMode():
        _fake(model)
        with _LiveBytes([*model.parameters(), *model.buffers()]) as live, torch.set_grad_enabled(trains):
            blank = {name: torch.zeros(shape, dtype=dtype) for name, (shape, dtype) in shapes.items()}
            inputs = call_of(inside, blank)
            if not trains:
                getattr(model, "base_model", model)(**inputs)
            elif "decoder_input_ids" in inputs or not _writes(model):
                _answer(model, inputs).float().log_softmax(-1).mean().backward()
            else:
                model(**inputs, labels=inputs["input_ids"]).loss.backward()
    return live.peak


def _shapes(model: Any, batch: int, length: int) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shapes and dtypes of what a model reads: token ids `[batch, length]`, pictures of the size that it takes, .."""
    inputs = named(next(random_inputs(model, batch, length)))
    return {name: (each.shape, each.dtype) for name, each in inputs.items()}


def _answer(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What a model answers; of one whose head looks for something in its inputs, which are empty, its last states."""
    try:
        return answer_of(model(**inputs))
    except DynamicOutputShapeException:
        inside = model.get_base_model() if hasattr(model, "get_base_model") else model
        return answer_of(inside.base_model(**inputs))


def _writes(model: Any) -> bool:
    """Whether a model goes on with a text, so that token ids are its labels."""
    kind = kind_of_model(model)
    return kind is None or kind.writes


def _fake(model: nn.Module) -> None:
    """Turn a model's meta tensors into fake ones on the CPU: models ask for some values, which meta tensors refuse."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=parameter.dtype)
                module._parameters[name] = nn.Parameter(fake, requires_grad=parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


_CPU_SLACK = 1.25
"""Memory that the C allocator holds over what is alive, measured on training steps of 10 M to 100 M parameters (1.2 to
1.3)."""

_FIRST_USE = 100_000_000
"""Code and tables that the first step loads: oneDNN's and numba's kernels."""


def taken_by_step(step: int, device: str) -> int:
    """Bytes that a step of `step` live bytes takes from the system; a GPU's allocator reports live bytes themselves."""
    return step if device.startswith("cuda") else int(step * _CPU_SLACK)


def library_bytes(device: str) -> int:
    """What the process holds before a model is loaded; nothing of it is on a GPU."""
    if device.startswith("cuda"):
        return 0
    import peft  # noqa: F401 - what training will import
    import transformers.trainer  # noqa: F401

    return resident_bytes() + _FIRST_USE


def quantizing_bytes(largest: int, columns: int, *, calibrated: bool) -> int:
    """Temporaries of quantizing one matrix of `largest` weights.

    Nearest works in chunks of rows; GPTQ on a float32 copy, with codes, and with second moments in float64 and float32.
    """
    chunk = 4 * 1024 * 1024 * 4 * 3
    return largest * 8 + columns * columns * 28 if calibrated else min(largest * 12, chunk) + largest * 4


def routed_moment_bytes(model: nn.Module) -> int:
    """Second moments of the experts of one layer, as many as are gathered at once."""
    found = [0]
    for module in model.modules():
        if isinstance(module, Experts):
            layers: list[Any] = [getattr(module[0], parts[0]) for parts in module.stages()]
            found += [
                max(min(module.count * one, MOMENTS_AT_ONCE), one)
                for one in (8 * layer.in_features**2 for layer in layers)
            ]
    return max(found)


def block_training_bytes(model: nn.Module, layouts: Mapping[str, Layout]) -> int:
    """Training the weights of the largest block: each in float32, with its gradient and AdamW's two moments."""
    sizes = dict.fromkeys(find_blocks(model), 0)
    for name, layout in layouts.items():
        for block in sizes:
            sizes[block] += layout.out * layout.columns * name.startswith(f"{block}.")
    return 16 * max(sizes.values(), default=0)


def largest_part(model: nn.Module) -> int:
    """Bytes of the largest block, or of what lies outside the blocks (but for the head), if that is more."""
    blocks = [parameter_bytes(block) for block in find_blocks(model).values()]
    return max(*blocks, 0, parameter_bytes(getattr(model, "base_model", model)) - sum(blocks))


def hidden_bytes(model: nn.Module) -> int:
    """Bytes of one token's hidden state between blocks."""
    about: Any = model.config
    return int(about.get_text_config().hidden_size) * next(model.parameters()).itemsize


def machine_bytes(device: str) -> tuple[int, int]:
    """Memory in all and memory that is free, in bytes, of this machine or of a GPU."""
    if device.startswith("cuda"):
        free, total = torch.get_device_module(device).mem_get_info(device)
        return total, free
    memory, swap = psutil.virtual_memory(), psutil.swap_memory()
    return memory.total + swap.total, memory.available + swap.free


def parameter_bytes(model: nn.Module, wanted: Callable[[nn.Parameter], bool] = lambda _: True) -> int:
    """Bytes of a model's parameters, tied ones once."""
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters() if wanted(parameter))


def resident_bytes() -> int:
    """Bytes of this process in memory now."""
    return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """Most bytes of this process in memory since it started, or since `measured_peak` was entered."""
    with suppress(OSError):  # Linux: psutil has no peak there, and getrusage has none that can be reset
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)
    if peak is not None:  # Windows
        return int(peak)
    import resource  # macOS, which counts in bytes

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextmanager
def measured_peak(device: str = "cpu") -> Iterator[Callable[[], int]]:
    """Measure peak memory inside: of the process, or on a GPU of torch's allocator. Yields a function that reads it."""
    if device.startswith("cuda"):
        accelerator = torch.get_device_module(device)
        accelerator.reset_peak_memory_stats()
        yield accelerator.max_memory_allocated
        return
    with suppress(OSError):  # Linux forgets the peak so far; elsewhere it counts from the start
        Path("/proc/self/clear_refs").write_text("5")
    yield peak_resident_bytes
