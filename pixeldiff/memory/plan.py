"""`plan`: of all ways to make a picture the fastest that fits a budget.

Ways are tried from the fastest on. What leaves the pixels as they are comes first; tiles, which
change them, come last. fp8 changes them too, and is never chosen here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BudgetError
from ..models.l2p.bands import DECODER_MEMORY
from ..models.l2p.config import L2PConfig
from ..models.l2p.config import Variant as L2PVariant
from ..models.pid.config import PiDConfig
from ..models.pid.tile_layout import cell_step, trained_tile
from ..models.pid.variants import Variant
from .budget import in_words, parsed_bytes, upward
from .estimate import Estimate, estimate_memory, pair_of, resolve

# Patches at a time: little is saved below, and every product is still large. Of a small picture a
# quarter.
PIXEL_CHUNK = 1024
DECODER_BUDGETS = tuple(DECODER_MEMORY // n for n in (2, 4, 8, 16, 40, 100))
PARTS = (1, 0.75, 0.5, 0.25)  # sides of tiles, of the largest that was trained
TOGETHER = (4, 2)  # tiles in a network call, where one fits


MUCH_LESS = 0.9  # of what did not suffice, for another way to be worth trying
_FREE = ("tile_batch", "pixel_chunk")  # that a way may change though they were given: same pixels


@dataclass(frozen=True)
class Way:
    """One way to make a picture.

    Args:
        words: what it is.
        settings: options of the decoder, the decode or the pipeline's call; what is not in it is as
            it is where nothing is said.
        pixels: whether they are those of the picture in one piece, up to rounding.
    """

    words: str
    settings: Mapping[str, Any]
    pixels: bool = True


@dataclass(frozen=True)
class Plan:
    """What was chosen, why, and what was refused.

    Args:
        what: the picture, in words. budget: bytes.
        way: chosen. estimate: of it.
        refused: faster ways with the bytes that they would take.
        instead_of: the way that memory did not suffice for, of a plan made for want of it.
    """

    what: str
    budget: int
    way: Way
    estimate: Estimate
    refused: tuple[tuple[Way, int], ...]
    instead_of: str = ""

    @property
    def changes_tiles(self) -> bool:
        """Whether it cuts the picture in tiles."""
        return "tile" in self.way.settings

    @property
    def settings(self) -> dict[str, Any]:
        """Options to pass on."""
        return dict(self.way.settings)

    @property
    def metadata(self) -> dict[str, Any]:
        """JSON-able, for the picture's."""
        told = {"instead_of": self.instead_of} if self.instead_of else {"budget": self.budget}
        return {"way": self.way.words, **told}

    @property
    def same_pixels(self) -> bool:
        """Whether they are those of the picture in one piece, up to rounding."""
        return self.way.pixels

    def __str__(self) -> str:
        e = self.estimate
        parts = {"weights": e.weights, "activations": e.activations, "workspace": e.workspace}
        if e.text_encoder:
            parts["text encoder"] = e.text_encoder
        lines = [
            f"{self.what} within {in_words(self.budget)}: {self.way.words}",
            f"  takes {in_words(e.peak)}: "
            + ", ".join(f"{name} {in_words(count)}" for name, count in parts.items()),
        ]
        if not self.same_pixels:
            lines.append("  other pixels than in one piece: see docs/tiling.md")
        if self.refused:
            lines.append("  faster, and too large:")
            lines += [f"    {in_words(count):>8}  {way.words}" for way, count in self.refused]
        else:
            lines.append("  nothing is faster")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "what": self.what,
            "budget": self.budget,
            "way": self.way.words,
            "settings": _plain(self.way.settings),
            "same_pixels": self.same_pixels,
            "estimate": self.estimate.to_dict(),
            "refused": [{"way": way.words, "peak": peak} for way, peak in self.refused],
        }


