"""Claims of speed and memory, measured: ratios within one run against named peers or limits, stored as JSON.

`python -m benchmarks` runs all of them; `python -m benchmarks step` one.
"""
