"""Pools of processes for the tests of several ranks."""

import pytest
from helpers.ranks import Processes


@pytest.fixture(scope="module")
def pools():
    started = {}

    def of_size(size):
        if size not in started:
            started[size] = Processes(size)
        return started[size]

    yield of_size
    for pool in started.values():
        pool.stop()
