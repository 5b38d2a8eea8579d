"""One way of decoding, loaded in this process: pixeldiff's, a baseline, or the original."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import pixeldiff
from pixeldiff.errors import UntrainedSizeWarning
from pixeldiff.memory import return_freed_memory
from pixeldiff.models.noise import NoiseSource
from pixeldiff.models.pid.decoder import PRECISIONS
from pixeldiff.models.pid.samplers import network_time, sample_student, student_times
from pixeldiff.ops.registry import OPS

from . import models, upstream

# Name -> (what runs, the mode of torch.compile or None). "compile" is the plain network compiled,
# "reference-fp32" the plain network in fp32 whatever precision is asked for, "pixeldiff-no-graphs"
# what pixeldiff does for the first image of a size, "pixeldiff+returned" a process that gives freed
# memory back at once (`pixeldiff.memory.return_freed_memory`), "upstream+compile" the original as
# its own switch --compile has it, "upstream+accelerate" the original, handed to
# `pixeldiff.accelerate` as it is.
VARIANTS = {
    "pixeldiff": ("pixeldiff", None),
    "pixeldiff+compile": ("pixeldiff", "default"),
    "pixeldiff-no-graphs": ("pixeldiff", None),
    "pixeldiff+returned": ("pixeldiff", None),
    "reference": ("reference", None),
    "reference-fp32": ("reference", None),
    "compile": ("reference", "default"),
    "compile-max-autotune": ("reference", "max-autotune"),
    "upstream": ("upstream", None),
    "upstream+compile": ("upstream", "default"),
    "upstream+accelerate": ("upstream", None),
}
SEED = 0


@dataclass(frozen=True)
class Spec:
    """What a worker loads. `backends` as the option --backend gives them; `tile` is latent cells
    along a side of a tile, 0 for an image in one piece."""

    variant: str
    config: str
    device: str
    precision: str
    steps: int | None
    batch: int
    backends: tuple[str, ...] = ()
    threads: int | None = None
    tile: int = 0


def precision(variant: str, asked: str) -> str:
    """What a variant runs in where the benchmark was asked for `asked`. The original has no fp8."""
    if VARIANTS[variant][0] == "upstream" and asked == "fp8":
        return "bf16"
    return "fp32" if variant == "reference-fp32" else asked


class Marks:
    """Spans on the device's own time line, read after the image is done."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextlib.contextmanager
    def span(self, name: str):
        start = self._now()
        yield
        self._spans.setdefault(name, []).append((start, self._now()))

    def wrap(self, name: str, call: Callable) -> Callable:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.span(name):
                return call(*args, **kwargs)

        return timed

    def around(self, run: Callable) -> Callable:
        """`Graphs.run` with its spans: entered is prepared, what it yields is a step."""

        @contextlib.contextmanager
        def timed(*args: Any):
            with contextlib.ExitStack() as stack:
                with self.span("prepare"):
                    advance = stack.enter_context(run(*args))
                yield self.wrap("step", advance)

        return timed

    def take(self) -> dict[str, list[float]]:
        """Milliseconds of every span since the last call."""
        spans, self._spans = self._spans, {}
        return {k: [self._ms(a, b) for a, b in pairs] for k, pairs in spans.items()}

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _ms(self, a: Any, b: Any) -> float:
        return a.elapsed_time(b) if self.device.type == "cuda" else 1e3 * (b - a)


def choice(backends: tuple[str, ...]) -> dict[str, str]:
    """Arguments of `pixeldiff.backend`: a bare name is forced for every op that has it, the other
    ops stay free; op=name is forced as it is.

    Raises:
        ValueError: a name that no op has, or an unknown op.
    """
    table: dict[str, str] = {}
    for word in backends:
        op, _, name = word.rpartition("=")
        if op:
            if op not in OPS:
                raise ValueError(f"--backend {word}: no op {op!r}; ops are {', '.join(OPS)}")
            table[op] = name
        elif name != "auto":
            having = [o.name for o in OPS.values() if name in {b.name for b in o.backends}]
            if not having:
                raise ValueError(f"--backend {word}: no op has a backend {name!r}")
            table.update(dict.fromkeys(having, name))
    return table


