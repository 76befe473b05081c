"""Any method made in Python works end to end, exactly where it promises to, or is refused before a model is loaded."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import quadapt
from quadapt.config.spec import Spec
from quadapt.errors import ConfigError
from quadapt.methods import Method, Recipe
from quadapt.nn.adapters import ADAPTERS
from quadapt.nn.objective import OBJECTIVES
from quadapt.nn.starts import STARTS
from quadapt.quant.format import Format
from quadapt.quant.ranges import RANGES
from quadapt.quant.rounding import ROUNDINGS
from quadapt.quant.storage import STORAGES, Storage

IDS = torch.randint(3, 96, (4, 32), generator=torch.Generator().manual_seed(0))
DRAWS = 84
LEAST_THAT_WORK = 15


def drawn(seed: int) -> Method | str:
    """A method with a piece from every axis, or why there is none."""
    pick = random.Random(seed)
    try:
        levels = pick.choice(["int", "int", "nf"])
        zero = pick.choice(["none", "integer", "float", "float"] if levels == "int" else ["none", "none", "float"])
        format = Format(
            levels=levels, bits=pick.choice([2, 3, 4, 5, 8]), group_size=pick.choice([16, 32, -1]), zero=zero
        )
        plain = pick.random() < 0.8  # the storage that fits, for else nearly all draws are refused for it alone
        block = next(
            (each for each in STORAGES.values() if each.for_scales and each.demands and each.serves(format.bits)), None
        )
        if levels == "int" and block is not None and pick.random() < 0.2:  # the super-blocks for this width
            format = replace(format, **block.demands)
            plain, made = True, Storage.floating(block.name, format.zero)
        else:
            made = Storage.default(format)
        storage = made if plain else Storage(scales=pick.choice(list(STORAGES)), offsets=pick.choice(list(STORAGES)))
        kind = ROUNDINGS[pick.choice(list(ROUNDINGS))]
        about: dict[str, Any] = {"range": pick.choice(list(RANGES))} if "range" in kind.__dataclass_fields__ else {}
        if "static_groups" in kind.__dataclass_fields__:
            about |= {"static_groups": pick.random() < 0.5, "act_order": pick.random() < 0.3}
        if "epochs" in kind.__dataclass_fields__:
            about |= {"epochs": 1}
        return Method(
            format=format,
            storage=storage,
            rounding=kind(**about),
            adapter=ADAPTERS[pick.choice(list(ADAPTERS))](),
            start=STARTS[pick.choice([*6 * ["zero"], *STARTS])](),
            objective=OBJECTIVES[pick.choice(list(OBJECTIVES))](),
            recipe=Recipe(
                learning_rate=0.01,
                rank=pick.choice([1, 2, 3]),
                alpha=pick.choice([2.0, 4.0]),
                dropout=pick.choice([*6 * [0.0], 0.1]),
                dense_steps=pick.choice([*7 * [0], 1]),
            ),
        )
    except ConfigError as error:
        return str(error)


def refusal(found: Method | str) -> str | None:
    """What is said of a draw that cannot be: known from the method alone."""
    if isinstance(found, str):
        return found
    try:
        Spec.of(found)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize("seed", range(DRAWS))
def test_a_random_method_works_or_is_refused_at_once(seed: int, tiny_llama: Callable[..., Any], tmp_path: Path) -> None:
    found = drawn(seed)
    words = refusal(found)
    if words is not None:
        assert any(advice in words for advice in ("Use ", "Leave ", "Give ", "Train ")), words
        return
    assert isinstance(found, Method)
    wide = (
        {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 1}
        if found.storage.of_scales.demands
        else {}
    )  # super-blocks
    model = quadapt.prepare(tiny_llama(**wide), method=found, calibration=[IDS])
    optimizer = torch.optim.SGD([each for each in model.parameters() if each.requires_grad], lr=0.02)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    model.eval()
    with torch.no_grad():
        trained = model(input_ids=IDS).logits
        assert torch.isfinite(trained).all()
        model.save_pretrained(tmp_path / "adapter")
        again = _loaded(model, tmp_path / "adapter")
        torch.testing.assert_close(again(input_ids=IDS).logits, trained, rtol=1e-5, atol=1e-5)
        exact = found.adapter.exactness == "exact"
        merged, certificate = quadapt.merge(model, probe=IDS, requantize=found.adapter.exactness == "none")
        assert certificate.verdict in (("exact",) if exact else ("equivalent", "lossy", "exact"))
        if exact:
            assert torch.equal(merged(input_ids=IDS).logits, trained)
    merged.save_pretrained(tmp_path / "merged")
    quadapt.export(merged, _tokenizer(), tmp_path / "dense", format="hf", dtype="float32")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    with torch.no_grad():
        want = merged(input_ids=IDS).logits
        torch.testing.assert_close(dense(input_ids=IDS).logits, want, rtol=1e-3, atol=1e-3)


def _tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))


def _loaded(model: Any, folder: Path) -> Any:
    """The adapter over a copy of its base, by PEFT's own loader."""
    return PeftModel.from_pretrained(copy.deepcopy(model).unload(), folder).eval()


def test_enough_of_them_work() -> None:
    working = [found for found in map(drawn, range(DRAWS)) if refusal(found) is None]
    assert len(working) >= LEAST_THAT_WORK
    assert any(isinstance(found, Method) and found.storage.of_scales.demands for found in working)
    assert len({found.adapter.kind for found in working if isinstance(found, Method)}) >= 6
