"""Peak memory of decodes and of L2P images beside what was estimated for them.

Every run has a process of its own, whose resident set before anything was loaded is the zero of all
figures: weights count, PyTorch's import does not. The peak of a case is the median of its runs.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pixeldiff import backend as forced
from pixeldiff.memory import Estimate, estimate_l2p, estimate_pid, return_freed_memory
from pixeldiff.models.l2p import L2PConfig, L2PNet, L2PPipeline
from pixeldiff.models.pid import PiDConfig, PiDNet
from pixeldiff.models.pid.decoder import PRECISIONS, PiDDecoder, ready
from pixeldiff.out_files import written_whole

from .machine import machine
from .memory import Meter
from .models import fill, inputs
from .own_process import measured_alone

VERSION = 2
UNDER, OVER = -0.05, 0.10  # how far an estimate may be off
PID = {
    "narrow": PiDConfig(
        hidden_size=384, num_groups=6, patch_depth=4, pixel_attn_hidden_size=288,
        pixel_num_groups=4, txt_embed_dim=256, lq_hidden_dim=128,
    ),
    "middle": PiDConfig(
        hidden_size=768, num_groups=12, patch_depth=4, pixel_attn_hidden_size=576,
        pixel_num_groups=8, txt_embed_dim=1024, lq_hidden_dim=256,
        lq_gate_type="sigma_aware_per_token", pit_lq_inject=True,
    ),
}  # fmt: skip
L2P = {
    "narrow": L2PConfig(dim=384, n_heads=3, n_layers=4, n_refiner_layers=1, cap_feat_dim=256),
    "middle": L2PConfig(dim=768, n_heads=6, n_layers=4, n_refiner_layers=1, cap_feat_dim=512),
}
TOKENS = (40, 8)  # of the prompt and the negative one
_FILES = {"file": ".tif", "whole file": ".jpg"}
HOW = ("low_memory", "pixel_chunk")  # what a decoder is made with; a decode takes the rest


@dataclass(frozen=True)
class Case:
    """What is measured.

    Args:
        system: "pid" or "l2p".
        net: "demo", or one of the networks with random weights above.
        side: pixels of a side of the square image, or its height.
        width: pixels, where it is another.
        precision, backend, batch, steps: as of `estimate_pid`.
        options: of the decoder, the decode or the pipeline's call, and of the estimate.
        device: "cpu" or "cuda".
        threads: of PyTorch.
        held_out: whether no constant of the estimate was ever chosen by it.
        returned: whether its process gives freed memory back at once, as the command line does
            within a tight `--memory`.
    """

    system: str
    net: str
    side: int
    precision: str = "fp32"
    backend: str | None = None
    batch: int = 1
    steps: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    device: str = "cpu"
    threads: int = 1
    width: int | None = None
    held_out: bool = False
    returned: bool = True

    @property
    def size(self) -> tuple[int, int]:
        """(H, W) in pixels."""
        return self.side, self.width or self.side

    @property
    def name(self) -> str:
        """In words."""
        size = f"{self.side}x{self.width}" if self.width else str(self.side)
        words = [self.system, self.net, size, self.precision]
        words += [f"batch {self.batch}"] if self.batch > 1 else []
        words += [self.backend] if self.backend else []
        words += [f"{k}={v}" for k, v in self.options.items()]
        return " ".join(words if self.returned else [*words, "freed memory kept"])


def grid(threads: int = 1) -> list[Case]:
    """What the command measures: 1 to 15 s each on two cores."""
    return [*_chosen_by(threads), *_held_out(threads)]


def _chosen_by(threads: int) -> list[Case]:
    """What the estimate's constants were chosen by."""

    def pid(net: str, side: int, **more: Any) -> Case:
        return Case("pid", net, side, threads=threads, **more)

    def l2p(net: str, side: int, **more: Any) -> Case:
        return Case("l2p", net, side, threads=threads, **more)

    sync, alone = {"tile": [8, 8]}, {"tile": [8, 8], "tile_mode": "independent"}
    return [
        *(pid("demo", side) for side in (256, 512, 1024)),
        *(pid("demo", side, precision="bf16") for side in (512, 1024)),
        pid("demo", 512, backend="reference"),
        pid("demo", 512, batch=3),
        pid("demo", 1024, options={"low_memory": True}),
        pid("demo", 1024, options={"low_memory": True, "pixel_chunk": 256}),
        pid("demo", 1024, options={"output": "np"}),
        pid("demo", 1024, options=sync),
        pid("demo", 1024, options={**sync, "tile_batch": 4}),
        pid("demo", 1024, options=alone),
        pid("demo", 2048, options=alone, precision="bf16"),
        pid("demo", 1024, options={**sync, "pixel_chunk": 64}),
        pid("demo", 1024, options={**alone, "pixel_chunk": 64}),
        *(pid("narrow", side) for side in (512, 1024)),
        pid("narrow", 1024, precision="bf16"),
        pid("narrow", 1024, precision="bf16", options={"low_memory": True}),
        pid("narrow", 512, batch=2),
        pid("narrow", 1024, precision="bf16", options={"low_memory": True, "pixel_chunk": 1024}),
        *(pid("middle", side, precision="bf16") for side in (512, 1024)),
        pid("middle", 1024, precision="bf16", options=sync),
        pid("middle", 1024, precision="bf16", options=alone),
        *(l2p("demo", side) for side in (256, 512, 1024)),
        l2p("demo", 512, precision="bf16"),
        l2p("demo", 512, batch=3),
        l2p("demo", 1024, options={"guidance_together": False}),
        l2p("demo", 1024, options={"decoder_memory": 50_000_000}),
        l2p("demo", 1024, options={"tile": [512, 512]}),
        l2p("demo", 1024, options={"tile": [256, 256]}, precision="bf16"),
        *(l2p("narrow", side, precision="bf16") for side in (512, 1024)),
        l2p("narrow", 512),
        l2p("narrow", 1024, precision="bf16", options={"decoder_memory": 200_000_000}),
        l2p("middle", 512, precision="bf16", options={"guidance_together": False}),
    ]