class Loaded:
    """A variant, ready to decode.

    Raises:
        ImportError: the original is not there.
    """

    def __init__(self, spec: Spec) -> None:
        spec = dataclasses.replace(spec, precision=precision(spec.variant, spec.precision))
        self.spec = spec
        if spec.variant == "pixeldiff+returned" and not return_freed_memory():
            raise RuntimeError("pixeldiff+returned: glibc alone gives freed memory back")
        self.device = torch.device(spec.device)
        self.marks = Marks(self.device)
        self.base, mode = VARIANTS[spec.variant]
        if spec.tile and (self.base == "upstream" or mode):
            raise ValueError("decodes in tiles are pixeldiff's own and the reference's")
        if self.base == "upstream":
            self._load_upstream(mode)
        else:
            self._load(mode)
        self._inputs: dict[int, models.Inputs] = {}

    def _load(self, mode: str | None) -> None:
        spec = self.spec
        self.decoder = models.decoder(spec.config, self.device, spec.precision)
        if spec.variant == "pixeldiff-no-graphs":
            self.decoder.graphs.limit = 0
        self.net = net = self.decoder.net
        self.config = net.config
        self.steps = spec.steps or self.decoder.sampling.steps
        if mode:
            net.step = _compiled_step(net, mode)
        if spec.tile:
            net.step = self.marks.wrap("step", net.step)  # a call for each tile
            self._decode = self._by_decoder
            return
        if self.decoder.distilled and not mode:
            # Around what the decoder runs, captured or not: its methods are what graphs replay.
            self.decoder.graphs.run = self.marks.around(self.decoder.graphs.run)
            self._decode = self._by_decoder
            return
        net.prepare = self.marks.wrap("prepare", net.prepare)
        net.step = self.marks.wrap("step", net.step)
        # A decoder fuses its sampler's update into the step; the compiled graph is the step.
        self._decode = self._by_step if self.decoder.distilled else self._by_decoder

    def _load_upstream(self, mode: str | None) -> None:
        spec, found = self.spec, models.resolve(self.spec.config)
        if found is not None and found.kind != "distilled":
            raise ValueError("upstream is run with the distilled networks' sampler only")
        demo = models.decoder(spec.config, torch.device("cpu"), "fp32") if found is None else None
        self.config = demo.net.config if demo else found.inference_config
        self.net = upstream.network(self.config, self.device)
        if demo:
            missing, _ = self.net.load_state_dict(demo.net.state_dict(), strict=False)
            if missing:
                raise ValueError(f"the checkout's network has other parameters: {missing[:3]}")
        else:
            models.fill(self.net, PRECISIONS[spec.precision])
        if spec.variant == "upstream+accelerate":
            pixeldiff.accelerate(self.net)
        self.steps = spec.steps or 4
        step = upstream.Step(self.net, spec.precision, compiled=mode is not None)
        self._step = self.marks.wrap("step", step)
        self._decode = self._by_original

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.net.parameters())

    @property
    def weight_bytes(self) -> int:
        return sum(p.numel() * p.element_size() for p in self.net.parameters())

    def image(self, side: int) -> tuple[float, dict[str, list[float]], Tensor]:
        """Decode one batch: (milliseconds, spans, image (B, 3, H, W) on its device)."""
        if side not in self._inputs:
            spec = self.spec
            self._inputs = {side: models.inputs(self.config, side, spec.batch, self.device)}
        self.synchronize()
        start = time.perf_counter()
        with warnings.catch_warnings(), self._context():
            warnings.simplefilter("ignore", UntrainedSizeWarning)
            image = self._decode(self._inputs[side], side)
        self.synchronize()
        return 1e3 * (time.perf_counter() - start), self.marks.take(), image

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _context(self) -> contextlib.AbstractContextManager:
        if self.base == "reference":
            return pixeldiff.backend("reference")
        return pixeldiff.backend(**choice(self.spec.backends))

    def _by_decoder(self, inputs: models.Inputs, side: int) -> Tensor:
        options: dict[str, Any] = {}
        if not self.decoder.distilled:
            options["negative_caption"] = -inputs.caption
        if self.spec.tile:
            options["tile"] = (self.spec.tile, self.spec.tile)
        return self.decoder.decode(
            inputs.latent,
            caption=inputs.caption,
            steps=self.steps,
            seed=SEED,
            output="pt",
            **options,
        ).images

    @torch.no_grad()
    def _by_step(self, inputs: models.Inputs, side: int) -> Tensor:
        times = student_times(self.steps)
        batch = inputs.latent.shape[0]
        condition = self.net.prepare(
            inputs.latent,
            inputs.caption.expand(batch, -1, -1),
            size=(side, side),
            timesteps=[network_time(t) for t in times[:-1]],
        )
        return self._sample(lambda x, tau: self.net.step(x, tau, condition), batch, side)

    @torch.no_grad()
    def _by_original(self, inputs: models.Inputs, side: int) -> Tensor:
        return self._sample(
            lambda x, tau: self._step(x, tau, inputs.latent, inputs.caption),
            inputs.latent.shape[0],
            side,
        )

    def _sample(self, velocity: Callable, batch: int, side: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(SEED)
        draw = NoiseSource(generator, self.device)
        noise = draw((batch, self.config.in_channels, side, side))
        return sample_student(velocity, noise, student_times(self.steps), draw).clamp(-1, 1)


def _compiled_step(net, mode: str = "default") -> Callable:
    """`net.step` as one compiled graph for all steps."""
    step = torch.compile(net.step, dynamic=False, fullgraph=True, mode=mode)

    def run(x: Tensor, tau: float, condition) -> Tensor:
        # Under the same key in every step: the time would be a constant of the graph otherwise.
        modulation = condition.modulations.get(tau)
        if modulation is None:
            modulation = net.modulation(torch.tensor([network_time(tau / 1000)], device=net.device))
        # Where the mode makes CUDA graphs, the result of the step before was used by now.
        torch.compiler.cudagraph_mark_step_begin()
        return step(x, 0.0, dataclasses.replace(condition, modulations={0.0: modulation}))

    return run
