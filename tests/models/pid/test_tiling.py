"""Decoding in tiles: what the pixels are, what is told meanwhile, what is refused."""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from PIL import Image, ImageDraw
from tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net

from pixeldiff.errors import SizeError, UntrainedSizeWarning
from pixeldiff.images import from_pil, to_uint8
from pixeldiff.models.noise import NoiseSource
from pixeldiff.models.pid.captions import CaptionSource
from pixeldiff.models.pid.decoder import Interrupted, PiDDecoder, TileInfo
from pixeldiff.models.pid.samplers import sample_student, student_times
from pixeldiff.models.pid.tile_layout import tile_layout, trained_tile
from pixeldiff.models.pid.variants import SamplingSettings, variant, variants
from pixeldiff.models.tile_noise import SquareNoise
from pixeldiff.sources import demo_asset, demo_autoencoder, read_picture

CELL = CONFIG.pixels_per_latent_cell
LATENT = (7, 9)
TILE = (4, 6)  # two by two of them, which share 1 and 3 cells
TEACHER = SamplingSettings(steps=2, times=None, stochastic=False, cfg_scale=2.5, shift=3.0)
modes = pytest.mark.parametrize("mode", ["sync", "independent"])


@pytest.fixture(scope="module")
def net():
    return tiny_net()


@pytest.fixture
def decoder(net):
    return PiDDecoder(
        net, captions=CaptionSource(CONFIG.txt_embed_dim, null_caption=tiny_caption())
    )


@pytest.fixture
def teacher(net):
    captions = CaptionSource(CONFIG.txt_embed_dim, null_caption=tiny_caption())
    return PiDDecoder(net, captions=captions, sampling=TEACHER)


def pixels(decoder, latent=None, **options):
    options = {"seed": 0, "tile": TILE, "overlap": 1, "output": "pt", **options}
    return decoder.decode(tiny_latent(1, *LATENT) if latent is None else latent, **options).images


def windows(size: int, tile: int) -> list[tuple[slice, slice, torch.Tensor]]:
    """(cells, pixels, weights) of two tiles that fade over a quarter of a cell, in the middle of
    what they share."""
    second, length = size - tile, CELL // 4
    fade = torch.sin((torch.arange(length) + 0.5) / length * torch.pi / 2) ** 2
    fade = (fade * 2048).round() / 2048
    first_pixel = (second + tile) * CELL // 2 - length // 2
    right = torch.zeros(size * CELL)
    right[first_pixel : first_pixel + length] = fade
    right[first_pixel + length :] = 1
    spans = [(0, tile), (second, size)]
    found = []
    for (a, b), weights in zip(spans, (1 - right, right), strict=True):
        span = slice(a * CELL, b * CELL)
        found.append((slice(a, b), span, weights[span]))
    return found


def call_by_hand(net, stack, zr, zc, x, tau, y, sigma=None):
    """The network on a tile, with what the latent's branch makes of the whole latent there."""
    patches = CELL // CONFIG.patch_size
    rows, columns = (slice(s.start * patches, s.stop * patches) for s in (zr, zc))
    condition = net.prepare(
        None, y, sigma, size=tuple(x.shape[2:]), stack=stack[:, :, rows, columns]
    )
    return net.step(x, tau, condition)


def places():
    for (zr, r, down), (zc, c, across) in itertools.product(
        windows(LATENT[0], TILE[0]), windows(LATENT[1], TILE[1])
    ):
        yield zr, zc, r, c, down[:, None] * across


# --- what the pixels are


