"""Steps of whole models on a device, compared with the same steps on the CPU's kernels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.models import adapted, llama, triton_on
from quadapt.hf.merge import merge
from quadapt.methods import METHODS, method_named
from quadapt.quant.format import Format
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout

CPU = torch.device("cpu")
LIMIT = 1e-4
"""Of relative differences in float32: products are summed in another order, and gradients pass through a few of them.
"""


class DifferenceError(AssertionError):
    """A result on the device is not that of the CPU."""


def ids_on(device: torch.device, tokens: int = 24) -> Tensor:
    """Two sequences."""
    return torch.arange(2, 2 + 2 * tokens, device=device).view(2, tokens)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Loss and gradients of all that trains, as float32 on the CPU."""
    ids = ids_on(next(model.parameters()).device)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    found = {name: each.grad.float().cpu() for name, each in model.named_parameters() if each.grad is not None}
    model.zero_grad()
    return {"loss": loss.detach().float().cpu(), **found}


def compare(mine: dict[str, Tensor], want: dict[str, Tensor], limit: float = LIMIT) -> float:
    """The largest relative difference.

    Raises:
        DifferenceError: It is above `limit`, or something is missing.
    """
    if mine.keys() != want.keys():
        raise DifferenceError(f"gradients of {sorted(mine.keys() ^ want.keys())[:3]} are on one side only")
    worst = 0.0
    for name, tensor in want.items():
        gap = float((mine[name] - tensor).norm() / tensor.norm().clamp(min=1e-12))
        if not gap <= limit:
            raise DifferenceError(f"{name} differs by {gap:.1e}, limit {limit:.0e}")
        worst = max(worst, gap)
    return worst


def moved(model: nn.Module) -> nn.Module:
    """The model after a step in any direction: adapters that start at zero hide errors."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def step(method: str, device: torch.device) -> float:
    """A step of a method: loss and gradients, as on the CPU."""
    model = moved(adapted(llama(CPU), method, rank=4)).train()
    want = gradients(model)
    with triton_on(device):
        return compare(gradients(copy.deepcopy(model).to(device)), want)


def decoding(method: str, device: torch.device) -> float:
    """One token, which takes the product of few tokens: logits as on the CPU."""
    model = moved(adapted(llama(CPU), method, rank=4)).eval()
    token = torch.tensor([[5]])
    want = {"logits": _logits(model, token)}
    with triton_on(device):
        return compare({"logits": _logits(copy.deepcopy(model).to(device), token.to(device))}, want)


def merged(method: str, device: torch.device) -> float:
    """One token of the trained model on a device, and of the model that the CPU merged: the same bits."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = moved(adapted(llama(CPU, **sizes), method, rank=4)).eval()
    token = torch.tensor([[5]], device=device)
    trained, (whole, _) = copy.deepcopy(model).to(device), merge(model)
    with triton_on(device):
        found = [{"logits": _logits(each, token)} for each in (trained, whole.to(device))]
    return compare(*found, limit=0.0)


def rounding(levels: str, device: torch.device) -> float:
    """Rounding to nearest gives the same bytes."""
    format = Format(levels=levels, group_size=32, zero="float" if levels == "int" else "none")  # type: ignore[arg-type]
    layout = Layout(format=format, storage=Storage.default(format), out=24, columns=80)
    weight = torch.randn(24, 80, generator=torch.Generator().manual_seed(2))
    want = Nearest()(weight, layout).digest()
    with triton_on(device):
        if Nearest()(weight.to(device), layout).digest() != want:
            raise DifferenceError("the bytes are not those of the CPU")
    return 0.0


def compiled(method: str, device: torch.device, backend: str = "inductor") -> float:
    """`torch.compile` traces a step and a token as one graph each, and computes the same."""
    model = moved(adapted(llama(CPU), method, rank=4)).to(device)
    token = ids_on(device)[:1, :1]
    with triton_on(device):
        want = {**gradients(model.train()), "logits": _logits(model, token)}
        torch._dynamo.reset()
        model.compile(fullgraph=True, backend=backend)
        return compare({**gradients(model.train()), "logits": _logits(model, token)}, want)


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Without gradients, on the CPU."""
    return model.eval()(input_ids=ids, use_cache=False).logits.cpu()


def checkpointed(method: str, device: torch.device) -> float:
    """A bfloat16 model with gradient checkpointing: the same gradients as without it, on the CPU bit for bit."""
    model = moved(adapted(llama(CPU, torch.bfloat16, num_hidden_layers=2), method, rank=4)).to(device)
    with triton_on(device):
        plain = gradients(model.eval())
        model.train()
        model.enable_input_require_grads()  # type: ignore[operator]
        model.gradient_checkpointing_enable(  # type: ignore[operator]
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        # A card's library need not sum a product in the same order twice.
        return compare(gradients(model), plain, limit=0.0 if device.type == "cpu" else 1e-6)


def generated(method: str, device: torch.device) -> float:
    """Greedy decoding over a static cache, which transformers compiles on a card: the CPU's tokens."""
    model: Any = moved(adapted(llama(CPU), method, rank=4)).eval()
    ids = ids_on(CPU, tokens=4)[:1]
    settings = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(input_ids=ids, **settings)
    with triton_on(device):
        there = copy.deepcopy(model).to(device)
        found = there.generate(input_ids=ids.to(device), cache_implementation="static", **settings)
    if not torch.equal(found.cpu(), want):
        raise DifferenceError(f"tokens are {found.tolist()}, on the CPU {want.tolist()}")
    return 0.0


def graphed(method: str, device: torch.device) -> float:
    """A CUDA graph of a token's forward pass replays to the same logits, for another token too."""
    model = moved(adapted(llama(CPU), method, rank=4)).to(device).eval()
    token = torch.tensor([[5]], device=device)
    with torch.no_grad():
        replay, result = graph(lambda: model(input_ids=token, use_cache=False).logits)
        token.fill_(7)
        replay()
        mine = result.clone()
        want = model(input_ids=token, use_cache=False).logits
    return compare({"logits": mine.cpu()}, {"logits": want.cpu()})


def graph(work: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Record what `work` launches: how to launch it again, and the tensor that its result is written to."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # kernels are compiled and libraries set up before the recording
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(side)
    recording = torch.cuda.CUDAGraph()
    with torch.cuda.graph(recording):
        result = work()
    return recording.replay, result


CHECKS: dict[str, Callable[[str, torch.device], float]] = {
    "step": step,
    "decoding": decoding,
    "merged": merged,
    "rounding": rounding,
    "compiled": compiled,
    "checkpointed": checkpointed,
    "generated": generated,
    "graphed": graphed,
}
ON_CARD_ALONE = ("compiled", "graphed")


def compiles() -> bool:
    """Whether this torch traces a step as it should: what is older than the package declares need not."""
    return tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


def named(device: torch.device) -> list[tuple[str, str]]:
    """Checks to run on a device, and on what."""
    found = [("step", name) for name in METHODS] + [("rounding", levels) for levels in ("int", "nf")]
    for check in ("decoding", "checkpointed"):
        found += [(check, name) for name in ("qlora", "qa-lora", "l4q", "lr-qat")]
    found += [("merged", name) for name in METHODS if method_named(name).adapter.exactness == "exact"]
    found += [("generated", name) for name in ("qlora", "l4q")]
    alone = [check for check in ON_CARD_ALONE if check != "compiled" or compiles()] if device.type == "cuda" else []
    return found + [(check, name) for check in alone for name in ("qlora", "qa-lora", "l4q")]
