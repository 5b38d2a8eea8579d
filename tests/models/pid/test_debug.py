"""PiD that makes NaN or infinity: which step, and with debug=True which layer."""

from __future__ import annotations

import threading

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny_pid import save_net, tiny_caption, tiny_latent, tiny_net

from pixeldiff import backend, cli
from pixeldiff.errors import NonFiniteError
from pixeldiff.models.pid import PiDDecoder
from pixeldiff.models.pid.decoder import Interrupted
from pixeldiff.models.pid.variants import SamplingSettings

TEACHER = SamplingSettings(steps=3, times=None, stochastic=False, cfg_scale=2.5, shift=3.0)
WAYS = {
    "whole": {},
    "tiles": {"tile": (2, 2)},
    "alone": {"tile": (2, 2), "tile_mode": "independent"},
    "pairs": {"tile": (2, 2), "tile_batch": 2},
}
# A parameter, the module that is named for it, and the first step it shows in.
PLANTS = [
    ("lq_proj.latent_proj.0.weight", "lq_proj.latent_proj.0", 0),
    ("y_embedder.proj.weight", "y_embedder.proj", 0),
    ("t_embedder.mlp.2.bias", "t_embedder.mlp.2", 0),
    ("patch_blocks.0.attn.q_norm_y.weight", "patch_blocks.0.attn", 1),
    ("patch_blocks.1.attn.proj_x.weight", "patch_blocks.1.attn.proj_x", 1),
    ("patch_blocks.0.mlp_x.w2.weight", "patch_blocks.0.mlp_x.w2", 1),
    ("patch_blocks.1.norm_x2.weight", "patch_blocks.1.norm_x2", 1),
    ("pixel_embedder.proj.bias", "pixel_embedder.proj", 1),
    ("pixel_blocks.0.mlp.fc2.weight", "pixel_blocks.0", 1),
    ("pixel_blocks.0.attn.qkv.weight", "pixel_blocks.0.attn.qkv", 1),
    ("final_layer.linear.bias", "final_layer", 1),
]


def planted(name: str, value: float = float("inf"), **options) -> PiDDecoder:
    net = tiny_net(dtype=options.pop("dtype", torch.float32))
    net.get_parameter(name).view(-1)[0] = value
    return PiDDecoder(net, **options)


def decode(decoder, **options):
    options = {"caption": tiny_caption(), "seed": 0, "output": "pt", **options}
    return decoder.decode(tiny_latent(2, 4, 4), **options).images


