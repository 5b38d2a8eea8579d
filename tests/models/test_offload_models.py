"""Both models with weights that visit: the same pixels, less memory, and clear refusals."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import pixeldiff
from pixeldiff import cli
from pixeldiff.models.l2p import L2PPipeline
from pixeldiff.models.l2p.checkpoint import load_net as load_l2p
from pixeldiff.models.offload.sources import InFile
from pixeldiff.models.pid import PiDDecoder, PiDNet
from pixeldiff.models.pid.checkpoint import load_net
from pixeldiff.picture_files import read_picture_metadata
from tests.tiny_pid import CONFIG, save_net, tiny_caption, tiny_latent, tiny_net

ROOT = Path(__file__).parents[2]
PROMPT = "a red circle on a blue background"


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_net(tmp_path_factory.mktemp("pid") / "pid.safetensors", tiny_net())


def decoder(file, **options):
    return PiDDecoder.from_pretrained(file, device="cpu", **options)


def in_memory(net):
    """Weights that start where an allocator puts them. In a file they may start anywhere, which
    matrix libraries round by."""
    for p in net.parameters():
        p.data = p.data.clone()
    return net


def plain(file, **options):
    found = decoder(file, **options)
    in_memory(found.net)
    return found


def decode(decoder, seed=1, **options):
    given = {"caption": tiny_caption(2), "seed": seed, "output": "pt", **options}
    return decoder.decode(tiny_latent(2), **given).images


def generate(pipe, seed=1, **options):
    given = {"seed": seed, "num_inference_steps": 2, "output_type": "pt", **options}
    return pipe(PROMPT, "", **given).images


@pytest.fixture(scope="module")
def demo():
    made = {p: L2PPipeline.from_pretrained("demo", device="cpu", precision=p) for p in PRECISIONS}
    for pipe in made.values():
        in_memory(pipe.net)
    return made


PRECISIONS = ("fp32", "bf16")

# ---- The same pixels ---------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
def test_a_decode(file, precision):
    whole = plain(file, precision=precision)
    away = decoder(file, precision=precision, offload="blocks")
    assert (away.precision, away.net.dtype) == (precision, whole.net.dtype)
    for seed in range(2):
        assert torch.equal(decode(away, seed), decode(whole, seed))
    with torch.inference_mode():
        found = decode(away)
    assert torch.equal(found, decode(whole))
    assert torch.equal(decode(away), found)  # and out of that mode again
    blocks = [*away.net.patch_blocks, *away.net.pixel_blocks]
    assert {p.device.type for b in blocks for p in b.parameters()} == {"meta"}
    shapes = {name: p.shape for name, p in whole.net.named_parameters()}
    assert {name: p.shape for name, p in away.net.named_parameters()} == shapes


@pytest.mark.parametrize(
    "options",
    [
        {"steps": 1},
        {"sample_type": "ode"},
        {"tile": (1, 2), "overlap": 0, "tile_batch": 2},
        {"tile": (2, 1), "overlap": 0, "tile_mode": "independent"},
    ],
)
@pytest.mark.parametrize("made", [{}, {"low_memory": True}, {"pixel_chunk": 3}])
def test_ways_to_decode(file, options, made):
    found = decode(decoder(file, offload="blocks", **made), **options)
    assert torch.equal(found, decode(plain(file, **made), **options))


def test_times_that_were_not_prepared_for(file):
    whole, away = in_memory(load_net(file)), load_net(file).offload_()
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given = {"lq_latent": tiny_latent(), "degrade_sigma": torch.zeros(1)}
    with torch.no_grad():
        for t in (700.0, 300.0):
            args = (x, torch.tensor([t]), tiny_caption())
            assert torch.equal(away(*args, **given), whole(*args, **given))


def test_a_trace_sees_every_block(file):
    whole, away = in_memory(load_net(file)), load_net(file).offload_()
    seen = ({}, {})
    x = torch.zeros(1, 3, 64, 64)
    with torch.no_grad():
        for net, found in zip((whole, away), seen, strict=True):
            given = {"lq_latent": tiny_latent(), "trace": found.__setitem__}
            net(x, torch.tensor([500.0]), tiny_caption(), **given)
    assert seen[0].keys() == seen[1].keys()
    assert all(torch.equal(seen[1][name], t) for name, t in seen[0].items())


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    "options", [{}, {"guidance_together": False}, {"guidance_scale": 1}, {"tile": (64, 64)}]
)
def test_generate(demo, precision, options):
    whole = demo[precision]
    how = {"device": "cpu", "precision": precision, "offload": "blocks"}
    away = L2PPipeline.from_pretrained("demo", **how)
    size = {"height": 128, "width": 64} if "tile" in options else {}
    for seed in range(2):
        found = generate(away, seed, **size, **options)
        assert torch.equal(found, generate(whole, seed, **size, **options))
    blocks = [*away.net.context_refiner, *away.net.noise_refiner, *away.net.layers]
    assert {p.device.type for b in blocks for p in b.parameters()} == {"meta"}


def test_forms_of_a_file(tmp_path):
    """Stored in other types, mixed, or as a pickle: read and converted block by block."""
    net = tiny_net()
    state = net.state_dict()
    mixed = {k: v.half() if ".mlp" in k else v.double() for k, v in state.items()}
    config = json.dumps(CONFIG.to_dict())
    save_file(mixed, tmp_path / "mixed.safetensors", {"config": config, "backbone": "demo"})
    torch.save({f"net.{k}": v.bfloat16() for k, v in state.items()}, tmp_path / "bf16.pth")
    for name in ("mixed.safetensors", "bf16.pth"):
        how = {"config": CONFIG} if name.endswith(".pth") else {}
        away = decoder(tmp_path / name, offload="blocks", **how)
        (piece, *_) = away.net.offload._pieces["patch_blocks"]
        assert all(isinstance(source, InFile) for source in piece.kept[1])
        assert torch.equal(decode(away), decode(plain(tmp_path / name, **how)))


def test_changes_before_are_kept(file):
    edited = load_net(file)
    with torch.no_grad():
        edited.patch_blocks[1].mlp_x.w2.weight.mul_(1.5)
        edited.final_layer.linear.weight.mul_(1.5)
    whole = PiDNet(CONFIG).requires_grad_(False)
    whole.load_state_dict(edited.state_dict())
    found = decode(PiDDecoder(edited, offload="blocks"))
    assert torch.equal(found, decode(PiDDecoder(whole)))
    assert not torch.equal(found, decode(decoder(file)))


def test_nothing_of_the_file_stays_mapped(tmp_path):
    for how in ({}, {"precision": "bf16"}):
        path = save_net(tmp_path / f"{len(how)}.safetensors", tiny_net())
        away = decoder(path, offload="blocks", **how)
        assert str(path) not in Path("/proc/self/maps").read_text()
        decode(away)
        assert str(path) not in Path("/proc/self/maps").read_text()


def test_threads_take_turns(file):
    away, whole, found = decoder(file, offload="blocks"), plain(file), {}

    def work(seed):
        found[seed] = decode(away, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(found[seed], decode(whole, seed)) for seed in range(4))


# ---- Memory ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A network of 70 million parameters, 140 MB in bf16: most of it in blocks."""
    changes = {"hidden_size": 512, "num_groups": 8, "patch_depth": 8}
    net = PiDNet(dataclasses.replace(CONFIG, **changes), device="meta")
    state = {n: torch.full(p.shape, 0.01, dtype=torch.bfloat16) for n, p in net.named_parameters()}
    path = tmp_path_factory.mktemp("large") / "pid.safetensors"
    metadata = {"config": json.dumps(net.config.to_dict()), "backbone": "demo"}
    save_file(state, path, metadata)
    return path, sum(p.numel() for p in net.parameters())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_resident_memory_of_a_decode(large, precision, record_property):
    path, parameters = large
    found = {}
    for offload in ("no", "blocks"):
        words = [sys.executable, "-m", "tests.models.offload_memory", path, offload, precision]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found[offload] = json.loads(done.stdout.splitlines()[-1])
    print(found)
    weights = parameters * {"fp32": 4, "bf16": 2}[precision]
    for key in ("peak", "resident"):
        saved = found["no"][key] - found["blocks"][key]
        record_property(f"{key}_saved_mb", saved / 1e6)
        assert saved > 0.6 * weights, f"{key}: {saved / 1e6:.0f} of {weights / 1e6:.0f} MB"
    assert found["no"]["sum"] == pytest.approx(found["blocks"]["sum"], rel=1e-5)


