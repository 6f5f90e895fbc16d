"""Each parser of what comes from outside, fed mutated inputs: no traceback, hang or gigabyte."""

import pytest
from fuzzing import TARGETS, fuzz, load


@pytest.mark.parametrize("name", TARGETS)
def test_a_parser_takes_or_refuses_whatever_comes(name: str) -> None:
    target = load(name)
    result = fuzz(target.SEEDS(), target.run, seconds=1.0)
    assert not result.failures
    assert result.inputs > len(target.SEEDS()) and result.kept > 1  # it did reach the parser
