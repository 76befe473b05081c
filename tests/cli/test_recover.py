"""A model that is tuned first, quantized towards what it became, and finished by distillation: one command."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, digests, give, quadapt
from transformers import AutoModelForCausalLM

from quadapt import load, prepare
from quadapt.config import TuneConfig
from quadapt.errors import ConfigError
from quadapt.methods import method_named
from quadapt.methods.first import LoRAFirst

pytestmark = pytest.mark.usefixtures("here", "shelf")

GRID = ("--bits", "3", "--group-size", "32")
QUICK = ("--max-steps", "8", "--calibration-length", "32", "--calibration-sequences", "8")


def tune(output: object, *more: object, method: str = "recover") -> dict[str, Any]:
    given = ("tune", "dense", "--data", "story.txt", "--output", output, "--method", method, *GRID, *SHORT, *QUICK)
    return quadapt(*given, *more)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.arange(2, 42).view(2, 20)).logits
    return found


def test_the_merge_is_exact_and_all_steps_are_counted(tmp_path: Path) -> None:
    said = tune(tmp_path / "adapter", "--first-share", "0.25", "--first-lr", "0.01")
    assert (said["tuned_first"]["steps"], said["steps"]) == (2, 6)
    assert said["tuned_first"]["kind"] == "lora"
    assert not (tmp_path / "adapter" / "tuned").exists()
    note = json.loads((tmp_path / "adapter" / "base" / "quadapt.json").read_text())
    assert note["made"]["tuned_first"] == "lora"
    assert note["made"]["source"] == str(Path("dense").resolve())
    certificate = quadapt("merge", tmp_path / "adapter", "--output", tmp_path / "merged")["certificate"]
    assert certificate["verdict"] == "exact"
    trained, merged = (load(str(tmp_path / name))[0] for name in ("adapter", "merged"))
    assert torch.equal(logits(trained), logits(merged))


def test_what_is_quantized_is_the_tuned_model(tmp_path: Path) -> None:
    """With rates at which nothing moves afterwards, the model is nearest to the tuned one, not to the first."""
    still = ("--rounding", "nearest", "--lr", "1e-12", "--scale-lr", "1e-12", "--bits", "6")
    tune(tmp_path / "far", *still, "--first-lr", "0.05")
    tune(tmp_path / "near", *still, "--first-lr", "1e-9")
    dense = logits(AutoModelForCausalLM.from_pretrained("dense"))
    far, near = (logits(load(str(tmp_path / name))[0]) for name in ("far", "near"))
    assert (near - dense).norm() < 0.2 * (far - dense).norm()


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("method", ["l4q", "qa-lora"])
def test_any_method_may_be_tuned_first(method: str, kind: str, tmp_path: Path) -> None:
    said = tune(tmp_path / "adapter", "--tune-first", kind, "--objective", "js", method=method)
    assert said["tuned_first"]["kind"] == kind
    certificate = quadapt("merge", tmp_path / "adapter", "--output", tmp_path / "merged")["certificate"]
    assert certificate["verdict"] == "exact"
    trained, merged = (load(str(tmp_path / name))[0] for name in ("adapter", "merged"))
    assert torch.equal(logits(trained), logits(merged))


DEEP = pytest.mark.deep


@pytest.mark.parametrize(
    "moment", ["tuned", *(pytest.param(each, marks=DEEP) for each in ("first steps", "quantized", "last steps"))]
)
def test_it_goes_on_after_an_interruption_to_the_same_weights(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted_at: Callable[..., list[int]]
) -> None:
    more, rename = ("--save-steps", "1", "--first-share", "0.5"), os.rename
    assert tune(tmp_path / "whole", *more)["steps"] == 4
    steps = interrupted_at({"first steps": 3, "last steps": 4 + 2}.get(moment, 0))

    def renamed(source: Any, target: Any, **settings: Any) -> None:
        rename(source, target, **settings)
        if Path(target).name == {"tuned": "tuned", "quantized": "base"}.get(moment):
            raise KeyboardInterrupt

    said = ("tune", "dense", "--data", "story.txt", "--output", tmp_path / "halves", "--method", "recover", *GRID)
    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", renamed)
        give(*said, *SHORT, *QUICK, *more, code=130)
    assert not (tmp_path / "halves").exists()
    give(*said, *SHORT, *QUICK, *more, code=0)
    assert len(steps) == 8 + (moment in ("first steps", "last steps"))
    assert digests(tmp_path / "halves") == digests(tmp_path / "whole")


def test_a_dry_run_tells_the_memory_of_both_stages(tmp_path: Path) -> None:
    said = give("tune", "dense", "--data", "story.txt", "--method", "recover", "--dry-run", code=0)
    assert "while the dense model is tuned, and then:" in said.out
    assert not list(tmp_path.iterdir())


def test_who_gives_no_method_is_told_which_it_is(tmp_path: Path) -> None:
    """Where a setting does not go with it; and over eight bits, or a quantized model, it is another."""
    given = ("--data", "story.txt", "--output", tmp_path / "no", "--dry-run")
    said = give("tune", "dense", *given, "--levels", "nf", code=2)
    assert "(No method is given, so it is recover: --method takes another)" in said.error
    assert "No method" not in give("tune", "dense", *given, "--method", "recover", "--levels", "nf", code=2).error
    eight = TuneConfig(model="dense", data="story.txt", bits=8)
    assert eight.usual(quantized=False).method == "l4q"
    assert (
        eight.usual(quantized=True).method == TuneConfig(model="q4", data="x").usual(quantized=True).method == "qa-lora"
    )
    assert TuneConfig(model="dense", data="x", bits=8, method="qlora").usual(quantized=False).method == "qlora"


def test_what_cannot_be_in_the_end_is_refused_before_anything_is_tuned(tmp_path: Path) -> None:
    given = ("tune", "dense", "--data", "story.txt", "--output", tmp_path / "no", "--embeddings", "q6_k")
    said = give(*given, code=2)
    assert "64 numbers a row are no multiple of 256, as q6_k needs. Use embeddings='q8_0'" in said.error
    said = give(*given[:-2], "--calibration-length", "5000", code=2)
    assert "too few for one block of 5000" in said.error
    assert not list(tmp_path.iterdir())


def test_training_on_needs_a_teacher_of_its_own(tmp_path: Path) -> None:
    tune(tmp_path / "adapter")
    again = ("tune", tmp_path / "adapter", "--data", "story.txt", *SHORT[:-4], "--max-steps", "2")
    said = give(*again, "--output", tmp_path / "no", code=2)
    assert "is not kept. Say where one is with --teacher, or use --objective cross-entropy" in said.error
    quadapt(*again, "--output", tmp_path / "more", "--objective", "cross-entropy")
    quadapt(*again, "--output", tmp_path / "taught", "--teacher", "dense")


def test_quantized_models_and_prepare_are_refused_with_advice(tmp_path: Path) -> None:
    given = ("--data", "story.txt", "--output", tmp_path / "no", "--tune-first", "lora")
    said = give("tune", "q4", *given, code=2)
    assert "tune_first='lora' tunes the dense model, and 'q4' is quantized already" in said.error
    with pytest.raises(ConfigError, match="on data that prepare does not have"):
        prepare("dense", method="recover")


@pytest.mark.parametrize(("share", "total", "steps"), [(0.5, 2, 1), (0.01, 100, 1), (0.99, 3, 2), (0.5, 101, 50)])
def test_every_stage_has_a_step(share: float, total: int, steps: int) -> None:
    assert LoRAFirst(share=share).steps(total) == steps


def test_its_settings_are_set_like_any_other() -> None:
    method = method_named("qa-lora", tune_first="lora", first_share=0.3, first_learning_rate=1e-3)
    assert method.tune_first == LoRAFirst(share=0.3, learning_rate=1e-3)
    with pytest.raises(ConfigError, match="first_share is a setting of the tune_first full or lora"):
        method_named("qa-lora", first_share=0.3)


@pytest.mark.parametrize("rounding", ["gptq", "block-ap"])
def test_l4q_begins_with_a_rounding(rounding: str, tmp_path: Path) -> None:
    """A dense base is written, with the numbers that were rounded; interrupted after it, the work goes on."""
    tune(tmp_path / "adapter", "--rounding", rounding, method="l4q")
    assert {path.name for path in (tmp_path / "adapter").glob("*.safetensors")} == {"adapter_model.safetensors"}
    quadapt("merge", tmp_path / "adapter", "--output", tmp_path / "merged")
    trained, merged = (load(str(tmp_path / name))[0] for name in ("adapter", "merged"))
    assert torch.equal(logits(trained), logits(merged))
    quadapt(
        "quantize", "dense", "--method", "l4q", "--rounding", "nearest", "--range", "mse", "--output", tmp_path / "q"
    )
    assert quadapt("inspect", tmp_path / "q")["bits_per_weight"] < 5


def test_the_teacher_is_asked_about_no_more_sequences_than_the_run_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quadapt.objectives.teacher import Teacher

    asked: list[int] = []
    real = Teacher.__call__

    def call(self: Teacher, batch: Any) -> Any:
        asked.append(len(batch["input_ids"]))
        return real(self, batch)

    monkeypatch.setattr(Teacher, "__call__", call)
    assert tune(tmp_path / "few", "--first-share", "0.5")["steps"] == 4
    assert sum(asked) == 4 * 2  # each step reads two sequences
    asked.clear()
    tune(tmp_path / "all", "--first-share", "0.5", "--max-steps", "60")
    assert sum(asked) == 34  # all that there are, once
