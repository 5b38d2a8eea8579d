"""Calls that are held to a budget of memory, and made once more in less when memory runs out."""

from __future__ import annotations

import functools
import gc
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from ..errors import MemoryWarning
from ..out_of_memory import is_out_of_memory


def in_memory(call: Callable) -> Callable:
    """For a method with a keyword `memory`, which then gets a `pixeldiff.memory.Plan` or None.

    Its object says, by `memory_question(args, options)`, what is asked of the planner, and frees
    what it keeps from call to call by `release_memory()`.
    """

    @functools.wraps(call)
    def run(self, *args: Any, memory: Any = None, **options: Any) -> Any:
        plan = None
        if memory is not None:
            plan = _planned(self, memory, args, options)
            if plan.changes_tiles:
                _warn(f"{plan.what}: memory={memory!r} chose {plan.way.words}: other pixels")
        states = _states(options.get("generator"))
        try:
            return call(self, *args, memory=plan, **options)
        except Exception as e:
            if not is_out_of_memory(e) or options.get("resume") is not None:
                raise
            # What the frames of the failed call hold is all that there is to free.
            traceback.clear_frames(e.__traceback__)
            failed = e.with_traceback(None)
        self.release_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        again = _cheaper(self, plan, args, options)
        if again is None:
            raise failed
        _warn(
            f"{again.what}: memory ran out ({_first_line(failed)}). Not finished: "
            f"{again.instead_of}. Made again: {again.way.words}"
            + ("" if again.same_pixels else ": other pixels")
        )
        for generator, state in states:
            generator.set_state(state)
        return call(self, *args, memory=again, **options)

    return run


def _planned(self: Any, memory: Any, args: tuple, options: dict[str, Any]) -> Any:
    from ..memory import Plan, estimate_memory, parsed_bytes, plan
    from ..memory.heap import return_if_tight

    if isinstance(memory, Plan):
        return memory
    model, size, asked, tiles = self.memory_question(args, options)
    if asked["device"] == "cpu":
        budget = parsed_bytes("memory", memory)
        return_if_tight(estimate_memory(model, size, **asked).peak, budget)
    return plan(model, size, memory, tiles=tiles, loaded=True, **asked)


def _cheaper(self: Any, plan: Any, args: tuple, options: dict[str, Any]) -> Any:
    from ..memory import cheaper

    model, size, asked, tiles = self.memory_question(args, options)
    if plan is None:  # nobody allowed for other pixels
        return cheaper(model, size, {}, tiles=False, **asked)
    return cheaper(model, size, plan.settings, tiles=tiles, **asked)


def _states(generator: Any) -> list[tuple[torch.Generator, torch.Tensor]]:
    given = generator if isinstance(generator, list | tuple) else [generator]
    return [(g, g.get_state()) for g in given if isinstance(g, torch.Generator)]


def _first_line(e: BaseException) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:120]


def _warn(message: str) -> None:
    warnings.warn(message, MemoryWarning, stacklevel=4)
