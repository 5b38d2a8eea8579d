"""The L2P goldens in fp32 and bf16 on a CPU and a GPU: networks, local decoders, blocks, samplings,
the last ones through CUDA graphs too."""

from __future__ import annotations

import pytest
import torch
from devices import each_device
from tiny_l2p import relative

from pixeldiff.models.graphs import Graphs
from pixeldiff.models.l2p import bands
from pixeldiff.models.l2p.block import Block
from pixeldiff.models.l2p.graphs import Trajectory
from pixeldiff.models.l2p.local_decoder import LocalDecoder
from pixeldiff.models.l2p.positions import rope_3d
from pixeldiff.models.l2p.sampler import guided, sample, start
from pixeldiff.models.l2p.scheduler import schedule
from pixeldiff.verify import l2p_inputs
from pixeldiff.verify.golden import Golden, read_golden

FP32, BF16 = torch.float32, torch.bfloat16
each_dtype = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
SAMPLES = ("sample_p16_1step_A", "sample_p16_6step_cfg_A", "sample_p16_img2img_A")
SAMPLES += ("sample_p16_4step_cfg4_shift5_A", "sample_p64_3step_cfg")


@pytest.fixture(autouse=True)
def _exact_and_alone():
    """fp32 convolutions in fp32, and no gradients."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def files(golden_dir, pattern: str) -> list[Golden]:
    found = [read_golden(p) for p in sorted((golden_dir / "l2p").glob(pattern))]
    assert found
    return found


def bound_of(g: Golden) -> float:
    return g.tolerance("")["relative_to_max"]


def close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype, bound: float) -> None:
    """fp32 within the file's bound, of the peak; bf16 within 3 % of the RMS: 2^-9 a rounding."""
    got, want = got.float().cpu(), want.float()
    assert got.shape == want.shape
    if dtype == FP32:
        assert relative(got, want) <= bound
    else:
        assert (got - want).square().mean().sqrt() <= 0.03 * want.square().mean().sqrt()
        assert not torch.equal(got, want)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "plain"])
@each_dtype
@each_device
def test_networks(golden_dir, device, dtype, packed):
    for g in files(golden_dir, "net_*.safetensors"):
        net = l2p_inputs.stated_network(g).to(device, dtype)
        if packed:
            net.pack_()
        x, t = l2p_inputs.given(g, "x").to(device), g.tensors["t"].to(device)
        given = [g.tensors[f"caption.{b}"].float() for b in range(len(t))]
        close(net(x, t, given), g.tensors["net_out"], dtype, bound_of(g))


@each_dtype
@each_device
def test_local_decoders(golden_dir, device, dtype):
    """Whole, and in tiles."""
    for g in files(golden_dir, "dec_*.safetensors"):
        c = g.meta["config"]
        form = {16: "1k", 64: "4k", 128: "8k", 160: "10k"}[c["patch_size"]]
        widths = l2p_inputs.decoder_config(form, c["decoder_widths"])
        decoder = LocalDecoder(widths, c["dim"], c["in_channels"])
        own = l2p_inputs.under("local_decoder.", l2p_inputs.weights(g))
        l2p_inputs.load_weights(decoder, own)
        decoder = decoder.to(device, dtype)
        x = l2p_inputs.given(g, "x").to(device)
        features = g.tensors["feat"].to(device, dtype).permute(0, 2, 3, 1).contiguous()
        tile = bands.Tiling(2, decoder.config.pixels_per_cell, decoder.config.pixels_per_cell)
        for u in (decoder(x, features), bands.decode(decoder, x, features, tile)):
            close(u, g.tensors["y"], dtype, 2 * bound_of(g))


@each_dtype
@each_device
def test_blocks(golden_dir, device, dtype):
    for g in files(golden_dir, "comp_block_*.safetensors"):
        c, x = g.meta["config"], g.tensors["x"].to(device, dtype)
        e = g.tensors["t_emb"].to(device, dtype) if c["modulation"] else None
        width = None if e is None else e.shape[1]
        block = Block(c["dim"], c["n_heads"], c["ffn_hidden"], width, c["norm_eps"])
        l2p_inputs.load_weights(block, l2p_inputs.weights(g))
        block = block.to(device, dtype)
        ids = g.tensors["ids"].long().repeat(x.shape[0], 1).to(device)
        rope = rope_3d(ids, tuple(c["axes_dims"]), theta=c["rope_theta"], device=device)
        modulation = None if e is None else block.modulation(e)
        close(block(x, modulation, rope), g.tensors["y"], dtype, bound_of(g))


@pytest.mark.parametrize("name", SAMPLES)
@each_device
def test_samplings(golden_dir, name, device):
    """Three times: on a GPU kernel by kernel, captured and replayed, replayed."""
    path = golden_dir / "l2p" / f"{name}.safetensors"
    if not path.is_file():
        pytest.skip("not among the golden files here")
    g = read_golden(path)
    case = g.meta["case"]
    net = l2p_inputs.stated_network(g).to(device).requires_grad_(False)
    plan = schedule(case["steps"], shift=case["shift"], strength=case["strength"])
    negative, image = g.get("caption_neg"), g.get("init_image")
    prediction = guided(
        net,
        [g.tensors["caption"].float()],
        None if negative is None else [negative.float()],
        (case["H"], case["W"]),
        guidance_scale=case["cfg_scale"],
        times=plan.times,
    )
    graphs = Graphs(1)
    x = start(
        g.tensors["noise"].float().to(device), plan, None if image is None else image.to(device)
    )
    results = []
    for _ in range(3 if device == "cuda" else 1):
        with graphs.run(net, Trajectory(prediction, tuple(x.shape))) as running:
            results.append(sample(running.predict, x, plan, state=running.state).clone())
    assert len(graphs._captured) == (device == "cuda")
    assert all(torch.equal(r, results[0]) for r in results)
    close(results[0], g.tensors["x_final"], FP32, 2 * bound_of(g))
