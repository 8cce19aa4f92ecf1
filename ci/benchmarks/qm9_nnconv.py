#!/usr/bin/env python3
"""Speed and memory of QM9's network: torch-geometric's NNConv against the dense form, in one run.

    python ci/benchmarks/qm9_nnconv.py [--repetitions 7] [--threads 2] [--out figures/benchmarks]

Forward + backward of one batch, the two forms taking turns; medians and their ratio. Peak memory of
each in a process of its own, above what the process held before. Then the cost of eleven task
gradients by eleven backward passes, in units of one forward + backward. Writes qm9_nnconv.json and
qm9_nnconv.md.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from dbmtl.data.qm9 import TASKS, load_sample
from dbmtl.models.qm9 import QM9Network, dense_batch, graph_batch

FORMS = ("reference", "dense")


def setup(form, size, rows=16):
    """Network, batch and targets; the weights are those of one state dictionary."""
    molecules = load_sample().molecules
    index = torch.randperm(len(molecules), generator=torch.Generator().manual_seed(0))[:size]
    torch.manual_seed(0)
    names = [task.name for task in TASKS]
    weights = QM9Network(names).state_dict()
    network = QM9Network(names, reference=form == "reference")
    network.load_state_dict(weights)
    if form == "reference":
        batch = graph_batch(molecules, index)
    else:
        batch = dense_batch(molecules, index, rows=rows)
    target = torch.randn(size, len(TASKS), generator=torch.Generator().manual_seed(1))
    return network, batch, target


def task_losses(network, batch, target):
    return [(p - target[:, t]).square().mean() for t, p in enumerate(network(batch).values())]


def forward_backward(network, batch, target):
    network.zero_grad()
    sum(task_losses(network, batch, target)).backward()


def eleven_gradients(network, batch, target):
    losses = task_losses(network, batch, target)
    weights = list(network.trunk.parameters())
    for t, loss in enumerate(losses):
        torch.autograd.grad(loss, weights, retain_graph=t < len(losses) - 1)


def seconds(work, *arguments):
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def peak_mib(form, size):
    """What one forward + backward adds to a fresh process's peak, in MiB."""
    network, batch, target = setup(form, size)
    forward_backward(*setup(form, 2))  # libraries and threads are loaded before the measurement
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    forward_backward(network, batch, target)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def peak_of_a_process(form, size, threads):
    """`peak_mib` in a process of its own."""
    command = [sys.executable, __file__, "--peak", form, "--size", str(size)]
    command += ["--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(size, repetitions, threads):
    # memory first: on Linux a new process inherits the peak of the one that starts it
    memory = {form: peak_of_a_process(form, size, threads) for form in FORMS}
    prepared = {form: setup(form, size) for form in FORMS}
    times = {form: [] for form in (*FORMS, "eleven")}
    outputs = [torch.stack(task_losses(*prepared[form])) for form in FORMS]
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-6)
    for form in FORMS:
        forward_backward(*prepared[form])
    for _ in range(repetitions):
        for form in FORMS:
            times[form].append(seconds(forward_backward, *prepared[form]))
        times["eleven"].append(seconds(eleven_gradients, *prepared["dense"]))
    median = {form: statistics.median(values) for form, values in times.items()}
    graph = prepared["reference"][1]
    return {
        "machine": f"{threads} CPU cores",
        "torch": torch.__version__,
        "repetitions": repetitions,
        "molecules": size,
        "atoms": len(graph.x),
        "edges": graph.edge_index.shape[1],
        "shared parameters": sum(p.numel() for p in prepared["dense"][0].trunk.parameters()),
        "seconds": {k: round(v, 4) for k, v in median.items()},
        "seconds of each repetition": {k: [round(x, 4) for x in v] for k, v in times.items()},
        "peak MiB": {k: round(v, 1) for k, v in memory.items()},
        "times faster": round(median["reference"] / median["dense"], 2),
        "share of memory": round(memory["dense"] / memory["reference"], 4),
        "eleven gradients / (forward + backward)": round(median["eleven"] / median["dense"], 2),
    }


def markdown(m):
    seconds = m["seconds"]
    memory = m["peak MiB"]
    rows = [
        ("torch-geometric's NNConv", seconds["reference"], 1.0, memory["reference"]),
        ("dense form", seconds["dense"], m["times faster"], memory["dense"]),
    ]
    table = "\n".join(f"| {name} | {s:.3f} | {r:.1f} | {mib:.0f} |" for name, s, r, mib in rows)
    return f"""# QM9: NNConv and its dense form

Forward + backward of {m["molecules"]} molecules ({m["atoms"]:,} atoms, {m["edges"]:,} edges, \
{m["shared parameters"]:,}
shared parameters), float32, {m["machine"]}, torch {m["torch"]}; \
median of {m["repetitions"]} interleaved repetitions.
Written by `ci/benchmarks/qm9_nnconv.py`.

| form | seconds | times faster | peak memory, MiB |
|---|---|---|---|
{table}

Eleven task gradients of the dense form, one backward pass each: {seconds["eleven"]:.2f} s,
{m["eleven gradients / (forward + backward)"]:.1f} times forward + backward.
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=int, default=120, help="molecules of the batch")
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures" / "benchmarks"
    )
    parser.add_argument("--peak", choices=FORMS, help="print the peak memory of one form and stop")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        return print(peak_mib(options.peak, options.size))
    result = measure(options.size, options.repetitions, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "qm9_nnconv.json").write_text(json.dumps(result, indent=1) + os.linesep)
    (options.out / "qm9_nnconv.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
