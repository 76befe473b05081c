"""RILQ's objective: what it is, and that targets from disk are the teacher's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from quadapt.data import Collator
from quadapt.methods import Recipe
from quadapt.objectives.rilq import RILQ, Hidden, LastHidden
from quadapt.objectives.teacher import KeptTeacher, Teacher, real_tokens
from quadapt.quant.format import Format
from quadapt.train import Run, train

Make = Callable[..., Any]


def sequences(count: int = 6) -> list[dict[str, list[int]]]:
    rows = [torch.randint(3, 96, (12 + 2 * at,)).tolist() for at in range(count)]
    return [{"input_ids": row, "labels": row} for row in rows]


def packed(count: int = 4) -> list[dict[str, list[int]]]:
    rows = []
    for at in range(count):
        first, second = 5 + at, 6
        row = torch.randint(3, 96, (first + second,)).tolist()
        rows.append({"input_ids": row, "labels": row, "position_ids": [*range(first), *range(second)]})
    return rows


@pytest.fixture
def student(quantized_llama: Make) -> Any:
    model = quantized_llama(Format(bits=2, group_size=32))
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def last_hidden(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Through transformers' own list of hidden states: the input of the final norm is the last block's output."""
    caught = []
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    handle = inner.model.norm.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0]))
    model(**{name: value for name, value in batch.items() if name != "labels"})
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("rows", [sequences, packed], ids=["padded", "packed"])
def test_padding_is_told_from_tokens(rows: Callable[[], list[dict[str, list[int]]]]) -> None:
    given = rows()
    real = real_tokens(Collator(0)(given))
    assert real.sum(1).tolist() == [len(row["input_ids"]) for row in given]
    assert all(bool(line[: int(line.sum())].all()) for line in real)


@pytest.mark.parametrize("rows", [sequences, packed], ids=["padded", "packed"])
def test_it_is_the_mean_squared_error_of_the_last_block_and_the_loss(
    rows: Callable[[], list[dict[str, list[int]]]], student: Any, tiny_llama: Make
) -> None:
    batch, teacher = Collator(0)(rows()), tiny_llama()
    objective = RILQ(weight=0.3).bind(student, Teacher(teacher, Hidden()))
    loss = student(**batch).loss
    found = objective(loss, batch)
    objective.close()
    with torch.no_grad():
        ours, theirs = last_hidden(student, batch), last_hidden(teacher, batch)
    real = real_tokens(batch)
    error = (ours[real] - theirs[real]).double().square().mean()
    assert found.item() == pytest.approx(0.3 * error.item() + 0.7 * loss.item(), rel=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_a_batchs_share_scales_the_error_as_its_loss_already_is(share: float, student: Any, tiny_llama: Make) -> None:
    batch = Collator(0)(sequences())
    objective = RILQ(weight=0.3).bind(student, Teacher(tiny_llama(), Hidden()))
    loss, found = torch.tensor(2.0), []
    for each in (1.0, share):
        student(**batch)
        found.append(objective(loss, batch, share=each).item())
    objective.close()
    error = (found[0] - 0.7 * 2.0) / 0.3
    assert error > 0.01
    assert found[1] == pytest.approx(0.3 * share * error + 0.7 * 2.0, rel=1e-5)


@pytest.mark.parametrize(
    ("steps", "want"), [(1, [1.0] * 5), (2, [0.5, 0.5, 0.5, 0.5, 1.0]), (3, [1 / 3] * 3 + [0.5] * 2)]
)
def test_shares_of_an_optimizer_step_add_up_to_one(steps: int, want: list[float], student: Any, tmp_path: Path) -> None:
    """Transformers divides the loss by the tokens of the whole step; an epoch's last step may have fewer batches."""
    shares = []

    class Spy:
        def __call__(self, loss: torch.Tensor, batch: Any, *, share: float, items: Any) -> torch.Tensor:
            shares.append(share)
            return loss

        def close(self) -> None: ...

    run = Run(recipe=Recipe(learning_rate=1e-4, rank=4), batch_size=2, gradient_accumulation=steps)
    train(student, sequences(10), run, tmp_path, collate=Collator(0), objective=Spy())  # type: ignore[arg-type]
    assert shares == pytest.approx(want)


def test_targets_from_disk_are_the_teachers(tiny_llama: Make, tmp_path: Path) -> None:
    rows, collate = sequences(), Collator(0)
    teacher, kept = Teacher(tiny_llama(), Hidden()), KeptTeacher(tmp_path, Hidden())
    kept.fill(teacher, [collate(rows[:3]), collate(rows[3:])])
    batch = collate([rows[5], rows[0], rows[2]])  # in another order, padded to another length
    found, live = kept(batch)["hidden"], teacher(batch)["hidden"]
    torch.testing.assert_close(found, live, rtol=1e-4, atol=1e-4)  # of other shapes
    assert len(list(tmp_path.iterdir())) == 6


def test_what_is_kept_is_not_computed_again(tiny_llama: Make, tmp_path: Path) -> None:
    rows, collate, calls = sequences(), Collator(0), []

    class Counting(Teacher):
        def __call__(self, batch: Any) -> Any:
            calls.append(len(batch["input_ids"]))
            return super().__call__(batch)

    teacher = Counting(tiny_llama(), Hidden())
    KeptTeacher(tmp_path, Hidden()).fill(teacher, [collate(rows[:3])])
    KeptTeacher(tmp_path, Hidden()).fill(teacher, [collate(rows[:3]), collate(rows[3:])])
    assert calls == [3, 3]


def test_training_brings_the_student_closer_to_the_teacher(
    quantized_llama: Make, tiny_llama: Make, tmp_path: Path
) -> None:
    rows, teacher = sequences(16), tiny_llama()
    batch = Collator(0)(rows)
    real = real_tokens(batch)
    found = {}
    for name in ("cross-entropy", "rilq"):
        torch.manual_seed(0)
        model = quantized_llama(Format(bits=2, group_size=32))
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        objective = RILQ(weight=0.9).bind(model, Teacher(teacher, Hidden())) if name == "rilq" else None
        run = Run(recipe=Recipe(learning_rate=5e-3, rank=16), max_steps=30, batch_size=8, gradient_accumulation=2)
        train(model, rows, run, tmp_path / name, collate=Collator(0), objective=objective)
        with torch.no_grad():
            hidden = LastHidden(model)
            model.eval()(**batch)
            found[name] = float((hidden.take()[real] - last_hidden(teacher, batch)[real]).square().mean())
    assert found["rilq"] < 0.7 * found["cross-entropy"]
