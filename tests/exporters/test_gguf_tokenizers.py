"""Tokens of a hard text: those of llama.cpp, of the tokenizer that a file is made of, and of the one read back."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from export_models import quantized, tiny, trained
from hard_text import HARD, MARKS, mixed
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from quadapt.errors import ExportError
from quadapt.exporters.gguf import export_gguf
from quadapt.exporters.llama_cpp import LlamaCpp
from quadapt.hf.loading import load_tokenizer
from quadapt.importers.gguf_splits import CUTS, Cut, cut_of

pytest.importorskip("xllamacpp", reason="needs xllamacpp (pip install 'quadapt[demo]')")

MARKED = {"eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


def wrong(tokenizer: Any, path: Path, *, marks: bool = True) -> tuple[list[str], list[str], tuple[str, ...]]:
    """Texts that llama.cpp cuts otherwise than the tokenizer, and than what is read back; and the notes of the file."""
    model = quantized(tiny(num_hidden_layers=1, vocab_size=2048))
    report = export_gguf(model, tokenizer, path)
    again, tried = load_tokenizer(str(path)), mixed(100, marks=marks)
    with LlamaCpp(path) as llama:
        theirs = [llama.tokenize(text) for text in tried]
    ours, read = ([made(text).input_ids for text in tried] for made in (tokenizer, again))
    differ = [text for text, ids, want in zip(tried, theirs, ours, strict=True) if ids != want]
    unread = [text for text, ids, want in zip(tried, theirs, read, strict=True) if ids != want]
    return differ, unread, report.notes


def by_bytes(cut: Cut) -> Any:
    """A byte-level tokenizer that cuts so, with as many merges as the text has."""
    content = json.loads(Tokenizer(models.BPE(ignore_merges=cut.whole)).to_str())
    content["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": list(cut.steps)}
    made = Tokenizer.from_str(json.dumps(content))
    made.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["</s>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special, show_progress=False, initial_alphabet=alphabet
    )
    made.train_from_iterator([HARD + MARKS] * 3, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", bos_token="<s>")
    tokenizer.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return tokenizer


@pytest.mark.parametrize("cut", CUTS, ids=[cut.name for cut in CUTS])
def test_byte_level_tokenizers_of_every_cut(cut: Cut, tmp_path: Path) -> None:
    tokenizer = by_bytes(cut)
    assert len(tokenizer) > 700  # so that a piece that is cut otherwise has other tokens
    differ, unread, notes = wrong(tokenizer, tmp_path / "model.gguf", marks=not cut.differs)
    assert differ == unread == []
    assert (cut.differs in notes) == bool(cut.differs)


@pytest.mark.parametrize("name", ["tekken", "gpt-4o"])
def test_what_is_said_to_be_cut_elsewhere_is(name: str, tmp_path: Path) -> None:
    """llama.cpp knows capitals from A to Z alone, and ends a word before a combining mark."""
    tokenizer = by_bytes(next(cut for cut in CUTS if cut.name == name))
    assert wrong(tokenizer, tmp_path / "model.gguf", marks=True)[0]


def test_patterns_are_known_however_line_ends_are_spelled() -> None:
    (deepseek,) = [cut for cut in CUTS if cut.name == "deepseek-v3"]
    spelled = json.loads(json.dumps(deepseek.steps).replace(r"\\r\\n", r"\r\n"))
    assert spelled != list(deepseek.steps)
    assert cut_of(spelled, whole=False) is deepseek
    assert cut_of(spelled, whole=True) is None
    assert cut_of(spelled[1:], whole=False) is None


def pieces(kind: str, rule: str) -> Any:
    """A vocabulary that sentencepiece has trained on the hard text."""
    import sentencepiece
    from transformers.convert_slow_tokenizer import import_protobuf

    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((HARD + MARKS).split("\n") * 4),
        model_writer=file,
        vocab_size=700 if kind == "bpe" else 400,
        character_coverage=1.0 if kind == "unigram" else 0.98,
        minloglevel=2,
        hard_vocab_limit=False,
        model_type=kind,
        byte_fallback=kind == "bpe",
        normalization_rule_name=rule,
    )
    found = import_protobuf().ModelProto()
    found.ParseFromString(file.getvalue())
    return found


def unigram(kind: str) -> Any:
    """A unigram tokenizer in the form of a family's tokenizer.json."""
    found = pieces("unigram", "identity" if kind == "identity" else "nmt_nfkc")
    made = Tokenizer(models.Unigram([(piece.piece, piece.score) for piece in found.pieces], 0, byte_fallback=False))
    table = [] if kind == "identity" else [normalizers.Precompiled(found.normalizer_spec.precompiled_charsmap)]
    space = pre_tokenizers.Metaspace(prepend_scheme="always", split=kind != "mt5, not split")
    if kind == "t5":
        made.normalizer = normalizers.Sequence(table)
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), space])
    else:
        ends = [normalizers.Strip(left=False, right=True), normalizers.Replace(Regex(" {2,}"), "▁")]
        made.normalizer = normalizers.Sequence(table + (ends if kind.startswith("mt5") else []))
        made.pre_tokenizer = space
    return PreTrainedTokenizerFast(tokenizer_object=made, **MARKED)


