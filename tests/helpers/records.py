"""Small run records, made up."""

DIRECTIONS = {"a": {"MAE": "down"}, "b": {"Acc": "up"}}


def record(method, seed, best, last, state="finished", scale="cpu"):
    """A run whose tasks a and b have these errors and accuracies, (a, b), by each rule."""

    def test(values):
        return {"test": {"a": {"MAE": values[0]}, "b": {"Acc": values[1]}}}

    config = {
        "protocol": 1,
        "benchmark": "toy",
        "method": method,
        "hyper": {},
        "seed": seed,
        "scale": {"name": scale, "epochs": 3, "batch_size": 4, "train_size": 0, "width": 8},
    }
    selections = {}
    if state == "finished":
        selections = {
            "best validation epoch": {"epoch": 1} | test(best),
            "average of the last ten epochs": {"epochs": 3} | test(last),
        }
    return {
        "config": config,
        "state": state,
        "reason": "",
        "step": 5,
        "steps": 30,
        "data": {"hash": "x", "note": ""},
        "device": "cpu: test",
        "directions": DIRECTIONS,
        "floors": {"test": {"a": {"MAE": 9.0}, "b": {"Acc": 1.0}}},
        "selected": selections,
        "curves": {},
        "monitors": {},
    }
