"""The scripts of examples/ as modules, for `main(parse_args([...]))` in the test's own process."""

import importlib.util
from functools import cache
from types import ModuleType

from tests import REPOSITORY


@cache
def load_script(name: str) -> ModuleType:
    """examples/NAME.py, loaded once in a process; what stands after `if __name__ == "__main__"` does not run."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "examples" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script
