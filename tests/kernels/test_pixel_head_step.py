"""pixel_head_step: bitwise the sampler's own update of what pixel_head gives."""

from __future__ import annotations

import itertools
import re

import aot
import harness
import pytest
import torch
from harness import (
    TRITON,
    check_threads,
    demo_weights,
    each_isa,
    guarded_outputs,
    launcher,
    on,
    usable_isas,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import (
    EPS32,
    Draw,
    assert_bitwise,
    at_odd_stride,
    check_captures,
    check_gradients,
    check_registered,
    every_backend,
    forced,
)

import pixeldiff
from pixeldiff.models.pid.samplers import run_student, sample_student
from pixeldiff.ops import pixel_head, pixel_head_step
from pixeldiff.ops.examples import Geometry
from pixeldiff.ops.examples import arguments as arguments_of
from pixeldiff.ops.pixel_head_step import update

# (B, C, H, W, p, P)
SHAPES = {
    "production": (1, 3, 32, 96, 16, 16),
    "primes": (2, 5, 21, 35, 4, 7),
    "patch8": (1, 3, 16, 48, 8, 8),
    "p12-patch2": (3, 1, 4, 10, 12, 2),
    "one": (1, 1, 1, 1, 4, 1),
    "empty": (0, 3, 8, 12, 4, 4),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
STATES = {"fp64": torch.float64, "fp32": torch.float32}
TIMES = [(0.999, 0.866), (0.342, 0.0), (0.02, 0.01)]
RULES = list(itertools.product(["sde", "ode"], ["velocity", "x0"], STATES.values()))
each_rule = pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r[0]}-{r[1]}-{str(r[2])[-2:]}")
each_time = pytest.mark.parametrize("times", TIMES, ids=str)


def arguments(dtype, shape, std=1.0):
    """q, norm_weight, weight, bias, x, noise"""
    draw, (b, c, height, width, p, patch) = Draw(dtype), shape
    rows = b * (height // patch) * (width // patch)
    head = draw(rows, patch * patch, p, std=std), draw(p), draw(c, p), draw(c)
    state = Draw(seed=1)
    return (*head, state(b, c, height, width), state(b, c, height, width))


def options(rule, times, patch):
    return {
        **dict(zip(("sample_type", "prediction_type", "state_dtype"), rule, strict=True)),
        **dict(zip(("t", "t_next"), times, strict=True)),
        "patch": patch,
    }


def composed(q, norm_weight, weight, bias, x, noise, *, t, t_next, patch, **rule):
    size = tuple(x.shape[2:])
    v = pixel_head(q, norm_weight, weight, bias, size=size, patch=patch)
    return update(x, v, noise, t, t_next, **rule)


@every_backend("pixel_head_step")
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_rule
@each_time
def test_is_bitwise_the_composition(shape, rule, times, backend):
    if backend == "triton" and shape[2] * shape[3] > 48 and (rule, times) != (RULES[0], TIMES[0]):
        pytest.skip("slow in the interpreter, which runs every rule at the small shapes")
    args, kwargs = arguments(torch.bfloat16, shape), options(rule, times, shape[-1])
    with forced("pixel_head_step", backend):
        x_next, x0 = pixel_head_step(*args, **kwargs)
    with pixeldiff.backend(pixel_head=backend):
        want = composed(*args, **kwargs)
    for got, expected in zip((x_next, x0), want, strict=True):
        assert_bitwise(got, expected)
        assert got.is_contiguous()
    with forced("pixel_head_step", backend):
        alone, none = pixel_head_step(*args, **kwargs, want_x0=False)
    assert none is None
    assert_bitwise(alone, x_next)


@each_isa
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("std", [1.0, 1e-3])
@each_rule
def test_every_instruction_set(dtype, std, rule, isa):
    shape = SHAPES["primes"]
    head, _ = launcher("pixel_head", f"cpu-{isa}")
    step, _ = launcher("pixel_head_step", f"cpu-{isa}")
    q, norm_weight, weight, bias, x, noise = arguments(dtype, shape, std)
    t, t_next = TIMES[0]
    v = head(q, norm_weight, weight, bias, *x.shape[2:], shape[-1], 1e-6)
    kinds = options(rule, TIMES[0], 0)
    ode, predicts_x0 = rule[0] == "ode", rule[1] == "x0"
    got = step(
        q, norm_weight, weight, bias, x, noise, t, t_next, ode, predicts_x0,
        rule[2] == torch.float64, True, shape[-1], 1e-6,
    )  # fmt: skip
    del kinds["t"], kinds["t_next"], kinds["patch"]
    for a, b in zip(got, update(x, v, noise, t, t_next, **kinds), strict=True):
        assert_bitwise(a, b)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_shapes_and_times(data):
    draw = data.draw
    usable_isas()
    p, patch = 4 * draw(st.integers(1, 6)), draw(st.integers(1, 17))
    h, w = (patch * draw(st.integers(1, 4)) for _ in range(2))
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 4)), h, w, p, patch)
    args = arguments(draw(st.sampled_from(list(DTYPES.values()))), shape)
    times = draw(st.floats(0.01, 1)), draw(st.sampled_from([0.0, 0.005, 1 / 3]))
    kwargs = options(draw(st.sampled_from(RULES)), times, patch)
    with pixeldiff.backend("cpu"):
        got, want = pixel_head_step(*args, **kwargs), composed(*args, **kwargs)
    for a, b in zip(got, want, strict=True):
        assert_bitwise(a, b)