@pytest.mark.parametrize("kind", ["t5", "mt5", "mt5, not split"])
def test_unigram_tokenizers(kind: str, tmp_path: Path) -> None:
    differ, unread, notes = wrong(unigram(kind), tmp_path / "model.gguf")
    assert differ == unread == []
    assert not any("llama.cpp" in note for note in notes)


@pytest.mark.parametrize("kind", ["identity", "no runs"])
def test_unigram_tokenizers_that_keep_runs_of_spaces_say_what_differs(kind: str, tmp_path: Path) -> None:
    differ, _, notes = wrong(unigram(kind), tmp_path / "model.gguf")
    assert differ
    assert all(text[0].isspace() or "\r\n" in text for text in differ)
    assert "to a text that begins with a space llama.cpp adds one more, the tokenizer does not" in notes
    assert any("CR, LF" in note for note in notes) == (kind == "no runs")


def test_sentencepiece_bpe_with_bytes_for_what_it_does_not_know(tmp_path: Path) -> None:
    """Llama 2's kind: pieces that make a piece are merged, the best score first; rare characters are bytes."""
    found = pieces("bpe", "identity")
    ids = {piece.piece: number for number, piece in enumerate(found.pieces)}
    splits = [
        (-piece.score, piece.piece[:at], piece.piece[at:])
        for piece in found.pieces
        for at in range(1, len(piece.piece))
        if piece.piece[:at] in ids and piece.piece[at:] in ids and piece.type == 1
    ]
    merges = [(left, right) for _, left, right in sorted(splits)]
    made = Tokenizer(models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, **MARKED)
    assert any(token.startswith("<0x") for token in tokenizer.tokenize(HARD))
    differ, unread, notes = wrong(tokenizer, tmp_path / "model.gguf")
    assert differ == unread == []
    assert not any("bytes" in note or "merges" in note for note in notes)


def without(tokenizer: Any, *, fallback: bool) -> Any:
    """Babyllama's tokenizer, which has no bytes, saying whether it has."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["byte_fallback"] = fallback
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **MARKED)


@pytest.mark.parametrize("fallback", [False, True])
def test_byte_fallback_is_not_believed_without_bytes(fallback: bool, tmp_path: Path) -> None:
    model, tokenizer = trained("babyllama105-hf")
    report = export_gguf(model, without(tokenizer, fallback=fallback), tmp_path / "model.gguf")
    (note,) = [note for note in report.notes if "has no bytes" in note]
    assert ("though it says byte_fallback" in note) == fallback
    again = load_tokenizer(str(tmp_path / "model.gguf"))
    text = "The fox\nsaid 海 twice."
    assert again(text).input_ids == without(tokenizer, fallback=False)(text).input_ids  # line ends are not dropped
    with LlamaCpp(tmp_path / "model.gguf") as llama, pytest.raises(ExportError, match="/tokenize failed"):
        llama.tokenize(text)


def test_tokens_for_bytes_keep_llama_cpp_from_failing(tmp_path: Path) -> None:
    """They stand for the unknown token, and are as probable as it: by so much all others are less so."""
    model, tokenizer = trained("babyllama105-hf")
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf", unknown="bytes")
    assert any("256 tokens for bytes were added" in note for note in report.notes)
    assert not any("request fails" in note for note in report.notes)
    ids = tokenizer("The fox's tail was red. She said").input_ids
    with LlamaCpp(tmp_path / "model.gguf") as llama:
        assert llama.tokenize("The fox's tail was red. She said") == ids
        strange = llama.tokenize("The 海\n")
        assert [each for each in strange if each >= 105] == [105 + byte for byte in (0xE6, 0xB5, 0xB7, 0x0A)]
        assert len(llama.complete(strange, 3)) == 3
        (theirs,) = llama.token_logprobs(ids)[-1:]
    with torch.no_grad():
        ours = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    ours -= torch.log1p(256 * ours[0].exp())
    assert max(abs(theirs[token] - float(ours[token])) for token in range(105)) < 1e-3


def test_merges_that_llama_cpp_does_not_need_are_said(tmp_path: Path) -> None:
    model, tokenizer = trained("stories260K-hf")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    report = export_gguf(model, tokenizer, tmp_path / "model.gguf")
    assert not any("merges whatever" in note for note in report.notes)
    content["model"]["merges"] = content["model"]["merges"][:-40]
    fewer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **MARKED)
    report = export_gguf(model, fewer, tmp_path / "fewer.gguf")
    assert any("merges whatever makes a token" in note for note in report.notes)


def test_two_tokens_of_one_text_are_refused(tmp_path: Path) -> None:
    tokenizer = unigram("t5")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"].append(content["model"]["vocab"][-1])
    twice = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)), **MARKED)
    with pytest.raises(ExportError, match="more than one token"):
        export_gguf(quantized(tiny(num_hidden_layers=1, vocab_size=2048)), twice, tmp_path / "model.gguf")
