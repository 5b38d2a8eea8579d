"""Output sizes: arithmetic, refusals with neighbours, warnings off the trained sizes."""

import warnings

import pytest

from pixeldiff.errors import SizeError, UntrainedSizeWarning
from pixeldiff.models.pid.config import PiDConfig
from pixeldiff.models.pid.sizes import (
    check_size,
    is_trained_size,
    nearest_trained_sizes,
    output_size,
    trained_sizes,
)
from pixeldiff.models.pid.variants import variant, variants

CONFIG = variant("flux-2k").config


@pytest.mark.parametrize(
    ("name", "latent", "size"),
    [
        ("flux-2k", (64, 64), (2048, 2048)),
        ("flux2-v1.5", (32, 48), (2048, 3072)),
        ("sdxl-2kto4k", (128, 96), (4096, 3072)),
        ("dinov2-2k", (32, 32), (2048, 2048)),
        ("siglip-2k", (16, 16), (2048, 2048)),
    ],
)
def test_output_size(name, latent, size):
    v = variant(name)
    assert output_size(v.config, latent) == size
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check_size(v.config, latent, None, v) == size
        assert check_size(v.config, latent, size, v) == size


def test_sizes_off_the_patch_grid_name_their_neighbours():
    text = r"multiples of patch_size 16, got \(1000, 2048\); nearest: H 992 or 1008, W 2048"
    with pytest.raises(SizeError, match=text):
        check_size(CONFIG, (64, 64), (1000, 2048))
    with pytest.raises(SizeError, match=r"nearest: H 16, W 16$"):
        check_size(CONFIG, (64, 64), (5, 16))


@pytest.mark.parametrize("size", [(0, 16), (16,), "16", (16.0, 16), (True, 16), (-16, 16)])
def test_sizes_must_be_two_positive_integers(size):
    with pytest.raises(SizeError, match="size must be two positive integers"):
        check_size(CONFIG, (4, 4), size)
    with pytest.raises(SizeError, match="latent_hw must be two positive integers"):
        check_size(CONFIG, size)


def test_a_latent_that_ends_inside_a_patch_names_legal_latents():
    config = PiDConfig(latent_spatial_down_factor=2, sr_scale=2)  # 4 x 4 cells make one patch
    assert check_size(config, (8, 12)) == (32, 48)
    with pytest.raises(SizeError, match=r"36 x 48 pixels.* multiples of 4: 8 or 12 x 12"):
        check_size(config, (9, 12))


def test_another_size_than_the_latents_own_warns():
    with pytest.warns(UntrainedSizeWarning, match="1024 x 2048 is not the latent's own size 2048"):
        assert check_size(CONFIG, (64, 64), (1024, 2048)) == (1024, 2048)


@pytest.mark.parametrize(
    ("name", "latent", "nearest"),
    [
        ("flux-2k", (32, 32), "2048 x 2048"),
        ("flux-2k", (128, 128), "2048 x 2048"),
        ("flux-v1.5", (32, 32), "2048 x 2048"),
        ("flux-v1.5", (256, 256), "4096 x 4096"),
        ("flux-2k", (32, 128), "1536 x 2688"),
        ("dinov2-2k", (32, 48), "2048 x 2048"),
    ],
)
def test_untrained_sizes_warn_and_name_the_nearest(name, latent, nearest):
    v = variant(name)
    with pytest.warns(UntrainedSizeWarning, match=f"{name} was not trained near .*: {nearest}"):
        check_size(v.config, latent, None, v)


def test_warnings_point_at_the_caller():
    with pytest.warns(UntrainedSizeWarning) as caught:
        check_size(CONFIG, (32, 32), None, variant("flux-2k"))
    assert [w.filename for w in caught] == [__file__]


def test_buckets():
    two = trained_sizes(variant("flux-2k"))
    assert len(two) == 7
    assert (2688, 1792) in two
    assert (4096, 4096) not in two
    wide = trained_sizes(variant("flux-v1.5"))
    for size in ((2048, 2048), (4096, 4096), (3584, 3584), (2176, 4096), (4096, 2304)):
        assert size in wide
    assert (3840, 3840) not in wide  # clipped to 3584
    assert {(w, h) for h, w in wide} == set(wide)
    assert all(h % 64 == 0 and w % 64 == 0 for h, w in wide)
    assert len(set(wide)) == len(wide)


def test_every_bucket_is_trained_and_its_own_nearest():
    for v in variants():
        for size in trained_sizes(v):
            assert is_trained_size(v, size)
            assert nearest_trained_sizes(v, size)[0] == size