@each_isa
def test_threads_do_not_change_the_result(isa):
    *head, x, noise = arguments(torch.bfloat16, (2, 3, 96, 96, 8, 16))
    flags = (False, False, True, True)
    check_threads("pixel_head_step", isa, *head, x, noise, 0.8, 0.6, *flags, 16, 1e-6)


@each_rule
@pytest.mark.parametrize("backend", ["cpu", *TRITON])
def test_not_finite(rule, backend):
    """NaN and infinities of the stream, the state and the noise, as in the composition."""
    if backend == "cpu":
        usable_isas()
        device = "cpu"
    else:
        _, device = launcher("pixel_head_step", backend)
    args = on(device, arguments(torch.float32, (1, 3, 8, 16, 8, 8)))
    q, _, _, _, x, noise = args
    q[0, 5, 1], q[1, 63, 7] = torch.nan, torch.inf
    x[0, 0, 0, 0], x[0, 1, 1, 1], noise[0, 2, 2, 2] = torch.inf, torch.nan, -torch.inf
    kwargs = options(rule, TIMES[0], 8)
    with pixeldiff.backend(backend.removesuffix("-gpu")):
        got, want = pixel_head_step(*args, **kwargs), composed(*args, **kwargs)
    for a, b in zip(got, want, strict=True):
        assert not a.isfinite().all()
        assert torch.equal(a.isnan(), b.isnan())
        assert torch.equal(a.nan_to_num(nan=0.0), b.nan_to_num(nan=0.0))


def test_strided_state():
    *head, x, noise = arguments(torch.float32, SHAPES["primes"])
    turned = [a.transpose(2, 3).contiguous().transpose(2, 3) for a in (x, noise)]
    kwargs = {"t": 0.8, "t_next": 0.6, "patch": 7}
    want = pixel_head_step(*head, x, noise, **kwargs)
    for a, b in zip(pixel_head_step(*head, *turned, **kwargs), want, strict=True):
        assert a.is_contiguous()
        assert_bitwise(a, b)


@each_rule
def test_a_whole_sampling_run(rule):
    """run_student with fused steps against sample_student with pixel_head as its network."""
    (sample_type, prediction_type, state_dtype), shape = rule, (1, 3, 16, 32, 8, 16)
    q, norm_weight, weight, bias, x, _ = arguments(torch.float32, shape)
    rule = dict(zip(("sample_type", "prediction_type", "state_dtype"), rule, strict=True))

    def stream(x):
        return q * (1 + x.mean())

    def velocity(x, tau):
        return pixel_head(stream(x), norm_weight, weight, bias, size=(16, 32), patch=16)

    def advance(x, t, t_next, draw, want_x0):
        noise = None if draw is None else draw(tuple(x.shape))
        head = (stream(x), norm_weight, weight, bias)
        times = {"t": t, "t_next": t_next, "want_x0": want_x0}
        return pixel_head_step(*head, x, noise, **times, patch=16, **rule)

    def run(sampler, network, told=None, **kinds):
        noises = (Draw(seed=i)(*x.shape) for i in itertools.count(5))
        callback = None if told is None else (lambda info: told.append(info.x0))
        return sampler(
            network, x, (0.9, 0.6, 0.03, 0.0), lambda shape: next(noises),
            sample_type=sample_type, callback=callback, **kinds,
        )  # fmt: skip

    kinds = {"prediction_type": prediction_type, "state_dtype": state_dtype}
    told, told_fused = [], []
    want = run(sample_student, velocity, told, **kinds)
    assert_bitwise(run(run_student, advance), want)
    assert_bitwise(run(run_student, advance, told_fused), want)
    assert len(told_fused) == len(told) == 3
    for a, b in zip(told_fused, told, strict=True):
        assert_bitwise(a, b)


