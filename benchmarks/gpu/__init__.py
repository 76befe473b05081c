"""Checks and benchmarks of what runs on a GPU. They need torch, triton, transformers, peft, numba and scipy alone."""
