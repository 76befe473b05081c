"""A model's own forward that stops at each of its blocks, and goes on when it is told what the block gives.

So whatever stands between blocks is done as the model does it: embeddings, norms, masks, the step from an encoder to a
decoder, pictures that are added to hidden states. Python cannot leave a function in its middle and come back to it, but
a thread can wait there: each forward has one of its own. Only one runs at any time.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_HERE = threading.local()


class _Ended(BaseException):
    """Is raised where a forward waits that nobody needs any more: no handler of exceptions in a model takes it."""


class Held:
    """A forward that stops at each block. It has run to the first one when it is made.

    Args:
        forward: The forward of a model whose blocks stop (:func:`stopping`), ready to be called.
        grad: Whether what lies outside of blocks is computed with gradients.
        real: Which tokens of its batch are no padding, bool `[sequences, length]`; None if all are.
    """

    def __init__(self, forward: Callable[[], Any], *, grad: bool = False, real: Tensor | None = None) -> None:
        self.block: str | None = None
        """The name of the block that it waits for; None when it has come to its end."""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        """What the model calls the block with."""
        self.result: Any = None
        """What the forward gave in the end."""
        self.real = real
        self._given: Any = None
        self._error: BaseException | None = None
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._ended = self._running = False
        threading.Thread(target=self._run, args=(forward, grad), daemon=True).start()
        self.go_on(None)

    def go_on(self, output: Any) -> None:
        """Let the forward take `output` for what the block gives, and run to the next block or to its end.

        Raises:
            Exception: Whatever the model raises on the way.
        """
        self._given, self.args, self.kwargs = output, (), {}
        self._running = True
        self._turn.release()
        self._back.acquire()
        self._running = False
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def end(self) -> None:
        """Leave the forward where it is, for good."""
        self._ended = True
        if self._running:  # whoever waited was interrupted: it ends at the next block
            self._turn.release()
        elif self.block is not None:
            self.go_on(None)

    def stop(self, block: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Is called by a block in the forward's own thread; returns what it gives."""
        self.block, self.args, self.kwargs = block, args, kwargs
        self._back.release()
        self._turn.acquire()
        if self._ended:
            raise _Ended
        given, self._given = self._given, None
        return given

    def _run(self, forward: Callable[[], Any], grad: bool) -> None:
        self._turn.acquire()
        _HERE.held = self
        try:
            with torch.set_grad_enabled(grad):
                self.result = forward()
        except _Ended:
            pass
        except BaseException as error:  # raised again in the thread that waits
            self._error = error
        finally:
            self.block, self._given = None, None
            del forward
            self._back.release()


def stopping(blocks: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Make blocks stop in forwards that are :class:`Held`; everywhere else they run as ever.

    Returns:
        A function that makes them what they were.
    """
    own = {name: block.__dict__.get("forward") for name, block in blocks.items()}  # some libraries put one there
    ours = {name: _stops(name, block.forward) for name, block in blocks.items()}
    for name, block in blocks.items():
        block.forward = ours[name]

    def undo() -> None:
        for name, block in blocks.items():
            if block.__dict__.get("forward") is ours[name]:  # and not that of a walk that began later
                del block.forward
                if (before := own[name]) is not None:
                    block.forward = before

    return undo


def _stops(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(forward)
    def stops(*args: Any, **kwargs: Any) -> Any:
        held: Held | None = getattr(_HERE, "held", None)
        return forward(*args, **kwargs) if held is None else held.stop(name, args, kwargs)

    return stops
