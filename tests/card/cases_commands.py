"""The commands on a card: `--device`, `--offload`, and what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import byte_tokenizer, digests, give, quadapt, write_data
from models import llama
from pretend import CARD, ledger

import quadapt as library
from quadapt.report import memory

QUANTIZE = ("quantize", "dense", "--calibration-data", "story.txt", "--calibration-length", "32", "--bits", "3")
SIZES: dict[str, Any] = {"vocab_size": 258, "max_position_embeddings": 128, "bos_token_id": None, "eos_token_id": 0}
TABLES = 4096
"""Bytes of the tables of constants that stay on a device once it has been used."""


@pytest.fixture(autouse=True)
def _place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUADAPT_CACHE", str(tmp_path / "cache"))
    llama(4, **SIZES).save_pretrained("dense")
    byte_tokenizer().save_pretrained("dense")
    write_data(tmp_path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that is too small for the model."""
    monkeypatch.setattr(memory, "machine_bytes", lambda device: (10**12, 10**5 if "card" in device else 10**12))


def weights(folder: str) -> dict[str, str]:
    return {name: value for name, value in digests(Path(folder)).items() if name.startswith("model")}


def test_a_model_kept_on_the_cpu_gives_the_same_file() -> None:
    """As without the card, since it computes as the CPU does. (transformers cannot save from a pretended device.)"""
    quadapt(*QUANTIZE, "--device", "cpu", "--output", "here")
    ledger.reset()
    quadapt(*QUANTIZE, "--device", "card", "--offload", "cpu", "--output", "there")
    assert weights("there") == weights("here") != {}
    assert ledger.operators > 1000
    assert ledger.now <= TABLES


@pytest.mark.usefixtures("small")
def test_what_does_not_fit_is_kept_on_the_cpu_and_that_is_said() -> None:
    said = give(*QUANTIZE, "--device", "card", "--output", "auto", code=0).err
    assert "card has 0.0 GB free" in said
    assert "the model stays on the CPU, one block at a time goes there (as with --offload cpu)" in said
    dry = give(*QUANTIZE, "--device", "card", "--output", "new", "--dry-run", code=0)
    assert "the model stays on the CPU" in dry.err
    whole = quadapt(*QUANTIZE, "--device", "card", "--offload", "none", "--output", "new", "--dry-run")
    apart = quadapt(*QUANTIZE, "--device", "card", "--offload", "cpu", "--output", "new", "--dry-run")
    assert apart["memory"]["weights"] < 0.4 * whole["memory"]["weights"]


def test_what_fits_goes_to_the_card_without_a_word() -> None:
    auto, none = (
        give(*QUANTIZE, "--device", "card", "--offload", offload, "--output", "new", "--dry-run", "--json", code=0)
        for offload in ("auto", "none")
    )
    assert "GB free" not in auto.err
    assert auto.json["memory"]["weights"] == none.json["memory"]["weights"]


def test_a_full_card_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ..")

    with monkeypatch.context() as patch:
        patch.setattr("quadapt.jobs.quantize.quantize_model", full)
        said = give(*QUANTIZE, "--device", "card", "--offload", "none", "--output", "new", code=2).error
        assert "card is out of memory. Use --offload cpu, a smaller --calibration-length" in said
    quadapt(*QUANTIZE, "--device", "card", "--offload", "cpu", "--output", "new")  # goes on with the same folder


def test_where_nothing_is_quantized_there_is_nothing_to_keep_off_the_card() -> None:
    quadapt("quantize", "dense", "--rounding", "nearest", "--output", "q4")
    tune = ("tune", "--data", "story.txt", "--device", "card", "--offload", "cpu", "--output", "new")
    said = give(*tune, "dense", "--method", "l4q", code=2).error
    assert "offload='cpu' says where the dense model is while it is quantized, and l4q trains over it" in said
    assert "'q4' is quantized already. Leave it out" in give(*tune, "q4", code=2).error


def test_a_plan_is_made_on_the_card_with_the_model_on_the_cpu() -> None:
    llama(2, **SIZES).save_pretrained("dense")  # two layers show it: thousands of operators for each
    fisher = ("--fisher", "story.txt", "--calibration-length", "32", "--calibration-sequences", "9")
    least = ("plan", "dense", "--budget", "3.5", "--rank", "2", "--target-modules", "down_proj", *fisher)
    ledger.reset()
    found = quadapt(*least, "--device", "card", "--output", "there.json")
    assert ledger.operators > 1000
    assert ledger.now <= TABLES
    here = quadapt(*least, "--device", "cpu", "--output", "here.json", "--cache", "other")
    assert found["layers"] == here["layers"]


@pytest.mark.parametrize("method", ["qa-lora", "quailora", "l4q"])
def test_a_model_prepared_by_name_ends_on_the_card(method: str) -> None:
    settings = {} if method == "l4q" else {"offload": "cpu"}
    calibration = "" if method == "l4q" else "story.txt"
    model = library.prepare("dense", method=method, calibration=calibration, device="card", rank=2, **settings)
    assert {each.device for each in model.parameters()} == {CARD}
    ids = torch.arange(40, 72, device=CARD)[None]
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_model_in_memory_stays_where_it_is() -> None:
    model = llama()
    ledger.reset()
    text = [torch.randint(3, 96, (2, 24)) for _ in range(2)]
    prepared = library.prepare(model, calibration=text, device="card", offload="cpu", rank=2)
    assert {each.device.type for each in prepared.parameters()} == {"cpu"}
    assert ledger.operators > 1000
    assert ledger.now <= TABLES
