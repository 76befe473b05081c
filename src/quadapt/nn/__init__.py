"""Modules: the quantized linear layer, the adapters that train over it, and how an adapter starts."""
