"""L2P that makes NaN or infinity: which step, and with debug=True which layer."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from tiny_l2p import captions, config, draw, network

from pixeldiff import cli
from pixeldiff.errors import NonFiniteError
from pixeldiff.models.l2p import L2PPipeline
from pixeldiff.text import save_captions

NEGATIVE = {"guidance_scale": 2.0, "negative_prompt_embeds": captions(9)[0]}
WAYS = {
    "whole": {},
    "tiles": {"tile": (32, 32), "overlap": 0},
    "guided": NEGATIVE,
    "apart": {**NEGATIVE, "guidance_together": False},
    "guided-tiles": {**NEGATIVE, "tile": (32, 32), "overlap": 0},
}
PLANTS = [
    ("cap_embedder.1.weight", "cap_embedder.1", 0),
    ("context_refiner.0.attention.to_k.weight", "context_refiner.0.attention.to_k", 0),
    ("all_x_embedder.16-1.bias", "all_x_embedder.16-1", 1),
    ("noise_refiner.0.attention.norm_q.weight", "noise_refiner.0.attention", 1),
    ("layers.1.feed_forward.w3.weight", "layers.1.feed_forward.w3", 1),
    ("layers.0.attention_norm2.weight", "layers.0.attention_norm2", 1),
    ("layers.1.attention.to_out.0.weight", "layers.1.attention.to_out.0", 1),
    ("local_decoder.enc1.0.weight", "local_decoder.enc1.0", 1),
    ("local_decoder.out_conv.bias", "local_decoder.out_conv", 1),
]


def planted(name: str, value: float = float("inf")) -> L2PPipeline:
    net = network(config())
    net.get_parameter(name).view(-1)[0] = value
    return L2PPipeline(net)


def generate(pipe, **options):
    given = {"prompt_embeds": captions(5)[0], "height": 32, "width": 64, "num_inference_steps": 2}
    return pipe(**{**given, "seed": 0, "output_type": "pt", **options}).images


def failure(pipe, **options) -> NonFiniteError:
    with pytest.raises(NonFiniteError) as caught:
        generate(pipe, **options)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_debug_changes_no_pixel(way, dtype):
    pipe = L2PPipeline(network(config(), dtype=dtype))
    assert torch.equal(generate(pipe, **WAYS[way]), generate(pipe, debug=True, **WAYS[way]))


@pytest.mark.parametrize(("name", "module", "step"), PLANTS, ids=[p[0] for p in PLANTS])
def test_one_bad_weight_is_found_where_weights_visit(name, module, step):
    pipe = planted(name)
    pipe.net.requires_grad_(False).offload_()
    error = failure(pipe, debug=True)
    assert (error.step, error.module) == (step, module)
    assert f"its parameter {name} holds 1 infinite of" in str(error)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "module", "step"), PLANTS, ids=[p[0] for p in PLANTS])
def test_one_bad_weight_is_found(name, module, step, way):
    pipe = planted(name)
    error = failure(pipe, **WAYS[way])
    assert (error.step, error.module) == (1, None)
    assert "run it again with debug=True (--debug)" in str(error)
    assert "tile" not in str(error)
    error = failure(pipe, debug=True, **WAYS[way])
    assert (error.step, error.module) == (step, module)
    assert f"its parameter {name} holds 1 infinite of" in str(error)
    assert ("tile 1 of 2" in str(error)) == (step > 0 and "tiles" in way)


def test_the_decoder_in_pieces():
    pipe = planted("local_decoder.enc1.0.weight")
    error = failure(pipe, debug=True, decoder_memory=120_000)
    assert error.module == "local_decoder.enc1.0"


@pytest.mark.parametrize("way", ["whole", "tiles"])
def test_an_overflow_of_one_layer(way):
    pipe = L2PPipeline(network(config(), dtype=torch.bfloat16))
    pipe.net.layers[1].feed_forward.w2.weight.fill_(3e38)
    error = failure(pipe, debug=True, **WAYS[way])
    assert error.module == "layers.1.feed_forward.w2"
    assert 'bfloat16 overflowed: try precision="fp32"' in str(error)
    assert "the weights are bad" not in str(error)


def test_what_a_callback_does_is_not_inspected():
    told = []

    def end(pipe, step, timestep, tensors):
        told.append(tensors["latents"].neg().sqrt().isnan().any())

    generate(L2PPipeline(network(config())), debug=True, callback_on_step_end=end)
    assert len(told) == 2


def test_pictures_to_start_from():
    image = draw(1, 3, 32, 64).clamp(-1, 1)
    image[0, 1, 30, 2] = float("nan")
    with pytest.raises(ValueError, match=r"image must be finite, got 1 NaN .* row 30, col"):
        generate(L2PPipeline(network(config())), image=image)


def test_on_the_command_line(tmp_path):
    net = network(config())
    net.layers[0].attention_norm1.weight[3] = 1e38
    state = {k: v.contiguous() for k, v in net.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors", {"config": json.dumps(net.config.to_dict())})
    save_captions(tmp_path / "y.safetensors", captions(5)[0][None], "a", family="Qwen3")
    args = ["generate", "-o", tmp_path / "a.png", "--model", tmp_path / "a.safetensors"]
    args += ["--prompt-embeds", tmp_path / "y.safetensors", "--size", "32x64", "--steps", 2]
    args = [*map(str, args), "--device", "cpu"]
    result = CliRunner().invoke(cli.main, args)
    assert result.exit_code == 1
    assert "returned NaN at 32 x 64" in result.output
    result = CliRunner().invoke(cli.main, [*args, "--debug"])
    assert result.exit_code == 1
    assert "error: layers.0" in result.output
