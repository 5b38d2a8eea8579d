"""The ops: one file each, with the definition (`reference`) and the table of backends."""

from .add_silu import add_silu
from .gated_norm_residual import gated_norm_residual
from .gated_residual_norm import gated_residual_norm
from .joint_attention import joint_attention
from .local_decoder_down import local_decoder_down
from .local_decoder_up import local_decoder_up
from .patchify import patchify, unpatchify
from .pixel_adaln_compress import pixel_adaln_compress
from .pixel_adaln_mlp import pixel_adaln_mlp
from .pixel_embed import pixel_embed
from .pixel_head import pixel_head
from .pixel_head_step import pixel_head_step
from .qk_norm_rope import qk_norm_rope
from .registry import backend, explain
from .rms_norm import rms_norm
from .rms_norm_modulate import rms_norm_modulate
from .sigma_gate import sigma_gate
from .sigma_gate_norm import sigma_gate_norm
from .swiglu import swiglu

__all__ = [
    "add_silu",
    "backend",
    "explain",
    "gated_norm_residual",
    "gated_residual_norm",
    "joint_attention",
    "local_decoder_down",
    "local_decoder_up",
    "patchify",
    "pixel_adaln_compress",
    "pixel_adaln_mlp",
    "pixel_embed",
    "pixel_head",
    "pixel_head_step",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_modulate",
    "sigma_gate",
    "sigma_gate_norm",
    "swiglu",
    "unpatchify",
]
