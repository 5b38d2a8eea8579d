"""`python -m tests.fuzz --minutes 5`: each fuzzer for so long, one after the other.

Seeds are printed and a round depends on its seed alone: `--only NAME --seed N --rounds 1` repeats
one. Files at fault are kept in --keep. Exits 1 if there were any.
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
sys.path[:0] = map(str, (_HERE, _HERE.parent, _HERE.parent / "models" / "l2p", _HERE.parents[1]))


def main() -> int:
    from campaign import run
    from targets import TARGETS

    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0, help="for each fuzzer")
    parser.add_argument("--only", action="append", choices=TARGETS, help="may be repeated")
    parser.add_argument("--seed", type=int, help="of the first round; default: a new one")
    parser.add_argument("--rounds", type=int, help="at most so many for each")
    parser.add_argument("--keep", type=Path, default=Path("build/fuzz"), help="files at fault")
    args = parser.parse_args()
    args.keep.mkdir(parents=True, exist_ok=True)
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    failed = False
    for name in args.only or TARGETS:
        print(f"{name}: from seed {seed}", flush=True)
        out = run(TARGETS[name], seed, args.keep, rounds=args.rounds, seconds=60 * args.minutes)
        print(
            f"{name}: {out.rounds} files, {out.taken} taken, {len(out.faults)} at fault, "
            f"slowest {out.slowest[0]:.2f} s (seed {out.slowest[1]})",
            flush=True,
        )
        for path, told in out.faults[:20]:
            print(f"  {path}: {told}")
        failed |= bool(out.faults)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
