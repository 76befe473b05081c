"""Draw circles and squares, and tune a vision transformer over 4-bit weights to tell them apart.

    python examples/classify_shapes.py MODEL OUTPUT

MODEL is the folder of a model of pictures, such as ViT, with its image processor; OUTPUT a folder for the result.
"""

import random
import sys
from pathlib import Path

from PIL import Image, ImageDraw
from transformers import AutoImageProcessor, AutoModelForImageClassification, Trainer, TrainingArguments

import quadapt
from quadapt.tasks import TASKS, Asking, Reading

model_folder, output = sys.argv[1], Path(sys.argv[2])
dice = random.Random(0)
for number in range(160):  # a folder for each label, in a folder for each split
    name, picture = ("circle", "square")[number % 2], Image.new("RGB", (32, 32), "black")
    x, y, size = dice.randrange(4, 12), dice.randrange(4, 12), dice.randrange(10, 16)
    draw = ImageDraw.Draw(picture)
    (draw.ellipse if name == "circle" else draw.rectangle)((x, y, x + size, y + size), fill="white")
    folder = output / "shapes" / ("train" if number < 128 else "test") / name
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{number}.png")

task, reading = TASKS["image-classification"](), Reading()
train, test = (task.read([str(output / "shapes")], reading, held_out=held_out) for held_out in (False, True))
processor = AutoImageProcessor.from_pretrained(model_folder)
dense = AutoModelForImageClassification.from_pretrained(model_folder, id2label={0: "circle", 1: "square"})
model = quadapt.prepare(dense, rounding="nearest", bits=4, rank=8)
data = task.encode(train, processor, dense.config, length=0, reading=reading).data
arguments = TrainingArguments(f"{output}/runs", num_train_epochs=12, learning_rate=2e-3, report_to="none")
Trainer(model, arguments, task.collator(processor, model), data).train()
merged, certificate = quadapt.merge(model)
print(certificate)
print("accuracy:", task.measure(merged, processor, test, Asking())["metrics"]["accuracy"])
