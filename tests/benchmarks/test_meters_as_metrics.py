"""Every meter is a metric of torchmetrics: the same numbers as its plain formula, bit for bit,
and everything that a `Metric` can do."""

import copy
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torchmetrics
from helpers.plain_meters import (
    PlainAccuracy,
    PlainDepth,
    PlainMAE,
    PlainNormal,
    PlainSegmentation,
    PlainZScore,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close
from torchmetrics import MetricCollection, MultitaskWrapper
from torchmetrics.functional import mean_absolute_error, mean_absolute_percentage_error
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_jaccard_index

from dbmtl.benchmarks.dense_prediction import (
    DepthMeter,
    NormalMeter,
    SegmentationMeter,
    dense_tasks,
)
from dbmtl.benchmarks.meters import Accuracy, MeanAbsoluteError, Meter
from dbmtl.benchmarks.qm9 import ZScoreError

ROOT = Path(__file__).resolve().parents[2]
CLASSES = 4


class Case(NamedTuple):
    make: object  # () -> the meter
    plain: object  # () -> the same formula without torchmetrics
    draw: object  # (count, share of unknown pixels, generator) -> prediction and target


def draw_numbers(count, void, generator):
    prediction, target = 10 * torch.randn(2, count, generator=generator)
    return prediction, target


def draw_z_scores(count, void, generator):
    target = torch.stack([torch.randn(count, generator=generator), torch.full((count,), 50.0)], 1)
    return torch.randn(count, generator=generator), target


def draw_scores(count, void, generator):
    target = torch.randint(CLASSES, (count,), generator=generator)
    return torch.randn(count, CLASSES, generator=generator), target


def draw_labels(count, void, generator):
    prediction = torch.randn(count, CLASSES, 3, 5, generator=generator)
    target = torch.randint(CLASSES, (count, 3, 5), generator=generator).to(torch.uint8)
    return prediction, target.masked_fill(torch.rand(target.shape, generator=generator) < void, 255)


def draw_depths(count, void, generator):
    target = 0.5 + 9 * torch.rand(count, 1, 3, 5, generator=generator)
    known = torch.rand(target.shape, generator=generator) >= void
    return 5 * torch.rand(count, 1, 3, 5, generator=generator), target * known


def draw_normals(count, void, generator):
    target = F.normalize(torch.randn(count, 3, 3, 5, generator=generator), dim=1)
    known = torch.rand(count, 1, 3, 5, generator=generator) >= void
    noise = torch.randn(count, 3, 3, 5, generator=generator)
    return target + 0.5 * noise, target * known


CASES = {
    "MAE": Case(lambda: MeanAbsoluteError(factor=2.5), lambda: PlainMAE(2.5), draw_numbers),
    "z-score": Case(ZScoreError, PlainZScore, draw_z_scores),
    "accuracy": Case(Accuracy, PlainAccuracy, draw_scores),
    "segmentation": Case(
        lambda: SegmentationMeter(CLASSES), lambda: PlainSegmentation(CLASSES), draw_labels
    ),
    "depth": Case(lambda: DepthMeter(100), lambda: PlainDepth(100), draw_depths),
    "normal": Case(NormalMeter, PlainNormal, draw_normals),
}
every_meter = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def data_of(case, count=7, void=0.3, seed=0):
    return case.draw(count, void, torch.Generator().manual_seed(seed))


def filled(case, *parts, meter=None):
    """A meter that was given the parts, pairs of prediction and target."""
    meter = case.make() if meter is None else meter
    for prediction, target in parts:
        meter.update(prediction, target)
    return meter


def parts_of(data, sizes):
    return list(zip(*(tensor.split(sizes) for tensor in data), strict=True))


def assert_same(metrics, expected, tolerance=0.0):
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        assert isinstance(metrics[name], float)
        both_nan = math.isnan(value) and math.isnan(metrics[name])
        assert both_nan or abs(metrics[name] - value) <= tolerance * abs(value), name


# --------------------------------------------------------------------------------------- numbers


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(CASES)),
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.3, 0.9, 1.1]),
    st.integers(0, 999),
)
def test_numbers_are_those_of_the_plain_formula_bit_for_bit(name, sizes, void, seed):
    case = CASES[name]
    parts = parts_of(data_of(case, sum(sizes), void, seed), sizes)
    expected = filled(case, *parts, meter=case.plain()).compute()
    assert_same(filled(case, *parts).compute(), expected)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.sampled_from([0.0, 0.3, 0.8]), st.integers(0, 999))
