"""A 3x3 convolution in numpy, tap by tap: the oracle of the local decoder's ops."""

import numpy as np


def convolved(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """x (B, H, W, Ci), weight (Co, Ci, 3, 3) -> (B, H, W, Co); zero padding, stride 1."""
    height, width = x.shape[1:3]
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    return sum(
        padded[:, row : row + height, column : column + width] @ weight[:, :, row, column].T
        for row in range(3)
        for column in range(3)
    )
