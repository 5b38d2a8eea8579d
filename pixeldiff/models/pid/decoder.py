"""PiDDecoder: from a generator's latent to an image."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ... import __version__, images
from ...alignment import aligned
from ...finite import check_finite
from ...jobs import JobStore, Stages, resumable
from ...jobs.identity import digest_of, machine
from ...ops.registry import forced_backend
from ...picture_files import check_picture_path, check_space, held_whole, save_rows
from ...text import CaptionFile, load_caption
from .. import devices, fp8
from ..devices import check_device, no_autocast
from ..graphs import Graphs, graph_limit, settings
from ..guards import Watch
from ..in_memory import in_memory
from ..noise import noise_source
from ..offload import apply as apply_offload
from ..offload import check_offload
from ..provenance import Caption, describe, forced_backends
from ..recent import Recent
from ..steps import (
    Callback,
    Interrupted,
    StepInfo,
    TileCallback,
    TileInfo,
    one_of,
    with_tile_callback,
)
from ..tiles import Layout
from .captions import CaptionSource
from .checkpoint import LoadedCheckpoint, net_from, read_checkpoint
from .config import PiDConfig
from .decoding import Decoding, run
from .latent_checks import channels_hint, sigma_hint, warn_unnormalised
from .network import PiDNet, Tables
from .pixel_bands import check_chunk
from .samplers import Advance, dynamic_shift, network_time, student_times, teacher_times
from .sizes import check_size, output_size
from .tile_layout import Tiling, tile_layout
from .tiling import MODES, tiled_rows
from .variants import LICENCE_NOTE, SamplingSettings, Variant

if TYPE_CHECKING:
    from ...memory import Estimate, Plan

# What weights are held in; in "fp8" the network's linear layers are then quantised.
PRECISIONS = {**devices.PRECISIONS, "fp8": torch.bfloat16}
KEPT_TABLES = 4  # 9 MB each at 2048 x 2048
STATE_DTYPES = {"fp64": torch.float64, "fp32": torch.float32}
STUDENT = SamplingSettings(steps=4, times=None, stochastic=True, cfg_scale=1.0)


class LicenceNotice(UserWarning):
    """The weights being loaded are under a licence of their own."""


@dataclass(frozen=True)
class DecodeOutput:
    """Images and how they were made.

    `images` is what `output` asked for: a list of Pillow images, a (B, 3, H, W) fp32 tensor in
    [-1, 1], or a (B, H, W, 3) fp32 array in [0, 1]; or [path] of the file written. `metadata` is
    JSON-able and names everything that decides the pixels.
    """

    images: list[Image.Image] | list[Path] | Tensor | np.ndarray
    metadata: dict[str, Any]


class PiDDecoder:
    """A latent decoder that is a few-step pixel diffusion model (PiD, arXiv 2605.23902).

        decoder = PiDDecoder.from_pretrained("demo")
        image = decoder.decode(latent, caption="a red circle", seed=0).images[0]

    Args:
        net: the network, on its device, in its dtype.
        captions: where embeddings of caption texts and of the null caption come from; by default
            only embeddings are accepted.
        variant: the released network this is, or None.
        backbone: name of the generator whose latents it decodes.
        sampling: schedule and guidance; default: the variant's, or the 4-step student's.
        name: recorded in the metadata of images.
        cuda_graphs: how many kinds of decode (size, batch, caption length, options) to keep as CUDA
            graphs, True for 2; False or 0 for none. Same pixels, less work for the host. The second
            decode of its kind is captured. Only a distilled network whose parameters require no
            gradients, on CUDA. Their memory is kept: that of the largest decode once, and three
            images each; `release_graphs` frees it.
        low_memory: make the latent's features anew in every step instead of keeping them: half the
            activations or less, the same pixels, and about 1% more arithmetic.
        pixel_chunk: patches at a time through all that works on each patch by itself, as for
            `PiDNet.prepare`; None is all. The same pixels up to rounding.
        offload: "blocks" takes the blocks' weights off the device, see `PiDNet.offload_`: the same
            pixels, 2.4 of 2.7 GB less at released size in bf16. CUDA graphs are off with it, and
            threads take turns. Not undone. On the CPU only for weights in a mapped file.
    """

    def __init__(
        self,
        net: PiDNet,
        *,
        captions: CaptionSource | None = None,
        variant: Variant | None = None,
        backbone: str | None = None,
        sampling: SamplingSettings | None = None,
        name: str = "custom",
        cuda_graphs: bool | int = True,
        low_memory: bool = False,
        pixel_chunk: int | None = None,
        offload: str | bool = False,
    ) -> None:
        if net.config.lq_latent_channels is None:
            raise ValueError(
                "PiDDecoder: this network is the text-to-image backbone, it has no latent branch "
                "and decodes nothing; use pixeldiff.models.pid.PiDNet directly"
            )
        self.net = net.eval()
        self.captions = captions or CaptionSource(net.config.txt_embed_dim)
        self.variant = variant
        self.backbone = backbone
        self.sampling = sampling or (variant.sampling if variant else STUDENT)
        self.name = name
        self.low_memory = low_memory
        self.pixel_chunk = check_chunk(pixel_chunk)
        limit = graph_limit(cuda_graphs)
        self.graphs: Graphs[Advance] = Graphs(0 if apply_offload(net, offload) else limit)
        self._tables: Recent[Tables] = Recent(KEPT_TABLES)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        backbone: str | None = None,
        device: torch.device | str | None = None,
        precision: str | None = None,
        null_caption: str | os.PathLike[str] | Tensor | CaptionFile | None = None,
        text_encoder: Any = None,
        variant: str | None = None,
        config: PiDConfig | None = None,
        ema: bool | None = None,
        sampling: SamplingSettings | None = None,
        cuda_graphs: bool | int = True,
        low_memory: bool = False,
        pixel_chunk: int | None = None,
        offload: str | bool = False,
    ) -> PiDDecoder:
        """Read a checkpoint.

        Args:
            path: a .safetensors, .pth or .pt file, a folder with one, a hub id, or "demo" (the
                small network shipped with the package).
            backbone: the generator ("flux", "sd3", "qwenimage", ...). Needed where a file's shapes
                fit several; the error then lists the choices.
            device: default "cuda" where there is one, else "cpu".
            precision: "fp32" or "bf16", the dtype the weights are held and multiplied in; or "fp8":
                bf16, but e4m3 with scales in the linear layers of attention and feed-forward (see
                `PiDNet.quantize_`). Its errors are in docs/precision.md. It needs a GPU of compute
                capability 8.9 or later; a CPU takes it too, slower than bf16, to measure those
                errors. Default bf16 on CUDA, fp32 elsewhere.
            null_caption: embedding (1, T, E) of the empty caption, a `CaptionFile`, or the path of
                a file of `pixeldiff bake-caption`; used when `decode` is given no caption.
            text_encoder: folder or hub id of a Gemma-2, or an object with `encode(list of str)`.
                It is not loaded before a text is given. Default "google/gemma-2-2b-it".
            variant, config, ema: as for `read_checkpoint`.
            sampling: schedule and guidance of a network that was never released; default: the
                variant's, or the 4-step student's.
            cuda_graphs, low_memory, pixel_chunk: as for `PiDDecoder`.
            offload: as for `PiDDecoder`. On CUDA the blocks never are on the device together; on
                the CPU they stay in the file, where that is a .safetensors file or a .pth file of
                PyTorch's zip format (on Linux), and are read and converted as they are needed.

        Raises:
            CheckpointError: what is wrong with the file (see `pixeldiff.errors`); nothing stays
                loaded. ValueError: precision, device, or null_caption.

        Warns:
            LicenceNotice: the weights are released ones, under a licence of their own.
        """
        device = check_device(device)
        if precision is None:
            precision = "bf16" if device.type == "cuda" else "fp32"
        graph_limit(cuda_graphs)
        check_chunk(pixel_chunk)
        away = check_offload(offload)
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        check_precision(precision, device)
        loaded = read_checkpoint(
            path,
            backbone=backbone,
            variant=variant,
            config=config,
            ema=ema,
            dtype=None if away else PRECISIONS[precision],
            device="cpu" if away else device,
        )
        if loaded.variant is not None:
            warnings.warn(LICENCE_NOTE, LicenceNotice, stacklevel=2)
        captions = CaptionSource.for_checkpoint(
            loaded, null_caption=null_caption, text_encoder=text_encoder, device=device
        )
        net = net_from(loaded)
        loaded.state_dict.clear()  # the network owns its weights
        if away:
            fp8 = precision == "fp8"
            net.offload_(device=device, dtype=PRECISIONS[precision], fp8=fp8)
        else:
            ready(net, precision)
        return cls(
            net,
            captions=captions,
            variant=loaded.variant,
            backbone=loaded.backbone,
            sampling=sampling,
            name=_name(path, loaded),
            cuda_graphs=cuda_graphs,
            low_memory=low_memory,
            pixel_chunk=pixel_chunk,
            offload=offload,
        )

    @property
    def device(self) -> torch.device:
        return self.net.device

    @property
    def precision(self) -> str:
        """ "fp32", "bf16" or "fp8"."""
        if self.net.fp8:
            return "fp8"
        return next((k for k, v in PRECISIONS.items() if v == self.net.dtype), str(self.net.dtype))

    @property
    def distilled(self) -> bool:
        """Whether the network is a few-step student (else a teacher, which takes guidance)."""
        return self.sampling.stochastic

    def encode_caption(self, text: str | Sequence[str]) -> Tensor:
        """(B, T, E) embeddings of B texts. Loads the text encoder if it is not loaded.

        Raises:
            ValueError: no text encoder, or one that does not fit. TypeError: not text.
            OSError, ImportError: the encoder cannot be loaded; says what to do.
        """
        return self.captions.encode(text)

    def null_caption(self) -> Tensor:
        """(1, T, E) embedding of the empty caption. Loads the text encoder if none was given."""
        return self.captions.null(load=True)

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory. It is loaded again if a text is given again."""
        self.captions.release()

    def release_graphs(self) -> None:
        """Free the memory of captured CUDA graphs. Waits for a decode that is using one."""
        self.graphs.release()

    def estimate_memory(
        self, size: int | tuple[int, int], *, device: str | None = None, **options: Any
    ) -> Estimate:
        """What a decode at `size` (pixels, (H, W) or of a square's side) would take; see
        `pixeldiff.memory.estimate_pid`, whose options it takes. `device` "cuda" or "cpu" is the
        decoder's own where nothing is said; nothing is run on it."""
        from ...memory import estimate_pid

        given = {**self._memory_options(), **({} if device is None else {"device": device})}
        return estimate_pid(self.variant or self.net.config, size, **{**given, **options})

    def memory_question(
        self, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, tuple[int, int], dict[str, Any], bool]:
        """What a decode with these arguments asks of `pixeldiff.memory.plan`: network, size, what
        is fixed, and whether tiles may be chosen."""
        latent = self._latent(args[0] if args else options.get("latent"))
        config, asked = self.net.config, self._memory_options()
        own = output_size(config, tuple(latent.shape[-2:]))
        size = tuple(options.get("size") or own)
        asked["batch"] = latent.shape[0]
        for name in ("steps", "tile", "overlap", "state_dtype"):
            if options.get(name) is not None:
                asked[name] = options[name]
        if "tile" in asked:
            asked |= {k: options[k] for k in ("tile_mode", "tile_batch") if k in options}
        if size != own:
            asked["latent_hw"] = tuple(latent.shape[-2:])
        asked["guided"] = not self.distilled and options.get("cfg_scale") not in (1, 1.0)
        texts = (options.get("caption"), options.get("negative_caption"))
        asked["text_encoder"] = self.captions.keeps_encoder(*texts)
        output = options.get("output", "pil")
        if isinstance(output, Path):
            output = "whole file" if held_whole(output, size) else "file"
        asked["output"] = output
        asked["previews"] = options.get("callback") is not None
        # A resumed job is held to its tiles, and a preview is of the whole image.
        free = not {"tile", "latent_hw"} & asked.keys() and options.get("resume") is None
        if asked["previews"]:
            asked["tile_mode"] = "sync"
        return self.variant or config, size, asked, free

    def _memory_options(self) -> dict[str, Any]:
        kind = self.device.type
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"memory is estimated for cpu and cuda, this decoder is on {kind}")
        given = {
            "device": kind,
            "precision": self.precision,
            "backend": forced_backend("*"),
            "sampling": self.sampling,
            "text_encoder": self.captions.keeps_encoder(),
            "cuda_graphs": False,
            "offload": "blocks" if self.net.offload is not None else False,
        }
        given |= {"low_memory": True} if self.low_memory else {}
        return given | ({} if self.pixel_chunk is None else {"pixel_chunk": self.pixel_chunk})

    def release_memory(self) -> None:
        """Free what is kept from decode to decode: CUDA graphs, tables, buffers of weights that
        visit the device. All are made again when they are needed."""
        self.graphs.release()
        self._tables.clear()
        if self.net.offload is not None:
            self.net.offload.release()

    @resumable
    @in_memory
    def decode(
        self,
        latent: Tensor,
        *,
        caption: Caption = None,
        sigma: float | Sequence[float] | Tensor = 0.0,
        steps: int | None = None,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        size: tuple[int, int] | None = None,
        callback: Callback | None = None,
        output: str | Path = "pil",
        sample_type: str = "sde",
        state_dtype: str | None = None,
        cfg_scale: float | None = None,
        negative_caption: Caption = None,
        tile: Tiling = None,
        overlap: int | None = None,
        tile_mode: str = "sync",
        tile_batch: int = 1,
        tile_callback: TileCallback | None = None,
        memory: str | int | Plan | None = None,
        resume: str | os.PathLike[str] | JobStore | None = None,
        debug: bool = False,
    ) -> DecodeOutput:
        """Decode latents to images.

        Args:
            latent: (B, Cz, zh, zw), floating point, normalised as the generator's diffusion model
                sees it (`pixeldiff.models.pid.to_pid_latent` converts other conventions).
            caption: text(s), embeddings (1 or B, T, E), a `CaptionFile`, or None for the null
                caption. Texts load the text encoder; embeddings never do.
            sigma: noise level of the latent in [0, 1]; 0 is a finished latent. One value or B.
            steps: 1..4 for a distilled network (default 4); any number for a teacher.
            seed: of the decoder's own generator on the network's device; None draws one and
                reports it. PyTorch's global generators are neither read nor advanced.
            generator: instead of seed: one for the batch, drawn as released, or B of them, so that
                a sample does not depend on its batch. Its seed is reported if it is fresh.
            size: (H, W) of the output; default latent size times the network's scale.
            callback: told after each network call (`StepInfo`); returning False stops.
            output: "pil", "pt" or "np"; see `DecodeOutput`. Or the `Path` of a .png, .tif or .jpg
                to write one picture to, with its metadata. With tile_mode="independent" PNG and
                TIFF are written while it is decoded: of the image no more rows are held than a tile
                has, and its size is bounded by the disk.
            sample_type: "sde" (released) or "ode" (no fresh noise between steps; other pixels).
            state_dtype: "fp64" (released) or "fp32" for the student's arithmetic. Default fp64
                where the device has it. A teacher's is fp32.
            cfg_scale: guidance of a teacher; a distilled network takes none.
            negative_caption: for guidance; text or embeddings.
            tile: decode in tiles: (h, w) in latent cells; "auto", in tiles as large as the network
                was trained for, where the image is larger than that; None, in one piece. Other
                pixels than in one piece: within a tile positions are the tile's own, as if it were
                a whole image, and no tile attends to another. Always without CUDA graphs.
            overlap: of tiles, in latent cells, at most a third of a tile; default an eighth. They
                fade into each other over a quarter of it.
            tile_mode: "sync" blends the tiles after every network call, so that there are no seams;
                "independent" samples each tile to its end alone and blends once.
            tile_batch: tiles in one network call: a little faster, more memory. Equal pixels up to
                rounding.
            tile_callback: told after each tile (`TileInfo`); returning False stops.
            memory: what the decode may take on its device, weights and all: bytes, text like "4GB",
                or a `pixeldiff.memory.Plan`. The fastest way that fits is chosen: features anew in
                every step, patches in chunks, and, where `tile` was left None, tiles, which change
                the pixels (a `MemoryWarning` and the metadata say so). On a CPU it is counted above
                what the process had before it loaded the decoder. Always without CUDA graphs.
                Where memory runs out, with or without a budget, the decode is made once more in the
                next cheaper way, with a `MemoryWarning`; without a budget, or with `tile` given,
                only in a way with the same pixels. Not with `resume`.
            resume: a folder that keeps finished tiles and steps, so that a process killed at any
                moment costs one of them: the same call goes on there, to the same pixels. Removed
                at the end; a `pixeldiff.jobs.JobStore` lasts until its own block does. Where it
                holds a job begun without a seed, None is that job's seed.
            debug: check what every operation makes, to name the layer where NaN or infinity comes
                from; the same pixels, slower, without CUDA graphs.

        Returns:
            Images and metadata. Nothing else that shows is kept or changed, so a decoder may be
            used from several threads at once; CUDA graphs serve one of them at a time.

        Raises:
            ValueError, TypeError: an argument the network cannot take; checked before any work.
            BudgetError: no way fits `memory`; names the smallest budget that would do.
            Interrupted: the callback returned False. What a callback raises passes through.
            ResumeError: `resume` holds another job, or another process is at it.
            NonFiniteError, an ArithmeticError: the network returned NaN or infinity; says in which
                step, and with `debug` which layer made it.
            OSError: the file cannot be written, or might not fit on its disk; nothing is left.
        """
        if not isinstance(output, Path):
            images.check_output(output)
        way = {} if memory is None else memory.settings
        low_memory = way.get("low_memory", self.low_memory)
        pixel_chunk = way.get("pixel_chunk", self.pixel_chunk)
        if "tile" in way:
            tile, tile_mode = way["tile"], way["tile_mode"]
        tile_batch = way.get("tile_batch", tile_batch)
        latent, sigma = self._latent(latent), self._sigma(sigma, latent.shape[0])
        warn_unnormalised(latent, self.backbone, stacklevel=5)
        layout = self._layout(tuple(latent.shape[-2:]), size, tile, overlap, tile_mode, tile_batch)
        if layout is not None and tile_mode == "independent" and callback is not None:
            raise ValueError(
                "callback is told of the whole image after each network call, which "
                "tile_mode='independent' never has; use tile_callback"
            )
        if layout is None:
            callback = with_tile_callback(callback, tile_callback)
        variant = self.variant if layout is None else None
        size = check_size(self.net.config, tuple(latent.shape[-2:]), size, variant)
        if isinstance(output, Path):
            self._check_file(output, size, latent.shape[0])
        own_size = size if layout is None else layout.tile_pixels  # of what the network sees
        steps = self.sampling.steps if steps is None else steps
        times = self._times(steps, own_size)
        cfg_scale = self._cfg_scale(cfg_scale, negative_caption)
        self._check_sampler(sample_type, state_dtype)
        if state_dtype is None:
            narrow = not self.distilled or self.device.type == "mps"
            state_dtype = "fp32" if narrow else "fp64"
        if resume is not None and generator is None:
            seed = resume.seed(seed)
        draw, seed = noise_source(seed, generator, latent.shape[0], self.device, what="latent")
        y = self._caption("caption", caption, latent.shape[0])
        null = None
        if cfg_scale != 1:
            null = self._caption("negative_caption", negative_caption, latent.shape[0])
        tables = self._tables_for(own_size, y.shape[1], times)
        if resume is not None:
            resume.begin(
                {
                    "job": "PiD decode",
                    "pixeldiff": __version__,
                    **machine(self.device),
                    "arithmetic": settings(),
                    "precision": self.precision,
                    "weights": resume.weights(self.net),
                    "latent": digest_of(latent),
                    "latent shape": latent.shape,
                    "sigma": _shortest(sigma),
                    "caption": digest_of(y),
                    "negative caption": digest_of(null),
                    "seed": seed,
                    "rng": draw.kind,
                    "noise": digest_of(*draw.states()),
                    "size": size,
                    "times": times,
                    "sampler": sample_type if self.distilled else "dpmpp_2m",
                    "prediction": self.sampling.prediction_type,
                    "state": state_dtype,
                    "cfg_scale": cfg_scale,
                    "tile": None if layout is None else [layout.tile, layout.overlap],
                    "tile_mode": None if layout is None else tile_mode,
                    "tile_batch": None if layout is None else tile_batch,
                    "pixel_chunk": pixel_chunk,
                }
            )
            if layout is not None:
                kept = len(layout.tiles) * math.prod(layout.tile_pixels)
                if tile_mode == "sync":  # two states; a teacher's hold the estimate before too
                    kept = kept * (1 if null is None else 2)
                    kept += math.prod(size) * (2 if self.distilled else 4)
                resume.check_space(kept * latent.shape[0] * self.net.config.in_channels * 4)
        what = Decoding(
            latent,
            y,
            sigma,
            null,
            size=size,
            times=times,
            tables=tables,
            student=self.distilled,
            sample_type=sample_type,
            prediction_type=self.sampling.prediction_type,
            state_dtype=STATE_DTYPES[state_dtype],
            cfg_scale=cfg_scale,
            keep_features=not low_memory,
            pixel_chunk=pixel_chunk,
            layout=layout,
            tile_mode=tile_mode,
            together=tile_batch,
        )
        stages = Stages(resume, draw, self.device)
        watch = Watch(self.net, self.precision, debug=debug)
        callback, tile_callback = watch.around(callback), watch.around(tile_callback)
        rows = None
        with torch.no_grad(), no_autocast(self.device), watch:
            if isinstance(output, Path) and layout is not None and tile_mode == "independent":
                rows = tiled_rows(self.net, what.tiled, draw, tile_callback, stages, watch)
            else:
                result = run(
                    self.net,
                    what,
                    draw,
                    graphs=self.graphs if memory is None else Graphs(0),
                    stages=stages,
                    watch=watch,
                    callback=callback,
                    tile_callback=tile_callback,
                )
        metadata = {
            "model": self.name,
            "backbone": self.backbone,
            "pixeldiff": __version__,
            "steps": steps,
            "sampler": sample_type if self.distilled else "dpmpp_2m",
            "seed": seed,
            "rng": draw.kind,
            "sigma": _shortest(sigma),
            "caption": describe(caption),
            "precision": self.precision,
            "state": state_dtype,
            "size": list(size),
        }
        if layout is not None:
            metadata["tile"] = list(layout.tile)
            metadata["overlap"] = list(layout.overlap)
            metadata["tile_mode"] = tile_mode
        if not self.distilled:
            metadata["cfg_scale"] = cfg_scale
            metadata["negative_caption"] = describe(negative_caption)
        if pixel_chunk is not None:
            metadata["pixel_chunk"] = pixel_chunk
        if memory is not None:
            metadata["memory"] = memory.metadata
        forced = forced_backends()
        if forced:
            metadata["backend"] = forced
        if isinstance(output, Path):
            parts = list(result) if rows is None else _one_by_one(rows, watch)
            through = None if resume is None else resume.path
            with torch.no_grad(), no_autocast(self.device), watch:
                path = save_rows(output, size, parts, metadata, by_way_of=through)
            return DecodeOutput([path], metadata)
        return DecodeOutput(images.convert(result, output), metadata)

    def _check_file(self, path: Path, size: tuple[int, int], batch: int) -> None:
        if batch != 1:
            raise ValueError(
                f"output: a file holds one picture, got {batch} latents; decode them one by one"
            )
        check_picture_path(path, size)
        check_space(path, size)

    def _layout(
        self,
        latent_hw: tuple[int, int],
        size: tuple[int, int] | None,
        tile: Tiling,
        overlap: int | None,
        mode: str,
        together: int,
    ) -> Layout | None:
        one_of("tile_mode", mode, MODES)
        if isinstance(together, bool) or not isinstance(together, int) or together < 1:
            raise ValueError(f"tile_batch must be an integer >= 1, got {together!r}")
        config = self.net.config
        if tile is not None:
            check_size(config, latent_hw)  # the latent itself
        layout = tile_layout(config, self.variant, latent_hw, tile, overlap)
        if layout is None:
            return None
        if size is not None and tuple(size) != layout.image_pixels:
            raise ValueError(
                f"size must be the latent's own, {layout.image_pixels}, where it is decoded in "
                f"tiles, got {size}; leave it out and resize the image"
            )
        check_size(config, layout.tile, None, self.variant)  # warns of untrained tiles
        return layout

    def _tables_for(
        self, size: tuple[int, int], text_rows: int, times: tuple[float, ...]
    ) -> Tables:
        taus = tuple(network_time(t) for t in times[:-1])
        with torch.inference_mode(False), torch.no_grad():  # to serve in any mode
            return self._tables.made(
                (self.net.config, self.device, size, text_rows, taus),
                lambda: self.net.tables(size, text_rows, taus),
            )

    def _latent(self, latent: Tensor) -> Tensor:
        c = self.net.config
        if not isinstance(latent, Tensor) or not latent.is_floating_point():
            kind = latent.dtype if isinstance(latent, Tensor) else type(latent).__name__
            raise ValueError(f"latent must be a floating-point tensor, got {kind}")
        if latent.dim() != 4 or latent.shape[1] != c.lq_latent_channels or 0 in latent.shape:
            hint = ""
            if latent.dim() == 3:
                hint = "; packed tokens are unpacked by pixeldiff.models.pid.to_pid_latent"
            elif latent.dim() == 4 and latent.shape[1] != c.lq_latent_channels:
                hint = channels_hint(latent.shape[1])
            raise ValueError(
                f"latent must be (B, {c.lq_latent_channels}, zh, zw) for this network, got "
                f"{tuple(latent.shape)}{hint}"
            )
        check_finite("latent", latent)
        return aligned(latent.detach().to(self.device).contiguous())

    def _sigma(self, sigma: float | Sequence[float] | Tensor, batch: int) -> Tensor:
        try:
            value = torch.as_tensor(sigma, dtype=torch.float32, device=self.device).detach()
        except (TypeError, ValueError, RuntimeError) as e:
            raise TypeError(f"sigma must be a number, or one per latent, got {sigma!r}") from e
        value = value.reshape(-1)
        if value.numel() not in (1, batch):
            raise ValueError(f"sigma must be one value or {batch}, got {value.numel()}")
        if not bool(((value >= 0) & (value <= 1)).all()):
            hint = sigma_hint(value.max().item())
            raise ValueError(f"sigma must be in [0, 1], got {_few(value.tolist())}{hint}")
        return value.expand(batch)

    def _times(self, steps: int, size: tuple[int, int]) -> tuple[float, ...]:
        s = self.sampling
        if self.distilled:
            return student_times(steps, s.times) if s.times else student_times(steps)
        shift = s.shift
        if s.dynamic_shift is not None:
            shift = dynamic_shift(size, s.dynamic_shift.base_shift, s.dynamic_shift.base_size)
        return teacher_times(steps, shift)

    def _cfg_scale(self, cfg_scale: float | None, negative: Caption) -> float:
        if self.distilled:
            if cfg_scale not in (None, 1, 1.0) or negative is not None:
                raise ValueError(
                    "cfg_scale and negative_caption are for undistilled networks; a distilled one "
                    "has its guidance built in"
                )
            return 1.0
        cfg_scale = self.sampling.cfg_scale if cfg_scale is None else float(cfg_scale)
        if cfg_scale != 1 and negative is None:
            raise ValueError(
                f"cfg_scale = {cfg_scale} needs negative_caption (text or embeddings); pass it, or "
                f"cfg_scale=1"
            )
        return cfg_scale

    def _check_sampler(self, sample_type: str, state_dtype: str | None) -> None:
        if sample_type not in ("sde", "ode"):
            raise ValueError(f"sample_type must be sde or ode, got {sample_type!r}")
        if state_dtype is not None and state_dtype not in STATE_DTYPES:
            raise ValueError(
                f"state_dtype must be one of {', '.join(STATE_DTYPES)}, got {state_dtype!r}"
            )
        if not self.distilled and (sample_type == "ode" or state_dtype == "fp64"):
            raise ValueError(
                "sample_type and state_dtype are choices of distilled networks; an undistilled one "
                "has one sampler (DPM-Solver++ 2M), which works in fp32. Leave them out"
            )

    def _caption(self, name: str, caption: Caption, batch: int) -> Tensor:
        y = self.captions.embeddings(name, caption)
        if y.shape[0] not in (1, batch):
            raise ValueError(f"{name} must hold 1 or {batch} captions, got {y.shape[0]}")
        return aligned(y.to(self.device)).expand(batch, -1, -1)


