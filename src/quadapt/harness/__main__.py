"""The harness's own command line, which knows models of quadapt: `python -m quadapt.harness --model quadapt ..`.

`lm_eval` has no way to name a model of another package on its command line, so this one line stands for `lm_eval`:
with it, quadapt is imported first, which makes transformers and the harness know what is ours. Both
its model `hf` (quantized folders) and ours, `quadapt` (adapters and GGUF files too), are known here.
"""

from __future__ import annotations

from quadapt.errors import require

if __name__ == "__main__":
    require("lm_eval.__main__", "eval").cli_evaluate()
