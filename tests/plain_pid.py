"""A PiD network that is not pixeldiff's: plain PyTorch, the released parameter names and call.

Stands in for the published implementation, or a host's copy of it, where none is at hand.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pixeldiff.models.pid import PiDConfig


class Norm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.variance_epsilon = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)


class Embed(nn.Module):
    def __init__(self, dim_in: int, dim_out: int, norm: bool = False) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, dim_out)
        self.norm = Norm(dim_out) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class Time(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        # Rounded once: at t = 1000 an ulp of a frequency is seen in the sixth digit.
        frequencies = (-math.log(10) * torch.arange(128) / 128).double().exp().float()
        angle = t.float()[:, None] * frequencies
        waves = torch.cat((angle.cos(), angle.sin()), -1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))[:, None]


def turn(x: Tensor, angle: Tensor) -> Tensor:
    """Rotate neighbouring channel pairs of (B, N, G, d) by (N, d/2)."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[:, None]
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (a.transpose(1, 2) for a in (q, k.to(q.dtype), v.to(q.dtype)))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Joint(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for stream in "xy":
            setattr(self, f"qkv_{stream}", nn.Linear(dim, 3 * dim, bias=False))
            setattr(self, f"q_norm_{stream}", Norm(dim // heads))
            setattr(self, f"k_norm_{stream}", Norm(dim // heads))
            setattr(self, f"proj_{stream}", nn.Linear(dim, dim))
        self.attn_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, y: Tensor, angle: Tensor, text_angle: Tensor):
        parts = []
        for stream, rows, turns in (("y", y, text_angle), ("x", x, angle)):
            qkv = getattr(self, f"qkv_{stream}")(rows).unflatten(-1, (3, self.heads, -1))
            q, k, v = qkv.unbind(2)
            q = turn(getattr(self, f"q_norm_{stream}")(q), turns)
            k = turn(getattr(self, f"k_norm_{stream}")(k), turns)
            parts.append((q, k, v))
        o = attend(*(torch.cat(pair, 1) for pair in zip(*parts, strict=True)))
        text = y.shape[1]
        return self.proj_x(o[:, text:]), self.proj_y(o[:, :text])


class PatchBlock(nn.Module):
    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm_x1, self.norm_y1, self.norm_x2, self.norm_y2 = (Norm(dim) for _ in range(4))
        self.attn = Joint(dim, heads)
        self.mlp_x, self.mlp_y = FeedForward(dim, hidden), FeedForward(dim, hidden)
        self.adaLN_modulation_img = nn.Sequential(nn.Linear(dim, 6 * dim))
        self.adaLN_modulation_txt = nn.Sequential(nn.Linear(dim, 6 * dim))

    def forward(self, x, y, c, angle, text_angle):
        mx, my = (m(c).chunk(6, -1) for m in (self.adaLN_modulation_img, self.adaLN_modulation_txt))
        ax = self.norm_x1(x) * (1 + mx[1]) + mx[0]
        ay = self.norm_y1(y) * (1 + my[1]) + my[0]
        ox, oy = self.attn(ax, ay, angle, text_angle)
        x, y = x + mx[2] * ox, y + my[2] * oy
        x = x + mx[5] * self.mlp_x(self.norm_x2(x) * (1 + mx[4]) + mx[3])
        y = y + my[5] * self.mlp_y(self.norm_y2(y) * (1 + my[4]) + my[3])
        return x, y


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_norm, self.k_norm = Norm(dim // heads), Norm(dim // heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.proj(attend(turn(self.q_norm(q), angle), turn(self.k_norm(k), angle), v))


class PixelMLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class PixelBlock(nn.Module):
    def __init__(self, c: PiDConfig) -> None:
        super().__init__()
        wide = c.patch_size**2 * c.pixel_hidden_size
        self.norm1, self.norm2 = Norm(c.pixel_hidden_size), Norm(c.pixel_hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.Linear(c.hidden_size, 6 * wide))
        self.compress_to_attn = nn.Linear(wide, c.pixel_attn_hidden_size)
        self.attn = SelfAttention(c.pixel_attn_hidden_size, c.pixel_num_groups)
        self.expand_from_attn = nn.Linear(c.pixel_attn_hidden_size, wide)
        self.mlp = PixelMLP(c.pixel_hidden_size)

    def forward(self, q: Tensor, u: Tensor, angle: Tensor) -> Tensor:
        rows, pixels, _ = q.shape
        m = self.adaLN_modulation(u.flatten(0, 1)).unflatten(-1, (pixels, -1)).chunk(6, -1)
        a = self.compress_to_attn((self.norm1(q) * (1 + m[1]) + m[0]).flatten(1))
        a = self.attn(a.unflatten(0, u.shape[:2]), angle)
        q = q + m[2] * self.expand_from_attn(a).reshape(rows, pixels, -1)
        return q + m[5] * self.mlp(self.norm2(q) * (1 + m[4]) + m[3])


class Gate(nn.Module):
    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.content_proj = nn.Linear(2 * dim, outputs)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(5)))

    def forward(self, x: Tensor, f: Tensor, sigma: Tensor) -> Tensor:
        logit = self.content_proj(torch.cat((x, f.to(x.dtype)), -1))
        share = torch.sigmoid(logit - self.log_alpha.exp() * sigma.float().view(-1, 1, 1))
        return (x + share * f).to(x.dtype)  # so that it runs in bf16 without autocast


class Residual(nn.Module):
    def __init__(self, dim: int, padding: str) -> None:
        super().__init__()
        half = (nn.GroupNorm(4, dim), nn.SiLU(), conv(dim, dim, padding))
        self.block = nn.Sequential(*half, nn.GroupNorm(4, dim), nn.SiLU(), conv(dim, dim, padding))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)


def conv(dim_in: int, dim_out: int, padding: str) -> nn.Conv2d:
    return nn.Conv2d(dim_in, dim_out, 3, padding=1, padding_mode=padding)


class Latent(nn.Module):
    """Latents that are enlarged to the patch grid, which is all that the tests need."""

    def __init__(self, c: PiDConfig) -> None:
        super().__init__()
        self.latent_channels, self.interval, self.sr_scale = (
            c.lq_latent_channels,
            c.lq_interval,
            c.sr_scale,
        )
        self.latent_spatial_down_factor = c.latent_spatial_down_factor
        self.latent_unpatchify_factor = c.lq_latent_unpatchify_factor
        dim, out, padding = c.lq_hidden_dim, c.hidden_size, c.lq_conv_padding_mode
        channels = c.lq_latent_channels // c.lq_latent_unpatchify_factor**2
        blocks = (Residual(dim, padding) for _ in range(c.lq_num_res_blocks))
        first = (conv(channels, dim, padding), nn.SiLU(), conv(dim, dim, padding))
        self.latent_proj = nn.Sequential(*first, *blocks)
        points = range(c.num_injections)
        self.output_heads = nn.ModuleList(nn.Linear(dim, out) for _ in points)
        self.pit_head = nn.Linear(dim, out) if c.pit_lq_inject else None
        if c.lq_aux_rgb_head:
            k = c.patch_size // c.sr_scale
            head = (nn.LayerNorm(dim), nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, 3 * k * k))
            self.lq_aux_rgb_head = nn.Sequential(*head)
        self.gate_modules = nn.ModuleList(gate(c) for _ in points)

    def forward(self, latent: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        latent = F.pixel_shuffle(latent, self.latent_unpatchify_factor)
        tokens = self.latent_proj(F.interpolate(latent, size=grid, mode="nearest"))
        heads = [*self.output_heads, *([self.pit_head] if self.pit_head is not None else [])]
        return [head(tokens.flatten(2).transpose(1, 2)) for head in heads]


def gate(c: PiDConfig) -> Gate:
    per_dim = c.lq_gate_type == "sigma_aware_per_token_per_dim"
    return Gate(c.hidden_size, c.hidden_size if per_dim else 1)


class Output(nn.Module):
    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.norm, self.linear = Norm(dim), nn.Linear(dim, channels)

    def forward(self, q: Tensor) -> Tensor:
        return self.linear(self.norm(q))


class PlainPiD(nn.Module):
    """Weights are torch's initial ones; load others. The arguments are the published forward's."""

    def __init__(self, c: PiDConfig) -> None:
        super().__init__()
        self.patch_size, self.txt_max_length = c.patch_size, c.txt_max_length
        self.head_dim, self.pixel_head_dim = c.head_dim, c.pixel_head_dim
        self.rope_mode, self.text_rope_theta = c.rope_mode, c.text_rope_theta
        self.rope_ref_grid_h = c.rope_ref_h // c.patch_size
        self.rope_ref_grid_w = c.rope_ref_w // c.patch_size
        self.pixel_embedder = Embed(c.in_channels, c.pixel_hidden_size)
        self.s_embedder = Embed(c.in_channels * c.patch_size**2, c.hidden_size)
        self.t_embedder = Time(c.hidden_size)
        self.y_embedder = Embed(c.txt_embed_dim, c.hidden_size, norm=True)
        self.y_pos_embedding = nn.Parameter(torch.randn(1, c.txt_max_length, c.hidden_size))
        self.patch_blocks = nn.ModuleList(
            PatchBlock(c.hidden_size, c.num_groups, c.ffn_size) for _ in range(c.patch_depth)
        )
        self.pixel_blocks = nn.ModuleList(PixelBlock(c) for _ in range(c.pixel_depth))
        self.final_layer = Output(c.pixel_hidden_size, c.in_channels)
        self.pit_lq_gate = None
        if c.lq_latent_channels is not None:
            self.lq_proj = Latent(c)
            if c.pit_lq_inject:
                self.pit_lq_gate = gate(c)
        self.last_repa_tokens = None

    def forward(
        self,
        x,
        t,
        y,
        s=None,
        mask=None,
        lq_video_or_image=None,
        lq_latent=None,
        lq_mask=None,
        degrade_sigma=None,
        feature_indices=None,
        return_features_early: bool = False,
        return_lq_aux: bool = False,
    ):
        """A velocity."""
        batch, _, height, width = x.shape
        grid = (height // self.patch_size, width // self.patch_size)
        features = None if lq_latent is None else self.lq_proj(lq_latent, grid)
        e = self.t_embedder(t.view(-1))
        y = self.y_embedder(y[:, : self.txt_max_length])
        y = y + self.y_pos_embedding[:, : y.shape[1]]
        angle, text_angle = self.angles(grid, self.head_dim), self.text_angles(y.shape[1])
        patches = F.pixel_unshuffle(x, self.patch_size).flatten(2).transpose(1, 2)
        h = self.s_embedder(patches)
        for i, block in enumerate(self.patch_blocks):
            if features is not None and i % self.lq_proj.interval == 0:
                r = i // self.lq_proj.interval
                h = self.lq_proj.gate_modules[r](h, features[r], degrade_sigma)
            h, y = block(h, y, F.silu(e), angle, text_angle)
        u = F.silu(e + h)
        self.last_repa_tokens = u
        if features is not None and self.pit_lq_gate is not None:
            u = self.pit_lq_gate(u, features[-1], degrade_sigma)
        q = self.pixel_embedder(x.permute(0, 2, 3, 1)) + self.pixel_positions(height, width, x)
        q = q.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).transpose(2, 3)
        q = q.reshape(batch * grid[0] * grid[1], self.patch_size**2, -1)
        pixel_angle = self.angles(grid, self.pixel_head_dim)
        for block in self.pixel_blocks:
            q = block(q, u, pixel_angle)
        v = self.final_layer(q).reshape(batch, *grid, self.patch_size, self.patch_size, -1)
        return v.permute(0, 5, 1, 3, 2, 4).reshape(batch, -1, height, width)

    def angles(self, grid: tuple[int, int], dim: int) -> Tensor:
        reference, power = (self.rope_ref_grid_h, self.rope_ref_grid_w), (dim / 2) / (dim / 2 - 2)
        axes = []
        for length, ref in zip(grid, reference, strict=True):
            theta = 1e4 * ((length / ref) ** power if self.rope_mode == "ntk_aware" else 1)
            slots = torch.arange(0, dim, 4).float() / dim
            axes.append(torch.outer(torch.linspace(0, 16, length), 1 / theta**slots))
        rows, columns = axes[0][:, None].expand(*grid, -1), axes[1][None].expand(*grid, -1)
        return torch.stack((columns, rows), -1).reshape(grid[0] * grid[1], dim // 2)

    def text_angles(self, length: int) -> Tensor:
        slots = torch.arange(0, self.head_dim, 2).float() / self.head_dim
        return torch.outer(torch.arange(length).float(), 1 / self.text_rope_theta**slots)

    def pixel_positions(self, height: int, width: int, like: Tensor) -> Tensor:
        m = self.pixel_embedder.proj.out_features // 4
        omega = 1e4 ** (-torch.arange(m).double() / m)
        x, y = (torch.outer(torch.arange(n).double(), omega) for n in (width, height))
        table = [x.sin()[None], x.cos()[None], y.sin()[:, None], y.cos()[:, None]]
        return torch.cat([a.expand(height, width, m) for a in table], -1).to(like.dtype)
