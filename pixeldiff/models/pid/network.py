"""The PiD network, written once against `pixeldiff.ops`.

What does not depend on the noisy image is computed by `prepare`, once per image; `step` is the hot
loop. `net(x, t, y, ...)` is `step(x, t, prepare(...))`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from ... import ops
from ...ops.registry import needs_grad
from ..feed_forward import SwiGLU
from ..fp8 import Fp8Linear, quantize_
from ..offload import Offload, Part, offloaded, visiting
from .config import PiDConfig
from .layers import CaptionEmbedder, FinalLayer, Projection, TimeEmbedder
from .lq_projection import LQProjection, SigmaGate
from .mmdit_block import MMDiTBlock, Rope, Trace
from .pit_block import PiTBlock
from .pixel_bands import Band, bands_of, check_chunk, pixel_stream
from .positions import pixel_sincos, rope_1d, rope_2d, time_embedding
from .residual import Stream
from .samplers import Draw, network_time

# The text's too: their products are few, but their weights are as many as the image's and are read
# in every block, and in e4m3 they are half as many bytes.
_MMDIT_FP8 = [f"attn.{layer}_{stream}" for layer in ("qkv", "proj") for stream in "xy"]
_MMDIT_FP8 += [f"mlp_{stream}.{layer}" for layer in ("w1", "w3", "w2") for stream in "xy"]
_PIT_FP8 = ["attn.qkv", "attn.proj"]


@dataclass(frozen=True)
class StepModulation:
    """All that depends on the time alone: the time vector and every MMDiT modulation vector."""

    time: Tensor  # (B, D)
    image: list[Tensor]  # per block (B, 6, D)
    text: list[Tensor]  # per block (B, 6, D)


@dataclass(frozen=True)
class Tables:
    """All that depends on sizes and times alone, on neither weights nor inputs; batches share it.

    Made by `PiDNet.tables`, on the CPU for the most part: worth keeping from image to image.
    """

    size: tuple[int, int]
    timesteps: tuple[float, ...]
    rope: Rope  # (N, d/2) each
    txt_rope: Rope  # (T, d/2) each
    pixel_rope: Rope  # (N, d'/2) each
    pos_x: Tensor  # (W, p/2)
    pos_y: Tensor  # (H, p/2)
    times: Tensor  # (len(timesteps), 256), their embedding

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        own = (self.pos_x, self.pos_y, self.times)
        return (*self.rope, *self.txt_rope, *self.pixel_rope, *own)


@dataclass(frozen=True)
class PiDCondition:
    """All that depends neither on the noisy image nor on the time. Made by `PiDNet.prepare`."""

    size: tuple[int, int]
    text: Tensor  # (B, T, D)
    # Per injection point (B, N, D), PiT's last. Empty without a latent, or if not kept.
    features: list[Tensor]
    logits: list[Tensor]  # the gates' x-independent logits, as `features`
    rope: Rope
    txt_rope: Rope
    pixel_rope: Rope
    pos_x: Tensor
    pos_y: Tensor
    modulations: dict[float, StepModulation] = field(default_factory=dict)
    make_injection: Callable[[int], tuple[Tensor, Tensor]] | None = None  # where they are not kept
    pixel_chunk: int | None = None  # patches at a time through what works on each by itself

    @property
    def has_latent(self) -> bool:
        # Not bool(): torch 2.11's compiler cannot trace it.
        return len(self.features) > 0 or self.make_injection is not None

    def injection(self, index: int) -> tuple[Tensor, Tensor]:
        """Feature and logit of an injection point."""
        if self.make_injection is not None:
            return self.make_injection(index)
        return self.features[index], self.logits[index]


class PiDNet(nn.Module):
    """Pixel diffusion transformer that turns a latent into an image (PiD, arXiv 2605.23902).

    Parameter names and shapes are those of the released checkpoints. A config without a latent
    branch (`lq_latent_channels=None`) is the PixelDiT text-to-image backbone.

    Args:
        config: geometry.
        device, dtype: of the parameters. fp32 and bf16 are supported; fp64 serves as an oracle.
    """

    def __init__(
        self,
        config: PiDConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = c = config
        self.offload: Offload | None = None
        factory = {"device": device, "dtype": dtype}
        dim = c.hidden_size
        self.y_pos_embedding = nn.Parameter(torch.zeros(1, c.txt_max_length, dim, **factory))
        self.pixel_embedder = Projection(c.in_channels, c.pixel_hidden_size, **factory)
        self.s_embedder = Projection(c.in_channels * c.patch_size**2, dim, **factory)
        self.t_embedder = TimeEmbedder(dim, **factory)
        self.y_embedder = CaptionEmbedder(c.txt_embed_dim, dim, **factory)
        self.patch_blocks = nn.ModuleList(
            MMDiTBlock(dim, c.num_groups, c.ffn_size, **factory) for _ in range(c.patch_depth)
        )
        self.pixel_blocks = nn.ModuleList(
            PiTBlock(
                dim,
                c.pixel_hidden_size,
                c.patch_size,
                c.pixel_attn_hidden_size,
                c.pixel_num_groups,
                **factory,
            )
            for _ in range(c.pixel_depth)
        )
        self.final_layer = FinalLayer(c.pixel_hidden_size, c.in_channels, **factory)
        if c.lq_latent_channels is not None:
            self.lq_proj = LQProjection(c, **factory)
            if c.pit_lq_inject:
                self.pit_lq_gate = SigmaGate(dim, c.lq_gate_type, **factory)

    @property
    def dtype(self) -> torch.dtype:
        return self.s_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.s_embedder.proj.weight.device

    def pack_(self) -> PiDNet:
        """Lay weights that multiply the same input into one buffer, so that one GEMM takes both.

        Parameters keep their names, shapes and values; the state dict stays as it is. One layer is
        copied at a time. `.to()` and `deepcopy` undo it: call it again after them.
        """
        for module in self.modules():
            if isinstance(module, SwiGLU):
                module.pack_()
        return self

    def quantize_(self) -> PiDNet:
        """Hold and multiply the linear layers of all attention and feed-forward in e4m3.

        One layer is quantised at a time, and what it was made of is freed. The rest keeps its dtype
        (AdaLN and its products with the pixel stream, embedders, the latent's branch, gates, head):
        a fifth of the FLOPs of all linear layers, whose errors go into the image unaveraged.
        """
        for block in (*self.patch_blocks, *self.pixel_blocks):
            _quantize(block)
        return self

    def offload_(
        self,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        fp8: bool = False,
    ) -> PiDNet:
        """Take the blocks' weights off the device: each visits it when its turn comes, while the
        block before computes. Same results; a step takes as long as copying all of them, if that is
        longer (1.8 GB at released size in bf16).

        From then on the blocks' parameters are on the meta device: they say their shapes, and
        nothing that is done to them has an effect. Hooks of the first block of a kind are all
        blocks'.

        Args:
            device, dtype: where and in what to compute; default: as now. Weights that are yet to be
                moved or converted are, a block at a time.
            fp8: quantise the blocks as `quantize_` does, on the device.

        Raises:
            ValueError: parameters that require gradients, or a device that is not cuda or cpu.
        """
        device = self.device if device is None else device
        dtype = self.dtype if dtype is None else dtype

        def ready(block: nn.Module) -> None:
            if fp8:
                _quantize(block.to(device, dtype))

        def modulation(name: str) -> bool:
            return name.startswith("adaLN_modulation_")

        parts = [
            # What a time's vectors are made of, a third of all, is needed once an image.
            Part("modulation", self.patch_blocks, modulation, "patch_blocks"),
            Part("patch_blocks", self.patch_blocks, lambda n: not modulation(n), "pixel_blocks"),
            Part("pixel_blocks", self.pixel_blocks, lambda n: True, "patch_blocks"),
        ]
        if self.offload is None:
            self.offload = offloaded(self, parts, device=device, dtype=dtype, ready=ready)
        return self

    @property
    def fp8(self) -> bool:
        """Whether `quantize_` was called."""
        return any(isinstance(module, Fp8Linear) for module in self.modules())

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        *,
        lq_latent: Tensor | None = None,
        degrade_sigma: Tensor | None = None,
        mask: None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """The velocity eps - x0 at the noisy image x.

        Args:
            x: (B, 3, H, W) fp32, H and W multiples of the patch size.
            t: (B,) network time, 1000 times the diffusion time in [0, 1].
            y: (B, T, E) caption embeddings; tokens beyond `txt_max_length` are dropped.
            lq_latent: (B, Cz, zh, zw) normalised latent, or None for no latent branch at all (not
                the same as a latent of zeros).
            degrade_sigma: (B,) noise level of the latent in [0, 1]; None is 0.
            mask: must be None: every text token takes part in attention, padding included, as in
                the released networks.
            trace: called as trace(name, tensor) with intermediate values.

        Returns:
            (B, 3, H, W) fp32.

        Raises:
            ValueError: shapes that do not fit the network, or a mask.
        """
        if mask is not None:
            raise ValueError(
                "PiDNet: mask must be None; the network attends to every text token, padding too. "
                "Shorten y instead"
            )
        condition = self.prepare(lq_latent, y, degrade_sigma, size=tuple(x.shape[-2:]), trace=trace)
        return self.step(x, t, condition, trace=trace)

    def prepare(
        self,
        lq_latent: Tensor | None,
        y: Tensor,
        degrade_sigma: Tensor | None = None,
        *,
        size: tuple[int, int],
        timesteps: Sequence[float] = (),
        tables: Tables | None = None,
        keep_features: bool = True,
        pixel_chunk: int | None = None,
        stack: Tensor | None = None,
        trace: Trace | None = None,
    ) -> PiDCondition:
        """Everything that is the same for all steps of one image.

        Args:
            lq_latent, y, degrade_sigma: as in `forward`.
            stack: (B, Q, H/P, W/P) of `latent_stack`, or what of a larger image's lies under this
                one, instead of lq_latent.
            size: (H, W) of the output.
            timesteps: network times whose modulation vectors to compute now; `step` then takes
                them as plain floats.
            tables: of `tables` for the same size, caption length and times, if they are at hand.
            keep_features: False makes the latent's features and logits where they are needed, in
                every step: same pixels, 0.7 GB less at 2048 x 2048 in bf16 with one logit a channel
                (0.35 GB with one a token), and about 1% more arithmetic.
            pixel_chunk: patches at a time through all that works on each patch by itself (in the
                pixel blocks one row of patches at least), so that little but the streams and what
                attention reads exists for the whole image. Equal up to the rounding of matrix
                products of another height. None is all at once, and so are steps with gradients or
                a trace.

        Raises:
            ValueError: shapes that do not fit the network, or a pixel_chunk below 1.
        """
        grid, pixel_chunk = self._grid(size), check_chunk(pixel_chunk)
        y = self._caption(y)
        if tables is None:
            tables = self.tables(size, y.shape[1], timesteps)
        features, logits, make_injection = [], [], None
        if lq_latent is not None or stack is not None:
            if stack is None:
                stack = self.latent_stack(lq_latent, size)
            make_injection = self._latent_branch(stack, degrade_sigma, grid, y, trace)
            if keep_features:
                every = range(self.config.num_injections + self.config.pit_lq_inject)
                features, logits = map(list, zip(*map(make_injection, every), strict=True))
                make_injection = None
        return PiDCondition(
            size=size,
            text=self._embed_caption(y, trace),
            features=features,
            logits=logits,
            make_injection=make_injection,
            pixel_chunk=pixel_chunk,
            rope=tables.rope,
            txt_rope=tables.txt_rope,
            pixel_rope=tables.pixel_rope,
            pos_x=tables.pos_x,
            pos_y=tables.pos_y,
            modulations=self._modulations(tables),
        )

    def tables(
        self, size: tuple[int, int], text_rows: int, timesteps: Sequence[float] = ()
    ) -> Tables:
        """What `prepare` needs beside weights and inputs, for captions of `text_rows` tokens."""
        c, grid, device = self.config, self._grid(size), self.device
        rows = min(text_rows, c.txt_max_length)
        reference = (c.rope_ref_h // c.patch_size, c.rope_ref_w // c.patch_size)
        rope = {"mode": c.rope_mode, "reference": reference, "device": device}
        times = torch.tensor(timesteps, dtype=torch.float32, device=device)
        return Tables(
            size=size,
            timesteps=tuple(timesteps),
            rope=rope_2d(grid, c.head_dim, **rope),
            txt_rope=self._text_rope(rows),
            pixel_rope=rope_2d(grid, c.pixel_head_dim, **rope),
            pos_x=pixel_sincos(size[1], c.pixel_hidden_size, device=device),
            pos_y=pixel_sincos(size[0], c.pixel_hidden_size, device=device),
            times=time_embedding(times),
        )

    def recaption(self, condition: PiDCondition, y: Tensor) -> PiDCondition:
        """The same condition with another caption; the latent's features are shared, not copied."""
        y = self._caption(y)
        if y.shape[0] != condition.text.shape[0]:
            raise ValueError(
                f"PiDNet.recaption: y must have batch size {condition.text.shape[0]}, got "
                f"{y.shape[0]}"
            )
        return replace(condition, text=self._embed_caption(y), txt_rope=self._text_rope(y.shape[1]))

    def modulation(self, t: Tensor) -> StepModulation:
        """The time vector and every MMDiT modulation vector for network times t (B,)."""
        return self._modulation(time_embedding(t))

    def _modulation(self, times: Tensor) -> StepModulation:
        e = self.t_embedder.embedded(times)
        c = silu(e)
        with visiting(self.offload, "modulation", self.patch_blocks) as blocks:
            image, text = zip(*(block.modulation(c) for block in blocks), strict=True)
        return StepModulation(time=e, image=list(image), text=list(text))

    def _modulations(self, tables: Tables) -> dict[float, StepModulation]:
        """One pass over the modulation weights, 0.4 billion at released size, for all times.

        Made anew for each image: it takes a thousandth of its time, and nothing tells for sure
        whether weights were changed since (a version counter misses writes through `.data`).
        Each time holds its row of the result, which may differ in the last bit from one made alone.
        """
        if not tables.timesteps:
            return {}
        every = self._modulation(tables.times)
        return {
            t: StepModulation(
                time=every.time[i : i + 1],
                image=[m[i : i + 1] for m in every.image],
                text=[m[i : i + 1] for m in every.text],
            )
            for i, t in enumerate(tables.timesteps)
        }

    def step(
        self, x: Tensor, t: Tensor | float, condition: PiDCondition, *, trace: Trace | None = None
    ) -> Tensor:
        """One network call of the sampling loop; arguments and result as in `forward`.

        `t` may be a float: one that `prepare` was given as a timestep costs nothing here.
        """
        u = self._conditioning(x, t, condition, trace)
        size, patch = condition.size, self.config.patch_size
        if self._chunk(x, condition, trace) is None:
            q = self._pixel_stream(x, u, condition, trace)
            del u
            return ops.pixel_head(q, *self._head(), size=size, patch=patch)
        v = torch.empty_like(x, dtype=torch.float64 if u.dtype == torch.float64 else torch.float32)
        with contextlib.closing(self._bands(x, u, condition)) as bands:
            for band, q in bands:
                height = band.rows.stop - band.rows.start
                own = ops.pixel_head(q, *self._head(), size=(height, size[1]), patch=patch)
                v[band.image, :, band.rows] = own[0]
                del q, own
        return v

    def student_step(
        self,
        condition: PiDCondition,
        x: Tensor,
        t: float,
        t_next: float,
        draw: Draw | None,
        want_x0: bool = True,
        *,
        sample_type: str = "sde",
        prediction_type: str = "velocity",
        state_dtype: torch.dtype = torch.float64,
    ) -> tuple[Tensor, Tensor | None]:
        """One step of the student's sampler from diffusion time t to t_next: `step` at 1000 t, and
        the update of x in the same pass over the image.

        Args:
            draw: the step's noise by shape, called once; None in an ODE and in the last step.
            The rest, and the result: as for `pixeldiff.ops.pixel_head_step`.
        """
        u = self._conditioning(x, network_time(t), condition)
        options = {
            "t": t,
            "t_next": t_next,
            "patch": self.config.patch_size,
            "sample_type": sample_type,
            "prediction_type": prediction_type,
            "state_dtype": state_dtype,
            "want_x0": want_x0,
        }
        if self._chunk(x, condition) is None:
            q = self._pixel_stream(x, u, condition, None)
            del u
            noise = None if draw is None else draw(tuple(x.shape))
            return ops.pixel_head_step(q, *self._head(), x, noise, **options)
        noise = x_next = x0 = None
        with contextlib.closing(self._bands(x, u, condition)) as bands:
            for band, q in bands:
                if x_next is None:  # not sooner: attention of the last block needed the room
                    noise = None if draw is None else draw(tuple(x.shape))
                    x_next, x0 = torch.empty_like(x), torch.empty_like(x) if want_x0 else None
                at = (slice(band.image, band.image + 1), slice(None), band.rows)
                state = (x[at], None if noise is None else noise[at])
                own, own_x0 = ops.pixel_head_step(q, *self._head(), *state, **options)
                x_next[at] = own
                if want_x0:
                    x0[at] = own_x0
                del q, own, own_x0
        return x_next, x0

    def _conditioning(
        self, x: Tensor, t: Tensor | float, condition: PiDCondition, trace: Trace | None = None
    ) -> Tensor:
        """What the patch stream tells the pixel blocks of each patch, (B*N, D)."""
        batch, *rest = condition.text.shape[0], self.config.in_channels, *condition.size
        if tuple(x.shape) != (batch, *rest):
            raise ValueError(
                f"PiDNet.step: x must be (B, {self.config.in_channels}, H, W) = "
                f"{(batch, *rest)} as prepared, got {tuple(x.shape)}"
            )
        if isinstance(t, Tensor) and tuple(t.shape) != (batch,):
            raise ValueError(
                f"PiDNet.step: t must be (B,) = ({batch},) or a float, got {tuple(t.shape)}"
            )
        mod = self._modulation_for(t, batch, condition)
        if trace:
            trace("t_emb", mod.time)
        s = self._patch_stream(x, mod, condition, trace)
        u = ops.add_silu(s, mod.time)
        del s
        if condition.has_latent and self.config.pit_lq_inject:
            u = self.pit_lq_gate(u, *condition.injection(self.config.num_injections))
        u = u.flatten(0, 1)
        if trace:
            trace("s_cond", u)
        return u

    def _patch_stream(self, x, mod, condition, trace):
        c, text = self.config, Stream(condition.text)
        chunk = self._chunk(x, condition, trace)
        image = Stream(self.s_embedder(ops.patchify(x, c.patch_size, dtype=self.dtype)))
        if trace:
            trace("s_embed", image.x)
        with visiting(self.offload, "patch_blocks", self.patch_blocks) as blocks:
            for i, block in enumerate(blocks):
                if condition.has_latent and i % c.lq_interval == 0:
                    r = i // c.lq_interval
                    self.lq_proj.gate_modules[r].inject(image, *condition.injection(r))
                if trace:
                    trace(f"patch_blocks.{i}.x_in", image.x)
                # The text stream ends with its keys and values in the last block: nothing reads it.
                last = i == c.patch_depth - 1 and trace is None
                rope = (condition.rope, condition.txt_rope)
                how = {"image_only": last, "chunk": chunk}
                block(image, text, mod.image[i], mod.text[i], *rope, **how)
                if trace:
                    trace(f"patch_blocks.{i}.x", image.x)
                    trace(f"patch_blocks.{i}.y", text.x)
        return image.x

    def _pixel_stream(self, x, u, condition, trace):
        patch, embed = self.config.patch_size, self.pixel_embedder.proj
        q = ops.pixel_embed(
            x, embed.weight, embed.bias, condition.pos_x, condition.pos_y, patch=patch
        )
        if trace:
            trace("pixel_embed", q)
        with visiting(self.offload, "pixel_blocks", self.pixel_blocks) as blocks:
            for k, block in enumerate(blocks):
                q = block(q, u, condition.pixel_rope, x.shape[0])
                if trace:
                    trace(f"pixel_blocks.{k}", q)
        return q

    def _chunk(self, x: Tensor, condition: PiDCondition, trace: Trace | None = None) -> int | None:
        """Patches at a time, None for all."""
        if condition.pixel_chunk is None or trace is not None:
            return None
        kept = (x, condition.text, *condition.features)
        return None if needs_grad(*kept, *self.parameters()) else condition.pixel_chunk

    def _bands(
        self, x: Tensor, u: Tensor, condition: PiDCondition
    ) -> Generator[tuple[Band, Tensor], None, None]:
        """The pixel stream before the head, (n, P*P, p), of one `Band` after the other."""
        patch, embed = self.config.patch_size, self.pixel_embedder.proj
        grid = self._grid(condition.size)
        parts = bands_of(x.shape[0], grid, patch, condition.pixel_chunk)

        def embedded(band: Band) -> Tensor:
            own, pos_y = x[band.image, :, band.rows], condition.pos_y[band.rows]
            tables = (condition.pos_x, pos_y)
            return ops.pixel_embed(own[None], embed.weight, embed.bias, *tables, patch=patch)

        depth = len(self.pixel_blocks)
        with visiting(self.offload, "pixel_blocks", self.pixel_blocks) as blocks:
            yield from pixel_stream(blocks, embedded, u, condition.pixel_rope, parts, depth)

    def _head(self) -> tuple[Tensor, Tensor, Tensor]:
        final = self.final_layer
        return final.norm.weight, final.linear.weight, final.linear.bias

    def latent_stack(self, lq_latent: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, Q, H/P, W/P), the latent branch's convolutions for an image of `size`. Their norms
        are taken over all of it: a part of the latent alone has another stack."""
        c = self.config
        if c.lq_latent_channels is None:
            raise ValueError("PiDNet: this network has no latent branch; pass lq_latent=None")
        if lq_latent.dim() != 4 or lq_latent.shape[1] != c.lq_latent_channels:
            raise ValueError(
                f"PiDNet: lq_latent must be (B, {c.lq_latent_channels}, zh, zw), got "
                f"{tuple(lq_latent.shape)}"
            )
        return self.lq_proj.features(lq_latent.to(self.dtype), self._grid(size))

    def _latent_branch(self, stack, sigma, grid, y, trace):
        if stack.shape[0] != y.shape[0]:
            raise ValueError(
                f"PiDNet: lq_latent and y must have the same batch size, got {stack.shape[0]} "
                f"and {y.shape[0]}"
            )
        if tuple(stack.shape[-2:]) != grid:
            raise ValueError(
                f"PiDNet.prepare: stack must have a value for each of {grid} patches, got "
                f"{tuple(stack.shape)}"
            )
        if sigma is None:
            sigma = torch.zeros(stack.shape[0], device=stack.device)
        if tuple(sigma.shape) != (stack.shape[0],):
            raise ValueError(
                f"PiDNet: degrade_sigma must be (B,) = ({stack.shape[0]},), got "
                f"{tuple(sigma.shape)}"
            )
        if trace:
            trace("lq_features", stack)
        return partial(self._injection, self.lq_proj.tokens(stack), sigma.float(), trace)

    def _injection(
        self, tokens: Tensor, sigma: Tensor, trace: Trace | None, index: int
    ) -> tuple[Tensor, Tensor]:
        feature = self.lq_proj.head(index, tokens)
        if trace:
            trace(f"lq.{index}", feature)
        gates = self.lq_proj.gate_modules
        gate = gates[index] if index < len(gates) else self.pit_lq_gate
        return feature, gate.lq_logit(feature, sigma)

    def _caption(self, y: Tensor) -> Tensor:
        c = self.config
        if y.dim() != 3 or y.shape[-1] != c.txt_embed_dim or y.shape[1] == 0:
            raise ValueError(
                f"PiDNet: y must be (B, T, {c.txt_embed_dim}) caption embeddings with T >= 1, got "
                f"{tuple(y.shape)}"
            )
        return y[:, : c.txt_max_length].to(self.dtype)

    def _embed_caption(self, y: Tensor, trace: Trace | None = None) -> Tensor:
        text = self.y_embedder(y)
        if trace:
            trace("y_proj_norm", text)
        return text + self.y_pos_embedding[:, : y.shape[1]]

    def _text_rope(self, rows: int) -> Rope:
        c = self.config
        return rope_1d(rows, c.head_dim, theta=c.text_rope_theta, device=self.device)

    def _grid(self, size: tuple[int, int]) -> tuple[int, int]:
        patch = self.config.patch_size
        if min(size) < patch or size[0] % patch or size[1] % patch:
            raise ValueError(
                f"PiDNet: H and W must be positive multiples of {patch}, got {size[0]}x{size[1]}"
            )
        return size[0] // patch, size[1] // patch

    def _modulation_for(self, t, batch, condition) -> StepModulation:
        if isinstance(t, Tensor):
            return self.modulation(t)
        mod = condition.modulations.get(t)
        if mod is None:
            mod = self.modulation(torch.tensor([t], device=self.device))
        return StepModulation(
            time=mod.time.expand(batch, -1),
            image=[m.expand(batch, -1, -1) for m in mod.image],
            text=[m.expand(batch, -1, -1) for m in mod.text],
        )


def _quantize(block: MMDiTBlock | PiTBlock) -> None:
    quantize_(block, *(_PIT_FP8 if isinstance(block, PiTBlock) else _MMDIT_FP8))
