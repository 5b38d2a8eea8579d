"""The released networks: names, shapes and counts of every tensor, without their weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from pixeldiff.models.l2p import VARIANTS, L2PConfig
from pixeldiff.models.l2p.checkpoint_geometry import network_shapes, signature

MANIFESTS = json.loads(
    (Path(__file__).parents[2] / "golden" / "l2p_manifests" / "released.json").read_text()
)


def unfolded(tensors: dict) -> dict[str, tuple[int, ...]]:
    """ "layers.*.x" stands for as many blocks as its row says."""
    shapes = {}
    for name, (shape, count) in tensors.items():
        for i in range(1 if count is None else count):
            shapes[name.replace("*", str(i))] = tuple(shape)
    return shapes


def test_every_variant_is_there():
    assert set(VARIANTS) == set(MANIFESTS)


@pytest.mark.parametrize("name", VARIANTS)
def test_names_and_shapes(name):
    manifest, shapes = MANIFESTS[name], network_shapes(VARIANTS[name].config)
    assert shapes == unfolded(manifest["tensors"])
    assert len(shapes) == manifest["num_tensors"]
    assert sum(map(math.prod, shapes.values())) == manifest["num_parameters"]
    assert signature(shapes) == manifest["md5"]


def test_published_signatures():
    """The four that were published with the weights."""
    assert {n: MANIFESTS[n]["md5"][:8] for n in ("z-image", "4k", "8k", "10k")} == {
        "z-image": "fc3a8a12",
        "4k": "69e8fd5b",
        "8k": "df0e4e86",
        "10k": "e6094ba6",
    }


@pytest.mark.parametrize("name", VARIANTS)
def test_config_round_trip(name):
    config = VARIANTS[name].config
    text = json.dumps(config.to_dict())
    assert L2PConfig.from_dict(json.loads(text)) == config
    with pytest.raises(ValueError, match=r"^L2PConfig: unknown field 'depth'$"):
        L2PConfig.from_dict({"depth": 3})
