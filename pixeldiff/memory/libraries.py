"""What libraries take beside tensors: measured or documented numbers, each with its reason."""

from __future__ import annotations

import torch

# Resident set of a process that has imported PyTorch, before and after its first picture: pages of
# code of PyTorch, MKL and oneDNN that were not yet touched, what they keep for themselves, buffers
# of checkpoint reading. Measured where freed memory was given back at once: 32 to 46 MB for PiD in
# fp32, whose latent branch is convolutions of oneDNN, 18 to 31 MB for L2P.
PID_CPU, PID_CPU_16_BITS, L2P_CPU = 40_000_000, 30_000_000, 22_000_000
# Code of PyTorch's own ops where they stand in for all of ours.
REFERENCE_CPU = 6_000_000
# Of each matrix product of another shape in 16 bits: oneDNN compiles it and keeps it. As measured
# by 16 to 33 of them; it makes about a fifth more than are counted here.
PRODUCT_CPU = 800_000

# PyTorch's default for cuBLAS on compute capability 9.0 (CUBLAS_WORKSPACE_CONFIG), and as much for
# cuBLASLt; devices before it take a quarter.
CUBLAS_WORKSPACE = 2 * (32 << 20)
# Of cuDNN's convolutions of the latent's stack: an allowance, not measured.
CUDNN_WORKSPACE = 64 << 20

# Weights in bf16 of the text encoders that are loaded where a text is given.
GEMMA_2_2B = 2_614_341_888 * 2
QWEN3_4B = 4_022_468_096 * 2


def products_on_cpu(count: int) -> int:
    """Bytes that oneDNN keeps for matrix products of so many shapes in 16 bits, where it has any
    for this processor."""
    # A PyTorch that was built without oneDNN has no such question to ask.
    has = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return PRODUCT_CPU * count if has else 0
