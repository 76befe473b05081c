"""A model that is kept on the CPU, worked through on a card: the same results, a block at a time, nothing written."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from models import everywhere, llama, plan, quantized, text
from pretend import CARD, ledger
from torch import nn

from quadapt.budget import candidates, measure
from quadapt.calibrate import BlockWalk
from quadapt.hf.blocks import BlockFiles
from quadapt.methods import method_named
from quadapt.model.quantize import quantize_model, quantized_layers
from quadapt.model.select import find_blocks, select
from quadapt.nn.block_ap import BlockAP
from quadapt.nn.resident import resident
from quadapt.nn.starts import LQ, QERA, CLoQ, LoftQ, QuAILoRA
from quadapt.objectives.distill import KL
from quadapt.objectives.rilq import RILQ
from quadapt.objectives.teacher import KeptTeacher, Teacher
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import LINEAR, Storage
from quadapt.statistics import FISHER, MOMENT, StatisticsFiles, gather

NF4 = {"format": Format(levels="nf", bits=4, group_size=64), "storage": Storage(scales="double", offsets="absent")}
SHIFTED = {"format": Format(levels="nf", bits=4, group_size=32, zero="float"), "storage": Storage()}
SOME = ("q_proj", "up_proj", "down_proj")
"""Layers to quantize where all would take long (every operator on the card is a call of Python)."""

LEAST = ("down_proj",)
SEARCHES = ("mse", "icq", "icq-scale")
"""Ranges that are searched for, candidate by candidate."""

LINEAR_NF = {"format": Format(levels="nf", bits=4, group_size=64), "storage": Storage(scales=LINEAR, offsets="absent")}


def digests(model: nn.Module) -> dict[str, str]:
    return {name: layer.quant_weight.digest() for name, layer in quantized_layers(model).items()}


def state(model: nn.Module) -> dict[str, tuple[int, int, int]]:
    """Identity, address and version of every tensor: what would change if one were moved, or written into."""
    return {name: (id(each), each.data_ptr(), each._version) for name, each in model.named_parameters()}


# --- the pretence itself ----------------------------------------------------------------------------------------------


def test_the_card_is_another_device_than_the_cpu() -> None:
    here, there = torch.ones(4), torch.ones(4).to(CARD)
    assert there.device == CARD
    with pytest.raises(RuntimeError, match="expected all tensors to be on the card"):
        there + here
    assert torch.equal((there + torch.ones(4, device=CARD) * torch.tensor(2.0)).cpu(), 3 * here)
    before = ledger.now
    kept = torch.empty(1000, device=CARD)
    assert ledger.now == before + kept.nbytes
    del kept
    assert ledger.now == before
    waits = ledger.waits
    float(there.sum())
    assert ledger.waits == waits + 1


# --- quantizing -------------------------------------------------------------------------------------------------------

ROUNDINGS: dict[str, Any] = {
    "nearest": plan(Nearest()),
    "mse": plan(Nearest(range="mse")),
    "exact": plan(Nearest(code_against="exact"), **NF4),
    "linear": plan(Nearest(), **LINEAR_NF),
    "icq": plan(Nearest(range="icq"), **SHIFTED),
    "icq-scale": plan(Nearest(range="icq-scale")),
    "gptq": plan(GPTQ()),
    "gptq-zero-points": plan(GPTQ(), format=Format(bits=4, zero="integer"), storage=Storage(offsets="integer")),
    "gptq-act-order": plan(GPTQ(act_order=True)),
    "gptq-q4k": plan(GPTQ(), format=Format(bits=4), storage=Storage(scales="q4_k", offsets="q4_k-min")),
    "q3k": plan(
        Nearest(), format=Format(bits=3, group_size=16, zero="none"), storage=Storage(scales="q3_k", offsets="absent")
    ),
    "gptq-static": plan(GPTQ(static_groups=True), **NF4),
    "gptq-at-once": plan(GPTQ(true_sequential=False)),
    "block-ap": plan(BlockAP(epochs=1, batch_size=1)),
    "block-ap-zero-points": plan(
        BlockAP(epochs=1), format=Format(bits=2, zero="integer"), storage=Storage(offsets="integer")
    ),
}


@pytest.mark.parametrize("name", ROUNDINGS)
def test_codes_are_those_of_a_model_on_the_card(name: str) -> None:
    found = []
    for model, device in everywhere(llama(attention_bias=True)):
        home, bias = next(model.parameters()).device, model.model.layers[0].self_attn.q_proj.bias
        done = quantized(model, device, ROUNDINGS[name], only=LEAST if name in SEARCHES else SOME)
        assert {each.device for each in model.parameters()} == {home}
        assert {each.device for weight in done.weights.values() for each in weight.tensors.values()} == {home}
        assert model.model.layers[0].self_attn.q_proj.bias.data_ptr() == bias.data_ptr() or home == CARD
        found.append((digests(model), [{**asdict(row), "seconds": 0} for row in done.rows]))
    assert found[0] == found[1]
    assert len(found[0][0]) == (2 if name in SEARCHES else 6)


@pytest.mark.parametrize("home", ["card", "cpu"])
def test_finished_blocks_are_kept_and_gone_on_with(home: str, tmp_path: Path) -> None:
    def until_first(units: Any) -> Iterator[str]:
        yield units[0]
        raise KeyboardInterrupt

    whole, (half, device) = llama(), everywhere(llama())[home == "cpu"]
    again = copy.deepcopy(half)
    quantized(whole, CARD, plan(GPTQ()), only=SOME)
    with pytest.raises(KeyboardInterrupt):
        quantized(half, device, plan(GPTQ()), only=SOME, keeper=BlockFiles(tmp_path), progress=until_first)
    quantized(again, device, plan(GPTQ()), only=SOME, keeper=BlockFiles(tmp_path))
    assert digests(again) == digests(whole)
    assert {each.device.type for each in again.parameters()} == {home}


def test_layers_outside_the_blocks_come_and_go_too() -> None:
    model = llama()
    layers = {**select(model).chosen, "lm_head": model.lm_head}
    ledger.reset()
    quantize_model(model, layers, plan(Nearest()), device=CARD)
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert {each.device.type for each in model.parameters()} == {"cpu"}
    assert ledger.operators > 0
    assert ledger.now == 0


# --- what the card holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [Nearest(), GPTQ(), BlockAP(epochs=1)], ids=["nearest", "gptq", "block-ap"])
def test_the_card_holds_one_block_however_many_there_are(rounding: Any) -> None:
    peaks = []
    for layers in (2, 5):
        model = llama(layers)
        ledger.reset()
        quantized(model, CARD, plan(rounding), only=SOME)
        peaks.append(ledger.peak)
        assert ledger.now == 0
    assert peaks[0] == peaks[1] > 0


@pytest.mark.parametrize("kind", [MOMENT, FISHER])
def test_gathering_needs_room_for_one_block_however_many_there_are(kind: str, tmp_path: Path) -> None:
    peaks = []
    for layers in (2, 5):
        model, files = llama(layers), StatisticsFiles(tmp_path / str(layers))
        ledger.reset()
        gather({kind}, model, select(model).chosen, text(), files, device=CARD)
        peaks.append(ledger.peak)
        assert ledger.now == 0
    assert peaks[0] == peaks[1] > 0


def test_more_text_takes_no_more_room() -> None:
    peaks = []
    for count in (2, 9):
        model = llama()
        ledger.reset()
        walk = BlockWalk(model, find_blocks(model), text(count), CARD)
        for name, block in find_blocks(model).items():
            walk.second_moment(name, block.get_submodule("mlp.down_proj"))
            assert ledger.now == 0  # hidden states wait beside the model
            walk.advance(name)
        peaks.append(ledger.peak)
    assert peaks[0] == peaks[1] > 0


def test_nothing_is_written_into_the_model(tmp_path: Path) -> None:
    """What is mapped from a file stays as it is in memory: only then can the system drop and read it again."""
    model = llama()
    before, dense = state(model), dict(model.named_parameters())
    gather({MOMENT, FISHER}, model, select(model).chosen, text(), StatisticsFiles(tmp_path), device=CARD)
    assert state(model) == before
    quantized(model, CARD, plan(GPTQ()))
    after = {name: (id(each), each.data_ptr(), each._version) for name, each in dense.items()}
    assert after == before


def test_a_block_is_what_it_was_after_a_failure() -> None:
    model = llama()
    before = state(model)

    def fail() -> None:
        assert {each.device for each in (*model.parameters(), *model.buffers())} == {CARD}
        raise ValueError("inside")

    with pytest.raises(ValueError, match="inside"), resident(model, CARD), resident(model.model.layers[0], CARD):
        fail()
    assert state(model) == before
    assert ledger.now == 0


def test_tied_tensors_stay_tied_on_the_card() -> None:
    model = llama(tie_word_embeddings=True)
    with resident(model, CARD):
        assert model.lm_head.weight is model.model.embed_tokens.weight


def test_masks_are_brought_along() -> None:
    """Gemma's blocks of two kinds are given masks of two kinds."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 4}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes)).eval().requires_grad_(False)
    found = []
    for each, device in everywhere(model):
        quantized(each, device, plan(GPTQ()), only=SOME)
        found.append(digests(each))
    assert found[0] == found[1]


