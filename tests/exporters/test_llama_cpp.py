"""llama.cpp, as served, answers as the model does."""

from __future__ import annotations

import json
import random
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import SHARED, TEXT, byte_level, logits, quantized, story, tiny, trained, with_adapter
from tokenizers import AddedToken, Regex, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from quadapt import merge, prepare
from quadapt.errors import ExportError
from quadapt.exporters import gguf_vocabulary
from quadapt.exporters.blocks import cannot_hold
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.gguf_lora import export_gguf_lora
from quadapt.exporters.llama_cpp import LlamaCpp, complete, differences, tokenize
from quadapt.hf.loading import load_tokenizer
from quadapt.importers.gguf_splits import BLOOM, LLAMA3, QWEN2
from quadapt.methods.l4q import l4q
from quadapt.model.quantize import quantized_layers
from quadapt.nn.adapters import Elastic, LoRA, Pooled
from quadapt.quant.format import Format

pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install 'quadapt[demo]')")

NF4 = Format(levels="nf", bits=4)
"""Leaves as F32, and so is not subject to llama.cpp's rounding of activations: shows that all else is equal."""


@pytest.mark.parametrize("merged", [False, True], ids=["plain", "merged"])
@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama105-hf"])
def test_a_real_model_answers_alike(name: str, merged: bool, tmp_path: Path) -> None:
    """200 tokens of a story: what differs is llama.cpp's rounding of activations to 8 bits, and it is small."""
    model, tokenizer = trained(name)
    model = quantized(model, Format(bits=4, group_size=32))
    if merged:
        adapted = with_adapter(model, Pooled(), alpha=0.4)
        trained_to = logits(adapted, [1, 5, 9])
        model = adapted.merge_and_unload()
        assert torch.equal(logits(model, [1, 5, 9]), trained_to)
    path, ids = tmp_path / "model.gguf", story(tokenizer, 200)
    export_gguf(model, tokenizer, path)
    apart = differences(path, model, ids)
    likely = apart[logits(model, ids).softmax(-1) > 0.1]
    print(
        f"{name}: log-probabilities over {len(ids)} tokens differ by at most {apart.max():.3f} "
        f"({likely.max():.3f} for tokens of at least 10 %): llama.cpp's CPU kernels round activations to 8 bits"
    )
    assert not apart.isnan().any()
    assert apart.max() < 1.0
    assert likely.max() < 0.4
    assert apart.mean() < 0.1


def greedy(model: nn.Module, ids: list[int], answer: list[int]) -> list[int]:
    """What the model finds most probable after `ids` and each token of `answer`: equal to it if it is its own."""
    return logits(model, ids + answer)[len(ids) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("name", ["stories260K-hf", "babyllama105-hf"])
def test_greedy_answers_are_equal(name: str, tmp_path: Path) -> None:
    model, tokenizer = trained(name)
    model = quantized(model, Format(bits=4, group_size=32))
    path, ids = tmp_path / "model.gguf", story(tokenizer, 12)
    export_gguf(model, tokenizer, path)
    answer = complete(path, ids, 100)
    assert len(answer) == 100
    assert greedy(model, ids, answer) == answer
    assert model.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=10)[0, 12:].tolist() == answer[:10]
    assert complete(path, ids, 100, threads=2) == answer


