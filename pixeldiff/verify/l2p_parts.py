"""Recompute the L2P goldens of one part: a block, the local decoder, positions, names."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..models.l2p.block import Block
from ..models.l2p.layers import CaptionEmbedder, TimeEmbedder
from ..models.l2p.local_decoder import LocalDecoder
from ..models.l2p.positions import caption_positions, image_positions, rope_3d, time_embedding
from ..ops.qk_norm_rope import rotate
from .golden import Golden
from .l2p_inputs import Results, decoder_config, given, load_weights, padded, weights


def local_decoder(g: Golden) -> Results:
    c = g.meta["config"]
    form = {16: "1k", 64: "4k", 128: "8k", 160: "10k"}[c["patch_size"]]
    decoder = LocalDecoder(decoder_config(form, c["decoder_widths"]), c["dim"], c["in_channels"])
    own = {k.removeprefix("local_decoder."): t for k, t in weights(g).items()}
    load_weights(decoder, own)
    out: Results = {}

    def trace(name: str, value: Tensor) -> None:
        out[f"cap.{name}"] = value.permute(0, 3, 1, 2)

    encoded = decoder.encode(given(g, "x"), trace=trace)
    features = g.tensors["feat"].float().permute(0, 2, 3, 1)
    y = decoder.decode(encoded, features, trace=trace)
    return {**out, "y": y}


def block(g: Golden) -> Results:
    c, x = g.meta["config"], g.tensors["x"].float()
    e = g.tensors["t_emb"].float() if c["modulation"] else None
    module = Block(
        *(c["dim"], c["n_heads"], c["ffn_hidden"]),
        None if e is None else e.shape[1],
        c["norm_eps"],
    )
    load_weights(module, weights(g))
    modulation = None if e is None else module.modulation(e)
    ids = g.tensors["ids"].long().repeat(x.shape[0], 1)
    rope = rope_3d(ids, tuple(c["axes_dims"]), theta=c["rope_theta"])
    none = x.new_zeros(x.shape[0], x.shape[2])
    scale = none if modulation is None else modulation[:, 0]
    norm = module.attention_norm1.weight
    h = ops.rms_norm_modulate(x, norm, scale, None, eps=module.eps)
    out = {"y": module(x, modulation, rope), "attn_out": module.attention(h, rope)}
    if "mask" in g.tensors:
        out["y_masked"] = module(x, modulation, rope, key_mask=g.tensors["mask"])
    if "caption" in g.tensors:
        caption = g.tensors["caption"].float()
        embedder = CaptionEmbedder(caption.shape[1], c["dim"], c["norm_eps"])
        start = "cw.cap_embedder."
        own = {k.removeprefix(start): t.float() for k, t in g.tensors.items() if start in k}
        load_weights(embedder, own)
        out["cap_embed"] = embedder(caption[None])[0]
    return out


def timestep(g: Golden) -> Results:
    c = g.meta["config"]
    t = g.tensors["t"] * c["t_scale"]
    embedder = TimeEmbedder(c["out"])
    load_weights(embedder, g.weights("t_embedder."))
    return {"freq_emb": time_embedding(t), "t_emb": embedder(t)}


def rope(g: Golden) -> Results:
    out: Results = {}
    for case in ("real", "tiny"):
        dims, ids = tuple(g.meta["config"][f"{case}_axes"]), g.tensors[f"{case}.ids"]
        cos, sin = rope_3d(ids.long(), dims, theta=g.meta["config"]["theta"])
        out[f"{case}.cos"], out[f"{case}.sin"] = cos, sin
        out[f"{case}.q_rotated"] = rotate(g.tensors[f"{case}.q"], cos, sin)
    return out


def patchify(g: Golden) -> Results:
    """The file pads by repeating the last token; the network writes the pad token there."""
    c, case = g.meta["config"], g.meta["case"]
    tokens = ops.patchify(g.tensors["image"][None], c["patch_size"], channels_last=True)[0]
    grid = (case["H"] // c["patch_size"], case["W"] // c["patch_size"])
    rows, caption = padded(len(tokens)), padded(case["cap_len"])
    return {
        "tokens_padded": torch.cat((tokens, tokens[-1:].expand(rows - len(tokens), -1))),
        "img_ids": image_positions(grid, rows, caption + 1),
        "cap_ids": caption_positions(caption),
        "img_is_pad": torch.arange(rows) >= len(tokens),
        "cap_is_pad": torch.arange(caption) >= case["cap_len"],
    }