# --- statistics and starts --------------------------------------------------------------------------------------------


def test_statistics_are_those_of_a_model_on_the_card(tmp_path: Path) -> None:
    """And, since the card computes as the CPU does, those of the CPU, where gradients go through the whole model."""
    found = []
    for at, (model, device) in enumerate([*everywhere(llama()), (llama(), None)]):
        files = StatisticsFiles(tmp_path / str(at))
        gather({MOMENT, FISHER}, model, select(model).chosen, text(5), files, device=device)
        assert not any(each.requires_grad or each.grad is not None for each in model.parameters())
        found.append({(name, kind): value for name in files for kind, value in files[name].items()})
    assert len(found[0]) == 28
    for key, value in found[0].items():
        assert torch.equal(value, found[1][key]), key
        assert float((value - found[2][key]).norm() / value.norm()) < 1e-5, key


class Framed(nn.Module):
    """Blocks between two linear layers; `told` says whether blocks are also told what the first layer gives."""

    def __init__(self, *, told: bool) -> None:
        super().__init__()
        self.embedding, self.before, self.behind = nn.Embedding(96, 16), nn.Linear(16, 32), nn.Linear(32, 16)
        self.layers, self.told = nn.ModuleList([_Told() for _ in range(2)]), told

    def forward(self, input_ids: Any, labels: Any = None, **_: Any) -> Any:
        from types import SimpleNamespace

        hidden = first = self.before(self.embedding(input_ids))
        for layer in self.layers:
            hidden = layer(hidden, first if self.told else None)
        logits = self.behind(hidden) @ self.embedding.weight.T
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), input_ids[:, 1:].flatten())
        return SimpleNamespace(logits=logits, loss=loss)