def test_stops_where_the_model_stops(tmp_path: Path) -> None:
    """stories260K ends a story with its begin token, by its generation config; the tokenizer names another end."""
    model, tokenizer = trained("stories260K-hf")
    path, ids = tmp_path / "model.gguf", story(tokenizer, 40)
    export_gguf(model, tokenizer, path)
    answer = complete(path, ids, 400)
    assert len(answer) < 400
    assert answer[-1] == 1 != tokenizer.eos_token_id
    assert greedy(model, ids, answer) == answer


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_a_model_that_was_trained_in_super_blocks_answers_alike(bits: int, tokenizer: Any, tmp_path: Path) -> None:
    """K-quants: L4Q trains scales as they are held there, the merge is exact, and the file holds the merged model."""
    scales, group_size, zero = {
        2: ("q2_k", 16, "float"),
        3: ("q3_k", 16, "none"),
        4: ("q4_k", 32, "float"),
        5: ("q4_k", 32, "float"),
        6: ("q6_k", 16, "none"),
    }[bits]
    method = l4q(bits=bits).having(group_size=group_size, zero=zero, scales=scales, rank=4)
    model = tiny(hidden_size=256, intermediate_size=512, num_hidden_layers=1, initializer_range=0.05)
    adapted = prepare(model, method=method)
    ids = torch.randint(2, 300, (100,), generator=torch.Generator().manual_seed(3)).tolist()
    optimizer = torch.optim.Adam([each for each in adapted.parameters() if each.requires_grad], lr=3e-3)
    losses = []
    for _ in range(5):
        loss = adapted.train()(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    want = logits(adapted.eval(), ids)
    merged, certificate = merge(adapted)
    assert certificate.verdict == "exact"
    assert torch.equal(logits(merged, ids), want)
    report = export_gguf(merged, tokenizer, tmp_path / "model.gguf")
    assert {row.type for row in report.tensors if row.linear} == {f"Q{bits}_K"}
    apart = differences(tmp_path / "model.gguf", merged, ids)
    print(f"Q{bits}_K: log-probabilities differ by at most {apart.max():.3f}, {apart.mean():.4f} on average")
    assert apart.max() < 0.3
    assert apart.mean() < 0.04


class Rounded(nn.Module):
    """A quantized layer as llama.cpp's CPU kernels compute it: inputs in 8 bits, in blocks of 32.

    A block of inputs has its scale in float16 (Q8_0). Where weights have offsets it has its sum too, in float16 (Q8_1),
    which meets the offsets; symmetric codes are multiplied as signed ones.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__()
        weight = layer.quant_weight
        blocks = weight.layout.columns // 32
        repeat = weight.format.width(weight.layout.columns) // 32
        self.signed = weight.format.zero == "none"
        middle = 2 ** (weight.format.bits - 1) if self.signed else 0
        table = weight.format.table(weight.scales)
        codes = weight.codes().double() - middle if table is None else table.double()[weight.codes().int()]
        self.codes = codes.unflatten(1, (blocks, 32))
        self.scales = weight.scales.double().repeat_interleave(repeat, 1)[:, :blocks]
        if weight.offsets is not None:
            self.offsets = weight.offsets.double().repeat_interleave(repeat, 1)[:, :blocks]

    def forward(self, x: Tensor) -> Tensor:
        blocks = x.unflatten(-1, (-1, 32))
        largest = blocks.abs().amax(-1, keepdim=True)
        step = largest / 127
        rounded = torch.round(blocks * torch.where(largest > 0, 127 / largest, 0))
        sums = (step * rounded.sum(-1, keepdim=True)).half().double().squeeze(-1)
        inputs = rounded.double() * step.half().double()
        products = torch.einsum("...bi,nbi,nb->...n", inputs, self.codes, self.scales)
        return (products if self.signed else products + sums @ self.offsets.T).float()


@torch.no_grad()
def last(model: nn.Module, prompts: list[list[int]]) -> Tensor:
    """Log-probabilities after the last token of each prompt, all of one length."""
    return model(torch.tensor(prompts)).logits[:, -1].log_softmax(-1)


BLOCKS = {
    "Q4_0": Format(bits=4, group_size=32, zero="none"),
    "Q4_1": Format(bits=3, group_size=32),
    "IQ4_NL": Format(levels="iq4-nl", bits=4, group_size=32),
    "Q5_0": Format(bits=5, group_size=32, zero="none"),
    "Q5_1": Format(bits=5, group_size=32),
    "Q8_0": Format(bits=6, group_size=32, zero="none"),
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_rounding_of_activations_explains_the_difference(block: str, tmp_path: Path) -> None:
    """With that rounding, torch gives llama.cpp's answer to 1e-4, until a value on the edge rounds the other way."""
    model, tokenizer = trained("babyllama105-hf")
    model = quantized(model, BLOCKS[block])
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path)
    assert {row.type for row in report.tensors if row.linear} == {block}
    prompts = [[1, token] for token in range(3, 35)]
    with LlamaCpp(path) as llama:
        answers = [llama.token_logprobs(prompt)[-1] for prompt in prompts]
    theirs = torch.tensor([[answer[token] for token in range(105)] for answer in answers])
    plain = last(model, prompts)
    for name, layer in quantized_layers(model).items():
        assert cannot_hold(layer.quant_weight) == ""
        model.set_submodule(name, Rounded(layer))
    apart = [(theirs - ours).abs().amax(1) for ours in (plain, last(model, prompts))]
    print(
        f"median over {len(prompts)} prompts of the largest difference: {apart[0].median():.4f} as it is, "
        f"{apart[1].median():.1e} with activations rounded as in llama.cpp"
    )
    assert apart[0].median() > 0.01
    assert apart[1].median() < 1e-4


