#!/usr/bin/env python3
"""What a training step of every method costs: forward, backward, balancing and optimizer.

    python ci/benchmarks/method_cost.py [--benchmark nyuv2] [--scale generated] [--rounds 15]
                                        [--device cpu]

All methods of the registry train the same network on the same generated samples, one step a round
each, in an order drawn anew for each round, so that other work on the machine hits all alike;
"sum(losses).backward()" is the same loop without dbmtl. CPU seconds of the process on one thread,
or synchronized seconds on a CUDA device (never ran there). The first rounds, in which five epochs
and the warm-ups of the methods end, are not counted. What is timed does not depend on the samples:
they are generated at any scale, and the network starts from scratch.
Writes method_cost.json and method_cost.md; the notebook of Figure 7 draws it from the first.
"""

import argparse
import dataclasses
import json
import math
import statistics
from pathlib import Path

import torch

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.loop import Loop
from dbmtl.experiments.records import environment
from dbmtl.profile import StepCost, cost_rounds, numbers_kept, step_clock
from dbmtl.registry import method_names

PLAIN = "sum(losses).backward()"
PARTS = StepCost._fields[:4]


def timed_scale(scale, epoch_steps=2):
    """The scale with as many generated samples as an epoch of two steps needs.

    One batch more: a benchmark for pixels cuts its validation part from the training part.
    """
    stand_in = {"source": "generated"}
    if "weights" in scale.extra:
        stand_in["weights"] = "none"
    return dataclasses.replace(
        scale,
        train_size=(epoch_steps + 1) * scale.batch_size,
        eval_size=scale.batch_size,
        extra=scale.extra | stand_in,
    )


def loop_maker(benchmark, data, scale, method, device, loops):
    """A function that makes the loop of a method and keeps it in `loops`."""

    def plain(losses, **_):
        with torch.enable_grad():
            sum(losses.values()).backward()

    def make():
        name = "EW" if method == PLAIN else method
        loop = Loop(benchmark, data, benchmark.tasks, name, 0, scale, device)
        if method == PLAIN:
            loop.balancer.backward = plain
        loops[method] = loop
        return loop

    return make


def counts(loop):
    """Learned numbers, floats of the balancer's state, and what the optimizer keeps for the
    learned ones."""
    learned = list(loop.balancer.parameters())
    moments = 0
    for p in learned:
        state = loop.optimizer.state.get(p, {})
        moments += sum(value.numel() for value in state.values() if torch.is_tensor(value))
    return {
        "learned": sum(p.numel() for p in learned),
        "kept": numbers_kept(loop.balancer),
        "kept by the optimizer": moments,
    }


def learning_of_igb(loop, clock):
    """Milliseconds a step of what IGBv2's agent does once in many steps, which no median shows."""
    transform = loop.balancer.transform
    start = clock()
    transform._learn()
    return round(1000 * (clock() - start) / transform.timetable.update_every, 3)


def sizes(model):
    """How many numbers are shared, how many belong to heads, and the tensors of the shared ones."""
    total = sum(p.numel() for p in model.parameters())
    shared = sum(p.numel() for p in model.trunk.parameters())
    tensors = len(list(model.trunk.parameters()))
    return {"shared": shared, "heads": total - shared, "shared tensors": tensors}


def milliseconds(costs):
    """{part: milliseconds of each round}."""
    return {part: [round(1000 * getattr(cost, part), 2) for cost in costs] for part in PARTS}


def measure(benchmark, scale_name, methods, rounds, warm_up, device, seed=0):
    benchmark = get_benchmark(benchmark)
    scale = timed_scale(benchmark.scale(scale_name))
    data = benchmark.load(scale, device, seed)
    clock = step_clock(device)
    loops = {}
    makers = {
        method: loop_maker(benchmark, data, scale, method, device, loops) for method in methods
    }
    # for each method its costs in each round, or a text that says why there are none
    outcomes = cost_rounds(makers, rounds, warm_up, clock, seed)
    failed = {method: text for method, text in outcomes.items() if isinstance(text, str)}
    costs = {method: rows for method, rows in outcomes.items() if method not in failed}
    passes = {}
    for method, rows in costs.items():
        passes[method] = round(statistics.median(cost.passes for cost in rows))
    model = next(iter(loops.values())).model
    result = {
        "benchmark": benchmark.name,
        "scale": scale_name,
        "data": data.note,
        "tasks": len(benchmark.tasks),
        "batch": scale.batch_size,
        "width": scale.width,
        "options": scale.extra,
        "parameters": sizes(model),
        "network": type(model).__name__,
        "clock": "CPU ms" if clock is step_clock() else "synchronized ms",
        "rounds": rounds,
        "warm_up": warm_up,
        **environment(device),
        "ms": {method: milliseconds(rows) for method, rows in costs.items()},
        "passes": passes,
        "counts": {method: counts(loops[method]) for method in costs},
        "failed": failed,
    }
    if "IGBv2" in costs:
        result["IGBv2 learns, ms a step"] = learning_of_igb(loops["IGBv2"], clock)
    return result


def medians(costs):
    """Median of every part, and their sum, in ms."""
    of_parts = {part: statistics.median(values) for part, values in costs.items()}
    return of_parts | {"total": math.fsum(of_parts.values())}


def markdown(result):
    costs = {method: medians(ms) for method, ms in result["ms"].items()}
    one = costs["EW"]["total"] if "EW" in costs else math.nan
    lines = []
    for method, ms in costs.items():
        numbers = result["counts"][method]
        cells = [
            method,
            result["passes"][method],
            *(f"{ms[part]:.1f}" for part in (*PARTS, "total")),
            f"{ms['total'] / one:.2f}",
            numbers["learned"],
            f"{numbers['kept']:,}",
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += [f"| {method} | failed: {reason} |" for method, reason in result["failed"].items()]
    rows = "\n".join(lines)
    size = "x".join(map(str, result["options"].get("size", [])))
    parameters = result["parameters"]
    return f"""# The cost of a step of every method

{result["network"]} of {result["benchmark"]}, width {result["width"]}, {result["data"]}, \
batch {result["batch"]}
{"of " + size if size else ""}, T = {result["tasks"]}, \
{parameters["shared"]:,} shared parameters in
{parameters["shared tensors"]} tensors; {result["device"]}, threads: {result["threads"]}, torch
{result["versions"]["torch"]}; medians of {result["rounds"]} interleaved rounds, \
{result["clock"]}. Compare ratios, not
milliseconds: other programs ran on the machine. `kept` is how many floats a checkpoint of the \
balancer holds.

| method | passes | {" | ".join(PARTS)} | total | times EW | learned | kept |
|{"---|" * (len(PARTS) + 6)}
{rows}

What IGBv2's agent learns once in 50 steps is in no median: \
{result.get("IGBv2 learns, ms a step", "-")} ms a step.

Written by `ci/benchmarks/method_cost.py`.
"""


def dumped(result):
    """JSON with a line for each list of numbers."""
    before, *lists = json.dumps(result, indent=1).split("[")
    text = before
    for part in lists:
        numbers, bracket, rest = part.partition("]")
        text += "[" + " ".join(numbers.split()) + bracket + rest
    return text + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--benchmark", default="nyuv2")
    parser.add_argument("--scale", default="generated")
    parser.add_argument("--methods", help="separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warm-up", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures" / "benchmarks"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = options.methods.split(",") if options.methods else [PLAIN, *method_names()]
    result = measure(
        options.benchmark, options.scale, methods, options.rounds, options.warm_up, options.device
    )
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "method_cost.json").write_text(dumped(result))
    (options.out / "method_cost.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
