"""Rounds of one target: a good file, damaged, read; what is no clean refusal is kept."""

from __future__ import annotations

import random
import time
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

from mutation import mutated
from targets import Target


@dataclass
class Outcome:
    """Files read, taken, and those at fault with what they raised."""

    rounds: int = 0
    taken: int = 0
    slowest: tuple[float, int] = (0.0, 0)  # seconds, and the seed
    faults: list[tuple[Path, str]] = field(default_factory=list)


def one_round(target: Target, seed: int, folder: Path) -> tuple[Path, bool]:
    """The file of this seed, and whether the reader took it; raises what no reader should."""
    rng = random.Random(seed)
    data = mutated(rng.choice(target.seeds()), rng)
    path = folder / f"fuzz{rng.choice(target.suffixes)}"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return path, target.check(path)


def run(
    target: Target, seed: int, folder: Path, *, rounds: int | None = None, seconds: float = 1e9
) -> Outcome:
    """Rounds from `seed` on, until there were so many, or for so long."""
    outcome, end = Outcome(), time.monotonic() + seconds
    while (rounds is None or outcome.rounds < rounds) and time.monotonic() < end:
        began, this = time.monotonic(), seed + outcome.rounds
        outcome.rounds += 1
        try:
            _, taken = one_round(target, this, folder)
            outcome.taken += taken
        except (Exception, RecursionError) as error:
            kept = folder / f"{target.name}-{this}"
            written = next(folder.glob("fuzz.*"), None)
            if written is not None:
                kept = kept.with_suffix(written.suffix)
                kept.write_bytes(written.read_bytes())
            where = traceback.extract_tb(error.__traceback__)[-1]
            told = f"{type(error).__name__}: {str(error)[:200]} ({where.filename}:{where.lineno})"
            outcome.faults.append((kept, told))
        finally:
            for path in folder.glob("fuzz.*"):
                path.unlink()
        outcome.slowest = max(outcome.slowest, (time.monotonic() - began, this))
    return outcome
