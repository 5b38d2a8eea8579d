"""`pixeldiff bake-caption`: texts to embeddings in a file, once."""

from __future__ import annotations

from pathlib import Path

import click

from .cli_errors import clean_errors
from .cli_options import out


@click.command("bake-caption")
@click.argument("text", nargs=-1)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help=".safetensors")
@click.option(
    "--for",
    "model",
    type=click.Choice(["pid", "l2p"]),
    default="pid",
    show_default=True,
    help="the model that will take them",
)
@click.option(
    "--encoder",
    help="folder or hub id of a Gemma-2 (l2p: of a Qwen3), or demo; default: the released one",
)
@click.option("--negative", help='l2p: negative prompt in the same file; default: ""')
@click.option("--prefix-file", type=click.Path(path_type=Path), help="pid: instruction prefix")
@click.option("--device", default="cpu", show_default=True)
@clean_errors
def bake_caption(
    text: tuple[str, ...],
    output: Path,
    model: str,
    encoder: str | None,
    negative: str | None,
    prefix_file: Path | None,
    device: str,
) -> None:
    """Write the embeddings of TEXT... (none: of the empty caption) to a file.

    With that file a picture is made without any text encoder: decode --caption-file, or, baked for
    l2p from one TEXT, generate --prompt-embeds, whose negative prompt the file then holds too.
    """
    from . import text as captions
    from .models.devices import check_device
    from .out_files import check_out_path
    from .text.gemma import GEMMA
    from .text.qwen3 import QWEN3

    if model == "pid" and negative is not None:
        raise click.UsageError("--negative is for l2p; bake a negative caption to its own file")
    if model == "l2p" and (prefix_file is not None or encoder == "demo"):
        raise click.UsageError("l2p has no instruction prefix and no demo encoder")
    if model == "l2p" and len(text) != 1:
        raise click.UsageError(f'a file for l2p holds one TEXT, got {len(text)}; "" is the empty')
    check_out_path(output, ".safetensors")
    if model == "l2p":
        source = captions.Qwen3PromptEncoder.from_pretrained(
            encoder or QWEN3, device=check_device(device)
        )
        negative = negative or ""
    elif encoder == "demo":
        from .text.tiny import TinyTextEmbedder

        source = TinyTextEmbedder()
    else:
        prefix = captions.instruction_prefix(prefix_file)
        source = captions.GemmaCaptionEncoder.from_pretrained(
            encoder or GEMMA, device=check_device(device), prefix=prefix
        )
    result = captions.bake_caption(output, list(text) or None, source, negative=negative)
    shapes = str(tuple(result.embedding.shape))
    if result.negative is not None:
        shapes += f", negative {tuple(result.negative.embedding.shape)}"
    out.print(f"{output}: {shapes}", markup=False)
