"""Texts are classified: tuned over a bare encoder, merged bit for bit, measured, loaded; and what is wrong is said."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import give, quadapt
from task_models import QUICK, made, reviews, sentence, word_tokenizer, write_csv, write_lines

import quadapt as library
from quadapt.errors import DataError
from quadapt.hf.loading import load_model
from quadapt.tasks import TASKS, Reading
from quadapt.tasks.labels import Labels, label_cell, problem_in

TUNE = ("--task", "sequence-classification", *QUICK, "--lr", "0.002", "--seq-len", "16")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with a bare encoder in `dense`, data, an adapter and the merged model; and what the commands said."""
    folder = tmp_path_factory.mktemp("reviews")
    made("BertForMaskedLM").save_pretrained(folder / "dense")
    word_tokenizer().save_pretrained(folder / "dense")
    data = ("--data", reviews(folder / "train.csv", 160, 0), "--eval-data", reviews(folder / "test.csv", 64, 1))
    said = {
        "tune": quadapt("tune", folder / "dense", *data, *TUNE, "--epochs", "4", "--output", folder / "adapter"),
        "merge": quadapt("merge", folder / "adapter", "--output", folder / "merged"),
        "eval": quadapt("eval", folder / "merged", "--data", folder / "test.csv"),
    }
    return folder, said


def _logits(model: Any, texts: list[str]) -> torch.Tensor:
    with torch.no_grad():
        return model(**word_tokenizer()(texts, return_tensors="pt", padding=True)).logits


def test_a_bare_encoder_learns_its_labels_and_keeps_them_when_it_is_merged(tuned: Any) -> None:
    folder, said = tuned
    assert said["tune"]["task"] == "sequence-classification"
    assert said["tune"]["method"] == "qa-lora"
    assert said["merge"]["certificate"]["verdict"] == "exact"
    assert said["merge"]["certificate"]["probe"].startswith("2 examples of")
    assert said["merge"]["certificate"]["perplexity_before"] is None
    figures = said["eval"]["metrics"]
    assert figures["accuracy"] >= 0.9
    config = json.loads((folder / "merged" / "config.json").read_text())
    assert config["id2label"] == {"0": "bad", "1": "good"}
    assert config["architectures"] == ["BertForSequenceClassification"]
    adapted, merged = (library.load(folder / name)[0] for name in ("adapter", "merged"))
    texts = ["sun good sea", "bad owl"]
    assert torch.equal(_logits(adapted, texts), _logits(merged, texts))
    assert _logits(merged, texts).argmax(-1).tolist() == [1, 0]
    other: Any = load_model(str(folder / "adapter" / "base"))
    assert not torch.allclose(_logits(other, texts), _logits(merged, texts), atol=1e-3)


