"""L2PPipeline: what it gives, what it records, what it refuses, and `pixeldiff generate`."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from tiny_l2p import LATENT, captions, config, draw, network

from pixeldiff import backend, cli
from pixeldiff.errors import CheckpointFormatError, CheckpointNotFoundError, SizeError
from pixeldiff.images import from_pil, to_uint8
from pixeldiff.models.l2p import VARIANTS, L2PPipeline
from pixeldiff.models.l2p.pipeline import SAMPLING, Sampling
from pixeldiff.models.l2p.prompts import PromptSource
from pixeldiff.models.l2p.sampler import guided, sample, start
from pixeldiff.models.l2p.scheduler import schedule
from pixeldiff.models.steps import Interrupted
from pixeldiff.picture_files import read_picture_metadata
from pixeldiff.text import CaptionFile, save_captions

SIZE = {"height": 32, "width": 48}
Y, NEGATIVE, THIRD = captions(5, 9, 5)


class Encoder:
    """Embeddings as long as the text, plus one."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.released = 0

    def encode(self, texts):
        self.texts += texts
        return [draw(len(text) + 1, 20, seed=len(text)) for text in texts]

    def release(self):
        self.released += 1


@pytest.fixture(scope="module")
def net():
    return network(config())


@pytest.fixture
def pipe(net):
    return L2PPipeline(net)


def generate(pipe, **changes):
    given = {"prompt_embeds": Y, "seed": 3, "num_inference_steps": 2, **SIZE, "output_type": "pt"}
    return pipe(**{**given, **changes})


def test_it_is_the_sampler_on_a_seeds_noise(pipe, net):
    out = generate(pipe, guidance_scale=2.0, negative_prompt_embeds=NEGATIVE, shift=5.0)
    noise = torch.randn((1, 3, 32, 48), generator=torch.Generator().manual_seed(3))
    plan = schedule(2, shift=5.0)
    predict = guided(net, [Y], [NEGATIVE], (32, 48), guidance_scale=2.0, times=plan.times)
    expected = sample(predict, noise, plan).clamp(-1, 1)
    assert torch.equal(out.images, expected)
    assert not out.images.requires_grad


def test_output_types(pipe):
    images = generate(pipe).images
    (picture,) = generate(pipe, output_type="pil").images
    assert np.array_equal(np.asarray(picture), to_uint8(images, rounded=True)[0])
    array = generate(pipe, output_type="np").images
    assert array.shape == (1, 32, 48, 3)
    assert array.min() >= 0
    assert array.max() <= 1


def test_pixels_are_rounded_as_released():
    values = torch.tensor([-2, -1, -1 + 1.2 / 127.5, -1 + 1.8 / 127.5, 0, 1, 3]).reshape(1, 1, 1, 7)
    assert to_uint8(values, rounded=True).ravel().tolist() == [0, 0, 1, 2, 128, 255, 255]
    assert to_uint8(values).ravel().tolist() == [0, 0, 1, 1, 127, 255, 255]
    every = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :, None].repeat(3, 2))
    assert np.array_equal(to_uint8(from_pil(every), rounded=True)[0], np.asarray(every))


def test_metadata(pipe):
    metadata = generate(pipe).metadata
    digest = metadata.pop("prompt")
    assert digest.startswith("embeddings, sha256 ")
    assert metadata.pop("pixeldiff")
    assert metadata == {
        "model": "custom",
        "steps": 2,
        "sampler": "euler",
        "shift": 3.0,
        "guidance_scale": 1.0,
        "seed": 3,
        "rng": "cpu",
        "precision": "fp32",
        "size": [32, 48],
    }
    image = draw(1, 3, 32, 48).clamp(-1, 1)
    with backend("reference"):
        metadata = generate(
            pipe,
            guidance_scale=2,
            negative_prompt_embeds=NEGATIVE,
            image=image,
            strength=0.5,
            strength_rule="skip",
            time_dtype="bf16",
        ).metadata
    assert metadata["negative_prompt"].startswith("embeddings, sha256 ")
    assert metadata["negative_prompt"] != digest
    assert metadata["image"].startswith("pixels, sha256 ")
    kept = ("strength", "strength_rule", "time_dtype", "guidance_together", "backend")
    assert [metadata[k] for k in kept] == [0.5, "skip", "bf16", True, "reference"]
    json.dumps(metadata)
    two = generate(pipe, prompt_embeds=[Y, NEGATIVE]).metadata["prompt"]
    assert two[0] == digest
    assert two[1] not in (digest, two[0])


