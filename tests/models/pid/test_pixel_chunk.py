"""Patches at a time: the same image, and less memory at once."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch
from tiny_networks import CONFIGS, PLAIN, inputs, network

import pixeldiff
from pixeldiff.memory.live import LiveMemory
from pixeldiff.models.pid import PiDDecoder, PiDNet, variant
from pixeldiff.models.pid.pixel_bands import bands_of
from pixeldiff.models.pid.samplers import network_time, student_times
from tests.tiny_pid import tiny_caption, tiny_latent, tiny_net

SIZE = (48, 32)  # 6 x 4 patches
CHUNKS = (1, 3, 4, 5, 7, 8, 11, 23, 24, 25, 1000)


def close(a, b, dtype) -> bool:
    """Equal up to the rounding of products whose height differs, and nothing else."""
    limit = {torch.float64: 1e-13, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    return bool((a - b).abs().max() <= limit * b.abs().max())


def step(net, given, chunk, **options):
    with torch.no_grad():
        how = {"size": tuple(given["x"].shape[-2:]), "pixel_chunk": chunk, **options}
        latent = given["lq_latent"] if net.config.lq_latent_channels else None
        condition = net.prepare(latent, given["y"], given["degrade_sigma"], **how)
        return net.step(given["x"], given["t"], condition)


def student_step(net, given, chunk, *, sample_type="sde", want_x0=True, t_next=0.5):
    generator, drawn = torch.Generator().manual_seed(3), []

    def draw(shape):
        drawn.append(shape)
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        how = {"size": tuple(given["x"].shape[-2:]), "pixel_chunk": chunk}
        condition = net.prepare(given["lq_latent"], given["y"], given["degrade_sigma"], **how)
        noise = draw if sample_type == "sde" and t_next else None
        found = net.student_step(
            condition, given["x"], 0.8, t_next, noise, want_x0, sample_type=sample_type
        )
    assert len(drawn) == (noise is not None)
    return found


# ---- The same numbers --------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("name", [*CONFIGS, "no latent"])
def test_a_step_in_exact_arithmetic(name, chunk):
    net = network(CONFIGS.get(name, PLAIN), dtype=torch.float64).requires_grad_(False)
    given = inputs(size=SIZE)
    assert close(step(net, given, chunk), step(net, given, None), torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_a_step(chunk, backend, dtype):
    net = network(CONFIGS["v1.5"], dtype=dtype).requires_grad_(False)
    given = inputs(size=SIZE)
    with pixeldiff.backend(backend):
        found, whole = step(net, given, chunk), step(net, given, None)
        assert close(found, whole, dtype)
        assert found.dtype == whole.dtype
        assert not torch.isnan(found).any()


@pytest.mark.parametrize("options", [{}, {"sample_type": "ode"}, {"want_x0": False}, {"t_next": 0}])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_a_step_of_the_sampler(chunk, options):
    net, given = network(CONFIGS["v1"]).requires_grad_(False), inputs(size=SIZE)
    found = student_step(net, given, chunk, **options)
    whole = student_step(net, given, None, **options)
    assert close(found[0], whole[0], torch.float32)
    assert (found[1] is None) == (whole[1] is None) == (not options.get("want_x0", True))
    if whole[1] is not None:
        assert close(found[1], whole[1], torch.float32)


def test_one_image_in_one_chunk_is_the_same_bit_for_bit():
    net, given = network(CONFIGS["v1.5"]).requires_grad_(False), inputs(batch=1, size=SIZE)
    for chunk in (24, 25):
        assert torch.equal(step(net, given, chunk), step(net, given, None))


def test_features_made_anew():
    net, given = network(CONFIGS["v1.5"], dtype=torch.float64), inputs(size=SIZE)
    net.requires_grad_(False)
    found = step(net, given, 5, keep_features=False)
    assert close(found, step(net, given, None), torch.float64)


def test_one_pixel_block_and_three():
    for depth in (1, 3):
        config = dataclasses.replace(CONFIGS["v1"], pixel_depth=depth)
        net = network(config, dtype=torch.float64).requires_grad_(False)
        given = inputs(size=SIZE)
        assert close(step(net, given, 5), step(net, given, None), torch.float64)


def test_quantised():
    net, given = network(CONFIGS["v1"], dtype=torch.bfloat16), inputs(size=SIZE)
    net.requires_grad_(False).quantize_()
    assert close(step(net, given, 5), step(net, given, None), torch.bfloat16)


def test_with_gradients_or_a_trace_all_at_once():
    net, given = network(CONFIGS["v1.5"]), inputs(size=SIZE)
    how = {"size": SIZE, "pixel_chunk": 5}
    condition = net.prepare(given["lq_latent"], given["y"], given["degrade_sigma"], **how)
    v = net.step(given["x"], given["t"], condition)
    v.sum().backward()
    assert all(p.grad is not None for p in net.pixel_blocks.parameters())
    assert close(v.detach(), step(net, given, None), torch.float32)  # of the references
    net.requires_grad_(False)
    seen = {}
    traced = net.step(given["x"], given["t"], condition, trace=seen.__setitem__)
    assert close(traced, v.detach(), torch.float32)
    assert seen["pixel_blocks.0"].shape == (2 * 24, 64, 4)


@pytest.mark.parametrize("options", [{}, {"tile": (4, 4), "overlap": 1}, {"low_memory": True}])
def test_a_decode(options):
    how = {"seed": 1, "output": "pt", **options}
    low = how.pop("low_memory", False)
    latent, caption = tiny_latent(2, 6, 4), tiny_caption(2)
    whole = PiDDecoder(tiny_net(), low_memory=low).decode(latent, caption=caption, **how)
    decoder = PiDDecoder(tiny_net(), low_memory=low, pixel_chunk=3)
    chunked = decoder.decode(latent, caption=caption, **how)
    assert close(chunked.images, whole.images, torch.float32)
    assert chunked.metadata.pop("pixel_chunk") == 3
    assert chunked.metadata == whole.metadata


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "4"])
def test_bad_values(value):
    net, given = tiny_net(), inputs()
    with pytest.raises(ValueError, match=r"pixel_chunk must be None or a number of patches >= 1"):
        PiDDecoder(net, pixel_chunk=value)
    with pytest.raises(ValueError, match="pixel_chunk"):
        network(CONFIGS["v1"]).prepare(None, given["y"], size=(16, 32), pixel_chunk=value)
    with pytest.raises(ValueError, match="pixel_chunk"):
        PiDDecoder.from_pretrained("no such file", pixel_chunk=value)


# ---- Bands -------------------------------------------------------------------------------------


@pytest.mark.parametrize("most", CHUNKS)
def test_bands_are_every_patch_once_in_whole_rows(most):
    found = bands_of(2, (6, 4), 8, most)
    assert [i for b in found for i in range(b.patches.start, b.patches.stop)] == list(range(48))
    for band in found:
        count = band.patches.stop - band.patches.start
        assert 0 < count <= max(most, 4)
        assert count % 4 == 0
        assert (band.rows.start, band.rows.stop) == (
            band.tokens.start // 4 * 8,
            band.tokens.stop // 4 * 8,
        )
        assert band.patches.start == band.image * 24 + band.tokens.start


# ---- Memory ------------------------------------------------------------------------------------

# GB at 2048 x 2048 with the latent's features made anew; a 4096 image takes four times as much.
# "plain" is every op's reference but the attention's, whose own holds all of its logits.
NOW = {("fused", None): 0.50, ("fused", 1024): 0.43, ("plain", None): 2.32, ("plain", 1024): 0.74}


def peak(kind: str, side: int, chunk: int | None) -> float:
    config = variant("flux-2k").inference_config
    net = PiDNet(config, device="meta", dtype=torch.bfloat16).requires_grad_(False)
    times, cells = student_times(), side // config.pixels_per_latent_cell

    def draw(shape):
        return torch.empty(shape, device="meta")

    given = (draw((1, 16, cells, cells)), draw((1, 300, 2304)), draw((1,)))
    how = {"size": (side, side), "timesteps": [network_time(t) for t in times[:-1]]}
    plain = pixeldiff.backend("reference", joint_attention="cpu")
    with (
        torch.no_grad(),
        LiveMemory() as memory,
        plain if kind == "plain" else contextlib.nullcontext(),
    ):
        condition = net.prepare(*given, **how, keep_features=False, pixel_chunk=chunk)
        net.student_step(condition, draw((1, 3, side, side)), *times[:2], draw, want_x0=False)
    print(memory.table())
    return memory.peak / 1e9


@pytest.mark.parametrize("side", [2048, 4096])
@pytest.mark.parametrize(("kind", "chunk"), NOW)
def test_peak_of_live_bytes(kind, chunk, side):
    goal = NOW[kind, chunk] * (side / 2048) ** 2
    assert 0.9 * goal < peak(kind, side, chunk) <= goal
