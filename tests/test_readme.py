"""The README's example runs as it stands, and its commands name things that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_example_runs() -> None:
    (code,) = re.findall(r"<!-- example:begin -->\n```python\n(.*?)```\n<!-- example:end -->", README, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert names["loss"].item() > 0 and names["model"].weight.grad.abs().sum() > 0


def test_what_it_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE)) <= targets | {"help"}
    for path in re.findall(r"python (scripts/\w+\.py)", README):
        assert (ROOT / path).exists(), path
    for group, option in re.findall(r"\b(dataset|loss|sweep|experiment|tracking)=(\w[\w.]*)(?![\w.(])", README):
        assert (ROOT / f"configs/{group}/{option}.yaml").exists(), f"{group}={option}"
    for table in re.findall(r"TABLE=(\w+)", README):
        assert (ROOT / f"configs/table/{table}.yaml").exists(), table
