"""Result rows with made-up numbers, for tests of what reads them."""

from __future__ import annotations

from bench.schema import Accuracy, Decode, Machine, Memory, Rates, Row
from bench.timing import summarise

MACHINE = Machine(
    device="cpu",
    device_name="a processor",
    threads=2,
    python="3.12.0",
    torch="2.9.0",
    triton=None,
    cuda=None,
    driver=None,
    pixeldiff="0.1.0",
    commit="0123456789abcdef",
    utc="2026-01-02T03:04:05+00:00",
)


def kernel_row(backend: str = "cpu", ms: float = 2.0, **changes) -> Row:
    row = Row(
        kind="kernel",
        name="swiglu",
        site="pid/image",
        shape={"size": 1024, "scale": 1, "tokens": 4096},
        dtype="fp32",
        backend=backend,
        status="measured",
        machine=MACHINE,
        timing=summarise([ms, 1.5 * ms, 2 * ms], first_ms=10 * ms),
        rates=Rates(10**8, 10**8, 33.0, 0.03, 50.0, 1.0, "memory", 66.0),
        accuracy=Accuracy("one rounding", 1e-7, 2e-7, 0.5),
        speedup_eager=3.0,
        speedup_compiled=1.25,
    )
    return _changed(row, changes)


def decode_row(backend: str = "pixeldiff", ms: float = 100.0, side: int = 256, **changes) -> Row:
    row = Row(
        kind="decode",
        name="demo",
        site="",
        shape={"height": side, "width": side, "batch": 1},
        dtype="fp32",
        backend=backend,
        status="measured",
        machine=MACHINE,
        timing=summarise([ms, ms, 2 * ms], first_ms=3 * ms),
        memory=Memory(500 * 10**6, 100 * 10**6, 26 * 10**6, 600 * 10**6, source="resident set"),
        decode=Decode(steps=4, step_ms=ms / 5, prepare_ms=ms / 5, load_ms=50.0, parameters=6500000),
        speedup_eager=2.0,
        speedup_compiled=1.5,
    )
    return _changed(row, changes)


def refused_row(reason: str = "takes float32 only") -> Row:
    return kernel_row(
        "triton",
        status="refused",
        reason=reason,
        timing=None,
        rates=None,
        accuracy=None,
        speedup_eager=None,
        speedup_compiled=None,
    )


def _changed(row: Row, changes: dict) -> Row:
    for name, value in changes.items():
        setattr(row, name, value)
    return row
