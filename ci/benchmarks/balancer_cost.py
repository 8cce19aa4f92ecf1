#!/usr/bin/env python3
"""What a balanced step costs beside plain backward passes, in one run: ratios, not absolute claims.

    python ci/benchmarks/balancer_cost.py [--repetitions 15] [--threads 1] [--out figures/benchmarks]

Only the backward part of a step is timed, on a fresh graph each time, in processor time on one thread, so that other
work on the machine disturbs it little; the contenders take turns, and medians are compared with the floor: T calls
of `torch.autograd.grad`, one a task, each to the trunk and to its own head, the last one freeing the graph. "flat" is
Algorithm 1 on concatenated gradient vectors. TorchJD's row is one `mtl_backward` and one `jac_to_grad`: Sum needs no
Gramian, IMTL-G does, and neither needs a solver; chunk 1 is one pass a task.
Peak memory of two steps of a wide MLP, each in a process of its own, above what forward and one plain backward take.
Writes balancer_cost.json and balancer_cost.md.
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
from torch import nn

from dbmtl import make_balancer
from dbmtl.core.task_gradients import loss_edges, task_gradients, trace


def mlp(tasks, width=384):
    trunk = nn.Sequential(
        nn.Linear(256, width), *(m for _ in range(3) for m in (nn.ReLU(), nn.Linear(width, width)))
    )
    layers = [[nn.ReLU(), nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 1)] for _ in range(tasks)]
    return trunk, nn.ModuleList(nn.Sequential(*layer) for layer in layers), torch.randn(64, 256)


def conv(tasks):
    sizes = [(3, 16), (16, 32), (32, 32), (32, 32)]
    layers = [[nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()] for a, b in sizes]
    heads = nn.ModuleList(nn.Conv2d(32, 2, 1) for _ in range(tasks))
    return nn.Sequential(*sum(layers, [])), heads, torch.randn(4, 3, 24, 24)


def wide(tasks):
    trunk, heads, x = mlp(tasks, width=1536)
    return trunk, heads, x[:8]


NETWORKS = {"mlp": mlp, "conv": conv, "wide": wide}


class Step:
    """A network and one contender; `losses()` runs forward, `work(losses, features)` the rest."""

    def __init__(self, name, network, tasks):
        torch.manual_seed(0)
        self.trunk, self.heads, self.x = NETWORKS[network](tasks)
        self.tasks, self.average, self.count = tasks, None, 0
        method, _, rest = name.partition(", ")
        self.work = (
            getattr(self, method.replace(" ", "_").replace("-", "_").lower(), None) or self.balanced
        )
        self.rest = rest
        if self.work == self.balanced:
            options = {"beta": 0} if "beta 0" in rest else {}
            grads = next((g for g in ("split", "batched") if g in rest), "loop")
            self.balancer = make_balancer(
                method, shared=self.trunk, num_tasks=tasks, grads=grads, **options
            )

    def forward(self):
        self.trunk.zero_grad()
        self.heads.zero_grad()
        z = self.trunk(self.x)
        return [head(z).square().mean() + 0.1 for head in self.heads], z

    def backward(self, losses, z):
        sum(losses).backward()

    def floor(self, losses, z):
        shared, rows = list(self.trunk.parameters()), []
        for t, loss in enumerate(losses):
            inputs = shared + list(self.heads[t].parameters())
            rows.append(
                torch.autograd.grad(loss, inputs, retain_graph=t < self.tasks - 1)[: len(shared)]
            )
        return rows

    def trace(self, losses, z):
        trace(loss_edges(losses))

    def task_gradients(self, losses, z):
        task_gradients(losses, self.trunk)

    def balanced(self, losses, z):
        self.balancer.backward(losses)

    def flat(self, losses, z):
        self.count += 1
        rows = torch.stack(
            [
                torch.cat([g.reshape(-1) for g in row]) / (loss.detach() + 1e-8)
                for row, loss in zip(self.floor(losses, z), losses, strict=True)
            ]
        )
        beta = 0.5 / self.count**0.5
        self.average = (
            rows * (1 - beta) if self.average is None else beta * self.average + (1 - beta) * rows
        )
        norms = self.average.norm(dim=1)
        step = (self.average * (norms.max() / (norms + 1e-8))[:, None]).sum(0)
        parameters = list(self.trunk.parameters())
        for p, g in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p).clone()

    def torchjd(self, losses, z):
        from torchjd.aggregation import IMTLG, Sum
        from torchjd.autojac import jac_to_grad, mtl_backward

        mtl_backward(losses, z, parallel_chunk_size=1 if "chunk 1" in self.rest else None)
        jac_to_grad(self.trunk.parameters(), Sum() if "Sum" in self.rest else IMTLG())


TIMED = ["floor", "backward", "EW", "trace", "task gradients", "DB-MTL, loop", "DB-MTL, split", "DB-MTL, batched",
         "DB-MTL, loop, beta 0", "flat", "torchjd, Sum", "torchjd, Sum, chunk 1", "torchjd, IMTL-G"]  # fmt: skip
MEASURED = [
    "EW",
    "DB-MTL, loop",
    "DB-MTL, split",
    "DB-MTL, batched",
    "DB-MTL, loop, beta 0",
    "flat",
    "torchjd, IMTL-G",
]


def peak_mib(name, tasks):
    """What two steps add to the peak of a process that has run forward and backward of the summed losses, in MiB."""
    step, plain = Step(name, "wide", tasks), Step("backward", "mlp", tasks)
    plain.work(*plain.forward())
    losses, z = step.forward()
    step.backward(losses, z)
    del losses, z
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        step.work(*step.forward())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def milliseconds(network, tasks, repetitions):
    """Medians over interleaved repetitions; the first two are not counted."""
    steps, times = (
        {name: Step(name, network, tasks) for name in TIMED},
        {name: [] for name in TIMED},
    )
    for _ in range(repetitions + 2):
        for name, step in steps.items():
            losses, z = step.forward()
            start = time.process_time()
            step.work(losses, z)
            times[name].append(1000 * (time.process_time() - start))
    return {name: round(statistics.median(values[2:]), 3) for name, values in times.items()}


def measure(repetitions, threads):
    memory = {}
    for tasks in (
        3,
        11,
    ):  # first, because a new process inherits the peak of the one that starts it
        memory[tasks] = {}
        for name in MEASURED:
            command = [
                sys.executable,
                __file__,
                "--peak",
                name,
                "--tasks",
                str(tasks),
                "--threads",
                str(threads),
            ]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            memory[tasks][name] = round(float(done.stdout), 1)
    times = {
        f"{n}, T = {t}": milliseconds(n, t, repetitions) for n in ("mlp", "conv") for t in (3, 11)
    }
    shares = {
        key: {
            "trace": round(ms["trace"] / ms["DB-MTL, loop"], 4),
            "passes": round((ms["task gradients"] - ms["trace"]) / ms["DB-MTL, loop"], 4),
            "balancing": round(1 - ms["task gradients"] / ms["DB-MTL, loop"], 4),
        }
        for key, ms in times.items()
    }
    import torchjd  # noqa: F401  (must be installed: see extras `dev`)

    trunk = sum(p.numel() for p in wide(3)[0].parameters()) * 4 / 2**20
    return {"threads": threads, "torch": torch.__version__, "repetitions": repetitions, "milliseconds": times,
            "shares of a DB-MTL step": shares,
            "one trunk gradient, MiB": round(trunk, 1), "peak MiB above a plain step": memory}  # fmt: skip


def table(head, rows):
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]
    )


def markdown(m):
    times, memory, one = (
        m["milliseconds"],
        m["peak MiB above a plain step"],
        m["one trunk gradient, MiB"],
    )
    ratios = [[n, *(f"{ms[n] / ms['floor']:.2f}" for ms in times.values())] for n in TIMED]
    floors = ["milliseconds of the floor", *(f"{ms['floor']:.1f}" for ms in times.values())]
    shares = [[part, *(f"{100 * s[part]:.1f} %" for s in m["shares of a DB-MTL step"].values())]
              for part in ("trace", "passes", "balancing")]  # fmt: skip
    peaks = [
        [n, *(f"{memory[t][n]:.0f} ({memory[t][n] / one:.1f})" for t in memory)] for n in MEASURED
    ]
    return f"""# The cost of a balanced step

Backward part of one step on the CPU, processor time, threads: {m["threads"]}, torch {m["torch"]}, float32; medians of
{m["repetitions"]} interleaved repetitions, in units of the floor (T plain passes). Written by
`ci/benchmarks/balancer_cost.py`, which says what the rows are; `backward` is one pass of the summed losses.

{table(["", *times], [*ratios, floors])}

Where the time of a DB-MTL step (loop) goes:

{table(["", *times], shares)}

Peak memory of two steps of a wide MLP above that of a plain step, in MiB (in brackets: in trunk gradients of
{one} MiB):

{table(["", *(f"T = {t}" for t in memory)], peaks)}
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures" / "benchmarks"
    )
    parser.add_argument(
        "--peak", choices=MEASURED, help="print the peak memory of one contender and stop"
    )
    parser.add_argument("--tasks", type=int, default=3, help="with --peak")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        return print(peak_mib(options.peak, options.tasks))
    result = measure(options.repetitions, options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "balancer_cost.json").write_text(json.dumps(result, indent=1) + os.linesep)
    (options.out / "balancer_cost.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
