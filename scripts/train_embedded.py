"""Train the embedded default model, tokenizer included, from nothing but generated stories.

    python scripts/train_embedded.py --output src/quadapt/demo/model

The same arguments on the same machine give the same files. Needs no network; takes about an hour on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from quadapt.demo.stories import Split, narratives

PAD, BOS, EOS, UNK = range(4)
SPECIALS = ["<pad>", "<s>", "</s>", "<unk>"]
VOCAB = 480
CONTEXT = 512
EASY = 2000  # over the first steps the stories grow from two events to eight, else the search for names starts late
LONGEST = 8
WARMUP = 100
CHANCE_WEIGHT = 0.1  # of the words that chance decides, against 1 for those that follow from the state
CHUNK = 64  # batches that are made, and sorted by length, at a time
FILLER = "the quick brown fox jumps over a lazy dog while twenty five wizards mix quartz, jade and onyx for him"


@dataclass(frozen=True)
class Batch:
    """Token ids padded on the right, and which of them follow from the state."""

    ids: Tensor
    known: Tensor


def byte_level(texts: list[str], vocabulary: int, specials: list[str], bos: int) -> Tokenizer:
    """A byte-level BPE tokenizer that splits as GPT-2 does, so that llama.cpp's "gpt-2" reproduces it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} tokens, not {vocabulary}")
    begin = specials[bos]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{begin} $A", special_tokens=[(begin, bos)])
    return tokenizer


def train_tokenizer(seed: int) -> Tokenizer:
    """A tokenizer of the stories, which need fewer merges than there is room for; the rarer filler takes the rest."""
    texts = [narrative.text for narrative in narratives(seed, 5000)]
    return byte_level([*texts, FILLER], VOCAB, SPECIALS, BOS)


