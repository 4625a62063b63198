"""What pyproject.toml asks for is what constraints.txt pins."""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_all_that_is_installed_directly_is_pinned() -> None:
    """A new release of one of these, the linters' too, would otherwise end a fresh `make test` or `make lint`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(word for extra in project["optional-dependencies"].values() for word in extra)]
    names = {re.match(r"[\w-]+", word)[0] for word in asked} - {"cbl", "triton"}  # pyproject.toml says why not triton
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert names == {line.partition("==")[0] for line in lines if not line.startswith("#")}