def _held_out(threads: int) -> list[Case]:
    """Of other sizes, shapes, batches, pieces and tiles: what the estimate never saw."""

    def pid(net: str, *size: int, **more: Any) -> Case:
        return _of_size("pid", net, size, threads, more)

    def l2p(net: str, *size: int, **more: Any) -> Case:
        return _of_size("l2p", net, size, threads, more)

    alone = {"tile": [12, 12], "tile_mode": "independent"}
    return [
        pid("demo", 768),
        pid("demo", 640, 1024, precision="bf16"),
        pid("demo", 512, precision="bf16", batch=4),
        pid("demo", 256, backend="reference"),
        pid("demo", 768, options={"low_memory": True, "pixel_chunk": 128}),
        pid("demo", 512, 1024, options={"tile": [12, 12]}),
        pid("demo", 768, options={"tile": [10, 12], "tile_batch": 2}, precision="bf16"),
        pid("demo", 768, options=alone, precision="bf16"),
        pid("demo", 1024, 2048, options={**alone, "output": "file"}),
        pid("demo", 1024, 2048, options={**alone, "output": "whole file"}),
        pid("narrow", 768),
        pid("narrow", 512, 1024, precision="bf16", options={"pixel_chunk": 512}),
        pid("middle", 768, precision="bf16", options={"low_memory": True}),
        l2p("demo", 768),
        l2p("demo", 384, 640, precision="bf16"),
        l2p("demo", 512, precision="bf16", batch=2),
        l2p("demo", 768, options={"decoder_memory": 30_000_000}),
        l2p("demo", 768, 1024, options={"tile": [384, 384]}),
        l2p("narrow", 384),
        l2p("narrow", 768, precision="bf16"),
        l2p("middle", 384, precision="bf16"),
    ]


def _of_size(
    system: str, net: str, size: tuple[int, ...], threads: int, more: dict[str, Any]
) -> Case:
    width = size[1] if len(size) > 1 else None
    return Case(system, net, size[0], width=width, threads=threads, held_out=True, **more)


@dataclass
class Peak:
    """Bytes above what the process held before; `off` is estimate / peak - 1.

    Args:
        held_out: whether no constant of the estimate was ever chosen by it.
        peak: the median of several runs, each a process of its own: the heap's gaps differ.
        peaks: of all of them.
    """

    case: str
    held_out: bool
    peak: int
    peaks: list[int]
    estimate: dict[str, Any]
    off: float
    before: int
    seconds: float


@dataclass
class Held:
    """How many estimates lie within `UNDER` and `OVER`, and the furthest off either way."""

    cases: int
    hold: int
    lowest: float
    highest: float

    @classmethod
    def of(cls, runs: Sequence[Peak]) -> Held:
        off = [r.off for r in runs] or [0.0]
        hold = sum(UNDER <= r.off <= OVER for r in runs)
        return cls(len(runs), hold, min(off), max(off))

    def __str__(self) -> str:
        return f"{self.hold} of {self.cases} hold, off by {self.lowest:+.1%} to {self.highest:+.1%}"


@dataclass
class Report:
    machine: Any
    command: str
    runs: list[Peak]
    schema: int = VERSION
    chosen_by: Held | None = None  # of the cases that the estimate's constants were chosen by
    held_out: Held | None = None  # of all others

    def add(self, peak: Peak) -> None:
        """One more case."""
        self.runs.append(peak)
        self.chosen_by = Held.of([r for r in self.runs if not r.held_out])
        self.held_out = Held.of([r for r in self.runs if r.held_out])


