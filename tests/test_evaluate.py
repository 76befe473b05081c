import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quadapt.data import read
from quadapt.errors import ConfigError, DataError
from quadapt.evaluate import (
    context_limit,
    evaluating,
    exact_match,
    generate_samples,
    joined_perplexity,
    perplexity,
)

SPECIAL = ["<unk>", "<s>", "</s>"]


@pytest.fixture
def tokenizer():
    """A token for each character, BOS before a text, no pad token."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *" abcdefghijklmnopqrstuvwxyz0123456789=\n"])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.decoder = decoders.Fuse()
    characters.add_special_tokens(SPECIAL)
    characters.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=characters, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            attention_dropout=0.5,
        )
    )


@pytest.fixture
def rows(tmp_path):
    def make(*values):
        path = tmp_path / "data.jsonl"
        names = ("prompt", "completion") if isinstance(values[0], tuple) else ("text",)
        values = [value if isinstance(value, tuple) else (value,) for value in values]
        path.write_text("\n".join(json.dumps(dict(zip(names, value, strict=True))) for value in values))
        return read(str(path))

    return make


# --- perplexity -------------------------------------------------------------------------------------------------------


def token_by_token(model, ids, first, context, stride):
    """Losses of the tokens of a document from `first` on, each from a forward pass of its own, in float64."""
    losses = []
    for token in range(first, len(ids)):
        window = max(0, -(-(token - context) // stride))  # the first window that reaches this token
        logits = model(input_ids=torch.tensor([ids[window * stride : token]])).logits[0, -1]
        losses.append(-float(logits.log_softmax(-1)[ids[token]]))
    return losses


TEXTS = ["the quick brown fox jumps over the lazy dog 12", "a", "", "seven seas and seven skies"]


@pytest.mark.parametrize(
    ("context", "stride"), [(64, None), (10, None), (10, 10), (10, 3), (10, 1), (1, None), (46, 45), (47, 2), (48, 48)]
)
def test_perplexity_of_text(model, tokenizer, rows, context, stride):
    result = perplexity(model, tokenizer, rows(*TEXTS), context=context, stride=stride, batch=3)
    reference = model.double().eval()
    with torch.no_grad():
        losses = [
            loss
            for text in TEXTS
            if text
            for loss in token_by_token(reference, tokenizer(text)["input_ids"], 1, context, stride or context)
        ]
    assert result.tokens == len(losses) == sum(map(len, TEXTS))
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert result.perplexity == math.exp(result.loss)
    assert (result.documents, result.left_out) == (3, 1)
    assert (result.context, result.stride) == (context, stride or context)


@pytest.mark.parametrize(("context", "stride"), [(64, None), (6, 4), (3, 1)])
def test_perplexity_of_completions(model, tokenizer, rows, context, stride):
    pairs = [("abc", "defgh"), ("", "xyz"), ("abcdefghijk", "l"), ("blank", " ")]
    result = perplexity(model, tokenizer, rows(*pairs), context=context, stride=stride)
    reference = model.double().eval()
    losses = []
    with torch.no_grad():
        for prompt, completion in pairs[:3]:
            ids = [*tokenizer(prompt + completion)["input_ids"], tokenizer.eos_token_id]
            losses += token_by_token(reference, ids, 1 + len(prompt), context, stride or context)
    assert result.tokens == len(losses) == 5 + 3 + 1 + 3
    assert result.loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert (result.documents, result.left_out) == (3, 1)


def gptq_numpy(scores, ids, context):
    """GPTQ's `llama_eval` in NumPy: `scores(window)` are logits `[context, vocabulary]`; the mean of windows' means."""
    means = []
    for at in range(len(ids) // context):
        window = ids[at * context : (at + 1) * context]
        logits = scores(window)[:-1]
        logs = (
            logits
            - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
            - logits.max(1, keepdims=True)
        )
        means.append(-logs[np.arange(context - 1), window[1:]].mean())
    return float(np.exp(np.mean(means)))


@pytest.mark.parametrize(("context", "windows"), [(7, 11), (2, 40), (20, 4), (64, 1)])
def test_perplexity_by_the_protocol_of_gptq(model, tokenizer, rows, context, windows):
    """Blank lines count as lines, BOS stands at the very beginning alone, and what is left over is not counted."""
    result = joined_perplexity(model, tokenizer, rows(*TEXTS), context=context, batch=2)
    reference = model.double().eval()

    def scores(window):
        with torch.no_grad():
            return reference(input_ids=torch.from_numpy(window)[None]).logits[0].numpy()

    ids = [1, *(tokenizer.convert_tokens_to_ids(letter) for letter in "\n\n".join(TEXTS))]
    assert len(ids) // context == windows
    assert result.perplexity == pytest.approx(gptq_numpy(scores, np.array(ids), context), rel=1e-5)
    assert (result.tokens, result.context) == (windows * (context - 1), context)


def test_the_protocol_of_gptq_needs_texts_that_fill_a_window(model, tokenizer, rows):
    with pytest.raises(DataError, match="has 4 tokens, less than one window of 8"):
        joined_perplexity(model, tokenizer, rows("abc"), context=8)
    with pytest.raises(DataError, match="protocol gptq is for texts"):
        joined_perplexity(model, tokenizer, rows(("a", "b")), context=8)
    with pytest.raises(ConfigError, match="the first token of a window"):
        joined_perplexity(model, tokenizer, rows("abc"), context=1)


def test_overlap_helps_a_model_that_looks_back(tokenizer, rows):
    """A model that copies what stood four tokens before is right only about tokens that it has the context for."""

    class Copies(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, input_ids, **_):
            logits = torch.zeros(*input_ids.shape, len(tokenizer))
            seen = torch.nn.functional.one_hot(input_ids[:, :-3], len(tokenizer)).float()
            seen[..., tokenizer.bos_token_id] = 0
            logits[:, 3:] = 100 * seen
            return type("Output", (), {"logits": logits})

    uniform = math.log(len(tokenizer))
    data = rows("abcd" * 4 + "a")  # 17 tokens to predict; of the first window, the first four cannot be known
    assert perplexity(Copies(), tokenizer, data, context=8, stride=5).loss == pytest.approx(4 * uniform / 17)
    assert perplexity(Copies(), tokenizer, data, context=8, stride=8).loss == pytest.approx((4 + 3 + 1) * uniform / 17)


def test_batches_and_progress(model, tokenizer, rows):
    seen = []

    def progress(groups):
        for group in groups:
            seen.append(len(group))
            yield group

    one = perplexity(model, tokenizer, rows(*TEXTS), context=10, batch=1)
    four = perplexity(model, tokenizer, rows(*TEXTS), context=10, batch=4, progress=progress)
    assert one.loss == pytest.approx(four.loss, rel=1e-5)
    assert seen == [4, 4, 1]  # 46, 1 and 26 tokens in windows of 10: 5 + 1 + 3


def test_half_precision_is_summed_in_float32(model, tokenizer, rows):
    model = model.bfloat16().eval()
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits[0, :-1]
    full, half = (
        float(-each.log_softmax(-1).gather(1, ids[0, 1:, None]).double().mean()) for each in (logits.float(), logits)
    )
    result = perplexity(model, tokenizer, rows(TEXTS[0]), context=64)
    assert result.loss == pytest.approx(full, rel=1e-6)
    assert result.loss != pytest.approx(half, rel=1e-6)


@pytest.mark.parametrize(
    ("texts", "options", "error", "message"),
    [
        (["abc"], {"context": 65}, ConfigError, "context=65 is not between 1 and the model's context, 64"),
        (["abc"], {"context": 0}, ConfigError, "context=0"),
        (["abc"], {"context": 8, "stride": 9}, ConfigError, "stride=9 is not between 1 and context=8"),
        (["abc"], {"context": 8, "stride": 0}, ConfigError, "stride=0"),
        (["", " "], {"context": 8}, DataError, "data.jsonl: has no token to count"),
    ],
)
def test_perplexity_refuses(model, tokenizer, rows, texts, options, error, message):
    with pytest.raises(error, match=message):
        perplexity(model, tokenizer, rows(*texts), **options)


def test_a_loss_that_is_not_finite_names_its_document(model, tokenizer, rows):
    model.model.embed_tokens.weight.data[tokenizer.convert_tokens_to_ids("9")] = math.nan
    assert perplexity(model, tokenizer, rows("abc", "ab"), context=8).tokens == 5
    with pytest.raises(DataError, match=r"data\.jsonl:2: the model's loss is nan.*--dtype float32"):
        perplexity(model, tokenizer, rows("abcd", "9ab"), context=8)


# --- answers ----------------------------------------------------------------------------------------------------------


class Sums(LlamaForCausalLM):
    """Answers `3+4=` with ` 7` and the end of sequence, but for prompts that begin with `b`, which it gets wrong.

    It takes the last column for the last token of the prompt, and the attention mask for padding before the first.
    """

    answer = "7"

    def forward(self, input_ids, attention_mask=None, past_key_values=None, **kwargs):
        output = super().forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs
        )
        table = self.table
        logits = torch.full_like(output.logits, -10.0)
        for row in range(len(input_ids)):
            last = int(input_ids[row, -1])
            if last == table["="]:
                padding = 0 if attention_mask is None else int((attention_mask[row] == 0).sum())
                self.wrong[row] = int(input_ids[row, padding + 1]) == table["b"]
                following = table[" "]
            elif last == table[" "]:
                following = table["8" if self.wrong[row] else self.answer]
            else:
                following = table["</s>"]
            logits[row, -1, following] = 10.0
        output.logits = logits
        return output


@pytest.fixture
def sums(tokenizer):
    model = Sums(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            max_position_embeddings=64,
        )
    )
    model.table, model.wrong = tokenizer.get_vocab(), {}
    return model


PAIRS = [("a 3 4=", " 7"), ("bb 3 4=", "7"), ("long prompt 3 4=", "7\n"), ("c=", "6"), ("a=", "7 7")]


@pytest.mark.parametrize("batch", [1, 2, 32])
def test_exact_match(sums, tokenizer, rows, batch):
    result = exact_match(sums, tokenizer, rows(*PAIRS), batch=batch, samples=2)
    assert (result.count, result.correct, result.accuracy) == (5, 2, 0.4)
    assert [dataclasses.astuple(sample) for sample in result.samples] == [
        ("a 3 4=", " 7", " 7"),
        ("bb 3 4=", "7", " 8"),
    ]
    assert result.too_long == 0


def test_answers_must_stop(sums, tokenizer, rows):
    assert exact_match(sums, tokenizer, rows(("a=", "7")), max_new_tokens=2).accuracy == 1
    assert exact_match(sums, tokenizer, rows(("a=", "")), max_new_tokens=1).accuracy == 1  # so far, a space
    sums.table = sums.table | {"</s>": sums.table["9"]}  # now it never stops
    assert exact_match(sums, tokenizer, rows(("a=", "7")), max_new_tokens=3).samples[0].answer == " 79"


def test_a_model_may_have_its_own_ends(sums, tokenizer, rows):
    sums.table = sums.table | {"</s>": sums.table["9"]}
    sums.generation_config.eos_token_id = [sums.table["9"], 5]
    sums.generation_config.do_sample, sums.generation_config.temperature = True, 9.0  # greedy all the same
    assert exact_match(sums, tokenizer, rows(("a=", "7"))).accuracy == 1


def test_completions_that_cannot_be_matched_are_counted(sums, tokenizer, rows):
    result = exact_match(sums, tokenizer, rows(*PAIRS), max_new_tokens=2)
    assert (result.too_long, result.correct) == (1, 2)


def test_exact_match_with_the_model_itself(model, tokenizer, rows):
    """Answers of a batch are those that `generate` gives to each prompt alone."""
    prompts = ["abc", "the quick brown", "x", "12 and"]
    model.eval()
    alone = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=2
        )
        alone.append(tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True))
    assert len(set(alone)) > 1
    data = rows(*[(prompt, answer) for prompt, answer in zip(prompts, alone, strict=True)])
    assert exact_match(model, tokenizer, data, max_new_tokens=6, batch=4).accuracy == 1
    assert generate_samples(model, tokenizer, prompts, max_new_tokens=6, batch=3) == alone


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        (["text"], {}, "holds text rows.*prompt and completion"),
        ([("a" * 59, "b"), ("a" * 60, "b")], {"max_new_tokens": 4}, r"jsonl:2: the prompt has 61 tokens.*context, 64"),
    ],
)
def test_exact_match_refuses(sums, tokenizer, rows, values, options, message):
    with pytest.raises(DataError, match=message):
        exact_match(sums, tokenizer, rows(*values), **options)


def test_an_empty_prompt_needs_an_opening_token(sums, tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("$A", special_tokens=[])
    with pytest.raises(DataError, match="prompt 2: the prompt is empty"):
        generate_samples(sums, tokenizer, ["a=", ""])


# --- the model is left as it was --------------------------------------------------------------------------------------


def test_modes_come_back(model, tokenizer, rows):
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    expected = perplexity(model, tokenizer, rows("abcdef"), context=8).loss  # dropout is off, so it repeats
    assert perplexity(model, tokenizer, rows("abcdef"), context=8).loss == expected
    exact_match(model, tokenizer, rows(("a", "b")), max_new_tokens=2)
    assert [module.training for module in model.modules()] == modes
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        assert not torch.is_grad_enabled()
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(DataError):
        perplexity(model, tokenizer, rows("a"), context=8)
    assert [module.training for module in model.modules()] == modes
    assert torch.is_grad_enabled()


def test_the_tokenizer_is_left_alone(model, tokenizer, rows):
    exact_match(model, tokenizer, rows(("a", "b")), max_new_tokens=2)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("right", None)


def test_context_limit(model):
    assert context_limit(model) == 64
    assert context_limit(torch.nn.Linear(1, 1)) is None
