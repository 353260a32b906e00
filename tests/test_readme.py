"""What the README says to type in Python, and the benchmark cases it names (`.ci/run` tests its shell commands)."""

import re
from pathlib import Path

import pytest

from pallas_kernels.bench.__main__ import benches

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
NAMES = ["model", "variant", "formats", "ops"]
ROWS = re.findall(r"^\|[^|]+\| (`\w+ --only .*) \|$", README, re.MULTILINE)


@pytest.mark.parametrize("block", [pytest.param(BLOCKS[0], marks=pytest.mark.slow), *BLOCKS[1:]], ids=NAMES)
def test_a_block_runs_as_it_is_pasted(block):
    exec(compile(block, "README.md", "exec"), {"__name__": "pasted"})


@pytest.mark.parametrize("row", ROWS)
def test_named_cases_exist(row):
    op = ""
    for given, text in re.findall(r'`(\w+ )?--only "([^"]+)"`', row):
        op = given.strip() or op
        assert any(text in case.name for case in benches(op)), f"{op} --only {text!r}"


def test_nothing_is_passed_over():
    """The patterns above find what they are for."""
    assert len(BLOCKS) == len(NAMES) and len(ROWS) == 13
