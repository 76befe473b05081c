"""Every architecture of transformers, one after the other; what came of each goes to `benchmarks/results`.

python -m tests.architectures [MODEL_TYPE ..]
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "architectures.json"

LONGEST = 60
"""Seconds that one architecture may take."""


def _too_long(*_: object) -> None:
    raise TimeoutError


def main(names: list[str]) -> None:
    """Examine all architectures, or those that are named, which replace their own rows."""
    import torch
    import transformers
    from tests.architectures.checks import Row, examined
    from tests.architectures.tiny import all_types

    import quadapt  # noqa: F401

    signal.signal(signal.SIGALRM, _too_long)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows: dict[str, Row] = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"] if names else {}
    for name in names or all_types():
        start = time.monotonic()
        signal.alarm(LONGEST)
        try:
            with tempfile.TemporaryDirectory() as folder:
                rows[name] = examined(name, Path(folder))
        except Exception as error:
            rows[name] = {"fault": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        signal.alarm(0)
        state = next((key for key in ("fault", "not_built", "refused") if key in rows[name]), "done")
        print(f"{name}: {state} ({time.monotonic() - start:.1f} s)", flush=True)
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        text = json.dumps({"versions": versions, "rows": dict(sorted(rows.items()))}, indent=1)
        RESULTS.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
