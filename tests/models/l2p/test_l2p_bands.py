"""The local decoder tile by tile: equal to the whole one, and within its budget."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_l2p import PATCHES, WIDTHS, captions, config, draw, fill, network, relative
from torch import Tensor

from pixeldiff import backend
from pixeldiff.memory.live import LiveMemory
from pixeldiff.models.l2p import VARIANTS, bands
from pixeldiff.models.l2p.bands import Load, Tiling
from pixeldiff.models.l2p.config import DECODERS
from pixeldiff.models.l2p.local_decoder import LocalDecoder
from pixeldiff.models.l2p.sampler import guided
from pixeldiff.verify.golden import read_golden
from pixeldiff.verify.l2p_inputs import decoder_config, given, load_weights, weights

DIM = 10
CELL = {"1k": 16, "4k": 64, "8k": 128, "10k": 64}
GB = 10**9
LEAST_MB = {"1k": 21.0, "4k": 37.9, "8k": 71.3, "10k": 118.0}  # at its own size, in bf16
each_form = pytest.mark.parametrize("form", DECODERS)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def decoder(form: str, dtype: torch.dtype = torch.float64) -> LocalDecoder:
    net = LocalDecoder(DECODERS[form].with_widths(WIDTHS), DIM)
    fill(net)
    return net.to(dtype)


def inputs(form: str, size: tuple[int, int], images: int = 1, batch: int = 1):
    height, width = size
    x = draw(images, 3, height, width).double()
    grid = height // PATCHES[form], width // PATCHES[form]
    return x, draw(batch, *grid, DIM, seed=2).double()


# ---- What a pixel depends on -------------------------------------------------------------------


def test_radii_are_the_published_ones():
    got = {form: bands.radius(config) for form, config in DECODERS.items()}
    assert got == {"1k": (60, 2), "4k": (252, 2), "8k": (508, 2), "10k": (252, 2)}


def test_margins():
    """Whole cells of the level that the cut ends at; much less than the radius where it is high."""
    assert [bands.margin_down(k) for k in range(1, 8)] == [2, 4, 8, 16, 32, 64, 128]
    assert [bands.margin_up(k) for k in range(1, 8)] == [2, 8, 24, 48, 96, 192, 384]


@each_form
def test_what_a_pixel_depends_on(form):
    """A row of the image changes rows of the result up to the radius away, and none beyond."""
    pixels, _ = bands.radius(DECODERS[form])
    net, cell = decoder(form), CELL[form]
    unit = 320 if form == "10k" else cell
    height, middle = (2 * pixels // unit + 2) * unit, pixels // cell * cell + cell
    x, features = inputs(form, (height, unit))
    u = net(x, features)
    # The third row of a cell looks farthest down, the last but two farthest up.
    for pixel, away in ((middle + 2, pixels), (middle + cell - 3, -pixels)):
        row = pixel + away
        reached = set()
        for size in (1e3, -1e3):
            changed = x.clone()
            changed[:, :, row] += size * draw(*x.shape[:2], x.shape[3], seed=7)
            rows = (net(changed, features) != u).any(dim=1).any(dim=2)[0].nonzero().flatten()
            reached.update(rows.tolist())
        assert max(abs(r - row) for r in reached) == pixels
        assert pixel in reached


@each_form
def test_how_far_a_feature_reaches(form, monkeypatch):
    """Two cells of the bottleneck, where it is joined in."""
    net, cell = decoder(form), CELL[form]
    unit = 320 if form == "10k" else cell
    x, features = inputs(form, (max(8 * cell, unit) // unit * unit, unit))
    u, at, join = net(x, features), 2, LocalDecoder.join

    def changed(self, image, features):
        h = join(self, image, features)
        h[:, at] += 1
        return h

    monkeypatch.setattr(LocalDecoder, "join", changed)
    rows = (net(x, features) != u).any(dim=1).any(dim=2)[0].nonzero().flatten()
    assert {row // cell - at for row in rows.tolist()} == {-2, -1, 0, 1, 2}


# ---- Banded equals whole -----------------------------------------------------------------------


def tilings(form: str) -> list[tuple[tuple[int, int], Tiling]]:
    """(size, tiling): every number of levels, both directions, and last tiles that are short."""
    cell, deepest = CELL[form], len(DECODERS[form].levels)
    unit = 320 if form == "10k" else cell
    wide = {"1k": (96, 160), "4k": (128, 320), "8k": (128, 256), "10k": (320, 640)}[form]
    tall = (max(8 * cell // unit, 3) * unit, unit)
    cases = [(wide, Tiling(k, 1 << max(k, 4), 3 << max(k, 4))) for k in range(1, deepest - 1)]
    cases += [(tall, Tiling(k, 3 * cell, tall[1])) for k in (1, deepest - 1, deepest)]
    cases += [(tall, Tiling(deepest, cell, cell)), (tall[::-1], Tiling(deepest, unit, cell))]
    return cases


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["fp64", "fp32"]
)
@each_form
def test_banded_equals_whole(form, dtype, tolerance):
    net = decoder(form, dtype)
    for size, tiling in tilings(form):
        x, features = (t.to(dtype) for t in inputs(form, size))
        whole = net(x, features)
        banded = bands.decode(net, x, features, tiling)
        assert banded.dtype == whole.dtype
        assert banded.is_contiguous()
        assert relative(banded, whole) < tolerance, (size, tiling)


@each_form
def test_features_share_an_image_in_bands(form, monkeypatch):
    net = decoder(form)
    unit = 320 if form == "10k" else CELL[form]
    x, features = inputs(form, (unit, 2 * unit), images=2, batch=4)
    seen, down = [], LocalDecoder.down
    with monkeypatch.context() as patch:
        patch.setattr(LocalDecoder, "down", lambda *a: seen.append(len(a[2])) or down(*a))
        banded = bands.decode(net, x, features, Tiling(2, unit // 2, unit))
    assert set(seen) == {2}  # never once for each feature
    assert relative(banded, net(x, features)) < 1e-12


def test_image_of_another_type():
    net = decoder("4k", torch.bfloat16)
    x, features = inputs("4k", (128, 192))
    x, features = x.float(), features.bfloat16()
    banded = bands.decode(net, x, features, Tiling(2, 64, 64))
    assert banded.dtype == torch.float32
    assert relative(banded, net(x, features)) < 3e-2  # bf16: a few roundings, each of 2^-9


def test_goldens(golden_dir):
    files = sorted((golden_dir / "l2p").glob("dec_*.safetensors"))
    assert files
    for path in files:
        g = read_golden(path)
        c = g.meta["config"]
        form = {16: "1k", 64: "4k", 128: "8k", 160: "10k"}[c["patch_size"]]
        net = LocalDecoder(decoder_config(form, c["decoder_widths"]), c["dim"], c["in_channels"])
        load_weights(net, {k.removeprefix("local_decoder."): t for k, t in weights(g).items()})
        x, features = given(g, "x"), g.tensors["feat"].float().permute(0, 2, 3, 1)
        for k in (2, len(net.config.levels)):
            side = max(CELL[form] // 2, 1 << k)
            u = bands.decode(net, x, features, Tiling(k, side, side))
            assert relative(u, g.tensors["y"].float()) < 2e-5, (path.stem, k)


# ---- Memory ------------------------------------------------------------------------------------


def load(form: str, size: tuple[int, int], batch: int = 1, itemsize: int = 2) -> Load:
    return Load(DECODERS[form], 3, size, 1, batch, itemsize)


def measured(form: str, size: tuple[int, int], batch: int, dtype: torch.dtype, tiling: Tiling):
    """Peak bytes beside inputs and result, of the ops' definitions."""
    c = VARIANTS[form].config
    net = LocalDecoder(c.local_decoder, c.dim, device="meta", dtype=dtype)
    x = torch.empty(1, 3, *size, device="meta")
    grid = size[0] // c.patch_size, size[1] // c.patch_size
    features = torch.empty(batch, *grid, c.dim, device="meta", dtype=dtype)
    with backend("reference"), LiveMemory() as memory:
        u = bands.decode(net, x, features, tiling)
    # The whole decoder's peak comes before its result exists.
    return memory.peak - (u.untyped_storage().nbytes() if tiling.levels else 0)


