"""joint_attention by PyTorch's own kernels, one by one: who takes what, and that nothing of the
process is switched for it."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rules import Draw, assert_bitwise, assert_within_twice_eager, check_captures, f64, forced

import pixeldiff
from pixeldiff.ops import joint_attention
from pixeldiff.ops.cuda import sdpa
from pixeldiff.ops.joint_attention import reference
from pixeldiff.ops.registry import OPS, explain, on_request

OP = "joint_attention"
NAMES = ("flash", "cudnn", "efficient")
each = pytest.mark.parametrize("name", NAMES)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")


def arguments(shape, dtype=torch.bfloat16, std=1.0):
    draw, (b, queries, keys, g, d) = Draw(dtype), shape
    return tuple(draw(b, rows, g, d, std=std) for rows in (queries, keys, keys))


def oracle(q, k, v):
    q, k, v = f64(q, k, v)
    logits = np.einsum("blgd,bsgd->bgls", q, k) * q.shape[-1] ** -0.5
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return np.einsum("bgls,bsgd->blgd", weights / weights.sum(-1, keepdims=True), v)


@each
def test_is_called_as_pytorch_declares_it(name):
    """With tensors on no device: arguments, and the shape, dtype and order of the result."""
    q, k, v = torch.empty(3, 2, 20, 3, 72, dtype=torch.bfloat16, device="meta").unbind(0)
    o, lse = getattr(sdpa, name).launch(q[:, :7], k, v, 0.1, None, False)
    assert (o.shape, o.dtype) == (q[:, :7].shape, q.dtype)
    assert (lse.shape, lse.dtype) == ((0,), torch.float32)


def test_what_is_handed_over(monkeypatch):
    """Heads first, the scale, and back again: the CPU's own attention in the place of a kernel."""

    def on_cpu(q, k, v, scale):
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)

    kernel = sdpa.Kernel("cpu", lambda params: True, on_cpu)
    q, k, v = arguments((2, 5, 7, 3, 16), torch.float32)
    o, lse = kernel.launch(q, k, v, 0.7, None, False)
    want, unwanted = reference(q, k, v, 0.7, None, False)
    torch.testing.assert_close(o, want)
    assert lse.shape == unwanted.shape


@each
def test_who_it_leaves_to_others(name):
    kernel = getattr(sdpa, name)
    q, k, v = arguments((1, 5, 7, 3, 16))
    assert kernel.why_not(q, k, v, 1.0, None, False) == "runs on cuda, the tensors are on cpu"

    def on_gpu(d, rows=5):
        return SimpleNamespace(is_cuda=True, shape=(1, rows, 3, d), numel=lambda: rows * 3 * d)

    takes = "takes no mask and returns no log-sum-exp here"
    assert kernel.why_not(on_gpu(16), k, v, 1.0, object(), False) == takes
    assert kernel.why_not(on_gpu(16), k, v, 1.0, None, True) == takes
    odd = "takes head dims that are multiples of 8, got 20"
    assert kernel.why_not(on_gpu(20), k, v, 1.0, None, False) == odd
    assert kernel.why_not(on_gpu(16, 0), k, v, 1.0, None, False) == "takes no empty tensors"


@each
def test_pytorch_has_the_last_word(name, monkeypatch):
    asked = []
    kernel = getattr(sdpa, name)

    def says(answer):
        return sdpa.Kernel(name, lambda params: asked.append(params) or answer, kernel.run)

    q, k, v = arguments((2, 5, 7, 3, 16))
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    assert says(True).why_not(q, k, v, 1.0, None, False) is None
    assert says(False).why_not(q, k, v, 1.0, None, False) == (
        f"PyTorch {torch.__version__} says it cannot take the call, or it is switched off"
    )
    (params, _) = asked
    assert params.query.shape == (2, 3, 5, 16)
    assert (params.attn_mask, params.dropout, params.is_causal) == (None, 0.0, False)


@each
def test_by_name_only_and_for_this_op_alone(name):
    q, k, v = arguments((1, 5, 7, 3, 16))
    rows = dict(explain(OP, q, k, v, 1.0, None, False))
    assert rows[name] == "runs on cuda, the tensors are on cpu"
    assert on_request(OP, q, k, v, 1.0, None, False)[name] == "runs on request only"
    with (
        pixeldiff.backend(joint_attention=name),
        pytest.raises(NotImplementedError, match=rf'^joint_attention\(backend="{name}"\): runs on'),
    ):
        joint_attention(q, k, v)
    with pytest.raises(ValueError, match="is not a backend"), pixeldiff.backend(name):
        pass


def test_as_the_op_lists_them():
    """Each of them, under its own name, behind those that are ours."""
    places = {b.name: b.module for b in OPS[OP].backends[-3:]}
    assert places == {name: f"pixeldiff.ops.cuda.sdpa:{name}" for name in NAMES}
    assert all(b.load() is getattr(sdpa, b.name) for b in OPS[OP].backends[-3:])


@pytest.mark.gpu
@needs_gpu
@each
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 37, 53, 3, 64), (1, 129, 130, 2, 72), (1, 64, 64, 4, 128)])
def test_matches_the_oracle_on_a_gpu(shape, dtype, name):
    q, k, v = arguments(shape, dtype)
    on_gpu = tuple(t.cuda() for t in (q, k, v))
    with forced(OP, name):
        o = joint_attention(*on_gpu)
    eager, _ = reference(*on_gpu, shape[-1] ** -0.5, None, False)
    assert_within_twice_eager(o.cpu(), eager.cpu(), oracle(q, k, v))


@pytest.mark.gpu
@needs_gpu
@each
def test_captures(name):
    q, k, v = (t.cuda() for t in arguments((1, 37, 53, 3, 64)))

    def call(q, k, v):
        with forced(OP, name):
            return joint_attention(q, k, v)

    check_captures(call, q, k, v)


@pytest.mark.gpu
@needs_gpu
def test_threads_do_not_see_each_other():
    """Two kernels at once, and a third caller whose mask neither takes."""
    q, k, v = (t.cuda() for t in arguments((1, 256, 256, 4, 64)))
    mask = torch.ones(1, 256, dtype=torch.bool, device="cuda")
    failed = []

    def repeat(name, **options):
        try:
            with pixeldiff.backend(joint_attention=name):
                first = joint_attention(q, k, v, **options)
                for _ in range(50):
                    assert_bitwise(joint_attention(q, k, v, **options), first)
        except NotImplementedError:
            pass
        except BaseException as e:
            failed.append(e)

    threads = [
        threading.Thread(target=repeat, args=("flash",)),
        threading.Thread(target=repeat, args=("efficient",)),
        threading.Thread(target=repeat, args=("reference",), kwargs={"key_mask": mask}),
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failed
