"""Families whose blocks are called in their own ways: calibrated alike, whatever the batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    FalconConfig,
    GPTJConfig,
    GPTNeoConfig,
    MptConfig,
    Qwen2Config,
)

from quadapt.calibrate import BlockWalk
from quadapt.hf.quantizer import adopt
from quadapt.model.layer import Quantization
from quadapt.model.quantize import quantize_model
from quadapt.model.select import find_blocks, select
from quadapt.nn.block_ap import BlockAP
from quadapt.nn.resident import tensors_in
from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Rounding
from quadapt.quant.storage import Storage
from quadapt.statistics import FISHER, MOMENT, StatisticsFiles, gather

FAMILIES = {
    "bloom": BloomConfig(vocab_size=96, hidden_size=64, n_layer=2, n_head=4),  # ALiBi, with the batch folded in
    "falcon-alibi": FalconConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False
    ),
    "falcon": FalconConfig(vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "mpt": MptConfig(vocab_size=96, d_model=64, n_layers=2, n_heads=4, max_seq_len=64),
    "gpt-j": GPTJConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    "codegen": CodeGenConfig(vocab_size=96, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64),
    "gpt-neo": GPTNeoConfig(
        vocab_size=96,
        hidden_size=64,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64,
        window_size=8,
    ),
    "qwen2": Qwen2Config(  # for comparison: nothing folded, blocks that give tensors
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    ),
}


def random_model(family: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family], dtype=torch.float32).eval()


def tokens(sequences: int = 4, length: int = 12) -> Tensor:
    return torch.randint(4, 96, (sequences, length), generator=torch.Generator().manual_seed(1))


def quantized(family: str, rounding: Rounding, batches: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Logits of the dense model and of the quantized one."""
    model = random_model(family)
    dense, selection = model(tokens()).logits, select(model)
    plan = Quantization(format=Format(bits=3), storage=Storage(), rounding=rounding)
    quantize_model(model, selection.chosen, plan, batches=batches)
    adopt(model, left=selection.left, made={})
    return dense, model(tokens()).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_gptq_is_the_same_for_batches_of_any_size(family: str) -> None:
    """Not the same codes: sums in another order move some. The same error, then."""
    text = tokens(8, 40)
    dense, four = quantized(family, GPTQ(), list(text.split(4)))
    _, ones = quantized(family, GPTQ(), list(text.split(1)))
    errors = [float((logits - dense).norm() / dense.norm()) for logits in (four, ones)]
    assert 0 < min(errors) < 0.5
    assert max(errors) < 1.2 * min(errors)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_walk_sees_what_the_model_computes(family: str) -> None:
    """What a layer in the last block is given, batch by batch, as when the whole model runs."""
    model, batches = random_model(family), [tokens(4), tokens(2, 7), tokens(1, 20)]
    blocks = find_blocks(model)
    walk, (first, last) = BlockWalk(model, blocks, batches), blocks
    walk.advance(first)
    name = next(name for name, layer in blocks[last].named_modules() if isinstance(layer, nn.Linear))
    seen: list[Tensor] = []
    hook = blocks[last].get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    hook.remove()
    x = torch.cat([each.flatten(0, -2) for each in seen]).double()
    found = walk.second_moment(last, blocks[last].get_submodule(name))
    torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
    assert walk.stages(last, {name: blocks[last].get_submodule(name)}) == [[name]]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_part_of_a_batch_computes_as_in_the_whole(family: str, size: int) -> None:
    model = random_model(family)
    blocks = find_blocks(model)
    batches, (first, last) = [tokens(4), tokens(3, 9)], blocks
    walk = BlockWalk(model, blocks, batches, size=size)
    for name in (first, last):
        walk.advance_dense(name)
        walk.advance(name)
    given: list[Any] = []
    hook = blocks[last].register_forward_hook(lambda _, _args, output: given.append(output))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    hook.remove()
    whole = [sequence for each in given for sequence in next(tensors_in(each))]
    parts = [sequence for each in walk._targets for sequence in next(tensors_in(each))]
    for part, each in zip(parts, whole, strict=True):
        torch.testing.assert_close(part, each)


@pytest.mark.parametrize("family", ["bloom", "gpt-j", "gpt-neo"])
def test_blocks_are_trained_whole_and_statistics_gathered(family: str, tmp_path: Any) -> None:
    dense, after = quantized(family, BlockAP(epochs=1, batch_size=2), [tokens()])
    assert 0 < (after - dense).norm() / dense.norm() < 0.7
    model = random_model(family)
    chosen = select(model).chosen
    files = StatisticsFiles(tmp_path, {MOMENT, FISHER})
    gather({MOMENT, FISHER}, model, chosen, [tokens()], files, device="cpu")
    for name, layer in chosen.items():
        assert files[name][FISHER].shape == layer.weight.shape
        assert files[name][MOMENT].shape == (layer.in_features,) * 2