def _one_by_one(rows: Iterable[Tensor], watch: Watch) -> Iterator[Tensor]:
    """(3, rows, W) in [-1, 1]; raises before the file is finished where they are not finite."""
    for band in rows:
        yield band[0].clamp_(-1, 1)
    watch.settle()


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError if `device` has no arithmetic of this precision."""
    reason = fp8.why_not(device) if precision == "fp8" else None
    if reason is not None:
        raise ValueError(
            f'precision = "fp8" cannot be used on {device}: {reason}; use precision="bf16"'
        )


def ready(net: PiDNet, precision: str) -> PiDNet:
    """Quantise and lay out the weights, in place, as a decoder of `precision` has them on their
    device."""
    if precision == "fp8":
        net.quantize_()
    return net.pack_() if net.device.type == "cuda" else net


def _shortest(sigma: Tensor) -> float | list[float]:
    """The shortest decimals that give the same fp32 values: 0.2 and not 0.20000000298."""
    values = [float(str(v)) for v in sigma.cpu().numpy()]
    return values if len(set(values)) > 1 else values[0]


def _few(values: list[float]) -> str:
    """Of a long list the beginning."""
    return str(values) if len(values) <= 8 else f"{str(values[:8])[:-1]}, ...]"


def _name(path: str | os.PathLike[str], loaded: LoadedCheckpoint) -> str:
    if loaded.variant is not None:
        return loaded.variant.checkpoint
    return str(path) if str(path) == "demo" else Path(path).name


__all__ = [
    "DecodeOutput",
    "Interrupted",
    "LicenceNotice",
    "PiDDecoder",
    "StepInfo",
    "TileInfo",
    "load_caption",
]
