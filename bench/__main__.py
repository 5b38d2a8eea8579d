"""`python -m bench`: kernels, decode, tune, report. Described in bench/README.md."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch

from pixeldiff.cli_errors import clean_errors
from pixeldiff.models.devices import check_device
from pixeldiff.models.pid.decoder import PRECISIONS
from pixeldiff.out_files import check_out_path

from . import show
from .choose_command import choose
from .estimates import OPS as ESTIMATED
from .forward import CHOICES
from .huge_command import huge
from .kill_command import kill
from .l2p_commands import convert, local_decoder
from .large_files_command import files
from .machine import DTYPES, machine
from .memory_command import memory, plans
from .options import comma, json_option, resume_option, threads_option
from .recorder import Recorder
from .resume import (
    DEVICE_LOST,
    HANG_SECONDS,
    TIME_UP,
    DeviceLost,
    Watch,
    Watchdog,
    unwatched,
)
from .schema import Row
from .tiles_command import tiles
from .variants import VARIANTS


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Measures pixeldiff against plain PyTorch and against this machine's own limits."""


@main.command()
@click.option("--op", "ops", multiple=True, callback=comma(), help="default: all")
@click.option("--device", help="cpu or cuda; default: cuda where there is one")
@click.option("--dtype", "dtypes", multiple=True, callback=comma(choices=tuple(DTYPES)))
@click.option("--backend", "backends", multiple=True, callback=comma(), help="default: all")
@click.option("--sizes", multiple=True, callback=comma(int), help="pixels of a side: 1024,2048")
@click.option("--scale", type=click.IntRange(1), help="divides the side; default 1, 4 on a CPU")
@click.option("--rounds", type=click.IntRange(3), help="samples of each implementation")
@click.option("--seconds", default=4.0, show_default=True, help="for the samples of one case")
@click.option("--limit", type=float, help="seconds for everything; the rest is skipped, and said")
@click.option("--quick", is_flag=True, help="1024 at side / 16, three rounds: only that it runs")
@click.option("--compile/--no-compile", "compiled", default=True, help="the compiled baseline")
@click.option("--rivals", is_flag=True, help="also vendors' kernels, on a GPU: bench/rivals.py")
@resume_option
@threads_option
@json_option
@clean_errors
def kernels(
    ops: tuple[str, ...],
    device: str | None,
    dtypes: tuple[str, ...],
    backends: tuple[str, ...],
    sizes: tuple[int, ...],
    scale: int | None,
    rounds: int | None,
    seconds: float,
    limit: float | None,
    quick: bool,
    compiled: bool,
    rivals: bool,
    resume: bool,
    threads: int | None,
    path: Path | None,
) -> None:
    """Every op and backend against plain PyTorch, eager and compiled, at real shapes.

    Defaults on a GPU: bf16, 1024, 2048 and 4096. On a CPU: fp32 and bf16, 2048 with a quarter of
    the side (1024 tokens).
    """
    from .kernels import Plan, run

    where = check_device(device)
    cpu = where.type == "cpu"
    if threads:
        torch.set_num_threads(threads)
    plan = Plan(
        device=where,
        ops=ops,
        dtypes=dtypes or (("bf16",) if not cpu else ("fp32",) if quick else ("fp32", "bf16")),
        backends=backends,
        sizes=sizes or ((1024,) if quick else (2048,) if cpu else ()),
        scale=scale or (16 if quick else 4 if cpu else 1),
        rounds=rounds or (3 if quick else 9),
        seconds=seconds,
        limit=limit,
        compiled=compiled,
        rivals=rivals,
        matrix=256 if quick else None,
    )
    recorder = Recorder(path)
    before, watch = _before(recorder, where, resume)
    _finish(recorder, run(plan, before, watch), show.kernels, resume=resume)


