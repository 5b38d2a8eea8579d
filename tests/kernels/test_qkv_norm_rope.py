"""qkv_norm_rope against fp64: the product, then what test_qk_norm_rope.py says of the rest."""

import numpy as np
import pytest
import torch
from rules import (
    Draw,
    assert_bitwise,
    assert_within_twice_eager_or_spacing,
    check_compiles,
    check_gradients,
    check_meta,
    check_repeatable,
    every_backend,
    f64,
    forced,
    precisions,
)
from test_qk_norm_rope import oracle as rest
from torch.nn.functional import linear

import pixeldiff
from pixeldiff.ops import examples, fuses_qkv, qk_norm_rope, qkv_norm_rope
from pixeldiff.ops.registry import OPS, named_backend

OP = "qkv_norm_rope"

# (B, N, T, K, G, d); T = None has no text.
SHAPES = {
    "production": (1, 24, 10, 192, 6, 64),
    "pit": (2, 15, None, 144, 4, 72),
    "l2p": (1, 9, None, 256, 2, 128),
    "primes": (3, 7, 5, 13, 11, 2),
    "one": (1, 1, 1, 1, 1, 2),
    "no-image": (2, 0, 3, 16, 1, 64),
    "no-text-rows": (2, 3, 0, 16, 1, 64),
}


def stream(draw, b, n, k, g, d, std=1.0):
    """x, weight, q_weight, k_weight, (cos, sin) of n rows."""
    angle = Draw(seed=n)(n, d // 2) * 3
    weight = draw(3 * g * d, k, std=max(k, 1) ** -0.5)
    return draw(b, n, k, std=std), weight, draw(d), draw(d), (angle.cos(), angle.sin())


def arguments(dtype, shape, std=1.0):
    draw, (b, n, t, *sizes) = Draw(dtype), shape
    image = stream(draw, b, n, *sizes, std=std)
    return image, None if t is None else stream(draw, b, t, *sizes, std=std), sizes[1]


def call(image, text, heads):
    return qkv_norm_rope(*image, heads=heads, text=text)


def flat(heads):
    """The public function of tensors alone, as compile and gradcheck want it."""

    def fn(x, weight, q_weight, k_weight, cos, sin, *text):
        text = (*text[:4], text[4:]) if text else None
        return qkv_norm_rope(x, weight, q_weight, k_weight, (cos, sin), heads=heads, text=text)

    return fn


def flattened(image, text, heads):
    return tuple(t for s in (image, text) if s is not None for t in (*s[:4], *s[4]))


def projected(stream, project):
    x, weight, *others = stream
    return project(x, weight), *others


def oracle(image, text, heads):
    """In fp64 throughout: the projection is not rounded."""

    def project(x, weight):
        return torch.from_numpy(f64(x) @ f64(weight).T)

    return rest(projected(image, project), text and projected(text, project), heads)


def eager(image, text, heads):
    """PyTorch's product, rounded, and then fp64: the least an unfused call is wrong by."""
    dtype = image[0].dtype
    found = rest(projected(image, linear), text and projected(text, linear), heads)
    return torch.from_numpy(found).to(dtype)


@every_backend(OP)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@precisions
def test_matches_oracle(dtype, std, shape, backend):
    args = arguments(dtype, shape, std)
    with forced(OP, backend):
        out = call(*args)
    want, plain = oracle(*args), eager(*args)
    for part in range(3):
        assert_within_twice_eager_or_spacing(out[part], plain[part], want[part])


def test_unnamed_it_is_a_product_and_qk_norm_rope():
    """Bit for bit, with the backend of qk_norm_rope that is chosen."""
    image, text, heads = arguments(torch.bfloat16, SHAPES["production"])
    (x, weight, *rest_image), (text_x, text_weight, *rest_text) = image, text
    for chosen in (None, "reference", "cpu"):
        with forced("qk_norm_rope", chosen or "auto"):
            got = call(image, text, heads)
            want = qk_norm_rope(
                linear(x, weight),
                *rest_image,
                heads=heads,
                text=(linear(text_x, text_weight), *rest_text),
            )
            assert_bitwise(got, want)


def test_only_its_own_name_chooses_it():
    assert named_backend(OP) is None
    with pixeldiff.backend("reference"):
        assert named_backend(OP) is None
    with pixeldiff.backend("reference", qkv_norm_rope="cuda"):
        assert named_backend(OP) == "cuda"
        with pixeldiff.backend(qkv_norm_rope="auto"):
            assert named_backend(OP) is None
    args = arguments(torch.bfloat16, SHAPES["pit"])
    refused = pytest.raises(NotImplementedError, match="no such implementation; choose from cuda")
    with pixeldiff.backend(qkv_norm_rope="triton"), refused:
        call(*args)


@pytest.fixture
def takes_all(monkeypatch):
    """The CUDA backend takes every call and says so."""
    from pixeldiff.ops.cuda import qkv_norm_rope as cuda

    calls = []

    def launch(*args):
        calls.append(args[0].shape)
        return OPS[OP].reference(*args)

    monkeypatch.setattr(cuda, "why_not", lambda *args: None)
    monkeypatch.setattr(cuda, "launch", launch)
    return calls


def listed(*order):
    return {"9.0": {"float32 d4": {"2": {"order": list(order)}}}}


def test_it_runs_as_one_where_that_was_measured_to_be_faster(measured, takes_all):
    image, text, heads = arguments(torch.float32, (2, 4, 3, 16, 2, 4))
    want = call(image, text, heads)

    def fuses():
        found = fuses_qkv(*image, heads=heads, text=text)
        takes_all.clear()
        torch.testing.assert_close(call(image, text, heads), want)
        assert bool(takes_all) == found
        return found

    assert not fuses()
    measured(OP, listed("cuda", "reference"))
    assert fuses()
    # Another backend forced for all, and a gradient, are not for it.
    for name in ("reference", "cpu"):
        with pixeldiff.backend(name):
            assert not fuses_qkv(*image, heads=heads, text=text)
    weight = image[1].clone().requires_grad_()
    assert not fuses_qkv(image[0], weight, *image[2:], heads=heads, text=text)
    for slower in (("reference", "cuda"), ("reference",)):
        measured(OP, listed(*slower))
        assert not fuses()
    with pixeldiff.backend(qkv_norm_rope="cuda"):
        assert fuses()


def test_what_refuses_is_not_preferred(measured):
    image, text, heads = arguments(torch.float32, (2, 4, 3, 16, 2, 4))
    measured(OP, listed("cuda", "reference"))
    assert not fuses_qkv(*image, heads=heads, text=text)


def test_tracing_asks_no_table(measured, takes_all):
    measured(OP, listed("cuda", "reference"))
    args = flattened(*arguments(torch.float32, (2, 4, 3, 16, 2, 4)))
    torch._dynamo.reset()
    compiled = torch.compile(flat(2), fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*args), flat(2)(*args))
    assert len(takes_all) == 1  # not by the compiled one


