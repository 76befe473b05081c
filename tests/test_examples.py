"""The scripts of examples/ run as they are, one after the other, and do what their first lines say."""

from __future__ import annotations

import io
import json
import math
import re
import runpy
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
sys.path[:0] = [str(ROOT / "tests" / "cli"), str(ROOT / "tests" / "tasks")]

from commands import byte_tokenizer, logits, write_data  # noqa: E402
from commands import quadapt as quadapt_command  # noqa: E402
from task_models import made, reviews, word_tokenizer  # noqa: E402

import quadapt  # noqa: E402


def run(name: str, *arguments: str, cwd: Path) -> tuple[str, dict[str, Any]]:
    """What `python examples/NAME.py ARGUMENTS` in a folder prints, and what its names stand for at the end."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(said):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        names = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return said.getvalue(), names


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    sizes = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0}
    tiny_llama(**sizes).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    write_data(folder)
    return folder


@pytest.fixture(scope="module")
def merged(place: Path) -> str:
    """What the first example printed; its model lies in `merged`."""
    return run("tune_and_merge", "dense", "story.txt", "merged", cwd=place)[0]


def test_tune_and_merge(place: Path, merged: str) -> None:
    assert "exact: logits bit-equal" in merged
    model, _ = quadapt.load(place / "merged")
    dense, _ = quadapt.load(place / "dense")
    assert not torch.allclose(logits(model), logits(dense), atol=1e-3)


def test_quantize_and_export(place: Path) -> None:
    _, names = run("quantize_and_export", "dense", "story.txt", "model.gguf", cwd=place)
    model, _ = quadapt.load(place / "model.gguf")
    assert torch.allclose(logits(model), logits(names["model"]), atol=1e-4)


@pytest.mark.usefixtures("merged")
def test_continue_adapter(place: Path) -> None:
    said, _ = run("continue_adapter", "merged", "story.txt", "adapter", cwd=place)
    losses = dict(re.findall(r"^(before|after): ([\d.]+)$", said, re.MULTILINE))
    before, after = float(losses["before"]), float(losses["after"])
    assert after < before
    model, _ = quadapt.load(place / "adapter", base=str(place / "merged"))
    assert not torch.equal(logits(model), logits(quadapt.load(place / "merged")[0]))


def test_gptq_in_gptq_out(place: Path) -> None:
    """What goes in is a GPTQ folder that was written from a dense model; what comes out is one that learned."""
    quadapt_command("quantize", place / "dense", "--zero", "integer", "--rounding", "nearest", "--output", place / "q4")
    quadapt_command("export", place / "q4", "--format", "gptq", "--output", place / "gptq")
    said, _ = run("gptq_in_gptq_out", "gptq", "story.txt", "gptq-out", cwd=place)
    losses = dict(re.findall(r"^(before|after): ([\d.]+)$", said, re.MULTILINE))
    before, after = float(losses["before"]), float(losses["after"])
    assert after < before
    assert "exact: logits bit-equal" in said
    about = json.loads((place / "gptq-out" / "config.json").read_text())["quantization_config"]
    assert (about["quant_method"], about["bits"]) == ("gptq", 4)


def _before_and_after(said: str) -> tuple[float, float]:
    losses = dict(re.findall(r"^(before|after): ([\d.]+)$", said, re.MULTILINE))
    return float(losses["before"]), float(losses["after"])


def test_classify_text(tmp_path: Path) -> None:
    made("RobertaForMaskedLM").save_pretrained(tmp_path / "roberta")
    word_tokenizer().save_pretrained(tmp_path / "roberta")
    for name, count, seed in (("train", 160, 0), ("test", 64, 1)):
        reviews(tmp_path / f"{name}.csv", count, seed)
    said, names = run("classify_text", "roberta", "train.csv", "test.csv", "out", cwd=tmp_path)
    after = re.search(r"^after: \{'accuracy': ([\d.]+)", said, re.MULTILINE)
    assert after is not None
    assert float(after[1]) >= 0.9
    assert any("classifier" in name for name, each in names["model"].named_parameters() if each.requires_grad)
    again, tokenizer = quadapt.load(tmp_path / "out", base=str(tmp_path / "out" / "base"))
    about: Any = again.config
    with torch.no_grad():
        found = again(**tokenizer(["sun good sea", "bad owl"], return_tensors="pt", padding=True)).logits.argmax(-1)
    assert [about.id2label[int(each)] for each in found] == ["good", "bad"]


def test_answer_with_t5(tmp_path: Path) -> None:
    made("T5ForConditionalGeneration", vocab_size=258, eos_token_id=0).save_pretrained(tmp_path / "t5")
    byte_tokenizer().save_pretrained(tmp_path / "t5")
    said, _ = run("answer_with_t5", "t5", "out", cwd=tmp_path)
    before, after = _before_and_after(said)
    assert after < 0.8 * before
    assert "exact: logits bit-equal" in said


def test_classify_shapes(tmp_path: Path) -> None:
    pytest.importorskip("PIL", reason="Pillow is not installed")
    from transformers import ViTImageProcessor

    made("ViTModel").save_pretrained(tmp_path / "vit")
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path / "vit")
    said, _ = run("classify_shapes", "vit", "out", cwd=tmp_path)
    found = re.search(r"^accuracy: ([\d.]+)$", said, re.MULTILINE)
    assert found is not None
    assert float(found[1]) >= 0.75
    assert "exact: logits bit-equal" in said


def test_detect_shapes(tmp_path: Path) -> None:
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": 99, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = OwlViTConfig(
        text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=64
    )
    torch.manual_seed(0)
    OwlViTForObjectDetection(config).save_pretrained(tmp_path / "owl")
    said, _ = run("detect_shapes", "owl", cwd=tmp_path)
    before, after = _before_and_after(said)
    assert after < before
    assert "exact: logits bit-equal" in said
    assert "merged besides: class_head" in said


def test_vision_language_on_text(tmp_path: Path) -> None:
    from test_vision import MODELS

    torch.manual_seed(0)
    MODELS["qwen2-vl"]().eval().save_pretrained(tmp_path / "vl")
    byte_tokenizer().save_pretrained(tmp_path / "vl")
    write_data(tmp_path)
    said, _ = run("vision_language_on_text", "vl", "story.txt", "out", cwd=tmp_path)
    assert "exact: logits bit-equal" in said
    assert "the vision tower is as it was: True" in said


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded model in 4 bits (`q4`), pairs of answers, and answers that are marked."""
    folder = tmp_path_factory.mktemp("answers")
    model = ROOT / "src" / "quadapt" / "demo" / "model"
    quadapt_command("quantize", model, "--rounding", "nearest", "--output", folder / "q4")
    pairs = [{"prompt": f"The fox had {at}.", "chosen": " She swam.", "rejected": " It rained."} for at in range(16)]
    marked = [
        {"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good}
        for pair in pairs
        for good in (True, False)
    ]
    for name, rows in (("pairs", pairs), ("marked", marked)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    return folder


def _merged_by(name: str, data: str, folder: Path) -> str:
    """What an example prints that trains over `q4`; the model that it has merged into is another one, and whole."""
    said, _ = run(name, "q4", data, name, cwd=folder)
    assert "exact: logits bit-equal" in said
    trained, before = (quadapt.load(folder / each)[0] for each in (name, "q4"))
    if type(trained) is type(before):
        assert not torch.equal(logits(trained), logits(before))
    return said


def test_train_by_sft(answers: Path) -> None:
    _merged_by("train_by_sft", "marked.jsonl", answers)


def test_train_by_dpo(answers: Path) -> None:
    said = _merged_by("train_by_dpo", "pairs.jsonl", answers)
    steps = [(float(loss), float(margin)) for loss, margin in re.findall(r"loss ([\d.]+), margin (-?[\d.]+)", said)]
    assert steps[0] == (pytest.approx(math.log(2), abs=1e-4), 0)  # before the first step model and reference are equal
    assert steps[-1][0] < steps[0][0]
    assert steps[-1][1] > 0


@pytest.mark.deep
def test_train_by_kto(answers: Path) -> None:
    _merged_by("train_by_kto", "marked.jsonl", answers)


@pytest.mark.deep
def test_train_by_orpo(answers: Path) -> None:
    _merged_by("train_by_orpo", "pairs.jsonl", answers)


def test_train_reward_model(answers: Path) -> None:
    said = _merged_by("train_reward_model", "pairs.jsonl", answers)
    scores = dict(re.findall(r"^(chosen|rejected): (-?[\d.]+)$", said, re.MULTILINE))
    assert float(scores["chosen"]) > float(scores["rejected"])


@pytest.mark.deep
def test_train_by_grpo(answers: Path) -> None:
    _merged_by("train_by_grpo", "pairs.jsonl", answers)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short_tested_and_linked(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    assert 15 <= len(lines) <= 40
    assert f"test_{path.stem}" in globals()
    assert f"examples/{path.name}" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"python examples/{path.name} " in "\n".join(lines)
