"""The command line: what it writes, what it says, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_pid import CONFIG, save_net, tiny_caption, tiny_latent, tiny_net

import pixeldiff
from pixeldiff import cli, sources
from pixeldiff.cli_errors import clean_errors
from pixeldiff.cli_verify import _print_report
from pixeldiff.models.autoencoder import ConvAutoencoder
from pixeldiff.models.pid import PiDNet, checkpoint_location
from pixeldiff.models.pid import decoder as decoder_module
from pixeldiff.models.pid.decoder import PiDDecoder
from pixeldiff.models.pid.samplers import STUDENT_T_LIST
from pixeldiff.models.pid.variants import SamplingSettings, variant
from pixeldiff.picture_files import read_picture_metadata
from pixeldiff.text import load_caption, save_captions
from pixeldiff.text.tiny import TinyTextEmbedder

GOLDEN = Path(__file__).parent / "golden" / "pid"


def run(*args, code=0):
    result = CliRunner().invoke(cli.main, [str(a) for a in args])
    known = result.exception is None or isinstance(result.exception, SystemExit)
    assert known, f"traceback: {result.exception!r}"
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A checkpoint, an autoencoder, latents of one and two pictures, and a picture."""
    folder = tmp_path_factory.mktemp("files")
    save_net(folder / "pid.safetensors", tiny_net())
    torch.manual_seed(0)
    ConvAutoencoder().save(folder / "autoencoder.safetensors")
    save_file({"latent": tiny_latent()}, folder / "one.safetensors")
    save_file({"latent": tiny_latent(2)}, folder / "two.safetensors")
    noise = np.random.default_rng(0).integers(0, 256, (16, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "picture.png")
    return folder


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "Ausgänge 🦊"
    folder.mkdir()
    return folder


@pytest.fixture
def demo(files, monkeypatch):
    """The tiny files in place of the packaged demo model."""
    monkeypatch.setattr(checkpoint_location, "_packaged_demo", lambda name: files / name)
    monkeypatch.setattr(sources, "demo_asset", lambda name: files / name)


def decode(files, out, *args, source="one.safetensors", code=0):
    model = () if "--model" in args else ("--model", files / "pid.safetensors")
    options = ("--device", "cpu", "--quiet", *model, *args)
    return run("decode", files / source, "-o", out / "a.png", *options, code=code)


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image)


def by_hand(files, **options):
    decoder = PiDDecoder.from_pretrained(files / "pid.safetensors", device="cpu")
    latent = options.pop("latent", tiny_latent())
    return [np.asarray(i) for i in decoder.decode(latent, **{"seed": 0, **options}).images]


# --- decode


def test_decode_writes_what_the_decoder_gives(files, out):
    result = decode(files, out, "--seed", 7, "--steps", 3, "--sigma", 0.2, "--caption", "a fox")
    assert result.stdout == f"{out / 'a.png'}\n"
    assert result.stderr == ""
    assert os.listdir(out) == ["a.png"]
    expected = by_hand(files, seed=7, steps=3, sigma=0.2, caption="a fox")
    assert np.array_equal(pixels(out / "a.png"), expected[0])
    assert read_picture_metadata(out / "a.png") == {
        "model": "pid.safetensors",
        "backbone": "demo",
        "pixeldiff": pixeldiff.__version__,
        "steps": 3,
        "sampler": "sde",
        "seed": 7,
        "rng": "cpu",
        "sigma": 0.2,
        "caption": "a fox",
        "precision": "fp32",
        "state": "fp64",
        "size": [64, 64],
    }


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_metadata_decodes_to_the_same_picture(files, out, precision):
    decode(files, out, "--seed", 3, "--precision", precision)
    metadata = read_picture_metadata(out / "a.png")
    options = [metadata[k] for k in ("seed", "steps", "sigma", "precision")]
    flags = ("--seed", "--steps", "--sigma", "--precision")
    first = pixels(out / "a.png")
    decode(files, out, *(x for pair in zip(flags, options, strict=True) for x in pair))
    assert np.array_equal(first, pixels(out / "a.png"))


