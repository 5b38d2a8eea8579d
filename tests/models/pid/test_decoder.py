"""PiDDecoder: what it accepts, what it refuses, what it reports, and what decides the pixels."""

from __future__ import annotations

import dataclasses
import json
import threading
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pid import CONFIG, save_net, tiny_caption, tiny_latent, tiny_net

import pixeldiff
from pixeldiff.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    SizeError,
    UntrainedSizeWarning,
)
from pixeldiff.models.noise import NoiseSource
from pixeldiff.models.pid import checkpoint as checkpoint_module
from pixeldiff.models.pid import decoder as decoder_module
from pixeldiff.models.pid.captions import CaptionSource
from pixeldiff.models.pid.decoder import Interrupted, LicenceNotice, PiDDecoder
from pixeldiff.models.pid.samplers import (
    dynamic_shift,
    sample_student,
    sample_teacher,
    student_times,
    teacher_times,
)
from pixeldiff.models.pid.variants import DynamicShift, SamplingSettings, variant
from pixeldiff.text import CaptionFile

TEACHER = SamplingSettings(steps=3, times=None, stochastic=False, cfg_scale=2.5, shift=3.0)


@pytest.fixture(scope="module")
def net():
    return tiny_net()


@pytest.fixture
def decoder(net):
    captions = CaptionSource(CONFIG.txt_embed_dim, null_caption=tiny_caption(seed=2))
    return PiDDecoder(net, captions=captions, backbone="flux", name="tiny")


@pytest.fixture
def teacher(net):
    return PiDDecoder(net, sampling=TEACHER)


def pixels(decoder, latent=None, *, output="pt", **options):
    options.setdefault("seed", 0)
    latent = tiny_latent() if latent is None else latent
    return decoder.decode(latent, output=output, **options).images


# --- what decides the pixels


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("sample_type", ["sde", "ode"])
def test_equals_network_and_sampler_put_together_by_hand(decoder, net, steps, sample_type):
    latent, y = tiny_latent(2, 2, 3), tiny_caption(2)
    draw = NoiseSource(torch.Generator().manual_seed(11), "cpu")
    sigma = torch.tensor([0.1, 0.7])
    with torch.no_grad():
        expected = sample_student(
            lambda x, tau: net(x, torch.full((2,), tau), y, lq_latent=latent, degrade_sigma=sigma),
            draw((2, 3, 64, 96)),
            student_times(steps),
            draw,
            sample_type=sample_type,
        ).clamp(-1, 1)
    got = pixels(
        decoder, latent, caption=y, sigma=[0.1, 0.7], steps=steps, seed=11, sample_type=sample_type
    )
    assert got.shape == (2, 3, 64, 96)
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_same_seed_same_pixels_other_seed_others(decoder):
    first = pixels(decoder, seed=3)
    assert torch.equal(first, pixels(decoder, seed=3))
    assert not torch.equal(first, pixels(decoder, seed=4))
    assert first.std() > 0.05


def test_every_input_shows_in_the_pixels(decoder):
    base = pixels(decoder)
    others = {
        "latent": pixels(decoder, tiny_latent(seed=6)),
        "caption": pixels(decoder, caption=tiny_caption()),
        "sigma": pixels(decoder, sigma=0.5),
        "steps": pixels(decoder, steps=3),
        "sampler": pixels(decoder, sample_type="ode"),
    }
    for name, other in others.items():
        assert (base - other).abs().max() > 1e-3, name


def test_state_dtype_changes_the_arithmetic_little(decoder):
    wide, narrow = pixels(decoder, state_dtype="fp64"), pixels(decoder, state_dtype="fp32")
    assert 0 < (wide - narrow).abs().max() < 1e-4


def test_generator_equals_its_seed(decoder):
    drawn = pixels(decoder, seed=None, generator=torch.Generator().manual_seed(8))
    assert torch.equal(drawn, pixels(decoder, seed=8))


def test_with_one_generator_each_a_sample_does_not_depend_on_its_batch(decoder):
    latent = tiny_latent(3)
    seeds = [5, 6, 5]
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    result = decoder.decode(latent, generator=generators, output="pt")
    assert result.metadata["seed"] == seeds
    for i, seed in enumerate(seeds):
        alone = pixels(decoder, latent[i : i + 1], seed=seed)
        torch.testing.assert_close(result.images[i : i + 1], alone, rtol=0, atol=2e-5)


