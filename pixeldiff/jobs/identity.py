"""What makes two runs the same job: everything that decides the pixels."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor, nn

_HASHERS = 4  # threads: hashlib lets the others run


def digest_of(*tensors: Tensor | None) -> str:
    """SHA-256 of dtypes, shapes and values; reads each tensor once."""
    sha = hashlib.sha256()
    for t in tensors:
        if t is None:
            sha.update(b"none")
            continue
        sha.update(f"{t.dtype} {tuple(t.shape)}".encode())
        if t.numel():
            t = t.detach().cpu().contiguous()
            sha.update(memoryview(t.reshape(-1).view(torch.uint8).numpy()))
    return sha.hexdigest()


def weights_digest(net: nn.Module) -> str:
    """SHA-256 of a network's weights and of their names, wherever its blocks' weights are."""
    offload = getattr(net, "offload", None)
    state = {k: t for k, t in net.state_dict().items() if offload is None or not t.is_meta}
    with ThreadPoolExecutor(_HASHERS) as pool:
        digests = dict(zip(state, pool.map(digest_of, state.values()), strict=True))
    if offload is not None:
        names = {id(module): name for name, module in net.named_modules()}
        for block, weights in offload.weights():
            digests |= {f"{names[id(block)]}.{k}": digest_of(t) for k, t in weights.items()}
    text = "\n".join(f"{name} {digest}" for name, digest in sorted(digests.items()))
    return hashlib.sha256(text.encode()).hexdigest()


def machine(device: torch.device) -> dict[str, Any]:
    """What of the machine and its libraries decides the last bits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"device": name, "torch": torch.__version__}


def canonical(job: Mapping[str, Any]) -> str:
    """The same text for the same job; also what comes back from JSON."""
    return json.dumps(job, sort_keys=True, default=list)


def differences(held: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """ "steps (4 there, 2 here)" of each entry that differs."""
    held, asked = json.loads(canonical(held)), json.loads(canonical(asked))
    return [
        f"{key} ({_shown(held.get(key))} there, {_shown(asked.get(key))} here)"
        for key in sorted({*held, *asked})
        if held.get(key) != asked.get(key)
    ]


def _shown(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
