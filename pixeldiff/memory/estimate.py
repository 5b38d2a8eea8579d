"""`estimate_memory`: what a decode or an image will take, before anything is loaded."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import SizeError
from ..images import OUTPUTS
from ..models.l2p.bands import DECODER_MEMORY
from ..models.l2p.config import VARIANTS, L2PConfig
from ..models.l2p.config import Variant as L2PVariant
from ..models.l2p.pipeline import SAMPLING, UNKNOWN
from ..models.l2p.sizes import check_size as check_l2p_size
from ..models.l2p.tiling import tile_layout as l2p_layout
from ..models.pid.checkpoint import read_checkpoint
from ..models.pid.config import PiDConfig
from ..models.pid.decoder import PRECISIONS, STUDENT
from ..models.pid.pixel_bands import check_chunk
from ..models.pid.samplers import student_times, teacher_times
from ..models.pid.tile_layout import Tiling
from ..models.pid.tile_layout import tile_layout as pid_layout
from ..models.pid.tiling import MODES
from ..models.pid.variants import SamplingSettings, Variant, variant
from ..models.steps import one_of
from . import l2p_counts, libraries, pid_counts
from .counts import Counts
from .heap import returns_freed_memory

DEVICES = ("cpu", "cuda")
PROMPT_TOKENS, NEGATIVE_TOKENS = 256, 32  # of an L2P prompt, where nothing is said


@dataclass(frozen=True)
class Estimate:
    """Bytes, on the device.

    Args:
        device: "cpu" (resident set above the process before it loads anything) or "cuda" (the
            allocator's; the CUDA context, half a gigabyte, is beside it).
        weights: that stay there; the two buffers of `offload="blocks"` included.
        activations: tensors alive at the worst moment.
        workspace: what libraries take, and on a CPU gaps in the C library's heap unless this
            process gives freed memory back (`return_freed_memory`); fixed images of CUDA graphs.
        text_encoder: weights of the text encoder, where one stays loaded.
        phases: tensors alive at the worst moment of each phase.
        table: what was alive at the worst moment of all, largest first.
    """

    device: str
    weights: int
    activations: int
    workspace: int
    text_encoder: int
    phases: Mapping[str, int] = field(default_factory=dict, compare=False)
    table: tuple[str, ...] = field(default=(), compare=False)

    @property
    def peak(self) -> int:
        """All of it together."""
        return self.weights + self.activations + self.workspace + self.text_encoder

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        names = ("weights", "activations", "workspace", "text_encoder", "peak")
        return {"device": self.device, **{name: getattr(self, name) for name in names}}


def estimate_memory(model: Any, size: int | tuple[int, int], **options: Any) -> Estimate:
    """Peak memory of a decode (PiD) or an image (L2P) of a network. Nothing is loaded for it.

        estimate_memory("flux-2k", 2048, device="cuda", precision="bf16").peak

    It is found by running the network's own code on PyTorch's meta device and adding up what lives;
    0.1 to 2 s, and nothing the second time.

    Args:
        model: name of a released variant: PiD's ("flux-2k", "sd3-2kto4k"), or L2P's with "l2p-"
            before it ("l2p-1k"), or "demo". Or a `PiDConfig`, an `L2PConfig`, or a variant.
        size: pixels of the image, (H, W) or one number for a square.
        options: of `estimate_pid` or `estimate_l2p`.

    Raises:
        ValueError: an unknown model, or options it cannot take. SizeError: a size it cannot make.
        TypeError: an unknown option.
    """
    found = resolve(model)
    estimate = estimate_pid if isinstance(found, Variant | PiDConfig) else estimate_l2p
    return estimate(found, size, **options)


def resolve(model: Any) -> Variant | PiDConfig | L2PVariant | L2PConfig:
    """The network that a name stands for; networks stay.

    Raises:
        ValueError: unknown, or a network that makes no pictures by itself.
    """
    if isinstance(model, str):
        name = model.strip().lower()
        if name == "demo":
            return _demo()
        if name.startswith("l2p-"):
            known = {f"l2p-{v.name}": v for v in VARIANTS.values() if v.config.local_decoder}
            if name not in known:
                raise ValueError(f"model: L2P has {', '.join(known)}, got {model!r}")
            return known[name]
        model = variant(name)
    config = getattr(model, "config", model)
    if isinstance(config, PiDConfig) and config.lq_latent_channels is None:
        raise ValueError("model: the text-to-image backbone decodes no latent; nothing to estimate")
    if isinstance(config, L2PConfig) and config.local_decoder is None:
        raise ValueError("model: the latent model of L2P makes no pixels; nothing to estimate")
    if not isinstance(config, PiDConfig | L2PConfig):
        raise TypeError(f"model must be a name, a variant or a config, got {type(model).__name__}")
    return model


@functools.cache
def _demo() -> PiDConfig:
    """Of the small network that comes with the package."""
    return read_checkpoint("demo", device="cpu").config


def estimate_pid(
    model: Variant | PiDConfig,
    size: int | tuple[int, int],
    *,
    device: str = "cpu",
    precision: str | None = None,
    backend: str | None = None,
    batch: int = 1,
    steps: int | None = None,
    sampling: SamplingSettings | None = None,
    guided: bool | None = None,
    text_rows: int | None = None,
    tile: Tiling = None,
    overlap: int | None = None,
    tile_mode: str = "sync",
    tile_batch: int = 1,
    low_memory: bool = False,
    pixel_chunk: int | None = None,
    offload: str | bool = False,
    cuda_graphs: bool | int = True,
    state_dtype: str | None = None,
    latent_hw: tuple[int, int] | None = None,
    output: str = "pil",
    previews: bool = False,
    text_encoder: bool = False,
) -> Estimate:
    """`estimate_memory` of a PiD decode; options as of `PiDDecoder` and its `decode`.

    Args:
        model, size: see `estimate_memory`.
        device: "cpu" or "cuda"; need not be here.
        precision: default bf16 on cuda, fp32 on cpu.
        backend: of all ops; None is free choice: "triton" on cuda, "cpu" on cpu.
        batch: latents.
        sampling: of a network that was never released; default the 4-step student's.
        guided: whether there is a negative caption; default: whether the network is a teacher.
        text_rows: tokens of the captions; default as many as the network takes.
        latent_hw: cells of the latent, where the image is not of its own size.
        output: "pil", "pt" or "np"; "file" for the path of a TIFF, or of a PNG with the extra
            pixeldiff[png], which independent tiles write row by row; "whole file" for that of
            another, of which the picture in 8 bits is held.
        previews: whether a callback is told of every estimate.
        text_encoder: whether texts are given, so that the encoder stays loaded.
    """
    config = model if isinstance(model, PiDConfig) else model.inference_config
    released = None if isinstance(model, PiDConfig) else model
    sampling = sampling or (released.sampling if released else STUDENT)
    precision = _checked(device, precision, tuple(PRECISIONS))
    one_of("tile_mode", tile_mode, MODES)
    one_of("output", output, (*OUTPUTS, *pid_counts.FILES))
    size = pair_of(size)
    cell = config.pixels_per_latent_cell
    if latent_hw is None:
        if size[0] % cell or size[1] % cell:
            raise SizeError(
                f"size must be a multiple of {cell}, the pixels of a latent cell, got {size}; pass "
                f"latent_hw with a size that is not the latent's own"
            )
        latent_hw = size[0] // cell, size[1] // cell
    layout = pid_layout(config, released, latent_hw, tile, overlap)
    steps = sampling.steps if steps is None else steps
    times = student_times(steps, sampling.times) if sampling.times else None
    if times is None:
        times = student_times(steps) if sampling.stochastic else teacher_times(steps, 4.0)
    guided = not sampling.stochastic if guided is None else guided
    wide = sampling.stochastic and state_dtype in (None, "fp64")
    decode = pid_counts.Decode(
        config=config,
        dtype=PRECISIONS[precision],
        fp8=precision == "fp8",
        latent_hw=tuple(latent_hw),
        size=size,
        batch=batch,
        text_rows=min(text_rows or config.txt_max_length, config.txt_max_length),
        times=times,
        student=sampling.stochastic,
        guided=guided,
        keep_features=not low_memory,
        pixel_chunk=check_chunk(pixel_chunk),
        layout=layout,
        tile_mode=tile_mode,
        together=tile_batch,
        state_dtype=torch.float64 if wide else torch.float32,
        output=output,
        previews=previews,
    )
    counts = pid_counts.counted(decode, device, backend)
    weights = pid_counts.resident_weights(config, decode.dtype, decode.fp8, device, bool(offload))
    on_cpu = libraries.PID_CPU if decode.dtype == torch.float32 else libraries.PID_CPU_16_BITS
    on_cpu += libraries.REFERENCE_CPU if backend == "reference" else 0
    workspace = libraries.CUDNN_WORKSPACE if device == "cuda" else on_cpu
    if device == "cuda" and cuda_graphs and sampling.stochastic and layout is None and not offload:
        # State, noise and preview at fixed addresses.
        workspace += (2 + previews) * 4 * config.in_channels * batch * size[0] * size[1]
    return _estimate(device, weights, counts, workspace, libraries.GEMMA_2_2B * text_encoder)


def estimate_l2p(
    model: L2PVariant | L2PConfig,
    size: int | tuple[int, int],
    *,
    device: str = "cpu",
    precision: str | None = None,
    backend: str | None = None,
    batch: int = 1,
    steps: int | None = None,
    guided: bool | None = None,
    prompt_tokens: int = PROMPT_TOKENS,
    negative_tokens: int = NEGATIVE_TOKENS,
    guidance_together: bool = True,
    decoder_memory: int | None = DECODER_MEMORY,
    tile: Tiling = None,
    overlap: int | None = None,
    offload: str | bool = False,
    cuda_graphs: bool | int = True,
    output: str = "pil",
    previews: bool = False,
    text_encoder: bool = False,
) -> Estimate:
    """`estimate_memory` of an L2P image; options as of `L2PPipeline` and its call.

    Args:
        model, size: see `estimate_memory`.
        device, precision, backend, previews, text_encoder: as for `estimate_pid`.
        batch: images.
        guided: whether there is guidance; default as the variant is sampled.
        prompt_tokens, negative_tokens: lengths of the prompts.
    """
    config = model if isinstance(model, L2PConfig) else model.config
    released = None if isinstance(model, L2PConfig) else model
    sampling = SAMPLING.get(released.name if released else "", UNKNOWN)
    precision = _checked(device, precision, ("fp32", "bf16"))
    guided = sampling.guidance_scale != 1 if guided is None else guided
    size = pair_of(size)
    layout = l2p_layout(config, released, size, tile, overlap)
    if layout is None:
        check_l2p_size(config, size)
    image = l2p_counts.Image(
        config=config,
        dtype=PRECISIONS[precision],
        size=size,
        batch=batch,
        text_rows=(prompt_tokens, negative_tokens) if guided else (prompt_tokens,),
        steps=sampling.steps if steps is None else steps,
        together=guidance_together,
        decoder_memory=decoder_memory,
        layout=layout,
        output=output,
        previews=previews,
    )
    counts = l2p_counts.counted(image, device, backend)
    weights = l2p_counts.resident_weights(config, image.dtype, device, bool(offload))
    workspace = 0 if device == "cuda" else libraries.L2P_CPU
    if device == "cuda" and cuda_graphs and layout is None and not offload:
        workspace = 2 * 4 * config.in_channels * batch * size[0] * size[1]
    return _estimate(device, weights, counts, workspace, libraries.QWEN3_4B * text_encoder)


def _estimate(
    device: str, weights: int, counts: Counts, workspace: int, text_encoder: int
) -> Estimate:
    if device == "cuda":
        workspace += libraries.CUBLAS_WORKSPACE
    else:
        workspace += libraries.products_on_cpu(len(counts.products))
        if not returns_freed_memory():
            workspace += max(0, counts.resident - counts.peak)
    rows = tuple(counts.table())
    return Estimate(device, weights, counts.peak, workspace, text_encoder, counts.phases, rows)


def _checked(device: str, precision: str | None, choices: tuple[str, ...]) -> str:
    one_of("device", device, DEVICES)
    if precision is None:
        return "bf16" if device == "cuda" else "fp32"
    one_of("precision", precision, choices)
    return precision


def pair_of(size: int | tuple[int, int]) -> tuple[int, int]:
    """(H, W), checked."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in pair):
        raise SizeError(f"size must be pixels of a side or (H, W), positive integers, got {size!r}")
    return pair
