"""What the ranks tell each other, in numbers by hand and without other processes."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.ranks import (
    Lengths,
    Ranks,
    Shards,
    _check_order,
    _check_values,
    _matched,
    check_alike,
    join_losses,
    kind_of,
    lengths_of,
    numbers_of_part,
)

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


def lengths(*numbers):
    return Lengths(list(numbers), "copy them")


LIKE = {"names": ("a", "b"), "layers": lengths(1.0, NAN), "step": 3}


@pytest.mark.parametrize("names", [None, ("b", "a")])
def test_ranks_may_know_the_names_in_another_order_or_not_yet(names):
    check_alike([LIKE, LIKE | {"names": names}])
    check_alike([LIKE | {"names": names}, LIKE])


@pytest.mark.parametrize(
    "other, message",
    [
        ({"names": ("a", "c")}, "rank 2 is not like rank 0: names"),
        ({"step": 4}, "rank 2 is not like rank 0: step is 4, there 3"),
        (
            {"layers": lengths(1.001, NAN)},
            "the layers of rank 2 are not those of rank 0: copy them",
        ),
        ({"layers": lengths(1.0, 1.0)}, "the layers of rank 2 are not those of rank 0: copy them"),
        ({"layers": lengths(1.0)}, "the layers of rank 2 are not those of rank 0: copy them"),
    ],
)
def test_a_rank_that_is_not_like_the_first_is_named(other, message):
    with pytest.raises(ValueError, match=message):
        check_alike([LIKE, LIKE, LIKE | other])


def test_lengths_may_differ_by_rounding():
    check_alike([LIKE, LIKE | {"layers": lengths(1.00005, NAN)}])


def test_lengths_and_kinds_of_parameters():
    layer = torch.nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 4.0]]))
    layer.weight.requires_grad_(False)
    assert lengths_of([layer.weight]) == [5.0] and lengths_of([]) == []
    assert kind_of(layer.weight) == "float32 [1, 2], frozen"
    assert kind_of(layer.bias.double()) == "float64 [1]"


def heads(*of_tasks):
    """A rank's report: each task reaches one parameter, told by label and length."""
    return {t: [(None, label, "[2]", length)] for t, (label, length) in enumerate(of_tasks)}


def checked(*reports, numbers=None):
    names = ("a", "b", "c")
    numbers = numbers or _matched(list(reports), 0, names)
    _check_values(reports, numbers, names)
    _check_order(reports, numbers, names)
    return numbers


def test_heads_of_the_same_values_are_matched_by_place():
    assert checked(heads((0, 1.0), (1, NAN)), heads((5, 1.00001), (6, NAN))) == [
        {0: 0, 1: 1},
        {5: 0, 6: 1},
    ]


def test_heads_that_were_matched_by_place_and_have_other_values_are_refused():
    with pytest.raises(ValueError, match="the head of task 'b' on rank 1 is not that of rank 0"):
        checked(heads((0, 1.0), (1, 2.0)), heads((0, 1.0), (1, 2.1)))


def test_two_tasks_that_change_places_are_refused():
    """By name the parameters have the same numbers on all ranks."""
    by_name = [{0: 0, 1: 1, 2: 2}] * 2
    here = heads((0, 1.0), (1, 1.0), (2, 1.0))
    with pytest.raises(ValueError, match="the head of task '[ac]' on rank 1 is that of another"):
        checked(here, heads((2, 1.0), (1, 1.0), (0, 1.0)), numbers=by_name)


def test_a_task_may_have_a_head_of_its_own_on_every_rank():
    """Such as one for each domain of the inputs."""
    by_name = [{0: 0, 1: 1, 2: 2}] * 2
    checked(heads((0, 1.0), (1, 1.0)), heads((2, 1.0), (1, 1.0)), numbers=by_name)


@pytest.mark.parametrize("asked, width", [(1, 256), (256, 256), (257, 512)])
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


def test_a_rank_that_cuts_an_average_keeps_its_part_alone():
    """Seven numbers for three ranks; the second keeps three, and lets the others' memory go."""
    mode = Shards(SimpleNamespace(size=3, rank=1))
    whole = torch.arange(7.0)
    part = mode.cut({0: {5: whole}})[0][5]
    assert_close(part, torch.tensor([3.0, 4.0, 5.0]))
    assert part.untyped_storage().nbytes() == 3 * part.element_size()
