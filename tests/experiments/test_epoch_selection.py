"""Which epoch of a run counts."""

import pytest

from dbmtl.experiments.epoch_selection import best_epoch, improvements, select


def rows(validation, test):
    both = zip(validation, test, strict=True)
    return [
        {
            "train": {},
            "validation": {"a": {"Acc": v}, "b": {"MAE": 1.0}},
            "test": {"a": {"Acc": t}, "b": {"MAE": t}},
        }
        for v, t in both
    ]


DIRECTIONS = {"a": {"Acc": "up"}, "b": {"MAE": "down"}}


def test_best_epoch_is_chosen_on_validation_and_reported_on_test():
    choice = select([rows([10, 30, 20, 30], [1, 2, 3, 4])], DIRECTIONS)
    best = choice["best validation epoch"]
    # a: +200 %, b: 0; of the two equal epochs the later
    assert (best["epoch"], best["delta_p_over_first_epoch"]) == (4, 100.0)
    assert best["test"] == {"a": {"Acc": 4}, "b": {"MAE": 4}}


def test_nothing_is_selected_on_test():
    given = rows([10, 30, 20], [1, 2, 3])
    choice = select([given], DIRECTIONS)
    for row, value in zip(given, [3, 2, 1], strict=True):
        row["test"]["a"]["Acc"] = value
    again = select([given], DIRECTIONS)
    assert list(choice) == ["best validation epoch", "average of the last ten epochs"]
    label = "best validation epoch"
    assert choice[label]["epoch"] == again[label]["epoch"] == 2


@pytest.mark.parametrize(
    ("gains", "position"),
    [
        ([0.0], 0),
        ([0.0, 0.0, 0.0], 2),
        ([0.0, 5.0, 5.0, 4.0], 2),
        ([-1.0, -2.0, -1.0], 2),
        ([0.0, 0.1 + 0.2, 0.3], 2),  # 0.30000000000000004
        ([0.0, 12.34566, 12.34567, 12.34568], 3),  # all three are 12.3457
        ([0.0, 12.3458, 12.3457], 1),
    ],
)
def test_the_later_of_equal_epochs_counts(gains, position):
    assert best_epoch(gains) == position


def test_the_same_accuracies_of_other_tasks_are_a_tie():
    directions = {name: {"Acc": "up"} for name in "abc"}
    values = [(40.0, 40.0, 40.0), (50.3, 83.9, 50.3), (50.3, 50.3, 83.9), (83.9, 50.3, 50.3)]
    given = []
    for value in values:
        metrics = {name: {"Acc": v} for name, v in zip("abc", value, strict=True)}
        given.append({"train": {}, "validation": metrics, "test": metrics})
    assert len(set(improvements(given, directions)[1:])) > 1  # the last bits differ
    assert select([given], directions)["best validation epoch"]["epoch"] == 4


def test_ties_of_single_task_networks_go_to_the_later_epoch_too():
    parts = [
        [{"validation": {n: {"MAE": v}}, "test": {n: {"MAE": 10 * v}}} for v in values]
        for n, values in (("a", [3.0, 1.0, 1.0]), ("b", [3.0, 2.0, 2.5]))
    ]
    best = select(parts, {"a": {"MAE": "down"}, "b": {"MAE": "down"}})["best validation epoch"]
    assert best["epoch"] == {"a": 3, "b": 2}


def test_average_is_of_the_last_ten_epochs():
    choice = select([rows(range(1, 13), range(1, 13))], DIRECTIONS)[
        "average of the last ten epochs"
    ]
    assert choice["epochs"] == 10 and choice["test"]["a"]["Acc"] == sum(range(3, 13)) / 10


def test_stl_networks_choose_their_epochs_one_by_one():
    parts = [
        [{"validation": {n: {"MAE": v}}, "test": {n: {"MAE": 10 * v}}} for v in values]
        for n, values in (("a", [3.0, 1.0, 2.0]), ("b", [3.0, 2.0, 1.0]))
    ]
    best = select(parts, {"a": {"MAE": "down"}, "b": {"MAE": "down"}})["best validation epoch"]
    assert best["epoch"] == {"a": 2, "b": 3} and best["test"] == {
        "a": {"MAE": 10.0},
        "b": {"MAE": 10.0},
    }


@pytest.mark.parametrize("first", [0.0, -5.0])
def test_a_metric_that_does_not_start_above_zero_is_left_out_of_the_choice(first):
    given = rows([first, 50.0, 10.0], [1.0, 2.0, 3.0])
    given[2]["validation"]["b"]["MAE"] = 0.5
    assert improvements(given, DIRECTIONS) == [0.0, 0.0, 50.0]
    for row in given:
        row["validation"]["b"]["MAE"] = 0.0
    assert improvements(given, DIRECTIONS) == [0.0, 0.0, 0.0]


def test_a_task_keeps_its_other_metrics_where_one_starts_at_zero():
    directions = {"a": {"IoU": "up", "Acc": "up"}, "b": {"MAE": "down"}}
    epochs = [
        {"validation": {"a": {"IoU": 0.0, "Acc": 10.0}, "b": {"MAE": 2.0}}},
        {"validation": {"a": {"IoU": 0.5, "Acc": 15.0}, "b": {"MAE": 1.0}}},
    ]
    # a: +50 % by the accuracy alone; b: +50 %
    assert improvements(epochs, directions) == [0.0, 50.0]
