"""Numbers, whole numbers and names that are checked."""

import math

import numpy
import pytest
import torch

from dbmtl.core.checks import (
    check_choice,
    check_number,
    check_whole,
    nearest_name,
    unknown_name,
)


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "words"),
    [
        ({}, [-1e9, 0, 2.5], [math.nan, math.inf, -math.inf], "a finite number, got"),
        ({"at_least": 0}, [0, 1], [-1e-9], "a finite number at least 0, got"),
        ({"above": 0}, [1e-9], [0, -1], "a finite number above 0, got"),
        ({"at_most": 1}, [1, -3], [1.5], "a finite number at most 1, got"),
        ({"below": 1}, [0.5], [1, 2], "a finite number below 1, got"),
        ({"at_least": 0, "below": 1}, [0, 0.9], [-1, 1], "at least 0 and below 1, got"),
    ],
)
def test_a_number_may_reach_some_bounds_and_not_others(bounds, good, bad, words):
    for value in good:
        found = check_number("x", value, **bounds)
        assert found == value and type(found) is float
    for value in bad:
        with pytest.raises(ValueError, match=f"x must be .*{words} "):
            check_number("x", value, **bounds)


@pytest.mark.parametrize("value", [True, "1", None, [1], 1j, torch.ones(1)])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(ValueError, match="x must be a finite number"):
        check_number("x", value)
    with pytest.raises(ValueError, match="n must be a whole number from 0"):
        check_whole("n", value, at_least=0)


def test_whole_numbers_are_ints_from_their_least():
    assert check_whole("n", 1) == 1 and check_whole("n", 0, at_least=0) == 0
    assert check_number("x", numpy.float32(0.5)) == 0.5
    for value, least in ((0, 1), (-1, 0), (1.0, 1)):
        with pytest.raises(ValueError, match=f"n must be a whole number from {least}, got {value}"):
            check_whole("n", value, at_least=least)


def test_the_nearest_name_ignores_case_and_may_be_none():
    assert nearest_name("mgad", ["EW", "MGDA"]) == "MGDA"
    assert nearest_name("xyzzy", ["EW", "MGDA"]) is None
    assert nearest_name("ew", ["EW", "Ew"]) == "EW"  # of names that differ in case, the first
    assert nearest_name(7, [70, "EW"]) == "70"


def test_errors_of_names_list_what_there_is():
    error = unknown_name("method", "mgad", {"MGDA": 1, "EW": 2})
    assert isinstance(error, ValueError)
    assert str(error) == "unknown method 'mgad': did you mean 'MGDA'? known: EW, MGDA"
    assert str(unknown_name("seed", 7, [1])) == "unknown seed 7: known: 1"
    assert check_choice("grads", "all", ["all", "last"]) == "all"
    with pytest.raises(ValueError, match=r"must be one of \['all', .*got 'al'; did you mean 'all'"):
        check_choice("grads", "al", ["all", "last"])
