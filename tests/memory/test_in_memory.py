"""Decodes and images held to a budget, and made again where memory ran out."""

from __future__ import annotations

import gc
import platform
import warnings
import weakref

import pytest
import torch
from tiny_pid import CONFIG, tiny_caption, tiny_latent, tiny_net

from pixeldiff.errors import BudgetError, MemoryWarning
from pixeldiff.memory import estimate_memory, heap, plan
from pixeldiff.models.l2p import L2PConfig, L2PNet, L2PPipeline
from pixeldiff.models.pid import PiDDecoder, PiDNet, tiling

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.fixture
def decoder():
    return PiDDecoder(tiny_net())


def pixels(decoder, **options):
    latent, caption = tiny_latent(1, 16, 16), tiny_caption()
    return decoder.decode(latent, caption=caption, seed=3, output="pt", **options)


def planted(monkeypatch, kind, method, at, error):
    """The `at`-th call of a method fails, holding a tensor as a kernel's workspace would."""
    original, calls, held = getattr(kind, method), [], []

    def failing(self, *args, **options):
        if self.device.type == "meta":  # an estimate's
            return original(self, *args, **options)
        calls.append(method)  # not the arguments: they would be kept
        workspace = torch.zeros(1000)
        held.append(weakref.ref(workspace))
        if len(calls) == at:
            raise error
        return original(self, *args, **options)

    monkeypatch.setattr(kind, method, failing)
    return calls, held


# ---- A budget ----------------------------------------------------------------------------------


def test_a_budget_that_is_enough_changes_nothing(decoder):
    plain, held = pixels(decoder), pixels(decoder, memory="4GB")
    assert torch.equal(plain.images, held.images)
    assert held.metadata["memory"] == {"way": "whole", "budget": 4_000_000_000}
    assert "memory" not in plain.metadata


def test_a_budget_chooses_ways_with_the_same_pixels_first(decoder):
    whole = decoder.estimate_memory(512, steps=4).peak
    found = pixels(decoder, memory=whole - 1)
    assert (
        "low_memory" in str(found.metadata["memory"]) or found.metadata["memory"]["way"] != "whole"
    )
    torch.testing.assert_close(found.images, pixels(decoder).images, atol=1e-4, rtol=1e-4)
    assert "tile" not in found.metadata


def test_a_budget_may_choose_tiles_and_says_so(decoder):
    latent = tiny_latent(1, 40, 40)
    model, size, asked, _ = decoder.memory_question((latent,), {"steps": 1})
    with pytest.raises(BudgetError) as caught:
        plan(model, size, 1000, tiles=False, loaded=True, **asked)
    below = caught.value.smallest - 1
    with pytest.warns(MemoryWarning, match=r"chose tiles of .*: other pixels"):
        found = decoder.decode(latent, caption=tiny_caption(), seed=3, steps=1, memory=below)
    assert found.metadata["tile"]
    assert found.metadata["memory"]["budget"] == below


def test_a_plan_is_a_budget(decoder):
    chosen = plan(CONFIG, 512, "4GB", device="cpu")
    assert pixels(decoder, memory=chosen).metadata["memory"]["way"] == "whole"


def test_too_little_fails_before_any_work(decoder, monkeypatch):
    monkeypatch.setattr(decoder.net, "prepare", None)
    with pytest.raises(BudgetError, match=r"memory = 1 MB is too little .* smallest budget"):
        pixels(decoder, memory="1MB")
    with pytest.raises(ValueError, match=r"like '4GB' or '1\.5GiB', got 'much'"):
        pixels(decoder, memory="much")
    with pytest.raises(TypeError, match="memory must be bytes or text"):
        pixels(decoder, memory=4.5)


def test_given_tiles_stay(decoder):
    found = pixels(decoder, memory="4GB", tile=(8, 8), tile_mode="independent")
    assert found.metadata["tile"] == [8, 8]
    assert found.metadata["memory"]["way"] == "tiles as asked for"
    with pytest.raises(BudgetError, match=r"would do is .* .tiles as asked for"):
        pixels(decoder, memory="1MB", tile=(8, 8))


