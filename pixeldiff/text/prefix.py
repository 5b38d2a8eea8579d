"""The two fixed texts of PiD's text conditioning, found at run time and checked by hash.

Both were written by others and are not part of this package. The instruction prefix that stands
before every caption is the one the Sana pipeline of `diffusers` carries as a default argument; the
negative prompt of the undistilled model is in no library, so it always comes from the user's file.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import os
from pathlib import Path

PREFIX_SHA256 = "62b9ab89eebb0ac5ee4d264bf96bf19d2b81f504bc3852500efeaf5a34d638b1"
PREFIX_LENGTH = 1057
NEGATIVE_PROMPT_SHA256 = "3fbcee537cdf91145d41ac74b4c7a5c9f3f4132c1bc1b6dfcab4fed0a9984f86"
NEGATIVE_PROMPT_LENGTH = 186

_ARGUMENT = "complex_human_instruction"


def instruction_prefix(path: str | os.PathLike[str] | None = None, *, verify: bool = True) -> str:
    """The text that precedes every caption, 1057 ASCII characters ending in a colon and a space.

    Args:
        path: UTF-8 text file with the prefix (the `chi_prompt` entry of a published PiD
            configuration). One trailing newline is dropped, CRLF counts as LF. None: the default
            of `complex_human_instruction` in the installed diffusers' `SanaPipeline.__call__`,
            its lines joined by newlines and its single quotes turned into double quotes. The
            source file is parsed; diffusers is imported only where that is not possible.
        verify: check the SHA-256 of the file's text. Text from diffusers is always checked.

    Raises:
        ImportError: no path, and diffusers is not installed.
        RuntimeError: no path, and the installed diffusers holds another text or none.
        ValueError: the file's text has another SHA-256, is empty, or is not UTF-8.
        OSError: the file cannot be read.

    Source: PiD, arXiv 2605.23902, released text conditioning.
    """
    if path is not None:
        return _read("instruction_prefix", path, PREFIX_SHA256, PREFIX_LENGTH, verify)
    lines = _sana_instruction()
    text = "\n".join(lines).replace("'", '"') if lines is not None else None
    if text is None or text_sha256(text) != PREFIX_SHA256:
        what = "has none" if text is None else f"has another text ({_describe(text)})"
        raise RuntimeError(
            f"instruction_prefix: the prefix should be the default of {_ARGUMENT} in diffusers' "
            f"SanaPipeline.__call__, but the installed diffusers {what}; give a text file with "
            f"{PREFIX_LENGTH} characters, SHA-256 {PREFIX_SHA256}"
        )
    return text


def negative_prompt(path: str | os.PathLike[str], *, verify: bool = True) -> str:
    """The fixed negative prompt that the undistilled model's guidance uses as its null caption.

    186 characters; not to be confused with the empty caption that `bake_caption(path, None, ...)`
    encodes.

    Args:
        path: UTF-8 text file with the `negative_prompt` entry of a published PiD configuration.
            One trailing newline is dropped.
        verify: check the SHA-256 of the text.

    Raises:
        ValueError: the text has another SHA-256, is empty, or is not UTF-8.
        OSError: the file cannot be read.
    """
    return _read("negative_prompt", path, NEGATIVE_PROMPT_SHA256, NEGATIVE_PROMPT_LENGTH, verify)


def text_sha256(text: str) -> str:
    """SHA-256 of the UTF-8 bytes of `text`, in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def _read(name: str, path: str | os.PathLike[str], sha256: str, length: int, verify: bool) -> str:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: {path} must be UTF-8 text: {error}") from error
    # Most editors end a file with a newline; the text itself ends without one.
    text = text.removesuffix("\n")
    if not text:
        raise ValueError(f"{name}: {path} is empty")
    if verify and text_sha256(text) != sha256:
        hint = ""
        if text_sha256(text + " ") == sha256:
            hint = "; the space at its end is missing"
        raise ValueError(
            f"{name}: {path} must hold the released text of {length} characters, SHA-256 {sha256}, "
            f"got {_describe(text)}{hint}; verify=False accepts any text"
        )
    return text


def _describe(text: str) -> str:
    return f"{len(text)} characters, SHA-256 {text_sha256(text)}"


def _sana_instruction() -> list[str] | None:
    lines = _from_source()
    return lines if lines is not None else _from_import()


def _from_source() -> list[str] | None:
    """The default read from the pipeline's source text: no import, a few milliseconds."""
    try:
        spec = importlib.util.find_spec("diffusers")
    except ValueError:  # a module put in sys.modules without a spec
        return None
    if spec is None:
        raise ImportError(
            "instruction_prefix: diffusers is not installed; install the extra pixeldiff[text] or "
            "give a text file with the prefix"
        )
    for folder in spec.submodule_search_locations or ():
        source = Path(folder, "pipelines", "sana", "pipeline_sana.py")
        try:
            tree = ast.parse(source.read_bytes())
        except (OSError, SyntaxError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name == "SanaPipeline":
                return _argument_default(node)
    return None


def _argument_default(pipeline: ast.ClassDef) -> list[str] | None:
    for node in pipeline.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__call__":
            args = node.args
            positional = [*args.posonlyargs, *args.args]
            first = len(positional) - len(args.defaults)
            pairs = [
                *zip(positional[first:], args.defaults, strict=True),
                *zip(args.kwonlyargs, args.kw_defaults, strict=True),
            ]
            for argument, default in pairs:
                if argument.arg == _ARGUMENT and default is not None:
                    try:
                        return _as_lines(ast.literal_eval(default))
                    except ValueError:  # not a literal, for example a named constant
                        return None
    return None


def _from_import() -> list[str] | None:
    try:
        from diffusers import SanaPipeline
    except Exception as error:
        # diffusers resolves pipelines lazily and wraps whatever failed underneath.
        raise RuntimeError(
            f"instruction_prefix: diffusers is installed but its SanaPipeline cannot be imported "
            f"({error}); give a text file with the prefix"
        ) from error
    parameter = inspect.signature(SanaPipeline.__call__).parameters.get(_ARGUMENT)
    return _as_lines(parameter.default) if parameter is not None else None


def _as_lines(value: object) -> list[str] | None:
    if isinstance(value, (list, tuple)) and all(isinstance(line, str) for line in value):
        return list(value)
    return None
