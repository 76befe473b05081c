"""Write the tables with numbers in README.md and docs/ anew, from what was measured.

    python scripts/tables.py            # rewrite what stands between <!-- NAME --> and <!-- /NAME -->
    python scripts/tables.py --check    # only say (and fail) if something is out of date

The prose around the tables is written by hand. Measurements lie in `benchmarks/results/`; `make bench`, `make demo`,
`make gpu`, `make kill`, `make fuzz` and `make architectures` put them there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no installed package

from architecture_tables import architectures
from benchmarks.gpu.rows import shown
from compared import RESULTS, ROOT, compared, table
from format_tables import engines_table, formats_table, levels_table
from served_tables import roundtrip_table, served_table

NOT_MEASURED = "Not measured yet.\n"
MARKED = re.compile(r"(<!-- ([\w-]+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)


def stored(name: str) -> dict[str, Any] | None:
    """A stored measurement, if there is one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def made_with(about: dict[str, Any]) -> str:
    """The machine and the versions of a measurement."""
    packages = ", ".join(f"{package} {version}" for package, version in about["packages"].items() if version)
    return f"{about['processor']}, {about['threads']} threads, {packages}, commit {about['commit'][:10]}.\n"


def demo(found: dict[str, Any]) -> str:
    """What `make demo` found."""
    columns = ("bits", "model", "perplexity", "exact answers", "true bits", "MB")
    keys = ("bits", "model", "perplexity", "accuracy", "bits_per_weight", "megabytes")
    forms = ("{}", "{}", "{:.3f}", "{:.1%}", "{:.2f}", "{:.2f}")
    rows = [tuple(form.format(row[key]) for key, form in zip(keys, forms, strict=True)) for row in found["rows"]]
    return table(columns, rows)


def step(found: dict[str, Any]) -> str:
    """A fine-tuning step, as ratios."""
    rows = [(row["step"], f"{row['of_bf16_lora']:.2f}", f"{row['of_bitsandbytes']:.2f}") for row in found["rows"]]
    rows = [row for row in rows if "plain autograd" not in row[0]]
    return table(("a step of", "of PEFT LoRA, bf16", "of PEFT + bitsandbytes nf4"), rows)


def step_in_full(found: dict[str, Any]) -> str:
    """The same with times, and beside what plain autograd takes."""
    rows = [
        (
            row["step"],
            f"{row['median_ms']:.0f}",
            f"{row['of_bf16_lora']:.2f}",
            f"{row['of_bitsandbytes']:.2f}",
            f"{row['of_plain_autograd']:.2f}" if row.get("of_plain_autograd") else "",
        )
        for row in found["rows"]
    ]
    columns = ("step", "median ms", "of PEFT LoRA, bf16", "of PEFT + bitsandbytes nf4", "of plain autograd")
    return f"Limits: {found['limit']}.\n\n{table(columns, rows)}\n{made_with(found['environment'])}"


def decode(found: dict[str, Any]) -> str:
    """Tokens written and read on a CPU."""
    rows = [
        (row["task"], row["how"], f"{row['median_ms']:.1f}", f"{row['speed_of_bf16']:.2f}") for row in found["rows"]
    ]
    columns = ("task", "by", "median ms", "speed (transformers in bf16: 1)")
    return f"{table(columns, rows)}\n{made_with(found['environment'])}"


def saved(found: dict[str, Any]) -> str:
    """What a layer keeps for backward."""
    rows = [(row["layer"], f"{row['bytes']:,}", f"{row['largest_of_weight']:.1%}") for row in found["rows"]]
    return table(("layer", "bytes", "largest, of a bf16 weight"), rows)


def quantize(found: dict[str, Any]) -> str:
    """How quickly weights become codes."""
    rows = [(name, f"{speed:.0f} M weights/s") for name, speed in found["million_weights_per_second"].items()]
    rows.append(("GPTQ of 1024 x 2816", f"{found['gptq_of_floor']:.2f} times its Cholesky and GEMM floor"))
    return f"Limits: {found['limit']}.\n\n{table(('what', 'speed'), rows)}\n{made_with(found['environment'])}"


def block_ap(found: dict[str, Any]) -> str:
    """A step of Block-AP against its products."""
    columns = ("hidden states", "step, ms", "its products alone, ms", "ratio")
    rows = [
        (row["hidden_states"], f"{row['step_ms']:.0f}", f"{row['products_ms']:.0f}", f"{row['of_products']:.2f}")
        for row in found["rows"]
    ]
    note = f"{found['note']}\n\n" if "note" in found else ""
    return f"Limits: {found['limit']}.\n\n{note}{table(columns, rows)}\n{made_with(found['environment'])}"


def icq(found: dict[str, Any]) -> str:
    """How much quicker than in torch ranges are chosen by entropy."""
    return (
        f"{found['times_faster']:.0f} times faster than every candidate in torch, timed on "
        f"{found['rows_of_the_peer']} of the rows. Limit: {found['limit']}.\n"
    )