def test_without_a_seed_one_is_drawn_and_reported(decoder):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = decoder.decode(tiny_latent(), output="pt")
    second = decoder.decode(tiny_latent(), output="pt")
    assert first.metadata["seed"] != second.metadata["seed"]
    assert torch.equal(first.images, pixels(decoder, seed=first.metadata["seed"]))
    assert torch.equal(torch.get_rng_state(), state), "the host's generator was drawn from"


def test_a_used_generator_has_no_seed_to_report(decoder):
    generator = torch.Generator().manual_seed(8)
    first = decoder.decode(tiny_latent(), generator=generator).metadata
    second = decoder.decode(tiny_latent(), generator=generator).metadata
    assert (first["seed"], second["seed"]) == (8, None)
    both = [generator, torch.Generator().manual_seed(9)]
    assert decoder.decode(tiny_latent(2), generator=both).metadata["seed"] == [None, 9]


def test_two_threads_decode_what_one_does(decoder):
    latents = [tiny_latent(seed=s) for s in range(4)]
    serial = [pixels(decoder, latent, seed=i) for i, latent in enumerate(latents)]
    parallel = [None] * len(latents)

    def work(first):
        for i in range(first, len(latents), 2):
            parallel[i] = pixels(decoder, latents[i], seed=i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(serial, parallel, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_of_the_caller_does_not_matter(decoder, net, mode):
    expected = pixels(decoder)
    with mode():
        image = pixels(decoder, tiny_latent().requires_grad_(mode is torch.enable_grad))
    assert torch.equal(image, expected)
    assert not image.requires_grad


def test_autocast_of_the_caller_does_not_matter(decoder):
    expected = pixels(decoder)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pixels(decoder), expected)
        assert torch.is_autocast_enabled("cpu")


def test_trainable_network_and_latent_leave_no_graph():
    net = tiny_net().requires_grad_(True)
    decoder = PiDDecoder(net)
    latent, y = tiny_latent().requires_grad_(), tiny_caption().requires_grad_()
    sigma = torch.tensor(0.3, requires_grad=True)
    assert not pixels(decoder, latent, caption=y, sigma=sigma).requires_grad
    assert latent.grad is None


def test_null_caption_made_in_inference_mode_serves_outside(net):
    decoder = PiDDecoder(net, captions=CaptionSource(16, text_encoder=WordCount()))
    with torch.inference_mode():
        inside = pixels(decoder)
    assert torch.equal(pixels(decoder), inside)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_latents_of_any_float(decoder, dtype):
    latent = tiny_latent().to(dtype)
    assert torch.equal(pixels(decoder, latent), pixels(decoder, latent.float()))


def test_latents_of_any_strides_are_left_as_they_are(decoder):
    latent = tiny_latent(2, 2, 3)
    view = latent.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    before = view.clone()
    assert torch.equal(pixels(decoder, view), pixels(decoder, latent))
    assert torch.equal(view, before)


def test_bf16_network_is_close_to_fp32(decoder):
    captions = CaptionSource(16, null_caption=tiny_caption(seed=2))
    narrow = PiDDecoder(tiny_net(dtype=torch.bfloat16), captions=captions)
    result = narrow.decode(tiny_latent(), seed=0, output="pt")
    assert result.metadata["precision"] == "bf16"
    assert result.images.dtype == torch.float32
    error = (result.images - pixels(decoder)).square().mean().sqrt()
    assert 0 < error < 0.1


# --- sizes, batches, captions, sigma


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 4), (3, 2)])
def test_own_size_of_any_latent(decoder, height, width):
    result = decoder.decode(tiny_latent(2, height, width), seed=0)
    assert [image.size for image in result.images] == [(32 * width, 32 * height)] * 2
    assert result.metadata["size"] == [32 * height, 32 * width]


def test_another_size_warns_and_gives_it(decoder):
    with pytest.warns(UntrainedSizeWarning, match="64 x 64"):
        image = pixels(decoder, size=(96, 64))
    assert image.shape == (1, 3, 96, 64)


@pytest.mark.parametrize("size", [(100, 64), (64, 0), (-64, 64), (64,), (64.0, 64), "64x64"])
def test_impossible_sizes_are_refused(decoder, size):
    with pytest.raises(SizeError, match="size"):
        pixels(decoder, size=size)


def test_impossible_size_names_the_nearest(decoder):
    with pytest.raises(SizeError, match="96 or 112"):
        pixels(decoder, size=(100, 64))


