"""Pages of made-up records of real benchmarks."""

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.method_labels import parse_method
from dbmtl.experiments.records import configuration
from dbmtl.report.results_page import open_page

FLOOR = "at its floor"  # in the place of a gain: see `at_floor` of `record`


def record(benchmark, label, seed, gain, scale="cpu", at_floor=()):
    """Every metric of STL is 10; a gain of g percent moves it by g/10 to its better side.

    A gain of `FLOOR` leaves the tasks `at_floor` at their floor, and the others where STL is.
    """
    method, hyper = parse_method(label)
    directions = get_benchmark(benchmark).directions
    poor = at_floor if gain == FLOOR else ()
    better = 0.0 if gain == FLOOR else gain / 10
    signs = {
        task: {metric: 1 if way == "up" else -1 for metric, way in ways.items()}
        for task, ways in directions.items()
    }
    floors = {t: {m: 10 - 5 * sign for m, sign in ms.items()} for t, ms in signs.items()}
    test = {
        t: floors[t] if t in poor else {m: 10 + sign * better for m, sign in ms.items()}
        for t, ms in signs.items()
    }
    tasks = list(directions)
    look = {"steps": [0, 26]} | {
        kind: {task: [1.0 + place, 2.0 + place] for place, task in enumerate(tasks)}
        for kind in ("losses", "norms", "slopes", "weights")
    }
    return {
        "config": configuration(benchmark, method, seed, scale, hyper),
        "state": "finished",
        "step": 52,
        "steps": 52,
        "data": {"hash": "x", "note": "made up"},
        "device": "cpu: test",
        "directions": directions,
        "floors": {"test": floors},
        "notes": [],
        "monitors": look,
        "selected": {
            "best validation epoch": {"test": test},
            "average of the last ten epochs": {"test": test},
        },
        "curves": {"epochs": [1, 2], "train": {task: [2.0, 1.0 + seed] for task in tasks}},
    }


def page(benchmark, gains, paper=None, at_floor=(), notebook="15_paper/07_figure1_log"):
    """A page of one run a seed, from {label: gains of the seeds}; STL gains nothing."""
    seeds = max(len(runs) for runs in gains.values())
    runs = [
        record(benchmark, label, seed, gain, at_floor=at_floor)
        for label, values in ({"STL": [0] * seeds} | gains).items()
        for seed, gain in enumerate(values)
    ]
    return open_page(notebook, benchmark, runs, paper, only_made=True, methods=list(gains))
