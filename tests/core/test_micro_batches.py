"""Micro-batches of unequal size, and with unequal numbers of valid targets, against the whole
batch."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import DBMTL, Balancer, Identity, Log, MaxNorm, Sum, make_balancer
from dbmtl.core.grad_scale import GradScale
from dbmtl.core.micro_batches import MicroBatches

METHODS = ["EW", "loss-only", "gradient-only", "DB-MTL", "IMTL-L"]
NAMES = ("depth", "normal", "edge")
CUTS = [3, 1, 8]  # sizes of the micro-batches


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(4, 6), nn.Tanh())
        self.heads = nn.ModuleList(nn.Linear(6, 5) for _ in NAMES)

    def losses(self, x, y, valid):
        """The mean of squares over each task's valid pixels; NaN where a task has none."""
        z = self.trunk(x)
        return [((h(z) - y[t]) ** 2)[valid[t]].mean() for t, h in enumerate(self.heads)]


def net():
    torch.manual_seed(1)
    return Net().double()


def batch(seed=0, partial=True):
    """Twelve images of five pixels; task t's valid pixels are a part that differs a lot between
    images."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(CUTS), 4, generator=g, dtype=torch.float64)
    y = (
        torch.randn(3, sum(CUTS), 5, generator=g, dtype=torch.float64)
        + torch.arange(sum(CUTS))[:, None]
    )
    share = torch.rand(3, sum(CUTS), 1, generator=g)
    valid = (
        torch.rand(3, sum(CUTS), 5, generator=g) < share
        if partial
        else torch.ones(3, sum(CUTS), 5, dtype=torch.bool)
    )
    valid[:, -1, 0] = True
    valid[1, :3] = not partial  # in the first micro-batch the second task has nothing
    return x, y, valid


def pieces(x, y, valid):
    return zip(x.split(CUTS), y.split(CUTS, 1), valid.split(CUTS, 1), strict=True)


def counts(valid):
    return valid.sum((1, 2))


def run(method, size, partial=True, steps=3, form=list, **options):
    """Three steps of a whole batch (size None) or of its micro-batches, each with `size` of its
    valid pixels."""
    model = net()
    balancer = make_balancer(method, shared=model.trunk, num_tasks=3, **options)
    sgd, grads = torch.optim.SGD([*model.parameters(), *balancer.parameters()], 1e-3), []
    for seed in range(steps):
        data = batch(seed, partial)
        if size is None:
            balancer.backward(form(model.losses(*data)))
        else:
            for piece in pieces(*data):
                balancer.accumulate(form(model.losses(*piece)), size(piece[2]))
            balancer.backward()
        grads.append(
            [p.grad.clone() for p in model.parameters()]
            + [p.grad.clone() for p in balancer.parameters()]
        )
        sgd.step()
        sgd.zero_grad()
    return grads, balancer.slopes, balancer.weights


@pytest.mark.parametrize("grads", ["loop", "split", "batched"])
@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_equal_the_whole_batch(method, grads):
    assert_close(run(method, counts, grads=grads), run(method, None), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("form", [
    torch.stack,
    tuple,
    lambda losses: dict(zip(NAMES, losses, strict=True)),
    lambda losses: [loss.reshape(1) for loss in losses],
], ids=["stack", "tuple", "dict", "shape [1]"])  # fmt: skip
def test_micro_batches_of_every_form(form):
    assert_close(run("DB-MTL", counts, form=form), run("DB-MTL", None), rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("size", [
    lambda valid: valid.shape[1],
    lambda valid: torch.tensor(valid.shape[1]),
    lambda valid: [float(valid.shape[1])] * 3,
    lambda valid: counts(valid).tolist(),
    lambda valid: tuple(counts(valid)),
    lambda valid: counts(valid).numpy(),
], ids=["number", "0-d tensor", "list", "counts", "tuple of tensors", "numpy"])  # fmt: skip
def test_sizes_of_every_form(size):
    """Where every pixel is valid, the number of images is as good as that of pixels."""
    assert_close(
        run("DB-MTL", size, partial=False),
        run("DB-MTL", None, partial=False),
        rtol=1e-11,
        atol=1e-13,
    )


def test_sizes_by_name():
    named = lambda values: dict(zip(NAMES, values, strict=True))  # noqa: E731
    found = run("DB-MTL", lambda valid: dict(reversed(named(counts(valid)).items())), form=named)
    assert_close(found, run("DB-MTL", None), rtol=1e-11, atol=1e-13)


def test_the_number_of_images_is_a_wrong_size_by_tens_of_percent():
    def error(size):
        data, grads = batch(3), []
        for whole in (True, False):
            model = net()
            balancer = make_balancer("gradient-only", shared=model.trunk, num_tasks=3)
            if whole:
                balancer.backward(model.losses(*data))
            else:
                for piece in pieces(*data):
                    losses = [torch.nan_to_num(loss) for loss in model.losses(*piece)]
                    balancer.accumulate(losses, size(piece[2]))
                balancer.backward()
            grads.append(torch.cat([p.grad.reshape(-1) for p in model.parameters()]))
        return ((grads[0] - grads[1]).norm() / grads[0].norm()).item()

    assert error(counts) < 1e-12
    assert 0.1 < error(lambda valid: valid.shape[1])


def test_one_micro_batch_is_an_ordinary_step():
    for method in METHODS:
        model = net()
        other = net()
        balancer = make_balancer(method, shared=model.trunk, num_tasks=3)
        plain = make_balancer(method, shared=other.trunk, num_tasks=3)
        data = batch(partial=False)
        balancer.accumulate(model.losses(*data), 7)
        balancer.backward()
        plain.backward(other.losses(*data))
        assert_close([p.grad for p in model.parameters()], [p.grad for p in other.parameters()])
        assert balancer.step == plain.step == 1


def test_nothing_is_written_before_the_step_is_finished():
    model = net()
    balancer = make_balancer("DB-MTL", shared=model.trunk, num_tasks=3)
    for piece in pieces(*batch()):
        balancer.accumulate(model.losses(*piece), counts(piece[2]))
        assert all(p.grad is None for p in model.parameters())
        assert balancer.step == 0 and not balancer.ema.rows
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    balancer.backward()
    fresh, _, _ = run("DB-MTL", counts, steps=1)
    assert_close([p.grad - 1 for p in model.parameters()], fresh[0])


def test_a_task_without_targets_may_have_a_nan_or_constant_loss():
    for empty in (
        torch.tensor(float("nan"), dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    ):
        model = net()
        balancer = make_balancer("DB-MTL", shared=model.trunk, num_tasks=3)
        first, second, third = pieces(*batch())
        losses = model.losses(*first)
        balancer.accumulate([losses[0], empty, losses[2]], counts(first[2]))
        for piece in (second, third):
            balancer.accumulate(model.losses(*piece), counts(piece[2]))
        balancer.backward()
        assert_close([p.grad for p in model.parameters()], run("DB-MTL", None, steps=1)[0][0])


def test_a_loss_that_counts_nothing_does_not_enter_the_sum():
    held = MicroBatches(2)
    held.add_losses(torch.tensor([1.0, torch.nan]), torch.tensor([2.0, 0.0]), NAMES[:2])
    held.add_losses(torch.tensor([4.0, 3.0]), torch.tensor([1.0, 4.0]), NAMES[:2])
    held.leave_out_empty()
    assert held.tasks is None
    assert_close(held.values, torch.tensor([2.0, 3.0]))


def test_micro_batches_without_anything_change_nothing():
    model = net()
    balancer = make_balancer("DB-MTL", shared=model.trunk, num_tasks=3)
    for piece in pieces(*batch()):
        balancer.accumulate(model.losses(*pieces_without(piece)), 0)
        balancer.accumulate(model.losses(*piece), counts(piece[2]))
    balancer.backward()
    assert_close([p.grad for p in model.parameters()], run("DB-MTL", None, steps=1)[0][0])


def pieces_without(piece):
    x, y, valid = piece
    return x, y, torch.zeros_like(valid)


@pytest.mark.parametrize("transform", [Identity, Log])
@pytest.mark.parametrize("aggregator", [Sum, MaxNorm])
def test_slopes_are_taken_once_at_the_accumulated_losses(transform, aggregator):
    """The log of the mean, not the mean of the logs."""
    theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
    balancer = Balancer(transform(), aggregator(), shared=[theta], num_tasks=1)
    for value, size in ((1.0, 1), (4.0, 3)):
        balancer.accumulate([theta + value], size)
    balancer.backward()
    assert_close(
        balancer.slopes, torch.tensor([1 / (3.25 + 1e-8) if transform is Log else 1.0]).double()
    )


# ------------------------------------------------------------------------------------------ errors


def started():
    model = net()
    balancer = make_balancer("DB-MTL", shared=model.trunk, num_tasks=3)
    data = list(pieces(*batch()))
    balancer.accumulate(model.losses(*data[0]), counts(data[0][2]))
    return model, balancer, data


def test_accumulated_losses_must_be_finished_without_losses():
    model, balancer, data = started()
    with pytest.raises(
        RuntimeError, match="accumulate.. was called: finish with backward.. without losses"
    ):
        balancer.backward(model.losses(*data[2]))
    with pytest.raises(RuntimeError, match="state_dict.. between accumulate.. and backward"):
        balancer.state_dict()


def test_there_must_be_something_to_finish():
    balancer = make_balancer("DB-MTL", shared=net().trunk, num_tasks=3)
    with pytest.raises(RuntimeError, match="backward.. without losses finishes accumulate"):
        balancer.backward()


@pytest.mark.parametrize("size, message", [
    ([1, 2], "expected 3 sizes, got 2"),
    ([1, 2, 3, 4], "expected 3 sizes, got 4"),
    ([1, -2, 3], "the size of task 1 is -2; it must be a count"),
    (-1, "the size of task 0 is -1"),
    (float("nan"), "the size of task 0 is nan"),
    ([1, float("inf"), 1], "the size of task 1 is inf"),
    (torch.ones(2), "expected 3 sizes, got 2"),
    ({0: 1, 1: 2}, "sizes"),
])  # fmt: skip
def test_wrong_sizes_are_named(size, message):
    model, balancer, data = started()
    with pytest.raises(ValueError, match=message):
        balancer.accumulate(model.losses(*data[2]), size)


def test_a_bad_micro_batch_is_named_and_can_be_left_out():
    model, balancer, data = started()
    for value in (float("nan"), float("inf")):
        with pytest.raises(FloatingPointError, match=f"the loss of task 2 is {value}"):
            losses = model.losses(*data[1])
            balancer.accumulate([losses[0], losses[1], losses[2] * value], [1, 1, 1])
    with pytest.raises(ValueError, match="expected 3 losses, got 2"):
        balancer.accumulate(model.losses(*data[1])[:2], 1)
    for piece in data[1:]:
        balancer.accumulate(model.losses(*piece), counts(piece[2]))
    balancer.backward()
    assert_close([p.grad for p in model.parameters()], run("DB-MTL", None, steps=1)[0][0])


def test_a_task_that_no_micro_batch_counted_is_named():
    model, balancer, data = started()  # in the first micro-batch the second task has nothing
    with pytest.raises(ValueError, match=r"no micro-batch had anything to count for tasks \[1\]"):
        balancer.backward()
    assert all(p.grad is None for p in model.parameters()) and balancer.step == 0
    for piece in data[1:]:
        balancer.accumulate(model.losses(*piece), counts(piece[2]))
    balancer.backward()
    assert_close([p.grad for p in model.parameters()], run("DB-MTL", None, steps=1)[0][0])


def test_an_accumulated_loss_outside_the_domain_is_named_and_nothing_changed():
    theta = nn.Parameter(torch.zeros((), dtype=torch.float64))
    balancer = make_balancer("DB-MTL", shared=[theta], num_tasks=2)
    balancer.accumulate([theta - 1, theta + 1], 1)  # one part may be negative
    with pytest.raises(ValueError, match="the loss of task 0 is -1"):
        balancer.backward()
    assert theta.grad is None and balancer.step == 0 and not balancer.ema.rows
    balancer.accumulate([theta + 5, theta + 1], 1)
    balancer.backward()
    assert_close(balancer.slopes, torch.tensor([0.5, 1.0]).double())


@pytest.mark.parametrize("order", [(True, False), (False, True)])
def test_a_scaler_that_accumulated_once_must_finish_the_step(order):
    theta = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    balancer = DBMTL(shared=[theta], num_tasks=2)
    for is_scaled in order:
        losses = [theta.square().sum(), theta.sum()]
        balancer.accumulate(losses, 4, scaler=scaler if is_scaled else None)
    with pytest.raises(ValueError, match="give it to backward.. as well"):
        balancer.backward()


def test_a_scaler_that_accumulated_must_finish_the_step():
    """Without it `.grad` would be unscaled, and `scaler.step` would divide it once more."""
    theta = torch.nn.Parameter(torch.ones(2))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    balancer = DBMTL(shared=[theta], num_tasks=2)

    def accumulate(scaler):
        balancer.accumulate([theta.square().sum(), theta.sum()], 4, scaler=scaler)

    accumulate(None)
    accumulate(scaler)
    with pytest.raises(ValueError, match="give it to backward.. as well"):
        balancer.backward()
    assert theta.grad is None
    balancer.backward(scaler=scaler)
    scaled = theta.grad.clone()
    theta.grad = None
    again = DBMTL(shared=[theta], num_tasks=2)
    again.backward([theta.square().sum(), theta.sum()])
    torch.testing.assert_close(scaled, 1024 * theta.grad)


def test_a_step_begun_in_pieces_names_both_ways_out():
    theta = torch.nn.Parameter(torch.ones(2))
    balancer = DBMTL(shared=[theta], num_tasks=2)
    losses = [theta.square().sum(), theta.sum()]
    balancer.accumulate(losses, 4)
    with pytest.raises(RuntimeError, match=r"finish with backward\(\).*discard\(\)"):
        balancer.backward([theta.square().sum(), theta.sum()])
    balancer.discard()
    balancer.backward([theta.square().sum(), theta.sum()])


def test_a_weighted_sum_without_the_first_task():
    """Weights and counts are those of the tasks of the step, in their order."""
    theta = torch.zeros(1, requires_grad=True)
    head = torch.zeros(1, requires_grad=True)
    held = MicroBatches(3)
    for t, size, slope in ((1, 2.0, 3.0), (2, 4.0, 5.0)):
        gradient = torch.tensor([slope])
        held.add_gradients(t, torch.tensor(size), {0: gradient}, {head: 2 * gradient})
    held.add_losses(torch.ones(3), torch.tensor([0.0, 2.0, 4.0]), NAMES)
    held.leave_out_empty()
    slopes = torch.tensor([1.0, 1.0, 0.5])
    weights = torch.tensor([10.0, 100.0])
    head_weights = torch.tensor([7.0, 11.0])
    scale = GradScale(None, "cpu")
    total = held.weighted_sum(slopes, weights, head_weights, [theta], scale)
    assert_close(total[theta], torch.tensor([10 * 3.0 + 100 * 0.5 * 5.0]))
    assert_close(total[head], torch.tensor([7 * 6.0 + 11 * 0.5 * 10.0]))
    plain = held.weighted_sum(slopes, weights, None, [theta], scale)
    assert_close(plain[head], torch.tensor([6.0 + 0.5 * 10.0]))