def test_one_caption_serves_a_batch(decoder):
    latent, y = tiny_latent(2), tiny_caption()
    both = pixels(decoder, latent, caption=y)
    assert torch.equal(both, pixels(decoder, latent, caption=y.expand(2, -1, -1)))
    assert torch.equal(both, pixels(decoder, latent, caption=CaptionFile(y)))


@pytest.mark.parametrize(
    "sigma", [0.3, torch.tensor(0.3), [0.3, 0.3], torch.tensor([[0.3], [0.3]])]
)
def test_sigma_in_any_form(decoder, sigma):
    latent = tiny_latent(2)
    assert torch.equal(pixels(decoder, latent, sigma=sigma), pixels(decoder, latent, sigma=0.3))


def test_sigma_is_each_latents_own(decoder):
    latent = tiny_latent().expand(2, -1, -1, -1)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    result = decoder.decode(latent, sigma=[0.0, 0.9], generator=generators, output="pt")
    assert (result.images[0] - result.images[1]).abs().max() > 1e-3
    assert result.metadata["sigma"] == [0.0, 0.9]


# --- refusals


def bad_latent(**change):
    latent = tiny_latent()
    for index, value in change.items():
        latent.view(-1)[int(index[1:])] = value
    return latent


@pytest.mark.parametrize(
    ("latent", "words"),
    [
        (
            bad_latent(_3=float("nan")),
            r"1 NaN of 64 values \(1.6%\), the first, nan, at",
        ),
        (
            bad_latent(_0=float("inf"), _7=float("-inf")),
            "2 infinite of 64 values",
        ),
        (torch.zeros(1, 4, 2, 2), r"\(B, 16, zh, zw\).*\(1, 4, 2, 2\)"),
        (torch.zeros(1, 16, 64), "to_pid_latent"),
        (torch.zeros(0, 16, 2, 2), r"\(0, 16, 2, 2\)"),
        (torch.zeros(1, 16, 0, 2), r"\(1, 16, 0, 2\)"),
        (torch.zeros(1, 16, 2, 2, dtype=torch.int32), "floating-point tensor, got torch.int32"),
        (np.zeros((1, 16, 2, 2), np.float32), "got ndarray"),
        (None, "got NoneType"),
    ],
)
def test_bad_latents(decoder, latent, words):
    with pytest.raises(ValueError, match=f"^latent must.*{words}"):
        decoder.decode(latent)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"steps": 5}, ValueError, r"steps must be an integer in 1\.\.4, got 5.*would repeat"),
        ({"steps": 0}, ValueError, "steps"),
        ({"steps": 2.0}, ValueError, "steps"),
        ({"steps": True}, ValueError, "steps"),
        ({"sigma": 1.5}, ValueError, r"sigma must be in \[0, 1\]"),
        ({"sigma": -0.1}, ValueError, "sigma"),
        ({"sigma": float("nan")}, ValueError, "sigma"),
        ({"sigma": [0.1, 0.2, 0.3]}, ValueError, "sigma must be one value or 1, got 3"),
        ({"sigma": "much"}, TypeError, "sigma must be a number"),
        ({"output": "jpg"}, ValueError, "output must be one of pil, pt, np, got 'jpg'"),
        ({"sample_type": "euler"}, ValueError, "sample_type must be sde or ode"),
        ({"state_dtype": "fp16"}, ValueError, "state_dtype must be one of fp64, fp32"),
        ({"seed": -1}, ValueError, "seed must be an integer"),
        ({"seed": 2**64}, ValueError, "seed must be an integer"),
        ({"seed": 1.0}, ValueError, "seed must be an integer"),
        ({"seed": True}, ValueError, "seed must be an integer"),
        ({"seed": 1, "generator": torch.Generator()}, ValueError, "exclude each other"),
        ({"generator": [torch.Generator()] * 2}, ValueError, "one generator per latent, 1, got 2"),
        ({"generator": []}, ValueError, "got 0"),
        ({"generator": [1]}, TypeError, "generator must be a torch.Generator"),
        ({"generator": 7}, TypeError, "generator must be a torch.Generator"),
        ({"caption": tiny_caption(3)}, ValueError, "caption must hold 1 or 1 captions, got 3"),
        ({"caption": torch.zeros(1, 6, 8)}, ValueError, r"\(B, T, 16\), got \(1, 6, 8\)"),
        ({"caption": "a fox"}, ValueError, "no text encoder"),
        ({"cfg_scale": 3.0}, ValueError, "cfg_scale and negative_caption are for undistilled"),
        ({"negative_caption": tiny_caption()}, ValueError, "are for undistilled"),
    ],
)
def test_bad_arguments_are_refused_before_the_network_runs(decoder, options, error, words):
    def run(*args, **kwargs):
        raise AssertionError("the network ran")

    hooks = [decoder.net.lq_proj.register_forward_pre_hook(run)]
    hooks.append(decoder.net.y_embedder.register_forward_pre_hook(run))
    try:
        with pytest.raises(error, match=words):
            decoder.decode(tiny_latent(), **options)
    finally:
        for hook in hooks:
            hook.remove()


