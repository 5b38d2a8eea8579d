"""The networks that the fuzzers make files of."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "models" / "l2p"))
