"""Pages of the documentation that follow from the code, made while mkdocs builds the site (a hook of mkdocs.yml).

The rest of the site is written by hand, in docs/. Equations become MathML here, which browsers show by themselves: the
site needs no script, no font and no address of others for them, and is read offline as it is read online.
"""

from __future__ import annotations

import ast
import html
import inspect
import posixpath
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from quadapt.cli import COMMANDS
from quadapt.cli.commands import settings_of
from quadapt.config import Flag, RunConfig, Settings
from quadapt.exporters.formats import EXPORTERS
from quadapt.exporters.survey import formats_page, merged_layout
from quadapt.importers import IMPORTERS
from quadapt.importers.gguf_families import FAMILIES
from quadapt.methods import METHODS, method_named
from quadapt.nn.adapters import ADAPTERS
from quadapt.nn.objective import OBJECTIVES
from quadapt.nn.starts import STARTS
from quadapt.quant.ranges import RANGES
from quadapt.quant.rounding import ROUNDINGS
from quadapt.quant.storage import STORAGES
from quadapt.quant.weight import Layout

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[1]
COPIED = {"README.md": "index.md", "ARCHITECTURE.md": "architecture.md", "CHANGELOG.md": "changelog.md"}
COPIED["CONTRIBUTING.md"] = "contributing.md"
REGISTRIES = {
    "Roundings": ROUNDINGS,
    "Ranges": RANGES,
    "Storages of scales and offsets": STORAGES,
    "Starts": STARTS,
    "Adapters": ADAPTERS,
    "Objectives": OBJECTIVES,
    "Formats that are read": IMPORTERS,
    "Export formats": EXPORTERS,
}
MERGES = {"exact": "exactly", "equivalent": "but for rounding", "none": "not exactly: serve base and adapter"}
PLAIN = {"Zero", "Nearest", "CrossEntropy"}
"""Pieces that say nothing about a method."""
LINK = re.compile(r"(\[[^]]*\])\(([^)#:\s]+)(#[^)\s]*)?\)")


def generated() -> dict[str, str]:
    """Every page that is made, by its path in the site."""
    found = {where: moved(name) for name, where in COPIED.items()}
    found |= {f"methods/{name}.md": method_page(name) for name in METHODS}
    found |= {f"settings/{name}.md": settings_page(name) for name in (*COMMANDS, "run")}
    return found | {"examples.md": examples_page(), "pieces.md": pieces_page()}


def moved(name: str) -> str:
    """A page of the repository's root, with its links as they are in the site."""

    def link(match: re.Match[str]) -> str:
        text, target, anchor = match[1], match[2], match[3] or ""
        if target.startswith("examples/"):
            return f"{text}(examples.md#{Path(target).stem})"
        if target.startswith("docs/"):
            return f"{text}({target.removeprefix('docs/')}{anchor})"
        return f"{text}({COPIED.get(target, target)}{anchor})"

    return LINK.sub(link, (ROOT / name).read_text(encoding="utf-8"))


def examples_page() -> str:
    """Every script of examples/, with what it says of itself."""
    parts = ["# Examples\n", "Each of these scripts runs as it is, and is run by the tests.\n"]
    order = (ROOT / "README.md").read_text(encoding="utf-8").index
    for path in sorted((ROOT / "examples").glob("*.py"), key=lambda path: order(f"examples/{path.name}")):
        text = path.read_text(encoding="utf-8")
        said = (ast.get_docstring(ast.parse(text)) or "").partition("\n")[0]
        parts.append(f"## {path.stem.replace('_', ' ').capitalize()} {{ #{path.stem} }}\n")
        parts.append(f'{said}\n\n```python title="examples/{path.name}"\n{text}```\n')
    return "\n".join(parts)


def pieces_page() -> str:
    """Every piece of every registry, with what it says of itself in one sentence."""
    parts = [
        "# Pieces by name\n",
        "What a setting such as `--rounding` or `--start` takes, and what a method is made of. Other packages can "
        "[add theirs](contributing.md#in-a-package-of-your-own).\n",
    ]
    for title, registry in REGISTRIES.items():
        parts.append(f"## {title}\n")
        shown = {getattr(piece, "spelling", name): piece for name, piece in registry.items()}
        for name, piece in shown.items():
            said = " ".join((inspect.getdoc(piece) or "").partition("\n\n")[0].split())
            parts.append(f"`{name}`\n:   {re.sub(r':class:', '', said)}\n")
    return "\n".join(parts)


