"""Training goes on from an adapter over the same base; what cannot work is refused before the work begins."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import SHORT, give, logits, quadapt
from safetensors.torch import load_file

from quadapt import load

TOKENS = ("--seq-len", "32", "--batch-size", "2", "--gradient-accumulation", "1", "--lr", "0.02", "--max-steps", "2")
Shelf = dict[str, dict[str, Any]]


@pytest.mark.usefixtures("here", "shelf")
@pytest.mark.parametrize("name", ["adapter", "qlora"])
def test_it_goes_on_from_an_adapter(name: str, tmp_path: Path) -> None:
    before = json.loads(Path(name, "quadapt.json").read_text())
    said = quadapt("tune", name, "--data", "sums.jsonl", *TOKENS, "--output", tmp_path / "more")
    note = json.loads((tmp_path / "more" / "quadapt.json").read_text())
    assert note["from"] == {"adapter": str(Path(name).resolve()), "steps": before["steps"]}
    assert (note["method"], note["recipe"]["rank"]) == (before["method"], 2)
    assert said["steps"] == 2
    assert note["base"]["fingerprint"] == before["base"]["fingerprint"]
    assert (tmp_path / "more" / note["base"]["relative"]).resolve() == Path(name, "base").resolve()
    assert not (tmp_path / "more" / "base").exists()
    assert "goes on from the adapter" in (tmp_path / "more" / "README.md").read_text()
    old, new = (load_file(Path(folder, "adapter_model.safetensors")) for folder in (name, tmp_path / "more"))
    assert old.keys() == new.keys()
    assert not torch.equal(logits(load(str(tmp_path / "more"))[0]), logits(load(name)[0]))
    still = quadapt(
        "tune",
        name,
        "--data",
        "sums.jsonl",
        *TOKENS[:-4],
        "--lr",
        "1e-12",
        "--max-steps",
        "1",
        "--output",
        tmp_path / "still",
    )
    assert still["trainable_parameters"] == said["trainable_parameters"]
    assert torch.allclose(logits(load(str(tmp_path / "still"))[0]), logits(load(name)[0]), atol=1e-4)


@pytest.mark.usefixtures("here", "shelf")
def test_it_goes_on_from_an_adapter_of_an_earlier_version(tmp_path: Path) -> None:
    """Whose note has a value for every setting, those of other methods' pieces included."""
    shutil.copytree("over-q4", tmp_path / "old")
    note = json.loads((tmp_path / "old" / "quadapt.json").read_text())
    note["settings"] |= {"fisher": False, "keep_targets": True, "objective": "cross-entropy", "dense_steps": None}
    (tmp_path / "old" / "quadapt.json").write_text(json.dumps(note))
    said = quadapt("tune", tmp_path / "old", "--data", "sums.jsonl", *TOKENS, "--output", tmp_path / "more")
    assert said["steps"] == 2


@pytest.mark.usefixtures("here", "shelf")
@pytest.mark.parametrize("method", ["l4q", "loftq", "lq-lora"])
def test_grids_and_first_factors_go_on_too(method: str, tmp_path: Path) -> None:
    quadapt(
        "tune",
        "dense",
        "--data",
        "sums.jsonl",
        "--method",
        method,
        "--group-size",
        "32",
        "--max-steps",
        "2",
        *SHORT,
        "--output",
        tmp_path / "one",
    )
    quadapt("tune", tmp_path / "one", "--data", "sums.jsonl", *TOKENS, "--output", tmp_path / "two")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    first = [name for name in one if "lora_first" in name or "lora_start" in name]
    assert first
    assert all(torch.equal(one[name], two[name]) for name in first), "what was frozen stays as it was"
    assert any(not torch.equal(one[name], two[name]) for name in one)
    again = quadapt("tune", tmp_path / "two", "--data", "sums.jsonl", *TOKENS, "--output", tmp_path / "three")
    assert again["from"]["steps"] == 4