@pytest.mark.parametrize("sample_type", ["sde", "ode"])
@pytest.mark.parametrize("prediction_type", ["velocity", "x0"])
def test_sync_blends_the_estimates_of_every_step(net, sample_type, prediction_type):
    """By hand: of each tile x0 = x - t v, blended, and then the sampler's step with that."""
    latent, y, sigma = tiny_latent(2, *LATENT), tiny_caption(2), torch.tensor([0.1, 0.7])
    sampling = SamplingSettings(4, None, True, 1.0, prediction_type=prediction_type)
    decoder = PiDDecoder(net, sampling=sampling)
    draw = NoiseSource(torch.Generator().manual_seed(3), "cpu")

    def estimate(x, tau):
        x0 = torch.zeros_like(x)
        for zr, zc, r, c, weights in places():
            crop = x[:, :, r, c]
            out = call_by_hand(net, stack, zr, zc, crop, tau, y, sigma)
            x0[:, :, r, c] += weights * (out if prediction_type == "x0" else crop - tau / 1e3 * out)
        return x0

    with torch.no_grad():
        stack = net.latent_stack(latent, (LATENT[0] * CELL, LATENT[1] * CELL))
        x = draw((2, 3, LATENT[0] * CELL, LATENT[1] * CELL))
        for t, after in itertools.pairwise(student_times()):
            x0 = estimate(x, 1000 * t)
            if sample_type == "sde":
                x = (1 - after) * x0 + (after * draw(tuple(x.shape)) if after else 0)
            elif prediction_type == "x0":
                x = x + (after - t) * (x - x0) / max(t, 0.05) if after else x0
            else:
                x = x + (after - t) * (x - x0) / t
    got = pixels(
        decoder, latent, caption=y, sigma=sigma, generator=torch.Generator().manual_seed(3),
        seed=None, sample_type=sample_type,
    )  # fmt: skip
    torch.testing.assert_close(got, x.clamp(-1, 1), rtol=0, atol=1e-4)


def test_independent_blends_finished_tiles(decoder, net):
    latent, y = tiny_latent(1, *LATENT), tiny_caption()
    noise = SquareNoise(NoiseSource(torch.Generator().manual_seed(3), "cpu"), 1, 3)
    want = torch.zeros(1, 3, LATENT[0] * CELL, LATENT[1] * CELL)
    stack = net.latent_stack(latent, tuple(want.shape[2:]))
    for zr, zc, r, c, weights in places():
        size, numbers = tuple(weights.shape), itertools.count()

        def draw(_, size=size, numbers=numbers, r=r, c=c):
            return noise(next(numbers), r.start, c.start, size)

        def velocity(x, tau, zr=zr, zc=zc):
            return call_by_hand(net, stack, zr, zc, x, tau, y)

        with torch.no_grad():
            result = sample_student(velocity, draw(()), student_times(), draw)
        want[:, :, r, c] += weights * result
    got = pixels(decoder, latent, caption=y, seed=3, tile_mode="independent")
    torch.testing.assert_close(got, want.clamp(-1, 1), rtol=0, atol=1e-4)


@modes
@pytest.mark.parametrize("tile", [LATENT, (40, 9), (7, 100)])
def test_one_tile_is_the_image_in_one_piece(decoder, tile, mode):
    options = {"tile": tile, "overlap": None, "tile_mode": mode}
    assert torch.equal(pixels(decoder, **options), pixels(decoder, tile=None, overlap=None))


@modes
def test_tiles_together_are_tiles_alone(decoder, mode):
    alone = pixels(decoder, tile_mode=mode)
    for together in (2, 3, 9):
        got = pixels(decoder, tile_mode=mode, tile_batch=together)
        torch.testing.assert_close(got, alone, rtol=0, atol=1e-4)


@modes
def test_a_sample_does_not_depend_on_its_batch(decoder, mode):
    latent, sigma = tiny_latent(2, *LATENT), [0.0, 0.4]
    captions = tiny_caption(2)

    def generators():
        return [torch.Generator().manual_seed(seed) for seed in (5, 6)]

    options = {"seed": None, "tile_mode": mode, "tile_batch": 3}
    both = pixels(decoder, latent, caption=captions, sigma=sigma, generator=generators(), **options)
    for i in range(2):
        one = pixels(
            decoder, latent[i : i + 1], caption=captions[i : i + 1], sigma=sigma[i],
            generator=generators()[i], **options,
        )  # fmt: skip
        torch.testing.assert_close(both[i : i + 1], one, rtol=0, atol=1e-4)


