import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM

from quadapt.data import Collator, encode, pad_token_id
from quadapt.data.encode import best_fit
from quadapt.data.examples import examples
from quadapt.errors import ConfigError, DataError

BOS, EOS, NO = 1, 2, -100
same_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def bearing(tokenizer, sequence):
    """Text of the tokens of a sequence that bear loss."""
    return tokenizer.decode([label for label in sequence["labels"] if label != NO])


# --- text -------------------------------------------------------------------------------------------------------------


def test_texts_are_joined_and_cut_into_blocks(chars, make_rows):
    stream = [BOS, *ids_of(chars, "abcd"), EOS, BOS, *ids_of(chars, "ef"), EOS]
    encoded = encode(make_rows("text", ["abcd", " \n", "ef"]), chars, seq_len=4, packing=False)
    blocks = [stream[:4], stream[4:8], stream[8:]]
    assert encoded.data.to_list() == [{"input_ids": block, "labels": [NO, *block[1:]]} for block in blocks]
    report = encoded.report
    assert (report.examples, report.sequences, report.tokens, report.loss_tokens) == (3, 3, 10, 7)
    assert (report.dropped, report.truncated, report.tokens_lost) == (1, 0, 0)
    assert "1 examples dropped: their text is blank" in report.notes
    assert report.packing


@pytest.mark.parametrize(("seq_len", "lost"), [(2, 1), (3, 1), (4, 0), (6, 1), (7, 0), (100, 0)])
def test_a_token_left_alone_is_counted(chars, make_rows, seq_len, lost):
    report = encode(make_rows("text", ["abcde"]), chars, seq_len=seq_len, packing=True).report
    assert (report.tokens, report.tokens_lost) == (7 - lost, lost)


# --- prompts and completions ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "labels"),
    [
        ({}, [NO, NO, NO, "c", "d", EOS]),
        ({"completion_only": False}, [NO, "a", "b", "c", "d", EOS]),
        ({"add_eos": False}, [NO, NO, NO, "c", "d"]),
    ],
)
def test_labels(chars, make_rows, options, labels):
    expected = [chars.convert_tokens_to_ids(label) if isinstance(label, str) else label for label in labels]
    encoded = encode(make_rows("prompt-completion", [("ab", "cd")]), chars, seq_len=10, packing=False, **options)
    ids = [BOS, *ids_of(chars, "abcd"), EOS][: len(labels)]
    assert encoded.data.to_list() == [{"input_ids": ids, "labels": expected}]
    assert encoded.report.loss_tokens == len(labels) - labels.count(NO)


def test_the_end_of_sequence_bears_loss_even_if_it_pads(chars, make_rows):
    chars.pad_token = "</s>"
    encoded = encode(make_rows("prompt-completion", [("a", "b")]), chars, seq_len=10, packing=False)
    assert encoded.data[0]["labels"][-1] == EOS
    assert encoded.report.notes == ()


@pytest.mark.parametrize(
    ("prompt", "completion", "apart"),
    [
        ("Answer:", " yes", False),
        ("Answer: ", "yes", True),
        ("Answer: y", "es", True),
        ("yes\n", "\nno", True),
        ("yes\n", ".no", False),
        ("", "yes", False),
        ("Answer:", "yes", False),
    ],
)
def test_the_prompt_is_tokenized_as_it_is_for_generation(pieces, make_rows, prompt, completion, apart):
    encoded = encode(make_rows("prompt-completion", [(prompt, completion)]), pieces, seq_len=50, packing=False)
    ids, labels = encoded.data[0]["input_ids"], encoded.data[0]["labels"]
    alone = pieces(prompt)["input_ids"]
    assert ids[: len(alone)] == alone
    assert labels[: len(alone)] == [NO] * len(alone)
    assert labels[len(alone) :] == ids[len(alone) :]
    assert pieces.decode(ids[1:-1]) == prompt + completion  # above all, no space in between
    assert any("tokenized apart" in note for note in encoded.report.notes) is apart


@pytest.mark.parametrize(
    ("seq_len", "sequences", "truncated", "lost", "dropped"),
    [
        (20, 3, 0, 0, 0),
        (10, 3, 0, 0, 0),
        (9, 3, 1, 1, 0),
        (5, 3, 2, 6, 0),
        (4, 2, 1, 6, 1),
        (3, 1, 1, 1, 2),
        (2, 0, 0, 0, 3),
    ],
)
def test_cut_examples_are_counted(chars, make_rows, seq_len, sequences, truncated, lost, dropped):
    rows = make_rows("prompt-completion", [("abc", "d"), ("ab", "cdefgh"), ("a", "b")])  # 6, 10 and 4 tokens
    report = encode(rows, chars, seq_len=seq_len, packing=False).report
    assert (report.sequences, report.truncated, report.tokens_lost) == (sequences, truncated, lost)
    assert report.dropped == dropped
    assert any(f"beyond their first {seq_len} tokens" in note for note in report.notes) is (dropped > 0)