def test_several_latents_are_numbered(files, out):
    result = decode(files, out, source="two.safetensors")
    names = ["a-0.png", "a-1.png"]
    assert sorted(os.listdir(out)) == names
    assert result.stdout.splitlines() == [str(out / name) for name in names]
    expected = by_hand(files, latent=tiny_latent(2))
    for i, name in enumerate(names):
        assert read_picture_metadata(out / name)["batch_index"] == i
        assert np.array_equal(pixels(out / name), expected[i])


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG", "a.tif", "a.tiff"])
def test_the_suffix_is_the_format(files, out, name):
    if "tif" in name:
        pytest.importorskip("tifffile")
    source, options = files / "two.safetensors", ("--device", "cpu", "--quiet", "--seed", 3)
    run("decode", source, "-o", out / name, "--model", files / "pid.safetensors", *options)
    for i, expected in enumerate(by_hand(files, latent=tiny_latent(2), seed=3)):
        path = (out / name).with_stem(f"a-{i}")
        got = pixels(path)
        if name.lower().endswith(("jpg", "jpeg")):
            assert got.shape == expected.shape
            assert np.abs(got.astype(int) - expected).mean() < 8  # noise, which JPEG is not for
        else:
            assert np.array_equal(got, expected)
        metadata = read_picture_metadata(path)
        assert (metadata["seed"], metadata["batch_index"]) == (3, i)
    assert len(os.listdir(out)) == 2


def test_a_format_is_refused_before_the_model_is_read(files, out, monkeypatch):
    source = files / "one.safetensors"
    args = ("decode", source, "--model", out / "not-there.safetensors")
    stderr = run(*args, "-o", out / "a.jpg", "--size", "65536x64", code=1).stderr
    assert "a JPEG has at most 65500 pixels a side, got 65536 x 64 (H x W)" in stderr
    monkeypatch.setitem(sys.modules, "tifffile", None)
    stderr = run(*args, "-o", out / "a.tif", code=1).stderr
    assert "install the extra pixeldiff[tiff]" in stderr


def test_the_latents_own_size_is_checked_before_the_work(files, out, monkeypatch):
    monkeypatch.setattr("pixeldiff.jpeg_file.LONGEST_SIDE", 63)
    stop_with(AssertionError("it began to work"), monkeypatch, after=1)
    args = ("decode", files / "one.safetensors", "--model", files / "pid.safetensors")
    stderr = run(*args, "-o", out / "a.jpg", "--device", "cpu", code=1).stderr
    assert "at most 63 pixels a side, got 64 x 64" in stderr


def test_size(files, out):
    result = decode(files, out, "--size", "64x96")
    assert pixels(out / "a.png").shape == (64, 96, 3)
    assert "note: " in result.stderr
    assert "64 x 96 is not the latent's own size" in result.stderr


def test_tiles(files, out):
    """As the decoder makes them; what the metadata says of them makes the same picture again."""
    latent = out / "large.safetensors"
    save_file({"latent": tiny_latent(1, 5, 6)}, latent)
    options = {"tile": (3, 4), "overlap": 1, "tile_mode": "independent"}
    flags = ["--tile", "3x4", "--overlap", 1, "--tile-mode", "independent"]
    decode(files, out, *flags, source=latent)
    want = by_hand(files, latent=tiny_latent(1, 5, 6), **options)[0]
    assert np.array_equal(pixels(out / "a.png"), want)
    found = read_picture_metadata(out / "a.png")
    assert (found["tile"], found["overlap"]) == ([3, 4], [1, 1])
    decode(files, out, "--tile", "auto", source=latent)
    assert np.array_equal(pixels(out / "a.png"), by_hand(files, latent=tiny_latent(1, 5, 6))[0])
    assert (
        "two positive integers" in decode(files, out, "--tile", "3x0", source=latent, code=1).stderr
    )
    assert "HEIGHTxWIDTH" in decode(files, out, "--tile", "3", source=latent, code=2).stderr


def test_low_memory_makes_the_same_picture(files, out, monkeypatch):
    asked, prepare = [], PiDNet.prepare
    monkeypatch.setattr(
        PiDNet,
        "prepare",
        lambda *args, **kw: asked.append(kw["keep_features"]) or prepare(*args, **kw),
    )
    pictures = []
    for options in ([], ["--low-memory"]):
        decode(files, out, "--seed", 7, "--caption", "a fox", *options)
        pictures.append(pixels(out / "a.png"))
    assert asked == [True, False]
    assert np.array_equal(*pictures)


def test_caption_file(files, out):
    y = tiny_caption(2)
    save_captions(out / "y.safetensors", y, ["a fox", "an owl"], dtype=torch.float32)
    decode(files, out, "--caption-file", out / "y.safetensors", source="two.safetensors")
    expected = by_hand(files, latent=tiny_latent(2), caption=y)
    for i in range(2):
        assert np.array_equal(pixels(out / f"a-{i}.png"), expected[i])
    assert read_picture_metadata(out / "a-0.png")["caption"] == ["a fox", "an owl"]


