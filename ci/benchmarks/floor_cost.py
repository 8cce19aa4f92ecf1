#!/usr/bin/env python3
"""How far an exact step of DB-MTL is from its floor, and how much of that the memory explains.

    python ci/benchmarks/floor_cost.py [--repetitions 9] [--threads 1] [--out figures/benchmarks]

The floor is T bare backward passes, a task each, to the trunk and to the task's own head, as in
balancer_cost.py. Only what comes behind the forward pass is timed, in processor time of the thread;
the contenders take turns.

What lies between a step and its floor is memory traffic. The bytes that go into and out of the
calls of the average, of the norms and of the weighted sum are counted, on the rows of the network.
Most calls find some of them in the cache. What has to come from the memory, where a row is larger
than the cache, is less: the average reads a gradient and the old average and writes the new one,
the sum reads that once more and writes the direction. The copy bandwidth of the machine is measured
between the repetitions, by `torch.add` of two large tensors into a third; these bytes at the speed
of a copy are what no implementation can save, and give the least ratio that this machine allows.

Each network is measured in a process of its own. Pages are those that a step asks the system for.
Load is what else ran on the machine, from the system's average. Writes floor_cost.json,
floor_cost.md, and floor_cost_in_words.txt for README.
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
from balancer_cost import mlp, table
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbmtl import make_balancer
from dbmtl.core.ema import EMA
from dbmtl.core.gramian import combine
from dbmtl.models.resnet import resnet18_trunk

TASKS = (3, 11)
STEPS = {  # contender -> method and its settings
    "EW": ("EW", {}),
    "DB-MTL": ("DB-MTL", {}),
    "DB-MTL, in place": ("DB-MTL", {"in_place": True}),
    "DB-MTL, no average": ("DB-MTL", {"beta": 0}),
}
STAGES = ("average and norms", "weighted sum")


def wide(tasks):
    trunk, heads, _ = mlp(tasks, width=1536)
    return trunk, heads, torch.randn(64, 256)


class Pooled(nn.Module):
    """ResNet-18, its 512 channels averaged over the picture."""

    def __init__(self):
        super().__init__()
        self.trunk = resnet18_trunk()

    def forward(self, x):
        return self.trunk(x).mean((2, 3))


def resnet18(tasks):
    heads = nn.ModuleList(nn.Linear(512, 10) for _ in range(tasks))
    return Pooled(), heads, torch.randn(4, 3, 224, 224)


class Encoder(nn.Module):
    """Four layers of width 256, averaged over the tokens."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(256, 8, 1024, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 4)

    def forward(self, x):
        return self.layers(x).mean(1)


def transformer(tasks):
    heads = nn.ModuleList(nn.Linear(256, 10) for _ in range(tasks))
    return Encoder(), heads, torch.randn(8, 64, 256)


NETWORKS = {  # name -> what makes it, and the batch in words
    "wide MLP": (wide, "64 samples"),
    "ResNet-18": (resnet18, "4 images of 224 x 224"),
    "transformer": (transformer, "8 sequences of 64 tokens"),
}


class Step:
    """A network and one contender; `losses()` runs forward, `work(losses)` the rest."""

    def __init__(self, name, network, tasks):
        torch.manual_seed(0)
        make, _ = NETWORKS[network]
        self.trunk, self.heads, self.x = make(tasks)
        self.shared = list(self.trunk.parameters())
        self.work = self.floor
        if name in STEPS:
            method, settings = STEPS[name]
            balancer = make_balancer(method, shared=self.trunk, num_tasks=tasks, **settings)
            self.work = balancer.backward

    def losses(self):
        self.trunk.zero_grad()
        self.heads.zero_grad()
        z = self.trunk(self.x)
        return [head(z).square().mean() + 0.1 for head in self.heads]

    def floor(self, losses):
        rows = []
        for t, loss in enumerate(losses):
            inputs = self.shared + list(self.heads[t].parameters())
            gradients = torch.autograd.grad(loss, inputs, retain_graph=t < len(losses) - 1)
            rows.append(gradients[: len(self.shared)])
        return rows


