from pathlib import Path

import pytest
from tiny_dataset import make_checkpoint, make_dataset


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> list[str]:
    """The flags that name a small dataset and an untrained policy for it."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    dataset, checkpoint = make_dataset(folder / "data"), make_checkpoint(folder / "policy")
    return [f"--policy.path={checkpoint}", f"--dataset.root={dataset}"]