# ---- Memory that ran out -----------------------------------------------------------------------


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_made_again_in_less(decoder, monkeypatch, error):
    plain = pixels(decoder).images
    calls, _ = planted(monkeypatch, PiDNet, "student_step", 3, error)
    with pytest.warns(MemoryWarning, match=r"ran out \(.*\). Not finished: whole, .* Made again: "):
        found = pixels(decoder)
    torch.testing.assert_close(found.images, plain, atol=1e-4, rtol=1e-4)
    assert len(calls) == 2 + 1 + 4
    assert found.metadata["memory"]["instead_of"].startswith("whole, ")
    assert found.metadata["seed"] == 3


def test_nothing_of_the_failed_decode_is_kept(decoder, monkeypatch):
    """Its tensors are gone when the second one begins."""
    seen = []
    _, held = planted(monkeypatch, PiDNet, "student_step", 2, ERRORS[0])
    prepare = PiDNet.prepare

    def watched(self, *args, **options):
        if self.device.type == "meta":  # an estimate's
            return prepare(self, *args, **options)
        gc.collect()
        seen.append([ref() is not None for ref in held])
        condition = prepare(self, *args, **options)
        held.append(weakref.ref(condition.text))
        return condition

    monkeypatch.setattr(PiDNet, "prepare", watched)
    with pytest.warns(MemoryWarning):
        pixels(decoder)
    assert len(seen) == 2
    assert seen[1] == [False] * 3  # the condition and two workspaces


def test_a_callers_generator_is_set_back(decoder, monkeypatch):
    def made(**options):
        generator = torch.Generator().manual_seed(7)
        latent, caption = tiny_latent(1, 16, 16), tiny_caption()
        return decoder.decode(latent, caption=caption, generator=generator, output="pt").images

    plain = made()
    planted(monkeypatch, PiDNet, "student_step", 3, ERRORS[0])
    with pytest.warns(MemoryWarning):
        torch.testing.assert_close(made(), plain, atol=1e-4, rtol=1e-4)


def test_other_pixels_only_under_a_budget(monkeypatch):
    """Nothing but tiles is left that takes less."""
    latent, caption = tiny_latent(1, 40, 40), tiny_caption()
    decoder = PiDDecoder(tiny_net(), low_memory=True, pixel_chunk=16)

    def decode(**options):
        planted(monkeypatch, PiDNet, "student_step", 1, ERRORS[0])
        return decoder.decode(latent, caption=caption, seed=3, steps=1, **options)

    with warnings.catch_warnings():
        warnings.simplefilter("error", MemoryWarning)
        with pytest.raises(torch.OutOfMemoryError):
            decode()
    with pytest.warns(MemoryWarning, match=r"Made again: tiles .*: other pixels"):
        assert decode(memory="4GB").metadata["tile"]


def test_once_and_no_more(decoder, monkeypatch):
    original = PiDNet.student_step

    def never(self, *args, **options):
        if self.device.type == "meta":  # an estimate's
            return original(self, *args, **options)
        raise torch.OutOfMemoryError("CUDA out of memory again")

    monkeypatch.setattr(PiDNet, "student_step", never)
    with pytest.warns(MemoryWarning), pytest.raises(torch.OutOfMemoryError, match="again"):
        pixels(decoder)