def test_bytes_that_a_planner_may_ask_for(large):
    path, _ = large
    net = load_net(path)
    blocks = sum(p.numel() for b in (*net.patch_blocks, *net.pixel_blocks) for p in b.parameters())
    net.offload_(dtype=torch.float32)
    gaps = 256 * sum(len(list(b.parameters())) for b in (*net.patch_blocks, *net.pixel_blocks))
    assert 0 <= net.offload.host_bytes - 4 * blocks <= 2 * gaps
    largest = 4 * max(
        sum(p.numel() for n, p in block.named_parameters() if not n.startswith("adaLN_modulation_"))
        for block in (net.patch_blocks[0], net.pixel_blocks[0])
    )
    assert 0 <= net.offload.device_bytes - 2 * largest <= 2 * gaps


# ---- Options -----------------------------------------------------------------------------------


def test_graphs_are_off(file):
    assert decoder(file, offload="blocks", cuda_graphs=3).graphs.limit == 0
    assert decoder(file, cuda_graphs=3).graphs.limit == 3
    away = load_net(file).offload_()
    assert PiDDecoder(away).graphs.limit == 0  # however it came to be so
    pipe = L2PPipeline.from_pretrained("demo", device="cpu", offload="blocks")
    assert pipe.graphs.limit == 0
    assert L2PPipeline(pipe.net).graphs.limit == 0