@main.command()
@click.option(
    "--config", "config", default="demo", show_default=True, help="demo or a released network"
)
@click.option("--size", "side", default=512, show_default=True, help="pixels of a side")
@click.option("--device", help="cpu or cuda; default: cuda where there is one")
@click.option("--precision", type=click.Choice(tuple(PRECISIONS)), help="default: bf16 on CUDA")
@click.option(
    "--backend",
    "backends",
    multiple=True,
    callback=comma(),
    help="for pixeldiff: a name for every op that has it, or op=name; default: free",
)
@click.option("--steps", type=click.IntRange(1), help="network calls of an image")
@click.option("--batch", default=1, show_default=True)
@click.option("--tile", default=0, help="pixels of a side of tiles; default: in one piece")
@click.option(
    "--compare",
    "variants",
    multiple=True,
    default=("reference,compile",),
    show_default=True,
    callback=comma(choices=tuple(VARIANTS)),
    help=f"beside pixeldiff: {', '.join(VARIANTS)}",
)
@click.option("--images", default=5, show_default=True, help="timed images of each, after one")
@click.option("--new-size", "new_side", type=int, help="of the new size; default half; 0: none")
@click.option("--seconds", default=300.0, show_default=True, help="no image starts after them")
@click.option("--timeout", default=900.0, show_default=True, help="seconds for any one image")
@threads_option
@json_option
@clean_errors
def decode(
    config: str,
    side: int,
    device: str | None,
    precision: str | None,
    new_side: int | None,
    path: Path | None,
    **options: Any,
) -> None:
    """A whole decode: time, first call, memory, energy, beside the baselines.

    Released networks run with random weights of their real size.
    """
    from .decode import Plan, run
    from .models import resolve
    from .variants import choice

    where = check_device(device)
    resolve(config)
    choice(options["backends"])
    plan = Plan(
        config=config,
        side=side,
        device=where,
        precision=precision or ("bf16" if where.type == "cuda" else "fp32"),
        new_side=side // 2 if new_side is None else new_side,
        **options,
    )
    _finish(Recorder(path), run(plan), show.decodes)


@main.command()
@click.option("--config", default="tiny", show_default=True, help="tiny, 1k, 4k, 8k or 10k")
@click.option("--size", "side", default=0, help="pixels of a side; default: the network's own")
@click.option("--device", help="cpu or cuda; default: cuda where there is one")
@click.option("--precision", type=click.Choice(("fp32", "bf16")), help="default: bf16 on CUDA")
@click.option(
    "--compare",
    "variants",
    multiple=True,
    default=("pixeldiff-no-graphs,reference,compile,source",),
    show_default=True,
    callback=comma(choices=CHOICES),
    help="beside pixeldiff",
)
@click.option("--guided", is_flag=True, help="both branches of guidance in one call")
@click.option("--caption", default=128, show_default=True, help="tokens of a caption")
@click.option("--batch", default=1, show_default=True)
@click.option("--decoder-memory", type=float, default=4.0, show_default=True, help="GB; 0: whole")
@click.option("--rounds", type=click.IntRange(3), default=7, show_default=True)
@click.option("--seconds", default=20.0, show_default=True, help="no round starts after them")
@threads_option
@json_option
@clean_errors
def forward(device: str | None, precision: str | None, path: Path | None, **options: Any) -> None:
    """One network call of an L2P model, with random weights: time and memory, side by side.

    "reference" and "compile" are the same network in plain PyTorch, "source" is the latent
    transformer it was converted from at the same size of image, without its VAE.
    """
    from .forward import Plan, run

    where, memory = check_device(device), options.pop("decoder_memory")
    plan = Plan(
        device=where,
        precision=precision or ("bf16" if where.type == "cuda" else "fp32"),
        decoder_memory=int(memory * 1e9) or None,
        **options,
    )
    _finish(Recorder(path), run(plan), show.forwards)


@main.command()
@click.option("--config", default="demo", show_default=True, help="a network of decode or forward")
@click.option("--size", "side", type=int, help="pixels of a side; default 512, or L2P's own")
@click.option("--device", help="cpu or cuda; default: cuda where there is one")
@click.option("--precision", type=click.Choice(tuple(PRECISIONS)), help="default: bf16 on CUDA")
@click.option("--images", type=click.IntRange(3), default=5, show_default=True)
@click.option("--quick", is_flag=True, help="small matrices: only that it runs")
@threads_option
@json_option
@clean_errors
def profile(
    config: str,
    side: int | None,
    device: str | None,
    precision: str | None,
    images: int,
    quick: bool,
    threads: int | None,
    path: Path | None,
) -> None:
    """One step of a network, kernel by kernel, each beside its floor, the largest gap first.

    Random weights, warm, with CUDA graphs and without. What share of the step's time the kernels
    account for is said.
    """
    from .forward import NETWORKS
    from .profile import Plan, run

    where = check_device(device)
    plan = Plan(
        config=config,
        side=side if side is not None else 0 if config in NETWORKS else 512,
        device=where,
        precision=precision or ("bf16" if where.type == "cuda" else "fp32"),
        images=images,
        threads=threads,
        matrix=256 if quick else None,
    )
    _finish(Recorder(path), run(plan), show.profiles)