def method_page(name: str) -> str:
    """What a method is, in the words of its function, and how its paper trains it."""
    function, method = METHODS[name], method_named(name)
    layout = Layout(format=method.format, storage=method.storage, out=4096, columns=4096)
    pieces = {axis: type(getattr(method, axis)) for axis in ("rounding", "start", "adapter", "objective")}
    facts = [
        ("Paper", f"[arXiv:{method.paper}](https://arxiv.org/abs/{method.paper})"),
        ("Grid", f"`{method.format.name}`"),
        ("Storage", f"scales {method.storage.scales}, offsets {method.storage.offsets}"),
        ("True bits a weight", f"{layout.bits_per_weight:.3f} for a matrix of 4096 x 4096, adapter not counted"),
        *((axis.capitalize(), f"`{piece.__name__}`") for axis, piece in pieces.items()),
        ("Merges", MERGES[method.adapter.exactness]),
    ]
    recipe = [
        (field.replace("_", " ").capitalize(), value)
        for field, value in vars(method.recipe).items()
        if value is not None and field != "source"
    ]
    where = f"{function.__module__}.{function.__qualname__}"
    own = [f"{piece.__module__}.{piece.__qualname__}" for piece in pieces.values() if piece.__name__ not in PLAIN]
    return "\n".join(
        [
            f"# {name}\n",
            f"```bash\nquadapt tune MODEL --data FILE --method {name} --output adapter\n```\n",
            f"::: {where}\n    options: {{ show_root_heading: false, show_root_toc_entry: false }}\n",
            "## What it is made of\n",
            rows(facts),
            "## How the paper trains\n",
            f"Source: {method.recipe.source}. Each of these is a setting of [tune](../settings/tune.md).\n",
            rows(recipe),
            "## Its pieces\n",
            *(f"::: {each}\n    options: {{ heading_level: 3 }}\n" for each in own),
        ]
    )


def filled(page: str) -> str:
    """A page with the tables of methods and of export formats in the places that are marked for them."""
    tables = {
        "methods": methods,
        "formats": formats,
        "formats that are read": read_formats,
        "GGUF families": gguf_families,
        "merged methods by format": merged_by_format,
    }
    for name, made in tables.items():
        if f"<!-- table of {name} -->" in page:
            page = page.replace(f"<!-- table of {name} -->", made())
    return page


def methods() -> str:
    """Every method, its paper, and what it is."""
    found = []
    for name in METHODS:
        method = method_named(name)
        merges = "exactly" if method.adapter.exactness == "exact" else "no"
        paper = f"[{method.paper}](https://arxiv.org/abs/{method.paper})"
        said = method.summary.removesuffix(" Cannot merge exactly.")
        found.append(f"| [`{name}`]({name}.md) | {paper} | {said} | {merges} |")
    return "\n".join(["| method | arXiv | what it is | merges |", "| --- | --- | --- | --- |", *found])


def formats() -> str:
    """Every export format, in its own words."""
    found = []
    for name, kind in EXPORTERS.items():
        said = " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())
        written = f"`{kind.suffix}` file" if kind.suffix else "folder"
        found.append(f"| `{name}` | {said} | {written} | {kind.served_by} |")
    return "\n".join(["| format | what it is | written as | served by |", "| --- | --- | --- | --- |", *found])


def read_formats() -> str:
    """Every format of others that is read, in its own words."""
    found = [f"| `{name}` | {importer.summary} |" for name, importer in IMPORTERS.items()]
    return "\n".join(["| format | what is read, and whose it is |", "| --- | --- |", *found])


def gguf_families() -> str:
    """Every family of models that GGUF files are written for, and which of these files are read back as codes."""
    found = [
        f"| `{name}` | `{family.arch}` | {', '.join(family.ropes) or 'none'} | {'yes' if family.read else 'no'} |"
        for name, family in FAMILIES.items()
    ]
    head = ["| model | architecture in the file | rotary embedding | read back as codes |", "| --- | --- | --- | --- |"]
    return "\n".join(head + found)


