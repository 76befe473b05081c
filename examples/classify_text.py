"""Give an encoder a head for its labels and tune it over 3-bit weights by LQ-LoRA, as the paper does with RoBERTa.

    python examples/classify_text.py MODEL TRAIN TEST OUTPUT

MODEL is the folder of an encoder, TRAIN and TEST are tables with the columns text and label, OUTPUT is a new folder.
"""

import sys

from transformers import AutoModelForSequenceClassification, AutoTokenizer, Trainer, TrainingArguments

import quadapt
from quadapt.tasks import TASKS, Asking, Reading

model_folder, train, test, output = sys.argv[1:]
task, reading = TASKS["sequence-classification"](), Reading()
rows, held_out = task.read([train], reading), task.read([test], reading)
names = sorted({row["label"] for row in rows.rows})
dense = AutoModelForSequenceClassification.from_pretrained(
    model_folder, num_labels=len(names), id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
)
tokenizer = AutoTokenizer.from_pretrained(model_folder)
data = task.encode(rows, tokenizer, dense.config, length=64, reading=reading).data

# Each matrix becomes low-rank factors, which train, and 3-bit NormalFloat codes of the rest. The head trains, too.
model = quadapt.prepare(dense, method="lq-lora", bits=3, rank=8)
arguments = TrainingArguments(f"{output}/runs", num_train_epochs=4, learning_rate=3e-3, report_to="none")
print("before:", task.measure(model, tokenizer, held_out, Asking(length=64))["metrics"])
Trainer(model, arguments, task.collator(tokenizer, dense), data).train()
print("after:", task.measure(model, tokenizer, held_out, Asking(length=64))["metrics"])

# The adapter and its base, side by side: quadapt.load(OUTPUT, base=OUTPUT/base) puts them together again.
model.save_pretrained(output)
model.unload().save_pretrained(f"{output}/base")
tokenizer.save_pretrained(f"{output}/base")
