"""docs/precision.md: what a precision report says, and nothing it does not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from .precision import Error, Picture, Report

HEAD = """<!-- Written by `python -m bench precision`; do not edit. -->

# Precision

`precision="bf16"` holds weights and activations in bf16. `precision="fp8"` is bf16 with the linear
layers of attention and feed-forward in e4m3: their weights with a scale for each output channel,
made once when the network is loaded; their inputs with a scale for each token, made where the input
is (in the norm before them, in the gate of the feed-forward, on the result of attention). Sums are
fp32. AdaLN and its products with the pixel stream, embedders, the latent's branch, gates, norms,
attention itself and the pixel head stay as in bf16.

The demo is a small network (128 channels, two patch blocks, one pixel block), and most of its
picture comes from the latent's branch, which is not quantised: a released network, with more layers
between the latent and the pixels, may lose more. Of those only the layers are measured here, with
random weights.
"""
LAYERS = """## Layers

Root mean square of the error over that of the result in fp64, over all steps of one decode of the
demo: each layer is given the input it has in fp32.
"""
BLOCKS = """## Blocks

The same for the streams after each block and for the velocity a step returns, beside the network in
fp32, given the same noisy image in every step. Here errors add up through the network.
"""
RELEASED = """## Released width

One MMDiT block of the released networks (1536 channels, 24 heads, feed-forward 4096) with random
weights and normal inputs, {tokens} image and {text} text tokens: its layers, and what it adds to
its streams.
"""
PARTS = """## Which layers cost how much

PSNR (dB, higher is better) against the decode in fp32, mean of four pictures, with only these
layers in fp8. The last row has the results of all of them set to zero: what they do for the picture
altogether.
"""
SHARE = """Root mean square, what fp8 adds to the error of bf16 is about {share:.0f} % of what these
layers do for the picture.
"""
PICTURES = """## Pictures

Decodes of held-out pictures with the same seed: PSNR against the original, and of the decodes in
bf16 and fp8 against that in fp32.
"""


def page(report: Report, source: Path | None) -> str:
    """The page, as Markdown. `source` is the file with the raw figures."""
    m = report.machine
    where = f"{m.device_name}, torch {m.torch}, commit {_short(m.commit)}, {m.utc[:10]}"
    raw = f"; raw figures in `{source}`" if source else ""
    lines = [HEAD, f"Measured on {where}{raw}.\n"]
    lines += [LAYERS, *_errors("layer", _by_kind(report.layers))]
    lines += [BLOCKS, *_errors("after", report.blocks)]
    lines += [RELEASED.format(tokens=256, text=32), *_errors("layer", report.released)]
    parts = {"none (bf16)": report.bf16, **report.parts, "results set to zero": report.without}
    lines += [PARTS, *_table(("in fp8", "dB"), [(part, f"{db:.1f}") for part, db in parts.items()])]
    lines += [SHARE.format(share=100 * _share(report))]
    lines += [PICTURES, *_pictures(report.pictures)]
    lines += ["## Weights\n", _weights(report.weights)]
    return "\n".join(lines).rstrip() + "\n"


def _share(report: Report) -> float:
    """The error that fp8 adds to that of bf16, over the effect of the layers it is in."""

    def power(db: float) -> float:
        return 10 ** (-db / 10)

    added = max(0.0, power(report.parts["all"]) - power(report.bf16))
    return (added / power(report.without)) ** 0.5


def _by_kind(layers: Sequence[Error]) -> list[Error]:
    """The worst of the layers of one kind, which is the name without the block's number."""
    worst: dict[str, Error] = {}
    for e in layers:
        stem, _, rest = e.name.split(".", 2)
        name = f"{stem} {rest}"
        before = worst.get(name, Error(name, 0.0, 0.0))
        worst[name] = Error(name, max(e.bf16, before.bf16), max(e.fp8, before.fp8))
    return list(worst.values())


def _errors(column: str, errors: Sequence[Error]) -> list[str]:
    rows = [(f"`{e.name}`", _percent(e.bf16), _percent(e.fp8)) for e in errors]
    return _table((column, "bf16", "fp8"), rows)


def _pictures(pictures: Sequence[Picture]) -> list[str]:
    columns = ("picture", "size", "fp32", "bf16", "fp8", "bf16 to fp32", "fp8 to fp32")

    def cells(name: str, size: str, of: Sequence[Picture]) -> tuple[str, ...]:
        def mean(table: str, precision: str, digits: int) -> str:
            return f"{np.mean([getattr(p, table)[precision] for p in of]):.{digits}f}"

        original = [mean("original", p, 3) for p in ("fp32", "bf16", "fp8")]
        return (name, size, *original, *(mean("fp32", p, 1) for p in ("bf16", "fp8")))

    rows = [cells(p.name, p.size, [p]) for p in pictures]
    for group in dict.fromkeys(p.group for p in pictures):
        rows.append(cells(f"**mean, {group}**", "", [p for p in pictures if p.group == group]))
    return _table(columns, rows)


def _weights(weights: dict[str, int]) -> str:
    parts = [f"{p} {size / 1e6:.1f} MB" for p, size in weights.items()]
    return f"Of the demo: {', '.join(parts)}."


def _percent(value: float) -> str:
    return f"{100 * value:.2g} %"


def _short(commit: str) -> str:
    head, plus, rest = commit.partition("+")
    return head[:10] + plus + rest


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return [*lines, *("| " + " | ".join(r) + " |" for r in rows), ""]