@modes
def test_same_seed_same_bits(decoder, mode):
    first = pixels(decoder, tile_mode=mode)
    assert torch.equal(first, pixels(decoder, tile_mode=mode))
    assert not torch.equal(first, pixels(decoder, tile_mode=mode, seed=1))


@modes
def test_an_undistilled_network_with_guidance(teacher, mode):
    """Guidance with the caption itself is none; with another it shows; tiles alone or together."""
    y, other = tiny_caption(), tiny_caption(seed=3)
    none = pixels(teacher, caption=y, cfg_scale=1, tile_mode=mode)
    itself = pixels(teacher, caption=y, negative_caption=y, cfg_scale=3.0, tile_mode=mode)
    assert (itself - none).abs().mean() < 1e-5
    guided = pixels(teacher, caption=y, negative_caption=other, tile_mode=mode)
    assert (guided - none).abs().mean() > 1e-4
    together = pixels(teacher, caption=y, negative_caption=other, tile_mode=mode, tile_batch=4)
    assert (together - guided).abs().mean() < 1e-5


def test_the_image_in_bands_is_the_image_at_once(decoder, monkeypatch):
    whole = pixels(decoder)
    monkeypatch.setattr("pixeldiff.models.pid.tiling._BAND_ON_CPU", 1000)
    assert torch.equal(pixels(decoder), whole)


# --- what is told meanwhile


def test_callbacks_of_tiles_and_of_steps(decoder):
    told, previews = [], []
    image = pixels(
        decoder, steps=2, tile_batch=3, callback=previews.append, tile_callback=told.append
    )
    assert told == [TileInfo(s, 2, t, 4) for s in (1, 2) for t in (3, 4)]
    assert [info.step for info in previews] == [1, 2]
    assert torch.equal(previews[-1].x0.clamp(-1, 1), image)
    told.clear()
    pixels(decoder, steps=2, tile_mode="independent", tile_callback=told.append)
    assert told == [TileInfo(1, 1, t, 4) for t in range(1, 5)]
    told.clear()
    pixels(decoder, steps=2, tile="auto", overlap=None, tile_callback=told.append)
    assert told == [TileInfo(s, 2, t, 2) for s in (1, 2) for t in (1, 2)]  # of 7 x 8 cells
    told.clear()
    pixels(decoder, steps=2, tile=LATENT, tile_callback=told.append)
    assert told == [TileInfo(s, 2, 1, 1) for s in (1, 2)]


@modes
def test_a_tile_callback_stops_the_decode(decoder, mode):
    before = pixels(decoder, tile_mode=mode)
    with pytest.raises(Interrupted, match="after tile 3 of 4"):
        pixels(decoder, tile_mode=mode, tile_callback=lambda info: info.tile < 3)
    assert torch.equal(pixels(decoder, tile_mode=mode), before)


def test_metadata(decoder):
    latent = tiny_latent(1, *LATENT)
    found = decoder.decode(latent, tile=(4, 20), overlap=1, tile_mode="independent").metadata
    assert {"tile": [4, 9], "overlap": [1, 0], "tile_mode": "independent"}.items() <= found.items()
    assert "tile" not in decoder.decode(latent).metadata
    assert "tile" not in decoder.decode(latent, tile=(7, 9)).metadata


# --- which tiles


def test_auto_is_whole_where_the_network_was_trained_for_it():
    flux, large = variant("flux-2k"), variant("sd3-2kto4k")

    def tile(one, latent_hw):
        found = tile_layout(one.inference_config, one, latent_hw, "auto", None)
        return found and (found.tile, found.overlap)

    assert tile(flux, (64, 64)) is None
    assert tile(flux, (54, 72)) is None
    assert tile(flux, (128, 128)) == ((64, 64), (8, 8))
    assert tile(flux, (48, 256)) == ((48, 64), (0, 8))
    assert tile(large, (128, 128)) is None
    assert tile(large, (256, 300)) == ((128, 128), (16, 16))
    assert trained_tile(CONFIG, None) == (8, 8)
    assert tile_layout(CONFIG, None, (8, 8), "auto", None) is None
    assert tile_layout(CONFIG, None, (9, 8), "auto", None).tile == (8, 8)