class Bytes(TorchDispatchMode):
    """Counts the bytes of all tensors that go into calls and come out of them."""

    FREE = ("split", "unbind", "slice", "select", "view", "empty")  # that move none

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.__name__.startswith(self.FREE):
            kwargs = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            for tensor in tree_leaves((args, kwargs, result)):
                if isinstance(tensor, torch.Tensor):
                    self.count += tensor.numel() * tensor.element_size()
        return result


class Stages:
    """What DB-MTL does with the rows of a network, a stage at a time."""

    def __init__(self, network, tasks):
        step = Step("floor", network, tasks)
        self.rows = [list(row) for row in step.floor(step.losses())]
        self.positions = list(range(len(self.rows[0])))
        self.ema = EMA()
        self.weights = torch.rand(tasks)
        self.k = 0
        self.average()

    def average(self):
        self.k += 1
        averages = {}
        for t, row in enumerate(self.rows):
            smoothed, _ = self.ema.propose(t, row, self.positions, self.k)
            averages[t] = dict(zip(self.positions, smoothed, strict=True))
        self.ema.keep(averages)

    def combine(self):
        combine([list(row.values()) for row in self.ema.rows.values()], self.weights)

    def work(self):
        return dict(zip(STAGES, (self.average, self.combine), strict=True))

    def bytes(self):
        counts = {}
        for name, stage in self.work().items():
            with Bytes() as counter:
                stage()
            counts[name] = counter.count
        return counts


def timed(work, *given):
    """Milliseconds of processor time of this thread, and the pages that were asked for."""
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    start = time.thread_time()
    work(*given)
    milliseconds = 1000 * (time.thread_time() - start)
    return milliseconds, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - pages


def measure_one(network, tasks, repetitions):
    """Medians and minima over interleaved repetitions; the first two are not counted."""
    steps = {name: Step(name, network, tasks) for name in ("floor", *STEPS)}
    stages = Stages(network, tasks)
    numbers = sum(p.numel() for p in steps["floor"].shared)
    large = [torch.randn(2**24) for _ in range(3)]  # 64 MiB each: no cache holds them
    times = {}
    for repetition in range(repetitions + 2):
        turns = {name: timed(step.work, step.losses()) for name, step in steps.items()}
        turns |= {name: timed(stage) for name, stage in stages.work().items()}
        turns["copy"] = timed(lambda: torch.add(large[0], large[1], out=large[2]))
        if repetition >= 2:
            for name, turn in turns.items():
                times.setdefault(name, []).append(turn)
    copied = 3 * large[0].numel() * 4
    ms = {name: [of_turn for of_turn, _ in turns] for name, turns in times.items()}
    return {
        "numbers in the trunk": numbers,
        "tensors in the trunk": len(steps["floor"].shared),
        "median ms": {name: round(statistics.median(values), 3) for name, values in ms.items()},
        "least ms": {name: round(min(values), 3) for name, values in ms.items()},
        "pages": {
            name: round(statistics.median(pages for _, pages in turns))
            for name, turns in times.items()
        },
        "copy, GB/s, median": round(copied / statistics.median(ms["copy"]) / 1e6, 2),
        "copy, GB/s, best": round(copied / min(ms["copy"]) / 1e6, 2),
        "bytes of the calls": stages.bytes(),
        "bytes from memory": {
            "average and norms": 3 * tasks * numbers * 4,
            "weighted sum": (tasks + 1) * numbers * 4,
        },
        "load": round(os.getloadavg()[0], 1),
    }