def plan(
    model: Any,
    size: int | tuple[int, int],
    budget: int | str,
    *,
    tiles: bool = True,
    loaded: bool = False,
    **options: Any,
) -> Plan:
    """The fastest way to make a picture that fits.

        plan("flux-2k", 4096, "8GB", device="cuda").settings

    Args:
        model, size: as for `estimate_memory`.
        budget: bytes on the device, or text like "8GB".
        tiles: whether tiles may be chosen, which change pixels.
        loaded: the network is on its device: its weights cannot be taken away any more.
        options: as for `estimate_memory`, held fixed: a way that needs another value of one is not
            tried.

    Raises:
        BudgetError: nothing fits; names the smallest budget that would do. ValueError: budget.
    """
    budget, size, found = parsed_bytes("memory", budget), pair_of(size), resolve(model)
    refused: list[tuple[Way, int]] = []
    passed: list[Way] = []  # over by their weights alone, which only offloading makes less
    heavy = 0
    for way in ways(found, size, tiles=tiles, loaded=loaded, options=options):
        if heavy and "offload" not in way.settings:
            passed.append(way)
            continue
        estimate = _estimated(found, size, options, way)
        if estimate is None:
            continue
        if estimate.peak <= budget:
            way, estimate = _more_together(found, size, options, way, estimate, budget)
            return Plan(_named(model, size, options), budget, way, estimate, tuple(refused))
        refused.append((way, estimate.peak))
        if estimate.weights > budget and not options.get("offload"):
            heavy = estimate.weights
    if refused and heavy < min(peak for _, peak in refused):
        every = [(way, _estimated(found, size, options, way)) for way in passed]
        refused += [(way, estimate.peak) for way, estimate in every if estimate is not None]
    if not refused:
        raise BudgetError(f"{_named(model, size, options)}: no way is left by the options")
    least_way, least = min(refused, key=lambda item: item[1])
    raise BudgetError(
        f"memory = {in_words(budget)} is too little for {_named(model, size, options)}: the "
        f"smallest budget that would do is {upward(least)} ({least_way.words})",
        least,
    )


def cheaper(
    model: Any,
    size: int | tuple[int, int],
    settings: Mapping[str, Any],
    *,
    tiles: bool = True,
    **options: Any,
) -> Plan | None:
    """The fastest way that takes clearly less than another, or None: for a network that is loaded
    and ran out of memory.

    Args:
        settings: of the way that did not suffice, beside `options`.
        The others: as for `plan`.
    """
    size, found = pair_of(size), resolve(model)
    now = estimate_memory(found, size, **{**options, **settings})
    name = _named(model, size, options)
    instead = "as asked for"
    for way in ways(found, size, tiles=tiles, loaded=True, options=options):
        if dict(way.settings) == dict(settings):
            instead = way.words
        estimate = _estimated(found, size, options, way)
        if estimate is None or estimate.activations > MUCH_LESS * now.activations:
            continue
        return Plan(
            name, now.peak, way, estimate, (), instead_of=f"{instead}, {in_words(now.peak)}"
        )
    return None


def ways(
    model: Any,
    size: tuple[int, int],
    *,
    tiles: bool,
    loaded: bool,
    options: Mapping[str, Any],
) -> Iterator[Way]:
    """Ways to make a picture, the fastest first, that leave `options` as they are."""
    if options.get("tile") is not None:
        yield from _asked_tiles(model, options["tile"])
        return
    of_model = _pid_ways if isinstance(model, Variant | PiDConfig) else _l2p_ways
    for way in of_model(model, size, loaded):
        changed = {k for k, v in way.settings.items() if k not in _FREE and options.get(k, v) != v}
        if not changed and (tiles or way.pixels):
            yield way


def _asked_tiles(model: Any, tile: Any) -> Iterator[Way]:
    yield Way("tiles as asked for", {})
    if isinstance(model, Variant | PiDConfig):
        config = model if isinstance(model, PiDConfig) else model.inference_config
        cells = trained_tile(config, None) if isinstance(tile, str) else tile
        chunk = _chunk(config, tuple(n * config.pixels_per_latent_cell for n in cells))
        one = {"tile_batch": 1}
        yield Way("tiles as asked for, one in a network call", one)
        yield Way(
            f"tiles as asked for, one in a network call, {chunk} patches at a time",
            {**one, "pixel_chunk": chunk},
        )
        return
    apart = {"guidance_together": False}
    yield Way("tiles as asked for, guidance apart", apart)
    for count in DECODER_BUDGETS:
        yield Way(
            f"tiles as asked for, guidance apart, local decoder in {in_words(count)}",
            {**apart, "decoder_memory": count},
        )


