"""The folder that a command writes: it appears when complete, and no other folder is touched."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lerobot_pi0.errors import CheckpointError, OutputExistsError


@contextmanager
def unfinished_folder(target: Path, flag: str) -> Iterator[Path]:
    """A new, empty folder `<target>.unfinished`, renamed to `target` at the end and deleted on an error.

    `flag` names the target in errors. Raises OutputExistsError where either folder exists.
    """
    folder = target.with_name(f"{target.name}.unfinished")
    if target.exists(follow_symlinks=False):
        raise OutputExistsError(f"{target} exists: give another {flag}, or delete it")
    if folder.exists(follow_symlinks=False):
        raise OutputExistsError(
            f"{folder} exists, left by an interrupted run or created by somebody else: move or delete it, or "
            f"choose another {flag}"
        )
    created = [parent for parent in folder.parents if not parent.exists()]
    folder.mkdir(parents=True)
    try:
        yield folder
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        for parent in created:
            parent.rmdir()
        raise


def copy_processors(source: Path, folder: Path) -> None:
    """Copy the processor pipelines of a checkpoint folder, tokenizer and statistics included.

    Raises CheckpointError for a link that leads out of the checkpoint. (Snapshots in the cache of the hub
    link to the blobs of the same repository.)
    """
    root = source.resolve()
    root = root.parents[1] if root.parent.name == "snapshots" else root
    for file in source.glob("policy_p*processor*"):
        if not file.resolve().is_relative_to(root):
            raise CheckpointError(
                f"{file} links to {file.resolve()}, outside of the checkpoint: replace the link by the file"
            )
        shutil.copy(file, folder)
