"""What the project says of itself in several files is the same in all of them."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import quadapt

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
REQUIREMENTS = [
    Requirement(each)
    for each in [*PROJECT["dependencies"], *(one for some in PROJECT["optional-dependencies"].values() for one in some)]
]


def workflow() -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())


def test_the_version_is_the_one_that_was_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    fallback = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["version"]["fallback-version"]
    installed = [each.version for each in importlib.metadata.distributions(name="quadapt")]
    assert quadapt.__version__ == (installed or [fallback])[0]

    def none(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", none)  # as where PYTHONPATH=src is all there is
    assert quadapt.__version__ == fallback


def test_each_python_that_is_declared_is_tested() -> None:
    prefix = "Programming Language :: Python :: 3."
    said = {f"3.{each.removeprefix(prefix)}" for each in PROJECT["classifiers"] if each.startswith(prefix)}
    matrix = workflow()["jobs"]["test"]["strategy"]["matrix"]
    assert said == set(matrix["python"])
    assert {each["dependencies"] for each in matrix["include"]} == {"oldest", "pinned"}
    allowed = SpecifierSet(PROJECT["requires-python"])
    assert all(allowed.contains(each) for each in said)
    assert not allowed.contains("3.10")


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=str)
def test_what_is_pinned_is_what_is_declared(requirement: Requirement) -> None:
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in PINS.items()}
    assert requirement.specifier.contains(pins[requirement.name.lower()])


@pytest.mark.parametrize("requirement", [Requirement(each) for each in PROJECT["dependencies"]], ids=str)
def test_what_is_needed_has_a_lower_bound(requirement: Requirement) -> None:
    """Without one, the oldest versions that continuous integration tests would be of another decade."""
    assert any(each.operator == ">=" for each in requirement.specifier)


def test_commits_are_checked_by_the_ruff_that_checks_all() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    ruff = next(each for each in hooks if each["repo"].endswith("ruff-pre-commit"))
    assert ruff["rev"] == f"v{PINS['ruff']}"


def test_one_address_stands_everywhere() -> None:
    home = PROJECT["urls"]["Repository"]
    assert all(address.startswith(home) for address in PROJECT["urls"].values())
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["repository-code"] == home
    assert home in (ROOT / "SECURITY.md").read_text()
