"""The models built on `pixeldiff.ops`: `pid` (a pixel diffusion decoder for latents)."""