def test_runs_everywhere():
    args = arguments(torch.bfloat16, (2, 3, 8, 12, 4, 4))

    def call(*args, t=0.8, want_x0=True):
        result = pixel_head_step(*args, t=t, t_next=0.6, patch=4, want_x0=want_x0)
        return result if want_x0 else result[0]

    check_registered("pixel_head_step", call, *args)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for t, want_x0 in ((0.8, True), (0.7, True), (0.65, False)):
        got, want = (f(*args, t=t, want_x0=want_x0) for f in (compiled, call))
        pairs = zip(got, want, strict=True) if want_x0 else [(got, want)]
        for a, b in pairs:
            assert_bitwise(a, b)
    for a in pixel_head_step(*(a.to("meta") for a in args), t=0.8, t_next=0.6, patch=4):
        assert (a.device.type, a.dtype, a.shape) == ("meta", torch.float32, (2, 3, 8, 12))


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
@pytest.mark.parametrize("prediction_type", ["velocity", "x0"])
def test_gradients(sample_type, prediction_type):
    args = arguments(torch.float32, (1, 2, 2, 4, 4, 2))
    kinds = {"sample_type": sample_type, "prediction_type": prediction_type}

    def call(*args):
        return sum(pixel_head_step(*args, t=0.8, t_next=0.6, patch=2, **kinds))

    if sample_type == "ode":
        check_gradients(lambda *a: call(*a, None), *args[:5])
    else:
        check_gradients(call, *args)


def test_errors():
    q, norm_weight, weight, bias, x, noise = arguments(torch.float32, (2, 3, 8, 12, 4, 4))

    def raises(error, message, **changed):
        named = {
            **{"q": q, "norm_weight": norm_weight, "weight": weight, "bias": bias},
            **{"x": x, "noise": noise, "t": 0.8, "t_next": 0.6, "patch": 4},
        }
        with pytest.raises(error, match=f"^pixel_head_step: {message}$"):
            pixel_head_step(**{**named, **changed})

    raises(ValueError, r"sample_type must be one of .*, got 'euler'", sample_type="euler")
    raises(ValueError, r"prediction_type must be one of .*, got 'eps'", prediction_type="eps")
    raises(ValueError, r"state_dtype must be one of .*, got torch.bf.*", state_dtype=torch.bfloat16)
    raises(ValueError, r"x must be \(B, 3, H, W\) for this head, got \(2, 2, 8, 12\)", x=x[:, :2])
    raises(ValueError, r"x must be \(B, C, H, W\) = \(2, 3, 8, 12\), got \(1, 3, 8, 12\)", x=x[:1])
    raises(ValueError, r"noise must be given in an SDE step to t_next = 0.6", noise=None)
    raises(ValueError, r"noise must be \(B, C, H, W\) = .*, got \(1, 3, 8, 12\)", noise=noise[:1])
    raises(ValueError, r"q must be \(B\*N, P\*P, p\) with N = 6 .*, got \(11, 16, 4\)", q=q[:11])
    raises(TypeError, r"x must be float32, .* got torch.int64", x=x.long())


# --- Triton ---------------------------------------------------------------------------------------


def positional(args, rule, times, patch, want_x0=True):
    """In schema order, as `launch` takes them."""
    ode, predicts_x0 = rule[0] == "ode", rule[1] == "x0"
    return (*args, *times, ode, predicts_x0, rule[2] == torch.float64, want_x0, patch, 1e-6)