def test_other_errors_pass(decoder, monkeypatch):
    calls, _ = planted(monkeypatch, PiDNet, "student_step", 1, RuntimeError("a bug"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="a bug"):
            pixels(decoder)
    assert len(calls) == 1


def test_given_tiles_do_not_change(decoder, monkeypatch):
    """Tiles were asked for: their pixels stay, one tile a network call."""
    options = {"tile": (8, 8), "tile_batch": 4}
    plain = pixels(decoder, **options)
    planted(monkeypatch, PiDNet, "step", 3, ERRORS[0])
    with pytest.warns(MemoryWarning, match="Made again: tiles as asked for, one in a network call"):
        found = pixels(decoder, **options)
    assert found.metadata["tile"] == [8, 8]
    torch.testing.assert_close(found.images, plain.images, atol=1e-4, rtol=1e-4)


def test_finished_tiles_are_kept(decoder, monkeypatch):
    """Of independent tiles only those of the group that failed are made again, one by one."""
    options = {"tile": (8, 8), "tile_mode": "independent", "tile_batch": 2, "steps": 1}
    plain, made = pixels(decoder, **options), []
    original = tiling._sample_alone

    def failing(tiles, group, noise):
        made.append(group)
        if len(made) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(tiles, group, noise)

    monkeypatch.setattr(tiling, "_sample_alone", failing)
    with pytest.warns(MemoryWarning, match="tiles 5 to 6 of 9.*one at a time"):
        found = pixels(decoder, **options)
    torch.testing.assert_close(found.images, plain.images, atol=1e-4, rtol=1e-4)
    assert [len(group) for group in made] == [2, 2, 2, 1, 1, 1, 1, 1]
    assert len({tile for group in made for tile in group}) == 9


# ---- L2P ---------------------------------------------------------------------------------------

SMALL = L2PConfig(
    patch_size=16, dim=48, n_heads=2, n_layers=2, n_refiner_layers=1, cap_feat_dim=20,
    axes_dims=(8, 8, 8),
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    torch.manual_seed(0)
    return L2PPipeline(L2PNet(SMALL).requires_grad_(False))


def picture(pipeline, side=128, **options):
    embeds = torch.linspace(-1, 1, 5 * 20).reshape(1, 5, 20)
    return pipeline(
        prompt_embeds=embeds, negative_prompt_embeds=embeds.flip(1), height=side, width=side,
        num_inference_steps=2, guidance_scale=2.0, seed=1, output_type="pt", **options,
    )  # fmt: skip


def test_l2p_within_a_budget(pipeline):
    plain = picture(pipeline)
    whole = pipeline.estimate_memory(128, guided=True, steps=2).peak
    found = picture(pipeline, memory=whole - 1)
    assert found.metadata["guidance_together"] is False
    torch.testing.assert_close(found.images, plain.images, atol=1e-4, rtol=1e-4)
    assert picture(pipeline, memory="4GB").metadata["memory"]["way"] == "whole"
    with pytest.raises(BudgetError, match="smallest budget"):
        picture(pipeline, memory="1MB")


def test_l2p_made_again_in_less(pipeline, monkeypatch):
    plain = picture(pipeline, side=256)
    planted(monkeypatch, L2PNet, "decoded", 2, ERRORS[0])
    with pytest.warns(MemoryWarning, match="Made again: whole, guidance apart"):
        found = picture(pipeline, side=256)
    torch.testing.assert_close(found.images, plain.images, atol=1e-4, rtol=1e-4)
    assert found.metadata["memory"]["instead_of"].startswith("whole")


# ---- The commands ------------------------------------------------------------------------------


def test_the_commands(tmp_path):
    from click.testing import CliRunner
    from safetensors.torch import save_file

    from pixeldiff.cli import main

    save_file({"latent": tiny_latent(1, 4, 4)}, tmp_path / "latent.safetensors")
    args = ["decode", str(tmp_path / "latent.safetensors"), "-o", str(tmp_path / "out.png")]
    args += ["--model", "demo", "--device", "cpu", "--steps", "1", "--quiet"]
    result = CliRunner().invoke(main, [*args, "--memory", "2GB"])
    assert result.exit_code == 0, result.output
    assert not heap.returns_freed_memory()  # there is room for what the heap keeps
    (tmp_path / "out.png").unlink()
    result = CliRunner().invoke(main, [*args, "--memory", "1MB"])
    assert result.exit_code == 1
    assert "the smallest budget that would do is" in " ".join(result.output.split())
    assert heap.returns_freed_memory() == (platform.libc_ver()[0] == "glibc")
    result = CliRunner().invoke(main, [*args, "--memory", "1XB"])
    assert "--memory must be a number of bytes with a unit" in " ".join(result.output.split())
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize(("allowed", "budget", "returned"), [
    (True, 1.2, True), (True, 1.3, False), (False, 1.2, False),
])  # fmt: skip
def test_a_tight_budget_has_freed_memory_given_back_where_that_was_allowed(
    decoder, monkeypatch, allowed, budget, returned
):
    """Never in a host that did not allow it: it costs time, and is all of a process's."""
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    calls = []
    monkeypatch.setattr(heap, "return_freed_memory", lambda: calls.append(1))
    if allowed:
        heap.allow_returning()
    question = decoder.memory_question((tiny_latent(1, 16, 16),), {"caption": tiny_caption()})
    peak = estimate_memory(*question[:2], **question[2]).peak
    pixels(decoder, memory=int(budget * peak))
    assert bool(calls) == returned
