"""Write the documentation that follows from the code and from stored measurements.

    python scripts/build_docs.py            # rewrite docs/ and the marked parts of README.md
    python scripts/build_docs.py --check    # only say (and fail) if something is out of date

`docs/cli.md` comes from the settings, `docs/methods.md` from METHODS, `docs/python.md` from docstrings, and
`docs/performance.md`, `docs/reliability.md` and the tables of README.md from `benchmarks/results/`. Nothing in them is
written by hand.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no installed package

from benchmarks.gpu.rows import shown
from compared import NOTE, RESULTS, ROOT, comparison, table
from pydantic.fields import FieldInfo
from reliability import reliability

import quadapt
from quadapt import errors
from quadapt.cli import COMMANDS
from quadapt.config import Flag, RunConfig, Settings
from quadapt.methods import METHODS, method_named
from quadapt.quant.weight import Layout


def choices(annotation: Any) -> str:
    """The values that a field takes, in words."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    kind = kinds[0]
    if get_origin(kind) is Literal:
        return ", ".join(map(str, get_args(kind)))
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return "names" if get_origin(annotation) is tuple else getattr(kind, "__name__", str(kind))


def flag_of(field: FieldInfo) -> Flag:
    """How the command line shows a field."""
    return next((item for item in field.metadata if isinstance(item, Flag)), Flag())


def settings(kind: type[Settings]) -> str:
    """A table of the fields of some settings."""
    rows = []
    for name, field in sorted(kind.model_fields.items(), key=lambda item: not flag_of(item[1]).positional):
        flag = flag_of(field)
        dashed = name.replace("_", "-")
        shown = (
            f"`{name.upper()}`"
            if flag.positional
            else ", ".join(f"`{each}`" for each in (f"--{dashed}", *flag.aliases))
        )
        default = "required" if field.is_required() else "" if field.default in (None, (), "") else f"`{field.default}`"
        rows.append((shown, choices(field.annotation), default, " ".join((field.description or "").split())))
    return table(("flag", "takes", "default", "what it does"), rows)


def cli() -> str:
    """`docs/cli.md`."""
    parts = [
        "# The command line\n",
        "Every command also takes `--json` (the result as one JSON object on stdout), "
        "`--debug` (tracebacks) and `--help`. In YAML and Python the names are those of the flags, with underscores. "
        "Exit codes: 0 done, 1 failure, 2 input that you can mend, 130 Ctrl-C.\n",
    ]
    for name, (kind, _) in COMMANDS.items():
        parts += [f"## quadapt {name}\n", f"{inspect.getdoc(kind)}\n", settings(kind)]
    fields = [
        (f"`{name}`", "required" if field.is_required() else "", " ".join((field.description or "").split()))
        for name, field in RunConfig.model_fields.items()
    ]
    parts += [
        "## quadapt run JOB.yaml\n",
        f"{inspect.getdoc(RunConfig)}\n",
        table(("section", "", "what it holds"), fields),
    ]
    return "\n".join(parts)


def methods() -> str:
    """`docs/methods.md`."""
    parts = ["# Methods\n"]
    for name, method in ((name, method_named(name)) for name in METHODS):
        layout = Layout(format=method.format, storage=method.storage, out=4096, columns=4096)
        rows = [
            ("paper", f"[arXiv:{method.paper}](https://arxiv.org/abs/{method.paper})"),
            ("grid", method.format.name),
            ("storage", ", ".join(f"{key} {value}" for key, value in asdict(method.storage).items())),
            ("true bits per weight (4096 x 4096)", f"{layout.bits_per_weight:.3f}"),
            ("rounding", type(method.rounding).__name__),
            ("start", type(method.start).__name__),
            ("adapter", type(method.adapter).__name__),
            ("merges", method.adapter.exactness),
            *((key.replace("_", " "), value) for key, value in asdict(method.recipe).items()),
        ]
        parts += [
            f"## {name}\n",
            f"{method.summary}\n",
            table(("", ""), rows),
            f"{inspect.getdoc(type(method.adapter))}\n",
            *([] if method.start.name == "zero" else [f"{inspect.getdoc(type(method.start))}\n"]),
            *([f"{inspect.getdoc(type(method.rounding))}\n"] if method.rounding.name == "block-ap" else []),
        ]
    return "\n".join(parts)


def python() -> str:
    """`docs/python.md`."""
    parts = [
        "# From Python\n",
        "`import quadapt` also makes `transformers` load quadapt's checkpoints, and PEFT train over them.\n",
    ]
    for name in ("prepare", "merge", "export", "load"):
        function = getattr(quadapt, name)
        signature = str(inspect.signature(function)).replace("'", "")
        parts += [
            f"## quadapt.{name}\n",
            f"```python\nquadapt.{name}{signature}\n```\n",
            f"```text\n{inspect.getdoc(function)}\n```\n",
        ]
    parts += ["## Errors\n", f"```text\n{inspect.getdoc(errors)}\n```\n"]
    return "\n".join(parts)


