"""Training an L2P network's shallow layers: steps, records, checkpoints, sample pictures.

Every example's order, noise and noise level come from the seed and its number alone. So resuming
restores weights and optimiser and nothing else, and gives the run that was never interrupted, bit
for bit.

Source: L2P (arXiv 2605.12013), training; settings of its 4K/8K/10K release.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ...images import convert
from ...out_files import written_whole
from ...picture_files import save_picture
from .checkpoint import LoadedCheckpoint
from .network import L2PNet
from .sampler import guided, sample
from .scheduler import schedule
from .sizes import check_size
from .train_average import RunningAverage
from .train_checkpoints import (
    DELTA,
    STATE,
    check_space,
    checkpoints,
    read_facts,
    read_tensors,
    write_checkpoint,
)
from .train_data import PictureFolder
from .train_processes import Processes
from .training import (
    NoiseLevels,
    TrainableSet,
    generator_for,
    recompute_blocks,
    set_trainable,
    training_loss,
)

SLOW_STEPS, SLOW_RATE = 5, 1 / 3  # the released programs' first steps, at a third of the rate
LOG = "log.jsonl"


@dataclass(frozen=True)
class TrainSettings:
    """What decides the numbers of a run: the same settings and data give the same weights.

    Args:
        size: (H, W) of every example.
        trainable: tensors that learn.
        levels: distribution of noise levels.
        batch: examples per process that run together.
        accumulate: such batches to a step.
        lr, weight_decay: of AdamW; betas (0.9, 0.999), eps 1e-8. The rate is constant after five
            steps at a third of it.
        clip: largest norm of the gradient; None does not clip, as released.
        precision: "bf16": the network runs in bf16 while AdamW updates fp32 weights, of which the
            network's are the rounded ones. "fp32": both are the same.
        recompute: trade a third more arithmetic for the memory of activations.
        seed: of order, noise and noise levels.
        average: weight of the past in a running average of the weights, which checkpoints and
            sample pictures then are of; None takes the weights themselves, as released.
    """

    size: tuple[int, int]
    trainable: TrainableSet
    levels: NoiseLevels
    batch: int = 1
    accumulate: int = 1
    lr: float = 5e-5
    weight_decay: float = 0.01
    clip: float | None = None
    precision: str = "bf16"
    recompute: bool = True
    seed: int = 0
    average: float | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"l2p train: {name} must be >= 1, got {getattr(self, name)}")
        for name in ("lr", "clip"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"l2p train: {name} must be a positive number, got {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"l2p train: weight_decay must be >= 0, got {self.weight_decay}")
        if self.average is not None and not 0 < self.average < 1:
            raise ValueError(
                f"l2p train: average must be above 0 and below 1, such as 0.999, got {self.average}"
            )

    def rate(self, step: int) -> float:
        """Learning rate of the step after `step` steps."""
        return self.lr * (SLOW_RATE if step < SLOW_STEPS else 1)


@dataclass(frozen=True)
class Schedule:
    """What happens when, none of which changes the weights.

    Args:
        steps: of the whole run, those before resuming included.
        save_every, sample_every: steps between checkpoints and sample pictures; 0 writes a
            checkpoint at the end only, or no pictures.
        keep: newest checkpoints to keep.
        sample_count, sample_steps: pictures (of the first captions), and network calls for each.
    """

    steps: int
    save_every: int = 500
    sample_every: int = 0
    keep: int = 2
    sample_count: int = 1
    sample_steps: int = 30

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            least = 1 if field.name in ("steps", "keep", "sample_steps") else 0
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"l2p train: {field.name} must be an integer >= {least}, got {value!r}"
                )


@dataclass(frozen=True)
class TrainInfo:
    """One step, as logged and as told to a callback."""

    step: int  # 1-based
    steps: int
    loss: float
    lr: float
    grad_norm: float
    sigma: float  # mean over the first process's examples
    seconds: float


class Trainer:
    """A network whose chosen tensors learn from a folder of pictures.

    Args:
        checkpoint: the base, its tensors as stored (`read_checkpoint(..., dtype=None)`).
        data: pictures and captions.
        settings: of the run.
        out: folder of the run; made if there is none.
        processes: those that train together.

    Raises:
        SizeError: size. ValueError: a latent model.
    """

    def __init__(
        self,
        checkpoint: LoadedCheckpoint,
        data: PictureFolder,
        settings: TrainSettings,
        out: Path,
        processes: Processes | None = None,
    ) -> None:
        self.data, self.settings, self.out = data, settings, out
        self.processes = processes or Processes()
        check_size(checkpoint.config, settings.size)
        self.net, self.learning, self.masters = _networks(
            checkpoint, settings, self.processes.device
        )
        self.optimiser = torch.optim.AdamW(
            self.masters.values(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.average = RunningAverage(self.masters, settings.average) if settings.average else None
        self.steps_done = 0
        # The next batch by its first example: decoding a 4096x4096 picture takes as long as a step.
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="l2p-train")
        self._ahead: dict[int, Future] = {}
        self.base = _fingerprint(self.net)

    # ---- One step ------------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One update from `batch * accumulate * processes` examples; what it measured."""
        s, p = self.settings, self.processes
        first = self.steps_done * s.batch * s.accumulate * p.count
        losses, sigmas = [], []
        for a in range(s.accumulate):
            begin = first + (a * p.count + p.index) * s.batch
            loss, sigma = self._examples(begin)
            (loss / s.accumulate).backward()
            losses.append(loss.item())
            sigmas.append(sigma)
        loss = p.mean(sum(losses) / len(losses))
        p.average_gradients(self.masters.values())
        norm = nn.utils.clip_grad_norm_(self.masters.values(), s.clip or math.inf).item()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self.optimiser.zero_grad()
            raise ArithmeticError(
                f"l2p train: loss {loss} and gradient norm {norm} in step {self.steps_done + 1}: "
                f"the run diverged, or a picture's embedding is damaged. Nothing of this step is "
                f"kept; resume with a lower --lr"
            )
        rate = s.rate(self.steps_done)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad()
        self._round_into_network()
        self.steps_done += 1
        if self.average is not None:
            self.average.update(self.masters, self.steps_done)
        return {"loss": loss, "lr": rate, "grad_norm": norm, "sigma": sum(sigmas) / len(sigmas)}

    def _examples(self, begin: int) -> tuple[Tensor, float]:
        """The loss of a batch from example `begin` on, and the mean of its noise levels."""
        ready = self._ahead.pop(begin, None)
        x0, noise, levels, captions = self._loaded(begin) if ready is None else ready.result()
        following = begin + self.settings.batch * self.processes.count
        self._ahead = {following: self._loader.submit(self._loaded, following)}
        device = self.processes.device
        sigma, t = levels.to(device).unbind(1)
        loss = training_loss(self.net, x0.to(device), noise.to(device), sigma, t, captions)
        return loss, levels[:, 0].mean().item()

    def _loaded(self, begin: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """Images, noise, (sigma, t) and captions of a batch. Called ahead, in another thread."""
        s, images, noises, captions, levels = self.settings, [], [], [], []
        for k in range(begin, begin + s.batch):
            epoch, place = divmod(k, len(self.data))
            i = epoch_order(s.seed, epoch, len(self.data))[place]
            generator = generator_for(s.seed, "example", k)
            levels.append(s.levels.at(s.levels.draw(generator)))
            images.append(self.data.image(i))
            noises.append(torch.randn(images[-1].shape, generator=generator))
            captions.append(self.data.caption(i))
        return torch.stack(images), torch.stack(noises), torch.tensor(levels), captions

    @torch.no_grad()
    def _round_into_network(self) -> None:
        for name, p in self.learning.items():
            if p is not self.masters[name]:
                p.copy_(self.masters[name])

    # ---- A run ---------------------------------------------------------------------------------

    def run(self, plan: Schedule, callback: Callable[[TrainInfo], None] | None = None) -> bool:
        """Train up to step `plan.steps`. False where Ctrl-C or SIGTERM ended it before.

        Either ends it after the step at hand, with a checkpoint; a second one at once.
        """
        saved = self.steps_done if checkpoints(self.out) else None
        with _stop_requests() as requests:
            while self.steps_done < plan.steps:
                began = time.perf_counter()
                measured = self.step()
                step = self.steps_done
                seconds = time.perf_counter() - began
                info = TrainInfo(step=step, steps=plan.steps, seconds=seconds, **measured)
                self._log(info)
                if callback is not None:
                    callback(info)
                if plan.save_every and step % plan.save_every == 0:
                    self.save(plan.keep)
                    saved = step
                if plan.sample_every and step % plan.sample_every == 0:
                    self.write_samples(plan)
                if self.processes.any(bool(requests)):
                    break
            if saved != self.steps_done:
                self.save(plan.keep)
        return self.steps_done >= plan.steps

    def _log(self, info: TrainInfo) -> None:
        if self.processes.first:
            with open(self.out / LOG, "a", encoding="utf-8") as file:
                file.write(json.dumps(dataclasses.asdict(info)) + "\n")

    @torch.no_grad()
    def write_samples(self, plan: Schedule) -> list[Path]:
        """Pictures of the first captions from fixed noise: `samples/NAME-step-00000100.png`."""
        if not self.processes.first:
            return []
        folder, s, written = self.out / "samples", self.settings, []
        folder.mkdir(exist_ok=True)
        levels = schedule(plan.sample_steps, shift=s.levels.shift, time_dtype=s.levels.time_dtype)
        for i in range(min(plan.sample_count, len(self.data))):
            caption = [self.data.caption(i)]
            generator = generator_for(s.seed, "sample", i)
            noise = torch.randn((1, 3, *s.size), generator=generator).to(self.processes.device)
            name = f"{self.data.pictures[i].path.stem}-step-{self.steps_done:08d}.png"
            with self._averaged_weights():
                predict = guided(self.net, caption, None, s.size, times=levels.times)
                picture = convert(sample(predict, noise, levels), "pil", rounded=True)[0]
            facts = {"step": self.steps_done, "steps": plan.sample_steps, **self._facts()}
            written.append(save_picture(folder / name, picture, facts))
        return written

    def _averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """Within it the network has the averages, where there are any."""
        return self.average.within(self.learning) if self.average else contextlib.nullcontext()

    # ---- Checkpoints ---------------------------------------------------------------------------

    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint."""
        moments, values = 8, sum(p.numel() for p in self.learning.values())
        kept = next(iter(self.learning.values())).element_size()
        full = 4 * (self.average is not None) + 4 * (self.average is not None or kept != 4)
        return values * (moments + kept + full)

    def save(self, keep: int = 2) -> Path | None:
        """Write a checkpoint; see `train_checkpoints`. The path, in the process that wrote it."""
        written = None
        if self.processes.first:
            delta = {name: p.detach() for name, p in self.learning.items()}
            state = {}
            if self.average is not None:
                averages = self.average.values
                state = {f"average.{name}": value for name, value in averages.items()}
                delta = {name: averages[name].to(p.dtype) for name, p in delta.items()}
            for name, master in self.masters.items():
                if master is not self.learning[name] or self.average is not None:
                    state[f"weight.{name}"] = master.detach()
                for key, value in self.optimiser.state.get(master, {}).items():
                    state[f"{key}.{name}"] = value
            facts = {"step": self.steps_done, **self._facts()}
            written = write_checkpoint(self.out, self.steps_done, delta, state, facts, keep=keep)
        self.processes.wait()
        return written

    def resume(self) -> int:
        """Go on from the newest checkpoint of `out`; its step, 0 where there is none.

        Raises:
            ValueError: it was made with other settings, data or base; names the first that differs.
            CheckpointFormatError: damaged.
        """
        found = checkpoints(self.out)
        if not found:
            return 0
        folder = found[-1]
        facts = read_facts(folder)
        for name, own in self._facts().items():
            if json.loads(json.dumps(own)) != facts.get(name):
                raise ValueError(
                    f"l2p train: {folder} was made with {name} = {facts.get(name)}, now it is "
                    f"{own}; resume with the same, or write to another folder"
                )
        self._restore(read_tensors(folder / DELTA), read_tensors(folder / STATE))
        self.steps_done = int(facts["step"])
        self._forget_log_after(self.steps_done)
        return self.steps_done

    @torch.no_grad()
    def _restore(self, delta: dict[str, Tensor], state: dict[str, Tensor]) -> None:
        moments: dict[int, dict[str, Tensor]] = {}
        for i, (name, master) in enumerate(self.masters.items()):
            master.copy_(state.get(f"weight.{name}", delta[name]))
            if self.average is not None:
                self.average.values[name].copy_(state[f"average.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq")
            own = {key: state[f"{key}.{name}"] for key in keys if f"{key}.{name}" in state}
            if own:  # a pad token that nothing was padded with has none
                moments[i] = own
        self._round_into_network()
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})

    def _facts(self) -> dict[str, object]:
        """What a checkpoint must have in common with the run that goes on from it."""
        settings = dataclasses.asdict(self.settings)
        names = "\n".join(p.path.name for p in self.data.pictures)
        return {
            **{name: value for name, value in settings.items() if name != "recompute"},
            "processes": self.processes.count,
            "pictures": f"{len(self.data)} ({hashlib.md5(names.encode()).hexdigest()[:8]})",
            "base": self.base,
        }

    def _forget_log_after(self, step: int) -> None:
        log = self.out / LOG
        if not self.processes.first or not log.is_file():
            return
        kept = []
        for line in log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a line cut off by a crash
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        with written_whole([log]) as (partial,):
            partial.write_text("".join(kept), encoding="utf-8")


def prepare_folder(out: Path, *, resume: bool) -> None:
    """Make the run's folder, or find the one to resume.

    Raises:
        ValueError: it holds a run, and none is to be resumed; or the reverse. OSError: it cannot be
            written.
    """
    found = checkpoints(out)
    if found and not resume:
        raise ValueError(
            f"l2p train: {out} holds a run ({found[-1].name}); go on with --resume, or write to "
            f"another folder"
        )
    if resume and not found:
        raise ValueError(f"l2p train: {out} holds no checkpoint to resume; leave out --resume")
    out.mkdir(parents=True, exist_ok=True)


def check_checkpoints_fit(trainer: Trainer, plan: Schedule) -> None:
    """Raises OSError unless there is room for all the checkpoints a run holds at once."""
    total = min(plan.steps, plan.keep + 1) if plan.save_every else 1
    held = len(checkpoints(trainer.out))
    check_space(trainer.out, max(1, total - held) * trainer.checkpoint_bytes())


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, count: int) -> tuple[int, ...]:
    """Which picture comes when: each epoch shows all of them, in an order of its own."""
    generator = generator_for(seed, "epoch", epoch)
    return tuple(torch.randperm(count, generator=generator).tolist())


def _networks(
    checkpoint: LoadedCheckpoint, settings: TrainSettings, device: torch.device
) -> tuple[L2PNet, dict[str, nn.Parameter], dict[str, Tensor]]:
    """The network, its tensors that learn, and those that the optimiser updates.

    In bf16 the latter are fp32 copies, made from the tensors as stored; each backward pass hands
    them its gradients and frees its own.
    """
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[settings.precision]
    net = L2PNet(checkpoint.config, device="meta")
    # Copies: tensors of a mapped file must not change.
    state = {k: v.to(device, dtype, copy=True) for k, v in checkpoint.state_dict.items()}
    net.load_state_dict(state, strict=True, assign=True)
    learning = set_trainable(net, settings.trainable)
    if settings.recompute:
        recompute_blocks(net)
    if dtype == torch.float32:
        return net, learning, dict(learning)
    masters = {}
    for name, p in learning.items():
        master = checkpoint.state_dict[name].to(device, torch.float32, copy=True)
        masters[name] = master.requires_grad_()
        p.register_post_accumulate_grad_hook(_handing_over_to(master))
    return net, learning, masters


def _handing_over_to(master: Tensor) -> Callable[[Tensor], None]:
    def hand_over(p: Tensor) -> None:
        grad, p.grad = p.grad.float(), None
        master.grad = grad if master.grad is None else master.grad.add_(grad)

    return hand_over


def _fingerprint(net: L2PNet) -> str:
    """Tells base models apart by the first values of each tensor that never changes."""
    digest = hashlib.blake2b(digest_size=8)
    for name, p in net.named_parameters():
        if not p.requires_grad:
            digest.update(name.encode())
            digest.update(p.detach().flatten()[:256].float().cpu().numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """A list that the first SIGINT or SIGTERM is put in; the next one acts as it always does."""
    requests: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield requests  # only the main thread may listen
        return
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _frame) -> None:
        requests.append(number)
        restore()

    for number in before:
        signal.signal(number, note)
    try:
        yield requests
    finally:
        restore()
