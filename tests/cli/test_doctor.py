"""`quadapt doctor`: what is installed, what the machine has, and whether its kernels are right."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import give, quadapt

from quadapt.jobs.doctor import _OWN, SERVES
from quadapt.kernels import cpu, selfcheck


def test_all_kernels_of_this_machine_are_right() -> None:
    found = quadapt("doctor")
    assert found["devices"][0]["device"] == "cpu"
    assert found["devices"][0]["memory"] > found["devices"][0]["free"] > 0
    assert len(found["kernels"]) >= 24
    assert all(row["right"] for row in found["kernels"])
    named = {row["package"]: row for row in found["packages"]}
    assert named["torch"]["version"] == torch.__version__
    assert named["pillow"]["for"] == SERVES["images"]


def test_versions_alone_run_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_CASES", None)
    assert "kernels" not in quadapt("doctor", "--no-kernels")


def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpu.nearest_codes

    def wrong(*given: Any) -> torch.Tensor:
        codes = right(*given)
        codes[3, 5] ^= 1
        return codes

    monkeypatch.setattr(cpu, "nearest_codes", wrong)
    said = give("doctor", code=2)
    assert (
        "kernels are wrong on this machine: nearest codes, integers on cpu, nearest codes, a table on cpu" in said.err
    )
    assert "WRONG on cpu: nearest codes, integers: differs by" in said.out


def test_a_kernel_that_cannot_run_is_named_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(cpu, "group_range", broken)
    rows = {each.kernel: each for each in selfcheck.checks(torch.device("cpu"))}
    assert not rows["ranges of groups"].right
    assert rows["ranges of groups"].words == "RuntimeError: no such instruction"
    assert sum(each.right for each in rows.values()) == len(rows) - 1


def test_every_group_of_optional_packages_is_said_to_be_for_something() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert set(project["optional-dependencies"]) - set(_OWN) <= set(SERVES)
