"""Seeds, `--fast`, and what the markers cuda, data, full and slow mean."""

import os
import random
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave out the tests marked full")
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def is_full(item):
    """Is this one of the tests that `--fast` leaves out?

    Those that take more than a second or two or start processes are marked `full`
    (`pytest --durations=60` tells), or have a fixture that does; and each method is tested without
    the log alone.
    """
    starts_processes = {"pools", "warm_python"} & set(item.fixturenames)
    return item.get_closest_marker("full") or starts_processes or "+log" in item.name


def missing(item):
    """What this test needs and does not have, for each of its markers."""
    if item.get_closest_marker("slow") and not item.config.getoption("--runslow"):
        yield "slow: needs --runslow"
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        yield "needs CUDA"
    if item.get_closest_marker("data") and not os.environ.get("DBMTL_DATA"):
        yield "needs DBMTL_DATA"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(config, items):
    for item in items:
        if is_full(item):
            item.add_marker("full")
        for reason in missing(item):
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--fast"):
        full = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where DBMTL_DATA is set, a skipped test of real data has failed; unless another marker
    skipped it."""
    report = yield
    has_data = item.get_closest_marker("data") and not any(missing(item))
    if has_data and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"DBMTL_DATA is set, yet: {reason}"
    return report


@pytest.fixture(scope="session")
def warm_python():
    """The beginning of a command line, as `[sys.executable]`: see tests/helpers/warm_python.py.

    What it runs writes pictures where a notebook shows them, has one thread and finds dbmtl.
    """
    program = str(ROOT / "tests" / "helpers" / "warm_python.py")
    environment = os.environ | {
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # else read from a kernel's own
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    with tempfile.TemporaryDirectory(prefix="dbmtl") as folder:  # a socket's path must be short
        socket = f"{folder}/socket"
        server = subprocess.Popen(
            [sys.executable, program, "serve", socket],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert server.stdout.readline() == "ready\n"
        yield [sys.executable, "-S", program, socket]
        os.killpg(server.pid, signal.SIGKILL)  # with what it still runs
        server.communicate()


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
