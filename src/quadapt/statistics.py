"""Statistics of the full-precision model that starts read: gathered once, kept on disk, read layer by layer.

`dense_second_moment` is the mean of `x x^T` over a layer's inputs (QuAILoRA, CLoQ); GPTQ's second moments are of the
model whose earlier layers are quantized already, and are gathered while quantizing (`model/quantize.py`). `fisher` is
the diagonal of the empirical Fisher information, the sum over sequences of the squared gradient (LQ-LoRA).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from quadapt.calibrate import BackwardWalk, Batch, BlockWalk, Watch, call_of, parted
from quadapt.errors import CalibrationError
from quadapt.files import sweep, writing
from quadapt.model.select import find_blocks
from quadapt.nn.resident import indexed

Progress = Callable[[Sequence[str]], Iterable[str]]
"""Wraps the names of the units to work on, like `tqdm`."""

MOMENT, FISHER = "dense_second_moment", "fisher"

_SECONDS_AT_RISK = 60.0
"""An interrupted Fisher run loses at most about this much work."""

_TOGETHER = 8
"""Sequences for which each block is brought to a GPU once on the way forward, and once on the way back."""


class StatisticsFiles(Mapping[str, "dict[str, Tensor]"]):
    """Statistics by layer, in files of a folder: one for each block and statistic.

    Symmetric matrices are kept as their upper triangle, in float32. What is read is mapped, not held.

    Args:
        folder: Made if it does not exist. A damaged file counts as missing.
        wanted: What to read of a layer, by name.
    """

    def __init__(self, folder: Path, wanted: Iterable[str] = (MOMENT, FISHER)) -> None:
        self.folder, self.wanted = folder, tuple(wanted)
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        self._layers: dict[str, dict[str, tuple[Path, str]]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            if not path.name.startswith("partial"):
                self._note(path)

    def _note(self, path: Path) -> None:
        statistic = path.name.partition("@")[0]
        try:
            with safe_open(path, framework="pt") as file:
                layers = json.loads(file.metadata()["layers"])
        except (OSError, SafetensorError, TypeError, KeyError, ValueError):
            return
        for layer, tensor in layers.items():
            self._layers.setdefault(layer, {})[statistic] = (path, tensor)

    def __getitem__(self, layer: str) -> dict[str, Tensor]:
        """Statistics of a layer by name, those that there are."""
        found = {}
        for statistic, (path, name) in self._layers[layer].items():
            if statistic in self.wanted:
                with safe_open(path, framework="pt") as file:
                    tensor = file.get_tensor(name)
                if tensor.numel():  # nothing is known of experts to which hardly a token was sent
                    found[statistic] = _square(tensor) if statistic == MOMENT else tensor
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._layers)

    def __len__(self) -> int:
        return len(self._layers)

    def missing(self, statistic: str, layers: Iterable[str]) -> list[str]:
        """Layers of which a statistic is not there."""
        return [layer for layer in layers if statistic not in self._layers.get(layer, {})]

    def keep(self, statistic: str, unit: str, groups: Iterable[tuple[Sequence[str], Tensor | None]]) -> None:
        """Write statistics of a unit, each shared by some layers (None: there are none), and give the file its name."""
        tensors: dict[str, Tensor] = {}
        layers: dict[str, str] = {}
        for at, (names, found) in enumerate(groups):
            tensor = torch.empty(0, 0) if found is None else found
            tensors[str(at)] = _triangle(tensor) if statistic == MOMENT else tensor.float().contiguous().cpu()
            layers |= dict.fromkeys(names, str(at))
        path = self.folder / f"{statistic}@{unit}.safetensors"
        _write(path, tensors, {"layers": json.dumps(layers)})
        self._note(path)


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata=about)


def _triangle(matrix: Tensor) -> Tensor:
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix.float().cpu()[rows, columns].contiguous()


def _square(triangle: Tensor) -> Tensor:
    size = int((2 * len(triangle) + 0.25) ** 0.5)
    rows, columns = torch.triu_indices(size, size)
    matrix = triangle.new_empty(size, size)
    matrix[rows, columns] = triangle
    matrix[columns, rows] = triangle
    return matrix


def gather(
    needs: Collection[str],
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    files: StatisticsFiles,
    over: Callable[[str, Sequence[str]], Iterable[str]] = lambda _, units: units,
    device: torch.device | str | None = None,
) -> None:
    """Gather what `needs` names, as far as it is not there; `over(label, units)` shows progress."""
    if MOMENT in needs:
        gather_second_moments(model, layers, batches, files, partial(over, "second moments"), device)
    if FISHER in needs:
        gather_fisher(model, layers, batches, files, partial(over, "Fisher information"), device)


def gather_second_moments(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    files: StatisticsFiles,
    progress: Progress = iter,
    device: torch.device | str | None = None,
) -> None:
    """Second moments of the inputs of all `layers` that lie in blocks: one walk, block by block.

    Args:
        model: The dense model, in evaluation mode.
        layers: The layers whose statistics are wanted, by full name.
        batches: What the model is run on.
        files: Where they go, block by block; blocks that are there are passed without gathering.
        progress: Wraps the list of blocks.
        device: Where to compute. Default: where the model is.

    Raises:
        CalibrationError: There are no batches, or the model cannot be walked through.
    """
    blocks = find_blocks(model, layers)
    units = {block: {name: layers[name] for name in layers if name.startswith(f"{block}.")} for block in blocks}
    units = {block: inside for block, inside in units.items() if inside}
    open_ = [block for block, inside in units.items() if files.missing(MOMENT, inside)]
    if not open_:
        return
    with BlockWalk(model, {block: blocks[block] for block in units}, batches, device) as walk:
        last = max(walk.order.index(block) for block in open_)
        for block in progress(walk.order[: last + 1]):
            if block in open_:
                files.keep(MOMENT, block, walk.advance_and_gather(block, units[block]))
            else:
                walk.advance(block)


def gather_fisher(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    files: StatisticsFiles,
    progress: Progress = iter,
    device: torch.device | str | None = None,
) -> None:
    """Diagonal of the empirical Fisher information of all `layers`: sum over sequences of the squared gradient.

    Sequences are taken one at a time whatever their batch: the square of a sum is not the sum of squares. The loss is
    the mean over a sequence's tokens. One gradient of one layer lives at a time, beside a float32 sum for each layer.
    On a GPU it goes block by block wherever the model is, and a block's sums are brought there along with it.

    Args:
        model: The dense model, in evaluation mode; gradients flow, parameters do not change.
        layers: The layers whose statistics are wanted, by full name.
        batches: What the model is run on, with labels if it is more than token ids.
        files: Where the sums go. What is done is kept there about once a minute, and gone on with.
        progress: Wraps the list of sequences, by their numbers; on a GPU of every eighth.
        device: Where to compute. Default: where the model is.

    Source: LQ-LoRA (arXiv 2311.12023) §3.3 and its code: the sum, not the mean.

    Raises:
        CalibrationError: There are no batches, or a gradient is not finite.
    """
    if not files.missing(FISHER, layers):
        return
    sequences = [sequence for batch in batches for sequence in parted(batch, 1)]
    if not sequences:
        raise CalibrationError("there is no calibration data")
    unfinished = files.folder / "partial-fisher.safetensors"
    done, sums = _resumed(unfinished, layers)
    there = next(model.parameters()).device if device is None else indexed(device)
    add, together = (_whole, 1) if there.type == "cpu" else (_by_blocks, _TOGETHER)
    saved = time.monotonic()
    with _trainable(model, layers):
        for at in progress([str(at) for at in range(done, len(sequences), together)]):
            taken = sequences[int(at) : int(at) + together]
            add(model, taken, partial(_squared, layers, sums, there), there)
            if time.monotonic() - saved > _SECONDS_AT_RISK:
                _write(unfinished, sums, {"done": str(int(at) + len(taken))})
                saved = time.monotonic()
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise CalibrationError(f"{name}: gradients are not finite. Gather in float32 (--dtype float32)")
        files.keep(FISHER, name, [([name], total)])
    unfinished.unlink(missing_ok=True)


@contextmanager
def _trainable(model: nn.Module, layers: Mapping[str, nn.Linear]) -> Iterator[None]:
    """Inside, the weights of `layers` have gradients, and nothing else has."""
    wanted = {id(parameter): parameter.requires_grad for parameter in model.parameters()}
    try:
        model.requires_grad_(False)
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        yield
    finally:
        for parameter in model.parameters():
            parameter.requires_grad_(wanted[id(parameter)])


def _whole(model: nn.Module, sequences: Sequence[Batch], watch: Watch, device: torch.device) -> None:
    """Gradients of sequences one by one, through the model as a whole."""
    with watch(model), torch.enable_grad():
        for sequence in sequences:
            model(**call_of(model, sequence, device, loss=True)).loss.backward()


def _by_blocks(model: nn.Module, sequences: Sequence[Batch], watch: Watch, device: torch.device) -> None:
    """Gradients of sequences one by one, block by block on a device."""
    asked = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    wanted = {
        name: block
        for name, block in find_blocks(model, asked).items()
        if any(parameter.requires_grad for parameter in block.parameters())
    }
    with BackwardWalk(model, wanted, sequences, device) as walk:
        walk.back(watch)


@contextmanager
def _squared(
    layers: Mapping[str, nn.Linear], sums: Mapping[str, Tensor], device: torch.device, part: nn.Module
) -> Iterator[None]:
    """Inside, squared gradients of those `layers` that lie in `part` are added to `sums`, on `device`."""
    inside = set(part.modules())
    totals = {name: sums[name].to(device) for name, layer in layers.items() if layer in inside}
    handles = [layers[name].weight.register_post_accumulate_grad_hook(_adds(total)) for name, total in totals.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for name, total in totals.items():
        sums[name].copy_(total)


def _adds(total: Tensor) -> Callable[[Tensor], None]:
    def hook(weight: Tensor) -> None:
        assert weight.grad is not None
        total.add_(weight.grad.float().square())
        weight.grad = None

    return hook


def _resumed(path: Path, layers: Mapping[str, nn.Linear]) -> tuple[int, dict[str, Tensor]]:
    """Sequences done, and the sums so far."""
    zeros = {name: torch.zeros(layer.weight.shape) for name, layer in layers.items()}
    try:
        with safe_open(path, framework="pt") as file:
            if set(file.keys()) != set(layers):
                return 0, zeros
            return int(file.metadata()["done"]), {name: file.get_tensor(name) for name in layers}
    except (OSError, SafetensorError, TypeError, KeyError, ValueError):
        return 0, zeros
