"""Small run records, made up."""

DIRECTIONS = {"a": {"MAE": "down"}, "b": {"Acc": "up"}}


def small_record(method, seed, selected, floors, state="finished", scale="cpu", **changes):
    """A run of two tasks, an error and an accuracy, with these selections and (a, b) floors."""
    config = {
        "protocol": 1,
        "benchmark": "toy",
        "method": method,
        "hyper": {},
        "seed": seed,
        "scale": {
            "name": scale,
            "epochs": 3,
            "batch_size": 4,
            "train_size": 0,
            "width": 8,
            "learning_rate": 1e-3,
        },
    }
    return {
        "config": config,
        "state": state,
        "reason": "the loss of a is not finite" if state == "diverged" else "",
        "step": 5,
        "steps": 30,
        "data": {"hash": "x", "note": "generated"},
        "device": "cpu: test",
        "directions": DIRECTIONS,
        "floors": {"test": {"a": {"MAE": floors[0]}, "b": {"Acc": floors[1]}}},
        "selected": selected if state == "finished" else {},
        "curves": {},
        "monitors": {},
    } | changes
