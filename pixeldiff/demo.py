"""The demo: a picture through the demo autoencoder, then its latent through PiD at 4x."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click
import torch
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import interpolate

from .cli import clean_errors, progress_bar
from .images import convert, from_pil, to_rgb
from .models.pid.decoder import PiDDecoder
from .picture_files import check_picture_path, save_pictures
from .sources import demo_asset, demo_autoencoder, read_picture

SCALE = 4
CELL = 32  # output pixels of one latent cell: factor 8, scale 4


@click.command()
@click.option(
    "--image", type=click.Path(path_type=Path), help="any picture; default: a shipped one"
)
@click.option(
    "--pixels",
    type=click.IntRange(64, 4096),
    default=1024,
    show_default=True,
    help="square root of the output's area",
)
@click.option("--out", default="out", show_default=True, type=click.Path(path_type=Path))
@click.option("--seed", default=0, show_default=True)
@clean_errors
def main(image: Path | None, pixels: int, out: Path, seed: int) -> None:
    """Encode a picture to a latent, decode it 4x with PiD, and compare."""
    console = Console(highlight=False, soft_wrap=True)
    path = image or demo_asset("picture.png")
    target, low = prepare(read_picture(path), pixels)
    out.mkdir(parents=True, exist_ok=True)
    names = [check_picture_path(out / f"{path.stem}-{kind}.png") for kind in ("pid", "compare")]

    autoencoder = demo_autoencoder()
    decoder = PiDDecoder.from_pretrained("demo")
    with torch.no_grad():
        latent = autoencoder.encode(low)
        size = (low.shape[2] * SCALE, low.shape[3] * SCALE)
        bicubic = interpolate(autoencoder.decode(latent), size=size, mode="bicubic").clamp(-1, 1)
    start = time.perf_counter()
    with progress_bar(quiet=False) as callback:
        result = decoder.decode(latent, seed=seed, output="pt", callback=callback)
    seconds = time.perf_counter() - start

    decoded = result.images.cpu()
    picture, sheet = convert(decoded, "pil")[0], compare(target, bicubic, decoded)
    save_pictures([(names[0], picture, result.metadata), (names[1], sheet, None)])
    console.print(
        f"{path.name}: {low.shape[3]}x{low.shape[2]} -> latent {tuple(latent.shape)} -> "
        f"{size[1]}x{size[0]} in {seconds:.1f} s, {result.metadata['steps']} steps, "
        f"{result.metadata['precision']}, peak memory {peak_memory()}",
        markup=False,
    )
    if target is not None:
        console.print(_table(target, bicubic, decoded))
    else:
        console.print("the picture is smaller than the output: nothing to measure against")
    for name in names:
        console.print(str(name), markup=False)


def prepare(image: Image.Image, pixels: int) -> tuple[Tensor | None, Tensor]:
    """(the picture at output size or None, the same at a quarter of it), both (1, 3, H, W).

    A picture of at least the output's area is scaled down to it and cropped to whole latent cells;
    a smaller one is itself the low-resolution picture.
    """
    image = to_rgb(image)
    area = (image.width * image.height) ** 0.5
    enough = area >= pixels
    goal = pixels if enough else min(area, pixels / SCALE)
    cell = CELL if enough else CELL // SCALE
    ratio = min(1.0, goal / area)
    width, height = (max(cell, round(side * ratio / cell) * cell) for side in image.size)
    # Cover the goal, then crop: the picture is never stretched.
    cover = max(width / image.width, height / image.height)
    scaled = tuple(
        max(side, round(full * cover))
        for side, full in zip((width, height), image.size, strict=True)
    )
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    image = image.crop((left, top, left + width, top + height))
    if not enough:
        return None, from_pil(image)
    target = from_pil(image)
    low = interpolate(target, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    return target, low.clamp(-1, 1)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], peak to peak 2."""
    return (10 * torch.log10(4 / (a - b).square().mean())).item()


def ssim(a: Tensor, b: Tensor) -> float | None:
    """Structural similarity, Gaussian window as published; None without scikit-image."""
    try:
        from skimage.metrics import structural_similarity
    except ImportError:
        return None
    x, y = (((t[0] + 1) / 2).permute(1, 2, 0).numpy() for t in (a, b))
    return float(
        structural_similarity(
            x, y, channel_axis=2, data_range=1, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )
    )  # fmt: skip


def _table(target: Tensor, bicubic: Tensor, decoded: Tensor) -> Table:
    table = Table("4x decode", "PSNR dB", "SSIM", title="against the original picture")
    for name, image in (("autoencoder + bicubic", bicubic), ("PiD", decoded)):
        similarity = ssim(target, image)
        text = "-" if similarity is None else f"{similarity:.4f}"
        table.add_row(name, f"{psnr(target, image):.2f}", text)
    return table


def compare(target: Tensor | None, bicubic: Tensor, decoded: Tensor) -> Image.Image:
    """Columns autoencoder + bicubic, PiD and the original; below each, its centre at 2x."""
    named = [("autoencoder + bicubic", bicubic), ("PiD, 4 steps", decoded)]
    if target is not None:
        named.append(("original", target))
    side, label = 512, 24
    sheet = Image.new("RGB", (side * len(named), 2 * side + label), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (name, tensor) in enumerate(named):
        image = convert(tensor, "pil")[0]
        draw.text((i * side + 8, 6), name, fill="black")
        whole = image.copy()
        whole.thumbnail((side, side), Image.Resampling.LANCZOS)
        sheet.paste(whole, (i * side, label))
        crop = min(side // 2, *image.size)
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        detail = image.crop((left, top, left + crop, top + crop))
        detail = detail.resize((side, side), Image.Resampling.NEAREST)
        sheet.paste(detail, (i * side, label + side))
    return sheet


def peak_memory() -> str:
    """Peak resident memory of this process, or of the CUDA allocator where it was used."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.2f} GiB (CUDA)"
    try:
        import resource
    except ImportError:
        return "unknown"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GiB"


if __name__ == "__main__":
    main()
