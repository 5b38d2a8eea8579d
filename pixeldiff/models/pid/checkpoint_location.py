"""Where a checkpoint is: a path, the packaged demo model, or a Hugging Face hub repository."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import CheckpointError, CheckpointNotFoundError

EXTENSIONS = (".safetensors", ".pth", ".pt")
INDEX_SUFFIX = ".safetensors.index.json"
DEMO = "demo"

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(:(?P<file>[^:]+))?")


def resolve(
    path_or_id: str | Path, *, prefer: Sequence[str] = (), packaged: str = "pid.safetensors"
) -> Path:
    """The one local file that `path_or_id` means.

    Args:
        path_or_id: "demo", the packaged model; else an existing file or directory; else a hub
            repository "org/name" or a file in it "org/name:folder/file", downloaded into the hub's
            cache by the optional package huggingface_hub.
        prefer: names that settle a directory or repository with several checkpoints: when the
            path of exactly one candidate contains one of them, that one is taken.
        packaged: the file that "demo" means.

    Raises:
        CheckpointNotFoundError: nothing there, or several candidates (listed), or the hub or its
            package is out of reach; the message says what to do.
    """
    text = str(path_or_id)
    if text == DEMO:
        return _packaged_demo(packaged)
    path = Path(path_or_id).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        return _only(_candidates_in(path), text, path, prefer)
    hub = None if isinstance(path_or_id, Path) else _HUB_ID.fullmatch(text)
    if hub and (hub["file"] or not text.endswith((*EXTENSIONS, ".json"))):
        return _from_hub(hub["repo"], hub["file"], prefer)
    raise CheckpointNotFoundError(
        f"resolve: no file or directory {text!r} (current directory {Path.cwd()}); a hub "
        'repository is written "org/name" or "org/name:path/in/it", the packaged model "demo"'
    )


def _packaged_demo(name: str) -> Path:
    path = Path(str(importlib.resources.files("pixeldiff"))) / "assets" / "demo" / name
    if not path.is_file():
        raise CheckpointNotFoundError(
            f'resolve: the packaged model "demo" is not installed (no {path}); reinstall pixeldiff'
        )
    return path


def _candidates_in(directory: Path) -> list[Path]:
    """Checkpoints in the directory, or, where it holds none, anywhere below it."""
    for found in (directory.glob("*"), directory.rglob("*")):
        files = sorted(p for p in found if p.is_file() and _is_checkpoint(p.name))
        # The shards of an index are parts of one candidate, not candidates.
        indexed = {p.parent for p in files if p.name.endswith(INDEX_SUFFIX)}
        files = [p for p in files if p.parent not in indexed or p.name.endswith(INDEX_SUFFIX)]
        if files:
            return files
    return []


def _is_checkpoint(name: str) -> bool:
    return name.endswith((*EXTENSIONS, INDEX_SUFFIX))


def _only(files: list, given: str, directory: Path | None, prefer: Sequence[str]):
    if len(files) > 1:
        wanted = [f for f in files if any(name.lower() in str(f).lower() for name in prefer)]
        files = wanted if len(wanted) == 1 else files
    if len(files) == 1:
        return files[0]
    if not files:
        hint = ""
        if directory is not None and next(directory.rglob("*.distcp"), None):
            hint = (
                "; it is a distributed training checkpoint, convert it first with "
                "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
            )
        raise CheckpointNotFoundError(
            f"resolve: no checkpoint ({', '.join((*EXTENSIONS, INDEX_SUFFIX))}) in {given!r}{hint}"
        )
    listed = "\n  ".join(str(f) for f in files[:20])
    more = f"\n  and {len(files) - 20} more" if len(files) > 20 else ""
    how = "name one of them" if directory is not None else f'name one as "{given}:FILE"'
    raise CheckpointNotFoundError(
        f"resolve: {len(files)} checkpoints in {given!r}; {how}:\n  {listed}{more}"
    )


def _from_hub(repo: str, file: str | None, prefer: Sequence[str]) -> Path:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointNotFoundError(
            f"resolve: {repo!r} is no local path, and reading it from the Hugging Face hub needs "
            "huggingface_hub: pip install huggingface_hub, or download the file and pass its path"
        ) from None
    try:
        if file is None:
            names = _hub_files(huggingface_hub, repo)
            file = _only([n for n in names if _is_checkpoint(n)], repo, None, prefer)
        if file.endswith(INDEX_SUFFIX):
            # The shards lie beside their index.
            root = huggingface_hub.snapshot_download(
                repo, allow_patterns=[file, file.rsplit("/", 1)[0] + "/*.safetensors"]
                if "/" in file else [file, "*.safetensors"],
            )  # fmt: skip
            return Path(root) / file
        return Path(huggingface_hub.hf_hub_download(repo, file))
    except CheckpointError:
        raise
    except Exception as error:  # the hub's errors have several unrelated bases
        reason = str(error).strip().splitlines()
        raise CheckpointNotFoundError(
            f"resolve: could not get {file or 'the file list'} of {repo!r} from the Hugging Face "
            f"hub ({type(error).__name__}: {reason[0] if reason else 'no message'}). Check the "
            "name, the network and, for a gated repository, your login; or download the file and "
            "pass its path"
        ) from error


def _hub_files(huggingface_hub, repo: str) -> list[str]:
    try:
        return huggingface_hub.HfApi().list_repo_files(repo)
    except Exception:
        # Offline: what an earlier download left in the cache will do.
        try:
            root = Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
        except Exception:
            root = None
        if root is None:
            raise
        return [p.relative_to(root).as_posix() for p in sorted(root.rglob("*")) if p.is_file()]
