"""Makes pytest-benchmark's tables of races: see README.md in this folder."""

from __future__ import annotations

import platform
from dataclasses import replace

import pytest
import torch

import factorizer_kernels as fk
from factorizer.segmentation.measure import versions

from .harness import DEVICE, EFFORTS, Measurement, race, ratio
from .report import number_lines, summary_lines


def pytest_addoption(parser):
    parser.getgroup("benchmark").addoption(
        "--size", choices=tuple(EFFORTS), default="default", help="how large, and how long (default: default)"
    )


def pytest_configure(config):
    options = config.option
    options.benchmark_columns = options.benchmark_columns or ["median", "iqr", "min", "rounds"]


def pytest_collection_modifyitems(items):
    """The numbers come first: their bounds are of outputs in fresh memory, which a process that has run
    networks no longer gets from its allocator."""
    items.sort(key=lambda item: "test_numbers" not in item.nodeid)


class _Tape:
    """A clock that only recorded samples move: pytest-benchmark reads off exactly what the race saw."""

    now = 0.0

    def __call__(self):
        return self.now

    def play(self, samples):
        self.now += next(samples)


_TAPE = _Tape()


def pytest_generate_tests(metafunc):
    """A benchmark for every contender of every case in the module's ``cases_of(size)``."""
    if "replay" in metafunc.fixturenames:
        params = [
            pytest.param(
                case.group,
                contender.name,
                id=f"{case.group}, {contender.name}",
                marks=pytest.mark.benchmark(group=case.group, timer=_TAPE),
            )
            for case in metafunc.module.cases_of(metafunc.config.getoption("size"))
            for contender in case.contenders
        ]
        metafunc.parametrize(("group", "contender"), params)


@pytest.fixture(scope="session")
def _races():
    return {}


@pytest.fixture
def replay(request, benchmark, group, contender, _races):
    """Hands one contender's samples to pytest-benchmark; the first of a group runs those selected of it."""

    def play():
        size = request.config.getoption("size")
        case = next(case for case in request.module.cases_of(size) if case.group == group)
        if group not in _races:
            params = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
            selected = {p["contender"] for p in params if p.get("group") == group}
            case = replace(case, contenders=tuple(c for c in case.contenders if c.name in selected))
            _races[group] = race(case, EFFORTS[size])
        result = _races[group][contender]
        benchmark.name = contender
        if isinstance(result, BaseException):
            raise result
        benchmark.extra_info |= {"family": case.family, "label": case.label, **result.info}
        for yardstick in ("relu", "ours"):
            if isinstance(other := _races[group].get(yardstick), Measurement):
                benchmark.extra_info[f"x_{yardstick}"] = ratio(result, other)
        benchmark.pedantic(_TAPE.play, (iter(result.seconds),), rounds=len(result.seconds))

    return play


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info |= {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor(machine_info),
        "threads": torch.get_num_threads(),
        "size": config.getoption("size"),
        "backends": {b.name: b.reason for b in fk.backends() if b.available},
        "versions": versions("scikit-learn", "torchnmf"),
    }


def _processor(machine_info):
    return machine_info.get("cpu", {}).get("brand_raw") or platform.processor() or platform.machine()


@pytest.hookimpl(trylast=True)  # below the tables
def pytest_terminal_summary(terminalreporter, config):
    session = getattr(config, "_benchmarksession", None)
    records = [b.as_dict(include_data=False, flat=False) for b in session.benchmarks] if session else []
    if records:
        terminalreporter.section("ratios of medians")
        for line in [*summary_lines(records), *number_lines(records)]:
            terminalreporter.write_line(line)
