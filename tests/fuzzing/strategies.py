"""Hostile values: JSON of every type and size, fields of configs replaced by them, headers of shards, flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

# Where ranges end, types meet and conversions fail.
EXTREMES: list[Any] = [
    None, True, False, -1, 0, 1, 2, 3, 16, 2**31 - 1, 2**31, 2**53 + 1, 2**63, 10**9, 10**30, 10**400, -(10**30),
    0.0, -0.0, 0.5, 1.5, 16.0, 1e300, -1e300, 5e-324, float("nan"), float("inf"), float("-inf"),
    "", "x", "16", "1e3", "nan", "true", "\x00", "\ud800", "a/../../b", "/etc/passwd", "../x", "x" * 10_000,
    [], [0], [-1], ["x"], [None], [[[]]], [1] * 2000, {}, {"": None}, {"x": {"y": []}},
]  # fmt: skip


def nested(levels: int) -> Any:
    """Lists and objects in each other."""
    value: Any = 0
    for level in range(levels):
        value = [value] if level % 2 else {"a": value}
    return value


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.text(st.characters(codec=None, exclude_categories=()), max_size=20),
)
json_values = st.one_of(
    st.sampled_from(EXTREMES),
    st.sampled_from([50, 150]).map(nested),
    st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=12,
    ),
)


def with_other_fields(valid: dict[str, Any], further: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Any]]:
    """A valid object with one to three fields replaced, removed or added; now and then something else altogether."""
    names = st.sampled_from(sorted({*valid, *further}))
    changed = st.dictionaries(names, json_values, min_size=1, max_size=3)
    removed = st.lists(names, max_size=1)
    objects = st.builds(
        lambda changes, gone: {k: v for k, v in {**valid, **changes}.items() if k not in gone}, changed, removed
    )
    return objects | st.sampled_from([[], "x", 3, None, [valid]])


def tried(call: Callable[[], Any], *errors: type[Exception]) -> tuple[Any, str | None]:
    """What a call returns, or the message of the error that it may raise, which has to be short enough to read."""
    try:
        return call(), None
    except errors as error:
        said = str(getattr(error, "detail", error))
    assert 10 < len(said) < 4000, said[:5000]
    return None, said


def as_json(value: Any) -> bytes:
    """The text of a JSON file, with what Python alone writes (NaN, half of a surrogate pair as an escape)."""
    return json.dumps(value).encode()
