"""What the tests against PEFT share: neither library spends time on what is not compared."""

import os

import peft
import pytest


@pytest.fixture(autouse=True)
def _plain_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting for the disk (the tests of faults do that), and no model card from PEFT."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(peft.PeftModel, "create_or_update_model_card", lambda self, folder: None)