@pytest.mark.parametrize("budget", [2 * GB, 4 * GB])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("form", "side"), [("8k", 8192), ("10k", 10240), ("4k", 8192)])
def test_budget_bounds_memory(form, side, batch, budget):
    what = load(form, (side, side), batch)
    tiling = bands.plan(what, budget)
    assert tiling.levels > 0
    peak = measured(form, (side, side), batch, torch.bfloat16, tiling)
    assert peak <= budget
    assert what.work(tiling) < 1.1 * what.work(Tiling(0, side, side))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@each_form
def test_estimate_is_near_what_is_measured(form, dtype):
    """Within 10 %, and never under by more than 5 %."""
    side = VARIANTS[form].native_size
    for batch in (1, 2):
        what = load(form, (side, side), batch, dtype.itemsize)
        for budget in (10**12, GB, GB // 2):
            tiling = bands.plan(what, budget)
            peak = measured(form, (side, side), batch, dtype, tiling)
            assert 0.95 * peak <= what.memory(tiling) <= 1.1 * peak, (batch, tiling)


@each_form
def test_whole_where_it_fits(form):
    side = VARIANTS[form].native_size
    what, whole = load(form, (side, side)), Tiling(0, side, side)
    needed = what.memory(whole)
    assert bands.plan(what, needed) == whole
    assert bands.plan(what, needed - 1).levels > 0
    assert (needed <= bands.DECODER_MEMORY) == (form in ("1k", "4k"))


def test_tiles_are_even_and_wide_where_that_costs_nothing():
    tiling = bands.plan(load("4k", (4096, 4096)), 2 * GB)
    assert tiling == Tiling(1, 2048, 4096)


@each_form
def test_the_least_budget_is_named_and_is_enough(form):
    side = VARIANTS[form].native_size
    what = load(form, (side, side))
    with pytest.raises(ValueError, match="decoder_memory must be at least") as e:
        bands.plan(what, 1000)
    text = str(e.value)
    least = int(text.split("at least ")[1].split()[0])
    assert text == (
        f"L2PNet: decoder_memory must be at least {least} bytes for 1 images of {side}x{side}, "
        f"got 1000; None sets no bound"
    )
    assert least / 1e6 == pytest.approx(LEAST_MB[form], abs=0.1)
    tiling = bands.plan(what, least)
    assert what.memory(tiling) <= least
    with pytest.raises(ValueError, match=f"at least {least} bytes"):
        bands.plan(what, least - 1)


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling(5, 64, 64), "Tiling: levels must be 0 to 4, got 5"),
        (Tiling(2, 10, 8), "Tiling: height must be a positive multiple of 4 pixels, got 10"),
        (Tiling(2, 8, 0), "Tiling: width must be a positive multiple of 4 pixels, got 0"),
    ],
)
def test_tilings_that_cannot_be(tiling, message):
    with pytest.raises(ValueError, match=message):
        bands.decode(decoder("1k"), *inputs("1k", (32, 32)), tiling)


