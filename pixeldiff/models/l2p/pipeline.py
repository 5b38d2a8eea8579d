"""L2PPipeline: from a prompt to an image, or from an image to another."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ... import __version__, images
from ...errors import CheckpointFormatError
from ...finite import check_finite
from ...jobs import JobStore, Stages, resumable
from ...jobs.identity import digest_of, machine
from ...json_text import loads
from ...ops.registry import forced_backend
from ...text import CaptionFile
from ...text.qwen3 import EMBED_DIM, QWEN3
from ..devices import PRECISIONS, check_device, no_autocast
from ..graphs import Graphs, graph_limit, settings
from ..guards import Watch
from ..in_memory import in_memory
from ..noise import noise_source
from ..offload import apply as apply_offload
from ..offload import check_offload
from ..provenance import describe, forced_backends
from ..steps import Callback, Interrupted, TileCallback, with_tile_callback
from .bands import DECODER_MEMORY
from .checkpoint import LoadedCheckpoint, net_from, read_checkpoint
from .config import L2PConfig, Variant
from .graphs import Trajectory
from .network import L2PNet
from .prompts import DEMO, Embeddings, PromptSource
from .sampler import Steps, guided, sample, start
from .scheduler import SHIFT, schedule
from .sizes import check_size
from .tiling import TiledPrediction, Tiling, tile_layout

if TYPE_CHECKING:
    from ...memory import Estimate, Plan

Prompt = str | Sequence[str] | None
StepEnd = Callable[["L2PPipeline", int, float, dict[str, Tensor]], dict[str, Tensor] | bool | None]


@dataclass(frozen=True)
class Sampling:
    """Steps, guidance and shift that a network is sampled with where a caller says nothing."""

    steps: int
    guidance_scale: float
    shift: float = SHIFT


SAMPLING = {"1k": Sampling(30, 2.0), **dict.fromkeys(("4k", "8k", "10k"), Sampling(50, 4.0))}
UNKNOWN = Sampling(8, 1.0)


@dataclass(frozen=True)
class GenerateOutput:
    """Images and how they were made.

    `images` is what `output_type` asked for: a list of Pillow images, a (B, 3, H, W) fp32 tensor in
    [-1, 1], or a (B, H, W, 3) fp32 array in [0, 1]. `metadata` is JSON-able and names everything
    that decides the pixels.
    """

    images: list[Image.Image] | Tensor | np.ndarray
    metadata: dict[str, Any]


class L2PPipeline:
    """Text to image in pixels (L2P, arXiv 2605.12013).

        pipe = L2PPipeline.from_pretrained("l2p-1k.safetensors")
        image = pipe("a red fox", seed=0).images[0]

    Args:
        net: a pixel network, on its device, in its dtype.
        prompts: where embeddings of texts come from; by default only embeddings are accepted.
        variant: the released network this is, or None.
        sampling: used where a call says nothing; default: the variant's, else 8 steps unguided.
        name: recorded in the metadata of images.
        cuda_graphs: how many kinds of image (size, batch, padded caption length, guidance or not)
            to keep their step of as a CUDA graph, True for 2; False or 0 for none. Same pixels,
            less work for the host, which shows where images are small. The second image of its
            kind is captured, with any prompt, schedule and guidance scale. Only a network whose
            parameters require no gradients, on CUDA. Memory is kept: that of the largest step once,
            and two images each; `release_graphs` frees it.
        offload: "blocks" takes the blocks' weights off the device, see `L2PNet.offload_`: the same
            pixels, 11.6 of 12.3 GB less at released size in bf16. CUDA graphs are off with it, and
            threads take turns. Not undone. On the CPU only for weights in a mapped file.
    """

    def __init__(
        self,
        net: L2PNet,
        *,
        prompts: PromptSource | None = None,
        variant: Variant | None = None,
        sampling: Sampling | None = None,
        name: str = "custom",
        cuda_graphs: bool | int = True,
        offload: str | bool = False,
    ) -> None:
        if net.config.local_decoder is None:
            raise ValueError(
                "L2PPipeline: this network is the latent model that L2P was converted from, it "
                "makes latents and no pixels; use pixeldiff.models.l2p.L2PNet directly"
            )
        self.net = net.eval()
        self.prompts = prompts or PromptSource(net.config.cap_feat_dim)
        self.variant = variant
        self.sampling = sampling or SAMPLING.get(variant.name if variant else "", UNKNOWN)
        self.name = name
        limit = graph_limit(cuda_graphs)
        self.graphs: Graphs[Steps] = Graphs(0 if apply_offload(net, offload) else limit)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        device: torch.device | str | None = None,
        precision: str | None = None,
        text_encoder: Any = None,
        config: L2PConfig | None = None,
        sampling: Sampling | None = None,
        cuda_graphs: bool | int = True,
        offload: str | bool = False,
    ) -> L2PPipeline:
        """Read a checkpoint.

        Args:
            path: a .safetensors, .pth or .pt file, a folder with one, a hub id, or "demo" (the
                small network that comes with the package, with its own text encoder).
            device: default "cuda" where there is one, else "cpu".
            precision: "fp32" or "bf16", the dtype the weights are held and multiplied in. Default
                bf16 on CUDA, fp32 elsewhere.
            text_encoder: folder or hub id of a Qwen3, "demo", or an object with `encode(list of
                str)`. It is not loaded before a text is given. Default "Qwen/Qwen3-4B", 8 GB, or
                "demo" where the file says so.
            config: as for `read_checkpoint`.
            sampling: see the class; default also what the file's metadata "sampling" says.
            cuda_graphs: see the class.
            offload: see the class. On CUDA the blocks never are on the device together; on the CPU
                they stay in the file, where that is a .safetensors file or a .pth file of PyTorch's
                zip format (on Linux), and are read and converted as they are needed.

        Raises:
            CheckpointError: what is wrong with the file (see `pixeldiff.errors`); nothing stays
                loaded. ValueError: precision or device. TypeError: text_encoder.
        """
        device = check_device(device)
        graph_limit(cuda_graphs)
        if precision is None:
            precision = "bf16" if device.type == "cuda" else "fp32"
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        away, dtype = check_offload(offload), PRECISIONS[precision]
        loaded = read_checkpoint(
            path,
            config=config,
            dtype=None if away else dtype,
            device="cpu" if away else device,
        )
        embed_dim = loaded.config.cap_feat_dim
        if text_encoder is None:
            if loaded.info.metadata.get("text_encoder") == DEMO:
                text_encoder = DEMO
            elif embed_dim == EMBED_DIM:
                text_encoder = QWEN3
        sampling = sampling or _stated_sampling(loaded)
        prompts = PromptSource(embed_dim, text_encoder=text_encoder, device=device)
        net = net_from(loaded)
        loaded.state_dict.clear()  # the network owns its weights
        if away:
            net.offload_(device=device, dtype=dtype)
        elif device.type == "cuda":
            net.pack_()
        name = f"L2P {loaded.variant.name}" if loaded.variant else Path(path).name
        return cls(
            net,
            prompts=prompts,
            variant=loaded.variant,
            sampling=sampling,
            name=name,
            cuda_graphs=cuda_graphs,
            offload=offload,
        )

    @property
    def device(self) -> torch.device:
        return self.net.device

    @property
    def precision(self) -> str:
        """ "fp32" or "bf16"."""
        return next((k for k, v in PRECISIONS.items() if v == self.net.dtype), str(self.net.dtype))

    def encode_prompt(self, prompt: str | Sequence[str]) -> list[Tensor]:
        """B embeddings (T_b, E) of B texts. Loads the text encoder if it is not loaded."""
        return self.prompts.encode("prompt", prompt)

    def release_text_encoder(self) -> None:
        """Free the text encoder's memory. It is loaded again if a text is given again."""
        self.prompts.release()

    def release_graphs(self) -> None:
        """Free the memory of captured CUDA graphs. Waits for an image that is using one."""
        self.graphs.release()

    def estimate_memory(
        self, size: int | tuple[int, int], *, device: str | None = None, **options: Any
    ) -> Estimate:
        """What an image of `size` (pixels, (H, W) or of a square's side) would take; see
        `pixeldiff.memory.estimate_l2p`, whose options it takes. `device` "cuda" or "cpu" is the
        pipeline's own where nothing is said; nothing is run on it."""
        from ...memory import estimate_l2p

        given = {**self._memory_options(), **({} if device is None else {"device": device})}
        return estimate_l2p(self.variant or self.net.config, size, **{**given, **options})

    def memory_question(
        self, args: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[Any, tuple[int, int], dict[str, Any], bool]:
        """What a call with these arguments asks of `pixeldiff.memory.plan`: network, size, what is
        fixed, and whether tiles may be chosen."""
        prompts = (*args, options.get("prompt"), options.get("negative_prompt"))
        image, tile = self._image(options.get("image")), options.get("tile")
        sides = (options.get("height"), options.get("width"))
        size, asked = self._size(*sides, image, whole=False), self._memory_options()
        embeds = options.get("prompt_embeds")
        copies = options.get("num_images_per_prompt", 1)
        asked["batch"] = copies * _count(prompts[0] or options.get("prompt"), embeds)
        asked["guided"] = self._guidance(options.get("guidance_scale")) != 1
        asked["steps"] = options.get("num_inference_steps") or self.sampling.steps
        asked["text_encoder"] = self.prompts.keeps_encoder(*prompts)
        asked["output"] = options.get("output_type", "pil")
        wanted = ("callback", "callback_on_step_end")
        asked["previews"] = any(options.get(name) is not None for name in wanted)
        if not options.get("guidance_together", True):
            asked["guidance_together"] = False
        if options.get("decoder_memory", DECODER_MEMORY) != DECODER_MEMORY:
            asked["decoder_memory"] = options["decoder_memory"]
        if tile is not None:
            asked |= {"tile": tile, "overlap": options.get("overlap")}
        free = tile is None and options.get("resume") is None
        return self.variant or self.net.config, size, asked, free

    def _memory_options(self) -> dict[str, Any]:
        kind = self.device.type
        if kind not in ("cpu", "cuda"):
            raise ValueError(f"memory is estimated for cpu and cuda, this pipeline is on {kind}")
        return {
            "device": kind,
            "precision": self.precision,
            "backend": forced_backend("*"),
            "text_encoder": self.prompts.keeps_encoder(),
            "cuda_graphs": False,
            "offload": "blocks" if self.net.offload is not None else False,
        }

    def release_memory(self) -> None:
        """Free what is kept from image to image: CUDA graphs, and buffers of weights that visit the
        device. All are made again when they are needed."""
        self.graphs.release()
        if self.net.offload is not None:
            self.net.offload.release()

    @resumable
    @in_memory
    def __call__(
        self,
        prompt: Prompt = None,
        negative_prompt: Prompt = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        prompt_embeds: Embeddings | None = None,
        negative_prompt_embeds: Embeddings | None = None,
        image: Image.Image | Tensor | None = None,
        strength: float = 0.6,
        strength_rule: str = "rescale",
        shift: float | None = None,
        time_dtype: str = "fp32",
        guidance_together: bool = True,
        decoder_memory: int | None = DECODER_MEMORY,
        tile: Tiling = None,
        overlap: int | None = None,
        callback: Callback | None = None,
        callback_on_step_end: StepEnd | None = None,
        tile_callback: TileCallback | None = None,
        output_type: str = "pil",
        memory: str | int | Plan | None = None,
        resume: str | os.PathLike[str] | JobStore | None = None,
        debug: bool = False,
    ) -> GenerateOutput:
        """Make images. Arguments are named as those of diffusers' ZImagePipeline.

        Args:
            prompt: text(s); loads the text encoder. Or give prompt_embeds.
            negative_prompt: text(s), one for all prompts or one each; "" where a prompt text is
                given and nothing else. Not used without guidance.
            height, width: of the image; default: those of `image`, else the variant's own.
            num_inference_steps: n >= 1.
            guidance_scale: g of v_neg + g (v_pos - v_neg); 1 is none and halves the work. The
                number that ZImagePipeline takes is g - 1.
            num_images_per_prompt: images of each prompt, next to each other in the result.
            seed: of the pipeline's own generator on the network's device; None draws one and
                reports it. PyTorch's global generators are neither read nor advanced.
            generator: instead of seed: one for the batch, or one for each image, so that an image
                does not depend on its batch. Its seed is reported if it is fresh.
            prompt_embeds, negative_prompt_embeds: embeddings (T, E), a list of them, one a prompt,
                (B, T, E), or a `CaptionFile`. The text encoder is not loaded for them. The
                negative prompt in a `CaptionFile` counts where no other is given.
            image: to start from: a picture, or (1 or B, 3, H, W) in [-1, 1].
            strength: in (0, 1], how much of `image` to give up; 1 is all of it.
            strength_rule, shift, time_dtype: as for `schedule`.
            guidance_together: both branches of guidance as one batch, or one after the other with
                less memory; the images are equal up to rounding.
            decoder_memory: bytes that the local decoder may hold beside its result; beyond them it
                runs tile by tile, equal up to rounding. None is whole.
            tile: denoise in tiles: (h, w) in pixels; "auto", squares of the variant's own size; or
                None, in one piece. They are blended after every network call. For sizes beyond the
                network's own, and less memory; other pixels than in one piece: positions are a
                tile's own, no tile attends to another, and each is given the whole prompt, so that
                from noise alone a picture may show its subject more than once. Start from `image`
                to keep a composition. Always without CUDA graphs.
            overlap: of tiles, in pixels, at most a third of a tile; default an eighth. They
                fade into each other over a quarter of it.
            callback: told after each step (`StepInfo`); returning False stops.
            callback_on_step_end: called as (pipeline, step, timestep, {"latents": x, "x0": x0})
                after each step, x the state (B, 3, H, W) in pixels; returning a dict with "latents"
                goes on from those, returning False stops.
            tile_callback: told after each tile of each step (`TileInfo`); returning False stops.
            output_type: "pil", "pt" or "np"; see `GenerateOutput`.
            memory: what the image may take on its device, weights and all: bytes, text like "16GB",
                or a `pixeldiff.memory.Plan`. The fastest way that fits is chosen: guidance apart, a
                smaller `decoder_memory`, and, where `tile` was left None, tiles, which change the
                picture (a `MemoryWarning` and the metadata say so). On a CPU it is counted above
                what the process had before it loaded the network. Always without CUDA graphs.
                Where memory runs out, with or without a budget, the image is made once more in the
                next cheaper way, with a `MemoryWarning`; without a budget, or with `tile` given,
                only in a way with the same pixels. Not with `resume`.
            resume: a folder that keeps finished tiles and steps, so that a process killed at any
                moment costs one of them: the same call goes on there, to the same pixels. Removed
                at the end; a `pixeldiff.jobs.JobStore` lasts until its own block does. Where it
                holds a job begun without a seed, None is that job's seed. Not with
                callback_on_step_end, which may change the pixels in ways that cannot be compared.
            debug: check what every operation makes, to name the layer where NaN or infinity comes
                from; the same pixels, slower, without CUDA graphs.

        Returns:
            Images and metadata. Nothing else that shows is kept or changed, so a pipeline may be
            used from several threads at once; CUDA graphs serve one of them at a time.

        Raises:
            ValueError, TypeError: an argument the network cannot take; checked before any work.
            SizeError: height or width; names the nearest legal sizes.
            BudgetError: no way fits `memory`; names the smallest budget that would do.
            Interrupted: a callback returned False. What a callback raises passes through.
            ResumeError: `resume` holds another job, or another process is at it.
            NonFiniteError, an ArithmeticError: the network returned NaN or infinity; says in which
                step, and with `debug` which layer made it.
        """
        images.check_output(output_type)
        way = {} if memory is None else memory.settings
        tile = way.get("tile", tile)
        guidance_together = way.get("guidance_together", guidance_together)
        decoder_memory = way.get("decoder_memory", decoder_memory)
        image = self._image(image)
        size = self._size(height, width, image, whole=tile is None)
        layout = tile_layout(self.net.config, self.variant, size, tile, overlap)
        if layout is None:
            callback = with_tile_callback(callback, tile_callback)
        steps = self.sampling.steps if num_inference_steps is None else num_inference_steps
        shift = self.sampling.shift if shift is None else shift
        plan = schedule(
            steps,
            shift=shift,
            strength=1.0 if image is None else strength,
            strength_rule=strength_rule,
            time_dtype=time_dtype,
        )
        scale = self._guidance(guidance_scale)
        copies = num_images_per_prompt
        if isinstance(copies, bool) or not isinstance(copies, int) or copies < 1:
            raise ValueError(f"num_images_per_prompt must be an integer >= 1, got {copies!r}")
        no_negative = negative_prompt is None and negative_prompt_embeds is None
        if no_negative and isinstance(prompt_embeds, CaptionFile):
            negative_prompt_embeds = prompt_embeds.negative
        self._check_texts(prompt, negative_prompt, prompt_embeds, negative_prompt_embeds, scale)
        batch = copies * _count(prompt, prompt_embeds)
        if image is not None and image.shape[0] not in (1, batch):
            raise ValueError(f"image must hold 1 or {batch} images, got {image.shape[0]}")
        if resume is not None and callback_on_step_end is not None:
            raise ValueError(
                "resume and callback_on_step_end exclude each other: what the callback changes is "
                "not known to the run that goes on; use callback to be told of the steps"
            )
        if resume is not None and generator is None:
            seed = resume.seed(seed)
        draw, seed = noise_source(seed, generator, batch, self.device)
        positive = self._embeddings("prompt", prompt, prompt_embeds)
        negative = None
        if scale != 1:
            if negative_prompt is None and negative_prompt_embeds is None:
                negative_prompt = ""
            negative = self._embeddings("negative_prompt", negative_prompt, negative_prompt_embeds)
            if len(negative) not in (1, len(positive)):
                raise ValueError(
                    f"negative_prompt must hold 1 or {len(positive)} prompts, got {len(negative)}"
                )
            if len(negative) == 1:
                negative = negative * len(positive)
        if resume is not None:
            resume.begin(
                {
                    "job": "L2P picture",
                    "pixeldiff": __version__,
                    **machine(self.device),
                    "arithmetic": settings(),
                    "precision": self.precision,
                    "weights": resume.weights(self.net),
                    "prompt": digest_of(*positive),
                    "negative prompt": None if negative is None else digest_of(*negative),
                    "images of each prompt": copies,
                    "image": digest_of(image),
                    "seed": seed,
                    "rng": draw.kind,
                    "noise": digest_of(*draw.states()),
                    "size": size,
                    "sigmas": plan.sigmas,
                    "times": plan.times,
                    "guidance_scale": scale,
                    "guidance_together": guidance_together,
                    "decoder_memory": decoder_memory,
                    "tile": None if layout is None else [layout.tile, layout.overlap],
                }
            )
            if layout is not None:
                kept = len(layout.tiles) * math.prod(layout.tile_pixels) + 2 * math.prod(size)
                resume.check_space(kept * batch * self.net.config.in_channels * 4)
        stages = Stages(resume, draw, self.device)
        watch = Watch(self.net, self.precision, debug=debug)
        callback, tile_callback = watch.around(callback), watch.around(tile_callback)
        callback_on_step_end = watch.around(callback_on_step_end)
        with torch.no_grad(), no_autocast(self.device), watch:
            prediction = guided(
                self.net,
                _repeated(positive, copies),
                None if negative is None else _repeated(negative, copies),
                size if layout is None else layout.tile_pixels,
                guidance_scale=scale,
                times=plan.times,
                together=guidance_together,
                decoder_memory=decoder_memory,
            )
            shape = (batch, self.net.config.in_channels, *size)
            if layout is None:
                graphs = self.graphs if memory is None else Graphs(0)
                steps_run = graphs.run(self.net, Trajectory(prediction, shape))
            else:
                tiled = TiledPrediction(
                    prediction, layout, plan.steps, stages, tile_callback, watch
                )
                steps_run = contextlib.nullcontext(Steps(tiled))
            with steps_run as running:
                result = sample(
                    running.predict,
                    stages.held("x", lambda: start(draw(shape), plan, image)),
                    plan,
                    callback=callback,
                    replace=callback_on_step_end and self._on(callback_on_step_end),
                    state=running.state,
                    stages=stages,
                    watch=watch,
                )
                # A picture may be as large as 1.3 GB: clamped where it lies, unless a graph or the
                # caller's callback holds it.
                ours = running.state is None and callback_on_step_end is None
                result = result.clamp_(-1, 1) if ours else result.clamp(-1, 1)
        metadata = {
            "model": self.name,
            "pixeldiff": __version__,
            "steps": steps,
            "sampler": "euler",
            "shift": shift,
            "guidance_scale": scale,
            "seed": seed,
            "rng": draw.kind,
            "prompt": _described(prompt, prompt_embeds),
            "precision": self.precision,
            "size": list(size),
        }
        if scale != 1:
            metadata["negative_prompt"] = _described(negative_prompt, negative_prompt_embeds)
            metadata["guidance_together"] = guidance_together
        if decoder_memory != DECODER_MEMORY:
            metadata["decoder_memory"] = decoder_memory
        if layout is not None:
            metadata["tile"], metadata["overlap"] = list(layout.tile), list(layout.overlap)
        if memory is not None:
            metadata["memory"] = memory.metadata
        if time_dtype != "fp32":
            metadata["time_dtype"] = time_dtype
        if image is not None:
            data = image.cpu().contiguous().numpy()
            metadata["image"] = f"pixels, sha256 {hashlib.sha256(data).hexdigest()}"
            metadata["strength"] = strength
            metadata["strength_rule"] = strength_rule
        if forced := forced_backends():
            metadata["backend"] = forced
        return GenerateOutput(images.convert(result, output_type, rounded=True), metadata)

    def _on(self, step_end: StepEnd) -> Callable[[int, float, Tensor, Tensor], Tensor]:
        def replace(step: int, timestep: float, x: Tensor, x0: Tensor) -> Tensor:
            told = step_end(self, step, timestep, {"latents": x, "x0": x0})
            if told is False:
                raise Interrupted(f"stopped by the callback after step {step + 1}")
            other = told.get("latents", x) if isinstance(told, dict) else x
            if not isinstance(other, Tensor) or other.shape != x.shape:
                got = tuple(other.shape) if isinstance(other, Tensor) else type(other).__name__
                raise ValueError(
                    f"callback_on_step_end: latents must be {tuple(x.shape)} as given, got {got}"
                )
            return other.to(x)

        return replace

    def _size(
        self, height: Any, width: Any, image: Tensor | None, *, whole: bool = True
    ) -> tuple[int, int]:
        own = (None, None) if self.variant is None else (self.variant.native_size,) * 2
        if image is not None:
            own = tuple(image.shape[-2:])
        size = tuple(o if v is None else v for v, o in zip((height, width), own, strict=True))
        if None in size:
            raise ValueError(
                "height and width are needed for a network that was never released; pass both"
            )
        if whole:
            check_size(self.net.config, size)
        if image is not None and size != own:
            raise ValueError(
                f"image must be of the size asked for, {size} (H, W), got {own}; resize it first"
            )
        return size

    def _guidance(self, scale: float | None) -> float:
        scale = self.sampling.guidance_scale if scale is None else scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 <= scale < 1e4:
            raise ValueError(f"guidance_scale must be a number >= 0, got {scale!r}; 1 is none")
        return float(scale)

    def _check_texts(
        self, prompt: Prompt, negative: Prompt, embeds: Any, negative_embeds: Any, scale: float
    ) -> None:
        for name, text, given in (
            ("prompt", prompt, embeds),
            ("negative_prompt", negative, negative_embeds),
        ):
            if text is not None and given is not None:
                raise ValueError(f"{name} and {name}_embeds exclude each other; pass one")
        if prompt is None and embeds is None:
            raise ValueError("prompt or prompt_embeds must be given")
        # It would load 8 GB for an empty text, which a caller with embeddings did not ask for.
        if scale != 1 and prompt is None and negative is None and negative_embeds is None:
            raise ValueError(
                f"guidance_scale = {scale} needs the negative prompt too: pass "
                f'negative_prompt_embeds, or negative_prompt="" to encode the empty text, or '
                f"guidance_scale=1"
            )

    def _embeddings(self, name: str, text: Prompt, given: Embeddings | None) -> list[Tensor]:
        if given is not None:
            return self.prompts.checked(f"{name}_embeds", given)
        return self.prompts.encode(name, text)

    def _image(self, image: Image.Image | Tensor | None) -> Tensor | None:
        if image is None:
            return None
        if isinstance(image, Image.Image):
            return images.from_pil(image).to(self.device)
        channels = self.net.config.in_channels
        if not isinstance(image, Tensor) or not image.is_floating_point():
            kind = image.dtype if isinstance(image, Tensor) else type(image).__name__
            raise TypeError(f"image must be a Pillow image or a floating-point tensor, got {kind}")
        if image.dim() != 4 or image.shape[1] != channels or 0 in image.shape:
            raise ValueError(f"image must be (B, {channels}, H, W), got {tuple(image.shape)}")
        check_finite("image", image)
        if not bool((image.abs() <= 1).all()):
            raise ValueError("image must be in [-1, 1], got values outside")
        return image.detach().to(self.device, torch.float32)


def _stated_sampling(loaded: LoadedCheckpoint) -> Sampling | None:
    """What a file says it is sampled with: metadata "sampling", JSON of `Sampling`'s fields."""
    stated = loaded.info.metadata.get("sampling")
    if stated is None:
        return None
    try:
        return Sampling(**loads(stated))
    except (ValueError, TypeError) as error:
        raise CheckpointFormatError(
            f"L2PPipeline: metadata 'sampling' of {loaded.info.path} must be JSON with steps, "
            f"guidance_scale and, if not 3, shift: {error}"
        ) from error


def _count(prompt: Prompt, embeds: Embeddings | None) -> int:
    given = prompt if embeds is None else embeds
    if isinstance(given, CaptionFile):
        given = given.embedding
    if isinstance(given, str) or (isinstance(given, Tensor) and given.dim() == 2):
        return 1
    try:
        return len(given)
    except TypeError:
        return 1  # refused where it is read, with a better message


def _repeated(captions: list[Tensor], copies: int) -> list[Tensor]:
    return [y for y in captions for _ in range(copies)]


def _described(text: Prompt, embeds: Embeddings | None) -> str | list[str] | None:
    if isinstance(embeds, list | tuple):
        each = [describe(y) for y in embeds]
        return each[0] if len(each) == 1 else each
    return describe(text if embeds is None else embeds)