@main.command()
@click.option("--op", "ops", multiple=True, callback=comma(), help="default: all that have tiles")
@click.option("--device", help="default: cuda; cpu under TRITON_INTERPRET=1")
@click.option("--dtype", "dtypes", multiple=True, callback=comma(choices=tuple(DTYPES)))
@click.option("--sizes", multiple=True, callback=comma(int), help="pixels of a side: 1024,2048")
@click.option("--scale", type=click.IntRange(1), default=1, help="divides the side")
@click.option("--rounds", type=click.IntRange(3), default=7, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="for the samples of one case")
@click.option("--limit", type=float, help="seconds for everything; unfinished ops keep their table")
@click.option("--tables", type=click.Path(path_type=Path, exists=True, file_okay=False))
@resume_option
@json_option
@clean_errors
def tune(
    device: str | None,
    dtypes: tuple[str, ...],
    tables: Path | None,
    resume: bool,
    path: Path | None,
    **options: Any,
) -> None:
    """Measure the tiles of the Triton kernels and rewrite their tables, triton_kernels/<op>.json.

    Takes minutes on a GPU; what is measured for one compute capability is kept for the others.
    """
    from .tune import TABLES, Plan, run

    plan = Plan(
        check_device(device), dtypes=dtypes or ("bf16",), tables=tables or TABLES, **options
    )
    recorder = Recorder(path)
    before, watch = _before(recorder, plan.device, resume)
    _finish(recorder, run(plan, before, watch), show.tiles, resume=resume)


@main.command()
@click.option("--op", "ops", multiple=True, callback=comma(), help="default: all with a kernel")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="bf16", show_default=True)
@click.option("--size", default=2048, show_default=True, help="pixels of a side")
@click.option("--target", "targets", multiple=True, callback=comma(int), help="90 is 9.0")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="page, docs/kernels/triton.md"
)
@clean_errors
def resources(
    ops: tuple[str, ...], dtype: str, size: int, targets: tuple[int, ...], output: Path | None
) -> None:
    """Registers, shared memory and tensor-core use of the Triton kernels; needs no GPU."""
    from pixeldiff.out_files import check_out_path, written_whole

    from .aot import TARGETS
    from .resources import cell, document, measure

    if output is not None:
        check_out_path(output, ".md")
    usages = []
    for usage in measure(size, dtype, targets or TARGETS, ops):
        usages.append(usage)
        for target, kernels in usage.kernels.items():
            for k in kernels:
                show.console.print(f"{usage.case.label} sm_{target} {k.name}: {cell(k)}")
    if output is not None:
        with written_whole([output]) as (partial,):
            partial.write_text(document(usages, size, dtype))


@main.command()
@click.option("-o", "--output", type=click.Path(path_type=Path), help="page, docs/kernels/cuda.md")
@clean_errors
def cuda_resources(output: Path | None) -> None:
    """Registers of the kernels of csrc/cuda, as nvcc compiles them; needs no GPU."""
    from pixeldiff.out_files import check_out_path, written_whole

    from .ptxas import cell, document, measure

    if output is not None:
        check_out_path(output, ".md")
    kernels = []
    for kernel in measure():
        kernels.append(kernel)
        show.console.print(f"sm_{kernel.arch} {kernel.name}: {cell(kernel)}", markup=False)
    if output is not None:
        with written_whole([output]) as (partial,):
            partial.write_text(document(kernels))


@main.command("attention-error")
@click.option("--divide", type=click.IntRange(1), default=1, help="fewer keys, to try it")
@threads_option
@json_option
@clean_errors
def attention_error(divide: int, threads: int | None, path: Path | None) -> None:
    """The error of attention in e4m3 beside bf16's, with sums as Hopper makes them."""
    from .attention_error import measure, save, table

    if path is not None:
        check_out_path(path, ".json")
    if threads:
        torch.set_num_threads(threads)
    found = measure("python -m bench " + shlex.join(sys.argv[1:]), divide)
    if path is not None:
        save(found, path)
    show.console.print(table(found), markup=False)


@main.command()
@click.option("--op", "ops", multiple=True, callback=comma(choices=ESTIMATED), help="default: all")
@click.option(
    "--page",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="whose tables to count again, docs/kernels/estimates.md",
)
@clean_errors
def estimates(ops: tuple[str, ...], page: Path | None) -> None:
    """How far from its floor an op's Triton kernel must stay on an H100, counted in its machine
    code; needs no GPU. With nvcc, also the CUDA C++ kernels of the norms."""
    from pixeldiff.out_files import written_whole

    from . import estimates_cuda
    from .estimates import cases, estimate, rewrite, tables

    if page is not None and ops:
        raise click.UsageError("--page holds all ops; leave --op out")
    found = [estimate(case) for case in cases(ops)]
    counted = tables(found)
    if not ops:
        try:
            norms = estimates_cuda.table(list(estimates_cuda.estimates()), found)
        except FileNotFoundError as missing:
            show.console.print(f"left out: the CUDA kernels, as {missing}", markup=False)
        else:
            counted |= {"cuda": norms, "nvcc": estimates_cuda.version()}
    for table in counted.values():
        show.console.print(table, markup=False, soft_wrap=True)
    if page is not None:
        text = rewrite(page, counted)
        with written_whole([page]) as (partial,):
            partial.write_text(text)


