"""PiDConfig: published configurations in, derived sizes out, impossible geometry refused."""

import dataclasses
import json

import pytest
from tiny_networks import PLAIN, TINY, V15

from pixeldiff.models.pid import PiDConfig


def test_defaults_are_the_released_v1_flux_network():
    c = PiDConfig()
    assert (c.head_dim, c.pixel_head_dim, c.ffn_size, c.num_injections) == (64, 72, 4096, 7)
    assert (c.patches_per_latent_cell, c.pixels_per_latent_cell) == (2.0, 32)


@pytest.mark.parametrize(("width", "ffn"), [(64, 170), (32, 85), (1536, 4096), (96, 256)])
def test_ffn_size(width, ffn):
    assert PiDConfig(hidden_size=width, num_groups=1).ffn_size == ffn


@pytest.mark.parametrize(("depth", "interval", "points"), [(14, 2, 7), (3, 2, 2), (4, 5, 1)])
def test_num_injections(depth, interval, points):
    assert PiDConfig(patch_depth=depth, lq_interval=interval).num_injections == points


@pytest.mark.parametrize("config", [PiDConfig(), V15, PLAIN], ids=["released", "v1.5", "plain"])
def test_dict_round_trip(config):
    assert PiDConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_published_dicts():
    """Fields without effect are dropped; no lq_ field at all is the text-to-image backbone."""
    assert PiDConfig.from_dict({"hidden_size": 64, "num_groups": 2}).lq_latent_channels is None
    inert = {"lq_in_channels": 0, "use_text_rope": True, "num_text_blocks": 4, "zero_init_lq": True}
    assert PiDConfig.from_dict({**TINY, **inert}) == PiDConfig(**TINY)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 3}, r"PiDConfig: unknown field 'width'"),
        ({"lq_in_channels": 3}, r"PiDConfig: lq_in_channels = 3 is not supported .* expected 0"),
        ({"enable_ed": True}, r"PiDConfig: enable_ed = True is not supported .* expected False"),
        ({"use_text_rope": False}, r"PiDConfig: use_text_rope = False is not supported"),
    ],
)
def test_fields_it_cannot_honour(values, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        PiDConfig.from_dict({**TINY, **values})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_size": 0}, "hidden_size must be an integer >= 1, got 0"),
        ({"patch_depth": 2.0}, "patch_depth must be an integer >= 1, got 2.0"),
        ({"patch_size": True}, "patch_size must be an integer >= 1, got True"),
        ({"lq_num_res_blocks": -1}, "lq_num_res_blocks must be an integer >= 0, got -1"),
        ({"num_groups": 3}, "hidden_size must be divisible by num_groups = 3, got 32"),
        ({"num_groups": 16}, "hidden_size / num_groups must be a multiple of 4, got 2"),
        (
            {"pixel_num_groups": 5},
            "pixel_attn_hidden_size must be divisible by pixel_num_groups = 5, got 24",
        ),
        ({"pixel_hidden_size": 6}, "pixel_hidden_size must be a multiple of 4, got 6"),
        ({"rope_mode": "yarn"}, "rope_mode must be one of original, ntk_aware, got 'yarn'"),
        ({"lq_gate_type": "none"}, "lq_gate_type must be one of .*, got 'none'"),
        ({"lq_conv_padding_mode": "same"}, "lq_conv_padding_mode must be one of .*, got 'same'"),
        (
            {"lq_latent_unpatchify_factor": 3},
            r"lq_latent_channels must be divisible by lq_latent_unpatchify_factor\^2 = 9, got 4",
        ),
        ({"lq_hidden_dim": 6}, r"lq_hidden_dim must be divisible by 4 .*, got 6"),
        ({"sr_scale": 3, "patch_size": 16}, "one latent cell must cover a whole number of patches"),
    ],
)
def test_impossible_geometry(values, message):
    with pytest.raises(ValueError, match=f"^PiDConfig: {message}"):
        PiDConfig(**{**TINY, **values})


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PiDConfig().hidden_size = 1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"lq_latent_channels": 0}, "lq_latent_channels must be None or an integer >= 1, got 0"),
        ({"rope_ref_h": 8}, "rope_ref_h must be at least patch_size = 16, got 8"),
        (
            {"lq_aux_rgb_head": True, "sr_scale": 32, "latent_spatial_down_factor": 1},
            "patch_size must be divisible by sr_scale = 32",
        ),
        (
            {"lq_aux_rgb_head": True, "lq_aux_rgb_head_latent_block_idx": 5},
            "lq_aux_rgb_head_latent_block_idx must be at most lq_num_res_blocks = 4, got 5",
        ),
    ],
)
def test_impossible_latent_branch(values, text):
    with pytest.raises(ValueError) as raised:
        PiDConfig(**values)
    assert text in str(raised.value)