def test_picture_through_the_demo_model(files, out, demo):
    decode(files, out, "--model", "demo", source="picture.png")
    assert pixels(out / "a.png").shape == (64, 128, 3)
    assert read_picture_metadata(out / "a.png")["model"] == "demo"


def test_progress_goes_to_stderr(files, out):
    args = ("decode", files / "one.safetensors", "-o", out / "a.png", "--device", "cpu")
    result = run(*args, "--model", files / "pid.safetensors")
    assert result.stdout == f"{out / 'a.png'}\n"


@pytest.fixture
def teacher(monkeypatch):
    """The tiny file, run as an undistilled network."""
    settings = SamplingSettings(steps=2, times=None, stochastic=False, cfg_scale=2.0)
    monkeypatch.setattr(decoder_module, "STUDENT", settings)


def test_guidance_of_an_undistilled_network(files, out, teacher):
    save_captions(out / "y.safetensors", tiny_caption(), "blurry", dtype=torch.float32)
    decode(files, out, "--negative-caption-file", out / "y.safetensors", "--cfg-scale", 3)
    metadata = read_picture_metadata(out / "a.png")
    assert (metadata["cfg_scale"], metadata["negative_caption"]) == (3.0, "blurry")
    expected = by_hand(files, negative_caption=tiny_caption(), cfg_scale=3)
    assert np.array_equal(pixels(out / "a.png"), expected[0])
    decode(files, out, "--negative-caption", "blurry")
    decode(files, out, "--cfg-scale", 1)
    assert "needs negative_caption" in decode(files, out, code=1).stderr


def test_licence_is_shown_with_released_weights(files, out, monkeypatch):
    """A released network is too large for a test: a small file is passed off as one."""
    import dataclasses

    read = decoder_module.read_checkpoint

    def released(*args, **options):
        return dataclasses.replace(read(*args, **options), variant=variant("flux-2k"))

    monkeypatch.setattr(decoder_module, "read_checkpoint", released)
    result = decode(files, out)
    assert "note: The released PiD weights are under" in result.stderr
    assert "non-commercial" in result.stderr
    assert "flux-2k was not trained near 64 x 64" in result.stderr
    assert read_picture_metadata(out / "a.png")["model"] == variant("flux-2k").checkpoint


# --- decode, refused


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--steps", 5), "error: steps must be an integer in 1..4, got 5"),
        (("--sigma", 2), "error: sigma must be in [0, 1], got [2.0]"),
        (("--sigma", "nan"), "error: sigma"),
        (("--seed", -1), "error: seed must be an integer"),
        (("--size", "100x64"), "multiples of patch_size 16, got (100, 64); nearest: H 96 or 112"),
        (("--size=-64x64",), "two positive integers"),
        (("--device", "gpu0"), "error: device must be one like"),
        (("--device", "meta"), "cannot be used here"),
        (("--backbone", "sdxl"), "sdxl"),
        (("--cfg-scale", 3), "for undistilled networks"),
        (("--model", "nowhere.pth"), "nowhere.pth"),
        (("--model", "demo", "--caption-file", "nowhere.safetensors"), "nowhere.safetensors"),
    ],
    ids=lambda v: " ".join(map(str, v)) if isinstance(v, tuple) else "",
)
def test_failures_are_one_message_and_no_file(files, out, demo, args, words):
    result = decode(files, out, *args, code=1)
    assert words in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert os.listdir(out) == []


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--size", "64"), "must be HEIGHTxWIDTH, like 1024x768, got '64'"),
        (("--size", "64x64x3"), "HEIGHTxWIDTH"),
        (("--size", "axb"), "HEIGHTxWIDTH"),
        (("--precision", "fp16"), "fp16"),
        (("--seed", "many"), "--seed"),
        (("--caption", "a", "--caption-file", "b"), "--caption and --caption-file exclude"),
        (("--negative-caption", "a", "--negative-caption-file", "b"), "exclude each other"),
        (("--fast",), "--fast"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, tuple) else "",
)
def test_wrong_usage_is_exit_code_2(files, out, args, words):
    result = decode(files, out, *args, code=2)
    assert words in result.stderr
    assert "Usage: " in result.stderr
    assert os.listdir(out) == []


def test_missing_arguments():
    assert "Missing argument 'SOURCE'" in run("decode", "-o", "a.png", code=2).stderr
    assert "Missing option '-o'" in run("decode", "a.safetensors", code=2).stderr


