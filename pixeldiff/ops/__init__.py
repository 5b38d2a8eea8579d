"""The ops: one file each, with the definition (`reference`) and the table of backends."""

from .add_silu import add_silu
from .fp8_linear import fp8_linear
from .gated_norm_residual import gated_norm_residual
from .gated_residual_norm import gated_residual_norm
from .gated_residual_norm_fp8 import gated_residual_norm_fp8
from .joint_attention import joint_attention
from .joint_attention_fp8 import joint_attention_fp8
from .local_decoder_down import local_decoder_down
from .local_decoder_pixels import local_decoder_pixels
from .local_decoder_up import local_decoder_up
from .patchify import patchify, unpatchify
from .pixel_adaln_compress import pixel_adaln_compress
from .pixel_adaln_mlp import pixel_adaln_mlp
from .pixel_embed import pixel_embed
from .pixel_head import pixel_head
from .pixel_head_step import pixel_head_step
from .qk_norm_rope import qk_norm_rope
from .qkv_norm_rope import fuses_qkv, qkv_norm_rope
from .quantize_rows import quantize_rows
from .registry import backend, explain, named_backend
from .rms_norm import rms_norm
from .rms_norm_modulate import rms_norm_modulate
from .rms_norm_modulate_fp8 import rms_norm_modulate_fp8
from .sigma_gate import sigma_gate
from .sigma_gate_norm import sigma_gate_norm
from .sigma_gate_norm_fp8 import sigma_gate_norm_fp8
from .swiglu import swiglu
from .swiglu_fp8 import swiglu_fp8

__all__ = [
    "add_silu",
    "backend",
    "explain",
    "fp8_linear",
    "fuses_qkv",
    "gated_norm_residual",
    "gated_residual_norm",
    "gated_residual_norm_fp8",
    "joint_attention",
    "joint_attention_fp8",
    "local_decoder_down",
    "local_decoder_pixels",
    "local_decoder_up",
    "named_backend",
    "patchify",
    "pixel_adaln_compress",
    "pixel_adaln_mlp",
    "pixel_embed",
    "pixel_head",
    "pixel_head_step",
    "qk_norm_rope",
    "qkv_norm_rope",
    "quantize_rows",
    "rms_norm",
    "rms_norm_modulate",
    "rms_norm_modulate_fp8",
    "sigma_gate",
    "sigma_gate_norm",
    "sigma_gate_norm_fp8",
    "swiglu",
    "swiglu_fp8",
    "unpatchify",
]