def memory(found: dict[str, Any]) -> str:
    """What quantizing takes."""
    return (
        f"{found['parameters'] / 1e9:.2f} B parameters in bf16 shards: peak anonymous memory "
        f"{found['above_import'] / 1e6:.0f} MB above that after import; the packed checkpoint has "
        f"{found['packed'] / 1e6:.0f} MB. Limit: {found['limit']}.\n"
    )


def gpu() -> str:
    """What `make gpu` measured on a card; rows that were never measured say so."""
    found = stored("gpu") or {"rows": {}}
    text = table(("what", "measured", "asked", ""), shown(found["rows"]))
    if "card" not in found:
        return text
    card, about, checks = found["card"], found["environment"], found["checks"]
    packages = ", ".join(f"{package} {version}" for package, version in about["packages"].items() if version)
    return (
        f"{text}\n{card['name']}, driver {card['driver']}, CUDA {card['cuda']}, {packages}, commit "
        f"{about['commit'][:10]}; {checks['run'] - len(checks['failed'])} of {checks['run']} checks passed.\n"
    )


def kill(found: dict[str, Any]) -> str:
    """What came of killing every command."""
    columns = ("events", "killed", "differing", "lost", "stuck")
    rows = [(f"`{title}`", *(f"{row[name]:,}" for name in columns)) for title, row in found["commands"].items()]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    spread = "" if found["most"] >= 10**6 else f"At most {found['most']} events of each command, spread evenly. "
    commits = dict.fromkeys(row.get("commit", found["commit"])[:12] for row in found["commands"].values())
    noun = "Commit" if len(commits) == 1 else "Commits"  # a command that was killed alone replaces its own row
    return f"{table(('command', *columns), rows)}\n{spread}{noun} {', '.join(commits)}, {versions}.\n"


def fuzz(found: dict[str, Any]) -> str:
    """What came of damaged input."""
    columns = ("inputs", "accepted", "refused", "faults")
    rows = [(kind, *(f"{row[name]:,}" for name in columns)) for kind, row in found["kinds"].items()]
    sums = [sum(row[name] for row in found["kinds"].values()) for name in columns]
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{table(('input', *columns), [*rows, ('all', *(f'{each:,}' for each in sums))])}\n"
        f"Commit {found['commit'][:12]}, Python {found['python']}, {versions}; "
        f"{found['seconds'] / 60:.0f} minutes in two processes.\n"
    )


def imported(found: dict[str, Any]) -> str:
    """What converting a checkpoint of 1 B parameters takes."""
    rows = [
        (name, *(f"{row[part] / 1e6:,.0f}" for part in ("packed", "above_import")), f"{row['seconds']:.0f}")
        for name, row in found.items()
        if isinstance(row, dict) and "above_import" in row
    ]
    head = f"{found['parameters'] / 1e6:,.0f} million parameters; limit: {found['limit']}.\n\n"
    columns = ("GPTQ, 4 bits, groups of 128", "packed, MB", "peak above import, MB", "seconds")
    return head + table(columns, rows) + "\n" + made_with(found["environment"])


def experts(found: dict[str, Any]) -> str:
    """What quantizing a mixture of experts takes."""
    rows = [
        (name, *(f"{row[part] / 1e6:,.0f}" for part in ("parameters", "packed", "above_import")))
        for name, row in found.items()
        if isinstance(row, dict) and "above_import" in row
    ]
    columns = ("experts in the files", "million parameters", "packed, MB", "peak above import, MB")
    return f"Limit: {found['limit']}.\n\n{table(columns, rows)}\n" + made_with(found["environment"])


MEASURED: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "step-in-full": ("step", step_in_full),
    "step-float32-in-full": ("step-float32", step_in_full),
    "block_ap": ("block_ap", block_ap),
    **{
        made.__name__: (made.__name__, made)
        for made in (demo, step, decode, saved, quantize, icq, memory, experts, imported, kill, fuzz)
    },
    "architectures": ("architectures", architectures),
    "formats": ("formats", formats_table),
    "engines": ("formats", engines_table),
}
"""Tables by the name of their marks: what is stored, and what makes a table of it."""


def marked(name: str) -> str:
    """What belongs between the marks of that name."""
    if name in MEASURED:
        where, made = MEASURED[name]
        found = stored(where)
        return made(found) if found else NOT_MEASURED
    by_model = {"served": served_table, "roundtrip": roundtrip_table, "levels": levels_table}
    made_of = by_model.get(name.partition("-")[0])
    if made_of is not None:
        found = stored(name)
        return made_of(found) if found else NOT_MEASURED
    return gpu() if name == "gpu" else compared(name)


def pages() -> dict[Path, str]:
    """Every page with marks, with its text as it should be."""
    found = {path: path.read_text(encoding="utf-8") for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]}
    return {
        path: MARKED.sub(lambda match: f"{match[1]}\n{marked(match[2])}\n{match[3]}", text)
        for path, text in found.items()
    }


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args().check
    old = {path: text for path, text in pages().items() if path.read_text(encoding="utf-8") != text}
    if check:
        sys.exit(f"out of date, run scripts/tables.py: {', '.join(path.name for path in old)}" if old else 0)
    for path, text in old.items():
        path.write_text(text, encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