def composed_by(head, args, rule, times, patch):
    """The sampler's update of what the backend's own pixel_head gives."""
    *tensors, x, noise = args
    v = head(*tensors, *x.shape[2:], patch, 1e-6)
    kinds = dict(zip(("sample_type", "prediction_type", "state_dtype"), rule, strict=True))
    return update(x, v, noise, *times, **kinds), update(
        x.cpu(), v.cpu(), noise.cpu(), *times, **kinds
    )


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@each_rule
@each_time
def test_is_bitwise_the_composition_on_the_gpu(shape, rule, times, dtype):
    """The update as PyTorch computes it on CUDA, and the same bits as on the CPU."""
    (head, device), (step, _) = (
        launcher(op, "triton-gpu") for op in ("pixel_head", "pixel_head_step")
    )
    args = on(device, arguments(dtype, shape))
    want, on_cpu = composed_by(head, args, rule, times, shape[-1])
    for want_x0 in (True, False):
        got = step(*positional(args, rule, times, shape[-1], want_x0))
        assert_bitwise(got[0], want[0])
        assert_bitwise(got[0].cpu(), on_cpu[0])
        if want_x0:
            assert_bitwise(got[1], want[1])


@pytest.mark.gpu
@each_rule
def test_released_size_on_the_gpu(rule):
    head, device = launcher("pixel_head", "triton-gpu")
    step, _ = launcher("pixel_head_step", "triton-gpu")
    geometry = Geometry(grid=(128, 128))
    *tensors, x, noise = arguments_of("pixel_head_step", device, torch.bfloat16, geometry)[:6]
    args = (*tensors, x, noise)
    want, _ = composed_by(head, args, rule, TIMES[0], 16)
    for a, b in zip(step(*positional(args, rule, TIMES[0], 16)), want, strict=True):
        assert_bitwise(a, b)


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("weights", DTYPES.values(), ids=DTYPES)
def test_any_stream_and_state(dtype, weights, backend):
    """Every pair of dtypes; stream, state and noise read where they lie; nothing else written."""
    head, device = launcher("pixel_head", backend)
    step, _ = launcher("pixel_head_step", backend)
    shape, rule = (2, 3, 5, 35, 6, 5), ("sde", "velocity", torch.float64)
    q, *vectors, x, noise = on(device, arguments(dtype, shape))
    vectors = [v.to(weights) for v in vectors]
    x, noise = x.mT.contiguous().mT, noise.to(memory_format=torch.channels_last)
    args = (at_odd_stride(q), *vectors, x, noise)
    want, _ = composed_by(head, args, rule, TIMES[0], shape[-1])
    with guarded_outputs():
        got = step(*positional(args, rule, TIMES[0], shape[-1]))
    for a, b in zip(got, want, strict=True):
        assert_bitwise(a, b)
        assert a.is_contiguous()


@pytest.mark.parametrize("backend", TRITON)
@pytest.mark.parametrize("times", [(1.0, 1 / 3), (0.1, 0.05), (5e-324, 0.0), (1, 0)], ids=str)
def test_times_keep_every_bit(times, backend):
    """Times that no fp32 number is, integers, and the smallest fp64 number of all."""
    head, device = launcher("pixel_head", backend)
    step, _ = launcher("pixel_head_step", backend)
    shape = (1, 3, 4, 20, 8, 4)
    args = on(device, arguments(torch.float32, shape))
    for rule in RULES:
        want, _ = composed_by(head, args, rule, times, shape[-1])
        for a, b in zip(step(*positional(args, rule, times, shape[-1])), want, strict=True):
            assert_bitwise(a, b)


@pytest.mark.parametrize("backend", TRITON)
def test_the_demo_network_on_both_backends(backend):
    """Its own weights and the size of its pixels. One and the same image from CPU kernel and
    Triton, but for what the two heads differ by, times t."""
    usable_isas()
    step, device = launcher("pixel_head_step", backend)
    weights = demo_weights("norm.weight", "linear.weight", "linear.bias", of="final_layer")
    q, *_, x, noise = arguments(torch.float32, (1, 3, 32, 48, len(weights[0]), 16))
    for rule in (("sde", "velocity", torch.float64), ("ode", "x0", torch.float32)):
        args = positional((q, *weights, x, noise), rule, TIMES[0], 16)
        with pixeldiff.backend("cpu"):
            want = torch.ops.pixeldiff.pixel_head_step(*args)
        for a, b in zip(step(*on(device, args)), want, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=0, atol=8 * EPS32 * b.abs().max())