def test_blank_completions_are_dropped(chars, make_rows):
    rows = make_rows("prompt-completion", [("a", " "), ("a", "b"), ("b", "")])
    encoded = encode(rows, chars, seq_len=9, packing=True)
    assert encoded.report.dropped == 2
    assert "2 examples dropped: their completion is blank" in encoded.report.notes
    assert bearing(chars, encoded.data[0]) == "b</s>"


def test_a_token_that_nothing_predicts_trains_nothing(chars, make_rows):
    chars.backend_tokenizer.post_processor = TemplateProcessing("$A", special_tokens=[])
    rows = make_rows("prompt-completion", [("", "a"), ("", "ab")])
    encoded = encode(rows, chars, seq_len=9, packing=False, add_eos=False)
    assert [row["labels"] for row in encoded.data] == [[NO, *ids_of(chars, "b")]]
    assert encoded.report.dropped == 1


PAIRS = st.lists(st.tuples(st.text("abc ", max_size=12), st.text("xyz ", max_size=12)), min_size=1, max_size=30)


@same_fixtures
@given(pairs=PAIRS, seq_len=st.integers(2, 24), packing=st.booleans())
def test_every_token_is_accounted_for(chars, make_rows, pairs, seq_len, packing):
    rows = make_rows("prompt-completion", pairs)
    report = encode(rows, chars, seq_len=seq_len, packing=packing).report
    whole = [(len(example.ids), bool(example.loss[:seq_len].any())) for example in examples(rows, chars)]
    assert report.tokens + report.tokens_lost == sum(length for length, kept in whole if kept)
    assert report.truncated == sum(length > seq_len for length, kept in whole if kept)
    assert report.dropped == sum(not kept for _, kept in whole)
    assert report.examples == len(pairs)


@same_fixtures
@given(pairs=PAIRS, seq_len=st.integers(4, 40))
def test_packing_keeps_examples_whole_and_apart(chars, make_rows, pairs, seq_len):
    rows = make_rows("prompt-completion", pairs)
    packed = encode(rows, chars, seq_len=seq_len, packing=True).data
    parts = []
    for row in packed.to_list():
        assert len(row["input_ids"]) <= seq_len
        starts = [at for at, position in enumerate(row["position_ids"]) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
            assert row["position_ids"][start:end] == list(range(end - start))
            parts.append((row["input_ids"][start:end], row["labels"][start:end]))
    alone = encode(rows, chars, seq_len=seq_len, packing=False).data.to_list()
    assert sorted(parts) == sorted((row["input_ids"], row["labels"]) for row in alone)


@given(lengths=st.lists(st.integers(1, 50), max_size=80), spare=st.integers(0, 30))
def test_best_fit(lengths, spare):
    capacity = max(lengths, default=1) + spare
    bins = best_fit(lengths, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(lengths)))
    fills = sorted(sum(lengths[item] for item in items) for items in bins)
    assert all(0 < fill <= capacity for fill in fills)
    assert len(fills) < 2 or fills[0] + fills[1] > capacity  # no two would fit in one
    assert bins == sorted(sorted(items) for items in bins)


def test_best_fit_takes_the_tightest_bin():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit([3, 7, 3, 7], 10) == [[0, 1], [2, 3]]


@pytest.fixture
def llama(chars):
    def make(**options):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(chars),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.3,
            **options,
        )
        return LlamaForCausalLM(config).eval()

    return make


def summed_loss(model, sequences, batch, **change):
    """Loss summed over tokens, batch by batch."""
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, len(sequences), batch):
        inputs = Collator(0)(sequences[start : start + batch]) | change
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = model(**inputs).logits
        total += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1).double(), labels[:, 1:].flatten(), reduction="sum"
        )
    return float(total)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_loss_is_unpacked_loss(chars, make_rows, llama, attention):
    model = llama(attn_implementation=attention)  # its configuration asks for a cache, which would undo the packing
    generator = np.random.default_rng(0)
    letters = [*"abcdefgh"]
    rows = make_rows(
        "prompt-completion",
        [
            (
                "".join(generator.choice(letters, generator.integers(1, 9))),
                "".join(generator.choice(letters, generator.integers(1, 9))),
            )
            for _ in range(23)
        ],
    )
    alone = encode(rows, chars, seq_len=32, packing=False)
    packed = encode(rows, chars, seq_len=32, packing=True)
    assert packed.report.sequences < alone.report.sequences / 2
    assert packed.report.loss_tokens == alone.report.loss_tokens
    expected = summed_loss(model, alone.data.to_list(), batch=1)
    for batch in (1, 3):  # with 3, some of the packed rows are padded
        assert summed_loss(model, packed.data.to_list(), batch) == pytest.approx(expected, rel=1e-6)
    assert summed_loss(model, packed.data.to_list(), 3, use_cache=True) != pytest.approx(expected, rel=1e-3)
    assert summed_loss(model, packed.data.to_list(), 3, position_ids=None) != pytest.approx(expected, rel=1e-3)


# --- messages ---------------------------------------------------------------------------------------------------------

MARKED = (
    "{% for message in messages %}<|{{ message.role }}|>{% if message.role == 'assistant' %}"
    "{% generation %}{{ message.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")

