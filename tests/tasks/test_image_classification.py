"""Pictures get their labels: from folders and from tables, tuned, merged, measured."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import give, quadapt
from task_models import QUICK, made, write_csv

import quadapt as library
from quadapt.errors import ResourceError
from quadapt.tasks import TASKS, Reading

Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
TUNE = (*QUICK, "--lr", "0.002")


def _pictures(folder: Path, count: int, seed: int) -> Path:
    """Pictures with a bright stripe, upright or level, each in a folder of its name."""
    dice = torch.Generator().manual_seed(seed)
    for at in range(count):
        name = ("level", "upright")[at % 2]
        pixels = torch.randint(0, 60, (16, 16, 3), generator=dice, dtype=torch.uint8)
        place = int(torch.randint(0, 16, (1,), generator=dice))
        (pixels if name == "level" else pixels.transpose(0, 1))[place] = 250
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.numpy()).save(folder / name / f"{at}.png")
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTImageProcessor

    folder = tmp_path_factory.mktemp("pictures")
    made("ViTModel").save_pretrained(folder / "dense")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder / "dense")
    _pictures(folder / "train", 96, 0)
    _pictures(folder / "test", 32, 1)
    return folder


def test_stripes_are_told_apart_and_merging_keeps_it(dense: Path, tmp_path: Path) -> None:
    data = ("--task", "image-classification", "--data", dense / "train", "--eval-data", dense / "test")
    said = quadapt("tune", dense / "dense", *data, *TUNE, "--epochs", "6", "--output", tmp_path / "adapter")
    merged = quadapt("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    assert merged["certificate"]["verdict"] == "exact"
    found = quadapt("eval", tmp_path / "merged", "--data", dense / "test")
    assert found["metrics"]["accuracy"] > 0.8
    assert found["loss"] == pytest.approx(said["eval_loss"], rel=1e-4)
    model, processor = library.load(tmp_path / "merged")
    about: Any = model.config
    assert list(about.id2label.values()) == ["level", "upright"]
    picture = Image.open(next((dense / "test" / "level").iterdir()))
    values = processor(images=[picture], return_tensors="pt")["pixel_values"]
    adapted = library.load(tmp_path / "adapter")[0]
    with torch.no_grad():
        assert torch.equal(model(pixel_values=values).logits, adapted(pixel_values=values).logits)


def test_a_table_names_pictures(dense: Path) -> None:
    files = sorted((dense / "train").rglob("*.png"))[:6]
    path = write_csv(dense / "table.csv", ("image", "label"), [(f.relative_to(dense), f.parent.name) for f in files])
    task, reading = TASKS["image-classification"](), Reading()
    data: Any = task.read([str(path)], reading)
    assert [row["label"] for row in data.rows] == [file.parent.name for file in files]
    write_csv(dense / "table.csv", ("image", "label"), [("gone.png", "level"), (files[0].relative_to(dense), "level")])
    data = task.read([str(path)], reading)
    assert len(data) == 1
    assert "names the picture" in data.bad.first[0]
    path.unlink()


def test_a_damaged_picture_is_named(dense: Path, tmp_path: Path) -> None:
    folder = _pictures(tmp_path / "bad", 4, 0)
    (folder / "level" / "0.png").write_bytes(b"no picture")
    given = ("--task", "image-classification", "--data", folder, *TUNE, "--output", tmp_path / "out")
    said = give("tune", dense / "dense", *given, code=2).error
    assert "0.png: the picture cannot be opened" in said


def test_without_pillow_it_is_said_what_to_install(monkeypatch: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ResourceError, match=r"pip install 'quadapt\[images\]'"):
        TASKS["image-classification"]().read([str(tmp_path)], Reading())


def test_a_classifier_of_pictures_does_not_chat(dense: Path, tmp_path: Path) -> None:
    given = ("--rounding", "nearest", "--group-size", "16", "--output", tmp_path / "q")
    made("ViTForImageClassification").save_pretrained(tmp_path / "vit")
    for file in (dense / "dense").glob("preprocessor_config.json"):
        (tmp_path / "vit" / file.name).write_bytes(file.read_bytes())
    about = quadapt("quantize", tmp_path / "vit", *given)
    assert about["layers"] == 12
    assert "needs one that goes on with a text" in give("chat", tmp_path / "q", "--prompt", "sun", code=2).error
