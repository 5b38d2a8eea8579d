"""Someone else's PiD network: where it is in a module, its geometry, and a `PiDNet` on its weights.

Known by the names and shapes of its parameters. What they cannot tell is read from the attributes
that the published implementation keeps, else from the released networks of the same shapes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from ...errors import AccelerationError
from .checkpoint_geometry import Shapes, geometry, network_shapes
from .checkpoint_keys import AUX_HEAD
from .config import PiDConfig
from .layers import RMSNorm
from .network import PiDNet
from .variants import variants

PARTS = (
    "pixel_embedder",
    "s_embedder",
    "t_embedder",
    "y_embedder",
    "patch_blocks",
    "pixel_blocks",
    "final_layer",
)
# Field of the config -> module and attribute that hold it in the published implementation.
_ATTRIBUTES = {
    "text_rope_theta": ("", "text_rope_theta"),
    "rope_mode": ("", "rope_mode"),
    "rope_ref_h": ("", "rope_ref_grid_h"),  # in patches
    "rope_ref_w": ("", "rope_ref_grid_w"),
    "lq_latent_channels": ("lq_proj", "latent_channels"),
    "latent_spatial_down_factor": ("lq_proj", "latent_spatial_down_factor"),
    "lq_latent_unpatchify_factor": ("lq_proj", "latent_unpatchify_factor"),
    "sr_scale": ("lq_proj", "sr_scale"),
    "lq_interval": ("lq_proj", "interval"),
    "lq_conv_padding_mode": ("lq_proj.latent_proj.0", "padding_mode"),
}
_CONVOLUTION = ("stride", "padding", "dilation", "groups")
_NORM_EPS = ("variance_epsilon", "eps")


def find(module: nn.Module) -> dict[str, nn.Module]:
    """Every PiD network in a module that is not pixeldiff's, by its path, "" for the module itself.

    Raises:
        AccelerationError: there is none; names what comes nearest. TypeError: not a module.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(
            f"accelerate: module must be a torch.nn.Module, got {type(module).__name__}; pass the "
            "network that it holds"
        )
    found, nearest, ours = {}, ("", module, ()), None
    for path, inner in module.named_modules():
        if isinstance(inner, PiDNet):
            ours = inner
            continue
        have = tuple(p for p in PARTS if inner._modules.get(p) is not None)
        if len(have) == len(PARTS):
            found[path] = inner
        elif len(have) > len(nearest[2]):
            nearest = (path, inner, have)
    if found:
        return found
    if ours is not None:
        raise AccelerationError(f"accelerate: {kind(ours)} runs on pixeldiff's ops already")
    path, inner, have = nearest
    lacks = ", ".join(p for p in PARTS if p not in have)
    raise AccelerationError(
        f"accelerate: no PiD network in {kind(module)}: looked for a module with the children "
        f"{', '.join(PARTS)}; "
        + (
            f"the nearest is {path or 'the module itself'} ({kind(inner)}), which lacks {lacks}"
            if have
            else "no module in it has any of them"
        )
    )


def adopt(network: nn.Module, config: PiDConfig | None = None) -> PiDNet:
    """A `PiDNet` on the parameters of `network`: the same objects, also after it replaces them.

    Args:
        network: as `find` returns it.
        config: where neither shapes nor attributes tell the geometry.

    Raises:
        AccelerationError: modules that are more than their weights (hooked, wrapped, of another
            kind), another geometry, other parameters.
    """
    who = kind(network)
    shapes = parameter_shapes(network)
    _refuse_changed_modules(network, who, geometry(shapes))
    if config is None:
        config = _config(network, who, shapes)
    config = dataclasses.replace(config, lq_aux_rgb_head=False)
    _check_parameters(who, shapes, network_shapes(config))
    _check_attributes(network, who, config)
    net = PiDNet(config, device="meta")
    theirs = dict(network.named_modules(remove_duplicate=False))
    for path, ours in net.named_modules():
        if isinstance(ours, nn.Conv2d) and theirs[path].padding_mode != ours.padding_mode:
            raise AccelerationError(
                f"accelerate: {who}: {path} must have padding_mode {ours.padding_mode!r}, got "
                f"{theirs[path].padding_mode!r}"
            )
        if ours._parameters:
            # The dict itself: a parameter that is replaced in one is replaced in both.
            ours.__dict__["_parameters"] = theirs[path]._parameters
    return net.eval()


