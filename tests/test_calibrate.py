"""The walk through a model's blocks: what each layer sees, and in which order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quadapt.calibrate import BlockWalk
from quadapt.calibrate.batch import real_tokens
from quadapt.errors import CalibrationError
from quadapt.model.select import find_blocks

Make = Callable[..., Any]
LAYERS = [
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
]


def data(*lengths: int) -> list[Tensor]:
    random = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (2, length), generator=random) for length in lengths]


def inputs_of(model: nn.Module, name: str, batches: list[Tensor]) -> list[Tensor]:
    """What a layer is given when the whole model runs."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch, use_cache=False)
    hook.remove()
    return seen


def walked(model: nn.Module, batches: list[Any]) -> tuple[BlockWalk, dict[str, nn.Module]]:
    blocks = find_blocks(model)
    return BlockWalk(model, blocks, batches), blocks


@pytest.mark.parametrize("lengths", [(16,), (16, 16, 16), (16, 7, 30)], ids=str)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_second_moment_is_the_mean_of_x_x(layer: str, lengths: tuple[int, ...], tiny_llama: Make) -> None:
    """Over tokens: a longer batch counts for more."""
    model, batches = tiny_llama(), data(*lengths)
    walk, blocks = walked(model, batches)
    for name, block in blocks.items():
        found = walk.second_moment(name, block.get_submodule(layer))
        x = torch.cat([each.flatten(0, -2) for each in inputs_of(model, f"{name}.{layer}", batches)]).double()
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        walk.advance(name)


def test_the_blocks_hand_on_what_the_model_would(tiny_llama: Make) -> None:
    model, batches = tiny_llama(), data(16, 9)
    blocks, given = find_blocks(model), dict[str, list[Tensor]]()
    walk = BlockWalk(model, blocks, batches, size=2)
    for name, block in blocks.items():
        walk.advance_dense(name)
        examples = walk.examples()
        with torch.no_grad():
            given[name] = [block(*each.args, **each.kwargs) for each in examples]
        for each, output in zip(examples, given[name], strict=True):
            assert torch.equal(each.target, output)
        walk.advance(name)
    for last, batch in zip(given["model.layers.1"], batches, strict=True):
        assert torch.equal(model.lm_head(model.model.norm(last)), model(input_ids=batch).logits)


def test_sequences_in_one_batch_or_in_many_are_the_same_data(tiny_llama: Make) -> None:
    model, (batch,) = tiny_llama(), data(16)
    moments = []
    for batches in ([batch], [batch[:1], batch[1:]]):
        walk, blocks = walked(model, batches)
        block = blocks["model.layers.0"]
        moments.append(walk.second_moment("model.layers.0", block.mlp.down_proj))
    torch.testing.assert_close(moments[0], moments[1], rtol=1e-4, atol=1e-5)  # products of other shapes


def test_layers_stand_in_the_order_in_which_they_run_by_what_they_are_given(tiny_llama: Make) -> None:
    model = tiny_llama()
    walk, blocks = walked(model, data(16))
    for name, block in blocks.items():
        backwards = {layer: block.get_submodule(layer) for layer in reversed(LAYERS)}
        assert walk.stages(name, backwards) == [LAYERS[:3], LAYERS[3:4], LAYERS[4:6], LAYERS[6:]]
        walk.advance(name)


