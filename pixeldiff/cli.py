"""`pixeldiff`: decode latents, describe this machine, bake captions, verify golden files.

Exit codes: 0 done; 1 it failed or a verification missed; 2 wrong usage, or a file that `verify`
does not understand; 130 interrupted.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import click
from rich.console import Console

from . import __version__

_out = Console(highlight=False, soft_wrap=True)
_err = Console(stderr=True, highlight=False, soft_wrap=True)


def _clean_errors(f: Callable) -> Callable:
    """What a user can cause becomes one message on stderr and exit code 1, without a traceback."""

    @functools.wraps(f)
    def run(*args, **kwargs):
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _show_warning
                return f(*args, **kwargs)
        except (ValueError, TypeError, OSError, NotImplementedError, ImportError) as e:
            _err.print(f"error: {e}", style="red", markup=False)
            sys.exit(1)
        except MemoryError:
            _err.print("error: out of memory; decode a smaller size", style="red")
            sys.exit(1)
        except KeyboardInterrupt:
            _err.print("interrupted; nothing was written")
            sys.exit(130)

    return run


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    if issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning):
        _err.print(f"note: {message}", style="yellow", markup=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="pixeldiff")
def main() -> None:
    """Kernels for pixel-space diffusion, and the PiD latent decoder."""


def _size(_ctx, _param, value: str | None) -> tuple[int, int] | None:
    if value is None:
        return None
    try:
        height, width = (int(v) for v in value.lower().split("x"))
    except ValueError:
        raise click.BadParameter(f"must be HEIGHTxWIDTH, like 1024x768, got {value!r}") from None
    return height, width


@main.command()
@click.argument("source", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="PNG to write")
@click.option("--model", default="demo", show_default=True, help="checkpoint, hub id, or demo")
@click.option("--backbone", help="generator of the latent, where the checkpoint fits several")
@click.option("--caption", help="text; loads the model's text encoder")
@click.option("--caption-file", type=click.Path(path_type=Path), help="embeddings of bake-caption")
@click.option("--text-encoder", help="folder or hub id of the Gemma-2 used for --caption")
@click.option("--sigma", default=0.0, show_default=True, help="noise level of the latent, 0..1")
@click.option("--steps", type=int, help="network calls; 1..4 for distilled models")
@click.option("--seed", default=0, show_default=True)
@click.option("--size", callback=_size, help="HEIGHTxWIDTH; default: the latent's size, scaled")
@click.option("--device", help="cuda, cpu, ...; default: cuda where there is one")
@click.option("--precision", type=click.Choice(["fp32", "bf16"]), help="default: bf16 on CUDA")
@click.option("--quiet", is_flag=True, help="no progress bar")
@_clean_errors
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
    seed: int,
    size: tuple[int, int] | None,
    device: str | None,
    precision: str | None,
    quiet: bool,
) -> None:
    """Decode SOURCE to a PNG.

    SOURCE is a .safetensors file with one latent tensor (B, C, h, w) or (C, h, w), normalised as
    the generator's diffusion model sees it; or, with the demo model, a picture, which is encoded
    first. Several latents are written to OUTPUT with -0, -1, ... before the suffix.
    """
    from .images import check_png_path
    from .models.pid.decoder import PiDDecoder
    from .sources import latent_from

    check_png_path(output)
    if caption is not None and caption_file is not None:
        raise click.UsageError("--caption and --caption-file exclude each other")
    latent = latent_from(source, encoder="demo" if model == "demo" else None)
    decoder = PiDDecoder.from_pretrained(
        model,
        backbone=backbone,
        device=device,
        precision=precision,
        null_caption=caption_file,
        text_encoder=text_encoder,
    )
    with _progress(quiet) as callback:
        result = decoder.decode(
            latent,
            caption=caption,
            sigma=sigma,
            steps=steps,
            seed=seed,
            size=size,
            callback=callback,
        )
    for path in _write(result, output):
        _out.print(str(path), markup=False)


def _write(result, output: Path) -> list[Path]:
    from .images import save_png

    if len(result.images) == 1:
        return [save_png(output, result.images[0], result.metadata)]
    return [
        save_png(
            output.with_stem(f"{output.stem}-{i}"), image, {**result.metadata, "batch_index": i}
        )
        for i, image in enumerate(result.images)
    ]


class _progress:
    """Progress bar on stderr as a decoder callback."""

    def __init__(self, quiet: bool) -> None:
        from rich.progress import Progress, TimeElapsedColumn

        columns = (*Progress.get_default_columns(), TimeElapsedColumn())
        self._bar = Progress(*columns, console=_err, disable=quiet, transient=True)

    def __enter__(self):
        self._bar.start()
        task = self._bar.add_task("decoding", total=None)

        def callback(info) -> None:
            self._bar.update(task, completed=info.step, total=info.steps)

        return callback

    def __exit__(self, *exc) -> None:
        self._bar.stop()


@main.command()
@_clean_errors
def info() -> None:
    """Show versions, devices, the native build, and which backend runs each op here, and why."""
    from .info import render

    render(_out)


@main.command("bake-caption")
@click.argument("text", nargs=-1)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".safetensors")
@click.option(
    "--encoder",
    default="google/gemma-2-2b-it",
    show_default=True,
    help="folder or hub id of a Gemma-2, or demo",
)
@click.option("--prefix-file", type=click.Path(path_type=Path), help="instruction prefix as text")
@click.option("--device", default="cpu", show_default=True)
@_clean_errors
def bake_caption(
    text: tuple[str, ...], output: Path, encoder: str, prefix_file: Path | None, device: str
) -> None:
    """Write the embeddings of TEXT... (none: of the empty caption) to a file.

    With that file a picture is decoded without any text encoder: decode --caption-file.
    """
    from . import text as captions

    if encoder == "demo":
        from .text.tiny import TinyTextEmbedder

        source = TinyTextEmbedder()
    else:
        prefix = captions.instruction_prefix(prefix_file)
        source = captions.GemmaCaptionEncoder.from_pretrained(encoder, device=device, prefix=prefix)
    result = captions.bake_caption(output, list(text) or None, source)
    _out.print(f"{output}: {tuple(result.embedding.shape)}", markup=False)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--all", "show_all", is_flag=True, help="print every tensor, not only the outputs")
def verify(files: tuple[Path, ...], show_all: bool) -> None:
    """Run golden FILES through the installed package and print each tensor's error.

    Exits 1 if any error exceeds its tolerance, 2 if a file is not understood.
    """
    from rich.table import Table

    from .verify import NotUnderstood, verify_file

    missed, unknown = 0, 0
    for path in files:
        try:
            report = verify_file(path)
        except NotUnderstood as e:
            _err.print(f"{path}: {e}", style="yellow", markup=False)
            unknown += 1
            continue
        rows = [r for r in report.rows if show_all or not r.ok or r.key.startswith("out.")]
        table = Table("tensor", "error", "tolerance", "", title=report.name, title_justify="left")
        for r in rows:
            style = None if r.ok else "red"
            bound = f"{r.tolerance:.1e}" + ("" if r.unit == "abs" else f" {r.unit}")
            table.add_row(r.key, f"{r.error:.1e}", bound, "ok" if r.ok else "MISS", style=style)
        _out.print(table)
        bad = sum(not r.ok for r in report.rows)
        missed += bad
        _out.print(f"{report.name}: {len(report.rows) - bad} of {len(report.rows)} tensors ok\n")
    _out.print(
        f"{len(files) - unknown} files run, {missed} tensors missed, {unknown} files not understood"
    )
    sys.exit(2 if unknown else 1 if missed else 0)


if __name__ == "__main__":
    main()
