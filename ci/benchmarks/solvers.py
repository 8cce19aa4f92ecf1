#!/usr/bin/env python3
"""The solvers of `dbmtl.core.solvers` beside those of TorchJD, on the same Gramians, on one thread.

    python ci/benchmarks/solvers.py [--repetitions 9] [--matrices 6] [--out figures/benchmarks]

Needs torchjd with cvxpy, clarabel, ecos, qpsolvers and quadprog. Each contender gets what its users
call: a weighting on a Gramian, but TorchJD's Nash-MTL takes the matrix, which ours multiplies out
inside the time. That one starts from its previous answer: "first step" is after a reset, "same
again" is its best case, the same matrix once more. Processor time; the contenders take turns, three
calls each: the first finds caches full of another's code ("after other work"), the median of the
others does not ("repeated"). Medians over repetitions, then over matrices: T random gradients in
max(50, 2 T) dimensions, some with a common part, some almost adding up to zero. Beside the times:
how far each answer is from fulfilling the optimality conditions. The last table is one round of
block pivoting (a masked solve for T right-hand sides and its bookkeeping) written in torch and in
NumPy. Writes solvers.json and solvers.md.
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
LIBRARIES = ("torch", "numpy", "torchjd", "cvxpy", "clarabel", "ecos", "quadprog")
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
    M = J @ J.T
    tasks = len(J)
    identity = torch.eye(tasks, dtype=torch.float64) / tasks
    nash_first = jd.NashMTL(tasks, max_norm=0.0).weighting
    nash_again = jd.NashMTL(tasks, max_norm=0.0).weighting

    def first():
        nash_first.reset()
        return nash_first(J)

    return {
        "CAGrad": lambda: cagrad_weights(M, 0.5),
        "torchjd CAGrad (Clarabel)": lambda: jd.CAGradWeighting(c=0.5)(M),
        "Nash-MTL": lambda: power_weights(J @ J.T),
        "Nash-MTL ": lambda: power_weights(J @ J.T),
        "torchjd Nash-MTL (ECOS), first step": first,
        "torchjd Nash-MTL (ECOS), same again": lambda: nash_again(J),
        "UPGrad": lambda: dual_cone_weights(M, identity).sum(0),
        "torchjd UPGrad (quadprog)": lambda: jd.UPGradWeighting()(M),
        "MGDA": lambda: min_norm_weights(M),
        "torchjd MGDA (Frank-Wolfe)": lambda: jd.MGDAWeighting()(M),
    }


def residual(name, J, w):
    """Distance from the optimality conditions, relative: a duality gap, or that of the equation;
    UPGrad has none."""
    M = J @ J.T
    scale = M.diagonal().mean()
    if "Nash" in name:
        return ((M @ w * w) / ((w @ M @ w) / len(w)) - 1).abs().max().item()  # up to a factor
    if "MGDA" in name:
        return ((w @ M @ w - (M @ w).min()) / scale).item()
    if "CAGrad" not in name:
        return None
    if "torchjd" in name:  # theirs are the weights of d = g_0 + ...
        w = (w - 1 / len(w)).clamp(min=0)
    w = w / w.sum()
    p = M.mean(1)
    radius = 0.5 * M.mean().sqrt()
    length = (w @ M @ w).sqrt()
    value = w @ p + radius * length
    lowest = (p + radius * M @ w / length).min()
    return ((value - lowest) / scale).item()


def three_calls(work):
    """Microseconds of three calls, and the last answer."""
    times = []
    for _ in range(3):
        start = time.process_time()
        answer = work()
        times.append(1e6 * (time.process_time() - start))
    return times, answer


def microseconds(tasks, matrices, repetitions):
    """Two medians for each contender (repeated, after other work), and its worst residual."""
    times = {}
    worst = {}
    for k in range(matrices):
        J = matrix(tasks, k)
        of_this_matrix = {}
        works = contenders(J)
        for repetition in range(repetitions + 1):
            for name, work in works.items():
                (after_other_work, *repeated), w = three_calls(work)
                if repetition > 0:  # the first is a warm-up
                    pair = (statistics.median(repeated), after_other_work)
                    of_this_matrix.setdefault(name, []).append(pair)
                worst[name] = max(worst.get(name, 0), residual(name, J, w) or 0)
        for name, pairs in of_this_matrix.items():
            times.setdefault(name, []).append(np.median(pairs, axis=0))
    medians = {name: np.median(pairs, axis=0).round(1).tolist() for name, pairs in times.items()}
    return medians, worst


def round_of_pivoting(tasks, repetitions=200):
    """One round of block pivoting, the same lines for both libraries, in microseconds."""
    A = matrix(tasks, 1).numpy()
    A = A @ A.T
    medians = {}
    for name, library in (("NumPy", np), ("torch", torch)):
        convert = np.asarray if library is np else torch.from_numpy
        M = convert(A)
        B = convert(-A)
        F = convert(A < 0)
        times = []
        for _ in range(repetitions):
            start = time.process_time()
            S = M * (F[:, :, None] & F[:, None, :])
            S.reshape(tasks, -1)[:, :: tasks + 1] += ~F
            x = library.linalg.solve(S, (B * F)[:, :, None])[:, :, 0]
            ((library.where(F, x, x @ M - B) < -1e-13).sum(1) > 0).any()
            times.append(1e6 * (time.process_time() - start))
        medians[name] = round(statistics.median(times), 1)
    return medians


def measure(matrices, repetitions):
    times = {}
    worst = {}
    for tasks in TASKS:
        times[tasks], worst[tasks] = microseconds(tasks, matrices, repetitions)
    ratios = {}
    for ours, (theirs, _) in PAIRS.items():
        ratios[f"{ours.strip()} : {theirs}"] = {
            tasks: np.divide(times[tasks][theirs], times[tasks][ours]).round(1).tolist()
            for tasks in TASKS
        }
    return {
        "threads": 1,
        "versions": {name: version(name) for name in LIBRARIES},
        "matrices": matrices,
        "repetitions": repetitions,
        "times faster": ratios,
        "microseconds": times,
        "worst residual": worst,
        "one round of pivoting, microseconds": {tasks: round_of_pivoting(tasks) for tasks in TASKS},
    }


def table(head, rows):
    return "\n".join(
        f"| {' | '.join(map(str, row))} |" for row in [head, ["---"] * len(head), *rows]
    )


def pair(values):
    return f"{values[0]} ({values[1]})"


def markdown(m):
    head = ["", *(f"T = {t}" for t in TASKS)]
    times = m["microseconds"]
    worst = m["worst residual"]
    step = m["one round of pivoting, microseconds"]
    asked = {f"{ours.strip()} : {theirs}": least for ours, (theirs, least) in PAIRS.items()}
    names = [name for name in times[TASKS[0]] if not name.endswith(" ")]
    ratios = []
    for name, ratio in m["times faster"].items():
        ratios.append([name, *map(pair, ratio.values()), asked[name] or ""])
    residuals = []
    for name in names:
        if "UPGrad" not in name:
            residuals.append([name, *(f"{worst[t][name]:.0e}" for t in TASKS)])
    return f"""# The solvers beside TorchJD's

One CPU thread, processor time, float64;
{", ".join(f"{k} {v}" for k, v in m["versions"].items())}; medians of
{m["repetitions"]} repetitions and {m["matrices"]} matrices. Written by \
`ci/benchmarks/solvers.py`, which says what is
measured.

How many times faster `dbmtl.core.solvers` is when calls are repeated (in brackets: right after \
other work, which costs
both sides their caches), and what was asked for at least:

{table([*head, "asked"], ratios)}

Microseconds, likewise:

{table(head, [[name, *(pair(times[t][name]) for t in TASKS)] for name in names])}

The worst relative residual (CAGrad, MGDA: duality gap; Nash-MTL: the equation, up to a common \
factor; TorchJD's UPGrad
solves a regularized problem and is not compared):

{table(head, residuals)}

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