def test_seeds_and_generators(pipe):
    first = generate(pipe).images
    assert torch.equal(generate(pipe).images, first)
    assert not torch.equal(generate(pipe, seed=4).images, first)
    generator = torch.Generator().manual_seed(3)
    out = generate(pipe, seed=None, generator=generator)
    assert torch.equal(out.images, first)
    assert out.metadata["seed"] == 3
    assert generate(pipe, seed=None, generator=generator).metadata["seed"] is None
    torch.manual_seed(0)
    before = torch.get_rng_state()
    drawn = generate(pipe, seed=None)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(generate(pipe, seed=drawn.metadata["seed"]).images, drawn.images)


def test_a_batch_with_generators_is_its_images_one_by_one(pipe):
    prompts = [Y, NEGATIVE]
    options = {"seed": None, "guidance_scale": 2.0, "negative_prompt_embeds": THIRD}
    batch = generate(
        pipe,
        **{**options, "prompt_embeds": prompts, "num_images_per_prompt": 2},
        generator=[torch.Generator().manual_seed(s) for s in range(4)],
    )
    assert batch.metadata["seed"] == [0, 1, 2, 3]
    for i, seed in enumerate(range(4)):
        one = generate(pipe, **{**options, "seed": seed, "prompt_embeds": prompts[i // 2]})
        torch.testing.assert_close(batch.images[i : i + 1], one.images, rtol=0, atol=2e-5)


def test_forms_of_embeddings(pipe):
    expected = generate(pipe).images
    for form in (Y[None], [Y], (Y,), CaptionFile(Y[None]), Y.clone().requires_grad_()):
        assert torch.equal(generate(pipe, prompt_embeds=form).images, expected)
    stacked = torch.stack((Y, THIRD))
    expected = generate(pipe, prompt_embeds=[Y, THIRD]).images
    assert len(expected) == 2
    for form in (stacked, (Y, THIRD), CaptionFile(stacked)):
        assert torch.equal(generate(pipe, prompt_embeds=form).images, expected)


def test_image_to_image(pipe):
    image = draw(1, 3, 32, 48).clamp(-1, 1)
    near = generate(pipe, image=image, strength=0.02).images
    far = generate(pipe, image=image, strength=0.9).images
    assert (near - image).abs().mean() < 0.5 * (far - image).abs().mean()
    picture = Image.fromarray(to_uint8(image)[0])
    size = {"height": None, "width": None}  # the picture's own
    same = generate(pipe, image=from_pil(picture)).images
    assert torch.equal(generate(pipe, image=picture, **size).images, same)
    assert torch.equal(generate(pipe, image=image, strength=1.0).images, generate(pipe).images)


def test_image_to_image_is_the_sampler_from_the_rules_own_level(pipe, net):
    image, rules = draw(1, 3, 32, 48).clamp(-1, 1), {"strength_rule": "skip", "time_dtype": "bf16"}
    out = generate(pipe, image=image, strength=0.5, num_inference_steps=4, **rules)
    plan = schedule(4, strength=0.5, **rules)
    noise = torch.randn((1, 3, 32, 48), generator=torch.Generator().manual_seed(3))
    predict = guided(net, [Y], None, (32, 48), times=plan.times)
    expected = sample(predict, start(noise, plan, image), plan).clamp(-1, 1)
    assert torch.equal(out.images, expected)
    assert not torch.equal(generate(pipe, image=image, strength=0.5).images, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_pixels_may_come_in_any_floating_point_type(pipe, dtype):
    """An image to start from, and what a callback goes on from."""
    image = draw(1, 3, 32, 48).clamp(-1, 1).to(dtype)
    given, expected = (generate(pipe, image=i) for i in (image, image.float()))
    assert torch.equal(given.images, expected.images)
    assert given.metadata == expected.metadata

    def end(pipeline, step, timestep, values):
        return {"latents": image}

    given = generate(pipe, callback_on_step_end=end).images
    assert given.dtype == torch.float32
    assert torch.equal(given, image.float())


def test_guidance_below_one_draws_towards_the_negative_prompt(pipe):
    """0 is the negative prompt's own image; a half mixes the two velocities."""
    both = {"negative_prompt_embeds": NEGATIVE, "num_inference_steps": 1}
    none = generate(pipe, guidance_scale=0.0, **both).images
    other = generate(pipe, prompt_embeds=NEGATIVE, num_inference_steps=1).images
    torch.testing.assert_close(none, other, rtol=0, atol=2e-5)
    seen = []
    for scale in (0.0, 0.5, 1.0):
        generate(pipe, guidance_scale=scale, **both, callback=lambda info: seen.append(info.x0))
    torch.testing.assert_close(seen[1], (seen[0] + seen[2]) / 2, rtol=0, atol=1e-4)


def test_the_guidance_branches_in_turn(pipe):
    options = {"guidance_scale": 3.0, "negative_prompt_embeds": NEGATIVE}
    together, in_turn = (generate(pipe, **options, guidance_together=t) for t in (True, False))
    torch.testing.assert_close(together.images, in_turn.images, rtol=0, atol=2e-5)
    assert in_turn.metadata["guidance_together"] is False


def test_decoder_memory(pipe):
    """The least budget, which the refusal names, gives the image in tiles."""
    whole, size = generate(pipe, decoder_memory=None), {"height": 96, "width": 96}
    assert torch.equal(generate(pipe).images, whole.images)
    assert whole.metadata["decoder_memory"] is None
    with pytest.raises(ValueError, match=r"decoder_memory must be at least \d+ bytes") as refused:
        generate(pipe, decoder_memory=1, **size)
    least = int(re.search(r"at least (\d+)", str(refused.value))[1])
    whole, tiled = (generate(pipe, decoder_memory=m, **size) for m in (None, least))
    torch.testing.assert_close(tiled.images, whole.images, rtol=0, atol=1e-4)
    assert tiled.metadata["decoder_memory"] == least


def test_defaults_are_those_of_the_variant(net):
    pipe = L2PPipeline(net, variant=VARIANTS["1k"])
    assert pipe.sampling == SAMPLING["1k"] == Sampling(30, 2.0, 3.0)
    assert SAMPLING["10k"] == Sampling(50, 4.0, 3.0)
    assert pipe._size(None, 512, None) == (1024, 512)
    own = L2PPipeline(net, sampling=Sampling(3, 1.5, 4.0))
    out = generate(own, num_inference_steps=None, negative_prompt_embeds=NEGATIVE).metadata
    assert (out["steps"], out["guidance_scale"], out["shift"]) == (3, 1.5, 4.0)
    assert L2PPipeline(net).sampling == Sampling(8, 1.0, 3.0)


def test_texts(net):
    encoder = Encoder()
    pipe = L2PPipeline(net, prompts=PromptSource(20, text_encoder=encoder))
    generate(pipe, guidance_scale=2.0, negative_prompt_embeds=NEGATIVE)
    assert encoder.texts == []  # embeddings need no encoder
    text = {"prompt_embeds": None, "prompt": "a fox", "guidance_scale": 2.0}
    out = generate(pipe, **text)
    assert encoder.texts == ["a fox", ""]
    assert (out.metadata["prompt"], out.metadata["negative_prompt"]) == ("a fox", "")
    given = [draw(6, 20, seed=5)], [draw(1, 20, seed=0)]
    embeds = generate(
        pipe, prompt_embeds=given[0], negative_prompt_embeds=given[1], guidance_scale=2.0
    )
    assert torch.equal(out.images, embeds.images)
    generate(pipe, prompt_embeds=None, prompt=["a", "bb"], negative_prompt="c", guidance_scale=2.0)
    assert encoder.texts[2:] == ["a", "bb", "c"]
    generate(pipe, prompt_embeds=None, prompt="no guidance", negative_prompt="unused")
    assert encoder.texts[5:] == ["no guidance"]
    pipe.release_text_encoder()
    assert encoder.released == 0  # it is the caller's
    with pytest.raises(ValueError, match=r"no text encoder \(or it was released\); pass"):
        generate(pipe, **text)


def test_what_a_text_encoder_gives_is_checked():
    class Other(Encoder):
        def encode(self, texts):
            return self.gives

    def encoded(*gives):
        encoder = Other()
        encoder.gives = list(gives)
        return PromptSource(20, text_encoder=encoder).encode("prompt", ["a fox", "a dog"])

    with pytest.raises(ValueError, match="encoder gave 1 embeddings of 2 prompts"):
        encoded(Y)
    with pytest.raises(ValueError, match=r"prompt, encoded, must be .* got \(5, 21\) for prompt 1"):
        encoded(Y, draw(5, 21))
    learning = Y.clone().requires_grad_()
    assert not any(y.requires_grad for y in encoded(learning * 2, learning))


def test_a_text_encoder_is_loaded_on_first_use(net, monkeypatch):
    from pixeldiff.models.l2p import prompts

    made = []

    def load(location, **options):
        made.append((Encoder(), location, options))
        return made[-1][0]

    monkeypatch.setattr(prompts.Qwen3PromptEncoder, "from_pretrained", load)
    source = PromptSource(20, text_encoder="some/qwen3", device="cpu")
    pipe = L2PPipeline(net, prompts=source)
    generate(pipe)
    assert made == []
    first = pipe.encode_prompt("a fox")
    pipe.encode_prompt(["x"])
    assert [m[1:] for m in made] == [("some/qwen3", {"device": "cpu", "embed_dim": 20})]
    assert first[0].shape == (6, 20)
    pipe.release_text_encoder()
    pipe.release_text_encoder()
    assert made[0][0].released == 1
    pipe.encode_prompt("again")
    assert len(made) == 2


def test_callbacks(pipe):
    seen, ended = [], []

    def end(pipeline, step, timestep, values):
        assert pipeline is pipe
        ended.append((step, timestep, sorted(values)))

    plain = generate(pipe).images
    watched = generate(pipe, callback=seen.append, callback_on_step_end=end).images
    assert torch.equal(watched, plain)
    assert [(s.step, s.steps, s.t) for s in seen] == [(1, 2, 1.0), (2, 2, 0.75)]
    assert ended == [(0, 1000.0, ["latents", "x0"]), (1, 750.0, ["latents", "x0"])]
    torch.testing.assert_close(seen[-1].x0.clamp(-1, 1), plain, rtol=0, atol=1e-5)
    zeros = generate(pipe, callback_on_step_end=lambda p, i, t, v: {"latents": 0 * v["latents"]})
    assert not zeros.images.any()
    with pytest.raises(Interrupted, match="after step 1 of 2"):
        generate(pipe, callback=lambda info: False)
    with pytest.raises(Interrupted, match="after step 1"):
        generate(pipe, callback_on_step_end=lambda *a: False)
    with pytest.raises(ValueError, match=r"latents must be \(1, 3, 32, 48\) as given, got \(2,\)"):
        generate(pipe, callback_on_step_end=lambda *a: {"latents": torch.zeros(2)})
    with pytest.raises(KeyError, match="mine"):
        generate(pipe, callback=lambda info: {}["mine"])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_network_that_is_not_finite(bad):
    net = network(config())
    net.local_decoder.out_conv.bias.data[1] = bad
    with pytest.raises(ArithmeticError, match=r"(NaN|infinity) at 32 x 48 in fp32, first"):
        generate(L2PPipeline(net), num_inference_steps=1)  # infinity turns to NaN in two


def test_a_network_whose_parameters_learn_makes_the_same_image_without_a_graph(pipe):
    net = network(config()).requires_grad_()
    calls = []
    net.layers[0].register_forward_hook(lambda m, given, h: calls.append(h.requires_grad))
    assert torch.equal(generate(L2PPipeline(net)).images, generate(pipe).images)
    assert calls == [False, False]


def test_autocast_of_the_caller_changes_nothing(pipe):
    expected = generate(pipe).images
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(generate(pipe).images, expected)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"prompt_embeds": None}, ValueError, "prompt or prompt_embeds must be given"),
        ({"prompt": "a"}, ValueError, "prompt and prompt_embeds exclude each other; pass one"),
        (
            {"prompt_embeds": None, "prompt": "a"},
            ValueError,
            "no text encoder .*pass text_encoder=",
        ),
        ({"prompt_embeds": None, "prompt": 3}, TypeError, "prompt must be a text or a list of"),
        (
            {"prompt_embeds": None, "prompt": []},
            ValueError,
            'an empty list; the empty prompt is ""',
        ),
        ({"prompt_embeds": 3}, TypeError, r"prompt_embeds must be embeddings \(T, 20\).*got int"),
        ({"prompt_embeds": []}, ValueError, "prompt_embeds must hold at least one prompt"),
        (
            {"prompt_embeds": draw(4, 21)},
            ValueError,
            r"must be embeddings \(T, 20\), got \(4, 21\)",
        ),
        ({"prompt_embeds": draw(20)}, TypeError, r"got \(20,\)"),
        ({"prompt_embeds": draw(0, 20)}, ValueError, r"must be embeddings .* got \(0, 20\) for pr"),
        ({"prompt_embeds": Y.int()}, ValueError, "floating-point embeddings, got torch.int32"),
        ({"prompt_embeds": Y / 0}, ValueError, "of prompt 0 must be finite, got .*; Qwen3 overfl"),
        ({"guidance_scale": 2.0}, ValueError, "guidance_scale = 2.0 needs the negative prompt too"),
        ({"guidance_scale": -1}, ValueError, "guidance_scale must be a number >= 0, got -1"),
        ({"guidance_scale": "2"}, ValueError, "guidance_scale must be a number >= 0, got '2'"),
        ({"guidance_scale": float("nan")}, ValueError, "guidance_scale must be a number >= 0"),
        (
            {"guidance_scale": 2.0, "negative_prompt_embeds": [Y, Y]},
            ValueError,
            "negative_prompt must hold 1 or 1 prompts, got 2",
        ),
        ({"height": 40}, SizeError, r"multiples of 16, got \(40, 48\); nearest: H 32 or 48, W 48"),
        ({"height": None}, ValueError, "height and width are needed"),
        ({"width": 48.0}, SizeError, r"two positive integers \(H, W\)"),
        ({"num_inference_steps": 0}, ValueError, "steps must be an integer >= 1, got 0"),
        ({"num_images_per_prompt": 0}, ValueError, "num_images_per_prompt must be an integer >= 1"),
        ({"num_images_per_prompt": True}, ValueError, "an integer >= 1, got True"),
        ({"generator": torch.Generator()}, ValueError, "seed and generator exclude each other"),
        ({"seed": True}, ValueError, r"seed must be an integer .* got True"),
        ({"seed": -1}, ValueError, r"seed must be an integer in \[0, 2\^64\), got -1"),
        (
            {"seed": None, "generator": [torch.Generator()] * 2},
            ValueError,
            "one generator per image",
        ),
        ({"output_type": "latent"}, ValueError, "output must be one of pil, pt, np, got 'latent'"),
        (
            {"image": "cat.png"},
            TypeError,
            "image must be a Pillow image or a floating-point tensor",
        ),
        ({"image": torch.zeros(3, 32, 48)}, ValueError, r"image must be \(B, 3, H, W\)"),
        ({"image": torch.full((1, 3, 32, 48), 255.0)}, ValueError, r"image must be in \[-1, 1\]"),
        ({"image": torch.full((1, 3, 32, 48), float("nan"))}, ValueError, "image must be finite"),
        ({"image": torch.zeros(2, 3, 32, 48)}, ValueError, "image must hold 1 or 1 images, got 2"),
        ({"image": torch.zeros(1, 3, 32, 32)}, ValueError, r"image must be of the size asked for"),
        ({"image": torch.zeros(1, 3, 32, 48), "strength": 0}, ValueError, r"strength must be in"),
    ],
)
def test_errors(pipe, changes, error, words, monkeypatch):
    def never(*args, **kwargs):
        raise AssertionError("no network call before the arguments are checked")

    monkeypatch.setattr(pipe.net, "step", never)
    with pytest.raises(error, match=words):
        generate(pipe, **changes)


