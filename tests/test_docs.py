"""The documentation: tables follow from measurements, pages from the code, and every link leads somewhere."""

from __future__ import annotations

import importlib.util
import posixpath
import re
import runpy
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from quadapt.cli import COMMANDS
from quadapt.cli.commands import settings_of
from quadapt.exporters.formats import EXPORTERS
from quadapt.methods import METHODS, method_named

ROOT = Path(__file__).parents[1]
SCRIPTS = ROOT / "scripts"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """Every page of the site by its path there, written or made."""
    hook = script("pages")
    written = {str(path.relative_to(ROOT / "docs")): path.read_text() for path in (ROOT / "docs").rglob("*.md")}
    made = hook.generated()
    assert not set(written) & set(made)
    return {name: hook.filled(text) for name, text in (written | made).items()}


def test_tables_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    monkeypatch.syspath_prepend(str(SCRIPTS))
    with pytest.raises(SystemExit) as found:
        runpy.run_path(str(SCRIPTS / "tables.py"), run_name="__main__")
    assert found.value.code in (None, 0)  # otherwise it names the files that are out of date


def test_marks_come_in_pairs() -> None:
    """What stands between two marks is written by the script; a mark alone would be left as it is."""
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        names = re.findall(r"<!-- (/?)([\w-]+) -->", path.read_text())
        assert [name for close, name in names if not close] == [name for close, name in names if close]


def test_tables_name_what_the_registries_hold(pages: dict[str, str]) -> None:
    assert all(f"[`{name}`]({name}.md)" in pages["methods/index.md"] for name in METHODS)
    assert all(f"| `{name}` |" in pages["guide/export.md"] for name in EXPORTERS)
    assert "<!-- table" not in "".join(pages.values())


def anchors(page: str) -> set[str]:
    """Of the headings of a page, as mkdocs names them, and those that are given."""
    page = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", title.lower()).strip() for title in re.findall(r"^#+ (.*)$", page, re.MULTILINE)]
    return {re.sub(r"[\s-]+", "-", title) for title in plain} | set(re.findall(r"\{ #([\w-]+) \}", page))


def links(page: str) -> list[tuple[str, str]]:
    page = re.sub(r"^```.*?^```", "", page, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]*))?\)", page)


def test_every_link_of_the_site_leads_somewhere(pages: dict[str, str]) -> None:
    wrong = []
    for name, text in pages.items():
        for target, anchor in links(text):
            where = posixpath.normpath(posixpath.join(posixpath.dirname(name), target)) if target else name
            if not anchor and where not in pages and (ROOT / "docs" / where).is_file():
                continue  # a figure
            if where not in pages or (anchor and anchor not in anchors(pages[where])):
                wrong.append((name, target, anchor))
    assert not wrong


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md"])
def test_every_link_of_the_repository_leads_to_a_file(name: str) -> None:
    """These are read where they lie, where no page has been made."""
    assert [target for target, _ in links((ROOT / name).read_text()) if not (ROOT / target).exists()] == []


def test_every_page_is_in_the_navigation(pages: dict[str, str]) -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]

    def named(entry: Any) -> list[str]:
        if isinstance(entry, str):
            return [entry]
        return [name for inside in (entry.values() if isinstance(entry, dict) else entry) for name in named(inside)]

    entries = named(nav)
    folders = tuple(entry for entry in entries if entry.endswith("/"))
    assert len(entries) == len(set(entries))
    assert {name for name in pages if not name.startswith(folders)} <= set(entries)
    assert {entry for entry in entries if entry not in folders} <= set(pages)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_has_a_page(name: str, pages: dict[str, str]) -> None:
    page = pages[f"methods/{name}.md"]
    assert method_named(name).recipe.source in page
    assert f"--method {name}" in page
    function = METHODS[name]
    assert f"::: {function.__module__}.{function.__qualname__}\n" in page
    for said in ("Args:", "Example:", "Source:"):
        assert said in (function.__doc__ or "")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_setting_is_on_the_page_of_its_command(command: str, pages: dict[str, str]) -> None:
    page = pages[f"settings/{command}.md"]
    for name, field in settings_of(command).model_fields.items():
        assert f"`--{name.replace('_', '-')}`" in page or f"`{name.upper()}`" in page
        assert " ".join((field.description or "?").split()) in page


def test_equations_become_mathml() -> None:
    pytest.importorskip("latex2mathml", reason="comes with the extra docs")
    made = script("pages").as_mathml(
        r'<p><span class="arithmatex">\(a &lt; b_{o}\)</span></p><div class="arithmatex">\[' "\n" r"\frac{x}{2}\]</div>"
    )
    assert "arithmatex" not in made
    assert made.count("<math") == 2
    assert "<mfrac>" in made
    assert 'display="block"' in made


def test_docstrings_are_shown_as_markdown() -> None:
    pytest.importorskip("griffe", reason="comes with the extra docs")
    text = "It is.\n\nSource: a paper.\nDiffers: not as\n    published.\n\nSee :class:`Flag`. A tree::\n\n    x\n"
    assert script("docstrings").as_markdown(text) == (
        "It is.\n\n\n**Source:** a paper.\n\n**Differs from the source:** not as\npublished.\n"
        "\nSee `Flag`. A tree:\n\n    x\n"
    )
