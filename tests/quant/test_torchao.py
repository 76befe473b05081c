"""GPTQ against an implementation that is not ours: torchao's, on the same layer and the same statistics.

torchao's runs on CUDA alone, by its own word; the algorithm itself does not care. So its assertions are switched off
(`PYTHONOPTIMIZE`), and the three parts that live in its CUDA library are replaced: waiting for the device, packing, and
the choice of a group's smallest and largest level, for which ours stands in. The walk over the columns is all theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from reference.gptq_numpy import weighted_error

from quadapt.quant.format import Format
from quadapt.quant.gptq import GPTQ
from quadapt.quant.rounding import Nearest
from quadapt.quant.storage import Storage
from quadapt.quant.weight import Layout, QuantWeight

THEIRS = """
import json, sys
import torch
from torchao.prototype.gptq import api
from torchao.quantization import Int4WeightOnlyConfig

torch.cuda.synchronize = lambda: None


def grid(x, group_size):
    low, high = x.amin(1), x.amax(1)
    scale = ((high - low) / 15).half().float()
    return None, scale[None], (low.half().float() + 8 * scale)[None]


api.int4_row_quantize_zp, api.pack_int4 = grid, lambda codes: codes
api.Int4Tensor = lambda qdata, **rest: qdata.int() + 8
weight, moment = torch.load(sys.argv[1])
found = {}
for size in (32, 128):
    base = Int4WeightOnlyConfig(group_size=size)
    config = api.GPTQConfig(step="convert", base_config=base, gptq_quantize_block_size=128)
    found[size] = api.gptq_quantize(moment.clone(), weight.clone(), config).tolist()
print(json.dumps(found))
"""


def test_every_code_is_that_of_torchaos_gptq(run_python: Callable[..., str], tmp_path: Path) -> None:
    mix = torch.randn(256, 256) / 16 + 0.5 * torch.eye(256)
    inputs = torch.randn(1000, 256) @ mix * torch.rand(256).add(0.1)
    weight, moment = 0.05 * torch.randn(96, 256).double(), (inputs.T @ inputs / 1000).double()
    torch.save((weight, moment), tmp_path / "layer.pt")
    theirs = json.loads(run_python(THEIRS, str(tmp_path / "layer.pt"), PYTHONOPTIMIZE="1").splitlines()[-1])

    def error(quantized: QuantWeight) -> float:
        return weighted_error((weight - quantized.dequantize()).numpy(), moment.numpy())

    for size in (32, 128):
        layout = Layout(format=Format(bits=4, group_size=size), storage=Storage(), out=96, columns=256)
        ours = GPTQ()(weight, layout, {"second_moment": moment})
        assert torch.equal(ours.codes().int(), torch.tensor(theirs[str(size)]).int())
        assert error(ours) < 0.7 * error(Nearest()(weight, layout, {}))
