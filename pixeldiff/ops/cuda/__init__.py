"""CUDA backends of the ops: the kernels of csrc/cuda by pointer, and what PyTorch itself calls."""