def test_the_output_is_checked_before_anything_is_read(files, out):
    source = out / "not-there.safetensors"
    (out / "folder.png").mkdir()
    for output, words in [
        (out / "a.webp", "must be a .png, .jpg, .jpeg, .tif or .tiff file, got 'a.webp'"),
        (out / "nowhere" / "a.png", "output directory does not exist"),
        (out / "folder.png", "output is a directory"),
    ]:
        assert words in run("decode", source, "-o", output, code=1).stderr


def test_numbered_outputs_are_checked_before_the_model_is_read(files, out):
    (out / "a-1.png").mkdir()
    args = ("--model", out / "not-there.safetensors")
    stderr = decode(files, out, *args, source="two.safetensors", code=1).stderr
    assert "output is a directory" in stderr
    assert os.listdir(out) == ["a-1.png"]


def test_bad_sources(files, out, demo):
    bad = tiny_latent()
    bad[0, 0, 0, 0] = float("nan")
    save_file({"latent": bad}, out / "nan.safetensors")
    save_file({"latent": tiny_latent()[:, :4].contiguous()}, out / "sdxl.safetensors")
    (out / "text.png").write_text("no picture")
    for source, words in [
        (out / "nan.safetensors", "finite, got 1 NaN of 64 values"),
        (out / "sdxl.safetensors", "latent must be (B, 16, zh, zw)"),
        (out / "text.png", "neither a .safetensors latent nor a picture"),
        (out / "nowhere.png", "no such file"),
        (out, "is a directory"),
        (files / "pid.safetensors", "must hold one tensor"),
    ]:
        result = run("decode", source, "-o", out / "a.png", "--device", "cpu", code=1)
        assert words in result.stderr
        assert not (out / "a.png").exists()
    model = ("--model", files / "pid.safetensors")
    stderr = decode(files, out, *model, source="picture.png", code=1).stderr
    assert "only the demo model brings its encoder" in stderr


# --- decode, cut short


def stop_with(error, monkeypatch, after=2):
    """The network's call number `after` raises."""
    from pixeldiff.models.pid.network import PiDNet

    step, calls = PiDNet.student_step, []

    def limited(self, *args, **options):
        calls.append(1)
        if len(calls) == after:
            raise error
        return step(self, *args, **options)

    monkeypatch.setattr(PiDNet, "student_step", limited)


def test_ctrl_c_writes_nothing(files, out, monkeypatch):
    (out / "a.png").write_bytes(b"old")
    stop_with(KeyboardInterrupt(), monkeypatch)
    assert "interrupted; nothing was written" in decode(files, out, code=130).stderr
    assert (out / "a.png").read_bytes() == b"old"
    assert os.listdir(out) == ["a.png"]


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
    ids=["python", "cuda", "posix", "windows"],
)
def test_out_of_memory(files, out, monkeypatch, error):
    stop_with(error, monkeypatch)
    stderr = decode(files, out, code=1).stderr
    assert stderr == "error: out of memory; decode a smaller size, or with --precision bf16\n"
    assert os.listdir(out) == []


def test_pytorch_runs_out_of_memory_as_expected(files, out, monkeypatch):
    """The allocator's real words, asked for more than any machine has."""
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    stop_with(caught.value, monkeypatch)
    assert "error: out of memory" in decode(files, out, code=1).stderr


def test_other_runtime_errors_keep_their_message(files, out, monkeypatch):
    stop_with(RuntimeError("cuDNN [version] is broken"), monkeypatch)
    assert decode(files, out, code=1).stderr == "error: cuDNN [version] is broken\n"


def test_a_bug_is_not_hidden(files, out, monkeypatch):
    stop_with(AttributeError("a bug"), monkeypatch)
    args = ("decode", files / "one.safetensors", "-o", out / "a.png", "--device", "cpu", "--quiet")
    result = CliRunner().invoke(
        cli.main, [str(a) for a in (*args, "--model", files / "pid.safetensors")]
    )
    assert isinstance(result.exception, AttributeError)


def test_warnings_are_notes(capsys):
    import warnings

    @clean_errors
    def work():
        warnings.warn("sizes [1, 2] are odd", UserWarning, stacklevel=1)
        warnings.warn("an internal matter", DeprecationWarning, stacklevel=1)

    before = warnings.showwarning
    work()
    assert capsys.readouterr().err == "note: sizes [1, 2] are odd\n"
    assert warnings.showwarning is before


