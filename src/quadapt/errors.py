"""Every error that quadapt raises on purpose.

::

    QuadaptError
    ├── ConfigError (ValueError)        a setting is wrong, or two contradict each other
    ├── ShapeError (ValueError)         a tensor does not fit its format
    ├── DataError (ValueError)          training, calibration or evaluation data cannot be used
    ├── CheckpointError (ValueError)    a file or folder is missing, damaged, foreign, or of another model
    ├── CalibrationError (ValueError)   statistics are missing or unusable
    ├── MergeError (ValueError)         this adapter cannot merge exactly into this base
    ├── ExportError (ValueError)        the target format cannot hold this weight
    ├── ResourceError (RuntimeError)    the machine lacks disk space or memory
    └── MissingDependency (ImportError) names the package to install

A message says where, what, what is allowed, and what to do. Code that does not know the name of the layer it works on
raises without it; the walk over the model adds it with :func:`locate`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType


class QuadaptError(Exception):
    """The base of all errors that quadapt raises on purpose; the command line prints its text without a traceback."""

    exit_code = 2
    """The exit code of the command line, which is 2 for input that the user can mend."""


class ConfigError(QuadaptError, ValueError):
    """A setting is wrong, or two settings contradict each other."""


class ShapeError(QuadaptError, ValueError):
    """A tensor does not fit its format."""


class DataError(QuadaptError, ValueError):
    """Training, calibration or evaluation data cannot be used."""


class CheckpointError(QuadaptError, ValueError):
    """A file or folder is missing, damaged, foreign, or belongs to another model."""


class CalibrationError(QuadaptError, ValueError):
    """Calibration statistics are missing or unusable."""


class MergeError(QuadaptError, ValueError):
    """This adapter cannot merge exactly into this base."""


class ExportError(QuadaptError, ValueError):
    """The target format cannot hold this weight or this model."""


class ResourceError(QuadaptError, RuntimeError):
    """The machine lacks disk space or memory for what was asked."""


class MissingDependency(QuadaptError, ImportError):  # noqa: N818 - the field's usual name
    """An optional package is not installed."""


@contextmanager
def locate(where: str) -> Iterator[None]:
    """Put `where` (a layer's or a file's name) in front of the message of any quadapt error raised inside."""
    try:
        yield
    except QuadaptError as error:
        if str(error).startswith(f"{where}: "):  # said further in
            raise
        raise type(error)(f"{where}: {error}") from error


def require(package: str, extra: str) -> ModuleType:
    """Import an optional package and return the module.

    Raises:
        MissingDependency: It is not installed; the message has the line that installs it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise MissingDependency(f"{package} is not installed. Run: pip install 'quadapt[{extra}]'") from error
