"""Checkpoints on the Hugging Face hub: ``hf://org/name@revision``, or ``hf://org/name@revision/file``.

Transfer, resumption and cache are the library's (`huggingface_hub`). Here a revision becomes a commit, which the
card records, only weights and configurations are fetched (torch files where no safetensors lie beside them), and
every file is hashed.
"""

from __future__ import annotations

import glob
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from invdiff.errors import InvdiffError
from invdiff.priors.learned import sha256_file
from invdiff.priors.source import TORCH_SUFFIXES

__all__ = ["SCHEME", "Address", "fetch", "parse", "selection"]

SCHEME = "hf://"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ADDRESS = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[^/@]+))?(/(?P<file>[^@]+))?")
_VARIANT = re.compile(r"\.(fp16|bf16|non_ema)(?=\.)")
#: How deep in a repository a checkpoint's files lie; see `Source.files`.
DEPTH = 2
#: Folders of a pipeline that no prior needs.
_UNUSED = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class Address:
    """A place on the hub.

    Args:
        repo: ``org/name``.
        revision: Branch, tag or commit.
        file: File or folder inside, or empty.
    """

    repo: str
    revision: str = "main"
    file: str = ""

    def __str__(self) -> str:
        return f"{SCHEME}{self.repo}@{self.revision}{'/' * bool(self.file)}{self.file}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never changes."""
        return _COMMIT.fullmatch(self.revision) is not None


def parse(address: str) -> Address:
    """Read ``hf://org/name[@revision][/file]``; slashes in the name of a branch are written ``%2F``.

    Raises:
        InvdiffError: If it is no such address.
    """
    found = _ADDRESS.fullmatch(address.rstrip("/"))
    file = "" if found is None else found["file"] or ""
    if found is None or ".." in PurePosixPath(file).parts:
        raise InvdiffError(f"{address!r} is no address on the hub; expected hf://org/name@revision or .../file.")
    return Address(found["repo"], unquote(found["revision"] or "main"), file)


def fetch(address: str, sha256: str | Mapping[str, str] | None = None) -> tuple[Path, dict[str, Any]]:
    """Fetch a checkpoint, or find it in the cache.

    Args:
        address: See `parse`.
        sha256: What the file of weights must hash to, or hashes by file.

    Returns:
        The file or folder, and what the card records: ``source`` with its commit, and ``files`` with hashes.

    Raises:
        InvdiffError: If it is not there, cannot be reached, or is not what ``sha256`` or the hub says.
    """
    where = parse(address)
    try:
        import huggingface_hub
    except ImportError:
        raise InvdiffError(
            f"{address} needs the library of the hub; `pip install 'invdiff[hub]'` brings it."
        ) from None
    folder, names, stated = _online(where) if not huggingface_hub.is_offline_mode() else (None, [], {})
    if folder is None:
        folder = _cached(where)
        names = selection(where, [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()])
    commit = Address(where.repo, folder.name, where.file)
    if not where.pinned:
        warnings.warn(
            f"{where} is commit {folder.name} today; load {commit} to get the same weights always.", stacklevel=3
        )
    files = {name: sha256_file(folder / name) for name in names}
    for name, wanted in stated.items():
        if files.get(name, wanted) != wanted:
            raise InvdiffError(
                f"{name} of {where} is damaged: its SHA-256 is {files[name][:12]}..., the hub says "
                f"{wanted[:12]}...; delete {folder / name} and load again."
            )
    _check(where, files, sha256)
    return _place(where, folder, names), {"source": str(commit), "files": files}


def selection(where: Address, files: Sequence[str]) -> list[str]:
    """Return the files of a repository that make up a checkpoint.

    Raises:
        InvdiffError: If the file is not there, or nothing says which of several weights are meant.
    """
    kept = [f for f in files if len(PurePosixPath(f).parts) <= DEPTH]
    if where.file in files:
        beside = PurePosixPath(where.file).with_suffix(".json").as_posix()
        return [where.file, *([beside] if beside in files else [])]
    if where.file:
        kept = [f for f in files if f.startswith(f"{where.file}/")]
        if not kept:
            raise InvdiffError(f"{where.repo} has no {where.file} at {where.revision}; it has {_some(files)}.")
        # The scheduler of a pipeline belongs to its network.
        kept += [f for f in files if f == "scheduler/scheduler_config.json"]
    if not where.file and "model_index.json" in files:  # a pipeline is its folders; the rest are copies of it
        parts = [PurePosixPath(f).parts for f in kept]
        kept = [f for f, p in zip(kept, parts) if f == "model_index.json" or (len(p) > 1 and p[0] not in _UNUSED)]
    # Variants (half precision, weights without averaging) lie beside the weights themselves.
    kept = [f for f in kept if (plain := _VARIANT.sub("", f)) == f or plain not in files]
    safe = [f for f in kept if f.endswith(".safetensors")]
    homes = {PurePosixPath(f).parent for f in safe}
    torch_files = [f for f in kept if f.endswith(TORCH_SUFFIXES) and PurePosixPath(f).parent not in homes]
    words = [f for f in kept if PurePosixPath(f).match("tokenizer*/*.txt")]
    weights, texts = safe + torch_files, [f for f in kept if f.endswith(".json")] + words
    if not weights:
        raise InvdiffError(f"{where} has no weights (safetensors or torch files); it has {_some(files)}.")
    if len(weights) > 1 and not any(PurePosixPath(f).name in ("config.json", "model_index.json") for f in texts):
        raise InvdiffError(f"{where} has several checkpoints; name one of {_some(weights)}: {where}/FILE.")
    return sorted(weights + texts)


