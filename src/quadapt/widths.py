"""Which widths a code may have.

This is the one place that lists them: settings, formats and kernels read them here. A kernel that is asked for another
width would not fail by itself, it would compute wrong numbers; so every kernel calls :func:`check_width` first.
Nothing here needs torch, so that the command line can read it without that import.
"""

from __future__ import annotations

from typing import Literal, get_args

from quadapt.errors import ConfigError

Width = Literal[2, 3, 4, 5, 6, 8]
"""The widths in bits that a code of integers may have."""

NormalFloatWidth = Literal[2, 3, 4, 8]
"""The widths in bits that a code of NormalFloat, or of any other table of levels, may have."""

INTEGER_WIDTHS: tuple[int, ...] = get_args(Width)
NORMAL_FLOAT_WIDTHS: tuple[int, ...] = get_args(NormalFloatWidth)


def check_width(levels: str, bits: int) -> None:
    """Refuse codes of a width that no kernel computes.

    Args:
        levels: `int` for integers; `table`, or the name of such levels, for those that are looked up in a table.
        bits: Width of a code.

    Raises:
        ConfigError: `bits` is not a whole number, or there are no codes of so many bits with these levels.
    """
    allowed = INTEGER_WIDTHS if levels == "int" else NORMAL_FLOAT_WIDTHS
    if isinstance(bits, int) and not isinstance(bits, bool) and bits in allowed:
        return
    advice = f"Use {listed(allowed)}"
    if levels != "int":
        advice += f", or integers (levels='int'), which may have {listed(INTEGER_WIDTHS)}"
    raise ConfigError(f"bits={bits!r} is not supported for levels={levels!r}. {advice}")


def listed(widths: tuple[object, ...]) -> str:
    """Widths, or names, as a sentence lists them: `2, 3, 4 or 8`."""
    return f"{', '.join(map(str, widths[:-1]))} or {widths[-1]}"
