"""Which layers get adapters, and of which rank, by the settings of `quadapt.prepare` and of the command line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

sys.path[:0] = [str(Path(__file__).parents[1] / "cli")]

from commands import byte_tokenizer, give  # noqa: E402
from commands import quadapt as quadapt_command  # noqa: E402

import quadapt  # noqa: E402
from quadapt.config.spec import by_layer  # noqa: E402
from quadapt.errors import ConfigError  # noqa: E402
from quadapt.hf.peft_layer import adapted_layers  # noqa: E402
from quadapt.methods import method_named  # noqa: E402
from quadapt.model.select import matches  # noqa: E402


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=torch.arange(2, 42)[None]).logits


def prepared(model: Any, **settings: Any) -> Any:
    adapted = quadapt.prepare(model, **{"method": "qa-lora", "rounding": "nearest", "rank": 2, "alpha": 4, **settings})
    random = torch.Generator().manual_seed(1)
    for layer in adapted_layers(adapted).values():
        layer.params("default")["B"].data.normal_(std=0.05, generator=random)
    return adapted


def shapes(model: Any) -> dict[str, tuple[int, float]]:
    """Rank and scaling of each adapted layer, by the end of its name."""
    return {
        name.removeprefix("model.layers."): (len(layer.params("default")["A"]), layer.scaling["default"])
        for name, layer in adapted_layers(model).items()
    }


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("all-linear", True),
        ("q_proj", True),
        ("layers.1", True),
        ("layers.11", False),
        (r".*\.self_attn\.(q|v)_proj", True),
        (r"(q|v)_proj", False),  # of a whole name, as in PEFT
        (r".*\.[2-9]\..*", False),
    ],
)
def test_layers_are_named_in_part_by_regular_expressions_and_all_at_once(pattern: str, found: bool) -> None:
    assert matches("model.layers.1.self_attn.q_proj", pattern) is found


def test_what_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'\*proj' is no regular expression \(nothing to repeat"):
        matches("model.layers.1.self_attn.q_proj", "*proj")


@pytest.mark.parametrize("method", ["qa-lora", "l4q"])
def test_layers_have_their_own_ranks_and_alphas_and_merge_exactly(method: str, tiny_llama: Callable[..., Any]) -> None:
    model = prepared(
        tiny_llama(),
        method=method,
        group_size=32,
        target_modules=(r".*\.(q|k|o|up)_proj",),
        exclude_modules=("layers.1.self_attn.k_proj",),
        rank_pattern={"q_proj": 1, "layers.0.mlp": 3},
        alpha_pattern={"o_proj": 6},
    )
    found = shapes(model)
    assert set(found) == {
        f"{at}.{name}"
        for at in (0, 1)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
    } - {"1.self_attn.k_proj"}
    assert found["0.self_attn.q_proj"] == found["1.self_attn.q_proj"] == (1, 4.0)
    assert found["0.mlp.up_proj"] == (3, 4 / 3)
    assert found["1.mlp.up_proj"] == found["0.self_attn.k_proj"] == (2, 2.0)
    assert found["0.self_attn.o_proj"] == (2, 3.0)
    adapted = logits(model)
    merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), adapted)


def test_rslora_divides_by_the_root_of_the_rank(tiny_llama: Callable[..., Any]) -> None:
    model = prepared(tiny_llama(), use_rslora=True, rank_pattern=["q_proj=1"])
    assert {scaling for _, scaling in shapes(model).values()} == {4.0, 4 / 2**0.5}
    adapted = logits(model)
    merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), adapted)


def test_stock_peft_reads_what_is_exported(tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    model = prepared(
        tiny_llama(), method=method_named("qa-lora", offsets="fp32"), rank_pattern=["q_proj=1"], use_rslora=True
    )
    adapted = logits(model)
    quadapt.export(model, byte_tokenizer(), tmp_path / "lora", format="lora")
    again = PeftModel.from_pretrained(model.unload(), tmp_path / "lora")
    assert torch.allclose(logits(again), adapted, atol=1e-4)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank_pattern": ["q_proj"]}, r"rank_pattern='q_proj': must be NAME=a whole number above 0"),
        ({"rank_pattern": ["q_proj=0"]}, r"must be NAME=a whole number above 0"),
        ({"alpha_pattern": ["q_proj=nan"]}, r"must be NAME=a number above 0"),
        ({"rank_pattern": ["qproj=4"]}, r"'qproj' matches no quantized layer"),
        ({"exclude_modules": ("all-linear",)}, r"exclude_modules leaves no layer"),
        ({"method": "loftq", "use_rslora": True}, r"start='loftq' is fitted with one rank and scaling"),
    ],
)
def test_what_has_no_meaning_is_refused(settings: dict[str, Any], words: str, tiny_llama: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match=words):
        prepared(tiny_llama(), **settings)


def test_numbers_by_layer() -> None:
    assert by_layer("rank_pattern", ["a=b=3", "c=4"]) == {"a=b": 3, "c": 4}
    assert by_layer("alpha_pattern", ["a=0.5"]) == {"a": 0.5}


def test_the_command_line_takes_them(
    tiny_llama: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_llama(vocab_size=258, max_position_embeddings=128, eos_token_id=0).save_pretrained("dense")
    byte_tokenizer().save_pretrained("dense")
    Path("story.txt").write_text("The fox saw the sea and swam. " * 40)
    given = ("--data", "story.txt", "--method", "qa-lora", "--rounding", "nearest", "--rank", "2", "--max-steps", "1")
    found = quadapt_command("tune", "dense", *given, "--target-modules", "all-linear", "--output", "all")
    plain = quadapt_command("tune", "dense", *given, "--output", "plain")
    assert found["trainable_parameters"] == plain["trainable_parameters"]
    shaped = ("--target-modules", r".*\.(q|up)_proj", "--exclude-modules", "layers.0.mlp", "--rank-pattern", "q_proj=1")
    quadapt_command("tune", "dense", *given, *shaped, "--use-rslora", "--output", "some")
    model, _ = quadapt.load("some")
    assert {name: rank for name, (rank, _) in shapes(model).items()} == {
        "0.self_attn.q_proj": 1,
        "1.self_attn.q_proj": 1,
        "1.mlp.up_proj": 2,
    }
    assert quadapt_command("merge", "some", "--output", "merged")["certificate"]["verdict"] == "exact"
    refused = give("tune", "some", "--data", "story.txt", "--rank-pattern", "q_proj=4", "--output", "more")
    assert refused.code != 0
    assert "rank_pattern" in refused.error
    quadapt_command("tune", "some", "--data", "story.txt", "--max-steps", "1", "--output", "more")
    assert shapes(quadapt.load("more")[0]) == shapes(model)
