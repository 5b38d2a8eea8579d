"""L2P in tiles: predictions blended in every step."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from test_pipeline import NEGATIVE, Y, generate
from tiny_l2p import config, draw, network

from pixeldiff import cli
from pixeldiff.errors import SizeError
from pixeldiff.models.l2p import VARIANTS, L2PPipeline
from pixeldiff.models.l2p.sampler import guided
from pixeldiff.models.l2p.scheduler import schedule
from pixeldiff.models.l2p.tiling import tile_layout
from pixeldiff.models.steps import Interrupted, TileInfo
from pixeldiff.picture_files import read_picture_metadata

TILES = {"height": 80, "width": 112, "tile": (48, 64), "overlap": 16}


@pytest.fixture(scope="module")
def net():
    return network(config())


@pytest.fixture
def pipe(net):
    return L2PPipeline(net)


def spans(size: int, tile: int, overlap: int = 16) -> list[tuple[slice, torch.Tensor]]:
    """Two tiles that fade in the middle of what they share."""
    second, length = size - tile, overlap // 4
    first_pixel = (second + tile) // 2 - length // 2
    fade = torch.sin((torch.arange(length) + 0.5) / length * torch.pi / 2) ** 2
    right = torch.zeros(size)
    right[first_pixel : first_pixel + length] = (fade * 2048).round() / 2048
    right[first_pixel + length :] = 1
    parts = slice(0, tile), slice(second, size)
    return [(part, w[part]) for part, w in zip(parts, (1 - right, right), strict=True)]


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_it_blends_the_predictions_of_every_step(pipe, net, scale):
    plan = schedule(2)
    negative = [NEGATIVE] if scale != 1 else None
    predict = guided(net, [Y], negative, (48, 64), guidance_scale=scale, times=plan.times)
    x = torch.randn((1, 3, 80, 112), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        for i, (sigma, after) in enumerate(itertools.pairwise(plan.sigmas)):
            u = torch.zeros_like(x)
            for (r, down), (c, across) in itertools.product(spans(80, 48), spans(112, 64)):
                crop = predict(x[:, :, r, c].contiguous(), plan.times[i])
                u[:, :, r, c] += down[:, None] * across * crop
            x = x + (sigma - after) * u
    given = {"guidance_scale": scale, **TILES}
    if negative:
        given["negative_prompt_embeds"] = NEGATIVE
    out = generate(pipe, **given)
    torch.testing.assert_close(out.images, x.clamp(-1, 1), rtol=0, atol=1e-5)
    assert (out.metadata["tile"], out.metadata["overlap"]) == ([48, 64], [16, 16])


def test_one_tile_is_the_image_in_one_piece(pipe):
    assert torch.equal(generate(pipe, tile=(48, 64)).images, generate(pipe).images)
    assert "tile" not in generate(pipe, tile=(32, 48)).metadata


def test_from_a_picture_and_in_batches(pipe):
    image = draw(1, 3, 80, 112).tanh()
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    given = {"image": image, "guidance_scale": 1, **TILES}
    both = generate(pipe, seed=None, generator=generators, num_images_per_prompt=2, **given)
    for i, seed in enumerate((3, 4)):
        one = generate(pipe, seed=seed, **given).images
        torch.testing.assert_close(both.images[i : i + 1], one, rtol=0, atol=1e-5)
    assert not torch.allclose(both.images[0], both.images[1])


def test_callbacks(pipe):
    told, seen = [], []
    image = generate(pipe, tile_callback=told.append, callback=seen.append, **TILES).images
    assert told == [TileInfo(s, 2, t, 4) for s in (1, 2) for t in range(1, 5)]
    assert torch.equal(seen[-1].x0.clamp(-1, 1), image)
    told.clear()
    generate(pipe, tile_callback=told.append)
    assert told == [TileInfo(s, 2, 1, 1) for s in (1, 2)]
    for given in (TILES, {}):
        with pytest.raises(Interrupted):
            generate(pipe, tile_callback=lambda info: False, **given)


def test_tiles_may_pass_what_the_rotary_tables_hold(net):
    """The image has more patches than positions; its tiles do not."""
    small = network(dataclasses.replace(config(), axes_lens=(64, 4, 4)))
    one = L2PPipeline(small)
    with pytest.raises(SizeError, match="at most 64"):
        generate(one, height=80, width=64)
    assert generate(one, height=80, width=64, tile=(48, 64)).images.shape == (1, 3, 80, 64)
    with pytest.raises(SizeError, match="at most 64"):
        generate(one, height=160, width=64, tile=(80, 64))


def test_auto_is_the_variants_own_size():
    four = VARIANTS["4k"]
    assert tile_layout(four.config, four, (4096, 4096), "auto", None) is None
    found = tile_layout(four.config, four, (8192, 4096), "auto", None)
    assert (found.tile, found.overlap) == ((4096, 4096), (512, 0))
    assert found.starts == ((0, 2048, 4096), (0,))
    ten = VARIANTS["10k"]
    found = tile_layout(ten.config, ten, (12800, 10240), "auto", None)
    assert found.tile_pixels == (10240, 10240)
    assert all(start % 320 == 0 for start in found.starts[0])


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"tile": "auto"}, ValueError, "'auto' is for released networks"),
        ({"tile": "half"}, ValueError, "None, 'auto' or"),
        ({"tile": (48, 50)}, SizeError, "multiples of 16 pixels.*nearest: h 48, w 48 or 64"),
        ({"overlap": 8}, SizeError, "0 to 16 pixels, a third of the tile, in multiples of 16"),
        ({"tile": None}, ValueError, "overlap is of tiles"),
        ({"height": 81}, SizeError, "multiples of 16"),
    ],
)
def test_refusals(pipe, monkeypatch, changes, error, words):
    monkeypatch.setattr(pipe.net, "prepare", None)
    with pytest.raises(error, match=words):
        generate(pipe, **{**TILES, **changes})


def test_generate_in_tiles(tmp_path):
    """The demo beyond its own size, from the command line."""
    out = tmp_path / "out.png"
    command = ["generate", "a red circle on a blue background", "--model", "demo", "-o", out]
    command += [
        "--size",
        "128x192",
        "--tile",
        "128x128",
        "--steps",
        2,
        "--device",
        "cpu",
        "--quiet",
    ]
    result = CliRunner().invoke(cli.main, [str(a) for a in command])
    assert result.exit_code == 0, result.output
    assert np.asarray(Image.open(out)).shape == (128, 192, 3)
    found = read_picture_metadata(out)
    assert (found["tile"], found["overlap"]) == ([128, 128], [0, 16])
