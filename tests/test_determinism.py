"""The promises of docs/determinism.md."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_pid import tiny_caption, tiny_latent, tiny_net

from pixeldiff.models.noise import NoiseSource
from pixeldiff.models.pid import PiDDecoder
from pixeldiff.models.tile_noise import SquareNoise

ROOT = Path(__file__).parents[1]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, gpu])]


def fresh(*args: str, hash_seed: int) -> dict[str, str]:
    """Digests that a new process prints."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": str(hash_seed)}
    paths = (ROOT, ROOT / "tests", ROOT / "tests" / "models" / "l2p")
    env["PYTHONPATH"] = os.pathsep.join(map(str, paths))
    command = [sys.executable, "tests/fixed_pixels.py", *args]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return dict(line.split() for line in done.stdout.splitlines())


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_in_fresh_processes(device):
    """Whatever was made before, in whatever order, with other global generators and hashes."""
    first = fresh("--device", device, hash_seed=1)
    assert first == fresh("--device", device, "--shuffled", hash_seed=2)
    assert len(first) == 22
    # Ways that change pixels are told apart at all.
    assert len({first[f"pid{way}-fp32"] for way in ("", "-steps", "-ode", "-tiles", "-alone")}) == 5


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    def noise(seeds):
        return NoiseSource([torch.Generator().manual_seed(s) for s in seeds], "cpu")

    many, one = noise([4, 5, 6]), noise([5])
    for _ in range(3):
        assert torch.equal(many((3, 3, 16, 24))[1:2], one((1, 3, 16, 24)))
    many, one = (SquareNoise(noise(seeds), len(seeds), 3) for seeds in ([4, 5, 6], [5]))
    for place in ((0, 0, 0), (1, 16, 300)):
        assert torch.equal(many(*place, (32, 40))[1:2], one(*place, (32, 40)))


@pytest.mark.parametrize("options", [{}, {"tile": (2, 2)}, {"tile": (2, 2), "tile_batch": 3}])
def test_pixels_of_a_sample_depend_on_its_batch_by_rounding_alone(options):
    decoder = PiDDecoder(tiny_net())
    latent, caption = tiny_latent(3, 3, 4), tiny_caption()

    def decode(which):
        generators = [torch.Generator().manual_seed(s) for s in which]
        out = decoder.decode(
            latent[which], caption=caption, generator=generators, output="pt", **options
        )
        return out.images

    together, alone, others = decode([0, 1, 2]), decode([1]), decode([1, 0])
    torch.testing.assert_close(together[1], alone[0], rtol=0, atol=2e-5)
    torch.testing.assert_close(others[0], alone[0], rtol=0, atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_the_number_of_threads_shows_by_rounding_alone():
    decoder, threads = PiDDecoder(tiny_net()), torch.get_num_threads()
    images = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = decoder.decode(tiny_latent(1, 2, 3), caption=tiny_caption(), seed=0, output="pt")
            images.append(out.images)
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(*images, rtol=0, atol=2e-5)