def stored(name: str) -> dict[str, Any] | None:
    """A stored measurement, if there is one."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def performance() -> str:
    """`docs/performance.md`."""
    parts = [
        "# Speed and memory\n",
        "Ratios are medians over rounds within one run (`make bench`); single times depend on the machine.\n",
    ]
    step, saved, quantize, icq, memory = (stored(name) for name in ("step", "saved", "quantize", "icq", "memory"))
    if step:
        rows = [
            (
                row["step"],
                f"{row['median_ms']:.0f}",
                f"{row['of_bf16_lora']:.2f}",
                f"{row['of_bitsandbytes']:.2f}",
                f"{row['of_plain_autograd']:.2f}" if row.get("of_plain_autograd") else "",
            )
            for row in step["rows"]
        ]
        parts += [
            "## A fine-tuning step\n",
            f"512 tokens, 4 Llama layers (1024 / 2816), rank 16. {step['limit']}.\n",
            table(("step", "median ms", "of PEFT LoRA, bf16", "of PEFT + bitsandbytes nf4", "of plain autograd"), rows),
        ]
    if saved:
        rows = [(row["layer"], f"{row['bytes']:,}", f"{row['largest_of_weight']:.1%}") for row in saved["rows"]]
        parts += [
            "## Kept for backward by one layer of 2816 x 1024, 512 tokens\n",
            table(("layer", "bytes", "largest, of a bf16 weight"), rows),
        ]
    if quantize:
        rows = [(name, f"{speed:.0f} M weights/s") for name, speed in quantize["million_weights_per_second"].items()]
        rows.append(("GPTQ of 1024 x 2816", f"{quantize['gptq_of_floor']:.2f} times its Cholesky and GEMM floor"))
        parts += ["## Quantizing\n", f"{quantize['limit']}.\n", table(("what", "speed"), rows)]
    if icq:
        parts.append(
            f"The entropy search of IR-QLoRA over 4096 x 4096 weights: {icq['times_faster']:.0f} times faster than "
            f"every candidate in torch, timed on {icq['rows_of_the_peer']} of the rows. Limit: {icq['limit']}.\n"
        )
    if memory:
        parts += [
            "## Memory while quantizing\n",
            f"{memory['parameters'] / 1e9:.2f} B parameters in bf16 shards: peak anonymous memory "
            f"{memory['above_import'] / 1e6:.0f} MB above that after import; the packed checkpoint has "
            f"{memory['packed'] / 1e6:.0f} MB. Limit: {memory['limit']}.\n",
        ]
    parts += on_a_gpu()
    environments = {name: found["environment"] for name, found in (("step", step), ("quantize", quantize)) if found}
    for name, about in environments.items():
        parts.append(
            f"{name}: {about['processor']}, {about['threads']} threads, "
            + ", ".join(f"{package} {version}" for package, version in about["packages"].items() if version)
            + f", commit {about['commit'][:10]}.\n"
        )
    return "\n".join(parts)


def on_a_gpu() -> list[str]:
    """What `make gpu` measured on a card; rows that were never measured say so."""
    found = stored("gpu") or {"rows": {}}
    parts = [
        "## On a GPU\n",
        "`make gpu` checks every Triton kernel and every method's step against the CPU, and times them on the card "
        "that it finds. What is asked is asked of an H200 (copies at 4.3 TB/s, bf16 products at 790 TFLOP/s).\n",
        table(("what", "measured", "asked", ""), shown(found["rows"])),
    ]
    if "card" in found:
        card, about, checks = found["card"], found["environment"], found["checks"]
        packages = ", ".join(f"{package} {version}" for package, version in about["packages"].items() if version)
        parts.append(
            f"{card['name']}, driver {card['driver']}, CUDA {card['cuda']}, {packages}, commit {about['commit'][:10]}; "
            f"{checks['run'] - len(checks['failed'])} of {checks['run']} checks passed.\n"
        )
    return parts


def demo_table() -> str:
    """The table of README.md: what `make demo` found."""
    found = stored("demo")
    if not found:
        return "Not measured yet.\n"
    rows = [
        (
            row["bits"],
            row["model"],
            f"{row['perplexity']:.3f}",
            f"{row['accuracy']:.1%}",
            f"{row['bits_per_weight']:.2f}",
            f"{row['megabytes']:.2f}",
        )
        for row in found["rows"]
    ]
    return table(("bits", "model", "perplexity", "exact answers", "true bits", "MB"), rows)


def step_table() -> str:
    """The speed table of README.md."""
    found = stored("step")
    if not found:
        return "Not measured yet.\n"
    rows = [(row["step"], f"{row['of_bf16_lora']:.2f}", f"{row['of_bitsandbytes']:.2f}") for row in found["rows"]]
    rows = [row for row in rows if "plain autograd" not in row[0]]
    return table(("a step of", "of PEFT LoRA, bf16", "of PEFT + bitsandbytes nf4"), rows)


def with_tables(readme: str) -> str:
    """README.md with its marked parts written anew."""
    for name, text in (("demo", demo_table()), ("step", step_table())):
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        readme = pattern.sub(lambda match, text=text: f"{match[1]}{text}{match[2]}", readme)
    return readme


def pages() -> dict[Path, str]:
    """Every file that this script writes, with its content."""
    docs = {"cli": cli(), "methods": methods(), "python": python(), "performance": performance()}
    docs |= {"comparison": comparison(), "reliability": reliability()}
    written = {ROOT / "docs" / f"{name}.md": NOTE + text for name, text in docs.items()}
    return {**written, ROOT / "README.md": with_tables((ROOT / "README.md").read_text(encoding="utf-8"))}


def main() -> None:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a file is out of date")
    check = parser.parse_args().check
    old = [path for path, text in pages().items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    if check:
        sys.exit(f"out of date, run scripts/build_docs.py: {', '.join(path.name for path in old)}" if old else 0)
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