def test_figures_are_those_of_transformers_forward(tuned: Any) -> None:
    folder, said = tuned
    model: Any = load_model(str(folder / "merged"))
    rows = [line.split(",") for line in (folder / "test.csv").read_text().splitlines()[1:]]
    labels = torch.tensor([("bad", "good").index(label) for _, label in rows])
    inputs = word_tokenizer()([text for text, _ in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**inputs, labels=labels)
    assert said["eval"]["loss"] == pytest.approx(float(found.loss), rel=1e-5)
    assert said["eval"]["metrics"]["accuracy"] == pytest.approx(
        float((found.logits.argmax(-1) == labels).float().mean())
    )
    assert said["tune"]["eval_loss"] == pytest.approx(float(found.loss), rel=1e-4)


def test_heads_are_floats_and_the_body_is_codes(tuned: Any) -> None:
    folder, _ = tuned
    about = give("inspect", folder / "merged", "--verify", code=0).out
    assert "not quantized (output head): bert.pooler.dense, classifier" in about
    assert "merged besides: classifier, a whole module" in about
    assert "task: sequence-classification (bad, good)" in about
    assert len(quadapt("inspect", folder / "merged")["layers"]) == 12


def test_an_adapter_is_trained_on_with_its_head(tuned: Any, tmp_path: Path) -> None:
    folder, said = tuned
    more = ("--data", folder / "train.csv", "--eval-data", folder / "test.csv", "--max-steps", "3")
    short = ("--batch-size", "8", "--gradient-accumulation", "1", "--lr", "1e-4", "--seq-len", "16")
    found = quadapt("tune", folder / "adapter", *more, *short, "--output", tmp_path / "more")
    assert found["eval_loss"] == pytest.approx(said["tune"]["eval_loss"], abs=0.1)
    merged = quadapt("merge", tmp_path / "more", "--output", tmp_path / "merged")
    assert merged["certificate"]["verdict"] == "exact"


def test_what_makes_no_sense_for_a_classifier_is_refused_in_a_sentence(tuned: Any, tmp_path: Path) -> None:
    folder, _ = tuned
    assert "needs one that goes on with a text" in give("chat", folder / "merged", "--prompt", "sun", code=2).error
    said = give("export", folder / "merged", "--output", tmp_path / "m.gguf", code=2).error
    assert "BertForSequenceClassification: GGUF is written for" in said


def test_a_dense_model_goes_out_as_it_computes(tuned: Any, tmp_path: Path) -> None:
    folder, _ = tuned
    quadapt("export", folder / "merged", "--format", "hf", "--dtype", "float32", "--output", tmp_path / "hf")
    texts = ["sun good sea", "bad owl"]
    dense, merged = (load_model(str(each)) for each in (tmp_path / "hf", folder / "merged"))
    assert (_logits(dense, texts) - _logits(merged, texts)).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["RobertaForMaskedLM", "LlamaForCausalLM", "T5ForConditionalGeneration"])
def test_other_families_get_a_head_too(name: str, folder: Callable[..., Path]) -> None:
    place = folder(made(name))
    data = ("--data", reviews(place / "train.csv", 16, 0))
    quadapt("tune", place / "dense", *data, *TUNE, "--max-steps", "2", "--output", place / "adapter")
    found = quadapt("merge", place / "adapter", "--output", place / "merged")
    assert found["certificate"]["verdict"] == "exact"
    assert quadapt("eval", place / "merged", *data)["examples"] == 16