def test_numpy_seeds_are_integers(decoder):
    result = decoder.decode(tiny_latent(), seed=np.int64(5), output="pt")
    assert json.loads(json.dumps(result.metadata))["seed"] == 5
    assert torch.equal(result.images, pixels(decoder, seed=5))


def test_a_network_that_overflows_is_reported(net):
    broken = tiny_net()
    broken.final_layer.linear.weight.fill_(float("nan"))
    decoder = PiDDecoder(broken)
    with pytest.raises(ArithmeticError, match=r"NaN at 64 x 64 in fp32"):
        decoder.decode(tiny_latent(), caption=tiny_caption())


def test_text_to_image_backbone_is_no_decoder():
    config = dataclasses.replace(CONFIG, lq_latent_channels=None, pit_lq_inject=False)
    with pytest.raises(ValueError, match="no latent branch"):
        PiDDecoder(tiny_net(config))


# --- callback


def test_callback_is_told_after_each_network_call(decoder):
    told = []
    result = decoder.decode(tiny_latent(), seed=0, output="pt", callback=told.append)
    assert [(i.step, i.steps) for i in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert [round(i.t, 3) for i in told] == [0.999, 0.866, 0.634, 0.342]
    assert torch.equal(told[-1].x0.clamp(-1, 1), result.images)


def test_returning_false_stops_and_leaves_the_decoder_as_it_was(decoder):
    expected, calls = pixels(decoder), []
    with pytest.raises(Interrupted, match="after step 2 of 4"):
        decoder.decode(tiny_latent(), callback=lambda i: calls.append(i) or i.step < 2)
    assert len(calls) == 2
    assert torch.equal(pixels(decoder), expected)


def test_what_a_callback_raises_passes_through(decoder):
    def callback(info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decoder.decode(tiny_latent(), callback=callback)
    assert not torch.is_inference_mode_enabled()
    assert torch.is_grad_enabled()


# --- output and metadata


def test_forms_of_the_result(decoder):
    tensor = pixels(decoder, tiny_latent(2, 1, 2))
    arrays = pixels(decoder, tiny_latent(2, 1, 2), output="np")
    pictures = pixels(decoder, tiny_latent(2, 1, 2), output="pil")
    assert tensor.shape == (2, 3, 32, 64)
    assert tensor.dtype == torch.float32
    assert tensor.abs().max() <= 1
    assert arrays.shape == (2, 32, 64, 3)
    assert arrays.dtype == np.float32
    np.testing.assert_allclose(arrays, (tensor.permute(0, 2, 3, 1).numpy() + 1) / 2, atol=1e-6)
    assert all(isinstance(p, Image.Image) and p.mode == "RGB" for p in pictures)
    lost = arrays * 255 - np.stack([np.asarray(p) for p in pictures])
    assert -1e-3 < lost.min() <= lost.max() < 1 + 1e-3, "8 bits are truncated, not rounded"


def test_metadata_says_how_it_was_made(decoder):
    metadata = decoder.decode(tiny_latent(), seed=7, sigma=0.2, steps=3).metadata
    assert json.loads(json.dumps(metadata)) == {
        "model": "tiny",
        "backbone": "flux",
        "pixeldiff": pixeldiff.__version__,
        "steps": 3,
        "sampler": "sde",
        "seed": 7,
        "rng": "cpu",
        "sigma": 0.2,
        "caption": None,
        "precision": "fp32",
        "state": "fp64",
        "size": [64, 64],
    }


def test_metadata_names_the_caption(net):
    decoder = PiDDecoder(net, captions=CaptionSource(16, text_encoder=WordCount()))
    latent, y = tiny_latent(2), tiny_caption()

    def caption(value):
        return decoder.decode(latent, caption=value).metadata["caption"]

    assert caption("a fox") == "a fox"
    assert caption(["a fox", "an owl"]) == ["a fox", "an owl"]
    assert caption(CaptionFile(y, captions=("baked",))) == "baked"
    assert caption(y).startswith("embeddings, sha256 ")
    assert caption(y) == caption(CaptionFile(y)) != caption(y + 1)


def test_forced_backends_are_recorded(decoder):
    def recorded():
        return decoder.decode(tiny_latent()).metadata.get("backend")

    assert recorded() is None
    with pixeldiff.backend("reference"):
        assert recorded() == "reference"
    with pixeldiff.backend(swiglu="reference"):
        assert recorded() == {"swiglu": "reference"}


# --- undistilled networks


def teacher_by_hand(net, latent, y, negative, cfg_scale, times):
    draw = NoiseSource(torch.Generator().manual_seed(0), "cpu")
    sigma = torch.zeros(latent.shape[0])

    def velocity(caption):
        def call(x, tau):
            t = torch.full((latent.shape[0],), tau)
            return net(x, t, caption, lq_latent=latent, degrade_sigma=sigma)

        return call

    with torch.no_grad():
        image = sample_teacher(
            velocity(y), velocity(negative), draw((1, 3, 64, 64)), times, cfg_scale=cfg_scale
        )
    return image.clamp(-1, 1)


@pytest.mark.parametrize("cfg_scale", [1, 4.0])
def test_teacher_equals_its_solver_put_together_by_hand(teacher, net, cfg_scale):
    y, negative = tiny_caption(), tiny_caption(seed=3)
    expected = teacher_by_hand(net, tiny_latent(), y, negative, cfg_scale, teacher_times(3, 3.0))
    options = {"negative_caption": negative} if cfg_scale != 1 else {}
    got = pixels(teacher, caption=y, cfg_scale=cfg_scale, **options)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_teacher_shift_grows_with_the_size(net):
    sampling = dataclasses.replace(TEACHER, dynamic_shift=DynamicShift(6.0, 256))
    decoder = PiDDecoder(net, sampling=sampling)
    y = tiny_caption()
    times = teacher_times(3, dynamic_shift((64, 64), 6.0, 256))
    expected = teacher_by_hand(net, tiny_latent(), y, y, 1, times)
    got = pixels(decoder, caption=y, cfg_scale=1)
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-5)


def test_teacher_metadata(teacher):
    metadata = teacher.decode(
        tiny_latent(), caption=tiny_caption(), negative_caption=tiny_caption(seed=3), steps=7
    ).metadata
    wanted = {"sampler": "dpmpp_2m", "steps": 7, "cfg_scale": 2.5, "state": "fp32"}
    assert wanted.items() <= metadata.items()
    assert metadata["negative_caption"].startswith("embeddings")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, r"cfg_scale = 2.5 needs negative_caption"),
        ({"cfg_scale": 1, "sample_type": "ode"}, "choices of distilled networks"),
        ({"cfg_scale": 1, "state_dtype": "fp64"}, "choices of distilled networks"),
        ({"negative_caption": tiny_caption(2)}, "negative_caption must hold 1 or 1"),
        ({"cfg_scale": 1, "steps": 0}, "steps must be an integer >= 1"),
    ],
)
def test_teacher_refusals(teacher, options, words):
    with pytest.raises(ValueError, match=words):
        teacher.decode(tiny_latent(), caption=tiny_caption(), **options)