class _Told(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, hidden: Any, first: Any) -> Any:
        return hidden + self.linear(hidden if first is None else hidden + first).tanh()


@pytest.mark.parametrize("told", [False, True], ids=["", "around the blocks"])
def test_layers_before_and_behind_the_blocks_have_their_fisher_information(told: bool, tmp_path: Path) -> None:
    """Also where gradients go around the blocks: a sequence's are summed before they are squared."""
    torch.manual_seed(0)
    model, found = Framed(told=told).requires_grad_(False), []
    layers = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    for device in (None, CARD):
        files = StatisticsFiles(tmp_path / str(device))
        gather({FISHER}, model, layers, text(), files, device=device)
        found.append({name: files[name][FISHER] for name in layers})
    assert set(found[0]) == {"before", "behind", "layers.0.linear", "layers.1.linear"}
    for name, value in found[0].items():
        assert float(value.sum()) > 0
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-12)


STARTS = [LoftQ(), LQ(iterations=3), LQ(iterations=3, fisher=True), QuAILoRA(), QuAILoRA(balance=True), CLoQ(), QERA()]


@pytest.mark.parametrize("pooled", [False, True], ids=["lora", "pooled"])
@pytest.mark.parametrize("start", STARTS, ids=lambda start: start.name)
def test_starts_are_those_of_a_model_on_the_card(start: Any, pooled: bool, tmp_path: Path) -> None:
    found = []
    for at, (model, device) in enumerate(everywhere(llama())):
        files = StatisticsFiles(tmp_path / str(at))
        gather(start.needs, model, select(model).chosen, text(), files, device=device)
        settings = plan(GPTQ(), start=start, rank=4, pooled=pooled)
        done = quantized(model, device, settings, only=LEAST, statistics=files)
        factors = {name: [each.cpu() for each in pair] for name, pair in done.factors.items()}
        found.append((digests(model), factors))
    assert found[0][0] == found[1][0]
    assert found[0][1].keys() == found[1][1].keys()
    assert pooled or len(found[0][1]) == 2
    for name, pair in found[0][1].items():
        assert all(torch.equal(*each) for each in zip(pair, found[1][1][name], strict=True))


