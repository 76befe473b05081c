"""Quantize a model with settings of your own, and write it as a GGUF file for llama.cpp.

    python examples/quantize_and_export.py MODEL TEXT OUTPUT.gguf

MODEL is the folder of a dense model, TEXT a file like the text that the model will see, OUTPUT the file to write.
"""

import sys

from transformers import AutoTokenizer

import quadapt
from quadapt.methods import gptq_lora

model_folder, text, output = sys.argv[1:]

# A method is a choice along several axes, and each of them can be given by itself. Here: 4-bit integers in groups of
# 32, whose ranges have the least squared error, rounded by GPTQ on 64 pieces of the text; the output head stays dense.
method = gptq_lora(bits=4, group_size=32, range="mse")
prepared = quadapt.prepare(model_folder, method=method, calibration=text, calibration_sequences=64, skip=["lm_head"])

# What `prepare` gives has an adapter on it. It is not wanted here, and has not trained: taken off, the base is left.
model = prepared.unload()

# A GGUF file holds the codes as they are: nothing is rounded again. What the format cannot hold, it refuses by name.
report = quadapt.export(model, AutoTokenizer.from_pretrained(model_folder), output, format="gguf")
print(report)
