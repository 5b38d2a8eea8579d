"""Recompute the PiD component goldens: gates, positions, blocks, LQ projection, small layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from .. import ops
from ..models.feed_forward import SwiGLU
from ..models.pid.config import PiDConfig
from ..models.pid.layers import TimeEmbedder
from ..models.pid.lq_projection import LQProjection, SigmaGate
from ..models.pid.mmdit_block import MMDiTBlock
from ..models.pid.pit_block import PiTBlock
from ..models.pid.positions import (
    pixel_sincos,
    rope_1d,
    rope_2d,
    time_embedding,
    time_frequencies,
)
from ..models.pid.residual import Stream
from ..ops.qk_norm_rope import rotate
from .golden import Golden

Results = dict[str, Tensor]


def gates(g: Golden) -> Results:
    out = {}
    for name in ("per_token", "per_token_per_dim"):
        x, f, sigma = (g.tensors[f"in.{name}.{k}"] for k in ("x", "lq", "sigma"))
        gate = SigmaGate(x.shape[-1], f"sigma_aware_{name}")
        g.load(gate, f"{name}.")
        logit = gate.lq_logit(f, sigma)
        out[f"out.{name}.y"] = gate(x, f, logit)
        weight = gate.content_proj.weight[:, : x.shape[-1]]
        out[f"out.{name}.gate"] = torch.sigmoid(linear(x, weight) + logit)
    return out


def lq_projection(g: Golden) -> Results:
    out = {}
    for case in g.meta["config"]["cases"]:
        i, c, grid = case["i"], case["config"], tuple(case["target_grid"])
        config = PiDConfig(
            hidden_size=c["out_dim"],
            num_groups=1,
            patch_depth=c["num_outputs"],
            patch_size=c["patch_size"],
            lq_latent_channels=c["latent_channels"],
            latent_spatial_down_factor=c["latent_spatial_down_factor"],
            lq_latent_unpatchify_factor=c["latent_unpatchify_factor"],
            sr_scale=c["sr_scale"],
            lq_hidden_dim=c["hidden_dim"],
            lq_num_res_blocks=c["num_res_blocks"],
            lq_interval=c["interval"],
            lq_gate_type=c["gate_type"],
            lq_conv_padding_mode=c["conv_padding_mode"],
            pit_lq_inject=c["pit_output"],
            lq_aux_rgb_head=c["lq_aux_rgb_head"],
            lq_aux_rgb_head_latent_block_idx=c["lq_aux_rgb_head_latent_block_idx"],
        )
        net = LQProjection(config)
        net.gate_modules = nn.ModuleList()  # the file holds none
        g.load(net, f"{i}.")
        latent = g.tensors[f"in.{i}.lq_latent"]
        features = net.features(latent, grid)
        out[f"mid.{i}.aligned"] = net.align(latent, grid)
        out[f"mid.{i}.features"] = features
        out.update({f"out.{i}.head.{r}": h for r, h in enumerate(net.heads(features))})
        if config.lq_aux_rgb_head:
            out[f"out.{i}.pred_lq_rgb"] = net.predict_lq_rgb(latent, grid)
    return out


def mmdit_block(g: Golden) -> Results:
    c = g.meta["config"]
    config = PiDConfig(hidden_size=c["hidden_size"], num_groups=c["num_groups"])
    block = MMDiTBlock(config.hidden_size, config.num_groups, config.ffn_size)
    g.load(block)
    x, y = g.tensors["in.x"], g.tensors["in.y"]
    mods = block.modulation(g.tensors["in.c"][:, 0])
    rope = (g.tensors["in.img_cos"], g.tensors["in.img_sin"])
    text = (g.tensors["in.txt_cos"], g.tensors["in.txt_sin"])
    out: Results = {}

    def trace(name: str, value: Tensor) -> None:
        out[f"mid.{name}"] = value

    def run(rotary: tuple[Tensor, Tensor], **options) -> tuple[Tensor, Tensor]:
        streams = Stream(x), Stream(y)
        block(*streams, *mods, rope, rotary, **options)
        return streams[0].x, streams[1].x

    out["out.x"], out["out.y"] = run(text, trace=trace)
    still = (torch.ones_like(text[0]), torch.zeros_like(text[1]))
    out["out.no_text_rope.x"], out["out.no_text_rope.y"] = run(still)
    return out


def pit_block(g: Golden) -> Results:
    c = g.meta["config"]
    patch, heads, width = c["patch_size"], c["attn_num_heads"], c["attn_hidden_size"]
    block = PiTBlock(c["context_dim"], c["pixel_hidden_size"], patch, width, heads)
    g.load(block)
    grid = (c["image"][0] // patch, c["image"][1] // patch)
    reference = tuple(c["rope_ref_grid"])
    rope = rope_2d(grid, width // heads, mode=c["rope_mode"], reference=reference)
    out: Results = {}

    def trace(name: str, value: Tensor) -> None:
        out[f"mid.{name}"] = value

    out["out.x"] = block(g.tensors["in.x"], g.tensors["in.s_cond"], rope, 1, trace=trace)
    return out


def positional(g: Golden) -> Results:
    c, out = g.meta["config"], {}
    for case in c["rope2d"]:
        grid = (case["grid_h"], case["grid_w"])
        table = rope_2d(
            grid,
            case["head_dim"],
            mode=case["mode"],
            reference=(case["ref_grid_h"], case["ref_grid_w"]),
            theta=case["theta"],
        )
        out[f"out.rope2d.{case['i']}.cos"], out[f"out.rope2d.{case['i']}.sin"] = table
    for case in c["rope1d"]:
        table = rope_1d(case["length"], case["head_dim"], theta=case["theta"])
        out[f"out.rope1d.{case['i']}.cos"], out[f"out.rope1d.{case['i']}.sin"] = table
    first = (out["out.rope2d.0.cos"], out["out.rope2d.0.sin"])
    for name in ("q", "k"):
        out[f"out.rotary.{name}"] = rotate(g.tensors[f"in.rotary.{name}"], *first)
    for case in c["sincos"]:
        table = _pixel_table(case["height"], case["width"], case["dim"])
        out[f"out.sincos.{case['i']}"] = table
    far = pixel_sincos(96, 16, start=4000)
    row = pixel_sincos(1, 16).expand(96, -1)
    out["out.sincos_far"] = torch.cat((far, row), -1)
    out["out.timestep.freqs"] = time_frequencies()
    t = g.tensors["in.timestep.t"]
    out["out.timestep.embedding"] = time_embedding(t)
    embedder = TimeEmbedder(g.tensors["w.t_embedder.mlp.2.bias"].numel())
    g.load(embedder, "t_embedder.")
    out["out.timestep.mlp"] = embedder(t)
    return out


def _pixel_table(height: int, width: int, channels: int) -> Tensor:
    x = pixel_sincos(width, channels)[None].expand(height, -1, -1)
    y = pixel_sincos(height, channels)[:, None].expand(-1, width, -1)
    return torch.cat((x, y), -1).reshape(height * width, channels)


def small(g: Golden) -> Results:
    c, t, w = g.meta["config"], g.tensors, g.weights()
    out = {"out.patchify.tokens": ops.patchify(t["in.patchify.img"], c["patchify_patch"])}
    fold = c["unpatchify"]
    out["out.unpatchify.img"] = ops.unpatchify(
        t["in.unpatchify.tokens"], *fold["image"], fold["patch"]
    )
    out["out.rms.y"] = ops.rms_norm(t["in.rms.x"], w["rms.weight"])
    out["out.rms.y_from_bf16_fp32weight"] = ops.rms_norm(t["in.rms.x_bf16"], w["rms.weight"])
    swiglu = SwiGLU(24, 64)
    g.load(swiglu, "swiglu.")
    out["out.swiglu.y"] = swiglu(t["in.swiglu.x"])
    hidden = gelu(linear(t["in.gelu_mlp.x"], w["gelu_mlp.fc1.weight"], w["gelu_mlp.fc1.bias"]))
    out["out.gelu_mlp.y"] = linear(hidden, w["gelu_mlp.fc2.weight"], w["gelu_mlp.fc2.bias"])
    # One pixel per patch: the head's projection without its fold.
    x = t["in.final.x"]
    final = (w["final.norm.weight"], w["final.linear.weight"], w["final.linear.bias"])
    head = ops.pixel_head(x[:, None], *final, size=(1, x.shape[0]), patch=1)
    out["out.final.y"] = head[0, :, 0].T
    image, embed = t["in.pixel_embed.img"], c["pixel_embed"]
    out["out.pixel_embed.y"] = ops.pixel_embed(
        image,
        w["pixel_embed.proj.weight"],
        w["pixel_embed.proj.bias"],
        pixel_sincos(image.shape[3], embed["dim"]),
        pixel_sincos(image.shape[2], embed["dim"]),
        patch=embed["patch"],
    )
    return out


COMPONENTS = {
    "comp_gates": gates,
    "comp_lq_projection": lq_projection,
    "comp_mmdit_block": mmdit_block,
    "comp_pit_block": pit_block,
    "comp_positional": positional,
    "comp_small": small,
}
