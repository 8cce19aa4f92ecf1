"""Seeds, and what the markers cuda, data and slow mean."""

import os
import random

import numpy
import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    reasons = {}
    if not config.getoption("--runslow"):
        reasons["slow"] = "slow: needs --runslow"
    if not torch.cuda.is_available():
        reasons["cuda"] = "needs CUDA"
    if not os.environ.get("DBMTL_DATA"):
        reasons["data"] = "needs DBMTL_DATA"
    for item in items:
        for marker, reason in reasons.items():
            if marker in item.keywords:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where DBMTL_DATA is set, a skipped test of real data has failed (unless it is skipped for another marker)."""
    report = yield
    excused = "slow" in item.keywords and not item.config.getoption("--runslow")
    excused = excused or "cuda" in item.keywords and not torch.cuda.is_available()
    if (
        report.skipped
        and not hasattr(report, "wasxfail")
        and "data" in item.keywords
        and not excused
    ):
        if os.environ.get("DBMTL_DATA"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
            report.outcome, report.longrepr = "failed", f"DBMTL_DATA is set, yet: {reason}"
    return report


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