# --- from_pretrained


@pytest.fixture
def checkpoint(tmp_path, net):
    return save_net(tmp_path / "tiny.safetensors", net)


def test_from_pretrained_gives_the_same_pixels(checkpoint, decoder):
    loaded = PiDDecoder.from_pretrained(checkpoint, device="cpu")
    assert (loaded.name, loaded.backbone) == ("tiny.safetensors", "demo")
    assert (loaded.precision, loaded.device.type, loaded.distilled) == ("fp32", "cpu", True)
    for (name, ours), theirs in zip(
        loaded.net.state_dict().items(), decoder.net.state_dict().values(), strict=True
    ):
        assert torch.equal(ours, theirs), name
    # Not to the bit: mapped from a file, the weights are aligned otherwise (see alignment.py).
    y = tiny_caption()
    torch.testing.assert_close(
        pixels(loaded, caption=y), pixels(decoder, caption=y), rtol=0, atol=2e-5
    )


def test_pixels_do_not_depend_on_alignment(decoder):
    y, latent = tiny_caption(), torch.randn(1, 16, 2, 2, generator=torch.Generator().manual_seed(5))

    def shifted(t):
        """The same values, 4 bytes off the allocator's alignment."""
        buffer = torch.empty(t.numel() + 1, dtype=t.dtype)
        buffer[1:] = t.flatten()
        assert buffer[1:].data_ptr() % 64
        return buffer[1:].view(t.shape)

    first = decoder.decode(latent, caption=y, seed=0, output="pt").images
    second = decoder.decode(shifted(latent), caption=shifted(y), seed=0, output="pt").images
    assert torch.equal(first, second)


