"""Tests for a CPU and a GPU: the case of the GPU is marked `gpu`, so that the other, which always
runs, shows that the test itself is right."""

from __future__ import annotations

import pytest
import torch

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
each_device = pytest.mark.parametrize("device", DEVICES)
