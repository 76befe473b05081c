"""Methods: settings land where they belong, contradictions are refused, and the examples of the docstrings run."""

from __future__ import annotations

import doctest
from dataclasses import replace

import pytest

import quadapt.methods as package
from quadapt.config.spec import Spec
from quadapt.errors import ConfigError
from quadapt.methods import METHODS, Method, Recipe, method_named, qa_lora
from quadapt.nn.adapters import L4Q, LoRA
from quadapt.nn.starts import LQ
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is(name: str) -> None:
    words = METHODS[name].__doc__ or ""
    for part in ("Args:", "Example:", "Source:", "[out, ", "$$"):
        assert part in words, part
    found = method_named(name)
    assert found.name == METHODS[name]().name == name
    assert found.summary == words.strip().splitlines()[0]
    assert found.paper in words or "ours" in words
    assert getattr(package, name.replace("-", "_")) is METHODS[name]
    found.check()


def test_the_examples_of_the_docstrings_are_true() -> None:
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner()
    for name, function in METHODS.items():
        for example in finder.find(function, name, globs={}):
            runner.run(example)
    assert runner.tries >= 2 * len(METHODS)
    assert runner.failures == 0


def test_a_setting_lands_in_the_piece_that_has_it() -> None:
    found = qa_lora(bits=3, group_size=64, damping=0.1, range="mse", rank=5, pooling="mean", scales="fp32")
    assert found.format == Format(bits=3, group_size=64)
    assert found.rounding == GPTQ(damping=0.1, range="mse")
    assert (found.recipe.rank, found.adapter.pooling) == (5, "mean")
    assert found.storage == Storage(scales="fp32", offsets="fp32")
    other = found.having(rounding="nearest", start=LQ(iterations=3), objective="rilq", weight=0.25)
    assert other.rounding == Nearest(range="mse")  # what both have is kept
    assert other.start == LQ(iterations=3)
    assert other.objective.weight == 0.25
    assert found.having(bits=None, rank=None) == found


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"pooling": "mean"},
            r"pooling is a setting of the adapter of .*qa-lora.*; method='qlora' has another \(lora\)",
        ),
        ({"damping": 0.1}, r"damping is a setting of the rounding gptq, and here it is nearest. Use rounding='gptq'"),
        ({"fisher": True}, r"fisher is a setting of the start lq, and here it is zero. Use start='lq'"),
        ({"keep_targets": True}, r"keep_targets is a setting of the objective js or kl or rilq"),
        ({"colour": 3}, r"colour is no setting of a method"),
        ({"rounding": "gtpq"}, r"rounding='gtpq' is unknown. Did you mean gptq\?"),
        ({"range": "icq"}, r"has no free offsets"),
        ({"dense_steps": 2}, r"dense_steps needs the dense matrix"),
    ],
)
def test_what_does_not_fit_is_refused_with_advice(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        method_named("qlora", **settings).check()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": -1}, "rank=-1 of Recipe: must be a whole number, at least 1"),
        ({"rank": True}, "rank=True of Recipe: must be a whole number"),
        ({"learning_rate": float("nan")}, "learning_rate=nan of Recipe: must be a number, above 0"),
        ({"damping": "much"}, "damping='much' of GPTQ: must be a number"),
        ({"schedule": "cosin"}, "schedule='cosin' of Recipe: must be 'constant', 'cosine' or 'linear'"),
    ],
)
def test_values_from_python_are_checked_as_those_of_flags(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Spec.of(qa_lora(**settings))


def test_an_adapter_with_a_grid_of_its_own_has_the_methods() -> None:
    found = Method(
        format=Format(bits=3, group_size=64, zero="integer"),
        storage=Storage(scales="fp32", offsets="integer"),
        rounding=Nearest(),
        adapter=L4Q(init="lsq+"),
        recipe=Recipe(learning_rate=1e-3),
    )
    assert found.adapter == L4Q(init="lsq+", bits=3, group_size=64, offsets="integer", scales="fp32")
    assert replace(found, format=Format(bits=2), storage=Storage()).adapter.bits == 2
    assert replace(found, adapter=LoRA()).adapter == LoRA()
