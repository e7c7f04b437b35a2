"""What the tests against PEFT share."""

import os

import pytest


@pytest.fixture(autouse=True)
def _without_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each save waits for the disk four times; the tests of faults do it, these need not."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
