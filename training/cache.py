"""Training pictures on disk: drawn once by several processes, memory-mapped by the trainers."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np

from .pictures import draw_picture

HELD_OUT_SEED = 1_000_000  # picture numbers from here on are never trained on

# Mostly square; the others keep the networks from relying on one grid.
_SIZES = ((1024, 1024),) * 6 + ((768, 1024), (1024, 768))


def picture_size(seed: int) -> tuple[int, int]:
    """(height, width) of cached picture `seed`."""
    return _SIZES[seed % len(_SIZES)]


def _draw(job: tuple[str, int]) -> None:
    folder, seed = job
    picture, caption = draw_picture(seed, picture_size(seed))
    for name, write in (
        (f"{seed:07d}.npy", lambda file: np.save(file, picture)),
        (f"{seed:07d}.json", lambda file: file.write(json.dumps(caption).encode())),
    ):
        path = Path(folder) / name
        partial = path.with_suffix(path.suffix + ".part")
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)


def fill(folder: Path, seeds: range, processes: int = 0) -> None:
    """Draws the pictures of `seeds` that the folder does not hold yet.

    Args:
        processes: worker processes; 0 means one per core.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # The caption is written last, so a picture with a caption is complete.
    jobs = [(str(folder), seed) for seed in seeds if not (folder / f"{seed:07d}.json").exists()]
    if not jobs:
        return
    # Spawned, not forked: the caller may hold torch's thread pool.
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes or os.cpu_count()) as pool:
        for done, _ in enumerate(pool.imap_unordered(_draw, jobs, chunksize=1), 1):
            if done % 20 == 0 or done == len(jobs):
                print(f"pictures: {done}/{len(jobs)}", flush=True)


class PictureCache:
    """The complete pictures of a folder, memory-mapped, in the order of their numbers.

    Raises:
        FileNotFoundError: the folder holds no complete picture.
    """

    def __init__(self, folder: Path) -> None:
        captions = sorted(folder.glob("*.json"))
        if not captions:
            raise FileNotFoundError(
                f"PictureCache: {folder} holds no pictures; draw them with "
                "`python -m training pictures`"
            )
        self.captions = [json.loads(path.read_text()) for path in captions]
        self.pictures = [np.load(path.with_suffix(".npy"), mmap_mode="r") for path in captions]

    def __len__(self) -> int:
        return len(self.pictures)
