"""Pages of made-up records of real benchmarks."""

from dbmtl.report.results_page import open_page
from dbmtl.report.runs import invented_run

FLOOR = "at its floor"  # in the place of a gain: see `at_floor` of `record`


def put_at_floor(run, tasks):
    """The run with these tasks where a constant prediction is."""
    floors = {task: run["floors"]["test"][task] for task in tasks}
    selected = {
        rule: {"test": selection["test"] | floors} for rule, selection in run["selected"].items()
    }
    return run | {"selected": selected}


def record(benchmark, label, seed, gain, scale="cpu", at_floor=()):
    """Every metric of STL is 10; a gain of g percent moves it by g/10 to its better side.

    A gain of `FLOOR` leaves the tasks `at_floor` at their floor, and the others where STL is.
    """
    is_at_floor = gain == FLOOR
    run = invented_run(benchmark, label, seed, 0.0 if is_at_floor else gain, scale)
    if is_at_floor:
        run = put_at_floor(run, at_floor)
    tasks = list(run["directions"])
    look = {"steps": [0, 26]} | {
        kind: {task: [1.0 + place, 2.0 + place] for place, task in enumerate(tasks)}
        for kind in ("losses", "norms", "slopes", "weights")
    }
    return run | {
        "step": 52,
        "steps": 52,
        "data": {"hash": "x", "note": "made up"},
        "device": "cpu: test",
        "notes": [],
        "monitors": look,
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
