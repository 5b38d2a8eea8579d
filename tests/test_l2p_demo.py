"""The shipped L2P: small, complete, and it draws what is asked for. How it was made, in small."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open

from pixeldiff.cli import main
from pixeldiff.errors import CheckpointFormatError
from pixeldiff.models.l2p import L2PPipeline, read_checkpoint
from pixeldiff.models.l2p.checkpoint_geometry import network_shapes
from pixeldiff.models.l2p.config import DECODERS, L2PConfig
from pixeldiff.models.l2p.pipeline import Sampling
from pixeldiff.picture_files import read_picture_metadata
from pixeldiff.sources import demo_asset, demo_autoencoder
from pixeldiff.text.tiny import TinyPromptEncoder, TinyTextEmbedder
from training import shapes, train_l2p, train_source
from training.evaluate_l2p import evaluate, held_out_scenes, score
from training.recognise import recognise
from training.source_model import SourceModel
from training.synthesise import synthesise

FILES = ("l2p.safetensors", "l2p_source.safetensors")
SEED = 0
CAPTIONS = {
    "a red circle on a blue striped background": ("circle", "red", "blue", "striped"),
    "a yellow star on a purple plain background": ("star", "yellow", "purple", "plain"),
    "a black heart on a white dotted background": ("heart", "black", "white", "dotted"),
}


@pytest.fixture(scope="module")
def pipe() -> L2PPipeline:
    return L2PPipeline.from_pretrained("demo", device="cpu")


# --- the shipped files --------------------------------------------------------------------------


def test_files_are_at_most_12_megabytes_all_bf16():
    assert sum(demo_asset(name).stat().st_size for name in FILES) <= 12 * 10**6
    for name in FILES:
        with safe_open(demo_asset(name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                assert tensor.dtype == torch.bfloat16, key
                assert torch.isfinite(tensor).all(), key


def test_metadata_says_where_it_comes_from(pipe):
    loaded = read_checkpoint("demo")
    source = read_checkpoint(demo_asset("l2p_source.safetensors"))
    assert loaded.config.local_decoder == DECODERS["1k"].scaled(0.25)
    assert (source.config.local_decoder, source.config.patch_size) == (None, 2)
    assert json.loads(loaded.info.metadata["conversion"])["new"]
    for info in (loaded.info, source.info):
        assert "python -m training l2p-" in json.loads(info.metadata["training"])["command"]
    assert (pipe.variant.name, pipe.name) == ("demo", "L2P demo")
    assert pipe.sampling == Sampling(**json.loads(loaded.info.metadata["sampling"]))


def test_only_shallow_layers_differ_from_the_source():
    ours = read_checkpoint("demo", dtype=None).state_dict
    theirs = read_checkpoint(demo_asset("l2p_source.safetensors"), dtype=None).state_dict
    learned = train_l2p.trainable_set(train_l2p.ShallowRecipe())
    depth = read_checkpoint("demo").config.n_layers
    shared = [name for name in ours if name in theirs]
    frozen = [name for name in shared if not learned.holds(name, depth)]
    assert len(frozen) > 20
    assert all(torch.equal(ours[name], theirs[name]) for name in frozen)
    assert any(not torch.equal(ours[name], theirs[name]) for name in set(shared) - set(frozen))


def test_it_draws_what_is_asked_for(pipe):
    generators = [torch.Generator().manual_seed(SEED) for _ in CAPTIONS]
    pictures = pipe(list(CAPTIONS), generator=generators).images
    seen = [recognise(picture).combination for picture in pictures]
    assert seen == list(CAPTIONS.values())


def test_unknown_words_and_other_sizes_are_no_error(pipe):
    side = pipe.variant.native_size
    out = pipe("a zebra", height=side // 2, width=side, num_inference_steps=2, seed=0)
    assert out.images[0].size == (side, side // 2)


def run(*args, code=0):
    words = ["generate", "--model", "demo", "--device", "cpu", "--quiet", *map(str, args)]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == code, result.output
    return result


def test_generate_writes_a_picture_with_metadata(tmp_path):
    out = tmp_path / "out.png"
    prompt = next(iter(CAPTIONS))
    run(prompt, "-o", out, "--seed", SEED)
    metadata = read_picture_metadata(out)
    assert (metadata["model"], metadata["prompt"], metadata["seed"]) == ("L2P demo", prompt, SEED)
    assert recognise(Image.open(out)).combination == CAPTIONS[prompt]


@pytest.mark.parametrize(
    ("options", "size"),
    [
        (("--height", 64, "--width", 96), (96, 64)),
        (("--height", 64), (128, 64)),
        (("--width", 96), (96, 128)),
        (("--size", "64x96"), (96, 64)),
    ],
    ids=str,
)
def test_generate_in_other_sizes(tmp_path, options, size):
    run("a red circle", "-o", tmp_path / "a.png", "--steps", 1, *options)
    assert Image.open(tmp_path / "a.png").size == size
    # From a picture: its own sides are the default, and it is resized to the others.
    Image.new("RGB", (160, 48)).save(tmp_path / "start.png")
    start = ("--image", tmp_path / "start.png")
    run("a red circle", "-o", tmp_path / "b.png", "--steps", 1, *start, *options)
    given = dict(zip(options[::2], options[1::2], strict=True))
    own = size if "--size" in given else (given.get("--width", 160), given.get("--height", 48))
    assert Image.open(tmp_path / "b.png").size == own


def test_a_size_is_given_once(tmp_path):
    out = tmp_path / "a.png"
    result = run("a red circle", "-o", out, "--size", "64x64", "--width", 64, code=2)
    assert "either --size or --height and --width" in result.output
    assert not out.exists()


# --- drawing and recognising --------------------------------------------------------------------


@pytest.mark.parametrize("side", [128, 256])
def test_drawn_pictures_are_recognised(side):
    rng = np.random.default_rng(side)
    for _ in range(40):
        scene = shapes.random_scene(rng)
        assert recognise(shapes.draw(scene, side)).combination == scene.combination, scene


def test_what_is_not_there_is_not_recognised():
    nothing = recognise(np.full((64, 64, 3), (217, 26, 26), np.uint8))
    assert nothing.combination == (None, None, "red", "plain")
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert recognise(noise).shape is None


def test_held_out_combinations_are_never_drawn_for_training():
    rng = np.random.default_rng(0)
    drawn = {shapes.random_scene(rng).combination for _ in range(3000)}
    assert not any(shapes.is_held_out(combination) for combination in drawn)
    asked = {scene.combination for scene in held_out_scenes(50)}
    assert all(map(shapes.is_held_out, asked))
    assert len(asked) > 30


def test_captions_say_what_is_drawn():
    rng = np.random.default_rng(3)
    for _ in range(200):
        scene = shapes.random_scene(rng)
        for words in (shapes.caption(scene).split(), shapes.caption(scene, rng).split()):
            named = {scene.shape, scene.colour, scene.background}
            assert named <= set(words)
            assert words[-1] == "background"
            assert scene.texture in words or scene.texture == "plain"
            assert "small" not in words or scene.radius < shapes.SMALL
            assert "large" not in words or scene.radius > shapes.LARGE


def test_shapes_stay_clear_of_the_border():
    rng = np.random.default_rng(4)
    for _ in range(50):
        s = shapes.random_scene(rng)
        cover = shapes.coverage(s.shape, 128, s.centre, s.radius, s.turn)
        assert cover.max() == 1
        assert cover[0].max() == cover[:, 0].max() == 0
        assert cover[-1].max() == cover[:, -1].max() == 0


# --- the text encoder and what a file says of itself ----------------------------------------------


def test_prompts_of_the_tiny_encoder_are_not_padded():
    rows = TinyPromptEncoder(64).encode(["a red fox", ""])
    assert [tuple(row.shape) for row in rows] == [(4, 64), (1, 64)]
    padded = TinyTextEmbedder(64, 16).encode(["a red fox", ""])
    assert all(torch.equal(row, p[: len(row)]) for row, p in zip(rows, padded, strict=True))


def test_damaged_statements_of_a_file_are_refused(tmp_path):
    from safetensors.torch import save_file

    loaded = read_checkpoint("demo", dtype=None)
    for entry in ("variant", "sampling"):
        path = tmp_path / f"{entry}.safetensors"
        tensors = {name: tensor.clone() for name, tensor in loaded.state_dict.items()}
        save_file(tensors, path, {**loaded.info.metadata, entry: '{"name": 1}'})
        with pytest.raises(CheckpointFormatError, match=f"metadata '{entry}' of .* must be JSON"):
            L2PPipeline.from_pretrained(path, device="cpu")


def test_a_scaled_decoder_keeps_the_image_channels():
    decoder = DECODERS["8k"].scaled(0.25)
    assert (decoder.levels[0].skip, decoder.levels[0].up, decoder.bottleneck) == (3, 4, 128)
    assert DECODERS["1k"].scaled(1) == DECODERS["1k"]
    with pytest.raises(ValueError, match="factor must be a positive number, got 0"):
        DECODERS["1k"].scaled(0)


# --- the recipe, in small -----------------------------------------------------------------------


def test_the_whole_recipe_in_small(tmp_path, monkeypatch):
    small = L2PConfig.from_dict(
        {**train_source.SOURCE.to_dict(), "dim": 32, "n_heads": 1, "n_layers": 3, "ffn_hidden": 40}
    )
    monkeypatch.setattr(train_source, "SOURCE", small)
    monkeypatch.setattr(train_l2p, "DECODER_WIDTH", 0.05)
    stages = (
        train_source.Stage(steps=3, batches={64: 4}, pictures={64: 8}, warm_up=1),
        train_source.Stage(steps=4, batches={128: 2, 64: 4}, pictures={128: 4, 64: 8}, warm_up=1),
    )
    trainer = train_source.SourceTrainer(
        demo_autoencoder(), train_source.Recipe(stages=stages), tmp_path
    )
    before = {name: p.clone() for name, p in trainer.weights.items()}
    trainer.run(compiled=False)
    moved = [name for name, p in trainer.weights.items() if not torch.equal(p, before[name])]
    assert len(moved) > 0.9 * len(before)
    assert trainer.seen == {64: 16, 128: 6}
    trainer.save(tmp_path / "source.safetensors", "python -m training l2p-source")

    source = SourceModel.load(tmp_path / "source.safetensors")
    folder = tmp_path / "pictures"
    synthesise(source, folder, 12, 64, steps=2, guidance=2.0)
    assert len(list(folder.glob("*.png"))) == len(list(folder.glob("*.safetensors"))) == 12

    rounds = (train_l2p.Round(side=64, steps=2, batch=2, learning_rate=1e-3),) * 2
    recipe = train_l2p.ShallowRecipe(rounds, blocks=1)
    trained = train_l2p.train(tmp_path / "source.safetensors", folder, recipe, tmp_path)
    shipped = tmp_path / "l2p.safetensors"
    train_l2p.ship(trained, shipped, side=64, sampling=Sampling(2, 1.5), facts={"command": "here"})
    loaded = read_checkpoint(shipped)
    assert {k: tuple(v.shape) for k, v in loaded.state_dict.items()} == network_shapes(
        loaded.config
    )

    pipe = L2PPipeline.from_pretrained(shipped, device="cpu")
    facts = evaluate(
        source, pipe, tmp_path / "r.json", tmp_path / "s.png", count=2, repeats=1, side=64
    )
    assert set(facts["score"]) == {"source", "l2p"}
    assert json.loads((tmp_path / "r.json").read_text()) == facts
    assert Image.open(tmp_path / "s.png").height > 2 * 64


def test_a_batch_of_the_source_is_its_pictures_one_by_one():
    source = SourceModel.load(demo_asset("l2p_source.safetensors"))
    settings = {"steps": 2, "guidance": 2.0}
    texts = list(CAPTIONS)[:2]
    both = source.pictures(texts, [1, 2], 64, **settings)
    alone = source.pictures(texts[1:], [2], 64, **settings)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-3)


def test_the_score_counts_each_word():
    scenes = held_out_scenes(8)

    def right(texts, seeds):
        drawn = [shapes.draw(scene, 128) for scene in scenes]
        return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() * 2 / 255 - 1

    def turned(texts, seeds):
        return right(texts, seeds).flip(0)

    assert set(score(right, scenes).values()) == {1.0}
    assert score(turned, scenes)["all"] < 0.5


def test_results_are_those_of_the_shipped_files(pipe):
    facts = json.loads((Path(train_l2p.__file__).parent / "results" / "l2p_demo.json").read_text())
    assert facts["parameters"]["l2p"] == sum(p.numel() for p in pipe.net.parameters())
    assert facts["steps"] == pipe.sampling.steps
    assert facts["guidance"] == pipe.sampling.guidance_scale
    assert facts["side"] == pipe.variant.native_size
