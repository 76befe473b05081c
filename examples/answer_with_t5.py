"""Tune an encoder-decoder, such as T5, over 4-bit weights to answer questions about little stories, and merge it.

    python examples/answer_with_t5.py MODEL OUTPUT

MODEL is the folder of an encoder-decoder; OUTPUT is a folder for the result. The stories are made up by quadapt.
"""

import sys
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, Trainer, TrainingArguments

import quadapt
from quadapt.demo.stories import rows, stories, write_jsonl
from quadapt.tasks import TASKS, Asking, Reading

model_folder, output = sys.argv[1], Path(sys.argv[2])
output.mkdir(parents=True)
for split, count in (("train", 128), ("held_out", 16)):
    write_jsonl(output / f"{split}.jsonl", rows(stories(0, count, split)))
task, reading = TASKS["seq2seq"](), Reading()
train, test = (task.read([str(output / f"{split}.jsonl")], reading) for split in ("train", "held_out"))
tokenizer = AutoTokenizer.from_pretrained(model_folder)

# The layer `wo` stays as it is: T5 reads its dtype in code of its own. All else but the embeddings is quantized.
model = quadapt.prepare(AutoModelForSeq2SeqLM.from_pretrained(model_folder), rounding="nearest", bits=4, rank=8)
data = task.encode(train, tokenizer, model.config, length=128, reading=reading).data
arguments = TrainingArguments(f"{output}/runs", num_train_epochs=2, learning_rate=3e-3, report_to="none")
print("before:", task.measure(model, tokenizer, test, Asking(length=128, max_new_tokens=8))["perplexity"]["loss"])
Trainer(model, arguments, task.collator(tokenizer, model), data).train()
merged, certificate = quadapt.merge(model)
print("after:", task.measure(merged, tokenizer, test, Asking(length=128, max_new_tokens=8))["perplexity"]["loss"])
print(certificate)
merged.save_pretrained(output)
tokenizer.save_pretrained(output)
