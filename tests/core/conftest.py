"""Pools of processes for the tests of several ranks."""

import pytest
from helpers.ranks import Processes


@pytest.fixture(scope="module")
def pools():
    started = {}

    def of_size(size):
        if size in started and started[size].is_broken:  # the next test is not to hang as well
            started.pop(size).stop()
        if size not in started:
            started[size] = Processes(size)
        return started[size]

    yield of_size
    for pool in started.values():
        pool.stop()