# ---- The network -------------------------------------------------------------------------------


def cut(monkeypatch) -> list[Tiling]:
    seen, decode = [], bands.decode

    def recorded(net, x, features, tiling, guidance=None):
        seen.append(tiling)
        return decode(net, x, features, tiling, guidance)

    monkeypatch.setattr(bands, "decode", recorded)
    return seen


def least(net, size: tuple[int, int], batch: int) -> int:
    what = Load(net.config.local_decoder, 3, size, 1, batch, net.dtype.itemsize)
    return what.memory(Tiling(0, *size)) // 2


@each_form
def test_step_within_a_budget(form, monkeypatch):
    net = network(config(form), dtype=torch.float64)
    unit = net.config.size_multiple
    size = (unit * 2, unit) if form != "1k" else (128, 96)
    x, condition = draw(1, 3, *size).double(), net.prepare(captions(5), size)
    whole = net.step(x, 0.3, condition, decoder_memory=None)
    assert torch.equal(net.step(x, 0.3, condition), whole)  # small: whole by default
    seen = cut(monkeypatch)
    banded = net.step(x, 0.3, condition, decoder_memory=least(net, size, 1))
    assert seen[0].levels > 0
    assert relative(banded, whole) < 1e-12


@pytest.mark.parametrize("together", [True, False])
def test_guidance_within_a_budget(together, monkeypatch):
    net, size = network(config(), dtype=torch.float64), (128, 96)
    x = draw(1, 3, *size).double()
    options = {"guidance_scale": 4.0, "together": together}
    given = (captions(5), captions(9), size)
    whole = guided(net, *given, **options, decoder_memory=None)(x, 0.3)
    seen = cut(monkeypatch)
    banded = guided(net, *given, **options, decoder_memory=least(net, size, 2))(x, 0.3)
    assert [t.levels > 0 for t in seen] == [True]  # both branches at once
    assert relative(banded, whole) < 1e-12


def test_a_step_in_bands_compiles_without_graph_breaks():
    torch._dynamo.reset()
    net, size = network(config(n_layers=1)), (64, 48)
    x, condition = draw(1, 3, *size), net.prepare(captions(5), size, times=[0.3])
    options = {"decoder_memory": least(net, size, 1)}
    compiled = torch.compile(net.step, fullgraph=True, backend="eager")
    want = net.step(x, 0.3, condition, **options)
    assert torch.equal(compiled(x, 0.3, condition, **options), want)


def test_gradients_and_traces_run_whole(monkeypatch):
    net, seen = network(config()), cut(monkeypatch)
    x, condition = draw(1, 3, 32, 48), net.prepare(captions(5), (32, 48))
    names: list[str] = []

    def trace(name: str, value: Tensor) -> None:
        names.append(name)

    net.step(x, 0.3, condition, trace=trace, decoder_memory=1)
    assert "enc1" in names
    net.requires_grad_(True)
    with torch.enable_grad():
        net.step(x, 0.3, condition, decoder_memory=1).sum().backward()
    assert net.local_decoder.out_conv.weight.grad is not None
    net.requires_grad_(False)
    x.requires_grad_()
    with torch.enable_grad():
        net.step(x, 0.3, condition, decoder_memory=1).sum().backward()
    assert x.grad.any()
    assert seen == []


def test_errors_of_the_network():
    net = network(config())
    x, condition = draw(1, 3, 32, 48), net.prepare(captions(5), (32, 48))
    with pytest.raises(ValueError, match=r"at least \d+ bytes for 1 images of 32x48, got 1;"):
        net.step(x, 0.3, condition, decoder_memory=1)
    for wrong in (1.5e9, True):
        with pytest.raises(TypeError, match="decoder_memory must be a number of bytes or None"):
            net.step(x, 0.3, condition, decoder_memory=wrong)


def test_a_plan_depends_on_its_arguments_alone():
    what = load("8k", (8192, 8192))
    again = dataclasses.replace(what)
    bands.plan.cache_clear()
    first = bands.plan(what, 2 * GB)
    bands.plan.cache_clear()
    assert bands.plan(again, 2 * GB) == first
