"""patchify and unpatchify move data: every element is checked against its index, bitwise."""

import itertools

import pytest
import torch
from rules import Draw, assert_bitwise
from torch.utils._python_dispatch import TorchDispatchMode

from pixeldiff.ops import patchify, unpatchify

# (B, C, H, W, P)
SHAPES = {
    "production": (1, 3, 64, 96, 16),
    "primes": (2, 5, 21, 35, 7),
    "one": (1, 1, 1, 1, 1),
    "one-pixel-patches": (2, 3, 3, 5, 1),
}
each_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_patchify_by_index(shape, dtype):
    b, c, height, width, patch = shape
    x = torch.arange(b * c * height * width).reshape(b, c, height, width).to(dtype)
    h, w = height // patch, width // patch
    want = torch.empty(b, h * w, c * patch * patch, dtype=dtype)
    for row, col, channel, py, px in itertools.product(
        range(h), range(w), range(c), range(patch), range(patch)
    ):
        feature = channel * patch * patch + py * patch + px
        want[:, row * w + col, feature] = x[:, channel, row * patch + py, col * patch + px]
    assert_bitwise(patchify(x, patch), want)


@each_shape
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_patchify_channels_last(shape, dtype):
    """L2P's order: the same token with its channels moved from the outside to the inside."""
    b, c, height, width, patch = shape
    x = Draw(torch.float32)(b, c, height, width)
    outer = patchify(x, patch, dtype=dtype).unflatten(-1, (c, patch * patch))
    y = patchify(x, patch, channels_last=True, dtype=dtype)
    assert_bitwise(y, outer.transpose(2, 3).flatten(2))


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_patchify_to_another_type(shape, dtype):
    """The value of each pixel rounded once, in one pass: a contiguous result, whatever the view."""
    b, c, height, width, patch = shape
    x = Draw(torch.float32)(b, c, height, width)
    want = patchify(x, patch).to(dtype)
    assert_bitwise(patchify(x, patch, dtype=dtype), want)
    crossed = x.transpose(0, 3).contiguous().transpose(0, 3)
    y = patchify(crossed, patch, dtype=dtype)
    assert y.is_contiguous()
    assert_bitwise(y, want)


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float32, 1), (torch.bfloat16, 1), (None, 1)])
def test_patchify_passes_over_the_image_once(dtype, copies):
    class Count(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            self.seen += result.untyped_storage().data_ptr() != args[0].untyped_storage().data_ptr()
            return result

    x = Draw(torch.float32)(1, 3, 8, 12)
    with Count() as count:
        patchify(x, 4, dtype=dtype)
    assert count.seen == copies


@each_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_unpatchify_by_index(shape, dtype):
    b, c, height, width, patch = shape
    h, w = height // patch, width // patch
    q = torch.arange(b * h * w * patch * patch * c).reshape(b * h * w, patch * patch, c).to(dtype)
    want = torch.empty(b, c, height, width, dtype=dtype)
    for row, col, py, px in itertools.product(range(h), range(w), range(patch), range(patch)):
        first = row * w + col
        pixel = q[first :: h * w, py * patch + px]
        want[:, :, row * patch + py, col * patch + px] = pixel
    assert_bitwise(unpatchify(q, height, width, patch), want)


@each_shape
def test_round_trip(shape):
    """The orders differ: channel outermost going in, innermost coming out."""
    b, c, height, width, patch = shape
    x = Draw()(b, c, height, width)
    tokens = patchify(x, patch).unflatten(-1, (c, patch * patch)).transpose(2, 3)
    assert_bitwise(unpatchify(tokens.flatten(0, 1), height, width, patch), x)


def test_empty_batch():
    assert patchify(torch.empty(0, 3, 8, 12), 4).shape == (0, 6, 48)
    assert unpatchify(torch.empty(0, 16, 3), 8, 12, 4).shape == (0, 3, 8, 12)


def test_views_and_gradients():
    x = Draw()(2, 4, 8, 12).transpose(2, 3)
    assert_bitwise(patchify(x[:, 1:], 4), patchify(x[:, 1:].contiguous(), 4))
    x = x.detach().requires_grad_()
    weight = Draw(seed=1)(2, 6, 64)
    (patchify(x, 4) * weight).sum().backward()
    assert_bitwise(patchify(x.grad, 4), weight)


def test_meta_and_compile():
    torch._dynamo.reset()
    both = torch.compile(
        lambda x: unpatchify(patchify(x, 4).reshape(-1, 16, 3), x.shape[2], x.shape[3], 4),
        fullgraph=True,
        backend="eager",
    )
    for size in ((8, 12), (16, 4)):
        x = Draw()(2, 3, *size)
        want = unpatchify(patchify(x, 4).reshape(-1, 16, 3), *size, 4)
        assert_bitwise(both(x), want)
    assert patchify(torch.empty(2, 3, 8, 12, device="meta"), 4).shape == (2, 6, 48)
    assert unpatchify(torch.empty(12, 16, 3, device="meta"), 8, 12, 4).shape == (2, 3, 8, 12)


@pytest.mark.parametrize("size", [(17, 16), (16, 15)])
def test_errors(size):
    with pytest.raises(
        ValueError, match=f"^patchify: H and W must be multiples of 16, got {size[0]}x{size[1]}$"
    ):
        patchify(torch.empty(1, 3, *size), 16)