def test_text_rows_come_first():
    image, text, heads = arguments(torch.float32, (2, 4, 3, 16, 2, 4))
    joint = call(image, text, heads)
    torch.testing.assert_close(joint[:, :, :3], call(text, None, heads))
    torch.testing.assert_close(joint[:, :, 3:], call(image, None, heads))


@pytest.mark.parametrize("shape", [SHAPES["production"], SHAPES["pit"]], ids=["text", "image"])
def test_registered(shape):
    image, text, heads = arguments(torch.float32, shape)
    streams = [(*image[:4], *image[4])]
    streams.append((None,) * 6 if text is None else (*text[:4], *text[4]))
    args = (*streams[0], *streams[1], heads, 1e-6)
    torch.library.opcheck(torch.ops.pixeldiff.qkv_norm_rope.default, args)


def test_compiles_and_meta_and_repeats():
    calls = [flattened(*arguments(torch.float32, (1, n, 4, 16, 2, 64))) for n in (5, 9)]
    check_compiles("qk_norm_rope", flat(2), *calls)
    check_meta(flat(2), *calls[0])
    check_repeatable(flat(2), *calls[0])
    image_only = flattened(*arguments(torch.bfloat16, (2, 3, None, 16, 2, 64)))
    check_meta(flat(2), *image_only)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_gradients():
    args = flattened(*arguments(torch.float32, (1, 2, 2, 3, 1, 4)))
    check_gradients(flat(1), *args)
    with pixeldiff.backend(qkv_norm_rope="reference"):
        check_gradients(flat(1), *args)


def test_not_finite():
    """A NaN takes its row of all three; an infinite row is NaN in q and k."""
    image, text, heads = arguments(torch.float32, (1, 4, 2, 16, 2, 64))
    image[0][0, 1, 3] = torch.nan
    out = call(image, text, heads)
    assert out[:, 0, 2 + 1].isnan().all()
    assert out[:, 0, [0, 1, 2, 4, 5]].isfinite().all()


def test_errors():
    image, text, _heads = arguments(torch.float32, (1, 4, 2, 16, 2, 64))
    x, weight, *others = image

    def said(error, *image, heads=2, text=None):
        with pytest.raises(error) as e:
            qkv_norm_rope(*image, heads=heads, text=text)
        return str(e.value)

    assert said(ValueError, x[0], weight, *others) == (
        "qkv_norm_rope: x must be (B, N, K), 3 axes, got (4, 16)"
    )
    assert said(ValueError, x, weight[:, :8], *others) == (
        "qkv_norm_rope: weight must be (3*G*d, K) = (384, 16), got (384, 8)"
    )
    assert said(ValueError, x, weight, *others, heads=5) == (
        "qkv_norm_rope: weight must have 3*G*d rows with even d and G = 5 heads, got 384"
    )
    assert said(TypeError, x, weight.bfloat16(), *others) == (
        "qkv_norm_rope: weight must have the dtype of x, torch.float32, got torch.bfloat16"
    )
    assert "q_weight must be (d,) = (64,)" in said(
        ValueError, x, weight, others[0][:3], *others[1:]
    )
    assert "text x must be (B, T, K) with B = 1 and K = 16, got (2, 2, 16)" in said(
        ValueError, *image, text=(text[0].expand(2, 2, 16), *text[1:])
    )
    assert "cos must be (N, d/2) = (4, 32)" in said(
        ValueError, *image[:4], (image[4][0][:3], image[4][1])
    )
    assert "the last axis of weight must be contiguous" in said(
        ValueError, x, torch.zeros(16, 384).T, *others
    )
    small = text[0].bfloat16(), text[1].bfloat16(), *text[2:]
    assert said(TypeError, *image, text=small) == (
        "qkv_norm_rope: text x must have the dtype of x, torch.float32, got torch.bfloat16"
    )


def test_example_is_the_ops_own():
    args = examples.arguments(OP)
    assert np.isfinite(f64(torch.ops.pixeldiff.qkv_norm_rope.default(*args))).all()
