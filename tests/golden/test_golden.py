"""Defaults, checkpoint names, embedded data, augmentation and the loss are as they were."""

import json

import pytest
from measure import GOLDEN, measure


@pytest.fixture(scope="module")
def now():
    return measure()


@pytest.fixture(scope="module")
def was():
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("part", ["defaults", "tensors"])
def test_promises_are_kept_to_the_letter(now, was, part):
    assert now[part] == was[part]


@pytest.mark.parametrize(("part", "off"), [("scenes", 0.05), ("samples", 0.05), ("terms", 0.0)])
def test_numbers_are_as_they_were(now, was, part, off):
    """But for what another CPU's rounding of pixels does."""
    assert dict(_flat(now[part])) == {
        path: pytest.approx(value, rel=2e-3, abs=off) for path, value in _flat(was[part])
    }


def _flat(value, path=""):
    """Yield every number with its path."""
    if isinstance(value, int | float):
        yield path, value
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _flat(inner, f"{path}.{key}")
