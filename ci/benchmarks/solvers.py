#!/usr/bin/env python3
"""The solvers of `dbmtl.core.solvers` beside those of TorchJD, on the same Gramians, in one run, on one thread.

    python ci/benchmarks/solvers.py [--repetitions 9] [--matrices 6] [--out figures/benchmarks]

Needs torchjd with cvxpy, clarabel, ecos, qpsolvers and quadprog. Each contender gets what its users call: a weighting
on a Gramian, but TorchJD's Nash-MTL takes the matrix, which ours multiplies out inside the time. That one starts from
its previous answer: "first step" is after a reset, "same again" is its best case, the same matrix once more. Processor
time; the contenders take turns, three calls each: the first finds caches full of another's code ("after other work"),
the median of the others does not ("repeated"). Medians over repetitions, then over matrices: T random gradients in
max(50, 2 T) dimensions, some with a common part, some almost adding up to zero. Beside the times: how far each answer
is from fulfilling the optimality conditions. The last table is one round of block pivoting (a masked solve for T
right-hand sides and its bookkeeping) written in torch and in NumPy. Writes solvers.json and solvers.md.
"""

import argparse
import json
import os
import statistics
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torchjd.aggregation as jd

from dbmtl.core.solvers import cagrad_weights, dual_cone_weights, min_norm_weights, power_weights

TASKS = (3, 11, 40)
PAIRS = {  # ours -> (theirs, what is asked of the ratio)
    "CAGrad": ("torchjd CAGrad (Clarabel)", 20),
    "Nash-MTL": ("torchjd Nash-MTL (ECOS), first step", 20),
    "Nash-MTL ": ("torchjd Nash-MTL (ECOS), same again", 20),
    "UPGrad": ("torchjd UPGrad (quadprog)", 1),
    "MGDA": ("torchjd MGDA (Frank-Wolfe)", None),
}


def matrix(tasks, k):
    generator = torch.Generator().manual_seed(1000 * tasks + k)
    width = max(50, 2 * tasks)
    J = torch.randn(tasks, width, generator=generator, dtype=torch.float64)
    common = torch.randn(width, generator=generator, dtype=torch.float64)
    return [J, J + 0.5 * common, J - 0.9 * J.mean(0)][k % 3]


def contenders(J):
    M, tasks = J @ J.T, len(J)
    identity = torch.eye(tasks, dtype=torch.float64) / tasks
    nash, again = (
        jd.NashMTL(tasks, max_norm=0.0).weighting,
        jd.NashMTL(tasks, max_norm=0.0).weighting,
    )

    def first():
        nash.reset()
        return nash(J)

    return {
        "CAGrad": lambda: cagrad_weights(M, 0.5),
        "torchjd CAGrad (Clarabel)": lambda: jd.CAGradWeighting(c=0.5)(M),
        "Nash-MTL": lambda: power_weights(J @ J.T),
        "Nash-MTL ": lambda: power_weights(J @ J.T),
        "torchjd Nash-MTL (ECOS), first step": first,
        "torchjd Nash-MTL (ECOS), same again": lambda: again(J),
        "UPGrad": lambda: dual_cone_weights(M, identity).sum(0),
        "torchjd UPGrad (quadprog)": lambda: jd.UPGradWeighting()(M),
        "MGDA": lambda: min_norm_weights(M),
        "torchjd MGDA (Frank-Wolfe)": lambda: jd.MGDAWeighting()(M),
    }


def residual(name, J, w):
    """Distance from the optimality conditions, relative: a duality gap, or that of the equation; UPGrad has none."""
    M = J @ J.T
    if "Nash" in name:
        return ((M @ w * w) / ((w @ M @ w) / len(w)) - 1).abs().max().item()  # up to a factor
    if "MGDA" in name:
        return ((w @ M @ w - (M @ w).min()) / M.diagonal().mean()).item()
    if "CAGrad" not in name:
        return None
    w = (
        (w - 1 / len(w)).clamp(min=0) if "torchjd" in name else w
    )  # theirs are those of d = g_0 + ...
    w, p, radius = w / w.sum(), M.mean(1), 0.5 * M.mean().sqrt()
    length = (w @ M @ w).sqrt()
    return (
        (w @ p + radius * length - (p + radius * M @ w / length).min()) / M.diagonal().mean()
    ).item()