@pytest.mark.gpu
@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_captures_in_a_graph(state):
    launch, device = launcher("pixel_head_step", "triton-gpu")
    args = on(device, arguments(torch.bfloat16, SHAPES["production"]))
    check_captures(launch, *positional(args, ("sde", "velocity", state), TIMES[0], 16))


def test_triton_in_interpreter():
    harness.run_in_interpreter(__file__)


def released(rule=RULES[0], times=TIMES[0], dtype=torch.bfloat16, **changes):
    *args, _, _ = aot.released("pixel_head_step", dtype, **changes)
    return positional(args[:6], rule, times, 16)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_triton_compiles_ahead_of_time(target):
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_head_step")
    for dtype, pixel in ((torch.bfloat16, 16), (torch.float32, 16), (torch.bfloat16, 8)):
        args = released(dtype=dtype, pixel=pixel)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), target)
        aot.assert_lean(kernel)
        assert kernel.registers <= 128
        assert kernel.warps == 1  # which waits for no other
        tokens = 2 * pixel * dtype.itemsize // 16  # loads of two pixels a thread
        assert kernel.ptx.count("ld.global.v4.b32") >= tokens
        assert kernel.ptx.count("ld.global.v2.b32") >= 6  # x and noise, two pixels a thread
        assert kernel.ptx.count("st.global.v2.b32") == 6  # x_next and x0


def test_every_tile_compiles_ahead_of_time():
    for state in STATES.values():
        aot.check_candidates("pixel_head_step", *released(("sde", "velocity", state)))


@each_rule
def test_every_operation_of_the_update_rounds(rule):
    """No multiply-add is left in the kernel, so none is in the update; and the assembler may make
    none, since every addition and multiplication names its rounding."""
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_head_step")
    for times in TIMES[:2]:
        args = released(rule, times)
        (kernel,) = aot.compile_launch(lambda args=args: module.launch(*args), 90)
        aot.assert_lean(kernel)
        found = re.findall(r"\b(?:fma|mad|mul|add|sub|div)\.(?:\w+\.)*f(?:32|64)\b", kernel.ptx)
        assert not [op for op in found if not re.fullmatch(r"(mul|add|sub|div)\.rn\.f(32|64)", op)]
        predicts_x0, wide = rule[1] == "x0", rule[2] == torch.float64
        divides = predicts_x0 and rule[0] == "ode" and times[1] != 0
        kinds = ("sub", "div") if divides else () if predicts_x0 else ("mul", "sub")
        assert {op for op in found if op.endswith("64")} == {f"{op}.rn.f64" for op in kinds if wide}
        assert (found.count("div.rn.f32") > kernel.ptx.count("sqrt.rn.f32")) == (
            divides and not wide  # the others are the norm's
        )
        if not divides:  # of which a division is made
            assert "DFMA" not in kernel.sass


def test_triton_compiles_once_for_all_sizes_and_times():
    times = ((0.999, 0.866), (0.5, 0.25), (1.0, 0.5), (1, 1 / 3))
    calls = [released(times=t, grid=grid) for grid in aot.GRIDS for t in times]
    aot.check_compiles_once("pixel_head_step", calls)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x": torch.float64}, "takes x in float32 on cpu, got torch.float64 on cpu"),
        ({"noise": torch.bfloat16}, "takes noise in float32 on cpu, got torch.bfloat16 on cpu"),
        ({"q": torch.float64}, "takes float32, bfloat16, float16, got torch.float64"),
    ],
)
def test_triton_refuses(change, reason):
    module = pytest.importorskip("pixeldiff.triton_kernels.pixel_head_step")
    names = ("q", "norm_weight", "weight", "bias", "x", "noise")
    args = dict(zip(names, arguments(torch.float32, (1, 3, 4, 4, 4, 4)), strict=True))
    args |= {name: args[name].to(dtype) for name, dtype in change.items()}
    assert module.why_not(*positional(args.values(), RULES[0], TIMES[0], 4)) == reason
