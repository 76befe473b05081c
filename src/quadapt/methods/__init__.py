"""The published methods, one file a paper: each a choice along the library's axes.

Every function gives a :class:`Method`, which can be changed further before it is used::

    from quadapt.methods import qa_lora

    model = quadapt.prepare("model", method=qa_lora(bits=3, rank=32), calibration="text.txt")

A new paper is usually one new piece (an adapter, a start, a rounding) and one new file here.
"""

from quadapt.methods.base import METHODS, Method, method_named
from quadapt.methods.cloq import cloq
from quadapt.methods.efficientqat import e2e_qp, efficientqat
from quadapt.methods.gptq_lora import gptq_lora
from quadapt.methods.ir_qlora import ir_qa_lora, ir_qlora
from quadapt.methods.l4q import l4q, qat_lora
from quadapt.methods.loftq import loftq
from quadapt.methods.lq_lora import lq_lora
from quadapt.methods.lr_qat import lr_qat
from quadapt.methods.peqa import peqa
from quadapt.methods.qa_lora import qa_lora, qa_lora_scales
from quadapt.methods.qlora import qlora
from quadapt.methods.quailora import quailora
from quadapt.methods.recipe import Recipe, Run

__all__ = [
    "METHODS",
    "Method",
    "Recipe",
    "Run",
    "cloq",
    "e2e_qp",
    "efficientqat",
    "gptq_lora",
    "ir_qa_lora",
    "ir_qlora",
    "l4q",
    "loftq",
    "lq_lora",
    "lr_qat",
    "method_named",
    "peqa",
    "qa_lora",
    "qa_lora_scales",
    "qat_lora",
    "qlora",
    "quailora",
]

# A file that was added to this package has its functions here too, where its own name would stand otherwise.
globals().update({name.replace("-", "_"): function for name, function in METHODS.own().items()})