class Structure:
    """The modules inside a network and their hooks, to notice that they have changed.

    Asked before every call, so it holds the dictionaries that tell, not the modules.
    """

    def __init__(self, network: nn.Module) -> None:
        inside = [m for _, m in _inside(network)]
        self._children = [(m._modules, dict(m._modules)) for m in network.modules() if m._modules]
        self._childless = [m._modules for m in inside if not m._modules]
        self._hooks = [h for m in inside for h in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [m.__dict__ for m in inside]

    @torch.compiler.assume_constant_result
    def changed(self) -> bool:
        """Whether a module was added, replaced, hooked or given another forward.

        Compiled code has what it was when traced, and takes no notice of hooks added later anyway.
        """
        return (
            any(self._hooks)
            or any(self._childless)
            or any("forward" in a for a in self._attributes)
            or any(now != then for now, then in self._children)
        )


def parameter_shapes(network: nn.Module) -> dict[str, tuple[int, ...]]:
    """By name, without the training-only head."""
    return {
        name: tuple(p.shape)
        for name, p in network.named_parameters(remove_duplicate=False)
        if not name.startswith(AUX_HEAD)
    }


def kind(module: nn.Module) -> str:
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}"


def _inside(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, inner in network.named_modules(remove_duplicate=False):
        if path and not f"{path}.".startswith(AUX_HEAD):
            yield path, inner


# ---- Geometry --------------------------------------------------------------------------------


def _config(network: nn.Module, who: str, shapes: Shapes) -> PiDConfig:
    facts = geometry(shapes)
    has_latent = facts.pop("lq_latent_channels", None) is None
    known = {**facts, **_attributes(network, facts, has_latent)}
    if any(f not in known for f in _hidden(has_latent)):
        known = {**_released(facts, has_latent), **known}
    if not has_latent:
        known["lq_latent_channels"] = None
    if getattr(network, "use_text_rope", True) is not True:
        raise AccelerationError(f"accelerate: {who} has use_text_rope=False, which no release has")
    unknown = [f for f in _hidden(has_latent) if f not in known]
    if known.get("rope_mode") == "original":
        unknown = [f for f in unknown if not f.startswith("rope_ref")]
    if unknown:
        raise AccelerationError(
            f"accelerate: nothing says {', '.join(unknown)} of {who}: parameters cannot, "
            "attributes do not, and no released network has these shapes. Pass "
            "config=pixeldiff.models.pid.PiDConfig(...)"
        )
    fields = {f.name for f in dataclasses.fields(PiDConfig)}
    try:
        return PiDConfig(**{k: v for k, v in known.items() if k in fields})
    except ValueError as error:
        raise AccelerationError(f"accelerate: {who} is no PiD network: {error}") from error


def _hidden(has_latent: bool) -> list[str]:
    """Fields that leave no trace in any shape."""
    return [f for f, (module, _) in _ATTRIBUTES.items() if has_latent or not module]


def _released(facts: dict[str, object], has_latent: bool) -> dict[str, object]:
    """The hidden fields that all released networks of these shapes have in common."""
    same = []
    for v in variants():
        theirs = geometry(network_shapes(v.inference_config))
        if (theirs.pop("lq_latent_channels", None) is None) == has_latent and theirs == facts:
            same.append(v.inference_config)
    values = {f: {getattr(c, f) for c in same} for f in _hidden(has_latent)}
    return {f: options.pop() for f, options in values.items() if len(options) == 1}


def _attributes(
    network: nn.Module, facts: dict[str, object], has_latent: bool
) -> dict[str, object]:
    modules = dict(network.named_modules(remove_duplicate=False))
    found = {}
    for field in _hidden(has_latent):
        path, name = _ATTRIBUTES[field]
        value = getattr(modules.get(path), name, None)
        if value is not None:
            in_patches = field.startswith("rope_ref")
            found[field] = value * facts.get("patch_size", 1) if in_patches else value
    return found


def _check_attributes(network: nn.Module, who: str, config: PiDConfig) -> None:
    """A config that was given must not contradict what the network says of itself."""
    has_latent = config.lq_latent_channels is not None
    found = _attributes(network, {"patch_size": config.patch_size}, has_latent)
    for field, theirs in found.items():
        ours = getattr(config, field)
        if field.startswith("rope_ref"):
            if config.rope_mode == "original":
                continue
            ours -= ours % config.patch_size
        if ours != theirs:
            path, name = _ATTRIBUTES[field]
            place = f"{path}.{name}" if path else name
            raise AccelerationError(
                f"accelerate: config.{field} is {ours!r}, but {place} of {who} says {theirs!r}; "
                "leave config out"
            )


def _check_parameters(who: str, shapes: Shapes, expected: Shapes) -> None:
    missing = [k for k in expected if k not in shapes]
    other = [k for k in shapes if k not in expected]
    if missing or other:
        said = []
        if missing:
            said.append(f"lacks {len(missing)} of {len(expected)} parameters ({_first(missing)})")
        if other:
            said.append(f"holds {len(other)} that a PiD network does not have ({_first(other)})")
        raise AccelerationError(f"accelerate: {who} {' and '.join(said)}")
    wrong = [k for k in expected if shapes[k] != expected[k]]
    if wrong:
        key = wrong[0]
        raise AccelerationError(
            f"accelerate: {who}: {key} must be {expected[key]}, got {shapes[key]}"
            + (f"; {len(wrong)} parameters differ" if len(wrong) > 1 else "")
        )


# ---- Modules that are more than their weights ------------------------------------------------


def _refuse_changed_modules(network: nn.Module, who: str, facts: dict[str, object]) -> None:
    """Only weights are taken over: a module that does more than its kind would be skipped."""
    expected = _skeleton(frozenset(facts.items()))
    reasons = []
    for path, inner in _inside(network):
        reason = _difference(inner, expected.get(path))
        if reason:
            reasons.append(f"{path} {reason}")
    if reasons:
        raise AccelerationError(
            f"accelerate: {who} has {len(reasons)} modules that pixeldiff's ops would pass by: "
            f"{_first(reasons, '; ')}. Merge or remove what was added, or accelerate before it is"
        )


@functools.lru_cache(maxsize=8)
def _skeleton(facts: frozenset[tuple[str, Any]]) -> dict[str, nn.Module]:
    """Every module by its path, of the smallest network with the depths that `facts` tell."""
    known = dict(facts)
    depth, injections = known["patch_depth"], known.get("num_injections", 1)
    net = PiDNet(
        PiDConfig(
            hidden_size=4,
            num_groups=1,
            patch_depth=max(depth, 1),
            pixel_depth=max(known["pixel_depth"], 1),
            patch_size=1,
            pixel_hidden_size=4,
            pixel_attn_hidden_size=4,
            pixel_num_groups=1,
            txt_embed_dim=1,
            txt_max_length=1,
            rope_ref_h=1,
            rope_ref_w=1,
            lq_latent_channels=1 if "num_injections" in known else None,
            latent_spatial_down_factor=1,
            sr_scale=1,
            lq_hidden_dim=4,
            lq_num_res_blocks=known.get("lq_num_res_blocks", 0),
            lq_interval=max(-(-depth // max(injections, 1)), 1),
            pit_lq_inject=known.get("pit_lq_inject", False),
        ),
        device="meta",
    )
    return dict(net.named_modules())


def _difference(theirs: nn.Module, ours: nn.Module | None) -> str | None:
    """What a module does beside what its place in the network says, or None."""
    if theirs._forward_hooks or theirs._forward_pre_hooks:
        return "has a forward hook"
    if "forward" in theirs.__dict__:
        return "has had its forward replaced"
    if isinstance(theirs, nn.Dropout) and theirs.p > 0:
        return f"drops out with p = {theirs.p}"
    if isinstance(theirs, nn.GELU) and theirs.approximate != "none":
        return f"is GELU(approximate={theirs.approximate!r})"
    for base in (nn.Linear, nn.Conv2d, nn.GroupNorm):
        if isinstance(ours, base):
            if type(theirs).forward is not base.forward:
                return f"is {kind(theirs)}, not torch.nn.{base.__name__}"
            return _other_settings(theirs, ours)
    if isinstance(ours, RMSNorm):
        eps = next((getattr(theirs, n) for n in _NORM_EPS if hasattr(theirs, n)), None)
        if eps not in (None, 1e-6):
            return f"has eps = {eps}, not 1e-06"
    return None


def _other_settings(theirs: nn.Module, ours: nn.Module) -> str | None:
    names = {nn.Conv2d: _CONVOLUTION, nn.GroupNorm: ("num_groups", "eps")}.get(type(ours), ())
    for name in names:
        have, want = getattr(theirs, name), getattr(ours, name)
        if have != want:
            return f"has {name} = {have}, not {want}"
    return None


def _first(items: list[str], separator: str = ", ") -> str:
    return separator.join(items[:5]) + (f"{separator}..." if len(items) > 5 else "")
