"""A prompt baked to a file by a Qwen3, and pictures made of it where no text encoder is."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors.torch import save_file
from tiny_l2p import config, draw, network

from pixeldiff import cli
from pixeldiff.models.l2p import L2PPipeline
from pixeldiff.models.l2p.prompts import PromptSource
from pixeldiff.models.pid.captions import CaptionSource
from pixeldiff.picture_files import read_picture_metadata
from pixeldiff.text import CaptionFile, Qwen3PromptEncoder, load_caption, save_captions

WIDTH = 2560  # of the released encoder, which the command insists on
SIZE = {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    """A Qwen3 of two layers, its words those below, of random weights."""
    transformers = pytest.importorskip("transformers", minversion="4.51")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("encoder") / "qwen3-tiny"
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=marks,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a red fox", "user\n", "assistant\n"], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=marks[0], eos_token=marks[2]
    ).save_pretrained(folder)
    torch.manual_seed(0)
    settings = transformers.Qwen3Config(
        vocab_size=300,
        hidden_size=WIDTH,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    transformers.Qwen3Model(settings).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    net = network(config(cap_feat_dim=WIDTH, n_layers=1))
    path = tmp_path_factory.mktemp("net") / "tiny.safetensors"
    save_file(net.state_dict(), path, {"config": json.dumps(net.config.to_dict())})
    return path


def run(*args, code=0):
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def test_baked_and_generated_without_the_encoder(qwen3, checkpoint, tmp_path, monkeypatch):
    """The same picture as with the encoder at hand, negative prompt and all."""
    file = tmp_path / "fox.safetensors"
    bake = ("bake-caption", "--for", "l2p", "a red fox", "-o", file, "--encoder", qwen3)
    said = run(*bake, "--negative", "blurry")
    held = load_caption(file)
    assert (held.captions, held.negative.captions) == (("a red fox",), ("blurry",))
    assert (held.encoder_id, held.family) == ("qwen3-tiny", "Qwen3")
    shapes = [tuple(e.embedding.shape) for e in (held, held.negative)]
    assert said.endswith(f"{file}: {shapes[0]}, negative {shapes[1]}")
    expected = Qwen3PromptEncoder.from_pretrained(qwen3).encode(["a red fox", "blurry"])
    assert torch.equal(held.embedding[0], expected[0])
    assert torch.equal(held.negative.embedding[0], expected[1])

    make = ("generate", "--model", checkpoint, "--device", "cpu", "--size", "32x48", "--steps", 1)
    make += ("--guidance", 3)
    whole, baked = tmp_path / "whole.png", tmp_path / "baked.png"
    text = ("a red fox", "--negative-prompt", "blurry", "--text-encoder", qwen3)
    run(*make, "-o", whole, *text)
    monkeypatch.setitem(sys.modules, "transformers", None)  # it need not be installed
    run(*make, "-o", baked, "--prompt-embeds", file)
    assert np.array_equal(pixels(whole), pixels(baked))
    said = read_picture_metadata(baked)
    assert (said["prompt"], said["negative_prompt"]) == ("a red fox", "blurry")
    for key in ("prompt", "negative_prompt", "seed", "guidance_scale"):
        assert said[key] == read_picture_metadata(whole)[key]
    assert "transformers >= 4.51 is needed" in run(*make, "-o", whole, *text, code=1)


def test_the_encoder_of_the_releases_unless_another_is_named(qwen3, checkpoint, monkeypatch):
    """Loaded where the network takes its width and a text is given, not before."""
    load, asked = Qwen3PromptEncoder.from_pretrained, []

    def noted(location, **options):
        asked.append(location)
        return load(qwen3, **options)

    monkeypatch.setattr(Qwen3PromptEncoder, "from_pretrained", noted)
    pipe = L2PPipeline.from_pretrained(checkpoint, device="cpu")
    assert asked == []
    (embedding,) = pipe.encode_prompt("a red fox")
    assert asked == ["Qwen/Qwen3-4B"]
    assert embedding.shape[1] == WIDTH


def test_the_empty_negative_prompt_is_baked_by_itself(qwen3, tmp_path):
    file = tmp_path / "fox.safetensors"
    run("bake-caption", "--for", "l2p", "a red fox", "-o", file, "--encoder", qwen3)
    assert load_caption(file).negative.captions == ("",)


def test_bake_refusals(qwen3, tmp_path):
    file, bake = tmp_path / "fox.safetensors", ("bake-caption", "-o", tmp_path / "fox.safetensors")
    for args, code, words in (
        (("--for", "l2p"), 2, "holds one TEXT, got 0"),
        (("--for", "l2p", "a", "b"), 2, "holds one TEXT, got 2"),
        (("--for", "l2p", "a", "--encoder", "demo"), 2, "no demo encoder"),
        (("--for", "l2p", "a", "--prefix-file", file), 2, "no instruction prefix"),
        (("a", "--negative", "b"), 2, "--negative is for l2p"),
        (("--for", "l2p", "a", "--encoder", tmp_path), 1, "cannot load"),
        (("--for", "flux", "a"), 2, "'flux' is not one of 'pid', 'l2p'"),
    ):
        assert words in run(*bake, *args, code=code)
    assert not file.exists()


def test_files_of_another_encoder_are_refused(checkpoint, tmp_path, monkeypatch):
    """Before the network is loaded; one of the right width too, which only its record tells."""
    file, out = tmp_path / "fox.safetensors", tmp_path / "out.png"
    save_captions(file, draw(1, 5, WIDTH), "a fox", family="Gemma-2", encoder_id="gemma")
    make = ("generate", "--model", checkpoint, "--device", "cpu", "--size", "32x48", "--steps", 1)

    def never(*args, **options):
        raise AssertionError("loaded for nothing")

    with monkeypatch.context() as m:
        m.setattr(L2PPipeline, "from_pretrained", never)
        said = run(*make, "-o", out, "--prompt-embeds", file, "--guidance", 1, code=1)
        assert f"{file} must hold embeddings of a Qwen3" in said
        assert "got those of a Gemma-2 (gemma); `pixeldiff bake-caption --for l2p`" in said
        negative = ("--negative-prompt-embeds", file)
        assert "of a Qwen3" in run(*make, "-o", out, "--prompt-embeds", file, *negative, code=1)
    narrow = save_captions(file, draw(1, 5, 20), "a fox", family="Qwen3", encoder_id="small/qwen3")
    said = run(*make, "-o", out, "--prompt-embeds", file, "--guidance", 1, code=1)
    assert "must be embeddings (T, 2560), got (5, 20) for prompt 0, made by small/qwen3;" in said
    assert not out.exists()
    with pytest.raises(ValueError, match="null_caption must hold embeddings of a Gemma-2"):
        CaptionSource(20, null_caption=narrow)
    with pytest.raises(ValueError, match="caption must hold embeddings of a Gemma-2"):
        CaptionSource(20).embeddings("caption", narrow)
    with pytest.raises(ValueError, match="prompt_embeds must hold embeddings of a Qwen3"):
        PromptSource(20).checked("prompt_embeds", CaptionFile(draw(1, 5, 20), family="Gemma-2"))


def test_the_negative_prompt_of_a_file_counts_where_none_is_given():
    pipe = L2PPipeline(network(config(n_layers=1)))
    positive, own, other = (draw(1, n, 20, seed=n) for n in (5, 6, 7))
    file = CaptionFile(positive, negative=CaptionFile(own))

    def made(**options):
        given = {"guidance_scale": 3.0, "seed": 0, "num_inference_steps": 1, **SIZE}
        return pipe(**{**given, "output_type": "pt", **options}).images

    want = made(prompt_embeds=positive, negative_prompt_embeds=own)
    assert torch.equal(made(prompt_embeds=file), want)
    want = made(prompt_embeds=positive, negative_prompt_embeds=other)
    assert torch.equal(made(prompt_embeds=file, negative_prompt_embeds=other), want)
    with pytest.raises(ValueError, match="needs the negative prompt too"):
        made(prompt_embeds=CaptionFile(positive))