@pytest.mark.parametrize("adapter", [LoRA(), Elastic(), Pooled(form="side"), LoRA(train_start=False)], ids=str)
@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_serves_base_and_adapter(kind: str, adapter: Any, tokenizer: Any, tmp_path: Path) -> None:
    start = "zero" if getattr(adapter, "train_start", True) else "lq"
    model = with_adapter(quantized(tiny(kind), NF4), adapter, alpha=6.0, start=start)
    ids = torch.randint(2, 300, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    base, lora = tmp_path / "base.gguf", tmp_path / "lora.gguf"
    report = export_gguf_lora(model, lora)
    export_gguf(quantized(tiny(kind), NF4), tokenizer, base)
    assert differences(base, model, ids, lora=lora).max() < 1e-3
    assert differences(base, model, ids).max() > 0.1
    assert len(report.tensors) == 2 * 14
    assert report.bits_per_weight == pytest.approx(8 * sum(row.nbytes for row in report.tensors) / (2 * 30720))
    assert report.bytes == lora.stat().st_size


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


BEGIN = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 1)])
KINDS = {
    "gpt-2": {},
    "gpt-2 with bos": {"post_processor": BEGIN},
    "smollm": {
        "pre": pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    },
    "llama-bpe": {"pre": split(LLAMA3), "ignore_merges": True, "post_processor": BEGIN},
    "dbrx": {"pre": split(LLAMA3)},
    "qwen2": {"pre": split(QWEN2), "normalizer": normalizers.NFC()},
    "bloom": {"pre": split(BLOOM)},
    "falcon": {
        "pre": pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
            ]
        )
    },
}


def texts(count: int) -> list[str]:
    """Ordinary lines, and strings of characters that tokenizers stumble over (composed ones, because of NFC)."""
    choose = random.Random(0)
    pieces = [
        *"abcXYZ 019'.,!?-\n\t\r  éßñ日本語🎉\u02bc\u2019“…—\u00a0\u200b\u0661½²Ⅷ▁",
        "'s",
        "'LL",
        "I'VE",
        " \n",
        "\n\n",
        "   ",
        "<think>",
    ]
    return [*TEXT.split("\n"), *("".join(choose.choices(pieces, k=choose.randint(1, 30))) for _ in range(count))]


@pytest.mark.parametrize("kind", KINDS)
def test_byte_level_tokenizers_are_llama_cpps(kind: str, tmp_path: Path) -> None:
    tokenizer = byte_level(**KINDS[kind])
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    report = export_gguf(quantized(tiny(num_hidden_layers=1)), tokenizer, tmp_path / "model.gguf")
    again, tried = load_tokenizer(str(tmp_path / "model.gguf")), [text for text in texts(400) if text]
    with LlamaCpp(tmp_path / "model.gguf") as llama:
        wrong = [text for text in tried if llama.tokenize(text) != tokenizer(text).input_ids]
    assert wrong == []
    assert [text for text in tried if again(text).input_ids != tokenizer(text).input_ids] == []
    assert any("NFC" in note for note in report.notes) == (kind == "qwen2")


def sentencepiece(kind: str) -> Any:
    """The tokenizer of stories260K, or the same rules in the form that transformers' LlamaTokenizer gives them."""
    _, tokenizer = trained("stories260K-hf")
    if kind == "metaspace":
        backend = tokenizer.backend_tokenizer
        backend.normalizer, backend.pre_tokenizer = (
            normalizers.Sequence([]),
            pre_tokenizers.Metaspace(prepend_scheme="first", split=False),
        )
    if kind in ("no prefix", "gemma"):
        tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" ", "▁")
    if kind == "gemma":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    return tokenizer


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "no prefix", "gemma"])
def test_sentencepiece_tokenizers_are_llama_cpps(kind: str, tmp_path: Path) -> None:
    model, tokenizer = trained("stories260K-hf")[0], sentencepiece(kind)
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    with LlamaCpp(tmp_path / "model.gguf") as llama:
        wrong = [text for text in texts(400) if text and llama.tokenize(text) != tokenizer(text).input_ids]
    known = "to a text that begins with a space llama.cpp adds one more, the tokenizer does not"
    assert (known in report.notes) == (kind == "metaspace")
    assert all(text.startswith((" ", "▁")) for text in wrong)
    assert bool(wrong) == (kind == "metaspace")