def test_a_closed_pipe_is_clicks_business():
    @clean_errors
    def work():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        work()


# --- bake-caption


def test_bake_captions_for_the_demo(files, out, demo):
    path = out / "y.safetensors"
    result = run("bake-caption", "a fox", "an owl", "-o", path, "--encoder", "demo")
    assert result.stdout == f"{path}: (2, 16, 64)\n"
    loaded = load_caption(path)
    assert loaded.captions == ("a fox", "an owl")
    expected = TinyTextEmbedder().encode(["a fox", "an owl"])
    assert torch.equal(loaded.embedding, expected.to(loaded.embedding.dtype))
    run("bake-caption", "-o", path, "--encoder", "demo")
    assert load_caption(path).is_null == (True,)


def test_bake_and_decode_give_what_the_text_gives(files, out, demo):
    """The tiny network's embedder is narrower than the packaged one's: bake with its own."""
    from pixeldiff.text import bake_caption

    embedder = TinyTextEmbedder(CONFIG.txt_embed_dim, CONFIG.txt_max_length)
    bake_caption(out / "y.safetensors", "a fox", embedder, dtype=torch.float32)
    decode(files, out, "--caption-file", out / "y.safetensors")
    baked = pixels(out / "a.png")
    decode(files, out, "--caption", "a fox")
    assert np.array_equal(baked, pixels(out / "a.png"))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A folder with a Gemma-2 of two layers, random weights, and 2304 channels."""
    transformers = pytest.importorskip("transformers", minversion="4.45")
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("gemma")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=120, special_tokens=special)
    tokenizer.train_from_iterator(["Describe: a fox", "an owl"], trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, **{f"{t[1:-1]}_token": t for t in special}
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=120,
        hidden_size=2304,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=4096,
    )
    transformers.Gemma2Model(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def test_bake_with_a_gemma(gemma, out):
    diffusers = pytest.importorskip("diffusers")
    assert diffusers
    path = out / "y.safetensors"
    result = run("bake-caption", "a fox", "-o", path, "--encoder", gemma)
    assert result.stdout == f"{path}: (1, 300, 2304)\n"
    loaded = load_caption(path, expected_embed_dim=2304)
    assert loaded.captions == ("a fox",)
    assert loaded.encoder_id == gemma.name
    assert path.stat().st_size < 1_500_000
    run("bake-caption", "-o", path, "--encoder", gemma)
    null = load_caption(path)
    assert null.is_null == (True,)
    assert not torch.equal(null.embedding, loaded.embedding)


def test_bake_refusals(gemma, out):
    pytest.importorskip("diffusers")  # whose prefix comes first
    path, folder = out / "y.safetensors", out / "empty"
    folder.mkdir()
    (out / "prefix.txt").write_text("Another prefix: ")
    for args, words in [
        (("-o", out / "y.png"), "must be a .safetensors file, got 'y.png'"),
        (("-o", out / "nowhere" / "y.safetensors"), "output directory does not exist"),
        (("-o", path, "--encoder", folder), "cannot load"),
        (("-o", path, "--encoder", gemma, "--device", "gpu0"), "device must be one like"),
        (("-o", path, "--encoder", gemma, "--prefix-file", out / "no.txt"), "no.txt"),
        (("-o", path, "--encoder", gemma, "--prefix-file", out / "prefix.txt"), "SHA-256"),
    ]:
        assert words in run("bake-caption", *args, code=1).stderr
    assert not path.exists()
    assert "Missing option '-o'" in run("bake-caption", "a fox", code=2).stderr


def test_the_output_is_checked_before_the_encoder_is_loaded(out):
    args = ("-o", out / "y.png", "--encoder", out / "not-there")
    assert "must be a .safetensors file" in run("bake-caption", *args, code=1).stderr


# --- verify


@pytest.fixture
def golden(tmp_path):
    """Copies of the two smallest golden files: one as it is, one with an output moved."""
    good = GOLDEN / "comp_gates.safetensors"
    if not good.is_file():
        pytest.skip(f"no {good}")
    with safe_open(good, "pt") as f:
        metadata = f.metadata()
    tensors = load_file(good)
    key = min(k for k in tensors if k.startswith("out."))
    tensors[key] = tensors[key] + 0.01
    save_file(tensors, tmp_path / "missed.safetensors", metadata=metadata)
    (tmp_path / "good.safetensors").write_bytes(good.read_bytes())
    (tmp_path / "text.safetensors").write_text("no golden file")
    save_file(tensors, tmp_path / "plain.safetensors")
    changed = {**metadata, "name": "[/red] later", "kind": "component"}
    save_file(tensors, tmp_path / "later.safetensors", metadata=changed)
    weights = {k: v for k, v in tensors.items() if k.startswith("w.")}
    broken = {k: v.flatten()[:1].clone() for k, v in weights.items()}
    save_file({**tensors, **broken}, tmp_path / "broken.safetensors", metadata=metadata)
    return tmp_path, key


def test_verify_of_good_files(golden):
    folder, key = golden
    result = run("verify", folder / "good.safetensors", GOLDEN / "comp_small.safetensors")
    assert key in result.stdout
    assert "MISS" not in result.stdout
    assert "2 files run, 0 tensors missed, 0 files not understood" in result.stdout
    every = run("verify", "--all", folder / "good.safetensors").stdout
    with safe_open(folder / "good.safetensors", "pt") as f:
        stated = [k for k in f.keys() if k.startswith(("out.", "mid."))]  # noqa: SIM118
    assert f"{len(stated)} of {len(stated)} tensors ok" in every
    assert every.count(" ok ") >= len(stated)


def test_verify_of_a_missed_tensor(golden):
    folder, key = golden
    result = run("verify", folder / "missed.safetensors", folder / "good.safetensors", code=1)
    [line] = [line for line in result.stdout.splitlines() if "MISS" in line]
    assert key in line
    assert "1.0e-02" in line
    assert "2 files run, 1 tensors missed, 0 files not understood" in result.stdout


@pytest.mark.parametrize("name", ["text", "plain", "later", "broken", "nowhere"])
def test_verify_of_a_file_it_does_not_understand(golden, name):
    """Even beside a missed one: the others may miss for the reason this one is not understood."""
    folder, _ = golden
    path = folder / f"{name}.safetensors"
    result = run("verify", path, folder / "missed.safetensors", code=2)
    assert f"{path}: " in result.stderr
    assert "1 files run, 1 tensors missed, 1 files not understood" in result.stdout
    run("verify", path, code=2)


def test_verify_of_a_file_that_cannot_be_run(golden, monkeypatch):
    """The package's own failure is a miss, not a file that is not understood."""
    from pixeldiff import verify

    folder, _ = golden
    work = verify.verify_file

    def fails(path):
        if path.name == "broken.safetensors":
            raise RuntimeError("no kernel")
        return work(path)

    monkeypatch.setattr(verify, "verify_file", fails)
    result = run("verify", folder / "broken.safetensors", folder / "good.safetensors", code=1)
    assert "broken.safetensors: cannot be run: " in result.stderr
    assert "1 files run, 0 tensors missed, 0 files not understood, 1 files failed" in result.stdout


