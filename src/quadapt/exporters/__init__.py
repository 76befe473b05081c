"""Hand a model over to other programs, from its codes, scales and offsets; nothing is quantized again on the way.

One file a format: `gguf.py` (llama.cpp and what is built on it), `dense.py` (an ordinary transformers folder),
`lora.py` (an ordinary PEFT adapter), `gguf_lora.py` (llama.cpp's adapter), `compressed_tensors.py` (vLLM's). Each gives
an `ExportReport` (`report.py`).
`llama_cpp.py` runs llama.cpp, to compare its answers with the model's.
"""

from __future__ import annotations

EXPORTERS = {
    "gguf": "one file for llama.cpp: codes of 2 to 4 bits in Q4_1 blocks, bit for bit (Llama, Mistral, Qwen2, Qwen3)",
    "hf": "an ordinary transformers folder with dense bf16, fp16 or fp32 weights, for any server",
    "compressed-tensors": "a folder for vLLM: codes as they are, of integers with whole zero-points or none",
    "lora": "an ordinary PEFT adapter, for a server that holds the dense base",
}
"""What `quadapt export --format` can write."""