@pytest.mark.parametrize("value", [True, "all"])
def test_bad_values(file, value):
    for make in (
        lambda: decoder(file, offload=value),
        lambda: PiDDecoder(tiny_net(), offload=value),
        lambda: L2PPipeline.from_pretrained("demo", device="cpu", offload=value),
        lambda: PiDDecoder.from_pretrained("no such file", offload=value),
        lambda: L2PPipeline.from_pretrained("no such file", offload=value),
    ):
        with pytest.raises(ValueError, match=r'offload must be False or "blocks"'):
            make()


def test_where_it_would_save_nothing(file):
    with pytest.raises(ValueError, match=r"would save nothing.*in memory"):
        PiDDecoder(tiny_net(), offload="blocks")
    PiDDecoder(load_net(file), offload="blocks")
    l2p = in_memory(load_l2p("demo", dtype=torch.float32))
    with pytest.raises(ValueError, match="would save nothing"):
        L2PPipeline(l2p, offload="blocks")


def test_a_network_that_is_trained(file):
    net = load_net(file).requires_grad_(True)
    with pytest.raises(ValueError, match="must not require gradients"):
        PiDDecoder(net, offload="blocks")
    assert next(net.patch_blocks.parameters()).device.type == "cpu"  # as it was


def test_an_error_in_a_block_leaves_a_decoder_that_works(file, monkeypatch):
    away, whole = decoder(file, offload="blocks"), plain(file)
    decode(away)
    kind, calls = type(away.net.pixel_blocks[0]), []
    returned = kind.returned

    def failing(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return returned(self, *args)

    monkeypatch.setattr(kind, "returned", failing)
    for made in (away, decoder(file, offload="blocks", pixel_chunk=2)):
        calls.clear()
        with pytest.raises(torch.OutOfMemoryError):
            decode(made)
        assert not made.net.offload._slots
        calls.extend([1, 1])
        limit = 0 if made.pixel_chunk is None else 1e-5
        assert (decode(made) - decode(whole)).abs().max() <= limit


def test_an_error_of_the_sampler_too(file):
    """It comes while the pixel blocks are at work on a band."""
    away = decoder(file, offload="blocks", pixel_chunk=2)

    class NoMore(Exception):
        pass

    def draw(shape):
        raise NoMore

    net = away.net
    with torch.no_grad():
        how = {"size": (64, 64), "pixel_chunk": 2}
        condition = net.prepare(tiny_latent(), tiny_caption(), torch.zeros(1), **how)
        kept = None
        try:
            net.student_step(condition, torch.zeros(1, 3, 64, 64), 0.8, 0.5, draw)
        except NoMore as error:
            kept = error  # with the frames it came through
    assert kept is not None

    def again():
        with torch.no_grad():
            net.student_step(condition, torch.zeros(1, 3, 64, 64), 0.8, 0.5, torch.ones)

    thread = threading.Thread(target=again, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()  # it waits for the first call's turn to end


def test_references_alone(file):
    with pixeldiff.backend("reference"):
        assert torch.equal(decode(decoder(file, offload="blocks")), decode(plain(file)))


def test_the_commands(file, tmp_path, monkeypatch):
    save_file({"latent": tiny_latent()}, tmp_path / "latent.safetensors")
    save_file({"embedding": tiny_caption()}, tmp_path / "y.safetensors")
    seen, init = [], PiDDecoder.__init__

    def noted(self, *args, **options):
        seen.append({k: options[k] for k in ("offload", "pixel_chunk")})
        init(self, *args, **options)

    monkeypatch.setattr(PiDDecoder, "__init__", noted)
    monkeypatch.setattr(
        "pixeldiff.models.pid.captions.CaptionSource.embeddings",
        lambda self, name, caption: tiny_caption(),
    )

    def run(*words):
        result = CliRunner().invoke(cli.main, [str(w) for w in words])
        assert result.exit_code == 0, result.output

    shared = ("--device", "cpu", "--quiet")
    common = ("decode", tmp_path / "latent.safetensors", "--model", file, *shared)
    run(*common, "-o", tmp_path / "a.png")
    run(*common, "-o", tmp_path / "b.png", "--offload", "--pixel-chunk", 2)
    assert seen == [
        {"offload": False, "pixel_chunk": None},
        {"offload": "blocks", "pixel_chunk": 2},
    ]
    assert read_picture_metadata(tmp_path / "b.png")["pixel_chunk"] == 2
    seen, wanted = [], L2PPipeline.from_pretrained

    def noted_too(*args, **options):
        seen.append(options["offload"])
        return wanted(*args, **options)

    monkeypatch.setattr(L2PPipeline, "from_pretrained", noted_too)
    words = ("generate", PROMPT, "--model", "demo", "--steps", 1, *shared)
    run(*words, "-o", tmp_path / "c.png")
    run(*words, "-o", tmp_path / "d.png", "--offload")
    assert seen == [False, "blocks"]
    assert (tmp_path / "c.png").read_bytes() == (tmp_path / "d.png").read_bytes()


def test_the_file_of_the_test_is_what_it_seems(large):
    """Mostly blocks, so that what is saved is theirs."""
    path, parameters = large
    state = load_file(path)
    blocks = sum(t.numel() for n, t in state.items() if n.split(".")[0].endswith("_blocks"))
    assert blocks > 0.9 * parameters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_on_cuda(large, precision):
    """Up to rounding: gate and up projections are one product where sizes allow it."""
    path, _ = large
    images, held = [], []
    for offload in (False, "blocks"):
        before = torch.cuda.memory_allocated()
        how = {"device": "cuda", "precision": precision, "offload": offload}
        made = PiDDecoder.from_pretrained(path, **how)
        for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                caption = torch.ones(1, 6, made.net.config.txt_embed_dim)
                given = {"caption": caption, "seed": 0, "output": "pt"}
                images.append(made.decode(tiny_latent(1, 8, 8), **given).images.cpu())
        made.release_graphs()
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_allocated() - before)
        del made
    limit = {"fp32": 1e-3, "bf16": 0.1}[precision]
    assert all((image - images[0]).abs().max() <= limit for image in images)
    assert held[1] < 0.6 * held[0]