def failure(decoder, **options) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        decode(decoder, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def visiting(net) -> PiDDecoder:
    """The blocks' weights are elsewhere but while they are run."""
    net.requires_grad_(False).offload_()
    return PiDDecoder(net)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_debug_changes_no_pixel(way, dtype):
    decoder = PiDDecoder(tiny_net(dtype=dtype))
    assert torch.equal(decode(decoder, **WAYS[way]), decode(decoder, debug=True, **WAYS[way]))


def test_debug_of_a_teacher_and_of_the_reference():
    teacher = PiDDecoder(tiny_net(), sampling=TEACHER)
    given = {"negative_caption": tiny_caption(seed=4)}
    assert torch.equal(decode(teacher, **given), decode(teacher, debug=True, **given))
    decoder = PiDDecoder(tiny_net())
    with backend("reference"):
        assert torch.equal(decode(decoder), decode(decoder, debug=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "module", "step"), PLANTS, ids=[p[0] for p in PLANTS])
def test_one_bad_weight_is_found(name, module, step, way):
    decoder = planted(name)
    error = failure(decoder, **WAYS[way])
    assert (error.step, error.module) == (1, None)
    assert "run it again with debug=True (--debug)" in str(error)
    assert ("tile 1 of 4" in str(error)) == (way == "alone")
    error = failure(decoder, debug=True, **WAYS[way])
    assert (error.step, error.module) == (step, module)
    assert f"its parameter {name} holds 1 infinite of" in str(error)
    if step and way != "whole":
        assert "tile 1 of 4" in str(error)


@pytest.mark.parametrize("way", ["whole", "pairs"])
@pytest.mark.parametrize(("name", "module", "step"), PLANTS, ids=[p[0] for p in PLANTS])
def test_one_bad_weight_is_found_where_weights_visit(name, module, step, way):
    decoder = visiting(planted(name).net)
    assert decoder.net.offload is not None
    error = failure(decoder, debug=True, **WAYS[way])
    assert (error.step, error.module) == (step, module)
    assert f"its parameter {name} holds 1 infinite of" in str(error)


def test_an_overflow_where_weights_visit():
    net = tiny_net()
    for layer in ("w1", "w3"):
        getattr(net.patch_blocks[1].mlp_x, layer).weight.fill_(1e20)
    decoder = visiting(net)
    for _ in range(2):  # nothing is left of the first
        error = failure(decoder, debug=True)
        assert error.module == "patch_blocks.1.mlp_x"
        assert "(swiglu) made" in str(error)
        assert decoder.net.offload.as_running(decoder.net) == dict(decoder.net.named_modules())


def test_debug_changes_no_pixel_where_weights_visit():
    decoder = visiting(tiny_net())
    assert torch.equal(decode(decoder), decode(decoder, debug=True))


@pytest.mark.parametrize("way", WAYS)
def test_an_overflow_of_one_layer(way):
    decoder = PiDDecoder(tiny_net(dtype=torch.bfloat16))
    decoder.net.patch_blocks[1].attn.proj_x.weight.fill_(3e38)
    error = failure(decoder, debug=True, **WAYS[way])
    assert error.module == "patch_blocks.1.attn.proj_x"
    assert 'bfloat16 overflowed: try precision="fp32"' in str(error)
    assert "the weights are bad" not in str(error)
    assert " bfloat16 in [-" in str(error)


def test_an_overflow_between_the_layers():
    """Of the feed-forward's product, which has no parameter of its own."""
    decoder = PiDDecoder(tiny_net())
    for layer in ("w1", "w3"):
        getattr(decoder.net.patch_blocks[0].mlp_x, layer).weight.fill_(1e20)
    error = failure(decoder, debug=True)
    assert error.module == "patch_blocks.0.mlp_x"
    assert "(swiglu) made" in str(error)


def test_a_later_step_is_named():
    """Finite weights whose velocity overflows only where t is small."""
    decoder = PiDDecoder(tiny_net())

    def spoil(info):
        if info.step == 2:
            decoder.net.final_layer.linear.bias[0] = float("nan")

    error = failure(decoder, callback=spoil)
    assert error.step == 3
    assert "first in step 3 of 4 (t = 0.634)" in str(error)


@pytest.mark.parametrize("debug", [False, True])
def test_infinity_is_noticed_though_pixels_are_clamped(debug):
    decoder = planted("final_layer.linear.bias")
    assert failure(decoder, steps=1, sample_type="ode", debug=debug).step == 1


def test_a_teacher_too():
    decoder = planted("patch_blocks.1.mlp_x.w1.weight", float("nan"), sampling=TEACHER)
    assert failure(decoder, cfg_scale=1).step == 1
    decoder = planted("patch_blocks.0.mlp_y.w1.weight", float("nan"), sampling=TEACHER)
    given = {"negative_caption": tiny_caption(seed=4)}
    assert failure(decoder, debug=True, **given).module == "patch_blocks.0.mlp_y.w1"


def test_a_host_that_knows_only_arithmetic_errors(recwarn):
    with pytest.raises(ArithmeticError):
        decode(planted("final_layer.linear.bias"))


def test_callbacks_are_their_own_business():
    seen = []

    def callback(info):
        seen.append(torch.log(-info.x0.abs()).isnan().all())

    decode(PiDDecoder(tiny_net()), debug=True, callback=callback)
    told = lambda info: seen.append(torch.ones(1) / 0)  # noqa: E731
    decode(PiDDecoder(tiny_net()), debug=True, tile=(2, 2), tile_callback=told)
    assert len(seen) == 4 + 4 * 4
    with pytest.raises(Interrupted):
        decode(PiDDecoder(tiny_net()), debug=True, callback=lambda info: False)


def test_a_thread_that_looks_does_not_disturb_another():
    """Both use one network; hooks on it would be found by both."""
    decoder, barrier, results = PiDDecoder(tiny_net()), threading.Barrier(2), {}
    expected = decode(decoder)

    def run(debug):
        results[debug] = decode(
            decoder, debug=debug, callback=lambda info: barrier.wait(60) and None
        )

    threads = [threading.Thread(target=run, args=(debug,)) for debug in (False, True)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert torch.equal(results[False], expected)
    assert torch.equal(results[True], expected)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in decoder.net.modules())


def test_on_the_command_line(tmp_path):
    net = tiny_net()
    save_file({"latent": tiny_latent()}, tmp_path / "z.safetensors")
    save_file({"embedding": tiny_caption()}, tmp_path / "y.safetensors")
    net.patch_blocks[1].attn.proj_x.weight.fill_(3e38)
    save_net(tmp_path / "pid.safetensors", net)
    args = ["decode", tmp_path / "z.safetensors", "-o", tmp_path / "a.png", "--device", "cpu"]
    args += ["--model", tmp_path / "pid.safetensors"]
    args += ["--caption-file", tmp_path / "y.safetensors"]
    result = CliRunner().invoke(cli.main, [*map(str, args)])
    assert result.exit_code == 1
    assert "the network returned NaN" in result.output
    assert "--debug" in result.output
    result = CliRunner().invoke(cli.main, [*map(str, args), "--debug"])
    assert result.exit_code == 1
    assert "error: patch_blocks.1.attn.proj_x (addmm) made " in result.output
    assert not (tmp_path / "a.png").exists()
