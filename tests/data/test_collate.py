import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.masking_utils import find_packed_sequence_indices

from quadapt.data import Collator, encode, pad_token_id

NO = -100


def test_unequal_sequences_are_padded_on_the_right():
    batch = Collator(9)([{"input_ids": [1, 2, 3], "labels": [NO, 2, 3]}, {"input_ids": [4], "labels": [4]}])
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, 9, 9]],
        "labels": [[NO, 2, 3], [4, NO, NO]],
        "attention_mask": [[1, 1, 1], [1, 0, 0]],
    }
    assert {value.dtype for value in batch.values()} == {torch.long}


def test_packed_sequences_keep_apart_and_padding_joins_none():
    batch = Collator(9)(
        [
            {"input_ids": [1, 2, 3, 4], "labels": [NO, 2, NO, 4], "position_ids": [0, 1, 0, 1]},
            {"input_ids": [5, 6], "labels": [NO, 6], "position_ids": [0, 1]},
        ]
    )
    assert batch.pop("use_cache") is False
    assert {name: value.tolist() for name, value in batch.items()} == {
        "input_ids": [[1, 2, 3, 4], [5, 6, 9, 9]],
        "labels": [[NO, 2, NO, 4], [NO, 6, NO, NO]],
        "position_ids": [[0, 1, 0, 1], [0, 1, 0, 0]],
    }
    assert find_packed_sequence_indices(batch["position_ids"]).tolist() == [[0, 0, 1, 1], [0, 0, 1, 2]]


@pytest.mark.parametrize("packing", [False, True])
def test_with_the_trainer(chars, make_rows, tmp_path, packing):
    """One step with SGD moves by the gradient of the loss per token over the whole data, packed or not."""
    rows = make_rows("prompt-completion", [("ab", "cd"), ("abc", "d"), ("a", "bcde"), ("bb", "c")])
    data = encode(rows, chars, seq_len=14, packing=packing).data
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(chars),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            initializer_range=0.3,
        )
    )
    before = model.lm_head.weight.detach().clone()
    losses, tokens = torch.zeros(()), 0
    for sequence in encode(rows, chars, seq_len=14, packing=False).data:
        ids, labels = torch.tensor([sequence["input_ids"]]), torch.tensor([sequence["labels"]])
        count = int((labels != NO).sum())
        losses, tokens = losses + model(input_ids=ids, labels=labels).loss * count, tokens + count
    (gradient,) = torch.autograd.grad(losses / tokens, model.lm_head.weight)
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        learning_rate=1.0,
        gradient_accumulation_steps=2,
        optim="sgd",
        max_grad_norm=0.0,
        report_to=[],
        lr_scheduler_type="constant",
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    if packing:
        assert len(data) < 4
    trainer = Trainer(model, arguments, Collator(pad_token_id(chars)), train_dataset=data, eval_dataset=data)
    result = trainer.train()
    assert result.training_loss == pytest.approx((losses / tokens).item(), rel=1e-5)
    assert torch.allclose(model.lm_head.weight, before - gradient, atol=1e-6)
    assert trainer.evaluate()["eval_loss"] < result.training_loss
