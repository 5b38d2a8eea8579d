"""The models built on `pixeldiff.ops`: `pid` (a pixel diffusion decoder for latents) and `l2p` (a
latent diffusion transformer converted to pixels)."""
