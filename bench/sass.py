"""What a kernel's machine code asks of each unit of a Hopper multiprocessor, counted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

KINDS = ("fp32", "integer", "special", "memory", "tensor", "other")

_FP32 = re.compile("FFMA|FADD|FMUL")
# Half as fast as fp32: 64 a clock and multiprocessor (CUDA C++ Programming Guide, throughput of
# native arithmetic instructions, 9.0). IMAD shares its unit with half of the fp32 ones.
_INTEGER = re.compile(
    "IADD3|VIADD|LEA|LOP3|SHF|PRMT|SEL|FSEL|ISETP|FSETP|PLOP3|VIMNMX|VIADDMNMX|FMNMX|HMNMX2|F2FP|"
    "SGXT|IABS|IMAD|MOV|I2FP"
)
_SPECIAL = re.compile("MUFU|F2F|I2F|F2I")  # 16 a clock
_MOVED = re.compile("LDS|STS|LDSM|STSM|LDG|STG|LDGSTS|SHFL|ATOMG|RED")  # by the threads
_MEMORY = re.compile(_MOVED.pattern + "|LDC|UTMALDG")
_TENSOR = re.compile("[HQ]GMMA|HMMA")


@dataclass(frozen=True)
class Instruction:
    name: str
    modifiers: tuple[str, ...]
    operands: str
    loop: int  # how many loops it stands in
    outermost: int  # which of the function's loops that is, from 0


@dataclass
class Counts:
    """Of one warp, through all iterations.

    Args:
        kinds: instructions by kind.
        special: clocks of a multiprocessor's special-function units.
        shared: clocks of its shared memory and first-level cache, 128 bytes each, without bank
            conflicts. A product's operands in shared memory are among them.
        tensor: clocks of its tensor cores.
        copied: bytes that asynchronous copies fetch past the first-level cache. Those ahead of a
            loop are the ones its last iterations leave out.
    """

    kinds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    special: float = 0.0
    shared: float = 0.0
    tensor: float = 0.0
    copied: float = 0.0

    @property
    def instructions(self) -> float:
        return sum(self.kinds.values())


def follow(sass: str, taken: Sequence[bool]) -> str:
    """What a thread runs of a function, once through its outermost loop, line by line.

    A forward branch over a call and no access to memory is taken: those are the slow paths of roots
    and divisions, which normal numbers do not need. `taken` says it of the others that have a
    condition, in the order met.

    Raises:
        ValueError: they are more or fewer.
    """
    lines = re.split(r"^\$__internal_", sass, maxsplit=1, flags=re.M)[0].splitlines()
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.L_x_\d+:", line)}
    decisions = list(taken)
    ran, i = list[str](), 0
    while i < len(lines):
        line = lines[i]
        i += 1
        if not re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            continue
        ran.append(line)
        branch = re.search(r"(@!?U?P\w+ )?BRA (?:!?U?P\w+, )?`\((\.L_x_\d+)\)", line)
        if branch and labels[branch[2]] > i:
            over = "".join(lines[i : labels[branch[2]]])
            slow = "CALL.REL" in over and not re.search("LDG|STG", over)
            if branch[1] is None or slow or _next(decisions):
                i = labels[branch[2]]
        elif re.search(r"\*/\s+EXIT", line):  # without a condition
            break
    if decisions:
        raise ValueError(f"{len(decisions)} of {len(taken)} branches were not met")
    return "\n".join(ran)


def _next(decisions: list[bool]) -> bool:
    if not decisions:
        raise ValueError("more branches than decisions")
    return decisions.pop(0)


def instructions(sass: str) -> Iterator[Instruction]:
    """A loop is what lies between a label and a branch back to it. Left out are the branch to
    itself that ends a function, what pads it, and the functions behind it: those are the slow paths
    of roots and divisions, which normal numbers do not take."""
    lines: list[tuple[str, str] | str] = []  # labels, and (name with modifiers, operands)
    pattern = re.compile(r"^(\.L_x_\d+):|^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)(.*)")
    for line in sass.splitlines():
        if line.startswith("$__internal_"):
            break
        found = pattern.match(line)
        if found:
            lines.append(found[1] or (found[2], found[3]))
    places = {line: i for i, line in enumerate(lines) if isinstance(line, str)}
    depth = [0] * len(lines)
    spans: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        target = re.search(r"`\((\.L_x_\d+)\)", line[1]) if isinstance(line, tuple) else None
        if target and line[0].startswith("BRA") and places.get(target[1], i) < i:
            first = places[target[1]]
            if i - first == 1:
                depth[i] = -1
            else:
                depth[first : i + 1] = [d + 1 for d in depth[first : i + 1]]
                spans = [s for s in spans if not first <= s[0] <= i]
                if not any(s[0] <= first <= s[1] for s in spans):
                    spans.append((first, i))
    spans.sort()
    for i, (line, loop) in enumerate(zip(lines, depth, strict=True)):
        if isinstance(line, tuple) and loop >= 0 and not line[0].startswith("NOP"):
            name, *modifiers = line[0].split(".")
            outermost = sum(first <= i for first, _ in spans) - 1
            yield Instruction(name, tuple(modifiers), line[1], loop, outermost)


def count(sass: str, iterations: int | Sequence[int] = 1) -> Counts:
    """`iterations` of every loop, or of each in turn; of nested ones, of the outermost.

    Instructions behind a forward branch count as if they ran.

    Raises:
        ValueError: more loops than numbers of iterations.
    """
    total = Counts()
    for i in instructions(sass):
        times = 1
        if i.loop and isinstance(iterations, int):
            times = iterations
        elif i.loop:
            if i.outermost >= len(iterations):
                raise ValueError(f"loop {i.outermost + 1} of a kernel said to have {iterations}")
            times = iterations[i.outermost]
        total.kinds[_kind(i.name)] += times
        if _SPECIAL.fullmatch(i.name):
            total.special += 2 * times
        if _TENSOR.fullmatch(i.name):
            tensor, shared = _product(i)
            total.tensor += times * tensor
            total.shared += times * shared
        elif _MOVED.fullmatch(i.name):
            total.shared += times * max(1.0, _bytes(i) * 32 / 128)
            if i.name == "LDGSTS" and i.loop:
                total.copied += times * 32 * _bytes(i)
    return total


def waits(sass: str) -> int:
    """How often a warp waits for what it loads from memory, one load after another: loads that are
    asked for before the first of them is used count once. Of a loop, in one iteration."""
    found, coming = 0, set[str]()
    for i in instructions(sass):
        registers = set(re.findall(r"\bR\d+\b", i.operands))
        if coming & registers:
            found, coming = found + 1, set()
        if i.name == "LDG":
            first = re.search(r"\bR(\d+)\b", i.operands)
            coming |= {f"R{int(first[1]) + j}" for j in range(_bytes(i) // 4 or 1)}
    return found


def widths(sass: str) -> tuple[set[int], set[int]]:
    """Bytes of a thread that the loads from memory and the stores to it move at once."""
    wide: dict[str, set[int]] = {"LDG": set(), "STG": set()}
    for i in instructions(sass):
        if i.name in wide:
            wide[i.name].add(_bytes(i))
    return wide["LDG"], wide["STG"]


def _kind(name: str) -> str:
    families = zip(KINDS, (_FP32, _INTEGER, _SPECIAL, _MEMORY, _TENSOR), strict=False)
    return next((kind for kind, names in families if names.fullmatch(name)), "other")


def _bytes(i: Instruction) -> int:
    """Of a thread."""
    if i.name in ("LDSM", "STSM"):  # 8 x 8 matrices of 16 bits
        return 4 * int(i.modifiers[-1]) if i.modifiers[-1] in ("2", "4") else 4
    narrow = {"U8": 1, "S8": 1, "U16": 2, "S16": 2}
    wide = [m for m in i.modifiers if m in ("64", "128")]
    return int(wide[0]) // 8 if wide else next((narrow[m] for m in i.modifiers if m in narrow), 4)


def _product(i: Instruction) -> tuple[float, float]:
    """(clocks of the tensor cores, of shared memory), one warp's share."""
    shape = next(m for m in i.modifiers if re.fullmatch(r"\d+x\d+x\d+|\d{4,}", m))
    if i.name == "HMMA":  # mma.sync reaches 62 % of wgmma on Hopper (arXiv 2402.13499)
        m, n, k = (16, 8, 16) if shape == "16816" else (16, 8, 8)
        return 2 * m * n * k / 4096 / 0.62, 0.0
    m, n, k = map(int, shape.split("x"))
    size, rate = (1, 8192) if i.name == "QGMMA" else (2, 4096)
    operands = i.operands.split(",")
    first = m * k * size if "gdesc" in operands[1] else 0
    # A warpgroup's product, by its four warps.
    return 2 * m * n * k / rate / 4, (first + n * k * size) / 128 / 4