@pytest.mark.usefixtures("here", "shelf")
def test_what_an_adapter_fixes_is_not_set_otherwise(tmp_path: Path) -> None:
    common = ("tune", "qlora", "--data", "sums.jsonl", "--output", tmp_path / "more")
    for setting in (("--rank", "3"), ("--method", "qa-lora"), ("--bits", "2"), ("--target-modules", "q_proj")):
        said = give(*common, *setting, code=2)
        assert "that is fixed" in said.error, setting
        assert setting[1] in said.error
    assert "train_start=False" in give(*common, "--no-train-start", code=2).error
    assert "no meaning here" in give(*common, "--calibration-length", "8", code=2).error
    assert "has been trained with its quantizer" in give(*common, "--dense-steps", "2", code=2).error
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("--report-to", "dvclive"), "needs a package that is not installed"),
        (("--report-to", "nowhere"), "report_to='nowhere' is unknown"),
        (("--keep", "best"), "held-out data. Give --eval-data"),
        (("--early-stopping", "2"), "held-out data. Give --eval-data"),
        (("--train-tokens", "<nothing>"), "no token '<nothing>'"),
        (("--calibration-length", "5000", "--rounding", "gptq"), "too few for one block of 5000"),
    ],
)
def test_refused_before_the_work(settings: tuple[str, ...], message: str, tmp_path: Path) -> None:
    said = give("tune", "dense", "--data", "sums.jsonl", *SHORT, "--output", tmp_path / "out", *settings, code=2)
    assert message in said.error
    assert not (tmp_path / "out").exists()


def test_a_table_of_positions_is_a_limit(away: Path) -> None:
    from transformers import OPTConfig, OPTForCausalLM

    about = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 32}
    OPTForCausalLM(OPTConfig(**about, word_embed_proj_dim=32, max_position_embeddings=40)).save_pretrained("opt")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(f"dense/{name}", f"opt/{name}")
    common = ("tune", "opt", "--data", "sums.jsonl", "--method", "peqa", "--max-steps", "1", "--output", "out")
    said = give(*common, "--seq-len", "41", code=2)
    assert "seq_len=41: the model has a table of 40 positions (model.decoder.embed_positions)" in said.error
    said = give(*common, "--seq-len", "32", "--packing", code=2)
    assert "packing: OPTForCausalLM does not keep packed examples apart" in said.error
    assert not (away / "out").exists()
    assert not (away / "out.partial").exists()


def test_few_examples_calibrate_on_what_there_is(away: Path) -> None:
    (away / "few.jsonl").write_text('{"prompt": "2 + 2 =", "completion": " 4"}\n' * 3)
    said = give(
        "tune", "dense", "--data", "few.jsonl", "--method", "qa-lora", "--max-steps", "1", "--output", "out", code=0
    )
    assert "calibrating on 1 sequences of 30 tokens of few.jsonl, which is all there is" in said.err


def test_rows_of_tokens_train_where_the_head_is_blind(away: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("dense")
    model.get_output_embeddings().weight.data[[0, 7, 8]] = 0.01 * torch.ones(64)
    model.save_pretrained("blind")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(away / "dense" / name, away / "blind" / name)
    common = ("tune", "blind", "--data", "sums.jsonl", "--method", "qlora", *SHORT, "--max-steps", "12", "--output")
    said = give(*common, "frozen", code=0)
    assert "the output row of '<end>' (token 0), which bears loss, is the same as that of 2 other tokens" in said.err
    assert "cannot go below ln 3 = 1.10" in said.err
    said = give(*common, "rows", "--train-tokens", "<end>", code=0)
    assert "the same as that of" not in said.err
    adapted, dense = load("rows")[0], AutoModelForCausalLM.from_pretrained("blind")
    here, there = logits(adapted), logits(dense)
    assert not torch.allclose(here[:, 0], here[:, 7], atol=1e-3)
    assert torch.equal(there[:, 0], there[:, 7])
    more = quadapt("tune", "rows", "--data", "sums.jsonl", *TOKENS, "--output", "more")
    assert more["trainable_parameters"] == json.loads(Path("rows/quadapt.json").read_text())["trainable_parameters"]