def _some(files: Sequence[str]) -> str:
    shown = ", ".join(sorted(files)[:6]) or "nothing"
    return f"{shown}, ..." if len(files) > 6 else shown


def _online(where: Address) -> tuple[Path | None, list[str], dict[str, str]]:
    """Folder of the fetched files, their names, and the hub's own hashes; no folder where it cannot be reached."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub

    try:
        found = HfApi().model_info(where.repo, revision=where.revision, files_metadata=True)
        held = found.siblings or []
        names = selection(where, [f.rfilename for f in held])
        # By the name that was given, which the cache then knows when offline.
        patterns = [glob.escape(n) for n in names]
        folder = Path(snapshot_download(where.repo, revision=where.revision, allow_patterns=patterns))
        if folder.name != found.sha:
            raise InvdiffError(f"{where} moved to another commit while it was fetched; load it again.")
    except InvdiffError:
        raise
    except hub.GatedRepoError:
        raise InvdiffError(
            f"{where.repo} is open to those only who accepted its terms; accept them on its page and log in "
            "(`hf auth login`)."
        ) from None
    except hub.RepositoryNotFoundError:
        raise InvdiffError(f"There is no {where.repo} on the hub, or it is private; check the name.") from None
    except hub.RevisionNotFoundError:
        raise InvdiffError(f"{where.repo} has no revision {where.revision!r}; check it.") from None
    except hub.LocalEntryNotFoundError as error:
        raise InvdiffError(f"The download of {where} broke off ({_short(error)}); load it again.") from None
    except hub.HfHubHTTPError as error:
        raise InvdiffError(f"The hub refused {where} ({_short(error)}); try again later.") from None
    except Exception as error:
        # Its client's errors of connection have no public class; what is in the cache may still do.
        if not _unreachable(error):
            raise InvdiffError(
                f"The download of {where} broke off ({_short(error)}); load it again, it goes on from there."
            ) from None
        return None, [], {}
    stated = {f.rfilename: f.lfs.sha256 for f in held if f.lfs is not None}
    return folder, names, stated


def _unreachable(error: BaseException) -> bool:
    return any(word in type(error).__name__ for word in ("Connect", "Timeout", "Offline"))


def _cached(where: Address) -> Path:
    """Folder of the files that an earlier load left."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repos = scan_cache_dir().repos
    except CacheNotFound:
        repos = frozenset()
    for repo in repos:
        if (repo.repo_id, repo.repo_type) != (where.repo, "model"):
            continue
        for kept in repo.revisions:
            if where.revision in (kept.commit_hash, *kept.refs):
                return Path(kept.snapshot_path)
    raise InvdiffError(
        f"{where} is not in the cache, and the hub is offline (HF_HUB_OFFLINE) or cannot be reached; load it once "
        "with a connection."
    )


def _check(where: Address, files: Mapping[str, str], sha256: str | Mapping[str, str] | None) -> None:
    """Compare the hashes with those that the caller demands."""
    if sha256 is None:
        return
    if isinstance(sha256, str):
        weights = [f for f in files if not f.endswith(".json")]
        if len(weights) != 1:
            raise InvdiffError(f"{where} has {len(weights)} files of weights; give sha256={{file: hash}}.")
        sha256 = {weights[0]: sha256}
    for name, wanted in sha256.items():
        if name not in files:
            raise InvdiffError(f"{where} has no file {name!r} to hash; it has {_some(list(files))}.")
        if files[name] != wanted.lower():
            raise InvdiffError(
                f"{name} of {where} has SHA-256 {files[name]}, and {wanted} was demanded; it is another file, and "
                "was not loaded."
            )


def _place(where: Address, folder: Path, names: Sequence[str]) -> Path:
    """The checkpoint itself: a file where one is named, or where it is alone without a configuration."""
    if where.file:
        return folder / where.file
    weights = [n for n in names if not n.endswith(".json")]
    configured = any(PurePosixPath(n).name in ("config.json", "model_index.json") for n in names)
    return folder / weights[0] if len(weights) == 1 and not configured else folder


def _short(error: BaseException) -> str:
    return re.sub(r"\s+", " ", str(error))[:160]