@pytest.mark.parametrize("one", variants(), ids=lambda one: one.name)
def test_every_released_network_can_be_tiled(one):
    if one.config.lq_latent_channels is None:
        pytest.skip("has no latent")
    tile = trained_tile(one.config, one)
    found = tile_layout(one.config, one, tuple(3 * t for t in tile), "auto", None)
    assert found.tile == tile
    assert all(n % one.config.patch_size == 0 for n in found.tile_pixels)
    assert found.overlap == tuple(t // 8 for t in tile)


def test_where_cells_are_smaller_than_patches():
    """8 pixels a cell, patches of 16: tiles and overlaps are pairs of cells."""
    config = CONFIG.__class__(**{**vars(CONFIG), "sr_scale": 1})
    assert config.pixels_per_latent_cell == 8
    found = tile_layout(config, None, (20, 20), (8, 8), None)
    assert (found.step, found.overlap) == (2, (2, 2))
    assert all(start % 2 == 0 for starts in found.starts for start in starts)
    with pytest.raises(SizeError, match=r"multiples of 2 latent cells.*nearest: h 8, w 8 or 10"):
        tile_layout(config, None, (20, 20), (8, 9), None)
    with pytest.raises(SizeError, match=r"0 to 2 latent cells.*in multiples of 2, got 1"):
        tile_layout(config, None, (20, 20), (8, 8), 1)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tile": "largest"}, ValueError, "None, 'auto' or"),
        ({"tile": 4}, SizeError, "two positive integers"),
        ({"tile": (4, 0)}, SizeError, "two positive integers"),
        ({"tile": (4.0, 4)}, SizeError, "two positive integers"),
        ({"overlap": 2}, SizeError, "0 to 1 latent cells, a third of the tile, got 2"),
        ({"overlap": -1}, SizeError, "got -1"),
        ({"overlap": True}, SizeError, "got True"),
        ({"tile": None}, ValueError, "overlap is of tiles"),
        ({"tile_mode": "alone"}, ValueError, "tile_mode must be one of sync, independent"),
        ({"tile_batch": 0}, ValueError, "tile_batch must be an integer >= 1, got 0"),
        ({"size": (64, 64)}, ValueError, r"the latent's own, \(224, 288\)"),
        ({"tile_mode": "independent", "callback": print}, ValueError, "use tile_callback"),
    ],
)
def test_refusals_before_the_network_runs(decoder, monkeypatch, options, error, words):
    monkeypatch.setattr(decoder.net, "prepare", None)
    with pytest.raises(error, match=words):
        pixels(decoder, **options)


def test_a_tile_beyond_training_warns_an_image_beyond_it_does_not(net, monkeypatch):
    decoder = PiDDecoder(net, variant=variant("flux-2k"), sampling=None)
    monkeypatch.setattr(
        "pixeldiff.models.pid.decoder.run", lambda *_, **__: torch.zeros(1, 3, 2, 2)
    )
    latent, y = torch.zeros(1, 16, 130, 64), tiny_caption()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder.decode(latent, caption=y, tile=(64, 64))
    with pytest.warns(UntrainedSizeWarning, match="not trained near 4096 x 2048"):
        decoder.decode(latent, caption=y, tile=(128, 64))


# --- with a network that decodes pictures


def across(size: int) -> Image.Image:
    """A square that brightens from column to column."""
    return Image.linear_gradient("L").resize((size, size)).rotate(90).convert("RGB")


def pictures() -> dict[str, torch.Tensor]:
    """(1, 3, 192, 192): flat, textured, and text."""
    photo = read_picture(demo_asset("picture.png")).resize((384, 384)).crop((0, 180, 192, 372))
    page = Image.new("RGB", (192, 192), (240, 236, 225))
    pen = ImageDraw.Draw(page)
    for line in range(12):
        pen.text((4, 16 * line + 2), "tiles that overlap fade into one", fill=(20, 20, 60))
    kinds = {"flat": across(192), "textured": photo, "text": page}
    return {k: from_pil(v) for k, v in kinds.items()}


