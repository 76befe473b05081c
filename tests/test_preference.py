"""Training on pairs of answers: objective, reference, what is read, and the command; trl's DPO is the oracle."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path[:0] = [str(Path(__file__).parent / "cli")]

from commands import byte_tokenizer, give  # noqa: E402
from commands import quadapt as quadapt_command  # noqa: E402

import quadapt  # noqa: E402
from quadapt.data.collate import Collator  # noqa: E402
from quadapt.data.pairs import PairCollator, encode_pairs, read_pairs  # noqa: E402
from quadapt.errors import ConfigError, DataError  # noqa: E402
from quadapt.methods import Recipe, Run  # noqa: E402
from quadapt.objectives.dpo import DPO  # noqa: E402
from quadapt.train import train  # noqa: E402
from quadapt.train.preference import log_likelihoods  # noqa: E402

PAIRS = [{"prompt": f"{at} + 1 =", "chosen": f" {at + 1}", "rejected": f" {at} or so"} for at in range(8)]
RUN = Run(
    recipe=Recipe(learning_rate=0.01, adam_beta2=0.999, max_grad_norm=1.0),
    max_steps=3,
    batch_size=8,
    gradient_accumulation=1,
    logging_steps=1,
)


def written(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / name).write_text(lines, encoding="utf-8")
    return str(folder / name)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def llama(tiny_llama: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **more: tiny_llama(vocab_size=258, bos_token_id=None, eos_token_id=0, **more)


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "smoothing"), [(0.1, 0.0), (0.5, 0.2)])
def test_the_loss_and_its_gradient_are_those_of_the_paper(beta: float, smoothing: float) -> None:
    margins = torch.tensor([-3.0, 0.0, 0.7, 12.0], dtype=torch.float64, requires_grad=True)
    losses = DPO(beta=beta, label_smoothing=smoothing).losses(margins)
    sigmoid = [1 / (1 + math.exp(-beta * margin)) for margin in margins.tolist()]
    want = [-(1 - smoothing) * math.log(each) - smoothing * math.log(1 - each) for each in sigmoid]
    assert losses.tolist() == pytest.approx(want, rel=1e-12)
    losses.sum().backward()
    slopes = [beta * (each - (1 - smoothing)) for each in sigmoid]
    assert margins.grad is not None
    assert margins.grad.tolist() == pytest.approx(slopes, rel=1e-12)


def test_likelihoods_are_sums_over_what_bears_loss() -> None:
    logits = torch.randn(2, 4, 5)
    labels = torch.tensor([[-100, -100, 3, 1], [-100, 2, -100, -100]])
    every = logits.log_softmax(-1)
    want = [every[0, 1, 3] + every[0, 2, 1], every[1, 0, 2]]
    assert torch.allclose(log_likelihoods(logits, labels), torch.stack(want))


# --- training, and trl ------------------------------------------------------------------------------------------------

METHODS = {
    "qa-lora": {"rounding": "nearest", "rank": 2},
    "loftq": {"rank": 2},
    "l4q": {"bits": 4, "rank": 2, "group_size": 32},
    "peqa": {"rounding": "nearest"},
}


def losses_of(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.mark.parametrize(
    "method", ["qa-lora", "l4q", *(pytest.param(each, marks=pytest.mark.deep) for each in ("loftq", "peqa"))]
)
def test_losses_are_those_of_trl(method: str, llama: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    """Also where the adapter changes the base at the start: off, it is the model from before training."""
    trl = pytest.importorskip("trl", reason="trl is not installed")
    from datasets import Dataset

    model = quadapt.prepare(llama(), method=method, seed=0, **METHODS[method])
    pairs = encode_pairs(read_pairs([written(tmp_path, PAIRS)]), tokenizer, seq_len=32)
    collate = PairCollator(Collator(0))
    found = train(model, pairs.data, RUN, tmp_path / "ours", collate=collate, objective=DPO())
    about = trl.DPOConfig(
        str(tmp_path / "trl"),
        max_steps=3,
        per_device_train_batch_size=8,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        logging_steps=1,
        max_length=32,
        beta=0.1,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        activation_checkpointing=False,
    )
    again = quadapt.prepare(llama(), method=method, seed=0, **METHODS[method])
    trainer = trl.DPOTrainer(again, args=about, train_dataset=Dataset.from_list(PAIRS), processing_class=tokenizer)
    trainer.train()
    ours, theirs = losses_of(found.losses), losses_of(trainer.state.log_history)
    assert ours[0] == pytest.approx(math.log(2), rel=1e-6)
    assert ours[-1] < 0.99 * ours[0]
    # The order of sums differs by the width of the padding, and QA-LoRA's offsets are rounded to float16 in each step.
    assert ours == pytest.approx(theirs, rel=1e-3 if method == "qa-lora" else 1e-4)


def test_held_out_pairs_are_measured_as_pairs(llama: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    model = quadapt.prepare(llama(), method="qa-lora", rounding="nearest", rank=2)
    pairs = encode_pairs(read_pairs([written(tmp_path, PAIRS)]), tokenizer, seq_len=32)
    run = replace(RUN, max_steps=6, batch_size=2, eval_steps=2, keep="last")
    collate = PairCollator(Collator(0))
    found = train(
        model, pairs.data, run, tmp_path / "runs", collate=collate, eval_data=pairs.data, objective=DPO(beta=0.3)
    )
    measured = [entry for entry in found.losses if "eval_loss" in entry]
    assert len(measured) == 3
    assert measured[-1]["eval_loss"] == found.eval_loss < math.log(2)
    assert measured[-1]["eval_accuracy"] == 1.0
    assert measured[-1]["eval_margin"] > 0


def test_steps_of_several_batches_are_those_of_one(llama: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    pairs = encode_pairs(read_pairs([written(tmp_path, PAIRS)]), tokenizer, seq_len=32)
    found = []
    for batch, many in ((8, 1), (2, 4)):
        model = quadapt.prepare(llama(), method="qa-lora", rounding="nearest", rank=2, seed=0)
        run = replace(RUN, batch_size=batch, gradient_accumulation=many)
        folder = tmp_path / f"runs-{batch}"
        found.append(train(model, pairs.data, run, folder, collate=PairCollator(Collator(0)), objective=DPO()))
    one, several = (losses_of(each.losses) for each in found)
    assert one == pytest.approx(several, rel=1e-3)


def test_without_a_reference_it_is_refused(llama: Callable[..., Any], tokenizer: Any, tmp_path: Path) -> None:
    model = quadapt.prepare(
        llama(attention_bias=True), method="qa-lora", rounding="nearest", rank=2, train_also=("biases",)
    )
    pairs = encode_pairs(read_pairs([written(tmp_path, PAIRS)]), tokenizer, seq_len=32)
    with pytest.raises(ConfigError, match=r"bias would stay as it is trained. Leave biases out of train_also"):
        train(model, pairs.data, RUN, tmp_path, collate=PairCollator(Collator(0)), objective=DPO())


def test_norms_and_heads_that_train_beside_are_switched_off_too(
    llama: Callable[..., Any], tokenizer: Any, tmp_path: Path
) -> None:
    model = quadapt.prepare(llama(), method="qa-lora", rounding="nearest", rank=2, train_also=("norms", "head"))
    pairs = encode_pairs(read_pairs([written(tmp_path, PAIRS)]), tokenizer, seq_len=32)
    found = train(model, pairs.data, RUN, tmp_path, collate=PairCollator(Collator(0)), objective=DPO())
    assert losses_of(found.losses)[-1] < math.log(2)


# --- what is read -----------------------------------------------------------------------------------------------------


def texts(encoded: Any, tokenizer: Any) -> list[tuple[str, str]]:
    def bearing(ids: list[int], labels: list[int]) -> str:
        return tokenizer.decode([token for token, label in zip(ids, labels, strict=True) if label != -100 and token])

    return [
        (bearing(row["input_ids"], row["labels"]), bearing(row["rejected_input_ids"], row["rejected_labels"]))
        for row in encoded.data
    ]


def test_both_answers_are_read_and_prompts_bear_no_loss(tokenizer: Any, tmp_path: Path) -> None:
    whole = [
        {"chosen": f"{each['prompt']}{each['chosen']}", "rejected": each["prompt"] + each["rejected"]} for each in PAIRS
    ]
    for name, rows in (("pairs.jsonl", PAIRS), ("whole.jsonl", whole)):
        pairs = encode_pairs(read_pairs([written(tmp_path, rows, name)]), tokenizer, seq_len=32)
        assert [(one.strip(), other.strip()) for one, other in texts(pairs, tokenizer)] == [
            (each["chosen"].strip(), each["rejected"].strip()) for each in PAIRS
        ]
    assert pairs.report.notes[0].startswith("8 pairs")


def test_pairs_stay_together_where_a_side_cannot_be_used(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [dict(each) for each in PAIRS]
    rows[1]["rejected"] = None
    rows[3]["chosen"] = 7
    rows[5]["rejected"] = "  "
    read = read_pairs([written(tmp_path, rows)])
    assert len(read) == 6
    assert "skipped 2 rows" in read.chosen.bad.notes()[0]
    found = texts(encode_pairs(read, tokenizer, seq_len=32), tokenizer)
    assert found == [(PAIRS[at]["chosen"], PAIRS[at]["rejected"]) for at in (0, 2, 4, 6, 7)]
    twice = read_pairs([str(tmp_path / "pairs.jsonl")] * 2)
    assert len(twice) == 12
    kept, held_out = twice.split(0.25, seed=1)
    assert kept.chosen.data["where"] == kept.rejected.data["where"]
    assert len(held_out) == 3


def test_what_is_no_pair_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match=r"has no two answers to compare, but prompt, completion.*chosen and rejected"):
        read_pairs([source])


def test_a_batch_has_all_chosen_and_then_all_rejected_answers() -> None:
    rows = [
        {"input_ids": [1, 2, at], "labels": [-100, 2, at], "rejected_input_ids": [1, at], "rejected_labels": [-100, at]}
        for at in (5, 6)
    ]
    batch: dict[str, Tensor] = PairCollator(Collator(0))(rows)
    assert batch["input_ids"].tolist() == [[1, 2, 5], [1, 2, 6], [1, 5, 0], [1, 6, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 5], [-100, 2, 6], [-100, 5, -100], [-100, 6, -100]]


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Callable[..., Any]) -> Path:
    folder = tmp_path_factory.mktemp("preference")
    sizes = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0}
    tiny_llama(**sizes).save_pretrained(folder / "dense")
    byte_tokenizer().save_pretrained(folder / "dense")
    written(folder, PAIRS)
    return folder


DPO_TUNE = ("--objective", "dpo", "--rank", "2", "--lr", "0.01", "--max-steps", "4", "--batch-size", "4")


def test_tune_learns_preferences_and_merges_exactly(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    more = ("--eval-split", "0.25", "--dpo-beta", "0.2", "--rounding", "nearest", "--output", "adapter")
    found = quadapt_command("tune", "dense", "--data", "pairs.jsonl", *DPO_TUNE, *more)
    assert found["method"] == "qa-lora"  # none is given: the usual one would be tuned on single answers first
    assert found["task"] == "causal-lm"
    assert found["eval_loss"] < math.log(2)
    merged = quadapt_command("merge", "adapter", "--output", "merged")
    assert merged["certificate"]["verdict"] == "exact"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--packing",), "Leave packing out"),
        (("--no-completion-only",), "prompts bear no loss"),
        (("--method", "recover"), "would tune the dense model on single answers"),
        (("--task", "seq2seq"), "compares two answers of a language model"),
    ],
)
def test_what_has_no_meaning_for_pairs_is_refused(arguments: tuple[str, ...], words: str, place: Path) -> None:
    said = give("tune", place / "dense", "--data", place / "pairs.jsonl", *DPO_TUNE, *arguments)
    assert said.code != 0
    assert words in said.error


def test_a_dry_run_counts_both_answers(place: Path) -> None:
    given = (
        "tune",
        place / "dense",
        "--data",
        place / "pairs.jsonl",
        "--method",
        "qa-lora",
        "--rank",
        "2",
        "--dry-run",
    )
    single = quadapt_command(*given)["memory"]["step"]
    assert quadapt_command(*given, "--objective", "dpo")["memory"]["step"] > 1.7 * single
