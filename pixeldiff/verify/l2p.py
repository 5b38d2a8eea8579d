"""What an L2P golden states, and what recomputes it.

These files state their outputs under plain names and one tolerance for all, relative to the peak.
What a file is, is told by the tensors it states.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor

from . import l2p_checkpoints, l2p_networks, l2p_parts, l2p_text
from .golden import Golden, NotUnderstood
from .l2p_inputs import Results, beside, padded


@dataclass(frozen=True)
class Kind:
    """One sort of file.

    Args:
        marker: a tensor that only files of this sort state.
        outputs: patterns of the names to reproduce.
        run: (file, its outputs named out. and mid.) -> results by their names in the file.
    """

    marker: str
    outputs: tuple[str, ...]
    run: Callable[[Golden], Results]

    def states(self, name: str) -> bool:
        """Whether `name` is a result of such a file."""
        return any(fnmatchcase(name, pattern) for pattern in self.outputs)


def kind_of(g: Golden) -> Kind:
    """What sort of file it is.

    Raises:
        NotUnderstood: of a sort that this version does not implement.
    """
    kind = next((k for k in KINDS if k.marker in g.tensors), None)
    if kind is None:
        known = ", ".join(k.run.__name__ for k in KINDS)
        raise NotUnderstood(f"an L2P golden file of an unknown sort; known are {known}")
    return kind


def restated(g: Golden) -> tuple[Golden, Callable[[Golden], Results]]:
    """The file with its outputs named out. and mid., and what recomputes them.

    For the inputs of a conversion it is the file of the result, which lies beside them.

    Raises:
        NotUnderstood: a sort of file this version does not implement.
    """
    if CONVERTED in g.tensors:
        g = beside(g, f"{g.path.stem}_result")  # states what becomes of these
    kind, lengths = kind_of(g), _own_rows(g)
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
    caption = [padded(n) for n in case.get("caption_lens", [])]
    if len(set(caption)) < 2 or "cap.x_embed" not in g.tensors:
        return {}
    image = g.tensors["cap.x_embed"].shape[1]
    joint = [image + n for n in caption]
    rows = {n: joint for n in g.tensors if n == "cap.unified" or n.startswith("cap.layers.")}
    refined = [n for n in g.tensors if n.startswith(("cap.cap_embed", "cap.context_refiner."))]
    return {**rows, **dict.fromkeys(refined, caption)}


CONVERTED = "target_init.x_pad_token"
_CAPTURES = "cap.*"
_ENDS = ("all_x_embedder.*", "t_embedder.*", "cap_embedder.*", "x_pad_token", "cap_pad_token")
_BLOCKS = ("noise_refiner.*", "context_refiner.*", "layers.*", "local_decoder.*")
KINDS = (
    Kind(
        "grad_norms_sorted_by_key",
        (_CAPTURES, "x_t", "pred", "target", "loss", "grad_norms_sorted_by_key", "grad.*"),
        l2p_networks.training_step,
    ),
    Kind("net_out", (_CAPTURES, "net_out"), l2p_networks.network),
    Kind(
        "x_final",
        ("sigmas", "timesteps", "x_start", "v.*", "x.*", "x_final", "image_uint8"),
        l2p_networks.sampling,
    ),
    Kind("N1.shift1.strength1.sigmas", ("*.sigmas", "*.timesteps"), l2p_networks.schedules),
    Kind("feat", (_CAPTURES, "y"), l2p_parts.local_decoder),
    Kind("ids", (_CAPTURES, "y", "y_masked", "attn_out", "cap_embed"), l2p_parts.block),
    Kind("freq_emb", ("freq_emb", "t_emb"), l2p_parts.timestep),
    Kind("real.ids", ("*.cos", "*.sin", "*.q_rotated"), l2p_parts.rope),
    Kind(
        "tokens_padded",
        ("tokens_padded", "img_ids", "img_is_pad", "cap_ids", "cap_is_pad"),
        l2p_parts.patchify,
    ),
    Kind("embedding.0", ("embedding.*",), l2p_text.text_encoder),
    Kind("fused.layers.0.attention.qkv.weight", ("split.*.attention.*",), l2p_checkpoints.naming),
    Kind("result.x_pad_token", ("result.*",), l2p_checkpoints.conversion),
    Kind("merged.x_pad_token", ("merged.*",), l2p_checkpoints.merging),
    Kind("x_pad_token", (*_ENDS, *_BLOCKS), l2p_checkpoints.checkpoint),
)
