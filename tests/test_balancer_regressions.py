"""One test for each fault that a review found in the balancer, so that none comes back."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import DBMTL, EMA, Aggregator, Balancer, Identity, Log, MaxNorm, Sum, Transform, make_balancer


def net():
    torch.manual_seed(0)
    return nn.ModuleDict({"trunk": nn.Linear(3, 4), "a": nn.Linear(4, 1), "b": nn.Linear(4, 1)})


def losses_of(model, rows=slice(None)):
    z = model["trunk"](torch.linspace(-1, 1, 15).view(5, 3)[rows]).tanh()
    return {name: (model[name](z) - 1).square().mean() for name in "ab"}


def test_accumulate_does_not_scale_the_pass_by_the_count():
    """A count of a hundred thousand pixels times a scale of 65536 has no place in float16."""
    model, seen = net(), []
    losses = losses_of(model)
    losses["a"].register_hook(lambda g: seen.append(g.item()))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    balancer.accumulate(losses, 1e5, scaler=scaler)
    assert seen == [2.0**10]


def test_accumulate_with_a_task_left_out_names_the_right_task():
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    losses = losses_of(model)
    with pytest.raises(ValueError, match="loss 'b' does not require grad"):
        balancer.accumulate({"a": losses["a"], "b": losses["b"].detach()}, {"a": 0, "b": 3})


def test_a_first_step_that_is_refused_leaves_no_description():
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    before, losses = balancer.describe(), losses_of(model)
    with pytest.raises(FloatingPointError, match="task 'b'"):
        balancer.backward({"a": losses["a"], "b": losses["b"] * float("nan")})
    assert balancer.describe() == before and "known after" in before


class Refusing(Aggregator):
    needs = "norms"

    def forward(self, norms, losses):
        raise RuntimeError("did not converge")


def test_an_aggregator_that_raises_leaves_the_average_alone():
    """Without saying anything about itself: an aggregator is taken to be able to fail."""
    model = net()
    balancer = Balancer(Log(), MaxNorm(), shared=model["trunk"], num_tasks=2, ema=EMA())
    balancer.backward(losses_of(model))
    before = copy.deepcopy(balancer.ema.rows)
    balancer.aggregator = Refusing()
    with pytest.raises(RuntimeError, match="did not converge"):
        balancer.backward(losses_of(model))
    assert_close(balancer.ema.rows, before, rtol=0, atol=0)
    assert balancer.step == 1


class HalfUsed(Transform):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))

    def forward(self, losses):
        return self.used * losses


def test_a_learned_scale_that_is_not_used_gets_a_zero_gradient():
    model = net()
    balancer = Balancer(HalfUsed(), Sum(), shared=model["trunk"], num_tasks=2)
    balancer.backward(losses_of(model))
    assert_close(balancer.transform.unused.grad, torch.zeros(2))
    assert balancer.transform.used.grad.abs().min() > 0


def test_a_state_does_not_depend_on_how_a_number_was_written():
    model = net()
    state = DBMTL(shared=model["trunk"], num_tasks=2, beta=0.5, beta_decay=0).state_dict()
    DBMTL(shared=model["trunk"], num_tasks=2, beta=0.5, beta_decay=0.0).load_state_dict(state)
    make_balancer("DB-MTL", shared=model["trunk"], num_tasks=2, beta_decay=0).load_state_dict(state)


def test_micro_batches_can_be_dropped():
    model = net()
    balancer = DBMTL(shared=model["trunk"], num_tasks=2)
    balancer.accumulate(losses_of(model, slice(0, 2)), 2)
    balancer.discard()
    balancer.backward(losses_of(model))
    plain = net()
    DBMTL(shared=plain["trunk"], num_tasks=2).backward(losses_of(plain))
    assert_close([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])


def test_sizes_follow_the_order_of_the_losses_they_came_with():
    grads = []
    for order in ("ab", "ba"):
        model = net()
        balancer = Balancer(Identity(), MaxNorm(), shared=model["trunk"], num_tasks=2)
        for rows, sizes in ((slice(0, 1), {"a": 1, "b": 4}), (slice(1, 5), {"a": 4, "b": 1})):
            losses = losses_of(model, rows)
            first_is_ab = order if balancer.step == 0 and balancer._held else "ab"
            balancer.accumulate({n: losses[n] for n in first_is_ab}, [sizes[n] for n in first_is_ab])
        balancer.backward()
        grads.append([p.grad for p in model.parameters()])
    assert_close(*grads)


@pytest.mark.parametrize("shared, message", [("tensor", "one tensor"), ("names", "must hold parameters, got tuple")])
def test_what_is_no_list_of_parameters_is_refused(shared, message):
    model = net()
    given = model["trunk"].weight if shared == "tensor" else model["trunk"].named_parameters()
    with pytest.raises(TypeError, match=message):
        DBMTL(shared=given, num_tasks=2)


def test_sparse_gradients_are_refused_in_words():
    trunk = nn.Embedding(5, 3, sparse=True)
    z = trunk(torch.tensor([1, 2]))
    with pytest.raises(ValueError, match="sparse"):
        DBMTL(shared=trunk, num_tasks=2).backward([z.square().sum(), z.abs().sum()])


@pytest.mark.filterwarnings("error")
def test_an_input_that_asks_for_gradients_is_no_forgotten_layer():
    model, x = net(), torch.ones(2, 3, requires_grad=True)
    z = model["trunk"](x)
    DBMTL(shared=model["trunk"], num_tasks=2).backward([model[n](z).square().sum() for n in "ab"])
    assert x.grad is not None


def test_describe_tells_of_a_whole_model_given_as_shared():
    model = net()
    balancer = DBMTL(shared=model, num_tasks=2)
    balancer.backward(losses_of(model))
    assert "in shared, but reached by a alone: 2 tensors, 5 parameters" in balancer.describe()


@pytest.mark.parametrize("number", ["2", 2.0, 0, -1])
def test_num_tasks_is_a_whole_number_from_one(number):
    with pytest.raises(ValueError, match="num_tasks must be a whole number from 1, got"):
        DBMTL(shared=net()["trunk"], num_tasks=number)


def test_an_empty_state_is_refused_in_words():
    with pytest.raises(ValueError, match="state of another balancer: num_tasks is None"):
        DBMTL(shared=net()["trunk"], num_tasks=2).load_state_dict({})


def test_describe_counts_tasks_and_not_commas():
    model = net()
    balancer = DBMTL(shared=model, num_tasks=2)
    losses = losses_of(model)
    balancer.backward({"depth, in meters": losses["a"], "b": losses["b"]})
    assert "in shared, but reached by depth, in meters alone: 2 tensors, 5 parameters" in balancer.describe()
