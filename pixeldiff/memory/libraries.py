"""What libraries take beside tensors: measured or documented numbers, each with its reason."""

from __future__ import annotations

# Resident set of a process that has imported PyTorch, before and after its first picture: pages of
# code of PyTorch, MKL and oneDNN that were not yet touched, what they keep for themselves, buffers
# of checkpoint reading. Measured where freed memory was given back at once
# (MALLOC_MMAP_THRESHOLD_=262144): 33 to 46 MB for PiD, whose latent branch is convolutions of
# oneDNN, 20 to 26 MB for L2P, whatever the network and its size.
PID_CPU, L2P_CPU = 40_000_000, 22_000_000

# PyTorch's default for cuBLAS on compute capability 9.0 (CUBLAS_WORKSPACE_CONFIG), and as much for
# cuBLASLt; devices before it take a quarter.
CUBLAS_WORKSPACE = 2 * (32 << 20)
# Of cuDNN's convolutions of the latent's stack: an allowance, not measured.
CUDNN_WORKSPACE = 64 << 20

# Weights in bf16 of the text encoders that are loaded where a text is given.
GEMMA_2_2B = 2_614_341_888 * 2
QWEN3_4B = 4_022_468_096 * 2
