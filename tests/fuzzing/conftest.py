"""Bounds of every fuzzed example, and their number: few and the same in the suite, N random ones with --fuzz-examples N."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings

# Far above what any example needs, and far below what the smallest machine has.
MEMORY_BYTES = 4 * 2**30
SECONDS = 20

# Of a test, where --fuzz-examples says nothing else. Then they are the same in every run.
EXAMPLES = 60


@contextmanager
def _bounds() -> Iterator[None]:
    with open("/proc/self/statm") as file:
        present = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (present + MEMORY_BYTES, before[1]))
    start = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - start < SECONDS, "one example takes too long"


@pytest.fixture
def bounded():
    """A context in which an example may take `MEMORY_BYTES` more than before it, and `SECONDS`."""
    return _bounds


@pytest.fixture
def fuzzed(request):
    """The settings of a property, as a decorator."""
    asked = request.config.getoption("--fuzz-examples")
    return settings(
        max_examples=asked or EXAMPLES,
        derandomize=asked is None,
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )
