"""A full disk, too little memory, too many threads: each library says so in its own way, and none says what to do."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

from quadapt.errors import ResourceError

_SPACE = "Free some space, or use --output on another disk. The same command goes on where it stopped"
_SIZE = "Raise the limit (ulimit -f unlimited), or use --output on another file system"
_MEMORY = (
    "Use a smaller --batch-size or --seq-len, --gradient-checkpointing, or fewer --bits; --dry-run estimates what is "
    "needed. If memory is limited (ulimit -v, a container), raise the limit"
)
_THREADS = "Raise the limit (ulimit -u, a container), or use fewer threads: OMP_NUM_THREADS=1"
_FILES = "Raise the limit: ulimit -n 4096"

_BY_NUMBER = {
    errno.ENOSPC: ("no space left on the disk", _SPACE),
    errno.EDQUOT: ("the disk quota is used up", _SPACE),
    errno.EFBIG: ("a file would be larger than is allowed here", _SIZE),
    errno.ENOMEM: ("out of memory", _MEMORY),
    errno.EMFILE: ("too many files are open at once", _FILES),
    errno.ENFILE: ("too many files are open at once", _FILES),
}
_BY_WORDS = (
    (r"no space left|os error 28\b", _BY_NUMBER[errno.ENOSPC]),
    (r"quota exceeded|os error 122\b", _BY_NUMBER[errno.EDQUOT]),
    (r"file too large|os error 27\b", _BY_NUMBER[errno.EFBIG]),
    # torch's archives and NumPy: what was written is less than what was asked for; the reason is lost on the way.
    (
        r"PytorchStreamWriter|inline_container.*unexpected pos|\d requested and \d+ written",
        ("a file could not be written in full", _SPACE),
    ),
    (r"start new thread|pthread_create|thread creation|create thread", ("no more threads can be started", _THREADS)),
    (r"too many open files|os error 24\b", _BY_NUMBER[errno.EMFILE]),
    (
        r"out of memory|can.?t allocate|cannot allocate|not enough memory|bad_alloc|memory allocation|os error 12\b"
        r"|unable to (allocate|mmap)|failed to map segment|(failed|unable) to allocate",
        _BY_NUMBER[errno.ENOMEM],
    ),
)
"""Patterns of messages that mean a limit of the machine, each with what to say. They are those of torch, safetensors
and tokenizers (Rust), LLVM, the dynamic loader and C++, whose errors arrive as a RuntimeError or the like, without a
number."""

_TALK_SO = (OSError, RuntimeError, ImportError, SystemError)
"""Errors whose words are looked at; a ValueError may quote text of the user's."""


def limit_of(error: BaseException) -> ResourceError | None:
    """What a limit of the machine made fail, with advice; None if it was something else.

    Args:
        error: From any library; what caused it is looked at too.
    """
    for each in _chain(error):
        found = _limit(each)
        if found is not None:
            what, advice = found
            where = getattr(each, "filename", None)
            return ResourceError(f"{f'{where}: ' if isinstance(where, str) else ''}{what}. {advice}")
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error, and what caused it."""
    seen: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in seen:
        seen.append(each)
        yield each
        each = each.__cause__ or (None if each.__suppress_context__ else each.__context__)


def _limit(error: BaseException) -> tuple[str, str] | None:
    if isinstance(error, MemoryError):
        return _BY_NUMBER[errno.ENOMEM]
    if isinstance(error, OSError) and error.errno is not None:
        return _BY_NUMBER.get(error.errno)
    if isinstance(error, _TALK_SO) or type(error).__name__ in ("SafetensorError", "PanicException", "LoweringError"):
        text = str(error)
        return next((found for words, found in _BY_WORDS if re.search(words, text, re.IGNORECASE | re.DOTALL)), None)
    return None
