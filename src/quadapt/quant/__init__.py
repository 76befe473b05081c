"""Pure tensor mathematics of quantization: the grid, the bytes, the rounding, the product.

Knows torch, SciPy's normal quantiles and the kernels; knows nothing of modules, models or files.
"""
