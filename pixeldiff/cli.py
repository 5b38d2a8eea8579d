"""`pixeldiff`: decode latents, generate pictures, show this machine, bake captions, verify goldens.

Exit codes: 0 done; 1 it failed or a verification missed; 2 wrong usage, or a file that `verify`
does not understand (even if others missed); 130 interrupted.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import __version__
from .cli_bake import bake_caption
from .cli_errors import clean_errors
from .cli_jobs import finish, is_finished, kept_picture, kept_work, resume_option
from .cli_l2p import l2p
from .cli_options import caption_option, keep_within, out, parsed_size, parsed_tile, progress_bar
from .cli_plan import plan
from .cli_verify import verify

if TYPE_CHECKING:
    from .jobs import JobStore

_OUTPUT = "picture to write: .png, .jpg or .tif"
_WHOLE = 16384 * 16384  # pixels: 3.2 GB in fp32, and sync tiles hold several such images


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pixeldiff")
def main() -> None:
    """Kernels for pixel-space diffusion, the PiD latent decoder, and L2P pictures from text."""


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=_OUTPUT)
@click.option("--model", default="demo", show_default=True, help="checkpoint, hub id, or demo")
@click.option("--backbone", help="generator of the latent, where the checkpoint fits several")
@click.option("--caption", help="text; loads the model's text encoder")
@click.option("--caption-file", type=click.Path(path_type=Path), help="embeddings of bake-caption")
@click.option("--text-encoder", help="folder or hub id of the Gemma-2 used for texts")
@click.option("--sigma", default=0.0, show_default=True, help="noise level of the latent, 0..1")
@click.option("--steps", type=int, help="network calls; 1..4 for distilled models")
@click.option("--cfg-scale", type=float, help="guidance of undistilled models; 1 is none")
@click.option("--negative-caption", help="text, for guidance")
@click.option(
    "--negative-caption-file", type=click.Path(path_type=Path), help="embeddings, for guidance"
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--size", callback=parsed_size, help="HEIGHTxWIDTH; default: the latent's size, scaled"
)
@click.option("--device", help="cuda, cpu, ...; default: cuda where there is one")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16", "fp8"]),
    help="default: bf16 on CUDA; fp8: e4m3 products, capability 8.9 (docs/precision.md)",
)
@click.option("--low-memory", is_flag=True, help="half the activations, about 1% slower")
@click.option("--pixel-chunk", type=click.IntRange(1), help="patches at a time; default: all")
@click.option("--offload", is_flag=True, help="weights visit the device block by block")
@click.option(
    "--tile", callback=parsed_tile, help="decode in tiles: auto, or HEIGHTxWIDTH in latent cells"
)
@click.option("--overlap", type=int, help="of tiles, in latent cells; default: an eighth")
@click.option(
    "--tile-mode",
    type=click.Choice(["sync", "independent"]),
    help="default: sync; above 16384 x 16384 pixels independent, written as it is decoded",
)
@resume_option
@click.option("--debug", is_flag=True, help="name the layer that NaN comes from; slower")
@click.option("--memory", help="what it may take, like 4GB; may choose tiles (pixeldiff plan)")
@click.option("--quiet", is_flag=True, help="no progress bar")
@clean_errors
def decode(
    source: Path,
    output: Path,
    model: str,
    backbone: str | None,
    caption: str | None,
    caption_file: Path | None,
    text_encoder: str | None,
    sigma: float,
    steps: int | None,
    cfg_scale: float | None,
    negative_caption: str | None,
    negative_caption_file: Path | None,
    seed: int,
    size: tuple[int, int] | None,
    device: str | None,
    precision: str | None,
    low_memory: bool,
    pixel_chunk: int | None,
    offload: bool,
    tile: tuple[int, int] | str | None,
    overlap: int | None,
    tile_mode: str | None,
    resume: bool,
    debug: bool,
    memory: str | None,
    quiet: bool,
) -> None:
    """Decode SOURCE to a PNG, JPEG or TIFF.

    SOURCE is a .safetensors file with one latent tensor (B, C, h, w) or (C, h, w), normalised as
    the generator's diffusion model sees it; or, with the demo model, a picture, which is encoded
    first. Several latents are written to OUTPUT with -0, -1, ... before the suffix.
    """
    from .models.pid.captions import FAMILY
    from .models.pid.decoder import PiDDecoder
    from .models.pid.sizes import output_size
    from .picture_files import check_picture_path, save_pictures
    from .sources import latent_from

    text = caption_option("--caption", caption, "--caption-file", caption_file, FAMILY)
    negative = caption_option(
        *("--negative-caption", negative_caption),
        *("--negative-caption-file", negative_caption_file, FAMILY),
    )
    check_picture_path(output, size)
    keep_within(memory)
    latent = latent_from(source, encoder="demo" if model == "demo" else None)
    paths = _output_paths(output, latent.shape[0])
    for path in paths:
        check_picture_path(path)
    with kept_work(output, resume) as store:
        decoder = PiDDecoder.from_pretrained(
            model,
            backbone=backbone,
            device=device,
            precision=precision,
            text_encoder=text_encoder,
            low_memory=low_memory,
            pixel_chunk=pixel_chunk,
            offload="blocks" if offload else False,
        )
        own_size = size or output_size(decoder.net.config, latent.shape[-2:])
        check_picture_path(output, own_size)
        if tile_mode is None:
            huge = tile is not None and own_size[0] * own_size[1] > _WHOLE
            tile_mode = "independent" if huge else "sync"
        rows = memory is not None or (tile is not None and tile_mode == "independent")
        streamed = rows and len(paths) == 1
        with progress_bar(quiet) as callback:
            result = decoder.decode(
                latent,
                caption=text,
                sigma=sigma,
                steps=steps,
                cfg_scale=cfg_scale,
                negative_caption=negative,
                seed=seed,
                size=size,
                tile=tile,
                overlap=overlap,
                tile_mode=tile_mode,
                tile_callback=callback,
                output=output if streamed else "pil",
                memory=memory,
                resume=store,
                debug=debug,
            )
        if streamed:
            out.print(str(output), markup=False)
            return
        metadata = [result.metadata]
        if len(paths) > 1:
            metadata = [{**result.metadata, "batch_index": i} for i in range(len(paths))]
        files = list(zip(paths, result.images, metadata, strict=True))
        for path in save_pictures(files, by_way_of=store and store.path):
            out.print(str(path), markup=False)


@main.command()
@click.argument("prompt", required=False)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=_OUTPUT)
@click.option("--prompts", type=click.Path(path_type=Path), help="file: a prompt a line, or .jsonl")
@click.option("--model", required=True, help="L2P checkpoint, hub id, or demo")
@click.option(
    "--prompt-embeds", type=click.Path(path_type=Path), help="of bake-caption, for PROMPT"
)
@click.option("--negative-prompt", help='text, for guidance; default: the file\'s, or ""')
@click.option(
    "--negative-prompt-embeds", type=click.Path(path_type=Path), help="embeddings, for guidance"
)
@click.option("--text-encoder", help="folder or hub id of the Qwen3 for texts, or demo")
@click.option(
    "--size", callback=parsed_size, help="HEIGHTxWIDTH; default: the picture's, or the model's"
)
@click.option("--height", type=click.IntRange(1), help="pixels, instead of --size")
@click.option("--width", type=click.IntRange(1), help="pixels, instead of --size")
@click.option("--steps", type=int, help="network calls; default: the model's")
@click.option("--guidance", type=float, help="1 is none; default: the model's")
@click.option("--shift", type=float, help="of the schedule; default: 3")
@click.option("--image", type=click.Path(path_type=Path), help="picture to start from")
@click.option("--tile", callback=parsed_tile, help="in tiles: auto, or HEIGHTxWIDTH in pixels")
@click.option("--overlap", type=int, help="of tiles, in pixels; default: an eighth")
@click.option("--strength", default=0.6, show_default=True, help="how much of it to give up, 0..1")
@click.option("--seed", default=0, show_default=True)
@click.option("--device", help="cuda, cpu, ...; default: cuda where there is one")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="default: bf16 on CUDA")
@click.option("--offload", is_flag=True, help="weights visit the device block by block")
@resume_option
@click.option("--debug", is_flag=True, help="name the layer that NaN comes from; slower")
@click.option("--memory", help="what it may take, like 4GB; may choose tiles (pixeldiff plan)")
@click.option("--quiet", is_flag=True, help="no progress bar")
@clean_errors
def generate(
    prompt: str | None,
    output: Path,
    prompts: Path | None,
    model: str,
    prompt_embeds: Path | None,
    negative_prompt: str | None,
    negative_prompt_embeds: Path | None,
    text_encoder: str | None,
    size: tuple[int, int] | None,
    height: int | None,
    width: int | None,
    steps: int | None,
    guidance: float | None,
    shift: float | None,
    image: Path | None,
    tile: tuple[int, int] | str | None,
    overlap: int | None,
    strength: float,
    seed: int,
    device: str | None,
    precision: str | None,
    offload: bool,
    resume: bool,
    debug: bool,
    memory: str | None,
    quiet: bool,
) -> None:
    """Make a picture of PROMPT with an L2P model.

    With --image the picture is the start, resized to the size where that is given. OUTPUT's suffix
    decides between PNG, JPEG and TIFF.

    With --prompts there is a picture of each line, written to OUTPUT with -0, -1, ... before the
    suffix; the seed grows by one from line to line. Lines of a .jsonl file are objects with
    "prompt" and, if wanted, "seed" and "size". What is finished is remembered in OUTPUT.job until
    all are, so that --resume goes on behind it.

    The demo model draws one shape (circle, square, triangle, star, ring, cross, diamond, heart),
    small or large, on a plain, striped, checkered or dotted background, each of them red, orange,
    yellow, green, blue, purple, pink, white or black: "a red circle on a blue striped background".
    Other words are no error, but mean nothing to it.
    """
    from .jobs.identity import machine
    from .models.l2p import L2PPipeline
    from .models.provenance import describe, forced_backends
    from .picture_files import check_picture_path, save_picture
    from .prompt_file import Request, read_prompts
    from .text import Qwen3PromptEncoder

    if sum(given is not None for given in (prompt, prompts, prompt_embeds)) != 1:
        raise click.UsageError("give one of PROMPT, --prompts and --prompt-embeds")
    if size is not None and (height, width) != (None, None):
        raise click.UsageError("give either --size or --height and --width")
    size = size or (height, width)
    family = Qwen3PromptEncoder.family
    given = caption_option("PROMPT", prompt, "--prompt-embeds", prompt_embeds, family)
    negative = caption_option(
        *("--negative-prompt", negative_prompt),
        *("--negative-prompt-embeds", negative_prompt_embeds, family),
    )
    keep_within(memory)
    requests, paths = [Request(prompt, seed, size)], [output]
    if prompts is not None:
        read = enumerate(read_prompts(prompts))
        requests = [r.or_else(seed=seed + i, size=size) for i, r in read]
        paths = [output.with_stem(f"{output.stem}-{i}") for i in range(len(requests))]
    for path, request in zip(paths, requests, strict=True):
        check_picture_path(path, None if None in request.size else request.size)
    pictures = {r.size: None if image is None else _picture(image, *r.size) for r in requests}
    for picture in pictures.values():
        if picture is not None:
            check_picture_path(output, picture.size[::-1])

    def make(request: Request, path: Path, kept: JobStore | None) -> None:
        with progress_bar(quiet, "generating") as callback:
            result = pipeline(
                request.prompt,
                negative_prompt,
                height=request.size[0],
                width=request.size[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
                seed=request.seed,
                prompt_embeds=given if prompt_embeds is not None else None,
                negative_prompt_embeds=negative if negative_prompt is None else None,
                image=pictures[request.size],
                strength=strength,
                shift=shift,
                tile=tile,
                overlap=overlap,
                tile_callback=callback,
                output_type="pt",
                memory=memory,
                resume=kept,
                debug=debug,
            )
        if len(result.images) > 1:
            raise ValueError(f"{prompt_embeds} must hold one prompt, got {len(result.images)}")
        through = store and store.path
        save_picture(path, result.images[0], result.metadata, rounded=True, by_way_of=through)

    with kept_work(output, resume, always=prompts is not None) as store:
        pipeline = L2PPipeline.from_pretrained(
            model,
            device=device,
            precision=precision,
            text_encoder=text_encoder,
            offload="blocks" if offload else False,
        )
        if prompts is not None:
            store.begin(
                {
                    "job": "prompts",
                    "pixeldiff": __version__,
                    **machine(pipeline.device),
                    "prompts": [[r.prompt, r.seed, r.size] for r in requests],
                    "weights": store.weights(pipeline.net),
                    "precision": pipeline.precision,
                    "text encoder": text_encoder,
                    "negative prompt": describe(negative),
                    "image": image and _sha256(image),
                    "strength": strength,
                    "steps": steps,
                    "guidance": guidance,
                    "shift": shift,
                    "tile": tile,
                    "overlap": overlap,
                    "memory": memory,  # may choose tiles
                    "backend": forced_backends(),
                }
            )
        for i, (path, request) in enumerate(zip(paths, requests, strict=True)):
            if prompts is None:
                make(request, path, store)
            elif not is_finished(store, i, path):
                with kept_picture(store, i, resume) as kept:
                    make(request, path, kept)
                    finish(store, i, path)
            out.print(str(path), markup=False)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _picture(path: Path, height: int | None, width: int | None):
    from PIL import Image

    from .sources import read_picture

    picture = read_picture(path)
    size = (width or picture.width, height or picture.height)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def _output_paths(output: Path, count: int) -> list[Path]:
    if count == 1:
        return [output]
    return [output.with_stem(f"{output.stem}-{i}") for i in range(count)]


@main.command()
@clean_errors
def info() -> None:
    """Show versions, devices, the native build, and which backend runs each op here, and why."""
    from .info import render

    render(out)


for command in (bake_caption, l2p, plan, verify):
    main.add_command(command)

if __name__ == "__main__":
    main()