def _pid_ways(model: Variant | PiDConfig, size: tuple[int, int], loaded: bool) -> Iterator[Way]:
    config = model if isinstance(model, PiDConfig) else model.inference_config
    chunk = _chunk(config, size)
    low = {"low_memory": True}
    chunked = {**low, "pixel_chunk": chunk}
    away = {**chunked, "offload": "blocks"}
    chunk_words = f"features anew in every step, {chunk} patches at a time"
    yield Way("whole", {})
    yield Way("whole, features anew in every step", low)
    yield Way(f"whole, {chunk_words}", chunked)
    if not loaded:
        yield Way(f"whole, {chunk_words}, weights visit the device", away)
    trained = trained_tile(config, None if isinstance(model, PiDConfig) else model)
    cells = tuple(n // config.pixels_per_latent_cell for n in size)
    for extra in ({}, {"offload": "blocks"}) if not loaded else ({},):
        for tile in _tiles(trained, cells, cell_step(config)):
            for mode, words in (("sync", "blended in every step"), ("independent", "blended once")):
                pixels = tuple(n * config.pixels_per_latent_cell for n in tile)
                chunk = _chunk(config, pixels)
                settings = {"tile": tile, "tile_mode": mode, "pixel_chunk": chunk, **extra}
                visit = ", weights visit the device" if extra else ""
                yield Way(
                    f"tiles of {tile[0]} x {tile[1]} latent cells, {words}, {chunk} patches "
                    f"at a time{visit}",
                    settings,
                    False,
                )


def _chunk(config: PiDConfig, size: tuple[int, int]) -> int:
    patches = size[0] * size[1] // config.patch_size**2
    return max(1, min(PIXEL_CHUNK, patches // 4))


def _l2p_ways(model: L2PVariant | L2PConfig, size: tuple[int, int], loaded: bool) -> Iterator[Way]:
    apart = {"guidance_together": False}
    yield Way("whole", {})
    yield Way("whole, guidance apart", apart)
    for count in DECODER_BUDGETS:
        yield Way(
            f"whole, guidance apart, local decoder in {in_words(count)}",
            {**apart, "decoder_memory": count},
        )
    if not loaded:
        for count in (DECODER_MEMORY, *DECODER_BUDGETS):
            yield Way(
                f"whole, guidance apart, local decoder in {in_words(count)}, weights visit the "
                f"device",
                {**apart, "decoder_memory": count, "offload": "blocks"},
            )
    config = model if isinstance(model, L2PConfig) else model.config
    native = size if isinstance(model, L2PConfig) else (model.native_size,) * 2
    for extra in ({}, {"offload": "blocks"}) if not loaded else ({},):
        for tile in _tiles(native, size, config.size_multiple):
            for count in DECODER_BUDGETS[2::2]:
                visit = ", weights visit the device" if extra else ""
                yield Way(
                    f"tiles of {tile[0]} x {tile[1]} pixels, guidance apart, local decoder in "
                    f"{in_words(count)}{visit}",
                    {"tile": tile, **apart, "decoder_memory": count, **extra},
                    False,
                )


def _tiles(trained: tuple[int, int], size: tuple[int, int], step: int) -> Iterator[tuple[int, int]]:
    """Tiles smaller than a picture, the largest first."""
    seen = set()
    for part in PARTS:
        tile = tuple(
            min(max(step, int(t * part) // step * step), n)
            for t, n in zip(trained, size, strict=True)
        )
        if tile != size and tile not in seen:
            seen.add(tile)
            yield tile


def _estimated(
    model: Any, size: tuple[int, int], options: Mapping[str, Any], way: Way
) -> Estimate | None:
    """None where the network cannot do it: a local decoder that needs more."""
    try:
        return estimate_memory(model, size, **{**options, **way.settings})
    except ValueError:
        if "decoder_memory" in way.settings:
            return None
        raise


def _more_together(
    model: Any,
    size: tuple[int, int],
    options: Mapping[str, Any],
    way: Way,
    estimate: Estimate,
    budget: int,
) -> tuple[Way, Estimate]:
    """As many tiles in a network call as fit, of a way in tiles that fits."""
    if "tile_mode" not in way.settings or "tile_batch" in options:
        return way, estimate
    for count in TOGETHER:
        more = Way(
            f"{way.words}, {count} in a network call",
            {**way.settings, "tile_batch": count},
            False,
        )
        found = _estimated(model, size, options, more)
        if found is not None and found.peak <= budget:
            return more, found
    return way, estimate


def _named(model: Any, size: tuple[int, int], options: Mapping[str, Any]) -> str:
    name = model if isinstance(model, str) else getattr(model, "name", "this network")
    words = [f"{name} at {size[0]} x {size[1]}"]
    if options.get("batch", 1) > 1:
        words.append(f"{options['batch']} at once")
    words += [str(options[k]) for k in ("precision", "device") if options.get(k)]
    return ", ".join(words)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
