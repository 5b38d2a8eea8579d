"""Digests of pictures that a fresh process makes, with tests and tests/models/l2p on its path.

One line a picture, "name digest". What happened before in the process must not matter: --shuffled
makes them in another order, after draws from every global generator.
"""

from __future__ import annotations

import argparse
import hashlib
import random

import numpy as np
import tiny_l2p
import torch
from tiny_pid import tiny_caption, tiny_latent, tiny_net

from pixeldiff.models.l2p import L2PPipeline
from pixeldiff.models.pid import PiDDecoder

PID = {
    "pid": {},
    "pid-steps": {"steps": 2, "sigma": 0.3},
    "pid-ode": {"sample_type": "ode", "state_dtype": "fp32"},
    "pid-tiles": {"tile": (2, 3)},
    "pid-tile-pairs": {"tile": (2, 3), "tile_batch": 2},
    "pid-alone": {"tile": (2, 3), "tile_mode": "independent"},
}
Y = tiny_l2p.captions(5, 9)
L2P = {
    "l2p": {},
    "l2p-guided": {"guidance_scale": 2.5, "negative_prompt_embeds": Y[1]},
    "l2p-apart": {
        "guidance_scale": 2.5,
        "negative_prompt_embeds": Y[1],
        "guidance_together": False,
    },
    "l2p-tiles": {"tile": (32, 32)},
    "l2p-pieces": {"decoder_memory": 400_000},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def works(device: str):
    for precision, dtype in DTYPES.items():
        decoder = PiDDecoder(tiny_net(dtype=dtype).to(device))
        latent, caption = tiny_latent(1, 4, 5), tiny_caption()
        for name, options in PID.items():
            yield (
                f"{name}-{precision}",
                lambda d=decoder, z=latent, y=caption, o=options: d.decode(
                    z, caption=y, seed=7, output="pt", **o
                ),
            )
        pipe = L2PPipeline(tiny_l2p.network(tiny_l2p.config(), dtype=dtype).to(device))
        for name, options in L2P.items():
            yield (
                f"{name}-{precision}",
                lambda p=pipe, o=options: p(
                    **{"prompt_embeds": Y[0], "height": 64, "width": 96, **o},
                    num_inference_steps=2,
                    seed=7,
                    output_type="pt",
                ),
            )


def digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.cpu().contiguous().numpy().tobytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shuffled", action="store_true")
    args = parser.parse_args()
    todo = list(works(args.device))
    if args.shuffled:
        random.Random(1).shuffle(todo)
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)
        torch.randn(1000, device=args.device)
    found = {name: digest(work().images) for name, work in todo}
    for name in sorted(found):
        print(name, found[name])


if __name__ == "__main__":
    main()
