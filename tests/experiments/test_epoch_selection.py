"""Which epoch of a run counts."""

from dbmtl.experiments.epoch_selection import improvements, select


def rows(validation, test):
    both = zip(validation, test, strict=True)
    return [
        {
            "train": {},
            "validation": None if v is None else {"a": {"Acc": v}, "b": {"MAE": 1.0}},
            "test": {"a": {"Acc": t}, "b": {"MAE": t}},
        }
        for v, t in both
    ]


DIRECTIONS = {"a": {"Acc": "up"}, "b": {"MAE": "down"}}


def test_best_epoch_is_chosen_on_validation_and_reported_on_test():
    choice = select([rows([10, 30, 20, 30], [1, 2, 3, 4])], DIRECTIONS)
    best = choice["best validation epoch"]
    assert (best["epoch"], best["delta_p_over_first_epoch"]) == (
        2,
        100.0,
    )  # a: +200 %, b: 0; of equals the first
    assert best["test"] == {"a": {"Acc": 2}, "b": {"MAE": 2}}


def test_without_validation_the_label_says_test():
    choice = select([rows([None] * 3, [1.0, 4.0, 2.0])], DIRECTIONS)
    assert list(choice) == ["best test epoch", "average of the last ten epochs"]
    # a and b cancel: 0, then (300 - 300) / 2 = 0: the first of equals
    assert choice["best test epoch"]["epoch"] == 1
    assert choice["average of the last ten epochs"]["validation"] == {}


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


def test_a_metric_that_starts_at_zero_is_left_out_of_the_choice():
    given = rows([0.0, 50.0, 10.0], [1.0, 2.0, 3.0])
    given[2]["validation"]["b"]["MAE"] = 0.5
    assert improvements(given, DIRECTIONS) == [0.0, 0.0, 50.0]
    for row in given:
        row["validation"]["b"]["MAE"] = 0.0
    assert improvements(given, DIRECTIONS) == [0.0, 0.0, 0.0]
