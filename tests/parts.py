"""What `make test` shows: one line per part (a folder of tests) as soon as it is through, and every failure.

    laws          706 passed, 2 skipped      118.3 s

Seconds are the sum over its tests, whichever processes ran them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest


def part_of(nodeid: str) -> str:
    """The folder below `tests` that a test lies in."""
    folders = nodeid.partition("::")[0].split("/")
    return folders[1] if len(folders) > 2 else folders[0]


class Parts:
    """A plug-in in place of dots; by `--parts`, in the process that reports."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.left: Counter[str] = Counter()
        self.found: dict[str, Counter[str]] = {}
        self.seconds: Counter[str] = Counter()

    def expect(self, nodeids: list[str]) -> None:
        """These tests will run."""
        self.left = Counter(part_of(nodeid) for nodeid in nodeids)

    def pytest_collection_finish(self, session: Any) -> None:
        """Without workers: what has been collected here."""
        if session.items:
            self.expect([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        """With workers: each collects the same."""
        if not self.left:
            self.expect(list(ids))

    @pytest.hookimpl(tryfirst=True)
    def pytest_report_teststatus(self, report: Any) -> tuple[str, str, str] | None:
        """No dot for what is as it should be."""
        if hasattr(report, "wasxfail") or report.failed:
            return None
        return (report.outcome if report.when == "call" or report.skipped else "", "", "")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test's outcome, and say a part's when its last test is through."""
        part = part_of(report.nodeid)
        outcomes = self.found.setdefault(part, Counter())
        self.seconds[part] += report.duration
        if report.when == "call" or not report.passed:
            outcomes["passed" if hasattr(report, "wasxfail") and report.skipped else report.outcome] += 1
        if report.when == "teardown":
            self.left[part] -= 1
            if not self.left[part]:
                self.say(part)

    def pytest_terminal_summary(self) -> None:
        """The parts of which a test never ended."""
        for part in sorted(+self.left):
            self.say(part)

    def say(self, part: str) -> None:
        """The line of one part."""
        outcomes = Counter(self.found.get(part, {}))
        outcomes["not run"] = self.left[part]
        words = ", ".join(f"{count} {outcome}" for outcome, count in outcomes.items() if count)
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        reporter.ensure_newline()
        reporter.write_line(f"{part:<14}{words:<32}{self.seconds[part]:8.1f} s", red="failed" in outcomes)
