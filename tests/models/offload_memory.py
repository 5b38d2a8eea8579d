"""A decode in a process of its own: what is resident, and what was at most while it decoded.

python -m tests.models.offload_memory FILE OFFLOAD PRECISION
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from pixeldiff.models.pid import PiDDecoder


def status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def main(path: str, offload: str, precision: str) -> dict[str, int | float]:
    torch.set_num_threads(1)
    decoder = PiDDecoder.from_pretrained(
        path, device="cpu", precision=precision, offload=offload == "blocks" and offload
    )
    config = decoder.net.config
    latent = torch.zeros(1, config.lq_latent_channels, 2, 2)
    caption = torch.ones(1, 4, config.txt_embed_dim)

    def decode() -> float:
        images = decoder.decode(latent, caption=caption, seed=0, steps=2, output="pt").images
        return float(images.double().sum())

    decode()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from now on
    return {"sum": decode(), "peak": status("VmHWM"), "resident": status("VmRSS")}


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
