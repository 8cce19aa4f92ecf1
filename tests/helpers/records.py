"""Small run records, made up, and the committed ones that a page shows."""

import json
import lzma

from dbmtl.experiments.epoch_selection import LAST_TEN
from dbmtl.experiments.questions import records_of, run_question
from dbmtl.experiments.records import configuration

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


def record_texts(folder):
    """The JSON text of every record below a folder, single files and archives."""
    texts = [path.read_text() for path in sorted(folder.rglob("*.json"))]
    for path in sorted(folder.rglob("*.jsonl.xz")):
        texts += lzma.decompress(path.read_bytes()).decode().splitlines()
    return texts


def committed_runs(folder, benchmark, scale):
    """{method: {seed: record}} of finished runs without settings, of the newest protocol that has a
    baseline."""
    records = [json.loads(text) for text in record_texts(folder)]
    records = [
        record
        for record in records
        if (record["config"]["benchmark"], record["config"]["scale"]["name"]) == (benchmark, scale)
    ]
    configs = [record["config"] for record in records]
    newest = max((c["protocol"] for c in configs if c["method"] == "STL"), default=1)
    runs = {}
    for record, config in zip(records, configs, strict=True):
        today = configuration(benchmark, config["method"], config["seed"], scale)
        if record["state"] == "finished" and config == today | {"protocol": newest}:
            runs.setdefault(config["method"], {})[config["seed"]] = record
    return runs


def records_of_toy_question(question, folder):
    """The runs of a question about the toy problem, none of whose tasks is at its floor."""
    run_question(question, folder, progress=False)
    records = records_of(question, folder)
    for record in records:  # seconds of training leave tasks at their floor, so it is raised
        for metrics in record["floors"]["test"].values():
            metrics["MAE"] *= 1000
    return records


def last_ten(records, method, seed):
    """The test metrics of a run by task, averaged over its last ten epochs."""
    for record in records:
        if (record["config"]["method"], record["config"]["seed"]) == (method, seed):
            return record["selected"][LAST_TEN]["test"]
    raise LookupError(f"{method}, seed {seed}")