def merged_by_format() -> str:
    """Which formats hold what each method merges to, at its defaults; for those that merge exactly."""
    layouts = {}
    for name in METHODS:
        method = method_named(name)
        format, storage, rounding = method.base()
        if method.adapter.exactness == "exact":
            wanted = Layout(format=format, storage=storage, out=256, columns=256)
            layouts[name] = merged_layout(method.adapter, rounding.stored(wanted))
    return formats_page(layouts)


def rows(facts: list[tuple[str, object]]) -> str:
    """A table of two columns."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in facts)]) + "\n"


def settings_page(command: str) -> str:
    """Every setting of a command, under the headings of `--help`."""
    kind: type[Settings] = RunConfig if command == "run" else settings_of(command)
    panels: dict[str, list[str]] = {}
    for name, field in kind.model_fields.items():
        flag = next((item for item in field.metadata if isinstance(item, Flag)), Flag())
        panel = "Sections" if command == "run" else "Arguments" if flag.positional else flag.panel
        panels.setdefault(panel, []).append(setting(name, field, flag, panel == "Sections"))
    said = " ".join((inspect.getdoc(kind) or "").split())
    usage = "JOB.yaml" if command == "run" else "--help"
    parts = [f"# quadapt {command}\n", f"{said}\n", f"```bash\nquadapt {command} {usage}\n```\n"]
    for panel in sorted(panels, key=lambda panel: panel != "Arguments"):
        parts += [f"## {panel}\n", *panels[panel]]
    return "\n".join(parts)


def setting(name: str, field: FieldInfo, flag: Flag, section: bool) -> str:
    """One setting: its names, what it takes, and what it does."""
    dashed = f"--{name.replace('_', '-')}"
    names = (name,) if section else (name.upper(),) if flag.positional else (dashed, *flag.aliases)
    about = "required" if field.is_required() else ""
    if not field.is_required() and field.default not in (None, (), "", False):
        about = f"default `{field.default}`"
    about = "; ".join(filter(None, ("" if section else takes(field.annotation), about)))
    said = " ".join((field.description or "").split())
    return f"{', '.join(f'`{each}`' for each in names)}\n:   {said}{f' *({about})*' if about else ''}\n"


def takes(annotation: Any) -> str:
    """The values that a field takes, in words."""
    kinds = [kind for kind in get_args(annotation) if kind is not type(None)] or [annotation]
    if get_origin(annotation) is Annotated:
        return takes(kinds[0])
    kind = annotation if get_origin(annotation) is Literal else kinds[0]
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(f"`{each}`" for each in get_args(kind))
    if get_origin(annotation) is tuple:
        return "may be repeated"
    kind = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    return {int: "a whole number", float: "a number", str: "text", bool: "a switch"}.get(kind, "")


def as_mathml(page: str) -> str:
    """The HTML of a page, with its equations as MathML."""
    from latex2mathml.converter import convert

    def inline(match: re.Match[str]) -> str:
        return convert(html.unescape(match[1]))

    def block(match: re.Match[str]) -> str:
        return f'<div class="equation">{convert(html.unescape(match[1]), display="block")}</div>'

    page = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', inline, page, flags=re.DOTALL)
    return re.sub(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', block, page, flags=re.DOTALL)


# What mkdocs calls.


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the pages that are made into the navigation, where it names their folder."""
    made = {"methods/": [f"methods/{name}.md" for name in METHODS]}
    made["settings/"] = [f"settings/{name}.md" for name in (*COMMANDS, "run")]
    config.nav = [with_pages(entry, made) for entry in config.nav or []]
    return config


def with_pages(entry: Any, made: dict[str, list[str]]) -> Any:
    """A part of the navigation, with each folder that it names replaced by the pages in it."""
    if isinstance(entry, dict):
        return {title: with_pages(inside, made) for title, inside in entry.items()}
    if isinstance(entry, list):
        return [page for each in entry for page in made.get(str(each), [with_pages(each, made)])]
    return entry


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made."""
    from mkdocs.structure.files import File

    for where, text in generated().items():
        files.append(File.generated(config, posixpath.normpath(where), content=text))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """Put the tables that follow from the code where the pages ask for them."""
    return filled(text)


def on_page_content(text: str, **_: Any) -> str:
    """Show equations."""
    return as_mathml(text)
