"""Run the benchmarks named, or all."""

import importlib
import sys

ALL = (
    "step",
    "decode",
    "saved",
    "quantize",
    "icq",
    "quailora",
    "memory",
    "experts",
    "imported",
    "fake",
    "block_ap",
    "plan",
)

for name in sys.argv[1:] or ALL:
    if name not in ALL:
        sys.exit(f"no benchmark {name!r}. There are {', '.join(ALL)}")
    importlib.import_module(f"benchmarks.{name}").main()