def test_numbers_are_those_of_torchmetrics_functions(count, void, seed):
    def close(value, expected):
        assert_close(torch.tensor(value), expected.to(torch.float32), rtol=1e-5, atol=1e-6)

    prediction, target = data_of(CASES["MAE"], count, void, seed)
    metrics = filled(CASES["MAE"], (prediction, target)).compute()
    close(metrics["MAE"], 2.5 * mean_absolute_error(prediction, target))

    scores, target = data_of(CASES["accuracy"], count, void, seed)
    metrics = filled(CASES["accuracy"], (scores, target)).compute()
    close(metrics["Acc"], 100 * multiclass_accuracy(scores, target, CLASSES, average="micro"))

    scores, label = data_of(CASES["segmentation"], count, void, seed)
    metrics = filled(CASES["segmentation"], (scores, label)).compute()
    void_as = {"num_classes": CLASSES, "ignore_index": 255}
    label = label.long()
    if (label != 255).any():
        close(metrics["mIoU"], 100 * multiclass_jaccard_index(scores, label, **void_as))
        accuracy = multiclass_accuracy(scores, label, average="micro", **void_as)
        close(metrics["PAcc"], 100 * accuracy)

    prediction, target = data_of(CASES["depth"], count, void, seed)
    metrics = filled(CASES["depth"], (prediction, target)).compute()
    known = target != 0
    if known.any():
        close(metrics["AErr"], mean_absolute_error(prediction[known], target[known]))
        relative = mean_absolute_percentage_error(prediction[known], target[known])
        close(metrics["RErr"], 100 * relative)


# ------------------------------------------------------------------------- what every metric can do


@every_meter
def test_called_as_a_function_it_returns_the_batch_and_adds_it(case):
    parts = parts_of(data_of(case), [3, 4])
    meter = case.make()
    for part in parts:
        assert_same(meter(*part), filled(case, part).compute())
    assert_same(meter.compute(), filled(case, *parts).compute())


@every_meter
def test_reset_forgets_everything(case):
    first, second = parts_of(data_of(case), [3, 4])
    meter = filled(case, first)
    meter.compute()
    meter.reset()
    assert_same(filled(case, second, meter=meter).compute(), filled(case, second).compute())


def through_pickle(meter):
    return pickle.loads(pickle.dumps(meter))


@every_meter
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, Meter.clone])
def test_a_copy_has_sums_of_its_own(duplicate, case):
    first, second = parts_of(data_of(case), [3, 4])
    meter = filled(case, first)
    twin = filled(case, second, meter=duplicate(meter))
    assert_same(twin.compute(), filled(case, first, second).compute())
    assert_same(meter.compute(), filled(case, first).compute())


@every_meter
def test_state_dict_holds_the_sums_where_it_is_asked_to(case):
    first, second = parts_of(data_of(case), [3, 4])
    meter = filled(case, first)
    assert meter.state_dict() == {}
    meter.persistent(True)
    saved = meter.state_dict()
    before = copy.deepcopy(saved)
    resumed = case.make()
    resumed.load_state_dict(copy.copy(saved))
    filled(case, second, meter=resumed)
    assert_same(resumed.compute(), filled(case, first, second).compute())
    assert_close(saved, before, rtol=0, atol=0)  # what was loaded stays as it is


@every_meter
@pytest.mark.parametrize("sizes", [[3, 4], [7, 0]])
def test_states_of_two_processes_add_up(sizes, case):
    first, second = parts_of(data_of(case), sizes)
    one = filled(case, first)
    other = filled(case, second)
    expected = filled(case, first, second).compute()
    one.merge_state(other)
    assert_same(one.compute(), expected, 1e-14)


@every_meter
def test_states_are_summed_by_the_rule_that_they_declare(case):
    first, second = parts_of(data_of(case), [3, 4])
    one = filled(case, first)
    other = filled(case, second)
    joined = filled(case, first)
    for name, reduce in one._reductions.items():
        stacked = torch.stack([one.metric_state[name], other.metric_state[name]])
        setattr(joined, name, reduce(stacked))
    assert_same(joined.compute(), filled(case, first, second).compute(), 1e-14)


def test_dense_tasks_in_a_wrapper_of_several_tasks():
    tasks = dense_tasks(classes=CLASSES)
    data = {task.name: data_of(CASES[task.name]) for task in tasks}
    predictions = {name: prediction for name, (prediction, target) in data.items()}
    targets = {name: target for name, (prediction, target) in data.items()}
    meters = MultitaskWrapper({task.name: task.meter() for task in tasks})
    meters.update(predictions, targets)
    metrics = meters.compute()
    for task in tasks:
        alone = filled(CASES[task.name], data[task.name], meter=task.meter())
        assert_same(metrics[task.name], alone.compute())


