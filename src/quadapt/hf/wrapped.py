"""Take off what trainers put around a model: autocast around its forward, torch.compile, data parallelism."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from quadapt.errors import MergeError


@contextmanager
def unwrapped(model: Any) -> Iterator[Any]:
    """The model itself, computing in its own dtype, as it does once it is saved and loaded.

    accelerate leaves autocast on the `forward` of what it has trained; logits would be compared in another dtype than
    the merged model has. Where the block raises, all wrapping is as it was.

    Raises:
        MergeError: Its parameters are spread over processes.
    """
    from accelerate.utils import extract_model_from_parallel

    inside = extract_model_from_parallel(model, keep_torch_compile=False)
    _refuse_shards(inside)
    before = {name: inside.__dict__[name] for name in ("forward", "_original_forward") if name in inside.__dict__}
    try:
        inside = extract_model_from_parallel(inside, keep_fp32_wrapper=False)
        if getattr(inside.__dict__.get("forward"), "__func__", None) is type(inside).forward:
            del inside.forward  # the class's own again: no reference of the model to itself
        yield inside
    except BaseException:
        inside.__dict__.update(before)
        raise


def _refuse_shards(model: nn.Module) -> None:
    """Raise MergeError if some parameter is not whole in this process."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    flat = any(isinstance(module, FullyShardedDataParallel) for module in model.modules())
    for name, parameter in model.named_parameters():
        if flat or isinstance(parameter, DTensor) or hasattr(parameter, "ds_id"):
            raise MergeError(
                f"{name}: is spread over processes (FSDP, tensor parallelism or ZeRO-3), not a whole tensor here. "
                "Save the adapter with the trainer (trainer.save_model(FOLDER), in every process), then "
                "merge it in one: quadapt merge FOLDER, or load it with PeftModel.from_pretrained and merge that"
            )
