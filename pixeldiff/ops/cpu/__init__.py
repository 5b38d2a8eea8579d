"""CPU backends of the ops: they hand pointers to the compiled kernels of csrc/cpu."""