def test_from_pretrained_in_bf16(checkpoint):
    loaded = PiDDecoder.from_pretrained(str(checkpoint), device="cpu", precision="bf16")
    assert loaded.precision == "bf16"
    assert all(p.dtype == torch.bfloat16 for p in loaded.net.parameters())


def test_demo_backbone_brings_its_own_caption_embedder(checkpoint):
    decoder = PiDDecoder.from_pretrained(checkpoint, device="cpu")
    assert decoder.null_caption().shape == (1, 6, 16)
    assert decoder.encode_caption(["a fox", "an owl"]).shape == (2, 6, 16)
    assert torch.equal(pixels(decoder), pixels(decoder, caption=""))
    decoder.release_text_encoder()
    fox, owl = pixels(decoder, caption="a fox"), pixels(decoder, caption="an owl")
    assert not torch.equal(fox, owl)


def test_null_caption_given_by_tensor_file_or_path(checkpoint, tmp_path):
    from pixeldiff.text import load_caption, save_captions

    y, path = tiny_caption(seed=4), tmp_path / "null.safetensors"
    save_captions(path, y, "", dtype=torch.float32)
    for given in (y, path, str(path), load_caption(path)):
        decoder = PiDDecoder.from_pretrained(checkpoint, device="cpu", null_caption=given)
        assert torch.equal(decoder.null_caption(), y)
        assert torch.equal(pixels(decoder), pixels(decoder, caption=y))


def test_sampling_of_an_unreleased_teacher(checkpoint):
    decoder = PiDDecoder.from_pretrained(checkpoint, device="cpu", sampling=TEACHER)
    assert not decoder.distilled
    assert decoder.decode(tiny_latent(), cfg_scale=1).metadata["steps"] == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "gpu0"}, r'device must be one like "cpu"'),
        ({"device": "meta"}, "cannot be used here"),
        ({"precision": "fp16"}, "precision must be one of fp32, bf16, fp8, got 'fp16'"),
        ({"null_caption": torch.zeros(1, 6, 8)}, r"null_caption must be embeddings \(B, T, 16\)"),
        ({"backbone": "flux"}, "flux"),
    ],
)
def test_from_pretrained_refusals(checkpoint, options, words):
    with pytest.raises(ValueError, match=words):
        PiDDecoder.from_pretrained(checkpoint, **{"device": "cpu", **options})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_cuda_device(checkpoint):
    with pytest.raises(ValueError, match="PyTorch sees no CUDA device; use 'cpu'"):
        PiDDecoder.from_pretrained(checkpoint, device="cuda")


def test_missing_and_damaged_checkpoints(tmp_path, checkpoint):
    with pytest.raises(CheckpointNotFoundError, match=r"nothing\.safetensors"):
        PiDDecoder.from_pretrained(tmp_path / "nothing.safetensors")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(checkpoint.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        PiDDecoder.from_pretrained(damaged, device="cpu")


def test_released_weights_come_with_their_licence(checkpoint, monkeypatch):
    """A released network is too large for a test: a small file is passed off as one."""
    released = variant("flux-v1.5")

    def read(*args, **options):
        loaded = checkpoint_module.read_checkpoint(*args, **options)
        return dataclasses.replace(loaded, variant=released, backbone="flux")

    monkeypatch.setattr(decoder_module, "read_checkpoint", read)
    with pytest.warns(LicenceNotice, match="non-commercial"):
        decoder = PiDDecoder.from_pretrained(checkpoint, device="cpu")
    assert decoder.name == released.checkpoint
    assert decoder.sampling is released.sampling
    with pytest.warns(UntrainedSizeWarning, match=r"flux-v1.5 was not trained near 64 x 64"):
        decoder.decode(tiny_latent(), caption=tiny_caption())


def test_unreleased_weights_come_without_a_notice(checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PiDDecoder.from_pretrained(checkpoint, device="cpu")


class WordCount:
    """The smallest text encoder: embeds a caption by its number of words."""

    def encode(self, captions):
        return torch.stack([torch.full((6, 16), len(c.split()) + 1.0) for c in captions])
