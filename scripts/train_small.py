"""Train a Llama of ten million parameters from text files, wide enough for the block formats of llama.cpp.

    python scripts/train_small.py --data stories.txt --data articles.txt --output small

Block formats of 256 weights need rows that are multiples of 256, which small published models do not have. This one is
what `benchmarks/served.py` measures them on; it is no good for anything else. It takes less than an hour on two cores.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from train_embedded import Descent, byte_level  # beside this script
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS = 0, 1
SPECIALS = ["<s>", "</s>"]
VOCAB, CONTEXT = 2048, 256
HELD_OUT = 64
"""Sequences at the end of the text that are not trained on."""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of the texts, as transformers wraps it."""
    names = {"bos_token": SPECIALS[BOS], "eos_token": SPECIALS[EOS]}
    made = byte_level(texts, VOCAB, SPECIALS, BOS)
    return PreTrainedTokenizerFast(tokenizer_object=made, model_max_length=CONTEXT, **names)


def make_model(seed: int) -> LlamaForCausalLM:
    """An untrained model of 10 million parameters, all of whose rows are multiples of 256."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def loss_of(model: LlamaForCausalLM, ids: Tensor, *, narrow: bool) -> Tensor:
    """Mean loss over sequences `[batch, length]`; where it is narrow, products of matrices are in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
        logits = model(input_ids=ids).logits[:, :-1]
    return cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())


def train(model: LlamaForCausalLM, sequences: Tensor, held: Tensor, args: argparse.Namespace) -> None:
    """Take all steps, going over the sequences in a new order each time."""
    descent = Descent(model, args.rate, args.steps)
    order, begun = torch.empty(0, dtype=torch.long), time.monotonic()
    for step in range(1, args.steps + 1):
        if len(order) < args.batch:
            order = torch.cat([order, torch.randperm(len(sequences))])
        rows, order = order[: args.batch], order[args.batch :]
        loss = loss_of(model, sequences[rows], narrow=args.narrow)
        descent.step(loss)
        if step % 20 == 0 or step == args.steps:
            with torch.no_grad():
                known = loss_of(model, held, narrow=args.narrow)
            left = (time.monotonic() - begun) * (args.steps - step) / step / 60
            print(
                f"step {step} of {args.steps}: loss {loss:.4f}, held out {known:.4f}; {left:.0f} min left", flush=True
            )


def main() -> None:
    """Train on the files, and write a checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, action="append", required=True, help="text; repeat for several")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=6e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--narrow", action="store_true", help="products in bfloat16: faster where the processor has it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    texts = [path.read_text(encoding="utf-8") for path in args.data]
    tokenizer, model = train_tokenizer(texts), make_model(args.seed)
    ids = torch.tensor([token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]])
    sequences = ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)].view(-1, CONTEXT - 1)
    sequences = torch.nn.functional.pad(sequences, (1, 0), value=BOS)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {ids.numel():,} tokens", flush=True)
    train(model, sequences[:-HELD_OUT], sequences[-HELD_OUT:], args)
    tokenizer.save_pretrained(args.output)
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, do_sample=False)
    model.half().save_pretrained(args.output)


if __name__ == "__main__":
    main()
