"""Tables of files that people serve, from what `benchmarks/served.py` and `benchmarks/roundtrip.py` have stored."""

from __future__ import annotations

from typing import Any

from benchmarks.files import against, dense, files_of
from compared import spread, table


def served_table(found: dict[str, Any]) -> str:
    """Ours, each above the best file of the usual route that is no larger; LoRA in 16 bits before them."""
    files = files_of(found["runs"])
    lora = dense(files)
    rows = [(f"*{lora.label}*", f"{lora.megabytes:.3f}", spread(list(lora.losses)), "", "")]
    for ours, rival in against(files):
        beside = "" if rival is None else f"{ours.loss - rival.loss:+.3f}"
        more = f"{ours.loss - lora.loss:+.3f}"
        rows.append((f"**{ours.label}**", f"{ours.megabytes:.3f}", spread(list(ours.losses)), beside, more))
        if rival is None:
            rows.append(("no mixture is as small", "", "", "", ""))
        else:
            gap = f"{rival.loss - lora.loss:+.3f}"
            rows.append((rival.label, f"{rival.megabytes:.3f}", spread(list(rival.losses)), "", gap))
    about = found["about"]
    head = f"{about['steps']} steps of {about['batch']} sequences of at most {about['length']} tokens.\n\n"
    columns = ("file", "MB", "loss in llama.cpp", "ours less the usual one's", "less LoRA's in 16 bits")
    return head + table(columns, list(rows))


def roundtrip_table(found: dict[str, Any]) -> str:
    """A row for each format and method: loss of what went in, of the merged model, and of what came out."""
    rates: dict[tuple[str, ...], dict[str, list[dict[str, Any]]]] = {}
    for name, run in found["runs"].items():
        *key, rate, _ = name.split()
        rates.setdefault(tuple(key), {}).setdefault(rate, []).append(run)
    rows = []
    for (format, method), tried in rates.items():
        rate, runs = min(tried.items(), key=lambda item: (-len(item[1]), item[1][0]["choose"]))
        losses = [[run[part] for run in runs] for part in ("before", "merged", "reloaded")]
        verdicts = ", ".join(sorted({run["verdict"] for run in runs}))
        rows.append((format, method, rate, f"{losses[0][0]:.4f}", *map(spread, losses[1:]), verdicts))
    columns = ("format", "method", "rate", "loss before", "merged", "written, by another reader", "merge")
    return f"{found['about']['steps']} steps.\n\n" + table(columns, rows)