def test_a_method_over_dense_matrices_has_a_base_with_the_head(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    data = ("--data", reviews(place / "train.csv", 16, 0))
    more = ("--method", "l4q", "--bits", "4", "--max-steps", "2", "--output", place / "adapter")
    settings = [each for each in TUNE if each not in ("--rounding", "nearest")]
    quadapt("tune", place / "dense", *data, *settings, *more)
    assert (place / "adapter" / "base" / "model.safetensors").exists()
    assert quadapt("merge", place / "adapter", "--output", place / "merged")["certificate"]["verdict"] == "exact"


def test_the_dense_classifier_is_tuned_first(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    data = ("--data", reviews(place / "train.csv", 64, 0), "--eval-data", reviews(place / "test.csv", 32, 1))
    more = ("--tune-first", "lora", "--epochs", "6", "--output", place / "adapter")
    quadapt("tune", place / "dense", *data, *TUNE, *more)
    note = json.loads((place / "adapter" / "quadapt.json").read_text())
    assert note["tuned_first"]["steps"] > 0
    assert quadapt("eval", place / "adapter", "--data", place / "test.csv")["loss"] < 0.75


# --- labels of every sort ---------------------------------------------------------------------------------------------


def test_several_labels(folder: Callable[..., Path]) -> None:
    place, dice = folder(made("BertForMaskedLM")), random.Random(0)
    rows = []
    for _ in range(96):
        words = [word for word in ("good", "green", "Ann") if dice.random() < 0.5]
        rows.append({"text": " ".join(sentence(dice, words, 2)), "labels": words})
    write_lines(place / "train.jsonl", rows)
    quadapt("tune", place / "dense", "--data", place / "train.jsonl", *TUNE, "--epochs", "6", "--output", place / "a")
    config = library.load(place / "a")[0].config  # type: ignore[attr-defined]
    assert config.problem_type == "multi_label_classification"
    assert list(config.id2label.values()) == ["Ann", "good", "green"]
    figures = quadapt("eval", place / "a", "--data", place / "train.jsonl")["metrics"]
    assert figures["f1"] > 0.8
    assert set(figures) == {"accuracy", "f1", "f1_macro"}


def test_values(folder: Callable[..., Path]) -> None:
    place, dice = folder(made("BertForMaskedLM")), random.Random(0)
    rows = []
    for _ in range(96):
        count = dice.randrange(4)
        rows.append((" ".join(sentence(dice, ["good"] * count, 3)), count / 4 + 0.1))
    write_csv(place / "train.csv", ("text", "score"), rows)
    given = ("--label-column", "score", "--epochs", "8", "--output", place / "a")
    quadapt("tune", place / "dense", "--data", place / "train.csv", *TUNE, *given)
    config = library.load(place / "a")[0].config  # type: ignore[attr-defined]
    assert (config.problem_type, config.num_labels) == ("regression", 1)
    figures = quadapt("eval", place / "a", "--data", place / "train.csv")["metrics"]  # the columns are noted
    assert figures["spearman"] > 0.7
    assert figures["mse"] < np.var([value for _, value in rows])


def test_pairs_of_texts(folder: Callable[..., Path]) -> None:
    place, dice = folder(made("BertForMaskedLM")), random.Random(0)
    rows = [(" ".join(sentence(dice)), " ".join(sentence(dice)), dice.randrange(2)) for _ in range(16)]
    write_csv(place / "train.csv", ("premise", "hypothesis", "label"), rows)
    task, reading = TASKS["sequence-classification"](), Reading()
    data: Any = task.read([str(place / "train.csv")], reading)
    config: Any = task.head(made("BertForMaskedLM").config, _masked(), data, reading)
    found = task.encode(data, word_tokenizer(), config.onto(made("BertForMaskedLM").config), length=16, reading=reading)
    ids = found.data[0]["input_ids"]
    assert word_tokenizer().decode(ids) == f"[CLS] {rows[0][0]} [SEP] {rows[0][1]} [SEP]"
    assert found.data[0]["labels"] == rows[0][2]
    short = task.encode(data, word_tokenizer(), config.onto(made("BertForMaskedLM").config), length=8, reading=reading)
    assert short.report.truncated == 16
    assert max(map(len, short.data["input_ids"])) == 8


def _masked() -> Any:
    from quadapt.hf.kinds import KINDS

    return KINDS["masked-lm"]


def test_numbers_of_labels_are_in_the_order_of_their_size(tmp_path: Path) -> None:
    write_csv(tmp_path / "a.csv", ("text", "label"), [("sun", number) for number in (10, 2, 1)])
    task, reading = TASKS["sequence-classification"](), Reading()
    data: Any = task.read([str(tmp_path / "a.csv")], reading)
    head: Any = task.head(made("BertForMaskedLM").config, _masked(), data, reading)
    assert head.labels == ("1", "2", "10")


def test_a_model_keeps_its_head_unless_another_is_asked_for(tmp_path: Path) -> None:
    from quadapt.hf.kinds import KINDS

    config = made("BertForSequenceClassification", id2label={0: "no", 1: "yes"}).config
    write_csv(tmp_path / "a.csv", ("text", "label"), [("sun", "yes"), ("sea", "no")])
    task, kind = TASKS["sequence-classification"](), KINDS["sequence-classification"]
    data: Any = task.read([str(tmp_path / "a.csv")], Reading())

    def head(**asked: Any) -> Any:
        return task.head(config, kind, data, Reading(**asked))

    assert head() is None
    assert head(labels=("no", "yes")) is head(problem="single-label") is None
    assert head(labels=("yes", "no")).labels == ("yes", "no")
    assert head(problem="multi-label").problem == "multi-label"


def test_cells_of_labels() -> None:
    assert label_cell('["a", "b"]') == ["a", "b"]
    assert label_cell(" good ") == "good"
    assert label_cell(True) == "true"
    for wrong in (None, "", "  ", [1.5], {"a": 1}):
        with pytest.raises(DataError):
            label_cell(wrong)
    assert problem_in(["1", "2"], "auto") == "single-label"
    assert problem_in(["1.5", "2"], "auto") == problem_in([0.5, 1], "auto") == "regression"
    assert problem_in([["a"], []], "auto") == "multi-label"
    assert problem_in(["1.5", "x"], "auto") == "single-label"
    assert problem_in(["1", "2"], "regression") == "regression"


@pytest.mark.parametrize(
    ("problem", "labels"),
    [
        ("single_label_classification", torch.tensor([0, 2, 1])),
        ("multi_label_classification", torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])),
        ("regression", torch.tensor([0.5, -1.0, 2.0])),
    ],
)
def test_losses_are_those_of_the_model(problem: str, labels: torch.Tensor) -> None:
    model = made("BertForSequenceClassification", num_labels=1 if problem == "regression" else 3, problem_type=problem)
    inputs = word_tokenizer()(["sun", "sea owl", "fox good bad"], return_tensors="pt", padding=True)
    with torch.no_grad():
        found = model(**inputs, labels=labels)
    summed, counted = Labels(model.config).losses()(found.logits, labels).sum(0)
    assert float(summed / counted) == pytest.approx(float(found.loss), rel=1e-5)