def test_scores_follow_the_merges_as_the_sentencepiece_model_does() -> None:
    import sentencepiece as spm

    _, tokenizer = trained("stories260K-hf")
    vocabulary = gguf_vocabulary.read_vocabulary(json.loads(tokenizer.backend_tokenizer.to_str()), 512)
    model = spm.SentencePieceProcessor(str(SHARED / "models" / "stories260K-hf" / "tokenizer.model"))
    merged = [index for index in range(512) if vocabulary.scores[index] > min(vocabulary.scores)]
    assert len(merged) > 100
    assert sorted(merged, key=lambda index: vocabulary.scores[index]) == sorted(merged, key=model.GetScore)


def test_a_vocabulary_without_bytes_is_announced(tmp_path: Path) -> None:
    model, tokenizer = trained("babyllama105-hf")
    path = tmp_path / "model.gguf"
    report = export_gguf(model, tokenizer, path)
    assert any("no bytes" in note for note in report.notes)
    assert tokenize(path, "The fox's tail.") == tokenizer("The fox's tail.").input_ids
    with pytest.raises(ExportError, match="/tokenize failed"):
        tokenize(path, "海")


REFUSED = {
    "pre_tokenizer": {
        "pre": pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    },
    "prefix": {"pre": pre_tokenizers.ByteLevel(add_prefix_space=True)},
    "normalizer Lowercase": {"normalizer": normalizers.Lowercase()},
    "neither byte-level": {"pre": pre_tokenizers.Whitespace()},
    r"puts tokens \[1, 1\] before": {
        "post_processor": processors.TemplateProcessing(
            single="<|begin|> <|begin|> $A", special_tokens=[("<|begin|>", 1)]
        )
    },
}


@pytest.mark.parametrize("why", REFUSED)
def test_refuses_unknown_tokenizers(why: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=why):
        export_gguf(quantized(tiny()), byte_level(**REFUSED[why]), tmp_path / "model.gguf")
    assert list(tmp_path.iterdir()) == []


def test_refuses_tokenizers_of_other_models(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"the model only 128 rows"):
        export_gguf(quantized(tiny(vocab_size=128)), tokenizer, tmp_path / "model.gguf")
    endless = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ExportError, match=r"Set tokenizer.eos_token"):
        export_gguf(quantized(tiny(eos_token_id=None)), endless, tmp_path / "model.gguf")
    with pytest.raises(ExportError, match="not a fast tokenizer"):
        export_gguf(quantized(tiny()), object(), tmp_path / "model.gguf")


def test_says_what_it_cannot_load(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" * 100)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(ExportError, match=r"bad.gguf: llama.cpp cannot load it"):
        complete(tmp_path / "bad.gguf", [1], 1)
    assert signal.getsignal(signal.SIGINT) is handler
    assert capfd.readouterr() == ("", "")


def test_closes_at_once(tokenizer: Any, tmp_path: Path) -> None:
    """A server that is closed before its loop runs would never end."""
    export_gguf(quantized(tiny()), tokenizer, tmp_path / "model.gguf")
    for _ in range(3):
        llama = LlamaCpp(tmp_path / "model.gguf")
        closing = threading.Thread(target=llama.close, daemon=True)
        closing.start()
        closing.join(10)
        assert not closing.is_alive()


def test_is_silent_and_leaves_ctrl_c_alone(tokenizer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_gguf(quantized(tiny()), tokenizer, tmp_path / "model.gguf")
    capfd.readouterr()
    with LlamaCpp(tmp_path / "model.gguf", threads=2) as llama:
        assert len(llama.complete([1, 5, 9], 5)) == 5
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert len(llama.complete([1, 5, 9], 5)) == 5
    assert capfd.readouterr() == ("", "")