def test_other_constructions(tmp_path):
    with pytest.raises(ValueError, match="is the latent model that L2P was converted from"):
        L2PPipeline(network(LATENT))
    with pytest.raises(TypeError, match="text_encoder must be a folder or hub id of a Qwen3"):
        PromptSource(20, text_encoder=3)
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, got 'fp8'"):
        L2PPipeline.from_pretrained(tmp_path / "x.safetensors", precision="fp8")
    with pytest.raises(CheckpointNotFoundError):
        L2PPipeline.from_pretrained(tmp_path / "x.safetensors", device="cpu")


@pytest.fixture
def checkpoint(net, tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_file(net.state_dict(), path, {"config": json.dumps(net.config.to_dict())})
    return path


def test_from_pretrained(net, checkpoint):
    pipe = L2PPipeline.from_pretrained(checkpoint, device="cpu")
    assert (pipe.name, pipe.precision, pipe.variant) == ("tiny.safetensors", "fp32", None)
    assert torch.equal(generate(pipe).images, generate(L2PPipeline(net)).images)
    half = L2PPipeline.from_pretrained(checkpoint, device="cpu", precision="bf16")
    out = generate(half)
    assert out.metadata["precision"] == "bf16"
    assert out.images.dtype == torch.float32
    assert (out.images - generate(pipe).images).abs().mean() < 0.05


def test_how_a_file_says_it_is_sampled(net, tmp_path):
    """Unless the caller says otherwise."""
    path, stated = tmp_path / "own.safetensors", Sampling(3, 1.5, 4.0)

    def saved(sampling):
        metadata = {"config": json.dumps(net.config.to_dict()), "sampling": sampling}
        save_file(net.state_dict(), path, metadata)

    saved(json.dumps(vars(stated)))
    assert L2PPipeline.from_pretrained(path, device="cpu").sampling == stated
    own = Sampling(5, 1.0)
    assert L2PPipeline.from_pretrained(path, device="cpu", sampling=own).sampling == own
    for bad in ("{}", '{"steps": 3, "cfg": 2}', "fast"):
        saved(bad)
        with pytest.raises(CheckpointFormatError, match=r"metadata 'sampling' of .* must be JSON"):
            L2PPipeline.from_pretrained(path, device="cpu")


def run(*args):
    return CliRunner().invoke(cli.main, [str(a) for a in args])


def test_generate_command(net, checkpoint, tmp_path):
    embeds, out = tmp_path / "fox.safetensors", tmp_path / "out.png"
    y = save_captions(embeds, Y[None], "a fox").embedding
    common = ("--model", checkpoint, "--prompt-embeds", embeds, "--device", "cpu", "--steps", 2)
    result = run("generate", *common, "-o", out, "--size", "32x48", "--seed", 3)
    assert result.exit_code == 0, result.output
    assert str(out) in result.output
    expected = generate(L2PPipeline(net), prompt_embeds=y, output_type="pil")
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected.images[0]))
    metadata = read_picture_metadata(out)
    assert (metadata["prompt"], metadata["model"]) == ("a fox", "tiny.safetensors")
    second = tmp_path / "second.png"
    result = run(
        *("generate", *common, "-o", second, "--image", out, "--size", "48x32"),
        *("--strength", 0.3, "--guidance", 2, "--negative-prompt-embeds", embeds),
    )
    assert result.exit_code == 0, result.output
    assert Image.open(second).size == (32, 48)
    assert read_picture_metadata(second)["strength"] == 0.3


