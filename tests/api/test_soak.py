"""The soak of `benchmarks/soak.py`, for twenty seconds."""

from __future__ import annotations

import pytest

from soak import soak


@pytest.mark.slow
# A client that leaves drops a half-read generator of the HTTP library, which Python reports when it collects it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_twenty_seconds_of_everything_at_once() -> None:
    wrong, seen, _ = soak(20.0, seed=1)
    assert not wrong
    for kind in ("answered", "left", "changed", "unload", "refused 404", "refused 400"):
        assert seen[kind] > 0, seen