CHAT = [("user", "hi"), ("assistant", "yes"), ("user", "so"), ("assistant", "no")]


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
@pytest.mark.parametrize(
    ("chat", "said"),
    [(CHAT, "yes<|end|>no<|end|>"), (CHAT[:3], "yes<|end|>"), ([("system", "be"), *CHAT[:2]], "yes<|end|>")],
)
def test_loss_on_what_the_assistant_says(chars, make_rows, template, chat, said):
    chars.chat_template = template
    encoded = encode(make_rows("messages", [chat]), chars, seq_len=60, packing=False)
    assert chars.decode(encoded.data[0]["input_ids"]) == "".join(f"<|{role}|>{text}<|end|>" for role, text in chat)
    assert bearing(chars, encoded.data[0]) == said


@pytest.mark.parametrize("template", [MARKED, UNMARKED], ids=["marked", "unmarked"])
def test_messages_that_all_bear_loss(chars, make_rows, template):
    chars.chat_template = template
    encoded = encode(make_rows("messages", [CHAT[:1]]), chars, seq_len=60, packing=False, completion_only=False)
    assert bearing(chars, encoded.data[0]) == "hi<|end|>"


def test_messages_are_packed_and_cut_like_prompts(chars, make_rows):
    chars.chat_template = UNMARKED
    encoded = encode(make_rows("messages", [CHAT, CHAT[:2], CHAT[:1], CHAT]), chars, seq_len=17, packing=True)
    report = encoded.report
    assert (report.truncated, report.tokens_lost, report.dropped, report.sequences) == (0, 0, 1, 3)
    assert "1 examples dropped: the assistant says nothing in them" in report.notes
    assert encode(make_rows("messages", [CHAT]), chars, seq_len=8, packing=False).report.truncated == 1


TEMPLATES = {
    "none": (None, CHAT, ["no chat template", "tokenizer.chat_template", "prompts and completions"]),
    "refusing": ("{{ raise_exception('roles must alternate') }}", CHAT, ["data:1", "cannot render", "must alternate"]),
    "silent": (
        "{% for m in messages %}{{ m.role }};{% endfor %}",
        CHAT,
        ["data:1", "cannot be found", "{% generation %}"],
    ),
    "a mistake": ("{{ messages[0].content + none }}", CHAT, ["data:1", "cannot render", "concatenate"]),
}


@pytest.mark.parametrize("case", TEMPLATES)
def test_templates_that_do_not_serve(chars, make_rows, case):
    chars.chat_template, chat, parts = TEMPLATES[case]
    with pytest.raises(DataError) as error:
        encode(make_rows("messages", [chat]), chars, seq_len=20, packing=False)
    for part in parts:
        assert part in str(error.value)


def test_a_tokenizer_without_offsets(chars, make_rows, monkeypatch):
    chars.chat_template = UNMARKED
    monkeypatch.setattr(type(chars), "is_fast", False)
    with pytest.raises(DataError, match="fast tokenizer"):
        encode(make_rows("messages", [CHAT]), chars, seq_len=20, packing=False)
    encoded = encode(make_rows("messages", [CHAT]), chars, seq_len=20, packing=False, completion_only=False)
    assert encoded.report.loss_tokens == encoded.report.tokens - 1


# --- tokenizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("eos", "pad", "token"), [("</s>", "<unk>", "<unk>"), ("</s>", None, "</s>"), (None, "a", "a")]
)
def test_pad_token(chars, eos, pad, token):
    chars.eos_token, chars.pad_token = eos, pad
    assert pad_token_id(chars) == chars.convert_tokens_to_ids(token)


def test_tokenizers_that_lack_tokens(chars, make_rows):
    rows = make_rows("text", ["abc"])
    assert encode(rows, chars, seq_len=4, packing=False).report.notes == ("the tokenizer has no pad token; </s> pads",)
    chars.eos_token = None
    with pytest.raises(DataError, match=r"neither a pad token nor an end-of-sequence token.*tokenizer\.pad_token"):
        encode(rows, chars, seq_len=4, packing=False)
    chars.pad_token = "<unk>"
    with pytest.raises(DataError, match=r"no end-of-sequence token.*tokenizer\.eos_token"):
        encode(rows, chars, seq_len=4, packing=False)
    assert encode(rows, chars, seq_len=4, packing=False, add_eos=False).report.tokens == 4


def test_a_tokenizer_that_ends_texts_itself(chars, make_rows):
    chars.backend_tokenizer.post_processor = TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    encoded = encode(make_rows("prompt-completion", [("ab", "c")]), chars, seq_len=9, packing=False)
    assert chars("abc")["input_ids"] == [BOS, *ids_of(chars, "abc"), EOS]
    assert encoded.data[0]["input_ids"] == [BOS, *ids_of(chars, "abc"), EOS]


def test_seq_len_needs_room(chars, make_rows):
    with pytest.raises(ConfigError, match="seq_len=1"):
        encode(make_rows("text", ["abc"]), chars, seq_len=1, packing=False)
