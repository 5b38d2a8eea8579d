"""Going on where the blocks' weights are off the device, or the pixel blocks run in chunks."""

from __future__ import annotations

import pytest
import torch
from samplings import Calls
from tiny_pid import save_net, tiny_caption, tiny_latent, tiny_net

from pixeldiff.errors import ResumeError
from pixeldiff.models.pid.decoder import PiDDecoder
from pixeldiff.models.steps import Interrupted


def test_weights_that_are_away_are_the_same_weights(tmp_path):
    folder = tmp_path / "job"
    path = save_net(tmp_path / "pid.safetensors", tiny_net())
    given = {"seed": 0, "output": "pt", "tile": (4, 6), "overlap": 1}

    def decoder(**options):
        return PiDDecoder.from_pretrained(
            path, device="cpu", null_caption=tiny_caption(), **options
        )

    latent = tiny_latent(1, 7, 9)
    expected = decoder().decode(latent, **given).images
    told = []
    with pytest.raises(Interrupted):
        decoder(offload="blocks").decode(
            latent, resume=folder, tile_callback=lambda i: told.append(i) or len(told) < 6, **given
        )
    other = decoder(pixel_chunk=4)
    with pytest.raises(ResumeError, match=r"differs in pixel_chunk \(none there, 4 here\)"):
        other.decode(latent, resume=folder, **given)
    with Calls() as calls:
        assert torch.equal(decoder().decode(latent, resume=folder, **given).images, expected)
    assert calls.count == 16 - 6
