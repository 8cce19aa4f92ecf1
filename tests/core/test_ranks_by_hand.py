"""What the ranks tell each other, in numbers by hand and without other processes."""

import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.ranks import Ranks, Shards, check_alike, join_losses, numbers_of_part

NAN = math.nan


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_losses_are_joined_by_their_counts():
    first = numbers_of_part([2, 0, 0], float64(1.0, NAN, NAN), [True, True, False])
    second = numbers_of_part([6, 1, 0], float64(3.0, 5.0, NAN), [True, False, False])
    joined = join_losses(float64(first, second))
    assert_close(joined.losses, float64(2.5, 5.0, 1.0))
    assert_close(joined.counts, float64([2.0, 0.0, 0.0], [6.0, 1.0, 0.0]))
    assert joined.tasks == [0, 1]


def test_a_task_may_be_missing_where_no_rank_says_otherwise():
    nothing = [0.0, 0.0]
    losses = float64(1.0, 1.0)
    parts = [numbers_of_part(nothing, losses, excused) for excused in ([1, 1], [0, 1])]
    assert join_losses(float64(*parts)).excused == [False, True]


def test_all_tasks_are_told_in_one_word():
    assert join_losses(float64(numbers_of_part([1, 2], float64(3.0, 4.0), [0, 0]))).tasks is None


LIKE = {"names": ("a", "b"), "lengths": [1.0, NAN], "step": 3}


@pytest.mark.parametrize("names", [None, ("b", "a")])
def test_ranks_may_know_the_names_in_another_order_or_not_yet(names):
    check_alike([LIKE, LIKE | {"names": names}])
    check_alike([LIKE | {"names": names}, LIKE])


@pytest.mark.parametrize(
    "other, message",
    [
        ({"names": ("a", "c")}, "rank 2 is not like rank 0: names"),
        ({"step": 4}, "rank 2 is not like rank 0: step is 4, there 3"),
        ({"lengths": [1.001, NAN]}, "the shared parameters of rank 2 are not those of rank 0"),
        ({"lengths": [1.0, 1.0]}, "the shared parameters of rank 2 are not those of rank 0"),
    ],
)
def test_a_rank_that_is_not_like_the_first_is_named(other, message):
    with pytest.raises(ValueError, match=message):
        check_alike([LIKE, LIKE, LIKE | other])


def test_lengths_may_differ_by_rounding():
    check_alike([LIKE, LIKE | {"lengths": [1.00005, NAN]}])


@pytest.mark.parametrize("asked, width", [(1, 64), (64, 64), (65, 128)])
def test_an_exchange_has_room_for_what_was_asked(asked, width):
    assert Ranks(False, width=asked).width == width


def test_one_process_needs_nobody():
    ranks = Ranks(False)
    assert (ranks.size, ranks.rank) == (1, 0)
    assert ranks.agreed("a call", lambda: 7, lambda result: [result]) == (7, None)
    assert ranks.any(True) is True
    assert ranks.on_first(lambda: 5) == 5


def test_whole_averages_fit_one_rank_and_shards_of_others_do_not():
    mode = Shards(Ranks(False))
    mode.check()
    mode.cut_for = 2
    with pytest.raises(RuntimeError, match="a shard for 2 ranks, and there are 1 now"):
        mode.check()
