"""The pixel stream band by band, so that nothing 256 times as large as a patch is made for all.

What a PiT block does to a patch's pixels needs that patch alone; only its attention, over one token
a patch, sees the others. So each half of a block runs over bands of the picture, the whole pixel
stream exists once, and not before the first block has ended: that block embeds its pixels twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor

from .mmdit_block import Rope
from .pit_block import PiTBlock


@dataclass(frozen=True)
class Band:
    """Whole rows of patches of one image of the batch.

    Args:
        image: its index in the batch.
        rows: pixel rows of the picture.
        tokens: patches of the image.
        patches: the same, counted through the whole batch.
    """

    image: int
    rows: slice
    tokens: slice
    patches: slice


def check_chunk(pixel_chunk: int | None) -> int | None:
    """Patches at a time, or None for all.

    Raises:
        ValueError: neither None nor an integer >= 1.
    """
    if pixel_chunk is None:
        return None
    if isinstance(pixel_chunk, bool) or not isinstance(pixel_chunk, int) or pixel_chunk < 1:
        raise ValueError(
            f"pixel_chunk must be None or a number of patches >= 1, got {pixel_chunk!r}; "
            f"4096 is a good one"
        )
    return pixel_chunk


def bands_of(batch: int, grid: tuple[int, int], patch: int, most: int) -> list[Band]:
    """Bands of at most `most` patches, but of one row of patches at least, as equal as may be."""
    height, width = grid
    count = -(-height // max(1, most // width))
    edges = [height * i // count for i in range(count + 1)]
    found = []
    for image in range(batch):
        first = image * height * width
        for top, end in itertools.pairwise(edges):
            tokens = slice(top * width, end * width)
            patches = slice(first + tokens.start, first + tokens.stop)
            found.append(Band(image, slice(top * patch, end * patch), tokens, patches))
    return found


def pixel_stream(
    blocks: Iterable[PiTBlock],
    embed: Callable[[Band], Tensor],
    u: Tensor,
    rope: Rope,
    parts: list[Band],
    depth: int,
) -> Iterator[tuple[Band, Tensor]]:
    """What the last block makes of each band, (n, P*P, p), one after the other.

    Args:
        blocks: `depth` PiT blocks; the next is asked for when the one before has ended.
        embed: the pixel stream of a band before the first block.
        u: (B*N, D), conditioning of each patch.
        rope: tables of an image's patches, (N, d/2) each.
        parts: all bands of the batch.
    """
    q = None  # (B*N, P*P, p), of which a band is read and then written over

    def before(band: Band) -> Tensor:
        return embed(band) if q is None else q[band.patches]

    for k, block in enumerate(blocks):
        o = _attended(block, before, u, rope, parts)

        def after(band: Band, block: PiTBlock = block, o: Tensor = o) -> Tensor:
            returned = block.attn.proj(o[band.image, band.tokens])
            return block.returned(before(band), u[band.patches], returned)

        if k == depth - 1:
            for band in parts:
                yield band, after(band)
        else:
            q = _each(after, parts, q, len(u))
        del o, after  # the next block's attention needs the room


def _each(
    after: Callable[[Band], Tensor], parts: list[Band], q: Tensor | None, patches: int
) -> Tensor:
    """The whole stream of its bands, in the memory of q where there is one."""
    for band in parts:
        own = after(band)
        if q is None:
            q = own.new_empty((patches, *own.shape[1:]))
        q[band.patches] = own
        del own
    return q


def _attended(
    block: PiTBlock,
    before: Callable[[Band], Tensor],
    u: Tensor,
    rope: Rope,
    parts: list[Band],
) -> Tensor:
    """(B, N, A), the attention's result before its last projection."""
    batch, tokens = parts[-1].image + 1, parts[-1].tokens.stop
    joint = None
    for band in parts:
        table = tuple(t[band.tokens] for t in rope)
        qkv = block.attn.joint_qkv(block.compressed(before(band), u[band.patches], 1), table)
        if joint is None:
            joint = qkv.new_empty((3, batch, tokens, *qkv.shape[3:]))
        joint[:, band.image, band.tokens] = qkv[:, 0]
        del qkv
    return block.attn.attended(joint)