@main.command()
@click.option("--device", help="cpu or cuda; default: cuda where there is one")
@click.option("--pictures", default=12, show_default=True, help="held-out drawn pictures")
@click.option("--photographs", default=15, show_default=True, help="of those scikit-image carries")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="such as docs/precision.md")
@click.option("--from", "source", type=click.Path(path_type=Path), help="only write its page")
@threads_option
@json_option
@clean_errors
def precision(
    device: str | None,
    pictures: int,
    photographs: int,
    output: Path | None,
    source: Path | None,
    threads: int | None,
    path: Path | None,
) -> None:
    """The errors of bf16 and fp8 beside fp32: of every layer, and of the demo's pictures.

    Wants the extra [train], whose scikit-image carries the photographs.
    """
    from .precision import load, measure, save
    from .precision_page import page

    checked = [check_out_path(p, s) for p, s in ((path, ".json"), (output, ".md")) if p]
    if threads:
        torch.set_num_threads(threads)
    if source is not None:
        found = load(source)
    else:
        command = "python -m bench " + shlex.join(sys.argv[1:])
        found = measure(check_device(device), pictures, photographs, command)
    if path is not None:
        save(found, path)
    text = page(found, source or path)
    if output is not None:
        output.write_text(text)
    for written in checked:
        show.console.print(str(written), markup=False)
    if not checked:
        show.console.print(text, markup=False)


@main.command()
@click.argument("files", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="folder, such as docs/performance"
)
@click.option(
    "--readme", type=click.Path(path_type=Path), help="README whose figures to generate again"
)
@click.option("--check", is_flag=True, help="with --readme: only say whether it is up to date")
@clean_errors
def report(files: tuple[Path, ...], output: Path | None, readme: Path | None, check: bool) -> None:
    """Tables and plots of result FILES, and the figures of a README from the files it names."""
    from .report import update_readme, write

    if readme is None and not (files and output):
        raise click.UsageError("give result files and --output, or --readme, or all of them")
    if output is not None:
        for path in write(files, output):
            show.console.print(str(path), markup=False)
    if readme is None:
        return
    same = update_readme(readme, check=check)
    if check and not same:
        raise ValueError(
            f"{readme} is not what its result files give; run report --readme {readme}"
        )
    show.console.print(f"{readme}: {'up to date' if same else 'written'}", markup=False)


@main.command()
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@clean_errors
def summary(files: tuple[Path, ...]) -> None:
    """One table of result FILES: every op's best backend, and every decode."""
    from .schema import load

    show.summary([row for path in files for row in load(path)])


def _before(recorder: Recorder, device: torch.device, resume: bool) -> tuple[list[Row], Watch]:
    """What a command goes on with, and what watches over its first calls."""
    if not resume:
        return [], unwatched
    before = recorder.resume(machine(device))
    cuda = device.type == "cuda"
    return before, Watchdog(HANG_SECONDS, recorder.add).around if cuda else unwatched


def _finish(recorder: Recorder, measured, table: Callable, *, resume: bool = False) -> None:
    whole, lost = True, None
    try:
        whole = recorder.record(measured, table)
    except DeviceLost as e:
        lost = e
    if recorder.path is not None:
        show.console.print(f"{recorder.path}: {len(recorder.rows)} rows", markup=False)
    if not whole:
        show.console.print("interrupted; the rows above are kept")
        sys.exit(130)
    if lost is not None:
        show.console.print(f"{lost}; with --resume, run it again for the rest", markup=False)
        sys.exit(DEVICE_LOST)
    if resume and any(row.status == "skipped" for row in recorder.rows):
        show.console.print("the time limit left some out; run it again for the rest")
        sys.exit(TIME_UP)


main.add_command(choose)
main.add_command(local_decoder)
main.add_command(convert)
main.add_command(tiles)
main.add_command(kill)
main.add_command(huge)
main.add_command(files)
main.add_command(memory)
main.add_command(plans)

if __name__ == "__main__":
    main(prog_name="python -m bench")