def encoded(picture: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return demo_autoencoder().encode(picture)


def energy(image: torch.Tensor, *, down: bool = False) -> torch.Tensor:
    """Mean squared difference of neighbouring columns of the 8-bit picture, by column; or that of
    neighbouring rows."""
    eight_bit = torch.from_numpy(to_uint8(image)).float()
    return eight_bit.diff(dim=1 if down else 2).square().mean((0, 1, 3))


def share_around(middle: int, energy: torch.Tensor) -> float:
    """Of the 128 columns around it, all that two tiles of the tests below share at least, over the
    rest."""
    border = torch.zeros(len(energy), dtype=torch.bool)
    border[middle - 64 : middle + 64] = True
    return (energy[border].mean() / energy[~border].mean()).item()


def line_at(middle: int, image: torch.Tensor) -> float:
    """The difference across it over that across the 16 borders of patches nearest to it: within
    patches differences are other ones."""
    borders = energy(image)[middle - 1 - 8 * 16 : middle + 8 * 16 : 16]
    assert len(borders) == 17
    return (16 * borders[8] / (borders.sum() - borders[8])).item()


@pytest.fixture(scope="module")
def demo():
    return PiDDecoder.from_pretrained("demo", device="cpu")


@modes
@pytest.mark.parametrize("kind", ["flat", "textured", "text"])
def test_no_seams(demo, kind, mode):
    """Where tiles meet there is no line, and gradients are what they are elsewhere, beside those of
    one piece. How much grain a flat picture has depends on what a tile sees: see the next test."""
    latent, middle = encoded(pictures()[kind]), 384
    options = {"tile": (16, 16), "overlap": 4, "tile_mode": mode}
    tiled = pixels(demo, latent, **options)
    whole = pixels(demo, latent, tile=None, overlap=None)
    line = line_at(middle, tiled) / line_at(middle, whole)
    assert line < 1.1
    assert (tiled - whole).abs().mean() < 1 / 127.5
    if kind == "flat":
        cut = pixels(demo, latent, **{**options, "overlap": 0})
        assert line_at(middle, cut) / line_at(middle, whole) > 1.1
    else:
        share, expected = (share_around(middle, energy(image)) for image in (tiled, whole))
        assert abs(share / expected - 1) < 0.02


@modes
def test_plain_colours_have_as_much_grain_where_tiles_meet(demo, mode):
    """Gradients around a border over those elsewhere in the same picture, on the whole. One colour
    alone may have 3 % more or less, in one piece too."""
    colours = [(128, 128, 128), (50, 50, 50), (215, 215, 215), (120, 170, 220), (220, 180, 150)]
    middle, shares = 768, []
    for colour in colours:
        latent = encoded(from_pil(Image.new("RGB", (384, 128), colour)))
        tiled = pixels(demo, latent, tile=(16, 32), overlap=4, tile_mode=mode)
        inside = energy(tiled)[64:-64]  # not at the picture's own edges
        shares.append(share_around(middle - 64, inside))
    assert abs(sum(shares) / len(shares) - 1) < 0.02
    assert all(abs(share - 1) < 0.04 for share in shares)


@modes
def test_a_fade_keeps_the_grain_of_flat_pictures(demo, mode):
    """Gradients around a border are those of the same tiles cut off there, which lose nothing.

    Not those of one piece: the grain, a third of a grey level, is the network's own pattern, whose
    strength depends on all that it sees: tiles cut off differ from one piece as much as tiles that
    fade. The tiles are as long as trained ones, and as low as can be decoded in a test.
    """
    latent, middle = encoded(from_pil(across(384))[:, :, :128]), 768
    options = {"tile": (16, 32), "tile_mode": mode}
    layouts = [tile_layout(demo.net.config, None, (16, 48), (16, 32), n) for n in (4, 0)]
    assert layouts[0].starts == layouts[1].starts
    faded, cut = (pixels(demo, latent, **options, overlap=overlap) for overlap in (4, 0))
    for down in (False, True):
        shares = [share_around(middle, energy(image, down=down)) for image in (faded, cut)]
        assert abs(shares[0] / shares[1] - 1) < 0.02
