"""Tables of files that people serve, from what `benchmarks/served.py` and `benchmarks/roundtrip.py` have stored."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

RouteKey = tuple[str, ...]
"""What is alike in runs that differ in their rate and seed alone: `("ours", "recover", "3", "4")`."""


@dataclass(frozen=True)
class Files:
    """Files of one kind at their best rate: their losses in llama.cpp by seed, and their bytes."""

    key: RouteKey
    rate: str
    losses: tuple[float, ...]
    size: int

    @property
    def loss(self) -> float:
        """Mean loss over the seeds, in nats per token."""
        return statistics.mean(self.losses)

    @property
    def label(self) -> str:
        """What a reader calls it."""
        if self.key[0] == "lora":
            return "LoRA, F16"
        if self.key[0] == "usual":
            return self.key[1] + ", importance" * int(self.key[2])
        return f"{self.key[1]}, {self.key[2]} bits"


def files_of(runs: dict[str, Any]) -> list[Files]:
    """All kinds of files of which there is more than one seed; a rate is the best one on the first seed.

    Mixtures that llama.cpp refuses are left out.
    """
    found: dict[RouteKey, dict[str, dict[int, dict[str, Any]]]] = {}
    for name, run in runs.items():
        *key, rate, seed = name.split()
        found.setdefault(tuple(key), {}).setdefault(rate, {})[int(seed)] = run
    made = []
    for key, rates in found.items():
        rate = max(rates, key=lambda each, rates=rates: len(rates[each]))  # the others were tried on one seed
        some = list(rates[rate].values())
        if len(some) > 1 and not any("refused" in run for run in some):
            assert all(run.get("verdict", "exact") == "exact" for run in some), key
            made.append(Files(key, rate, tuple(run["loss"] for run in some), some[0]["bytes"]))
    return made


def served_table(found: dict[str, Any], *, table: Any, spread: Any) -> str:
    """Ours, each above the best file of the usual route that is no larger; LoRA in 16 bits before them."""
    files = files_of(found["runs"])
    (dense,) = (each for each in files if each.key[0] == "lora")
    usual = [each for each in files if each.key[0] == "usual"]
    rows = [(f"*{dense.label}*", megabytes(dense), spread(list(dense.losses)), "", "")]
    for ours in sorted((each for each in files if each.key[0] == "ours"), key=lambda each: -each.size):
        rival = min((each for each in usual if each.size <= ours.size), key=lambda each: each.loss, default=None)
        beside = "" if rival is None else f"{ours.loss - rival.loss:+.3f}"
        more = f"{ours.loss - dense.loss:+.3f}"
        rows.append((f"**{ours.label}**", megabytes(ours), spread(list(ours.losses)), beside, more))
        if rival is None:
            rows.append(("no mixture is as small", "", "", "", ""))
        else:
            gap = f"{rival.loss - dense.loss:+.3f}"
            rows.append((rival.label, megabytes(rival), spread(list(rival.losses)), "", gap))
    about = found["about"]
    head = f"{about['steps']} steps of {about['batch']} sequences of at most {about['length']} tokens.\n\n"
    columns = ("file", "MB", "loss in llama.cpp", "ours less the usual one's", "less LoRA's in 16 bits")
    return head + table(columns, rows)


def megabytes(files: Files) -> str:
    """The size of a file."""
    return f"{files.size / 1e6:.3f}"


def roundtrip_table(found: dict[str, Any], *, table: Any, spread: Any) -> str:
    """A row for each format and method: loss of what went in, of the merged model, and of what came out."""
    rates: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for name, run in found["runs"].items():
        *key, rate, _ = name.split()
        rates.setdefault(tuple(key), {}).setdefault(rate, []).append(run)
    rows = []
    for (format, method), tried in rates.items():
        rate, runs = max(tried.items(), key=lambda item: len(item[1]))
        losses = [[run[part] for run in runs] for part in ("before", "merged", "reloaded")]
        verdicts = ", ".join(sorted({run["verdict"] for run in runs}))
        rows.append((format, method, rate, f"{losses[0][0]:.4f}", *map(spread, losses[1:]), verdicts))
    columns = ("format", "method", "rate", "loss before", "merged", "written, by another reader", "merge")
    return f"{found['about']['steps']} steps.\n\n" + table(columns, rows)
