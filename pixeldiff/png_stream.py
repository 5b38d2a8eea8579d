"""A PNG written by libvips: what is held are bands of rows, not the picture.

Pillow's encoder wants the whole picture, four bytes a pixel. libvips does not, but it fetches its
pixels and takes none that are handed to it. So they pass through a file, a TIFF without
compression, 3 bytes a pixel on the disk for as long as the writing lasts. (Of raw pixels, the other
form that libvips reads row by row, all that was read stays mapped: 780 MB of 805 MB.)

At zlib's level 6 a decode of 4096 x 4096 takes 18.7 MB; Pillow makes 18.9 of it, and pypng, which
has none of the filters, 32.5. What is held does not grow with the height: docs/resume.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np

from . import tiff_stream
from .row_bands import checked

LEVEL = 6  # zlib's own choice
OLDEST = (8, 15)  # libvips: it can leave EXIF out
_PER_MM = 72 / 25.4  # libvips always says a density; this is what readers take for none


def why_not() -> str | None:
    """Why no PNG can be written here row by row, or None."""
    try:
        import pyvips
        import tifffile  # noqa: F401

        if pyvips.at_least_libvips(*OLDEST):
            return None
        error = f"this libvips is {pyvips.version(0)}.{pyvips.version(1)}"
    except (ImportError, OSError) as e:  # OSError: pyvips without a libvips
        error = str(e)
    return (
        f"writing a PNG row by row needs pyvips, libvips {'.'.join(map(str, OLDEST))} and tifffile "
        f"({error}); install the extra pixeldiff[png], or write a .tif"
    )


def write_png(
    file: BinaryIO,
    size: tuple[int, int],
    bands: Iterable[np.ndarray],
    texts: dict[str, str],
    *,
    scratch: Path,
) -> None:
    """Write an 8-bit RGB picture.

    Args:
        file: open for writing.
        size: (H, W).
        bands: (rows, W, 3) uint8 from top to bottom, H rows in all, all with the same number of
            rows, except that the last may have fewer.
        texts: text entries, in ASCII.
        scratch: a file that does not exist, for 3 bytes a pixel; it is made and removed.

    Raises:
        ValueError: other rows than `size` says. ImportError: no libvips. OSError: libvips failed.
        What `bands` and `file` raise passes through; the file is then incomplete.
    """
    reason = why_not()
    if reason is not None:
        raise ImportError(f"write_png: {reason}")
    try:
        with scratch.open("wb") as pixels:
            rows = checked("write_png", size, bands)
            tiff_stream.write_tiff(pixels, size, rows, None, compressed=False)
        output = _Output(file)
        # On a thread of its own: libvips would keep an interruption waiting until it is done.
        with ThreadPoolExecutor(1, thread_name_prefix="pixeldiff-png") as thread:
            writing = thread.submit(_convert, scratch, texts, output)
            try:
                writing.result()
            except BaseException as error:
                output.error = output.error or error
                raise
    finally:
        scratch.unlink(missing_ok=True)


class _Output:
    """Where libvips writes. It knows no exceptions: one is kept, and libvips told to stop."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: BaseException | None = None

    def write(self, data: bytes) -> int:
        if self.error is not None:
            return -1
        try:
            self._file.write(data)
        except BaseException as error:
            self.error = error
            return -1
        return len(data)


def _convert(source: Path, texts: dict[str, str], output: _Output) -> None:
    import pyvips

    try:
        picture = pyvips.Image.new_from_file(str(source), access="sequential", fail_on="truncated")
        picture = picture.copy(xres=_PER_MM, yres=_PER_MM)
        for number, (key, text) in enumerate(texts.items()):
            picture.set_type(pyvips.GValue.gstr_type, f"png-comment-{number}-{key}", text)
        target = pyvips.TargetCustom()
        target.on_write(output.write)
        picture.write_to_target(target, ".png", compression=LEVEL, filter="all", keep="other")
    except pyvips.Error as error:
        if output.error is not None:
            raise output.error from None
        raise OSError(f"write_png: libvips failed: {error}") from error
    if output.error is not None:
        raise output.error
