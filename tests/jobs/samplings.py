"""Small decodes and pictures that keep their work, one of each kind of sampler."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS), str(TESTS / "models" / "l2p")]

from tiny_l2p import captions, config, network  # noqa: E402
from tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net  # noqa: E402

from pixeldiff.models.l2p import L2PNet, L2PPipeline  # noqa: E402
from pixeldiff.models.pid import PiDNet  # noqa: E402
from pixeldiff.models.pid.captions import CaptionSource  # noqa: E402
from pixeldiff.models.pid.decoder import PiDDecoder  # noqa: E402
from pixeldiff.models.pid.variants import SamplingSettings  # noqa: E402

TEACHER = SamplingSettings(steps=4, times=None, stochastic=False, cfg_scale=2.5, shift=3.0)
FOUR_TILES = {"tile": (4, 6), "overlap": 1}


def _decoder(sampling: SamplingSettings | None = None) -> PiDDecoder:
    captions = CaptionSource(CONFIG.txt_embed_dim, null_caption=tiny_caption())
    return PiDDecoder(tiny_net(), captions=captions, sampling=sampling)


def _decode(decoder: PiDDecoder, options: dict) -> Tensor:
    latent = tiny_latent(options.pop("batch", 1), 7, 9)
    return decoder.decode(latent, **{"seed": 0, "output": "pt", **options}).images


def sync(**options) -> Tensor:
    return _decode(_decoder(), {**FOUR_TILES, **options})


def independent(**options) -> Tensor:
    options = {**FOUR_TILES, "tile_mode": "independent", **options}
    return _decode(_decoder(), options)


def teacher(**options) -> Tensor:
    negative = {"negative_caption": tiny_caption(seed=3)}
    return _decode(_decoder(TEACHER), {**FOUR_TILES, **negative, **options})


def whole(**options) -> Tensor:
    """In one piece, a batch of two with generators of their own."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    return _decode(_decoder(), {"batch": 2, "seed": None, "generator": generators, **options})


def whole_teacher(**options) -> Tensor:
    negative = {"negative_caption": tiny_caption(seed=3)}
    return _decode(_decoder(TEACHER), {**negative, **options})


def _generate(options: dict) -> Tensor:
    prompt, negative = captions(5, 9)
    given = {"prompt_embeds": prompt, "negative_prompt_embeds": negative, "guidance_scale": 2.5}
    given |= {"height": 80, "width": 112, "num_inference_steps": 3, "seed": 3}
    return L2PPipeline(network(config()))(**{**given, "output_type": "pt", **options}).images


def l2p(**options) -> Tensor:
    return _generate({"tile": (48, 64), "overlap": 16, **options})


def l2p_whole(**options) -> Tensor:
    return _generate(options)


SAMPLINGS: dict[str, Callable[..., Tensor]] = {
    f.__name__: f for f in (sync, independent, teacher, whole, whole_teacher, l2p, l2p_whole)
}


class Calls:
    """Counts the calls of networks while it is a context."""

    METHODS = ((PiDNet, "step"), (PiDNet, "student_step"), (L2PNet, "step"))

    def __enter__(self) -> Calls:
        self.count = 0
        self._before = [(kind, name, getattr(kind, name)) for kind, name in self.METHODS]
        for kind, name, method in self._before:
            setattr(kind, name, self._counted(method))
        return self

    def __exit__(self, *_: object) -> None:
        for kind, name, method in self._before:
            setattr(kind, name, method)

    def _counted(self, method: Callable) -> Callable:
        def counted(*args, **options):
            self.count += 1
            return method(*args, **options)

        return counted
