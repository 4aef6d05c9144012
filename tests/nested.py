"""Tests that need a process of their own: run there, reported here one by one.

What some tests need cannot be set once Python runs (Triton's interpreter, another native module). The outer
session collects them like all others, so ``-k``, ``-m`` and ``--lf`` select among them. When the first of a
:class:`Suite` is due, one inner pytest runs all that were selected, and its reports are replayed here.

This file is also the inner session's plugin (``-p nested``).
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SELECTED, REPORTS = "FACTORIZER_KERNELS_NESTED_TESTS", "FACTORIZER_KERNELS_NESTED_REPORTS"


class Suite:
    """The tests below ``folder``.

    Args:
        folder: its conftest.py calls :meth:`run` from ``pytest_runtest_protocol`` in the outer session.
        prepare: called before the inner session starts, with a folder for temporary files; returns its
            environment variables and pytest arguments beside the usual ones.
    """

    def __init__(self, folder: Path, prepare: Callable[[Path], tuple[dict[str, str], list[str]]]):
        self.folder, self.prepare = folder, prepare
        self._reports = cache(self._run)

    def run(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        """Report ``item`` from the inner session; the return value of ``pytest_runtest_protocol``.

        Pytest calls that hook of a conftest.py for the tests of all folders: others run as usual.
        """
        if self.folder not in item.path.parents:
            return None
        selected = tuple(i.nodeid for i in item.session.items if self.folder in i.path.parents)
        reports, output = self._reports(selected)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        for data in reports.get(item.nodeid, ()):
            report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
            item.ihook.pytest_runtest_logreport(report=report)
        if item.nodeid not in reports:
            item.ihook.pytest_runtest_logreport(report=_lost(item, output))
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        # The test before this one left set up what it shares with this one, and the next may not share it.
        item.session._setupstate.teardown_exact(nextitem)
        return True

    def _run(self, selected: tuple[str, ...]) -> tuple[dict[str, list[dict]], str]:
        with tempfile.TemporaryDirectory() as folder:
            names, reports = Path(folder, "selected.json"), Path(folder, "reports.jsonl")
            names.write_text(json.dumps(selected))
            reports.touch()
            environment, arguments = self.prepare(Path(folder))
            path = os.pathsep.join([str(TESTS.parent), str(TESTS)])
            environment = {**os.environ, "PYTHONPATH": path, **environment}
            environment |= {SELECTED: str(names), REPORTS: str(reports)}
            command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "nested"]
            done = subprocess.run(
                [*command, *arguments, str(self.folder)],
                env=environment,
                cwd=TESTS.parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            by_test: dict[str, list[dict]] = {}
            for line in reports.read_text().splitlines():
                report = json.loads(line)
                by_test.setdefault(report["nodeid"], []).append(report)
            return by_test, done.stdout


def _lost(item: pytest.Item, output: str) -> pytest.TestReport:
    """The report of a test that the inner session did not come to."""
    message = f"the inner session gave no report of this test; it printed:\n{output}"
    return pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")


# --- In the inner session --------------------------------------------------------------------------


def pytest_collection_modifyitems(config, items):
    if SELECTED in os.environ:
        selected = set(json.loads(Path(os.environ[SELECTED]).read_text()))
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid not in selected])
        items[:] = [item for item in items if item.nodeid in selected]


def pytest_configure(config):
    if REPORTS in os.environ:
        config.pluginmanager.register(_Recorder(config))


class _Recorder:
    def __init__(self, config):
        self.config = config

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(os.environ[REPORTS], "a") as file:
            file.write(json.dumps(data) + "\n")
