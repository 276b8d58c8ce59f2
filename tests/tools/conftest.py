from pathlib import Path

import pytest
from tiny_dataset import make_checkpoint, make_dataset


@pytest.fixture(scope="session")
def tiny(request, tmp_path_factory) -> list[str]:
    """The flags that name a small dataset and an untrained policy for it: a π0, or of the test's model."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    dataset = make_dataset(folder / "data")
    checkpoint = make_checkpoint(folder / "policy", getattr(request, "param", "pi0"))
    return [f"--policy.path={checkpoint}", f"--dataset.root={dataset}"]