def run(cases: Sequence[Case], command: str, runs: int = 1) -> Iterator[Report]:
    """A report after every case, the earlier ones included.

    Raises:
        RuntimeError: a process failed; with what it wrote.
    """
    torch.set_num_threads(cases[0].threads)  # what the machine's description then says
    found = machine(torch.device(cases[0].device))
    report = Report(dataclasses.asdict(found), command, [])
    for case in cases:
        report.add(measured(case, runs))
        yield report


def measured(case: Case, runs: int = 1) -> Peak:
    """The median of an odd number of runs, in processes of their own."""
    found = [Peak(**measured_alone(__name__, case, case.name)) for _ in range(runs)]
    peaks = [f.peak for f in found]
    median = statistics.median_low(peaks)
    return dataclasses.replace(next(f for f in found if f.peak == median), peaks=peaks)


def measure(case: Case) -> Peak:
    """Here; a process measures once, or its peak is not its own."""
    if case.returned and case.device == "cpu" and not return_freed_memory():
        raise RuntimeError("freed memory is given back by glibc alone; measure it kept (--kept)")
    torch.set_num_threads(case.threads)
    meter = Meter(torch.device(case.device))
    meter.reset()
    before, start = meter.now() or 0, time.perf_counter()
    with forced(case.backend):
        estimate = (_pid if case.system == "pid" else _l2p)(case, meter)
    seconds, peak = time.perf_counter() - start, (meter.peak() or 0) - before
    found = estimate()
    off = found.peak / peak - 1
    told = found.to_dict()
    return Peak(case.name, case.held_out, peak, [peak], told, off, before, seconds)


def _pid(case: Case, meter: Meter):
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in case.options.items()}
    how = {name: options.pop(name) for name in HOW if name in options}
    if case.net == "demo":
        decoder = PiDDecoder.from_pretrained(
            "demo", device=case.device, precision=case.precision, cuda_graphs=False, **how
        )
    else:
        net = _filled(PiDNet, PID[case.net], case)
        decoder = PiDDecoder(ready(net, case.precision), cuda_graphs=False, **how)
    config, sampling = decoder.net.config, decoder.sampling
    given = inputs(config, case.side, case.batch, torch.device(case.device))
    cells = [n // config.pixels_per_latent_cell for n in case.size]
    latent = given.latent if case.width is None else torch.randn(*given.latent.shape[:2], *cells)
    steps = min(case.steps, sampling.steps)
    with tempfile.TemporaryDirectory() as folder:
        suffix = _FILES.get(options.get("output"))
        how_out = {} if suffix is None else {"output": Path(folder, f"picture{suffix}")}
        arguments = {"caption": given.caption, "seed": 0, "steps": steps, **options, **how_out}
        decoder.decode(latent.to(case.device), **arguments)
    common = _common(case, steps)
    return lambda: estimate_pid(config, case.size, sampling=sampling, **common, **how, **options)


def _l2p(case: Case, meter: Meter):
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in case.options.items()}
    if case.net == "demo":
        pipeline = L2PPipeline.from_pretrained(
            "demo", device=case.device, precision=case.precision, cuda_graphs=False
        )
    else:
        net = _filled(L2PNet, L2P[case.net], case)
        pipeline = L2PPipeline(net.pack_() if case.device == "cuda" else net, cuda_graphs=False)
    config = pipeline.net.config
    prompts = [_caption(config, rows, case.device) for rows in TOKENS]
    pipeline(
        prompt_embeds=[prompts[0]] * case.batch,
        negative_prompt_embeds=[prompts[1]] * case.batch,
        height=case.size[0],
        width=case.size[1],
        num_inference_steps=case.steps,
        guidance_scale=2.0,
        seed=0,
        **options,
    )
    common = {**_common(case, case.steps), "guided": True}
    common |= dict(zip(("prompt_tokens", "negative_tokens"), TOKENS, strict=True))
    return lambda: estimate_l2p(config, case.size, **common, **options)


def _common(case: Case, steps: int) -> dict[str, Any]:
    names = ("device", "precision", "backend", "batch")
    return {**{n: getattr(case, n) for n in names}, "steps": steps, "cuda_graphs": False}


def _filled(kind: type[nn.Module], config: Any, case: Case) -> nn.Module:
    dtype = PRECISIONS[case.precision]
    net = kind(config, device="meta", dtype=dtype).to_empty(device=case.device)
    fill(net, dtype)
    return net.requires_grad_(False)


def _caption(config: L2PConfig, rows: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows)
    return torch.randn(rows, config.cap_feat_dim, generator=generator).to(device)


def save(report: Report, path: Path) -> None:
    with written_whole([path]) as (partial,):
        partial.write_text(json.dumps(dataclasses.asdict(report), indent=1) + "\n")


__all__ = ["Case", "Estimate", "Peak", "Report", "grid", "measure", "measured", "run", "save"]

if __name__ == "__main__":
    print(json.dumps(dataclasses.asdict(measure(Case(**json.loads(sys.argv[1]))))))
