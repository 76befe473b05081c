"""Distillation: its formulas against float64, what is kept on disk, and that a step counts every token once."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from reference import distill_numpy as reference
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from quadapt.data import Collator
from quadapt.errors import ConfigError
from quadapt.methods import Recipe
from quadapt.nn.objective import NO_LOSS
from quadapt.objectives.distill import JS, KL, Predictions, summed
from quadapt.objectives.teacher import KeptTeacher, Teacher
from quadapt.quant.format import Format
from quadapt.train import Run, train

Make = Callable[..., Any]
KINDS = [KL(), KL(temperature=2.5), JS(), JS(beta=0.1), JS(beta=0.8, temperature=0.5)]
NAMES = ["kl", "kl-hot", "js", "js-0.1", "js-0.8-cold"]


def formula(objective: Any, p: Any, q: Any) -> float:
    return reference.kl(p, q) if isinstance(objective, KL) else reference.jsd(p, q, objective.beta)


def logits(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return (3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).to(dtype)


def wanted(objective: Any, theirs: Tensor, ours: Tensor, asked: Tensor, ids: Tensor | None = None) -> list[float]:
    """The divergence of each token that is asked about; with `ids`, of these and all others as one."""
    found, T = [], objective.temperature
    for at, (p_row, q_row) in enumerate(zip(theirs, ours[asked], strict=True)):
        p, q = (reference.softmax(row.double().numpy(), T) for row in (p_row, q_row))
        if ids is not None:
            p, q = (np.array(reference.joined(each, ids[at].tolist())) for each in (p, q))
        found.append(formula(objective, p, q))
    return found


# --- the formulas -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("objective", KINDS, ids=NAMES)
def test_it_is_the_divergence_of_the_tokens_that_are_asked_about(objective: Any, rows: int) -> None:
    ours, asked = logits(2, 5, 11), torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1]]).bool()
    theirs = logits(4, 11, seed=1)
    found = summed(ours, asked, {"logits": theirs}, objective.divergence, objective.temperature, rows)
    assert found.item() == pytest.approx(math.fsum(wanted(objective, theirs, ours, asked)), rel=1e-10)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("objective", KINDS, ids=NAMES)
def test_its_gradient_is_that_of_finite_differences(objective: Any, kept: bool) -> None:
    asked = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    answer = {"logits": logits(4, 7, seed=1)}
    if kept:
        answer = Predictions(objective.temperature, 3).kept(answer)  # type: ignore[assignment]

    def lowered(ours: Tensor) -> Tensor:
        return summed(ours, asked, answer, objective.divergence, objective.temperature, 2)

    assert torch.autograd.gradcheck(lowered, (logits(2, 3, 7).requires_grad_(),))


def test_no_more_than_some_rows_are_ever_in_float32() -> None:
    """Neither in forward nor in backward; the gradient has the dtype of the logits."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            found = function(*args, **(kwargs or {}))
            for each in found if isinstance(found, (tuple, list)) else (found,):
                if isinstance(each, Tensor) and each.dtype in (torch.float32, torch.float64):
                    largest = max(largest, each.numel())
            return found

    ours, theirs = logits(2, 40, 64, dtype=torch.bfloat16).requires_grad_(), logits(80, 64, dtype=torch.bfloat16)
    asked = torch.ones(2, 40, dtype=torch.bool)
    with Watch():
        summed(ours, asked, {"logits": theirs}, KL().divergence, 1.0, rows=8).backward()
    assert 0 < largest <= 8 * 65
    assert ours.grad is not None
    assert ours.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("objective", KINDS, ids=NAMES)
def test_what_is_certain_or_impossible_gives_numbers(objective: Any) -> None:
    theirs = torch.tensor([[200.0, -200.0, 0.0], [0.0, -math.inf, 1.0], [1e4, -1e4, 0.0]])
    ours = torch.tensor([[[-200.0, 200.0, 0.0], [3.0, 1.0, 2.0], [1e4, -1e4, 0.0]]]).requires_grad_()
    for answer in ({"logits": theirs}, Predictions(objective.temperature, 2).kept({"logits": theirs})):
        found = summed(ours, torch.ones(1, 3).bool(), answer, objective.divergence, objective.temperature)
        (gradient,) = torch.autograd.grad(found, ours)
        assert torch.isfinite(found)
        assert torch.isfinite(gradient).all()


