"""The L2P network, written once against `pixeldiff.ops`.

What does not depend on the noisy image is computed by `prepare`, once per prompt and size; `step`
is the hot loop. `net(x, t, captions)` is `step(x, t, prepare(captions, size))`.

Source: L2P (arXiv 2605.12013), on the Z-Image transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from ... import ops
from ...ops.registry import needs_grad
from ..feed_forward import SwiGLU
from ..offload import Offload, Part, offloaded, visiting
from . import bands
from .bands import DECODER_MEMORY
from .block import Block, SelfAttention
from .config import SEQ_MULTIPLE, L2PConfig
from .layers import CaptionEmbedder, FinalLayer, TimeEmbedder
from .local_decoder import LocalDecoder
from .positions import Rope, caption_positions, image_positions, rope_3d, time_frequencies
from .sizes import check_size

Trace = Callable[[str, Tensor], None]
Captions = Tensor | Sequence[Tensor]


@dataclass(frozen=True)
class StepModulation:
    """All that depends on the time alone.

    Args:
        time: (B, a) fp32 time vectors.
        blocks: (B, n, 4, D) fp32, see `Block.modulation`: the noise refiner's blocks, then the
            main ones.
    """

    time: Tensor
    blocks: Tensor

    def expand(self, batch: int) -> StepModulation:
        """The same for `batch` images, where it is for one."""
        return StepModulation(self.time.expand(batch, -1), self.blocks.expand(batch, -1, -1, -1))

    def row(self, i: int) -> StepModulation:
        """That of one of the times."""
        return StepModulation(self.time[i : i + 1], self.blocks[i : i + 1])


@dataclass(frozen=True)
class L2PCondition:
    """All that depends neither on the noisy image nor on the time. Made by `L2PNet.prepare`.

    Args:
        size, grid: (H, W) of the image and (h, w) in patches; N = h*w.
        captions: (B, T, D) refined caption rows, T the longest padded caption.
        lengths: rows of each caption with its own padding; the rows beyond are never read.
        image_rope: tables of the image rows, (B*N', head_dim/2) each; N' is N padded.
        joint_rope: tables of image and caption rows, (B*(N'+T), head_dim/2) each.
        key_mask: (B, N'+T), or None where all captions are equally long.
        frequencies: of the time embedding, for times that come with a step.
        modulations: by time.
    """

    size: tuple[int, int]
    grid: tuple[int, int]
    captions: Tensor
    lengths: tuple[int, ...]
    image_rope: Rope
    joint_rope: Rope
    key_mask: Tensor | None
    frequencies: Tensor
    modulations: dict[float, StepModulation] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return len(self.lengths)


class L2PNet(nn.Module):
    """Pixel diffusion transformer converted from a latent one (L2P, arXiv 2605.12013).

    A trunk sees large patches of the noisy image together with the caption; a local decoder turns
    its rows, and the noisy image again, into pixels. Parameter names and shapes are those of the
    released checkpoints. A config without `local_decoder` is the latent model itself.

    The output u is the *negative* velocity: eps - x0 = -u, so an Euler step from noise level s to
    s' is x - (s' - s) * u.

    Args:
        config: geometry.
        device, dtype: of the parameters. fp32 and bf16 are supported; fp64 serves as an oracle.
    """

    def __init__(
        self,
        config: L2PConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config
        self.offload: Offload | None = None
        factory = {"device": device, "dtype": dtype}
        patch, token = f"{c.patch_size}-1", c.in_channels * c.patch_size**2

        def blocks(count: int, adaln_dim: int | None = c.adaln_dim) -> nn.ModuleList:
            shape = (c.dim, c.n_heads, c.ffn_hidden, adaln_dim, c.norm_eps)
            return nn.ModuleList(Block(*shape, **factory) for _ in range(count))

        self.all_x_embedder = nn.ModuleDict({patch: nn.Linear(token, c.dim, **factory)})
        self.noise_refiner = blocks(c.n_refiner_layers)
        self.context_refiner = blocks(c.n_refiner_layers, None)
        self.t_embedder = TimeEmbedder(c.adaln_dim, **factory)
        self.cap_embedder = CaptionEmbedder(c.cap_feat_dim, c.dim, c.norm_eps, **factory)
        self.x_pad_token = nn.Parameter(torch.zeros(1, c.dim, **factory))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, c.dim, **factory))
        self.layers = blocks(c.n_layers)
        if c.local_decoder is None:
            final = FinalLayer(c.dim, c.adaln_dim, token, **factory)
            self.all_final_layer = nn.ModuleDict({patch: final})
        else:
            self.local_decoder = LocalDecoder(c.local_decoder, c.dim, c.in_channels, **factory)

    @property
    def dtype(self) -> torch.dtype:
        return self.x_pad_token.dtype

    @property
    def device(self) -> torch.device:
        return self.x_pad_token.device

    def pack_(self) -> L2PNet:
        """Lay weights that multiply the same input into one buffer, so that one GEMM takes them.

        Parameters keep their names, shapes and values; the state dict stays as it is. One layer is
        copied at a time. `.to()` and `deepcopy` undo it: call it again after them.
        """
        for module in self.modules():
            if isinstance(module, SwiGLU | SelfAttention):
                module.pack_()
        return self

    def offload_(
        self, *, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> L2PNet:
        """Take the blocks' weights off the device: each visits it when its turn comes, while the
        block before computes. Same results; a step takes as long as copying all of them, if that is
        longer (11.3 GB at released size in bf16).

        From then on the blocks' parameters are on the meta device: they say their shapes, and
        nothing that is done to them has an effect. Hooks of the first block of a kind are all
        blocks'.

        Args:
            device, dtype: where and in what to compute; default: as now. Weights that are yet to be
                moved or converted are, a block at a time.

        Raises:
            ValueError: parameters that require gradients, or a device that is not cuda or cpu.
        """
        device = self.device if device is None else device
        dtype = self.dtype if dtype is None else dtype

        def modulation(name: str) -> bool:
            return name.startswith("adaLN_modulation.")

        def rest(name: str) -> bool:
            return not modulation(name)

        parts = [
            Part("context_refiner", self.context_refiner, rest, "modulation"),
            Part("modulation", self._modulated, modulation, "noise_refiner"),
            Part("noise_refiner", self.noise_refiner, rest, "layers"),
            Part("layers", self.layers, rest, "noise_refiner"),
        ]
        if self.offload is None:
            self.offload = offloaded(self, parts, device=device, dtype=dtype)
        return self

    @property
    def _modulated(self) -> tuple[Block, ...]:
        return (*self.noise_refiner, *self.layers)

    def forward(
        self, x: Tensor, t: Tensor | float, captions: Captions, *, trace: Trace | None = None
    ) -> Tensor:
        """The network output u, the negative velocity x0 - eps, at the noisy image x.

        Args:
            x: (S, 3, H, W), H and W multiples of `config.size_multiple`; S divides the number B of
                captions, and caption b belongs to image b % S.
            t: time in [0, 1], 0 pure noise and 1 clean (1 - noise level): one for all captions, a
                float or a tensor (), or one each (B,).
            captions: B features (T_b, E), as a list or, equally long ones, as a tensor (B, T, E).
            trace: called as trace(name, tensor) with intermediate values.

        Returns:
            (B, 3, H, W) fp32.

        Raises:
            SizeError: H or W. ValueError: captions, x or t that do not fit.
        """
        condition = self.prepare(captions, tuple(x.shape[-2:]), trace=trace)
        return self.step(x, t, condition, trace=trace)

    def prepare(
        self,
        captions: Captions,
        size: tuple[int, int],
        *,
        times: Sequence[float] = (),
        trace: Trace | None = None,
    ) -> L2PCondition:
        """Everything that is the same for all steps: refined captions, rotary tables, masks.

        For guidance, give the positive and the negative caption together and let `step` share the
        image between them.

        Args:
            captions: as in `forward`.
            size: (H, W) of the image.
            times: times t in [0, 1] whose modulation vectors to compute now, in one pass over their
                weights; `step` then takes them as plain floats. 1.9 MB each at released size.
        """
        grid = check_size(self.config, size)
        captions = self._checked(captions)
        lengths = tuple(_padded(len(y)) for y in captions)
        rows, longest = _padded(grid[0] * grid[1]), max(lengths)
        joint = [
            torch.cat((image_positions(grid, rows, length + 1), caption_positions(longest)))
            for length in lengths
        ]
        valid = None
        if min(lengths) != longest:
            ends = torch.tensor(lengths, device="cpu")
            valid = (torch.arange(longest, device="cpu") < ends[:, None]).to(self.device)
        frequencies = time_frequencies().to(self.device)
        return L2PCondition(
            size=tuple(size),
            grid=grid,
            captions=self._refined(captions, lengths, valid, trace),
            lengths=lengths,
            image_rope=self._rope([where[:rows] for where in joint]),
            joint_rope=self._rope(joint),
            key_mask=None if valid is None else pad(valid, (rows, 0), value=True),
            frequencies=frequencies,
            modulations=self._modulations(times, frequencies),
        )

    def modulation(self, t: Tensor, frequencies: Tensor | None = None) -> StepModulation:
        """The time vector and every block's modulation vectors for times t (B,) in [0, 1].

        `frequencies` are those of a condition: with them nothing is copied to the device.
        """
        e = self.t_embedder(t.to(self.device).float() * self.config.t_scale, frequencies)
        with visiting(self.offload, "modulation", self._modulated) as blocks:
            return StepModulation(e, torch.stack([block.modulation(e) for block in blocks], 1))

    def step(
        self,
        x: Tensor,
        t: Tensor | float,
        condition: L2PCondition,
        *,
        guidance: Tensor | None = None,
        trace: Trace | None = None,
        decoder_memory: int | None = DECODER_MEMORY,
    ) -> Tensor:
        """One network call of the sampling loop; arguments and result as in `forward`.

        `guidance` and `decoder_memory` as in `decoded`; a trace, and gradients, run the local
        decoder whole.

        A float t that `prepare` was given as a time costs nothing here; no t that is a float, or
        lies on the device, makes the host wait for it. Where captions share an image, its patches
        are embedded once, the noise refiner runs once (if t is one for all and the image needs no
        padding), and so does the half of the decoder that sees the image only.
        """
        mod = self._modulation_for(x, t, condition)
        if guidance is not None:
            _check_halves(condition.batch, x.shape[0])
        if trace:
            trace("t_emb", mod.time)
        rows = self._trunk(x, mod, condition, trace)
        features = rows.unflatten(1, condition.grid)
        if trace:
            trace("feat_map", features.permute(0, 3, 1, 2))
        if self.config.local_decoder is None:
            u = self._unpatchified(rows, mod, condition)
            if guidance is None:
                return u
            positive, negative = u.chunk(2)
            return torch.lerp(negative, positive, guidance.to(u.dtype))
        if trace:
            encoded = self.local_decoder.encode(x, trace=trace)
            return self.local_decoder.decode(encoded, features, guidance, trace=trace)
        return self.decoded(x, features, guidance=guidance, decoder_memory=decoder_memory)

    def features(self, x: Tensor, t: Tensor | float, condition: L2PCondition) -> Tensor:
        """The trunk's rows of the image, (B, N, D): what the local decoder joins with the image."""
        return self._trunk(x, self._modulation_for(x, t, condition), condition)

    def decoded(
        self,
        x: Tensor,
        features: Tensor,
        *,
        guidance: Tensor | None = None,
        decoder_memory: int | None = DECODER_MEMORY,
    ) -> Tensor:
        """The network output from the noisy image and the trunk's features.

        Args:
            x: (S, 3, H, W).
            features: (B, h, w, D), S a divisor of B; features b belong to image b % S.
            guidance: () g on the device: the first half of the features is of positive captions,
                the second of negative ones, and the result is u_neg + g (u_pos - u_neg), in fp32.
                S is then a divisor of B / 2. None is none.
            decoder_memory: bytes that the local decoder may hold beside x, the features and the
                result. It runs whole where that suffices, else tile by tile, which is exact: the
                results differ by rounding, as convolutions of another shape may. How it is cut
                depends on the network, the shapes, the weights' type and this number alone. None
                is whole.

        Returns:
            (B, 3, H, W) fp32, or half as many under guidance.

        Raises:
            ValueError: a number too small for any tile, names the least one; guidance, and no
            negative for each positive.
        """
        decoder, height, width = self.local_decoder, x.shape[2], x.shape[3]
        if guidance is not None:
            _check_halves(features.shape[0], x.shape[0])
        if decoder_memory is None or needs_grad(x, features, *decoder.parameters()):
            return decoder(x, features, guidance)
        if isinstance(decoder_memory, bool) or not isinstance(decoder_memory, int):
            raise TypeError(
                f"L2PNet: decoder_memory must be a number of bytes or None, got {decoder_memory!r}"
            )
        size, batch = (height, width), features.shape[0]
        tiling = bands.plan_for(
            decoder, size, x.shape[0], batch, self.dtype.itemsize, decoder_memory
        )
        return bands.decode(decoder, x, features, tiling, guidance)

    def _trunk(
        self,
        x: Tensor,
        mod: StepModulation,
        condition: L2PCondition,
        trace: Trace | None = None,
    ) -> Tensor:
        c, batch, images = self.config, condition.batch, x.shape[0]
        tokens = condition.grid[0] * condition.grid[1]
        embedder = self.all_x_embedder[f"{c.patch_size}-1"]
        # The patches are not named: as large as the image, they would last to the trunk's end.
        h = embedder(ops.patchify(x, c.patch_size, channels_last=True, dtype=self.dtype))
        rows = _padded(tokens)
        # Rotation depends on differences of positions, and image tokens differ from caption to
        # caption by the same offset; padding, at position 0, does not move along.
        shared = images if mod.time.shape[0] == 1 and rows == tokens else batch
        if rows > tokens:
            h = torch.cat((h, self.x_pad_token.expand(images, rows - tokens, -1)), 1)
        h = _repeated(h, shared)
        if trace:
            trace("x_embed", h)
        rope = tuple(table[: shared * rows] for table in condition.image_rope)
        with visiting(self.offload, "noise_refiner", self.noise_refiner) as blocks:
            for i, block in enumerate(blocks):
                h = block(h, mod.expand(shared).blocks[:, i], rope)
                if trace:
                    trace(f"noise_refiner.{i}", h)
        h = torch.cat((_repeated(h, batch), condition.captions), 1)
        if trace:
            trace("unified", h)
        vectors = mod.expand(batch).blocks[:, c.n_refiner_layers :]
        with visiting(self.offload, "layers", self.layers) as blocks:
            for i, block in enumerate(blocks):
                # Nothing reads the last block's other rows.
                queries = tokens if i == c.n_layers - 1 and trace is None else None
                h = block(
                    h,
                    vectors[:, i],
                    condition.joint_rope,
                    key_mask=condition.key_mask,
                    queries=queries,
                )
                if trace:
                    trace(f"layers.{i}", h)
        return h[:, :tokens]

    def _refined(
        self,
        captions: list[Tensor],
        lengths: tuple[int, ...],
        valid: Tensor | None,
        trace: Trace | None,
    ) -> Tensor:
        """(B, T, D): each caption embedded, padded with the token for it, then with zeros."""
        longest, embedded = max(lengths), []
        for y, length in zip(captions, lengths, strict=True):
            own = self.cap_embedder(y[None])[0]
            own = torch.cat((own, self.cap_pad_token.expand(length - len(own), -1)))
            embedded.append(pad(own, (0, 0, 0, longest - length)))
        h = torch.stack(embedded)
        if trace:
            trace("cap_embed", h)
        rope = self._rope([caption_positions(longest)] * len(captions))
        with visiting(self.offload, "context_refiner", self.context_refiner) as blocks:
            for i, block in enumerate(blocks):
                h = block(h, None, rope, key_mask=valid)
                if trace:
                    trace(f"context_refiner.{i}", h)
        return h

    def _unpatchified(self, rows: Tensor, mod: StepModulation, condition: L2PCondition) -> Tensor:
        c = self.config
        final = self.all_final_layer[f"{c.patch_size}-1"]
        u = final(rows, mod.time).reshape(-1, c.patch_size**2, c.in_channels)
        return ops.unpatchify(u, *condition.size, c.patch_size).float()

    def _rope(self, positions: list[Tensor]) -> Rope:
        c = self.config
        return rope_3d(torch.cat(positions), c.axes_dims, theta=c.rope_theta, device=self.device)

    def _modulations(
        self, times: Sequence[float], frequencies: Tensor
    ) -> dict[float, StepModulation]:
        if not times:
            return {}
        every = self.modulation(torch.tensor(times, dtype=torch.float32), frequencies)
        return {t: every.row(i) for i, t in enumerate(times)}

    def _modulation_for(
        self, x: Tensor, t: Tensor | float, condition: L2PCondition
    ) -> StepModulation:
        """Of one time for all captions, or of one each. Checks x and t on the way."""
        batch, *rest = condition.batch, self.config.in_channels, *condition.size
        if x.dim() != 4 or list(x.shape[1:]) != rest or x.shape[0] == 0 or batch % x.shape[0]:
            raise ValueError(
                f"L2PNet.step: x must be (S, {rest[0]}, H, W) = {('S', *rest)} as prepared, S a "
                f"divisor of the {batch} captions, got {tuple(x.shape)}"
            )
        if not isinstance(t, Tensor):
            prepared = condition.modulations.get(t)
            if prepared is not None:
                return prepared
            t = torch.full((), t, dtype=torch.float32, device=self.device)  # copies nothing there
        if tuple(t.shape) not in ((), (batch,)):
            raise ValueError(
                f"L2PNet.step: t must be a float, or a tensor () or (B,) = ({batch},), got "
                f"{tuple(t.shape)}"
            )
        return self.modulation(t.reshape(-1), condition.frequencies)

    def _checked(self, captions: Captions) -> list[Tensor]:
        c, captions = self.config, list(captions)
        if not captions:
            raise ValueError("L2PNet: captions must hold at least one caption, got none")
        for i, y in enumerate(captions):
            if y.dim() != 2 or y.shape[1] != c.cap_feat_dim or y.shape[0] == 0:
                raise ValueError(
                    f"L2PNet: captions[{i}] must be (T, {c.cap_feat_dim}) caption features with "
                    f"T >= 1, got {tuple(y.shape)}"
                )
            if y.shape[0] > c.max_caption_tokens:
                raise ValueError(
                    f"L2PNet: captions[{i}] must have at most {c.max_caption_tokens} tokens, the "
                    f"network has no rotary positions for more; got {y.shape[0]}"
                )
        return [y.to(self.device, self.dtype) for y in captions]


def _repeated(h: Tensor, batch: int) -> Tensor:
    """h (S, N, D) for `batch` images: image b is h[b % S]."""
    return h if h.shape[0] == batch else h.repeat(batch // h.shape[0], 1, 1)


def _check_halves(batch: int, images: int) -> None:
    if batch % (2 * images):
        raise ValueError(
            f"L2PNet: guidance takes as many negative captions as positive ones, of each of the "
            f"{images} images, got {batch} captions"
        )


def _padded(rows: int) -> int:
    return -(-rows // SEQ_MULTIPLE) * SEQ_MULTIPLE
