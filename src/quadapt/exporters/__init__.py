"""Hand a model over to other programs, from its codes, scales and offsets; nothing is quantized again on the way.

One file a format: `gguf.py` (llama.cpp and what is built on it), `dense.py` (an ordinary transformers folder),
`lora.py` (an ordinary PEFT adapter), `gguf_lora.py` (llama.cpp's adapter), `compressed_tensors.py` (vLLM's). Each gives
an `ExportReport` (`report.py`).
`llama_cpp.py` runs llama.cpp, to compare its answers with the model's.
"""