def test_small_and_large_betas_are_the_two_divergences() -> None:
    p, q = (logits(6, 9, seed=seed).log_softmax(-1) for seed in (0, 1))
    forward, reverse = KL().divergence(p, q)[0], KL().divergence(q, p)[0]
    torch.testing.assert_close(JS(beta=1e-9).divergence(p, q)[0] / 1e-9, forward, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(JS(beta=1 - 1e-9).divergence(p, q)[0] / 1e-9, reverse, rtol=1e-3, atol=1e-5)
    assert (JS().divergence(p, q)[0] <= math.log(2)).all()
    torch.testing.assert_close(JS().divergence(p, q)[0], JS().divergence(q, p)[0])


# --- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top", [1, 4, 10, 11, 64])
@pytest.mark.parametrize("objective", KINDS, ids=NAMES)
def test_what_is_kept_has_the_divergence_of_the_partition(objective: Any, top: int) -> None:
    """Of the likeliest tokens and the rest; the whole one if the vocabulary is kept, and never more."""
    ours, theirs, asked = logits(1, 20, 11), logits(20, 11, seed=1), torch.ones(1, 20, dtype=torch.bool)
    T = objective.temperature
    kept = Predictions(T, top).kept({"logits": theirs})
    ids = theirs.argsort(-1, descending=True)[:, :top]
    assert torch.equal(kept["ids"].long().sort(-1).values, ids.sort(-1).values)
    found = summed(ours, asked, kept, objective.divergence, T).item()
    whole = math.fsum(wanted(objective, theirs, ours, asked))
    assert found == pytest.approx(math.fsum(wanted(objective, theirs, ours, asked, ids)), rel=5e-3)
    assert found == pytest.approx(whole, rel=5e-3) if top >= 11 else found < whole


@given(seed=st.integers(0, 10**6), tokens=st.integers(2, 40), temperature=st.floats(0.5, 4))
def test_float16_moves_a_kept_probability_little(seed: int, tokens: int, temperature: float) -> None:
    theirs = logits(1, tokens, seed=seed)
    p = reference.softmax(theirs[0].numpy(), temperature)
    kept = Predictions(temperature, tokens // 2).kept({"logits": theirs})
    log = kept["log_probabilities"].double()[0]
    found = (log - log.logsumexp(0)).exp().numpy()
    exact = np.array(reference.joined(p, kept["ids"][0].tolist()))
    assert abs(found - exact).max() < 5e-4
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_its_size_on_disk_is_what_is_said(tiny_llama: Make) -> None:
    model, targets = tiny_llama(), Predictions(1.0, 5)
    batch = Collator(0)(sequences(3))
    kept = targets.kept(Teacher(model, targets)(batch))
    size = sum(each.nbytes for each in kept.values())
    assert size == targets.token_bytes(model) * int(targets.asked(batch).sum())


# --- batches ----------------------------------------------------------------------------------------------------------


def sequences(count: int = 8, seed: int = 0) -> list[dict[str, list[int]]]:
    """Ragged ones, of whose beginning, of another length each, no token bears loss."""
    made, rows = torch.Generator().manual_seed(seed), []
    for at in range(count):
        ids = torch.randint(3, 96, (8 + 3 * at,), generator=made).tolist()
        rows.append({"input_ids": ids, "labels": [*[NO_LOSS] * (1 + at), *ids[1 + at :]]})
    return rows


def packed(count: int = 4) -> list[dict[str, list[int]]]:
    rows = []
    for at in range(count):
        ids = torch.randint(3, 96, (11 + at,), generator=torch.Generator().manual_seed(at)).tolist()
        labels = [NO_LOSS, NO_LOSS, *ids[2 : 5 + at], NO_LOSS, NO_LOSS, *ids[7 + at :]]
        rows.append({"input_ids": ids, "labels": labels, "position_ids": [*range(5 + at), *range(6)]})
    return rows


@pytest.fixture
def student(quantized_llama: Make) -> Any:
    torch.manual_seed(0)
    model = quantized_llama(Format(bits=2, group_size=32))
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def by_hand(objective: Any, student: Any, teacher: Any, rows: list[dict[str, list[int]]]) -> tuple[float, int]:
    """The summed divergence of each token that bears loss, one sequence at a time, and how many there are."""
    terms = []
    for row in rows:
        batch = {name: torch.tensor([row[name]]) for name in ("input_ids", "position_ids") if name in row}
        with torch.no_grad():
            ours, theirs = (model(**batch, use_cache=False).logits[0].double().numpy() for model in (student, teacher))
        for at, label in enumerate(row["labels"][1:]):
            if label != NO_LOSS:
                p, q = (reference.softmax(each[at], objective.temperature) for each in (theirs, ours))
                terms.append(objective.temperature**2 * formula(objective, p, q))
    return math.fsum(terms), len(terms)


@pytest.mark.parametrize("rows", [sequences, packed], ids=["padded", "packed"])
@pytest.mark.parametrize("objective", [KL(weight=0.3, temperature=2.0), JS(weight=1.0)], ids=["kl", "js"])
def test_it_is_a_mean_over_tokens_that_bear_loss(
    rows: Callable[[], Any], objective: Any, student: Any, tiny_llama: Make
) -> None:
    teacher, batch = tiny_llama(), Collator(0)(rows())
    bound = objective.bind(student, Teacher(teacher, objective.targets))
    loss = student(**batch).loss
    found = bound(loss, batch)
    bound.close()
    total, count = by_hand(objective, student, teacher, rows())
    share = objective.weight
    assert found.item() == pytest.approx(share * total / count + (1 - share) * loss.item(), rel=1e-4)


@pytest.mark.parametrize("kept", [False, True], ids=["live", "kept"])
@pytest.mark.parametrize("objective", [KL(weight=1.0, top_tokens=96), JS(weight=0.4, top_tokens=96)], ids=["kl", "js"])
def test_two_batches_of_four_are_one_of_eight(
    objective: Any, kept: bool, quantized_llama: Make, tiny_llama: Make, tmp_path: Path
) -> None:
    """Of ragged lengths, so that a mean of means would be another number."""
    rows, teacher, logs = sequences(8), tiny_llama(), []
    for size, accumulation in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        model = quantized_llama(Format(bits=2, group_size=32))
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
        teaching: Any = Teacher(teacher, objective.targets)
        if kept:
            folder = KeptTeacher(tmp_path / "targets", objective.targets)
            folder.fill(teaching, [Collator(0)(rows[:5]), Collator(0)(rows[5:])])
            teaching = folder
        total, count = by_hand(objective, model.eval(), teacher, rows)
        run = Run(recipe=Recipe(learning_rate=1e-3, rank=4), batch_size=size, gradient_accumulation=accumulation)
        out = tmp_path / f"{size}"
        bound = objective.bind(model, teaching)
        log = train(model, rows, run, out, collate=Collator(0), objective=bound).losses[0]
        bound.close()
        logs.append((log["loss"], log["grad_norm"]))
        if objective.weight == 1:
            assert log["loss"] == pytest.approx(total / count, rel=2e-3)
    assert logs[0] == pytest.approx(logs[1], rel=1e-4)


def test_kept_targets_are_the_teachers_whatever_the_batch(tiny_llama: Make, tmp_path: Path) -> None:
    rows, collate, targets = sequences(6), Collator(0), Predictions(1.5, 96)
    teacher, kept = Teacher(tiny_llama(), targets), KeptTeacher(tmp_path, targets)
    kept.fill(teacher, [collate(rows[:3]), collate(rows[3:])])
    batch = collate([rows[5], rows[0], rows[2]])
    found, live = kept(batch), teacher(batch)["logits"]
    want = (live / 1.5).log_softmax(-1).gather(-1, found["ids"].long())
    torch.testing.assert_close(found["log_probabilities"][:, :-1].float(), want, rtol=2e-3, atol=2e-3)
    assert len(list(tmp_path.iterdir())) == 6
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 6 * 400 + targets.token_bytes(tiny_llama()) * 200


def test_the_same_text_with_other_loss_or_settings_is_another_target(tiny_llama: Make, tmp_path: Path) -> None:
    row, collate = sequences(1)[0], Collator(0)
    other = {**row, "labels": [*row["labels"][:-1], NO_LOSS]}
    teacher = tiny_llama()
    for at, (given_row, targets) in enumerate(
        [
            (row, Predictions(1.0, 3)),
            (other, Predictions(1.0, 3)),
            (row, Predictions(2.0, 3)),
            (row, Predictions(1.0, 4)),
        ]
    ):
        kept = KeptTeacher(tmp_path, targets)
        kept.fill(Teacher(teacher, targets), [collate([given_row])])
        assert len(list(tmp_path.iterdir())) == at + 1


def test_nothing_is_asked_of_a_batch_without_loss(student: Any, tiny_llama: Make) -> None:
    row = {"input_ids": [5, 6, 7], "labels": [NO_LOSS] * 3}
    objective = KL(weight=1.0)
    bound = objective.bind(student, Teacher(tiny_llama(), objective.targets))
    batch = Collator(0)([row])
    student(**batch)
    assert bound(torch.tensor(float("nan")), batch).item() == 0


def test_held_out_loss_leaves_no_logits_behind(student: Any, tiny_llama: Make) -> None:
    bound = KL().bind(student, Teacher(tiny_llama(), KL().targets))
    with torch.no_grad():
        student.eval()(**Collator(0)(sequences(2)))
    assert bound._logits is None


def test_another_vocabulary_is_refused(tiny_llama: Make) -> None:
    with pytest.raises(ConfigError, match=r"predicts 128 tokens, and the model that trains 96.*--teacher"):
        KL().targets.check(tiny_llama(), tiny_llama(vocab_size=128))


def test_training_brings_the_student_closer_to_the_teacher(
    quantized_llama: Make, tiny_llama: Make, tmp_path: Path
) -> None:
    rows, teacher, found = sequences(16), tiny_llama(), {}
    for name, objective in {"none": None, "kl": KL(weight=1.0), "js": JS(weight=1.0)}.items():
        torch.manual_seed(0)
        model = quantized_llama(Format(bits=2, group_size=32))
        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
        bound = None if objective is None else objective.bind(model, Teacher(teacher, objective.targets))
        run = Run(recipe=Recipe(learning_rate=5e-3, rank=16), max_steps=20, batch_size=8, gradient_accumulation=2)
        train(model, rows, run, tmp_path / name, collate=Collator(0), objective=bound)
        total, count = by_hand(KL(), model.eval(), teacher, rows)
        found[name] = total / count
    assert max(found["kl"], found["js"]) < 0.5 * found["none"]
