"""The trunk against diffusers' Z-Image transformer with the same weights, block by block."""

from __future__ import annotations

import pytest
import torch
from tiny_l2p import captions, config, draw, network, relative

from pixeldiff.models.l2p.positions import rope_3d

LATENT = config(
    patch_size=2,
    in_channels=16,
    dim=288,  # wider than the 256 channels of its time vector
    n_heads=9,
    axes_dims=(8, 12, 12),
    n_refiner_layers=2,
    local_decoder=None,
)


@pytest.fixture(scope="module")
def both():
    """(ours, theirs) with the same random weights, in fp32."""
    transformer = pytest.importorskip("diffusers").ZImageTransformer2DModel
    ours = network(LATENT)
    theirs = transformer(
        dim=LATENT.dim,
        n_layers=LATENT.n_layers,
        n_refiner_layers=LATENT.n_refiner_layers,
        n_heads=LATENT.n_heads,
        n_kv_heads=LATENT.n_heads,
        cap_feat_dim=LATENT.cap_feat_dim,
        axes_dims=list(LATENT.axes_dims),
        axes_lens=list(LATENT.axes_lens),
    )
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs.requires_grad_(False).eval()


@torch.no_grad()
def run_theirs(model, x, t, given):
    """Output and every block's output, by our names of them."""
    seen, hooks = {}, []
    for stage in ("noise_refiner", "context_refiner", "layers"):
        for i, block in enumerate(getattr(model, stage)):
            name = f"{stage}.{i}"
            keep = lambda _, __, out, name=name: seen.__setitem__(name, out)  # noqa: E731
            hooks.append(block.register_forward_hook(keep))
    out = model([item[:, None] for item in x], t, given, return_dict=False)[0]
    for hook in hooks:
        hook.remove()
    return torch.stack([item[:, 0] for item in out]), seen


@pytest.mark.parametrize(
    ("size", "lengths"),
    [((8, 16), (37,)), ((10, 14), (5,)), ((10, 14), (7, 70)), ((8, 16), (32, 96))],
    ids=["exact-image", "padded", "padded-batch", "batch"],
)
def test_whole_and_block_by_block(both, size, lengths):
    ours, theirs = both
    x, t = draw(len(lengths), 16, *size), torch.tensor([0.3, 0.8])[: len(lengths)]
    given, seen = captions(*lengths), {}
    u = ours(x, t, given, trace=seen.__setitem__)
    want, blocks = run_theirs(theirs, x, t, given)
    assert relative(u, want) < 1e-5
    assert relative(ours(x, t, given), want) < 1e-5
    assert len(blocks) == 6
    image = seen["x_embed"].shape[1]
    for name, value in blocks.items():
        for b, length in enumerate(lengths):
            rows = -(-length // 32) * 32
            rows = {"noise_refiner": image, "context_refiner": rows}.get(
                name.split(".")[0], image + rows
            )
            assert relative(seen[name][b, :rows], value[b, :rows]) < 1e-5


@torch.no_grad()
def test_one_block_alone(both):
    """On any rows and positions, with a mask."""
    ours, theirs = both
    x, e = draw(2, 11, 288), draw(2, 256, seed=2)
    where = torch.randint(0, 40, (11, 3), generator=torch.Generator().manual_seed(0))
    mask = torch.ones(2, 11, dtype=torch.bool)
    mask[1, 7:] = False
    rope = rope_3d(where.repeat(2, 1), LATENT.axes_dims)
    complex_table = theirs.rope_embedder(where)[None].expand(2, -1, -1)
    for i, block in enumerate(ours.layers):
        y = block(x, block.modulation(e), rope, key_mask=mask)
        want = theirs.layers[i](x, mask, complex_table, e)
        assert relative(y[0], want[0]) < 1e-5
        assert relative(y[1, :7], want[1, :7]) < 1e-5
