"""Losses, meters and floors of the pixel-wise tasks against slow versions in NumPy."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from dbmtl.benchmarks.base import TensorSplit
from dbmtl.benchmarks.dense_prediction import (
    DepthMeter,
    NormalMeter,
    SegmentationMeter,
    angle_degrees,
    constant_predictions,
    dense_floors,
    dense_tasks,
    depth_loss,
    normal_loss,
    segmentation_loss,
)
from dbmtl.report.paper import paper_directions, paper_table

LOSSES = {"segmentation": segmentation_loss, "depth": depth_loss, "normal": normal_loss}


def unit(x):
    return torch.nn.functional.normalize(x, dim=1)


def make(count, classes, size, void=0.2, dtype=torch.float32, seed=0, use=None):
    """Predictions and targets of the three tasks; `use`: classes in truth and prediction."""
    g = torch.Generator().manual_seed(seed)
    H, W = size
    use = torch.tensor(range(classes) if use is None else use)
    valid = torch.rand(3, count, H, W, generator=g) >= void
    label = (
        use[torch.randint(len(use), (count, H, W), generator=g)]
        .to(torch.uint8)
        .masked_fill(~valid[0], 255)
    )
    depth = (0.7 + 9 * torch.rand(count, 1, H, W, generator=g)) * valid[1][:, None]
    normal = unit(torch.randn(count, 3, H, W, generator=g)) * valid[2][:, None]
    logits = torch.randn(count, classes, H, W, generator=g)
    off = [c for c in range(classes) if c not in use.tolist()]
    logits[:, off] -= 100
    guess = {
        "segmentation": logits,
        "depth": 5 * torch.rand(count, 1, H, W, generator=g),
        "normal": 3 * torch.randn(count, 3, H, W, generator=g),
    }
    return {k: v.to(dtype) for k, v in guess.items()}, {
        "segmentation": label,
        "depth": depth,
        "normal": normal,
    }


# ------------------------------------------------------------------- slow versions, pixel by pixel


def slow_pixels(prediction, target, is_valid):
    """Pairs of vectors, one a valid pixel, in float64."""
    prediction = prediction.double().numpy()
    target = target.numpy()
    for b in range(len(prediction)):
        for i in range(prediction.shape[2]):
            for j in range(prediction.shape[3]):
                y = target[b, i, j] if target.ndim == 3 else target[b, :, i, j].astype(np.float64)
                if is_valid(y):
                    yield prediction[b, :, i, j], y


def slow_angle(p, y):
    return math.degrees(math.atan2(np.linalg.norm(np.cross(p, y)), p @ y))


def slow_loss(name, prediction, target):
    if name == "segmentation":
        terms = [
            np.log(np.exp(p).sum()) - p[y]
            for p, y in slow_pixels(prediction, target, lambda y: y != 255)
        ]
    if name == "depth":
        terms = [abs(p[0] - y[0]) for p, y in slow_pixels(prediction, target, lambda y: y[0] != 0)]
    if name == "normal":
        terms = [
            1 - p @ y / np.linalg.norm(p)
            for p, y in slow_pixels(prediction, target, lambda y: y.any())
        ]
    return np.mean(terms) if terms else 0.0


def slow_metrics(name, prediction, target):
    if name == "segmentation":
        pairs = [(p.argmax(), y) for p, y in slow_pixels(prediction, target, lambda y: y != 255)]
        ious = []
        for c in range(prediction.shape[1]):
            both = sum(p == c and y == c for p, y in pairs)
            either = sum(p == c or y == c for p, y in pairs)
            ious += [both / either] if either else []
        nan = float("nan")
        return {
            "mIoU": 100 * np.mean(ious) if ious else nan,
            "PAcc": 100 * np.mean([p == y for p, y in pairs]) if pairs else nan,
        }
    if name == "depth":
        pairs = [(p[0], y[0]) for p, y in slow_pixels(prediction, target, lambda y: y[0] != 0)]
        if not pairs:
            return {"AErr": float("nan"), "RErr": float("nan")}
        return {
            "AErr": np.mean([abs(p - y) for p, y in pairs]),
            "RErr": np.mean([abs(p - y) / y for p, y in pairs]),
        }
    angles = np.array(
        [slow_angle(p, y) for p, y in slow_pixels(prediction, target, lambda y: y.any())]
    )
    if not len(angles):
        return dict.fromkeys(("Mean", "Median", "W11.25", "W22.5", "W30"), float("nan"))
    shares = {f"W{t:g}": 100 * np.mean(angles < t) for t in (11.25, 22.5, 30)}
    return {"Mean": angles.mean(), "Median": np.median(angles), **shares}


def streamed(task, prediction, target, parts):
    meter = task.meter()
    for index in torch.arange(len(target)).split(parts):
        meter.update(prediction[index], target[index])
    return meter.compute()


def assert_metrics(metrics, expected):
    assert list(metrics) == list(expected)
    for name, value in expected.items():
        bound = 0.0006 if name == "Median" else 1e-5 * max(1, abs(value))
        both_nan = math.isnan(value) and math.isnan(metrics[name])
        assert both_nan or abs(metrics[name] - value) <= bound, (name, metrics, expected)


cases = st.fixed_dictionaries(
    {
        "count": st.integers(1, 6),
        "classes": st.integers(2, 5),
        "size": st.tuples(st.integers(1, 4), st.integers(1, 4)),
        "void": st.sampled_from([0.0, 0.3, 0.9, 1.1]),
        "seed": st.integers(0, 999),
        "dtype": st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    }
)


@settings(max_examples=60, deadline=None)
@given(cases, st.data())
def test_metrics_are_those_of_all_pixels_however_they_are_cut(case, data):
    use = data.draw(st.sets(st.integers(0, case["classes"] - 1), min_size=1).map(sorted))
    parts = data.draw(st.lists(st.integers(0, case["count"]), max_size=3))
    parts = [n for n in parts if n] or [case["count"]]
    parts = [*parts[: max(k for k in range(len(parts) + 1) if sum(parts[:k]) <= case["count"])]]
    parts += [case["count"] - sum(parts)] if sum(parts) < case["count"] else []
    guess, target = make(**case, use=use)
    for task in dense_tasks(classes=case["classes"]):
        metrics = streamed(task, guess[task.name], target[task.name], parts)
        assert_metrics(metrics, slow_metrics(task.name, guess[task.name], target[task.name]))


@settings(max_examples=40, deadline=None)
@given(cases)
def test_losses_are_means_over_known_pixels(case):
    guess, target = make(**case)
    for name, loss_function in LOSSES.items():
        loss = loss_function(guess[name], target[name])
        assert loss.shape == () and loss.dtype in (torch.float32, torch.float64)
        assert abs(float(loss) - slow_loss(name, guess[name], target[name])) < 2e-5


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_right(name):
    guess, target = make(2, 4, (3, 2), void=0.4, dtype=torch.float64)
    y = target[name] if name == "segmentation" else target[name].double()
    assert torch.autograd.gradcheck(lambda p: LOSSES[name](p, y), guess[name].requires_grad_())


@pytest.mark.parametrize("name", LOSSES)
def test_unknown_pixels_have_no_gradient(name):
    guess, target = make(3, 4, (5, 4), void=0.5)
    p, y = guess[name].requires_grad_(), target[name]
    (gradient,) = torch.autograd.grad(LOSSES[name](p, y), p)
    unknown = (y == 255) if name == "segmentation" else ~y.any(dim=1)
    assert unknown.any() and not gradient.movedim(1, -1)[unknown].any()
    assert gradient.movedim(1, -1)[~unknown].abs().sum(-1).min() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_without_a_known_pixel_has_loss_and_gradient_zero(name):
    guess, target = make(2, 3, (4, 4), void=1.1)
    p = guess[name].requires_grad_()
    loss = LOSSES[name](p, target[name])
    assert loss == 0 and not torch.autograd.grad(loss, p)[0].any()


def test_depth_at_an_invalid_pixel_may_be_anything():
    y = torch.tensor([2.0, 0.0]).view(1, 1, 1, 2)
    p = torch.tensor([2.5, math.nan]).view(1, 1, 1, 2).requires_grad_()
    loss = depth_loss(p, y)
    assert loss == 0.5 and torch.autograd.grad(loss, p)[0].flatten().tolist() == [1, 0]
    meter = DepthMeter()
    meter.update(p.detach(), y)
    assert meter.compute() == {"AErr": 0.5, "RErr": 0.25}


@pytest.mark.parametrize("length", [0.0, 1e-30, 1e-10, 1e-3, 1e6, 1e15])
def test_a_normal_of_any_length_has_a_finite_loss_and_gradient(length):
    y = torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1)
    p = (length * unit(torch.tensor([1.0, 1, -1]).view(1, 3, 1, 1))).requires_grad_()
    loss = normal_loss(p, y)
    (gradient,) = torch.autograd.grad(loss, p)
    assert 0 <= loss <= 1 and gradient.isfinite().all() and gradient.norm() <= 1.01e6
    if length >= 1e-3:
        assert_close(loss, torch.tensor(1 - 3**-0.5))
    if length == 0:
        assert loss == 1 and (gradient * y).sum() < 0  # descent moves it to the target
        assert angle_degrees(p, y) == 90


def test_perfect_predictions():
    _, target = make(4, 5, (30, 30), void=0.1)
    logits = (
        100
        * torch.nn.functional.one_hot(target["segmentation"].long() % 5, 5).movedim(-1, 1).float()
    )
    guess = {**target, "segmentation": logits, "normal": 0.37 * target["normal"]}
    for task in dense_tasks(classes=5):
        assert 0 <= float(task.loss(guess[task.name], target[task.name])) < 1e-6
        for metric, value in streamed(task, guess[task.name], target[task.name], 4).items():
            assert abs(value - (100 if task.directions[metric] == "up" else 0)) < 6e-4, metric


def test_rounding_never_makes_the_loss_of_a_right_normal_negative():
    y = unit(torch.randn(1, 3, 20, 20, generator=torch.Generator().manual_seed(0)))
    cosines = (y * y).sum(1) * (y * y).sum(1).rsqrt()
    losses = [normal_loss(n, n) for n in y.flatten(2).unsqueeze(-1).split(1, dim=2)]
    assert cosines.max() > 1 and min(losses) >= 0


# -------------------------------------------------------------------------------------- the meters


def test_miou_leaves_out_an_absent_class_and_counts_one_that_is_only_predicted():
    truth = torch.tensor([[[0, 0, 1, 1]]], dtype=torch.uint8)
    scores = torch.nn.functional.one_hot(torch.tensor([[[0, 0, 1, 2]]]), 5).movedim(-1, 1).float()
    meter = SegmentationMeter(5)
    meter.update(scores, truth)
    assert_close(meter.compute()["mIoU"], 100 * (1 + 1 / 2 + 0) / 3)  # classes 3 and 4 are nowhere
    assert meter.compute()["PAcc"] == 75


def test_miou_is_of_the_whole_split_not_a_mean_over_batches():
    scores = (
        torch.nn.functional.one_hot(torch.tensor([[[0, 0]], [[1, 0]]]), 2).movedim(-1, 1).float()
    )
    truth = torch.tensor([[[0, 0]], [[1, 1]]], dtype=torch.uint8)
    meter = SegmentationMeter(2)
    for index in ([0], [1]):
        meter.update(scores[index], truth[index])
    assert_close(meter.compute()["mIoU"], 100 * (2 / 3 + 1 / 2) / 2)


def test_errors_of_depth_are_weighted_by_pixels():
    y = torch.tensor([[1.0, 1, 1], [2, 0, 0]]).view(2, 1, 1, 3)
    p = torch.tensor([[2.0, 2, 2], [4, 9, 9]]).view(2, 1, 1, 3)
    meter = DepthMeter(relative_factor=100)
    for b in range(2):
        meter.update(p[b : b + 1], y[b : b + 1])
    assert meter.compute() == {"AErr": (3 * 1 + 2) / 4, "RErr": 100 * (3 * 1 + 1) / 4}


@pytest.mark.parametrize(
    "angles",
    [
        [0.0],
        [180.0],
        [0.0, 180.0],
        [11.25, 22.5, 30.0],
        np.linspace(0, 180, 2001),
        np.linspace(0, 0.02, 999),
        90 + 1e-3 * np.arange(50),
        np.repeat([14.0, 15.0], [500, 500]),
    ],
)
def test_median_is_within_half_a_thousandth_of_a_degree(angles):
    a = torch.tensor(np.deg2rad(np.array(angles, dtype=np.float64)))
    p = torch.stack([a.sin(), 0 * a, -a.cos()]).float().view(1, 3, 1, -1)
    meter = NormalMeter()
    meter.update(p, torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1).expand_as(p))
    metrics = meter.compute()
    assert abs(metrics["Median"] - np.median(angles)) <= 0.0005 + 2e-5
    assert abs(metrics["Mean"] - np.mean(angles)) <= 2e-5


def test_an_angle_on_a_limit_is_not_within_it():
    class Right(NormalMeter):
        limits = (90.0,)

    meter = Right()
    meter.update(
        torch.zeros(1, 3, 1, 1), torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1)
    )  # 90 degrees exactly
    assert meter.within.tolist() == [0]


def test_angles_are_good_where_the_arccosine_is_not():
    true = 10.0 ** torch.linspace(-5, 2, 50, dtype=torch.float64)
    a = torch.deg2rad(true)
    around = torch.linspace(0, 6, 50, dtype=torch.float64)
    p = torch.stack([a.sin() * around.cos(), a.sin() * around.sin(), -a.cos()]).view(1, 3, 1, 50)
    y = torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1).expand(1, 3, 1, 50)
    assert_close(angle_degrees(7 * p.float(), y).flatten().double(), true, rtol=1e-5, atol=2e-6)
    assert_close(angle_degrees(-p.float(), y).flatten().double(), 180 - true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_predictions_that_are_not_finite_give_metrics_that_are_not(bad):
    guess, target = make(2, 3, (4, 4), void=0.0)
    for task in dense_tasks(["depth", "normal"]):
        guess[task.name][0, 0, 1, 1] = bad
        metrics = streamed(task, guess[task.name], target[task.name], 1)
        assert not any(map(math.isfinite, metrics.values())), metrics


def test_a_prediction_that_is_not_finite_where_nothing_is_known_does_not_count():
    guess, target = make(2, 3, (4, 4), void=0.0)
    target["normal"][0, :, 1, 1] = 0
    before = streamed(*dense_tasks(["normal"]), guess["normal"], target["normal"], 1)
    guess["normal"][0, :, 1, 1] = math.nan
    assert streamed(*dense_tasks(["normal"]), guess["normal"], target["normal"], 1) == before


def test_meters_that_saw_nothing_say_nan():
    for task in dense_tasks():
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            assert all(map(math.isnan, task.meter().compute().values()))


def test_a_meter_may_be_read_in_between():
    guess, target = make(4, 3, (4, 4))
    for task in dense_tasks(classes=3):
        p, y, meter = guess[task.name], target[task.name], task.meter()
        meter.update(p[:2], y[:2])
        assert meter.compute() == meter.compute()
        assert_metrics(meter.compute(), streamed(task, p[:2], y[:2], 2))
        meter.update(p[2:], y[2:])
        assert_metrics(meter.compute(), streamed(task, p, y, 4))


# ----------------------------------------------------------------------------------- no host reads


class Operations(TorchDispatchMode):
    """Names of the operations, and how many elements their results have."""

    def __enter__(self):
        self.names, self.sizes = [], []
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.names.append(function.overloadpacket.__name__)
        old = [a.data_ptr() for a in args if torch.is_tensor(a)]
        self.sizes.append(
            result.numel() if torch.is_tensor(result) and result.data_ptr() not in old else 0
        )
        return result


READS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "item",
    "unique",
    "_unique2",
    "bincount",
}


def test_the_reading_test_can_fail():
    with Operations() as seen:
        torch.ones(2)[torch.tensor([True, False])].sum().item()
    assert READS & set(seen.names)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_and_meters_never_read_from_the_device(name):
    guess, target = make(2, 3, (4, 4))
    (task,) = dense_tasks([name], classes=3)
    meter = task.meter()
    p = guess[name].requires_grad_()
    with Operations() as seen:
        task.loss(p, target[name]).backward()
        with torch.no_grad():
            for _ in range(2):
                meter.update(p, target[name])
    assert len(seen.names) > 10 and not READS & set(seen.names)


@pytest.mark.parametrize("name, most", [("segmentation", 1), ("normal", 0)])
def test_losses_make_at_most_one_temporary_of_full_size(name, most):
    guess, target = make(2, 13, (32, 32))
    with Operations() as seen:
        LOSSES[name](guess[name], target[name])
    assert sum(n >= guess[name].numel() for n in seen.sizes) == most


# -------------------------------------------------------------------------------- tasks and floors


def test_names_and_directions_are_those_of_the_papers_tables():
    tasks = {task.name: task for task in dense_tasks()}
    nyuv2 = paper_directions("nyuv2")
    assert (
        {name: task.directions for name, task in tasks.items()}
        == nyuv2
        == paper_directions("nyuv2_segnet")
    )
    two = dense_tasks(["segmentation", "depth"])
    assert {task.name: task.directions for task in two} == paper_directions("cityscapes")
    guess, target = make(1, 13, (2, 2))
    for task in tasks.values():
        assert (
            list(streamed(task, guess[task.name], target[task.name], 1))
            == [metric.name for metric in task.metrics]
            == list(nyuv2[task.name])
        )


def test_the_papers_relative_errors_are_ratios():
    """0.16 and 43.5 are both mean |d - d^| / d; in percent they would be 16 and 4353."""
    for benchmark, low, high in (("nyuv2", 0.1, 0.3), ("cityscapes", 20, 60)):
        errors = [row["depth"]["RErr"] for row in paper_table(benchmark).values()]
        assert len(errors) > 10 and all(low < error < high for error in errors)


def test_task_names_and_shapes_are_checked():
    with pytest.raises(ValueError, match="did you mean 'segmentation'"):
        dense_tasks(["segmentations"])
    guess, target = make(2, 3, (4, 4))
    with pytest.raises(ValueError, match="3 channels, the meter 4 classes"):
        SegmentationMeter(4).update(guess["segmentation"], target["segmentation"])
    for task in dense_tasks(["depth", "normal"]):
        for call in (task.loss, task.meter().update):
            with pytest.raises(ValueError, match="differ in shape"):
                call(guess[task.name], target[task.name][..., :3])
    meter = SegmentationMeter(3)
    meter.update(guess["segmentation"], torch.full((2, 4, 4), 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="32 labels are neither below classes=3 nor 255"):
        meter.compute()


def split_of(seed, void=0.2):
    _, target = make(7, 4, (6, 5), void=void, seed=seed, use=[0, 2, 2, 2, 3])
    return TensorSplit(torch.zeros(7, 3, 6, 5), target)


@pytest.mark.parametrize("batch, void", [(2, 0.2), (7, 0.7), (100, 0.2)])
def test_floors_are_the_metrics_of_the_training_constants(batch, void):
    train = split_of(1, void)
    test = split_of(2)
    tasks = dense_tasks(classes=4)
    y = {name: target.double().numpy() for name, target in train.targets.items()}
    labels = y["segmentation"][y["segmentation"] != 255].astype(int)
    normals = y["normal"].transpose(0, 2, 3, 1).reshape(-1, 3)
    direction = normals[normals.any(1)].mean(0)
    constants = {
        "segmentation": np.eye(4)[np.bincount(labels).argmax()],
        "depth": y["depth"][y["depth"] != 0].mean(keepdims=True).reshape(1),
        "normal": direction / np.linalg.norm(direction),
    }
    predictions = constant_predictions(tasks, train, batch)
    floors = dense_floors(tasks, train, test, batch)
    for name, constant in constants.items():
        assert predictions[name].shape == (len(constant), 1, 1)
        assert_close(
            predictions[name].flatten().double(), torch.from_numpy(constant), rtol=1e-6, atol=1e-6
        )
        image = torch.from_numpy(constant).view(1, -1, 1, 1).expand(7, -1, 6, 5)
        assert_metrics(floors[name], slow_metrics(name, image, test.targets[name]))


def test_floors_of_training_images_without_a_known_pixel_are_still_numbers():
    tasks = dense_tasks(classes=4)
    floors = dense_floors(tasks, split_of(1, void=1.1), split_of(2))
    assert all(math.isfinite(value) for floor in floors.values() for value in floor.values())
    assert abs(floors["normal"]["Mean"] - 90) < 1e-4 and abs(floors["depth"]["RErr"] - 1) < 1e-6


@pytest.mark.cuda
def test_cuda_gives_the_same_numbers_without_a_synchronization():
    guess, target = make(3, 5, (20, 30))
    for task in dense_tasks(classes=5):
        p, y = guess[task.name], target[task.name]
        expected = streamed(task, p, y, 3)
        meter = task.meter()
        p = p.cuda().requires_grad_()
        y = y.cuda()
        torch.cuda.set_sync_debug_mode("error")
        try:
            loss = task.loss(p, y)
            loss.backward()
            with torch.no_grad():
                meter.update(p[:1], y[:1])
                meter.update(p[1:], y[1:])
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert_close(loss.cpu(), task.loss(guess[task.name].detach(), target[task.name]))
        assert_metrics(meter.compute(), expected)