def test_in_a_collection_with_metrics_of_torchmetrics():
    collection = MetricCollection(
        {
            "ours": SegmentationMeter(CLASSES),
            "theirs": torchmetrics.JaccardIndex("multiclass", num_classes=CLASSES),
        }
    )
    prediction, target = data_of(CASES["segmentation"], void=0.0)
    for part in parts_of((prediction, target.long()), [3, 4]):
        collection.update(*part)
    metrics = collection.compute()
    assert set(metrics) == {"mIoU", "PAcc", "theirs"}
    assert_close(torch.tensor(metrics["mIoU"]), 100 * metrics["theirs"], rtol=1e-5, atol=0)


def test_two_meters_of_one_kind_in_a_collection_share_their_sums():
    data = data_of(CASES["depth"])
    collection = MetricCollection(
        {"ratio": DepthMeter(), "percent": DepthMeter(relative_factor=100)}
    )
    for part in parts_of(data, [3, 4]):
        collection.update(*part)
    metrics = collection.compute()
    assert len(collection.compute_groups) == 1
    ratio = filled(CASES["depth"], data, meter=DepthMeter()).compute()["RErr"]
    assert_close(metrics["ratio_RErr"], ratio, rtol=1e-12, atol=0)
    assert_close(metrics["percent_RErr"], 100 * ratio, rtol=1e-12, atol=0)


# --------------------------------------------------------------------- devices, types, gradients


@every_meter
def test_the_first_batch_takes_the_sums_to_its_device(case):
    meter = case.make()
    meter.update(*(tensor.to("meta") for tensor in data_of(case)))
    assert meter.device.type == "meta"
    assert all(state.device.type == "meta" for state in meter.metric_state.values())


@every_meter
def test_sums_stay_in_double_precision_and_whole_numbers(case):
    meter = case.make().half().float()
    for _ in range(2):
        dtypes = {state.dtype for state in meter.metric_state.values()}
        assert dtypes <= {torch.float64, torch.int64}
        meter.reset()
        filled(case, data_of(case), meter=meter)
    assert_same(meter.compute(), filled(case, data_of(case)).compute())


@every_meter
def test_a_meter_keeps_no_graph(case):
    prediction, target = data_of(case)
    meter = filled(case, (prediction.requires_grad_(), target))
    assert not any(state.requires_grad for state in meter.metric_state.values())


@every_meter
def test_batches_inside_and_outside_of_inference_mode(case):
    first, second = parts_of(data_of(case), [3, 4])
    meter = case.make()
    with torch.inference_mode():
        meter.reset()
        filled(case, first, meter=meter)
    filled(case, second, meter=meter)
    assert_same(meter.compute(), filled(case, first, second).compute())


@every_meter
def test_without_a_batch_it_warns(case):
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        case.make().compute()


def test_a_meter_says_whether_more_is_better_where_its_metrics_agree():
    for task in dense_tasks():
        ways = set(task.directions.values())
        higher = {"up": True, "down": False}[ways.pop()] if len(ways) == 1 else None
        assert task.meter().higher_is_better is higher
    assert Accuracy.higher_is_better and ZScoreError.higher_is_better is False


# ------------------------------------------------------------------------------- other processes

RANK = """
import json, sys, torch
from torch import distributed
from dbmtl.benchmarks.dense_prediction import dense_tasks

rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
data = torch.load(f"{folder}/data.pt")
metrics = {}
for task in dense_tasks(classes=4):
    meter = task.meter()
    for prediction, target in data[task.name][rank]:
        meter.update(prediction, target)
    metrics[task.name] = meter.compute()
print(json.dumps(metrics))
distributed.destroy_process_group()
"""


@pytest.mark.full
def test_two_ranks_compute_the_metrics_of_both_shares(tmp_path):
    parts = {
        name: parts_of(data_of(CASES[name]), [2, 1, 4])
        for name in ("segmentation", "depth", "normal")
    }
    shares = {name: [three[:2], three[2:]] for name, three in parts.items()}
    torch.save(shares, tmp_path / "data.pt")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    results = [json.loads(rank.communicate(timeout=120)[0]) for rank in ranks]
    assert results[0] == results[1]
    for task in dense_tasks(classes=CLASSES):
        whole = filled(CASES[task.name], *parts[task.name], meter=task.meter())
        assert_same(results[0][task.name], whole.compute(), 1e-14)


@pytest.mark.full
def test_without_torchmetrics_the_error_names_the_extra():
    code = """if True:
        import sys
        sys.modules["torchmetrics"] = None  # importing it raises
        from dbmtl import get_benchmark
        get_benchmark("toy")
    """
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "ImportError: benchmarks are measured with torchmetrics" in done.stderr
    assert "pip install dbmtl[lab]" in done.stderr