@pytest.mark.parametrize("name", ["out.jpg", "out.tif"])
def test_generate_in_other_formats(net, checkpoint, tmp_path, name):
    if name.endswith("tif"):
        pytest.importorskip("tifffile")
    embeds, out = tmp_path / "fox.safetensors", tmp_path / name
    y = save_captions(embeds, Y[None], "a fox").embedding
    common = ("--model", checkpoint, "--prompt-embeds", embeds, "--device", "cpu", "--steps", 2)
    result = run("generate", *common, "-o", out, "--size", "32x48", "--seed", 3)
    assert result.exit_code == 0, result.output
    expected = np.asarray(generate(L2PPipeline(net), prompt_embeds=y, output_type="pil").images[0])
    difference = np.abs(np.asarray(Image.open(out)).astype(int) - expected)
    assert difference.mean() < 8 if name.endswith("jpg") else difference.max() == 0
    assert read_picture_metadata(out)["seed"] == 3


def test_a_format_that_cannot_hold_the_picture(checkpoint, tmp_path, monkeypatch):
    Image.new("RGB", (48, 32)).save(tmp_path / "start.png")
    monkeypatch.setattr("pixeldiff.jpeg_file.LONGEST_SIDE", 47)
    common = ("generate", "a fox", "--model", tmp_path / "not-there", "-o", tmp_path / "out.jpg")
    for args in (("--size", "32x48"), ("--image", tmp_path / "start.png")):
        result = run(*common, *args)
        assert result.exit_code == 1
        assert "at most 47 pixels a side, got 32 x 48" in " ".join(result.output.split())


def test_generate_refusals(checkpoint, tmp_path):
    embeds, out = tmp_path / "fox.safetensors", tmp_path / "out.png"
    save_captions(embeds, Y[None], "a fox")
    common = ("generate", "--model", checkpoint, "--device", "cpu", "-o", out)
    for args, code, words in (
        ((), 2, "give one of PROMPT, --prompts and --prompt-embeds"),
        (
            ("a fox", "--prompt-embeds", embeds),
            2,
            "give one of PROMPT, --prompts and --prompt-embeds",
        ),
        (("a fox", "--size", "32x48"), 1, "no text encoder"),
        (("--prompt-embeds", embeds), 1, "height and width are needed"),
        (("--prompt-embeds", embeds, "--size", "40x48"), 1, "nearest: H 32 or 48"),
        (("--prompt-embeds", embeds, "--size", "32x48", "--guidance", 2), 1, "negative prompt"),
    ):
        result = run(*common, *args)
        assert result.exit_code == code, result.output
        assert words in " ".join(result.output.split())
    assert not out.exists()