def make_model(seed: int) -> LlamaForCausalLM:
    """An untrained model of 1.1 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=160,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=5,
        num_key_value_heads=5,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=0.04,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: Tokenizer, seed: int, split: Split, count: int, size: int, easy: int = 0) -> Iterator[Batch]:
    """Yield batches of narratives of like length; the first `easy` ones have short stories that grow."""
    order = random.Random(seed)
    for start in range(0, count, CHUNK):
        longest = min(LONGEST, 2 + (LONGEST - 1) * start // easy) if easy else LONGEST
        texts = list(narratives(seed * 100_000 + start, size * min(CHUNK, count - start), split, longest))
        rows = []
        for text, encoding in zip(texts, tokenizer.encode_batch([t.text for t in texts]), strict=True):
            known = {begin for begin, _ in text.known}
            marks = [begin in known and end > begin for begin, end in encoding.offsets]
            rows.append(([*encoding.ids, EOS], [*marks, False]))
        rows.sort(key=lambda row: len(row[0]))
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        order.shuffle(groups)
        for group in groups:
            width = max(len(ids) for ids, _ in group)
            ids = torch.tensor([ids + [PAD] * (width - len(ids)) for ids, _ in group])
            yield Batch(ids, torch.tensor([marks + [False] * (width - len(marks)) for _, marks in group]))


def token_losses(model: LlamaForCausalLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """The loss of every token but the first, and the token that the model would have chosen there."""
    logits = model(input_ids=batch.ids).logits[:, :-1]  # causal, padded on the right: no mask needed
    losses = functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    return losses, logits.argmax(-1)


def training_loss(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    """The mean loss, in which the words that follow from the state count most: those teach to keep track."""
    losses, _ = token_losses(model, batch)
    weights = torch.where(batch.known[:, 1:], 1.0, CHANCE_WEIGHT) * (batch.ids[:, 1:] != PAD)
    return (losses * weights).sum() / weights.sum()


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, held_out: list[Batch]) -> dict[str, float]:
    """Perplexity of held-out narratives, and how many of the words that follow from the state are predicted."""
    total = tokens = right = known = 0.0
    for batch in held_out:
        losses, chosen = token_losses(model, batch)
        real, marks = batch.ids[:, 1:] != PAD, batch.known[:, 1:]
        total, tokens = total + losses[real].sum().item(), tokens + real.sum().item()
        right += (chosen == batch.ids[:, 1:])[marks].sum().item()
        known += marks.sum().item()
    return {"held-out perplexity": math.exp(total / tokens), "known words predicted": right / known}


def optimizers(model: LlamaForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices (it needs about half the stories that AdamW does), AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(matrices, lr=rate * 2 / 3, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


class Descent:
    """Steps of these optimizers, at rates that rise over `WARMUP` steps and fall to a fiftieth."""

    def __init__(self, model: LlamaForCausalLM, rate: float, steps: int) -> None:
        def share(step: int) -> float:
            return min(1.0, (step + 1) / WARMUP) * max(0.02, 1 - step / float(steps))

        self._model, self._chosen = model, optimizers(model, rate)
        self._schedules = [torch.optim.lr_scheduler.LambdaLR(each, share) for each in self._chosen]

    def step(self, loss: Tensor) -> None:
        """Lower a loss."""
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        for optimizer, schedule in zip(self._chosen, self._schedules, strict=True):
            optimizer.step()
            schedule.step()
        self._model.zero_grad()


def train(model: LlamaForCausalLM, tokenizer: Tokenizer, args: argparse.Namespace, held_out: list[Batch]) -> float:
    """Run all steps; returns the running mean of the training loss."""
    descent = Descent(model, args.rate, args.steps)
    begun, mean = time.monotonic(), math.nan
    training = batches(tokenizer, args.seed, "train", args.steps, args.batch, easy=min(EASY, args.steps // 2))
    for step, batch in enumerate(training, 1):
        loss = training_loss(model, batch)
        descent.step(loss)
        mean = loss.item() if math.isnan(mean) else 0.98 * mean + 0.02 * loss.item()
        if step % 250 == 0 or step == args.steps:
            left = (time.monotonic() - begun) * (args.steps - step) / step / 60
            scores = ", ".join(f"{name} {value:.4f}" for name, value in evaluate(model, held_out).items())
            print(f"step {step} of {args.steps}: loss {mean:.4f}, {scores}; {left:.0f} min left", flush=True)
    return mean


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, output: Path) -> None:
    """Write the weights in half precision, with all that a Llama checkpoint needs to load."""
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIALS, strict=True))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=CONTEXT, **names)
    wrapped.save_pretrained(output)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, do_sample=False)
    model.half().save_pretrained(output)


CARD = """# The embedded model of quadapt

A Llama with {parameters} parameters that reads little generated stories (`quadapt.demo.stories`). Made by

    python scripts/train_embedded.py --seed {seed} --steps {steps} --batch {batch} --rate {rate} --threads {threads}

from nothing else: no pretrained weights, no text from outside. The weights are stored in half precision.

```json
{figures}
```

It has read questions, but never their bare answers: tune it to have it answer. Apache-2.0, like the project.
"""


def main() -> None:
    """Train, save, and write the card with the figures of the saved model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("src/quadapt/demo/model"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=32, help="stories a step")
    parser.add_argument("--rate", type=float, default=4e-3, help="largest learning rate")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    tokenizer = train_tokenizer(args.seed)
    model = make_model(args.seed)
    held_out = list(batches(tokenizer, args.seed, "held_out", count=8, size=64))
    loss = train(model, tokenizer, args, held_out)
    save(model, tokenizer, args.output)
    saved = LlamaForCausalLM.from_pretrained(args.output, dtype=torch.float32)
    figures = {"training loss": loss, **evaluate(saved, held_out)}
    card = CARD.format(
        parameters=f"{saved.num_parameters():,}",
        figures=json.dumps({name: round(value, 4) for name, value in figures.items()}, indent=2),
        **{name: getattr(args, name) for name in ("seed", "steps", "batch", "rate", "threads")},
    )
    (args.output / "README.md").write_text(card, encoding="utf-8")
    print(card)


if __name__ == "__main__":
    main()
