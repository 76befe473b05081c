"""Held-out loss per token, the best state kept, early stopping, and packing only where attention does not cross."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file

import quadapt
from quadapt.data import Collator, check_packing
from quadapt.errors import ConfigError
from quadapt.methods import Recipe
from quadapt.train import Run, train
from quadapt.train.trainer import losses_by_sequence

RECIPE = Recipe(learning_rate=0.03, rank=4, alpha=8, schedule="constant", warmup_ratio=0.0, source="a test")


def sequences(count: int, *, seed: int, lengths: tuple[int, int] = (4, 20)) -> Dataset:
    """Random tokens; the first third of each sequence bears no loss."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(*lengths, (1,), generator=random))
        ids = torch.randint(3, 96, (length,), generator=random).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 3 + 1) + ids[length // 3 + 1 :]})
    return Dataset.from_list(rows)


@pytest.fixture
def tuned(tiny_llama: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """`tuned(folder, method=, stop=, **run)`: a fresh model, trained; interrupted after the step `stop`."""

    def work(
        folder: str = "run",
        *,
        method: str = "qlora",
        stop: int = 0,
        recipe: Recipe = RECIPE,
        also: tuple[str, ...] = (),
        **about: Any,
    ) -> Any:
        grid: dict[str, Any] = {"rounding": "nearest", "rank": 4, "alpha": 8, "group_size": 32}
        model = quadapt.prepare(tiny_llama(), method=method, train_also=also, **grid)

        def tick(step: int, *_: Any) -> None:
            if step == stop:
                raise KeyboardInterrupt

        settings: dict[str, Any] = {"max_steps": 8, "batch_size": 4, "eval_steps": 2, "save_steps": 3, **about}
        settings = {"gradient_accumulation": 1, "keep": "last", **settings}
        held = sequences(6, seed=1)
        run = Run(recipe=recipe, **settings)
        found = train(
            model, sequences(12, seed=0), run, tmp_path / folder, collate=Collator(0), eval_data=held, tick=tick
        )
        return model.eval(), found

    return work


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 35)[None]).logits


def test_held_out_loss_is_per_token_whatever_the_batch(tuned: Callable[..., Any]) -> None:
    model, one = tuned("one", max_steps=1, batch_size=1, recipe=Recipe(**{**vars(RECIPE), "learning_rate": 1e-12}))
    _, five = tuned("five", max_steps=1, batch_size=5, recipe=Recipe(**{**vars(RECIPE), "learning_rate": 1e-12}))
    total, tokens = 0.0, 0
    for row in sequences(6, seed=1):
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            log_probabilities = model(input_ids=ids).logits[0].log_softmax(-1)
        for at, label in enumerate(row["labels"][1:]):
            if label != -100:
                total -= float(log_probabilities[at, label])
                tokens += 1
    assert one.eval_loss == pytest.approx(total / tokens, rel=1e-5)
    assert five.eval_loss == pytest.approx(one.eval_loss, rel=1e-5)


def test_losses_by_sequence_skip_what_bears_none() -> None:
    scores = torch.randn(2, 3, 7)
    labels = torch.tensor([[5, 1, 2], [5, -100, 3]])
    found = losses_by_sequence(scores, labels)
    assert found[:, 1].tolist() == [2, 1]
    assert found[1, 0] == pytest.approx(-float(scores[1, 1].log_softmax(-1)[3]), rel=1e-6)


def test_the_best_state_is_the_result(tuned: Callable[..., Any]) -> None:
    model, found = tuned("best", keep="best")
    measured = {entry["step"]: entry["eval_loss"] for entry in found.losses if "eval_loss" in entry}
    assert sorted(measured) == [2, 4, 6, 8]
    best = min(measured, key=lambda step: measured[step])
    assert best < 8, "the example is to overfit"
    assert (found.kept_step, found.eval_loss) == (best, measured[best])
    assert found.last_eval_loss == measured[8] > found.eval_loss
    short, _ = tuned("short", max_steps=best)
    assert torch.equal(logits(model), logits(short))
    last, about = tuned("last", keep="last")
    assert about.kept_step == 8
    assert about.eval_loss == measured[8]
    assert not torch.equal(logits(last), logits(model))


@pytest.mark.parametrize(("method", "stops"), [("qlora", (7, 8)), ("l4q", (5,)), ("lota-qaf", (5, 8))])
def test_interrupted_it_keeps_the_same_state(method: str, stops: tuple[int, ...], tuned: Callable[..., Any]) -> None:
    settings = {"method": method, "keep": "best", "recipe": Recipe(**{**vars(RECIPE), "grid_learning_rate": 0.05})}
    model, whole = tuned("whole", **settings)
    for stop in stops:
        with pytest.raises(KeyboardInterrupt):
            tuned(f"stop{stop}", stop=stop, **settings)
        again, found = tuned(f"stop{stop}", **settings)
        assert (found.kept_step, found.eval_loss, found.steps) == (whole.kept_step, whole.eval_loss, whole.steps), stop
        assert torch.equal(logits(again), logits(model)), stop


