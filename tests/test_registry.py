"""Registries: pieces of the own package, of other packages, and names that are wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from quadapt.errors import ConfigError
from quadapt.registry import Registry


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Registry[type]:
    """A registry whose package has two modules, and another package that adds a piece by its entry point."""
    package = tmp_path / "shop"
    package.mkdir()
    (package / "__init__.py").write_text("from quadapt.registry import Registry\nPIECES = Registry('piece', 'shop')\n")
    for name in ("nut", "bolt"):
        (package / f"{name}.py").write_text(
            f"from shop import PIECES\n@PIECES.register('{name}')\nclass {name.title()}: pass\n"
        )
    (tmp_path / "other.py").write_text(
        "from shop import PIECES\n@PIECES.register('washer')\nclass Washer: pass\nclass Unsaid: pass\n"
    )
    about = tmp_path / "other-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[quadapt.pieces]\nwasher = other:Washer\nring = other:Unsaid\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("shop", "shop.nut", "shop.bolt", "other"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import shop  # type: ignore[import-not-found]

    return shop.PIECES


def test_a_module_of_the_package_and_an_entry_point_are_all_that_it_takes(shelf: Registry[type]) -> None:
    assert list(shelf) == ["bolt", "nut", "ring", "washer"]
    assert [shelf[name].__name__ for name in shelf] == ["Bolt", "Nut", "Unsaid", "Washer"]
    assert [piece.name for piece in shelf.values()] == list(shelf)  # type: ignore[attr-defined] # each learns its name
    assert len(shelf) == 4
    assert "nut" in shelf
    assert "but" not in shelf
    assert ["nut"] not in shelf
    with pytest.raises(ConfigError, match=r"piece=\['nut'\] is unknown"):
        shelf[["nut"]]  # type: ignore[index] # as a damaged file may have it


def test_a_wrong_name_is_answered_with_the_right_ones(shelf: Registry[type]) -> None:
    with pytest.raises(ConfigError, match=r"piece='nuts' is unknown. Did you mean nut\?"):
        shelf["nuts"]
    with pytest.raises(ConfigError, match=r"piece='xyz' is unknown. Use bolt, nut, ring, washer"):
        shelf["xyz"]


def test_a_name_is_given_once(shelf: Registry[type]) -> None:
    assert "nut" in shelf
    with pytest.raises(ConfigError, match=r"piece 'nut' is shop.nut.Nut already"):
        shelf.register("nut")(Registry)
