"""Recompute the L2P goldens: positions, blocks, local decoders, whole networks.

These files state their outputs under plain names and one tolerance for all, relative to the peak.
What a file is, is told by the tensors it states.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..models.l2p.block import Block
from ..models.l2p.checkpoint_keys import split_names
from ..models.l2p.config import DECODERS, L2PConfig
from ..models.l2p.conversion import planned
from ..models.l2p.layers import CaptionEmbedder, TimeEmbedder
from ..models.l2p.local_decoder import LocalDecoder
from ..models.l2p.merging import overlaid
from ..models.l2p.network import L2PNet
from ..models.l2p.positions import caption_positions, image_positions, rope_3d, time_embedding
from ..models.l2p.training import NoiseLevels, noised, velocity_loss
from ..ops.qk_norm_rope import rotate
from .golden import Golden, NotUnderstood, read_golden
from .portable_generator import generated

Results = dict[str, Tensor]
SEQ_MULTIPLE = 32


@dataclass(frozen=True)
class Kind:
    """One sort of file.

    Args:
        marker: a tensor that only files of this sort state.
        outputs: names of the tensors to reproduce, or, with a dot at the end, what they start with;
            those that start with `cap.` or `grad.` always are.
        run: (file, weights) -> results by their names in the file.
    """

    marker: str
    outputs: tuple[str, ...]
    run: Callable[[Golden], Results]

    def states(self, name: str) -> bool:
        """Whether `name` is a result of such a file."""
        starts = tuple(o for o in ("cap.", "grad.", *self.outputs) if o.endswith("."))
        return name in self.outputs or name.startswith(starts)


def restated(g: Golden) -> tuple[Golden, Callable[[Golden], Results]]:
    """The file with its outputs named out. and mid., and what recomputes them.

    Raises:
        NotUnderstood: a sort of file this version does not implement.
    """
    kind = next((k for k in KINDS if k.marker in g.tensors), None)
    if kind is None:
        known = ", ".join(k.run.__name__ for k in KINDS)
        raise NotUnderstood(f"an L2P golden file of an unknown sort; known are {known}")
    lengths = _own_rows(g)
    tensors: dict[str, Tensor] = {}
    for name, tensor in g.tensors.items():
        if kind.states(name):
            tensors.update(_by_item(_result_name(name), tensor, lengths.get(name)))
        else:
            tensors[name] = tensor

    def run(golden: Golden) -> Results:
        got: Results = {}
        for name, tensor in kind.run(golden).items():
            got.update(_by_item(_result_name(name), tensor, lengths.get(name)))
        return got

    return replace(g, tensors=tensors), run


def _result_name(name: str) -> str:
    return f"mid.{name[4:]}" if name.startswith("cap.") else f"out.{name}"


def _by_item(name: str, tensor: Tensor, rows: list[int] | None) -> Results:
    """Items of a batch whose rows beyond their own number mean nothing, each with its own rows."""
    if rows is None:
        return {name: tensor}
    return {f"{name}[{b}]": tensor[b : b + 1, :n] for b, n in enumerate(rows)}


def _own_rows(g: Golden) -> dict[str, list[int]]:
    """By tensor, the rows of each item that mean something; those left out are whole."""
    case = g.meta["case"]
    if "valid_len" in case:
        return {"y_masked": case["valid_len"]}
    caption = [_padded(n) for n in case.get("caption_lens", [])]
    if len(set(caption)) < 2 or "cap.x_embed" not in g.tensors:
        return {}
    image = g.tensors["cap.x_embed"].shape[1]
    joint = [image + n for n in caption]
    rows = {n: joint for n in g.tensors if n == "cap.unified" or n.startswith("cap.layers.")}
    refined = [n for n in g.tensors if n.startswith(("cap.cap_embed", "cap.context_refiner."))]
    return {**rows, **dict.fromkeys(refined, caption)}


def _padded(rows: int) -> int:
    return -(-rows // SEQ_MULTIPLE) * SEQ_MULTIPLE


# ---- Weights and geometry ----------------------------------------------------------------------


def _weights(g: Golden) -> dict[str, Tensor]:
    case = g.meta["case"]
    if "weights_seed" in case:
        seed = case["weights_seed"]
        return {k: generated(seed, k, *rule) for k, rule in case["weights_rules"].items()}
    if "weights" in case:
        shared = read_golden(g.path.parent / f"{case['weights']}.safetensors")
        return {k: t.float() for k, t in shared.tensors.items()}
    return g.weights()


def _load(module: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    try:
        module.load_state_dict(weights)
    except RuntimeError as e:
        raise NotUnderstood(f"its weights do not fit: {e}") from e


def _input(g: Golden, name: str) -> Tensor:
    rule = g.meta["case"].get("inputs_generated", {}).get(name)
    return g.tensors[name].float() if rule is None else generated(*rule)


def _decoder(form: str, widths: Mapping[str, int] | None):
    return DECODERS[form].with_widths({int(k): v for k, v in (widths or {}).items()})


def _config(values: Mapping[str, Any]) -> L2PConfig:
    same = (
        *("patch_size", "in_channels", "dim", "n_heads", "n_layers", "n_refiner_layers"),
        *("cap_feat_dim", "ffn_hidden", "axes_dims", "axes_lens", "rope_theta", "norm_eps"),
    )
    kept = {name: values[name] for name in (*same, "t_scale")}
    decoder = _decoder(values["decoder_variant"], values["decoder_widths"])
    try:
        return L2PConfig(**kept, local_decoder=decoder)
    except (ValueError, TypeError) as e:
        raise NotUnderstood(f"its network cannot be built: {e}") from e


# ---- One function a sort -----------------------------------------------------------------------


def network(g: Golden) -> Results:
    net = L2PNet(_config(g.meta["config"]))
    _load(net, _weights(g))
    net.eval()
    x, t = _input(g, "x"), g.tensors["t"]
    captions = [g.tensors[f"caption.{b}"].float() for b in range(len(t))]
    out: Results = {}

    def trace(name: str, value: Tensor) -> None:
        out[f"cap.{name}"] = value

    net(x, t, captions, trace=trace)
    # Without a trace the last block leaves out rows: this is the result that counts.
    return {**out, "net_out": net(x, t, captions)}


def local_decoder(g: Golden) -> Results:
    c = g.meta["config"]
    form = {16: "1k", 64: "4k", 128: "8k", 160: "10k"}[c["patch_size"]]
    decoder = LocalDecoder(_decoder(form, c["decoder_widths"]), c["dim"], c["in_channels"])
    weights = _weights(g)
    _load(decoder, {k.removeprefix("local_decoder."): t for k, t in weights.items()})
    out: Results = {}

    def trace(name: str, value: Tensor) -> None:
        out[f"cap.{name}"] = value.permute(0, 3, 1, 2)

    encoded = decoder.encode(_input(g, "x"), trace=trace)
    features = g.tensors["feat"].float().permute(0, 2, 3, 1)
    y = decoder.decode(encoded, features, trace=trace)
    return {**out, "y": y}


def block(g: Golden) -> Results:
    c, weights, x = g.meta["config"], _weights(g), g.tensors["x"].float()
    e = g.tensors["t_emb"].float() if c["modulation"] else None
    module = Block(
        *(c["dim"], c["n_heads"], c["ffn_hidden"]),
        None if e is None else e.shape[1],
        c["norm_eps"],
    )
    _load(module, weights)
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
        _load(embedder, own)
        out["cap_embed"] = embedder(caption[None])[0]
    return out


def timestep(g: Golden) -> Results:
    c = g.meta["config"]
    t = g.tensors["t"] * c["t_scale"]
    embedder = TimeEmbedder(c["out"])
    _load(embedder, g.weights("t_embedder."))
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
    rows, caption = _padded(len(tokens)), _padded(case["cap_len"])
    return {
        "tokens_padded": torch.cat((tokens, tokens[-1:].expand(rows - len(tokens), -1))),
        "img_ids": image_positions(grid, rows, caption + 1),
        "cap_ids": caption_positions(caption),
        "img_is_pad": torch.arange(rows) >= len(tokens),
        "cap_is_pad": torch.arange(caption) >= case["cap_len"],
    }


def naming(g: Golden) -> Results:
    return {f"split.{k}": t for k, t in split_names(_under("fused.", g.tensors)).items()}


def conversion(g: Golden) -> Results:
    """The tensors that `convert` takes from either side; the file of the inputs lies beside it."""
    given = read_golden(g.path.with_name(g.path.name.replace("_result.", "."))).tensors
    fresh = _under("target_init.", given)
    shapes = {name: tuple(tensor.shape) for name, tensor in fresh.items()}
    copied = planned(_under("source.", given), shapes, g.path).copied
    return {f"result.{name}": copied.get(name, fresh[name]) for name in fresh}


def merging(g: Golden) -> Results:
    base, delta = _under("base.", g.tensors), _under("delta.", g.tensors)
    merged, _ = overlaid(base, delta, g.path, ignore_misfits=True)
    return {f"merged.{name}": tensor for name, tensor in merged.items()}


def _under(start: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)}


def training_step(g: Golden) -> Results:
    # Outside the caller's inference mode, whose tensors can take no part in a gradient.
    with torch.inference_mode(False), torch.enable_grad():
        net = L2PNet(_config(g.meta["config"]))
        _load(net, _weights(g))
        x0, noise, caption = (g.tensors[name].float() for name in ("x0", "noise", "caption"))
        sigma, t = (torch.tensor([value]) for value in NoiseLevels().at(g.meta["case"]["index"]))
        x = noised(x0, noise, sigma)
        u = net(x, t, [caption])
        loss = velocity_loss(u, x0, noise)
        loss.backward()
    out = {"x_t": x, "pred": -u, "target": noise - x0, "loss": loss[None]}
    grads = {name: p.grad for name, p in net.named_parameters()}
    out["grad_norms_sorted_by_key"] = torch.stack([grads[name].norm() for name in sorted(grads)])
    return {**out, **{f"grad.{name}": grad for name, grad in grads.items()}}


KINDS = (
    Kind(
        "grad_norms_sorted_by_key",
        ("x_t", "pred", "target", "loss", "grad_norms_sorted_by_key"),
        training_step,
    ),
    Kind("net_out", ("net_out",), network),
    Kind("feat", ("y",), local_decoder),
    Kind("ids", ("y", "y_masked", "attn_out", "cap_embed"), block),
    Kind("freq_emb", ("freq_emb", "t_emb"), timestep),
    Kind(
        "real.ids",
        tuple(f"{c}.{t}" for c in ("real", "tiny") for t in ("cos", "sin", "q_rotated")),
        rope,
    ),
    Kind(
        "tokens_padded",
        ("tokens_padded", "img_ids", "img_is_pad", "cap_ids", "cap_is_pad"),
        patchify,
    ),
    Kind(
        "fused.layers.0.attention.qkv.weight",
        tuple(
            f"split.layers.0.attention.{name}.weight"
            for name in ("to_q", "to_k", "to_v", "to_out.0", "norm_q", "norm_k")
        ),
        naming,
    ),
    Kind("result.x_pad_token", ("result.",), conversion),
    Kind("merged.x_pad_token", ("merged.",), merging),
)
