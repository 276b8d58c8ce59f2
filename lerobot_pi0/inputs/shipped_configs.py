"""Training configurations that the package ships."""

from pathlib import Path

from lerobot_pi0.errors import MissingFileError


def shipped_config(name: str) -> Path:
    """`configs/<name>.yaml`: in the package when installed from a wheel, beside it in a checkout.

    Relative to the working directory where it lies below it. Raises MissingFileError.
    """
    package = Path(__file__).parents[1]
    candidates = [folder / "configs" / f"{name}.yaml" for folder in (package, package.parent)]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise MissingFileError(
            f"the package's configs/{name}.yaml is missing ({', '.join(map(str, candidates))}): reinstall it"
        )
    return found.relative_to(Path.cwd()) if found.is_relative_to(Path.cwd()) else found