def test_signs_and_adamw_are_gone_on_with_together(tuned: Callable[..., Any]) -> None:
    """Ternary factors and the norms beside them: every number that trains, bit for bit."""
    settings = {"method": "lota-qaf", "also": ("norms",), "save_steps": 1}
    model, _ = tuned("whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        tuned("halves", stop=5, **settings)
    again, found = tuned("halves", **settings)
    assert found.steps == 8
    before = dict(tuned("none", method="lota-qaf", also=("norms",), max_steps=1)[0].named_parameters())
    moved = set()
    for (name, one), (_, other) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(one, other), name
        if one.requires_grad and not torch.equal(one, before[name]):
            moved |= {part for part in ("lora_A", "lora_B", "norm") if part in name}
    assert moved == {"lora_A", "lora_B", "norm"}


def test_ternary_factors_stay_ternary_whatever_they_are_saved_as(tuned: Callable[..., Any], tmp_path: Path) -> None:
    model, found = tuned("ternary", method="lota-qaf")
    assert found.steps == 8
    held = {name: tensor for name, tensor in model.named_parameters() if "lora_B" in name}
    assert all(tensor.any() for tensor in held.values())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        copy.deepcopy(model).to(dtype).save_pretrained(tmp_path / "saved")
        saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
        assert all(set(tensor.unique().tolist()) <= {-1.0, 0.0, 1.0} for tensor in saved.values())
        for name, tensor in held.items():
            assert torch.equal(saved[name.replace(".default", "")].float(), tensor)
    merged, certificate = quadapt.merge(model)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged), logits(tuned("ternary", method="lota-qaf")[0]))


def test_it_stops_early_and_stays_stopped(tuned: Callable[..., Any]) -> None:
    settings = {"keep": "best", "early_stopping": 2, "eval_steps": 1, "save_steps": 4, "max_steps": 30}
    model, found = tuned("early", **settings)
    measured = [entry["eval_loss"] for entry in found.losses if "eval_loss" in entry]
    best = measured.index(min(measured))
    assert found.steps == len(measured) == best + 3 < 30
    again, rerun = tuned("early", stop=found.steps + 1, **settings)
    assert (rerun.steps, rerun.kept_step, rerun.eval_loss) == (found.steps, found.kept_step, found.eval_loss)
    assert torch.equal(logits(again), logits(model))


def test_done_is_done(tuned: Callable[..., Any]) -> None:
    model, found = tuned("done", keep="last")
    again, rerun = tuned("done", keep="last", stop=9)
    assert rerun.steps == found.steps == 8
    assert (rerun.final_loss, rerun.eval_loss) == (found.final_loss, found.eval_loss)
    assert torch.equal(logits(again), logits(model))


def test_steps_before_the_quantizer_trains_do_not_count(tuned: Callable[..., Any]) -> None:
    recipe = Recipe(**{**vars(RECIPE), "dense_steps": 5})
    _, found = tuned("dense", method="l4q", keep="best", recipe=recipe, eval_steps=1)
    measured = {entry["step"]: entry["eval_loss"] for entry in found.losses if "eval_loss" in entry}
    assert found.kept_step == min((step for step in measured if step >= 5), key=lambda step: measured[step])


@pytest.mark.parametrize("about", [{"keep": "best"}, {"early_stopping": 1}])
def test_without_held_out_data_there_is_no_best(
    about: dict[str, Any], tiny_llama: Callable[..., Any], tmp_path: Path
) -> None:
    model = quadapt.prepare(tiny_llama(), method="qlora", rank=2, group_size=32)
    run = Run(recipe=RECIPE, max_steps=1, **about)
    with pytest.raises(ConfigError, match=r"held-out data, and there is none"):
        train(model, sequences(2, seed=0), run, tmp_path, collate=Collator(0))


def test_evaluations_are_spread_over_the_run_where_they_decide() -> None:
    assert Run(recipe=RECIPE, keep="best").evaluations(95) == 10
    assert Run(recipe=RECIPE, early_stopping=1).evaluations(4) == 1
    assert Run(recipe=RECIPE).evaluations(95) == 0
    assert Run(recipe=RECIPE, keep="best", eval_steps=7).evaluations(95) == 7


# --- packing ----------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def family(name: str, attention: str) -> Any:
    import transformers

    about = {
        "GPTNeoX": {"intermediate_size": 48, "max_position_embeddings": 40},
        "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 40},
        "Bloom": {},
    }[name]
    config = getattr(transformers, f"{name}Config")(**SIZES, **about)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_read_positions_may_be_packed(
    attention: str, dtype: torch.dtype, tiny_llama: Callable[..., Any]
) -> None:
    check_packing(tiny_llama(dtype=dtype, attn_implementation=attention))
    check_packing(family("GPTNeoX", attention).to(dtype))


@pytest.mark.parametrize(("name", "attention"), [("OPT", "sdpa"), ("OPT", "eager"), ("Bloom", "eager")])
def test_models_that_do_not_are_refused_by_name(name: str, attention: str) -> None:
    model = family(name, attention).train()
    with pytest.raises(ConfigError, match=f"{name}ForCausalLM does not keep packed examples apart"):
        check_packing(model)
    assert all(module.training for module in model.modules())


def test_training_tries_packed_data_first(tmp_path: Path) -> None:
    model = quadapt.prepare(family("OPT", "sdpa"), method="qlora", rank=2, group_size=32)
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, -100, 8], "position_ids": [0, 1, 0, 1]}] * 2
    with pytest.raises(ConfigError, match="packing: OPTForCausalLM"):
        train(model, Dataset.from_list(rows), Run(recipe=RECIPE, max_steps=1), tmp_path, collate=Collator(0))
    assert not any(tmp_path.iterdir())
