"""`quadapt init`: four answers, given by options or in a terminal, make a job that `quadapt run` accepts."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import give, quadapt
from safetensors.numpy import load_file

from quadapt.config import read_job
from quadapt.exporters.formats import EXPORTERS
from quadapt.jobs import init as asking
from quadapt.jobs.init import TARGETS, Target, job_text
from quadapt.jobs.run import stages_of
from quadapt.quant.weight import Layout

ANSWERS = ("--model", "dense", "--data", "sums.jsonl", "--target", "llama-cpp", "--size", "4")


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is typed at a terminal, line after line."""
    lines: list[str] = []

    def typed(_: str) -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr(builtins, "input", typed)
    monkeypatch.setattr(asking, "_at_terminal", lambda: True)
    return lines


def jobs() -> Iterator[Any]:
    for name, target in TARGETS.items():
        for bits in target.widths:
            yield pytest.param(target, bits, id=f"{name}-{bits}")


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(("target", "bits"), list(jobs()))
def test_every_answer_makes_a_job_whose_format_holds_the_codes(
    tmp_path: Path, target: Target, bits: int, small: bool
) -> None:
    """The exporter itself is asked: for a matrix that all blocks divide, it takes the layout that will be trained."""
    file = tmp_path / "job.yaml"
    file.write_text(job_text("some/model", ["yes", "a: b.txt"], target, bits, small=small))
    job = read_job(str(file))
    stages = {stage.name: stage.settings for stage in stages_of(job, tmp_path / "job", str(file))}
    assert set(stages) == {"tune", "merge"} | ({"export"} if target.format else set())
    assert stages["tune"].data == ("yes", "a: b.txt")
    assert stages["tune"].bits == bits
    method = stages["tune"].spec.method
    assert method.adapter.exactness == "exact"
    assert (method.recipe.learning_rate > 5e-4) == small
    if target.format and target.format != "hf":
        layout = Layout.fitting(method.format, method.storage, 4096, 4096)
        assert EXPORTERS[target.format]().accepts(layout) is None


@pytest.mark.usefixtures("away")
def test_options_answer_without_a_terminal() -> None:
    said = quadapt("init", *ANSWERS)
    assert said == {"output": "job.yaml", "model": "dense", "data": ["sums.jsonl"], "target": "llama-cpp", "bits": 4}
    text = Path("job.yaml").read_text()
    assert text.count("  # ") >= 10
    assert read_job("job.yaml").output == "dense-4bit"
    assert "exists. Use --overwrite" in give("init", *ANSWERS, code=2).error
    quadapt("init", *ANSWERS[:-1], "3", "--overwrite")
    assert read_job("job.yaml").tune["bits"] == 3


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("left_out", range(4))
def test_a_missing_answer_without_a_terminal_is_an_error(left_out: int) -> None:
    answers = [ANSWERS[at : at + 2] for at in range(0, 8, 2) if at != 2 * left_out]
    flag = ANSWERS[2 * left_out]
    error = give("init", *(word for pair in answers for word in pair), code=2).error
    assert f"{flag.removeprefix('--')} is missing, and there is no terminal to ask in. Give {flag}" in error
    assert not Path("job.yaml").exists()


@pytest.mark.usefixtures("away")
def test_four_questions_are_asked(terminal: list[str]) -> None:
    terminal += ["dense", "", "sums.jsonl", "toaster", "vllm", "9", "4"]
    said = give("init", code=0)
    assert not terminal
    asked = [line for line in said.err.splitlines() if line.startswith(("Which", "Where", "What"))]
    assert len(asked) == 4 + 3  # an empty answer and two wrong ones are asked again
    assert "'toaster' is none of llama-cpp, vllm" in said.err
    assert "must be bits of a weight" in said.err
    assert read_job("job.yaml").export == {"format": "compressed-tensors"}


@pytest.mark.usefixtures("away")
def test_enter_takes_what_is_usual(terminal: list[str]) -> None:
    terminal += ["", ""]
    give("init", *ANSWERS[:4], code=0)
    job = read_job("job.yaml")
    assert (job.export, job.tune["bits"]) == ({"format": "gguf"}, 4)
    give("init", "-o", "other.yaml", code=2)


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize(
    ("answers", "said"),
    [
        (("--model", "dens"), "Did you mean 'dense'?"),
        (("--target", "vllm", "--size", "3"), "vLLM, SGLang computes with codes of 4 bits"),
        (("--size", "9"), "must be bits of a weight"),
        (("--size", "1TB"), "must be bits of a weight"),
        (("--size", "0.001MB"), "smaller is not to be had"),
        (("--target", "toaster"), "target='toaster'"),
    ],
)
def test_wrong_answers_are_refused(answers: tuple[str, ...], said: str) -> None:
    assert said in give("init", *ANSWERS, *answers, code=2).err
    assert not Path("job.yaml").exists()


@pytest.mark.usefixtures("away")
def test_the_largest_width_that_fits_is_taken() -> None:
    """Sizes are those of the tensors of models that are really quantized so; the file has a header besides."""
    onnx = (*ANSWERS[:4], "--target", "onnx", "--overwrite")
    for bits in (2, 4, 6):
        grid = ("--method", "l4q", "--rounding", "nearest", "--bits", bits, "--zero", "integer")
        quadapt("quantize", "dense", *grid, "-o", f"q{bits}")
        tensors = load_file(f"q{bits}/model.safetensors").values()
        size = sum(each.nbytes for each in tensors)
        for more, found in ((1, bits), (-1, bits - 1)):
            if found > 1:
                assert quadapt("init", *onnx, "--size", f"{(size + more) / 1e6:.6f}MB")["bits"] == found


@pytest.mark.usefixtures("shelf")
def test_only_a_dense_model_begins_a_job(here: Path, tmp_path: Path) -> None:
    assert (here / "q4").exists()
    error = give("init", "--model", "q4", *ANSWERS[2:], "-o", tmp_path / "job.yaml", code=2).error
    assert "model='q4' is quantized, and a job begins with a dense model" in error


@pytest.mark.usefixtures("away")
@pytest.mark.deep
def test_the_job_runs() -> None:
    quadapt("init", *ANSWERS)
    changes = (
        "tune.max_steps=4",
        "tune.rank=2",
        "tune.seq_len=32",
        "tune.calibration_sequences=4",
        "tune.batch_size=2",
    )
    more = ("tune.calibration_epochs=1", "tune.scales=fp16", "tune.group_size=32")
    said = quadapt("run", "job.yaml", *(word for each in changes + more for word in ("--set", each)))
    assert said["merge"]["certificate"]["verdict"] == "exact"
    assert Path("dense-4bit/model.gguf").exists()