def microseconds(tasks, matrices, repetitions):
    """Two medians for each contender (repeated, after other work), and its worst residual."""
    times, worst = {}, {}
    for k in range(matrices):
        J, here = matrix(tasks, k), {}
        works = contenders(J)
        for r in range(repetitions + 1):
            for name, work in works.items():
                calls = []
                for _ in range(3):
                    start = time.process_time()
                    w = work()
                    calls.append(1e6 * (time.process_time() - start))
                if r:
                    here.setdefault(name, []).append((statistics.median(calls[1:]), calls[0]))
                worst[name] = max(worst.get(name, 0), residual(name, J, w) or 0)
        for name, pairs in here.items():
            times.setdefault(name, []).append(np.median(pairs, axis=0))
    return {
        name: np.median(pairs, axis=0).round(1).tolist() for name, pairs in times.items()
    }, worst


def round_of_pivoting(tasks, repetitions=200):
    """One round of block pivoting, the same lines for both libraries, in microseconds."""
    A = matrix(tasks, 1).numpy()
    A, found = A @ A.T, {}
    for name, lib in (("NumPy", np), ("torch", torch)):
        made = (lambda x: x) if lib is np else torch.from_numpy
        M, B, F = made(A), made(-A), made(A < 0)
        values = []
        for _ in range(repetitions):
            start = time.process_time()
            S = M * (F[:, :, None] & F[:, None, :])
            S.reshape(tasks, -1)[:, :: tasks + 1] += ~F
            x = lib.linalg.solve(S, (B * F)[:, :, None])[:, :, 0]
            ((lib.where(F, x, x @ M - B) < -1e-13).sum(1) > 0).any()
            values.append(1e6 * (time.process_time() - start))
        found[name] = round(statistics.median(values), 1)
    return found


def measure(matrices, repetitions):
    times, worst = {}, {}
    for tasks in TASKS:
        times[tasks], worst[tasks] = microseconds(tasks, matrices, repetitions)
    ratios = {f"{ours.strip()} : {theirs}":
              {t: np.divide(times[t][theirs], times[t][ours]).round(1).tolist() for t in TASKS}
              for ours, (theirs, _) in PAIRS.items()}  # fmt: skip
    versions = {
        name: version(name)
        for name in ("torch", "numpy", "torchjd", "cvxpy", "clarabel", "ecos", "quadprog")
    }
    return {"threads": 1, "versions": versions, "matrices": matrices, "repetitions": repetitions,
            "times faster": ratios, "microseconds": times, "worst residual": worst,
            "one round of pivoting, microseconds": {t: round_of_pivoting(t) for t in TASKS}}  # fmt: skip


def table(head, rows):
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]
    )


def pair(values):
    return f"{values[0]} ({values[1]})"


def markdown(m):
    head, times, worst = ["", *(f"T = {t}" for t in TASKS)], m["microseconds"], m["worst residual"]
    asked = {f"{ours.strip()} : {theirs}": least for ours, (theirs, least) in PAIRS.items()}
    ratios = [
        [n, *map(pair, ratio.values()), asked[n] or ""] for n, ratio in m["times faster"].items()
    ]
    rows = [n for n in times[3] if not n.endswith(" ")]
    step = m["one round of pivoting, microseconds"]
    return f"""# The solvers beside TorchJD's

One CPU thread, processor time, float64;
{", ".join(f"{k} {v}" for k, v in m["versions"].items())}; medians of
{m["repetitions"]} repetitions and {m["matrices"]} matrices. Written by `ci/benchmarks/solvers.py`, which says what is
measured.

How many times faster `dbmtl.core.solvers` is when calls are repeated (in brackets: right after other work, which costs
both sides their caches), and what was asked for at least:

{table([*head, "asked"], ratios)}

Microseconds, likewise:

{table(head, [[n, *(pair(times[t][n]) for t in TASKS)] for n in rows])}

The worst relative residual (CAGrad, MGDA: duality gap; Nash-MTL: the equation, up to a common factor; TorchJD's UPGrad
solves a regularized problem and is not compared):

{table(head, [[n, *(f"{worst[t][n]:.0e}" for t in TASKS)] for n in rows if "UPGrad" not in n])}

One round of block pivoting for T right-hand sides, in microseconds:

{table(head, [[n, *(step[t][n] for t in TASKS)] for n in ("NumPy", "torch")])}
"""


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--matrices", type=int, default=6)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[2] / "figures" / "benchmarks"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # cvxpy and ECOS comment on their own accuracy
    result = measure(options.matrices, options.repetitions)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "solvers.json").write_text(json.dumps(result, indent=1) + os.linesep)
    (options.out / "solvers.md").write_text(markdown(result))
    print(markdown(result))


if __name__ == "__main__":
    main()
