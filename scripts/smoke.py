"""A package that was just installed does its work: tune the model that comes with it, merge, verify, export.

    python scripts/smoke.py        # in an environment that holds the wheel and what it declares, and nothing else

Nothing is downloaded, and nothing stays: everything happens in a temporary folder.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

SOURCES = Path(__file__).resolve().parents[1] / "src"
TUNE = ("--bits", "3", "--max-steps", "4", "--seq-len", "32", "--batch-size", "2", "--rank", "2", "--lr", "0.01")


def main() -> None:
    """Run every step; the first that fails ends the script with its exit code."""
    import quadapt

    if SOURCES in Path(quadapt.__file__).parents:
        sys.exit(f"quadapt comes from {SOURCES}, not from a package that was installed: unset PYTHONPATH")
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("data.txt").write_text(
            "The fox saw the sea. The owl said: swim, fox, swim! And she swam for 47 days.\n" * 40
        )
        model = str(files("quadapt") / "demo" / "model")
        for command in (
            ("--version",),
            ("tune", model, "--data", "data.txt", *TUNE, "--output", "adapter"),
            ("merge", "adapter", "--output", "merged"),
            ("inspect", "merged", "--verify"),
            ("eval", "merged", "--data", "data.txt"),
            ("export", "merged", "--format", "gguf", "--output", "model.gguf"),
        ):
            print("quadapt", *command, flush=True)
            ended = subprocess.run((sys.executable, "-m", "quadapt", *command), check=False)
            if ended.returncode:
                sys.exit(ended.returncode)
        quadapt.load("merged")
    print("all is well")


if __name__ == "__main__":
    main()