def test_names_in_golden_files_are_not_markup(capsys):
    from pixeldiff.verify import Comparison, Report

    report = Report(Path("a"), "[/red]", [Comparison("out.[bold]", 1.0, 0.5, "abs")])
    assert _print_report(report, show_all=False) == 1
    page = capsys.readouterr().out
    assert "[/red]: 0 of 1 tensors ok" in page
    assert "out.[bold]" in page


def test_verify_needs_files():
    assert "Missing argument 'FILES...'" in run("verify", code=2).stderr


def test_verify_is_interrupted(golden, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr("pixeldiff.verify.verify_file", interrupted)
    run("verify", golden[0] / "good.safetensors", code=130)


# --- the rest


def test_info_and_version():
    page = run("info").stdout
    assert f"pixeldiff {pixeldiff.__version__}" in page
    assert "joint_attention" in page
    assert run("--version").stdout == f"pixeldiff, version {pixeldiff.__version__}\n"


def test_help_names_the_commands_and_the_student_steps():
    page = run("-h").stdout
    for command in ("decode", "info", "bake-caption", "verify"):
        assert command in page
        assert run(command, "-h").stdout.startswith("Usage: ")
    assert f"1..{len(STUDENT_T_LIST) - 1} for distilled" in run("decode", "-h").stdout
    assert "No such command" in run("encode", code=2).stderr


def test_as_a_program(files, out):
    """Through a real interpreter and its exit codes, without a terminal."""
    command = [sys.executable, "-m", "pixeldiff.cli", "decode", files / "one.safetensors"]
    command += ["--model", files / "pid.safetensors", "--device", "cpu", "-o", out / "a.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out / 'a.png'}\n"
    assert np.array_equal(pixels(out / "a.png"), by_hand(files)[0])
