"""Hand a model over to other programs, from its codes, scales and offsets; nothing is quantized again on the way.

`formats/` has the formats themselves: what each can hold, its options, and how it is written, known by name in a
registry. The code that writes them is here: `gguf.py` (llama.cpp and what is built on it), `dense.py` (an ordinary
transformers folder), `lora.py` (an ordinary PEFT adapter), `gguf_lora.py` (llama.cpp's adapter), `nf8.py` (an adapter
in 8 bits); and folders of codes in the layouts of other software (`codes.py`): `compressed_tensors.py` (vLLM's),
`gptq.py`, `awq.py`, `bitsandbytes.py`. Each gives an `ExportReport` (`report.py`). `survey.py` asks all formats what
they make of a model. `llama_cpp.py` runs llama.cpp, to compare its answers with the model's.
"""
