"""A hub in a folder: what is pushed to it lies in the cache that the real client reads without a network.

Only writing is replaced (creating repositories, uploading, tagging), and the two questions for which the
client has no offline answer. Everything is read back by huggingface_hub's own `hf_hub_download` and
`snapshot_download`.
"""

import hashlib
import os
import shutil
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from huggingface_hub import HfApi, constants
from huggingface_hub.hf_api import RepoFile
from lerobot.common import train_utils


def commit(
    cache: Path,
    repo_id: str,
    folder: Path,
    *,
    repo_type: str = "model",
    path_in_repo: str = "",
    revision: str = "main",
    allow_patterns: list[str] | None = None,
) -> str:
    """Put a folder's files into a repository, on top of what the revision holds; the commit's hash."""
    repository = cache / f"{repo_type}s--{repo_id.replace('/', '--')}"
    head = repository / "refs" / revision
    before = head.read_text() if head.is_file() else ""
    chosen = [
        path.relative_to(folder)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and (allow_patterns is None or any(fnmatch(path.name, pattern) for pattern in allow_patterns))
    ]
    oid = hashlib.sha1(f"{before}{path_in_repo}{chosen}".encode()).hexdigest()
    snapshot = repository / "snapshots" / oid
    if before:
        shutil.copytree(head.parent.parent / "snapshots" / before, snapshot, copy_function=os.link)
    for path in chosen:
        target = snapshot / path_in_repo / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a link to the file of the commit before
        shutil.copy(folder / path, target)
    head.parent.mkdir(parents=True, exist_ok=True)
    head.write_text(oid)
    return oid


def files(cache: Path, repo_id: str) -> set[str]:
    """The files of a model repository's head."""
    repository = cache / f"models--{repo_id.replace('/', '--')}"
    snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text()
    return {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()}


def install(cache: Path) -> None:
    """Let this process write to the hub in `cache`, and read from it."""
    constants.HF_HUB_CACHE = str(cache)

    def create_repo(self: HfApi, repo_id: str, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(repo_id=repo_id)

    def upload_folder(self: HfApi, *, repo_id: str, folder_path: str, **options: Any) -> SimpleNamespace:
        names = ("path_in_repo", "allow_patterns", "revision")
        given = {name: options[name] for name in names if options.get(name) is not None}
        oid = commit(cache, repo_id, Path(folder_path), **given)
        return SimpleNamespace(oid=oid, repo_url=SimpleNamespace(url=f"https://hub.invalid/{repo_id}"))

    def create_tag(self: HfApi, repo_id: str, *, tag: str, revision: str, **_: Any) -> None:
        (cache / f"models--{repo_id.replace('/', '--')}" / "refs" / tag).write_text(revision)

    def list_repo_tree(
        self: HfApi, repo_id: str, *, revision: str | None = None, **_: Any
    ) -> Iterator[RepoFile]:
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        ref = repository / "refs" / (revision or "main")
        snapshot = repository / "snapshots" / (ref.read_text() if ref.is_file() else str(revision))
        for path in sorted(snapshot.rglob("*")):
            if path.is_file():
                name = path.relative_to(snapshot).as_posix()
                yield RepoFile(
                    path=name, size=path.stat().st_size, oid=hashlib.sha1(name.encode()).hexdigest()
                )

    def snapshot_download(repo_id: str, *, allow_patterns: str, local_dir: str, **_: Any) -> None:
        # The real one does not copy out of the cache without a network.
        repository = cache / f"models--{repo_id.replace('/', '--')}"
        snapshot = repository / "snapshots" / (repository / "refs" / "main").read_text()
        for name in files(cache, repo_id):
            if fnmatch(name, allow_patterns):
                (Path(local_dir) / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(snapshot / name, Path(local_dir) / name)

    for method in (create_repo, upload_folder, create_tag, list_repo_tree):
        setattr(HfApi, method.__name__, method)
    train_utils.snapshot_download = cast(Any, snapshot_download)
