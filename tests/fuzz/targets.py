"""What is fuzzed: readers of files, the good files they start from, and how they may refuse."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiny_l2p
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from tiny_pid import CONFIG, tiny_caption, tiny_latent

from pixeldiff.errors import CheckpointError
from pixeldiff.models.autoencoder import AutoencoderConfig, ConvAutoencoder
from pixeldiff.models.l2p import checkpoint as l2p_checkpoint
from pixeldiff.models.l2p.merging import merge
from pixeldiff.models.pid import PiDNet, read_checkpoint
from pixeldiff.picture_files import read_picture_metadata, save_picture
from pixeldiff.sources import latent_from, read_picture
from pixeldiff.text import load_caption, save_captions

LONGEST = 20_000  # characters of a message


@dataclass(frozen=True)
class Target:
    """A reader of files.

    Args:
        seeds: good files to begin with.
        suffixes: what a file may be called.
        read: takes the path; returns or raises one of `refusals`, nothing else.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    suffixes: tuple[str, ...]
    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...] = (CheckpointError,)

    def check(self, path: Path) -> bool:
        """Whether the file was taken. AssertionError, or whatever else came: a fault."""
        told = None
        try:
            self.read(path)
        except self.refusals as error:
            told = str(error)
        assert told != "", "a refusal says nothing"
        assert len(told or "") < LONGEST, "a refusal without end"
        return told is None


@functools.cache
def _pid_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    net = PiDNet(dataclasses.replace(CONFIG, patch_depth=1))
    return {k: v.detach().clone().bfloat16() for k, v in net.state_dict().items()}


def _pid_metadata() -> dict[str, str]:
    config = dataclasses.replace(CONFIG, patch_depth=1)
    return {"config": json.dumps(config.to_dict()), "backbone": "demo"}


@functools.cache
def _pid_files() -> list[bytes]:
    return [
        save(_pid_state(), _pid_metadata()),
        save({"net." + k: v for k, v in _pid_state().items()}),
    ]


def _pickled(value: object, **options) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, **options)
    return out.getvalue()


@functools.cache
def _pid_pickles() -> list[bytes]:
    state = {"net." + k: v for k, v in _pid_state().items()}
    some = dict(list(state.items())[:4])
    old = {"_use_new_zipfile_serialization": False}
    return [_pickled(some), _pickled({"model": state, "step": 3}), _pickled(some, **old)]


def _read_pid(path: Path) -> object:
    return read_checkpoint(path, config=dataclasses.replace(CONFIG, patch_depth=1))


@functools.cache
def _l2p_state() -> dict[str, torch.Tensor]:
    net = tiny_l2p.network(_l2p_config())
    return {k: v.contiguous().bfloat16() for k, v in net.state_dict().items()}


@functools.cache
def _l2p_config():
    return tiny_l2p.config(n_layers=1, dim=24, axes_dims=(4, 4, 4))


@functools.cache
def _l2p_files() -> list[bytes]:
    return [save(_l2p_state(), {"config": json.dumps(_l2p_config().to_dict())})]


@functools.cache
def _deltas() -> list[bytes]:
    state = {k: v for k, v in _l2p_state().items() if "local_decoder" in k}
    return [save(state), save(state, {"config": json.dumps(_l2p_config().to_dict())})]


@functools.cache
def _base() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="pixeldiff-fuzz-"))
    path = folder / "base.safetensors"
    path.write_bytes(_l2p_files()[0])
    return path


def _merge(path: Path) -> object:
    out = path.with_name("merged.safetensors")
    try:
        return merge(_base(), path, out, overwrite=True)
    finally:
        out.unlink(missing_ok=True)


@functools.cache
def _captions() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "y.safetensors"
        y = tiny_caption()
        save_captions(path, y, "a", family="Qwen3", negative=(y, "b"), prefix_sha256="0" * 64)
        return [path.read_bytes(), save({"y": y})]


@functools.cache
def _caption_pickles() -> list[bytes]:
    y = tiny_caption()
    old = {"_use_new_zipfile_serialization": False}
    return [_pickled(y), _pickled({"y": y, "text": ["a"]}), _pickled(y, **old)]


@functools.cache
def _latents() -> list[bytes]:
    return [save({"latent": tiny_latent()}), save({"latent": tiny_latent(), "x": torch.ones(2)})]


@functools.cache
def _autoencoders() -> list[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        torch.manual_seed(0)
        ConvAutoencoder(AutoencoderConfig()).save(path)
        return [path.read_bytes()]


@functools.cache
def _pictures() -> list[bytes]:
    rng, files = np.random.default_rng(0), []
    rgb = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
    info = PngInfo()
    info.add_text("pixeldiff", json.dumps({"seed": 1, "size": [9, 7], "deep": [[[]]]}))
    info.add_text("pixeldiff", "x" * 200, zip=True)

    def add(image: Image.Image, kind: str, **options) -> None:
        out = io.BytesIO()
        image.save(out, kind, **options)
        files.append(out.getvalue())

    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, '{"pixeldiff": {"seed": 1}}'
    add(rgb, "PNG", pnginfo=info)
    add(rgb, "JPEG", exif=exif)
    add(rgb, "TIFF", description='{"pixeldiff": {"seed": 1}}')
    add(rgb.convert("P"), "PNG", transparency=3)
    add(rgb.convert("LA"), "PNG")
    add(rgb.convert("CMYK"), "JPEG")
    add(Image.fromarray(rng.integers(0, 65536, (9, 7)).astype(np.uint16)), "PNG")
    add(rgb, "GIF", save_all=True, append_images=[rgb.rotate(90)])
    add(rgb, "WEBP", exif=exif)
    add(rgb, "BMP")
    return files


@functools.cache
def _written() -> list[bytes]:
    files = []
    with tempfile.TemporaryDirectory() as folder:
        for suffix in (".png", ".jpg", ".tif"):
            path = Path(folder) / f"a{suffix}"
            save_picture(path, torch.zeros(3, 9, 7), {"seed": 3, "caption": "é", "size": [9, 7]})
            files.append(path.read_bytes())
    return [*files, *_pictures()[:3]]


def _read_metadata(path: Path) -> None:
    found = read_picture_metadata(path)
    assert found is None or isinstance(found, dict), f"not a dict: {type(found)}"


BAD_CAPTION = (ValueError, TypeError)
SAFE, PICKLED = (".safetensors",), (".pth", ".pt")
TARGETS = {
    t.name: t
    for t in (
        Target("pid-safetensors", _pid_files, SAFE, _read_pid),
        Target("pid-pickles", _pid_pickles, PICKLED, _read_pid),
        Target("l2p-safetensors", _l2p_files, SAFE, l2p_checkpoint.read_checkpoint),
        Target("deltas", _deltas, SAFE, _merge),
        Target("captions", _captions, SAFE, load_caption, BAD_CAPTION),
        Target(
            "caption-pickles",
            _caption_pickles,
            (".pt", ".bin"),
            load_caption,
            BAD_CAPTION,
        ),
        Target("latents", _latents, SAFE, lambda p: latent_from(p, encoder=None), (ValueError,)),
        Target(
            "pictures", _pictures, (".png", ".jpg"), lambda p: read_picture(p).load(), (ValueError,)
        ),
        Target("metadata", _written, (".png",), _read_metadata, (ValueError, OSError)),
        Target("autoencoders", _autoencoders, SAFE, ConvAutoencoder.load, (ValueError,)),
    )
}