def of_a_process(network, tasks, options):
    """`measure_one` in a process of its own."""
    command = [sys.executable, __file__, "--network", network, "--tasks", str(tasks)]
    command += ["--repetitions", str(options.repetitions), "--threads", str(options.threads)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def least_ratio(m, which):
    """Floor and inevitable bytes at the speed of a copy, in units of the floor."""
    times, copy = ("median ms", "median") if which == "median" else ("least ms", "best")
    milliseconds = sum(m["bytes from memory"].values()) / m[f"copy, GB/s, {copy}"] / 1e6
    return 1 + milliseconds / m[times]["floor"]


def pairs(measured, cell):
    """A cell a column: from the medians, and in brackets from the minima."""
    return [f"{cell(m, 'median')} ({cell(m, 'least')})" for m in measured]


def markdown(result):
    columns = result["measured"]
    measured = list(columns.values())
    ratios = []
    for name in ("floor", *STEPS):
        cells = pairs(
            measured, lambda m, w, n=name: f"{m[f'{w} ms'][n] / m[f'{w} ms']['floor']:.2f}"
        )
        ratios.append([name, *cells])
    cells = pairs(measured, lambda m, which: f"{least_ratio(m, which):.2f}")
    ratios.append(["the least, by the bandwidth", *cells])
    cells = pairs(measured, lambda m, w: f"{m[f'{w} ms']['DB-MTL'] / m[f'{w} ms']['EW']:.2f}")
    ratios.append(["DB-MTL in units of EW", *cells])
    cells = pairs(measured, lambda m, w: f"{m[f'{w} ms']['floor']:.1f}")
    ratios.append(["milliseconds of the floor", *cells])
    for name in ("floor", "DB-MTL"):
        ratios.append([f"pages of {name}", *(f"{m['pages'][name]:,}" for m in measured)])
    stages = []
    for stage in STAGES:
        cells = pairs(measured, lambda m, w, s=stage: f"{m[f'{w} ms'][s]:.1f}")
        stages.append([f"{stage}, ms", *cells])
        for kind in ("bytes of the calls", "bytes from memory"):
            cells = [f"{m[kind][stage] / 1e6:,.0f}" for m in measured]
            stages.append([f"{stage}, {kind.replace('bytes', 'MB')}", *cells])
    cells = [f"{m['copy, GB/s, median']:.1f} ({m['copy, GB/s, best']:.1f})" for m in measured]
    stages.append(["copy bandwidth, GB/s", *cells])
    cells = pairs(
        measured,
        lambda m, w: "{:.1f}".format(
            sum(m["bytes from memory"].values())
            / m["copy, GB/s, median" if w == "median" else "copy, GB/s, best"]
            / 1e6
        ),
    )
    stages.append(["all MB from memory at that speed, ms", *cells])
    stages.append(["load of the machine", *(m["load"] for m in measured)])
    sizes = "; ".join(
        f"{network}, {batch}: {m['numbers in the trunk']:,} in {m['tensors in the trunk']} tensors"
        for network, (_, batch) in NETWORKS.items()
        for m in [columns[f"{network}, T = {TASKS[0]}"]]
    )
    return f"""# An exact step against its floor

Backward part of one step on the CPU, processor time of the thread, threads: {result["threads"]}, \
torch {result["torch"]}, float32; medians (in brackets: minima, and the best bandwidth) of \
{result["repetitions"]} interleaved repetitions, in units of the floor, T bare passes. Written by \
`ci/benchmarks/floor_cost.py`, which says what the rows are. Shared parameters: {sizes}.

{table(["", *columns], ratios)}

The two stages between a step and its floor:

{table(["", *columns], stages)}
"""


def in_words(result):
    """The least and the largest ratio to equal weighting over the networks, for README."""
    ratios = {}
    for place, m in result["measured"].items():
        tasks = int(place.rpartition("= ")[2])
        ms = m["median ms"]
        ratios.setdefault(tasks, []).append(ms["DB-MTL"] / ms["EW"])
    spans = [
        f"{min(of_tasks):.1f} to {max(of_tasks):.1f} at T = {tasks}"
        for tasks, of_tasks in ratios.items()
    ]
    return f"in units of equal weighting's backward pass {', '.join(spans)}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures" / "benchmarks"
    )
    parser.add_argument("--network", choices=NETWORKS, help="print one measurement and stop")
    parser.add_argument("--tasks", type=int, default=3, help="with --network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.network:
        return print(json.dumps(measure_one(options.network, options.tasks, options.repetitions)))
    result = {
        "threads": options.threads,
        "torch": torch.__version__,
        "repetitions": options.repetitions,
        "measured": {
            f"{network}, T = {tasks}": of_a_process(network, tasks, options)
            for network in NETWORKS
            for tasks in TASKS
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "floor_cost.json").write_text(json.dumps(result, indent=1) + os.linesep)
    (options.out / "floor_cost.md").write_text(markdown(result))
    (options.out / "floor_cost_in_words.txt").write_text(in_words(result) + os.linesep)
    print(markdown(result))


if __name__ == "__main__":
    main()
