"""Plans: what is chosen for a budget, in which order, and what is said of it."""

from __future__ import annotations

import dataclasses
import json

import pytest
from click.testing import CliRunner
from tiny_pid import CONFIG

from pixeldiff.cli import main
from pixeldiff.errors import BudgetError
from pixeldiff.memory import cheaper, estimate_memory, parsed_bytes, plan
from pixeldiff.memory.budget import in_words, upward

FLUX = {"device": "cuda"}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        (123, 123),
        ("123", 123),
        ("4GB", 4_000_000_000),
        ("4 gb", 4_000_000_000),
        ("1.5g", 1_500_000_000),
        (" 512MiB ", 512 << 20),
        ("0.5TiB", 1 << 39),
        (".5kB", 500),
        ("7b", 7),
    ],
)
def test_amounts(text, count):
    assert parsed_bytes("memory", text) == count


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ("", ValueError),
        ("GB", ValueError),
        ("4XB", ValueError),
        ("-4GB", ValueError),
        ("4,5GB", ValueError),
        ("1e9", ValueError),
        ("0GB", ValueError),
        (0, ValueError),
        (-1, ValueError),
        (True, TypeError),
        (4e9, TypeError),
        (["4GB"], TypeError),
    ],
)
def test_no_amounts(value, error):
    with pytest.raises(error, match="memory must be"):
        parsed_bytes("memory", value)


def test_amounts_in_words():
    assert in_words(1_254_000_000) == "1.25 GB"
    assert upward(1_251_000_000) == "1.26 GB"
    assert (in_words(340_400_000), upward(340_400_000)) == ("340 MB", "341 MB")


# ---- What is chosen ----------------------------------------------------------------------------


def settings(size, budget, **options):
    return plan("flux-2k", size, budget, **{**FLUX, **options}).settings


def test_more_memory_is_never_slower():
    """From the fastest on, each way takes over where the one before no longer fits."""
    chunked = {"low_memory": True, "pixel_chunk": 1024}
    assert settings(2048, "24GB") == {}
    assert settings(2048, "4GB") == {"low_memory": True}
    assert settings(2048, "3.4GB") == chunked
    assert settings(2048, "3GB") == {**chunked, "offload": "blocks"}
    small = settings(2048, "800MB")
    assert small["tile"] == (32, 32)
    assert small["offload"] == "blocks"


def test_a_plan_fits_and_the_one_before_does_not():
    for budget in ("4GB", "3.4GB", "2GB", "900MB"):
        found = plan("flux-2k", 2048, budget, **FLUX)
        assert found.estimate.peak <= parsed_bytes("memory", budget)
        assert all(count > parsed_bytes("memory", budget) for _, count in found.refused)
        again = estimate_memory("flux-2k", 2048, **FLUX, **found.settings)
        assert again == found.estimate


def test_weights_on_their_device_stay_there():
    found = plan("flux-2k", 2048, "3.3GB", loaded=True, **FLUX)
    assert "offload" not in found.settings
    assert found.settings["tile"] == (48, 48)
    assert not found.same_pixels
    assert "other pixels" in str(found)


def test_tiles_are_not_chosen_where_they_are_forbidden():
    with pytest.raises(BudgetError, match=r"is too little .* would do is 3\.\d\d GB") as caught:
        plan("flux-2k", 2048, "3GB", loaded=True, tiles=False, **FLUX)
    least = estimate_memory("flux-2k", 2048, low_memory=True, pixel_chunk=1024, **FLUX).peak
    assert caught.value.smallest == least


def test_the_smallest_budget_that_is_named_does():
    config = dataclasses.replace(CONFIG, lq_latent_channels=16)
    with pytest.raises(BudgetError) as caught:
        plan(config, 512, 1000, device="cuda")
    smallest = caught.value.smallest
    assert plan(config, 512, smallest, device="cuda").estimate.peak == smallest
    with pytest.raises(BudgetError):
        plan(config, 512, smallest - 1, device="cuda")


def test_what_was_asked_for_is_kept():
    assert settings(2048, "3.6GB", pixel_chunk=2048) == {"low_memory": True}
    four = estimate_memory("flux-2k", 2048, tile=(32, 32), tile_batch=4, **FLUX).peak
    found = plan("flux-2k", 2048, four - 1, tile=(32, 32), tile_batch=4, **FLUX)
    assert found.settings == {"tile_batch": 1}
    assert "as asked for" in found.way.words
    assert settings(2048, "16GB", precision="fp32") == {}


def test_more_tiles_together_where_they_fit():
    config = dataclasses.replace(CONFIG, rope_ref_h=128, rope_ref_w=128)
    least = plan(config, 1024, "1GB", device="cuda", tiles=True).estimate.peak
    found = plan(config, 1024, least - 1, device="cuda", loaded=True)
    assert found.settings.get("tile_batch") in (2, 4) or "tile" not in found.settings


def test_fp8_is_never_chosen():
    for budget in ("6GB", "3GB", "800MB"):
        assert "precision" not in settings(2048, budget)


def test_l2p_goes_from_guidance_apart_to_the_local_decoder_to_tiles():
    def chosen(budget, **options):
        return plan("l2p-1k", 1024, budget, device="cuda", **options)

    assert chosen("16GB").settings == {}
    small = chosen("13GB", loaded=True).settings
    assert small["guidance_together"] is False
    assert small["decoder_memory"] <= 1_000_000_000
    assert chosen("4GB").settings["offload"] == "blocks"
    with pytest.raises(BudgetError, match="smallest budget"):
        chosen("1GB", loaded=True, tiles=False)


def test_the_next_cheaper_way():
    first = cheaper("flux-2k", 2048, {}, **FLUX)
    assert first.settings == {"low_memory": True}
    assert first.instead_of.startswith("whole, ")
    assert first.metadata == {"way": first.way.words, "instead_of": first.instead_of}
    second = cheaper("flux-2k", 2048, first.settings, **FLUX)
    assert second.settings == {"low_memory": True, "pixel_chunk": 1024}
    third = cheaper("flux-2k", 2048, second.settings, **FLUX)
    assert third.settings["tile_mode"] in ("sync", "independent")
    assert cheaper("flux-2k", 2048, second.settings, tiles=False, **FLUX) is None


# ---- The command -------------------------------------------------------------------------------


def run(*args):
    result = CliRunner().invoke(main, ["plan", *args])
    return result.exit_code, result.output


def test_the_command():
    code, text = run("--model", "flux-2k", "--size", "2048", "--memory", "4GB")
    assert code == 0
    assert "within 4.00 GB: whole, features anew in every step" in text
    assert "4.14 GB  whole" in text
    code, text = run("--size", "2048x1024", "--memory", "6GB", "--json")
    told = json.loads(text)
    assert (code, told["budget"], told["same_pixels"]) == (0, 6_000_000_000, True)
    assert told["estimate"]["peak"] <= 6_000_000_000
    code, text = run("--size", "1024", "--live")
    assert code == 0
    assert "alive at the worst moment" in text
    assert "MB  7 x aten.addmm" in text


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("--size", "1024", "--memory", "100MB"), 1, "the smallest budget that would do is"),
        (("--size", "1024", "--memory", "lots"), 1, "like '4GB' or '1.5GiB', got 'lots'"),
        (("--size", "big"), 2, "--size must be 2048 or HEIGHTxWIDTH"),
        (("--size", "1000"), 1, "a multiple of 32"),
        (("--size", "1024", "--model", "flux"), 1, "is a backbone"),
    ],
)
def test_the_command_refuses(args, code, words):
    found, text = run(*args)
    assert found == code
    assert words in " ".join(text.split())
