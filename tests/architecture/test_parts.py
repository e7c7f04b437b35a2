"""The lines of `make test`: one per part, when its last test is through; what fails or never ends is in it."""

from __future__ import annotations

from types import SimpleNamespace as Namespace
from typing import Any

from parts import Parts, part_of


def report(nodeid: str, when: str = "call", outcome: str = "passed", **more: Any) -> Any:
    flags = {name: outcome == name for name in ("passed", "failed", "skipped")}
    return Namespace(nodeid=nodeid, when=when, outcome=outcome, duration=0.5, **flags, **more)


def test_one_line_per_part() -> None:
    lines: list[str] = []
    reporter = Namespace(ensure_newline=lambda: None, write_line=lambda text, **_: lines.append(" ".join(text.split())))
    parts = Parts(Namespace(pluginmanager=Namespace(get_plugin=lambda _: reporter)))
    tests = [
        "tests/laws/test_a.py::x",
        "tests/laws/test_b.py::y[1/2]",
        "tests/core/test_c.py::z",
        "tests/core/test_c.py::w",
    ]
    parts.pytest_xdist_node_collection_finished(None, tests)
    parts.pytest_xdist_node_collection_finished(None, tests)
    for nodeid, outcome in zip(tests[:3], ("passed", "failed", "skipped"), strict=True):
        assert lines == []
        for when in ("setup", "call", "teardown"):
            parts.pytest_runtest_logreport(report(nodeid, when, outcome if when == "call" else "passed"))
        lines, said = [], list(lines)
        reporter.write_line = lambda text, **_: lines.append(" ".join(text.split()))  # noqa: B023
        assert said == (["laws 1 passed, 1 failed 3.0 s"] if nodeid == tests[1] else [])
    parts.pytest_terminal_summary()
    assert lines == ["core 1 skipped, 1 not run 1.5 s"]


def test_only_what_is_wrong_has_a_letter() -> None:
    parts = Parts(None)
    assert parts.pytest_report_teststatus(report("a", outcome="failed")) is None
    assert parts.pytest_report_teststatus(report("a")) == ("passed", "", "")
    assert parts.pytest_report_teststatus(report("a", "setup")) == ("", "", "")
    assert parts.pytest_report_teststatus(report("a", "setup", "skipped")) == ("skipped", "", "")
    assert part_of("tests/test_x.py::y") == "tests"