def test_parallel_attention_and_mlp_share_a_stage() -> None:
    from transformers import PhiConfig, PhiForCausalLM

    torch.manual_seed(0)
    model = PhiForCausalLM(
        PhiConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            pad_token_id=0,
        )
    ).eval()
    walk, blocks = walked(model, data(16))
    block = blocks["model.layers.0"]
    layers = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    stages = [set(stage) for stage in walk.stages("model.layers.0", layers)]
    assert {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"} in stages
    assert {"self_attn.dense"} in stages
    assert {"mlp.fc2"} in stages


def test_a_layer_that_does_not_run_is_named(tiny_llama: Make) -> None:
    model = tiny_llama()
    walk, _blocks = walked(model, data(16))
    idle = nn.Linear(4, 4)
    with pytest.raises(
        CalibrationError, match=r"^idle: is not used when the model runs on the calibration data\. List it under skip"
    ):
        walk.stages("model.layers.0", {"idle": idle})


def test_masks_of_sliding_windows_reach_their_blocks() -> None:
    """Blocks of two kinds are called with masks of two kinds."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            sliding_window=4,
            pad_token_id=0,
        )
    ).eval()
    batches = data(16)
    walk, blocks = walked(model, batches)
    for name, block in blocks.items():
        found = walk.second_moment(name, block.mlp.down_proj)
        x = inputs_of(model, f"{name}.mlp.down_proj", batches)[0].flatten(0, -2).double()
        torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-4, atol=1e-6)
        walk.advance(name)


def test_in_bfloat16_moments_are_gathered_in_float32_and_added_in_float64(tiny_llama: Make) -> None:
    model, batches = tiny_llama(dtype=torch.bfloat16), data(30, 30)
    walk, blocks = walked(model, batches)
    block = blocks["model.layers.0"]
    found = walk.second_moment("model.layers.0", block.self_attn.o_proj)
    x = torch.cat(
        [each.flatten(0, -2) for each in inputs_of(model, "model.layers.0.self_attn.o_proj", batches)]
    ).double()
    assert float((found - x.T @ x / len(x)).norm() / found.norm()) < 1e-6


def test_the_model_is_left_as_it_was(tiny_llama: Make) -> None:
    model = tiny_llama()
    modules, state = dict(model.named_modules()), {name: value.clone() for name, value in model.state_dict().items()}
    walk, blocks = walked(model, data(16))
    block = blocks["model.layers.0"]
    walk.stages("model.layers.0", {"q": block.self_attn.q_proj})
    walk.second_moment("model.layers.0", block.self_attn.q_proj)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(model.state_dict()[name], value) for name, value in state.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_failure_while_recording_leaves_the_model_as_it_was(tiny_llama: Make) -> None:
    model = tiny_llama()
    modules = dict(model.named_modules())
    with pytest.raises(IndexError):
        BlockWalk(model, find_blocks(model), [torch.tensor([[9999]])])  # no such token
    assert dict(model.named_modules()) == modules


def test_without_data_there_is_no_walk(tiny_llama: Make) -> None:
    model = tiny_llama()
    with pytest.raises(CalibrationError, match="no calibration data"):
        BlockWalk(model, find_blocks(model), [])


class Looped(nn.Module):
    """Runs its blocks twice over."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(96, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        hidden = self.embedding(input_ids)
        for layer in [*self.layers, *self.layers]:
            hidden = layer(hidden)
        return hidden


def test_a_model_that_runs_a_block_twice_is_refused() -> None:
    model = Looped()
    with pytest.raises(CalibrationError, match=r"layers\.0: Looped runs this block 2 times in one.*--rounding nearest"):
        BlockWalk(model, find_blocks(model), data(16))


def test_a_model_that_leaves_a_block_out_is_refused(tiny_llama: Make) -> None:
    model = tiny_llama()
    model.config.num_hidden_layers = 1  # the second is there and never called
    with pytest.raises(CalibrationError, match=r"layers\.1: LlamaForCausalLM does not run this block on"):
        BlockWalk(model, find_blocks(model), data(16))


def test_a_walk_that_is_interrupted_while_the_model_runs_ends(tiny_llama: Make) -> None:
    """By Ctrl-C, say: nothing waits for a forward that nobody goes on with."""
    model = tiny_llama()
    walk, blocks = walked(model, data(16, 9))
    held = walk._held[0]
    held._back.acquire = _interrupted  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        walk.advance("model.layers.0")
    walk.close()
    assert all("forward" not in vars(block) for block in blocks.values())


def _interrupted() -> None:
    raise KeyboardInterrupt


def test_padding_is_no_input(tiny_llama: Make) -> None:
    """Sequences of several lengths in one batch with a mask are the same data as each by itself."""
    model, short, long = tiny_llama(), *(each[:1] for each in data(7, 12))
    padded = torch.cat([torch.nn.functional.pad(short, (0, 5)), long])
    mask = torch.tensor([[1] * 7 + [0] * 5, [1] * 12])
    moments = []
    for batches in ([short, long], [{"input_ids": padded, "attention_mask": mask}]):
        walk, blocks = walked(model, batches)
        found = []
        for name, block in blocks.items():
            found += [walk.second_moment(name, block.get_submodule(layer)) for layer in LAYERS]
            walk.advance(name)
        moments.append(found)
    for one, other in zip(*moments, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_padding_of_an_encoder_is_not_taken_for_that_of_its_decoder() -> None:
    mask = torch.tensor([[1, 1, 0]])
    told = {"input_ids": mask, "attention_mask": mask, "decoder_input_ids": mask[:, :2]}
    assert torch.equal(real_tokens(told), mask.bool())
    assert real_tokens(told | {"decoder_input_ids": mask}) is None
    assert real_tokens(told | {"attention_mask": torch.ones(1, 3)}) is None