@pytest.mark.parametrize("name", ["lq-lora", "qlora", "qa-lora", "ir-qlora"])
def test_the_table_of_errors_is_measured_on_the_card(name: str) -> None:
    chosen = method_named(name)
    weight, fisher = torch.randn(96, 64), torch.rand(96, 64)
    ways = candidates(chosen)[:: {"lq-lora": 7, "ir-qlora": 29}.get(name, 3)]
    statistics = [{"fisher": fisher}, {}] if name == "lq-lora" else [{}]
    for known in statistics:
        there = {key: value.to(CARD) for key, value in known.items()}
        rows = [
            measure(weight, ways, chosen, rank=4, statistics=known),
            measure(weight.to(CARD), ways, chosen, rank=4, statistics=there),
        ]
        assert [each.candidate for each in rows[0]] == [each.candidate for each in rows[1]]
        assert [each.error for each in rows[1]] == pytest.approx([each.error for each in rows[0]], rel=1e-4)


@pytest.mark.parametrize("objective", [RILQ(), KL(top_tokens=4096)], ids=["rilq", "kl"])
def test_a_teacher_on_the_card_takes_batches_from_the_cpu(objective: Any, tmp_path: Path) -> None:
    """Which is where batches are while its targets are put on disk; in training they are on the card."""
    model, ids = llama(), text(1)[0]
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.tensor([[1] * 24, [1] * 20 + [0] * 4])}
    there = {name: value.to(CARD) for name, value in batch.items()}
    answers, student = [], copy.deepcopy(model).to(CARD)
    for each, used in ((model, batch), (copy.deepcopy(model).to(CARD), there)):
        kept = KeptTeacher(tmp_path / str(len(answers)), objective.targets)
        kept.fill(Teacher(each, objective.targets), [batch])
        answers.append(kept(used))
    for name, one in answers[0].items():
        other = answers[1][name]
        assert other.device == CARD
        torch.testing.assert_close(one.float(), other.cpu().float(), rtol=1e-3, atol=1e-3)
    bound = objective.bind(student, kept)
    loss = student(**there).loss
    assert float(bound(loss, there)) == pytest.approx(0.5 * float(loss), rel=1e-3)
    bound.close()


# --- waiting ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounding", [GPTQ(), Nearest(range="mse"), Nearest(range="icq-scale")], ids=str)
def test_the_host_does_not_wait_for_the_card_in_inner_loops(rounding: Any) -> None:
    """As often for a matrix of 32 groups in a row as for one of two."""
    from quadapt.quant.weight import Layout

    waits = []
    for columns in (64, 1024):
        weight, moment = torch.randn(32, columns).to(CARD), torch.eye(columns).to(CARD)
        layout = Layout(format=Format(bits=3, group_size=32), storage=Storage(), out=32, columns=columns)
        rounding(weight, layout, {"second_moment": moment})  # tables are made once
        ledger.reset()
        rounding(weight, layout, {"second_moment": moment})
        waits.append(ledger.waits)
    assert waits[0] == waits[1] < 10