# --- what is wrong ----------------------------------------------------------------------------------------------------


def _said(place: Path, rows: list[tuple[Any, ...]], *more: object, header: Any = ("text", "label")) -> str:
    write_csv(place / "train.csv", header, rows)
    given = ("--data", place / "train.csv", *TUNE, "--max-steps", "1", "--output", place / "out")
    said = give("tune", place / "dense", *given, *more, code=2).error
    assert not (place / "out").exists()
    return said


def test_errors_of_labels(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    both = [("sun", "good"), ("sea", "bad")]
    assert "no column has the label: the columns are text, stars" in _said(place, both, header=("text", "stars"))
    assert "'mark' is none of them. Name it with --label-column" in _said(place, both, "--label-column", "mark")
    assert "every row has the label good" in _said(place, [("sun", "good"), ("sea", "good")])
    assert "has the labels bad, which are not among those given: good, fine" in _said(
        place, both, "--labels", "good,fine"
    )
    assert "train.csv:3: has no label" in _said(place, [("sun", "good"), ("sea", "")], "--strict")
    assert "no column has the text" in _said(place, [("a", "b", "good"), ("a", "b", "bad")], header=("x", "y", "label"))
    assert "is none of them. Name it with --text-column" in _said(place, both, "--text-column", "prose")


def test_labels_that_a_model_does_not_know(folder: Callable[..., Path]) -> None:
    model = made("BertForSequenceClassification", id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    place = folder(model)
    said = _said(place, [("sun", "yes"), ("sea", "perhaps")])
    assert "train.csv:3: the model does not know the label 'perhaps'. It knows no, yes" in said
    write_csv(place / "test.csv", ("text", "label"), [("sun", "maybe")])
    assert "'maybe'" in give("eval", place / "dense", "--data", place / "test.csv", code=2).error
    write_csv(place / "test.csv", ("text", "label"), [("sun", "1"), ("sea", "no")])
    assert quadapt("eval", place / "dense", "--data", place / "test.csv")["examples"] == 2


def test_settings_that_do_not_go_with_the_task(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    both = [("sun", "good"), ("sea", "bad")]
    assert "packing=True has no meaning for the task sequence-classification" in _said(place, both, "--packing")
    said = _said(place, both, "--objective", "kl")
    assert "objective='kl' compares what two models say about each token" in said
    write_csv(place / "train.csv", ("text", "label"), both)
    bare = ("--data", place / "train.csv", "--max-steps", "1", "--output", place / "out")
    said = give("tune", place / "dense", *bare, "--task", "seq2seq", code=2).error
    assert "takes models for seq2seq, and this one is for masked-lm" in said or "rows" in said


def test_a_quantized_model_gets_no_new_head(folder: Callable[..., Path]) -> None:
    place = folder(made("BertForMaskedLM"))
    quadapt("quantize", place / "dense", "--rounding", "nearest", "--group-size", "16", "--output", place / "q")
    write_csv(place / "train.csv", ("text", "label"), [("sun", "good"), ("sea", "bad")])
    given = ("--data", place / "train.csv", "--task", "sequence-classification", "--output", place / "out")
    assert (
        "is quantized, and has no head for sequence-classification" in give("tune", place / "q", *given, code=2).error
    )
