"""What a user does on one of two ranks alone: the right numbers, or an error on both, never a wait.

Every case takes three steps, the second of which is spoiled on one rank, and tells what each rank
was told; a rank that waits for the other to the timeout is told so by gloo, not by us.
"""

import functools
import itertools
import warnings

import pytest
import torch
from helpers.methods import same
from helpers.ranks import Net, accumulate_by_sample, agree, batch, make, part, tensors
from torch import distributed as dist
from torch import nn

from dbmtl import DBMTL, EMA, Balancer, Log, make_balancer
from dbmtl.gradient_balancing.max_norm import MaxNorm
from dbmtl.gradient_balancing.sum import Sum

pytestmark = pytest.mark.full  # starts processes


def told(pools, function, *arguments, **options):
    """What both ranks raised, one line each; None where a rank raised nothing."""
    errors = [error for _, error in pools(2).answers_of(function, *arguments, **options)]
    return [None if error is None else error.splitlines()[0] for error in errors]


def raised_alike(pools, words, function, *arguments, **options):
    """Both ranks raise an error of ours with these words."""
    for error in told(pools, function, *arguments, **options):
        assert error is not None and words in error, error


def steps(rank, size, balancer, model, count=3, spoil=None, data=None):
    """Some steps; before the second `spoil` is called on rank 1."""
    for seed in range(count):
        if seed == 1 and rank == 1 and spoil is not None:
            spoil()
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x)
        features = {"features": z} if balancer.level == "features" else {}
        balancer.backward(model.losses(z, y, valid), size=valid.sum(1), **features)
    return model.grads()


# settings that differ


def other_settings(rank, size, option, values):
    model = Net()
    balancer = make("DB-MTL", model, **{option: values[rank]})
    steps(rank, size, balancer, model)


@pytest.mark.parametrize(
    "option, values",
    [("check", ("now", "later")), ("check", ("off", "now")), ("head_losses", ("raw", "log"))],
)
def test_settings_that_decide_what_is_raised_or_written(pools, option, values):
    words = f"rank 1 is not like rank 0: {option} is {values[1]}, there {values[0]}"
    raised_alike(pools, words, other_settings, option, values)


def other_number_of_tasks(rank, size):
    trunk = nn.Linear(4, 3)
    tasks = 20 if rank else 2
    balancer = DBMTL(shared=trunk, num_tasks=tasks)
    balancer.backward([trunk(torch.ones(2, 4)).square().mean() + t for t in range(tasks)])


def test_many_tasks_on_one_rank_and_few_on_the_other(pools):
    raised_alike(pools, "num_tasks is 20, there 2", other_number_of_tasks)


# networks that differ


def other_dtype(rank, size, what, later):
    model = Net()

    def convert():
        {"model": model, "trunk": model.trunk, "heads": model.heads}[what].float()

    if not later and rank == 1:
        convert()
    name = "EW" if later else "DB-MTL"  # remembers nothing for the trunk
    balancer = make(name, model)
    for seed in range(3):
        if later and seed == 1 and rank == 1:
            convert()
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x.to(model.trunk[0].weight.dtype)).to(model.heads[0].weight.dtype)
        balancer.backward(model.losses(z, y, valid), size=valid.sum(1))


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("what", ["model", "trunk", "heads"])
def test_another_type_of_number_on_one_rank(pools, what, later):
    raised_alike(pools, "float32", other_dtype, what, later)


def frozen(rank, size, name, what, ema=False):
    model = Net()
    balancer = make(name, model)

    def freeze():
        part = {"layer": model.trunk[0], "trunk": model.trunk, "head": model.heads[1]}[what]
        part.requires_grad_(False)

    return steps(rank, size, balancer, model, spoil=freeze)


@pytest.mark.parametrize("name", ["DB-MTL", "EW", "CAGrad", "MGDA-UB", "MoCo"])
@pytest.mark.parametrize("what", ["layer", "trunk"])
def test_a_trunk_that_is_frozen_on_one_rank(pools, name, what):
    for error in told(pools, frozen, name, what):
        assert "require" in error or "frozen" in error or "reach" in error, error


def frozen_unused(rank, size):
    """A layer of `shared` that no loss reaches any more, and that one rank freezes."""
    model = Net()
    shared = [*model.trunk.parameters(), *model.spare.parameters()]
    balancer = make_balancer("DB-MTL", shared=shared, num_tasks=3)
    for seed in range(3):
        if seed == 1 and rank == 1:
            model.spare.requires_grad_(False)
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x)
        if seed == 0:
            z = z + model.spare(x)
        balancer.backward(model.losses(z, y, valid), size=valid.sum(1))


def test_a_remembered_layer_that_is_frozen_on_one_rank(pools):
    words = "shared parameter 4 is float64 [3, 4], frozen, there float64 [3, 4]"
    raised_alike(pools, words, frozen_unused)


@pytest.mark.parametrize("name", ["DB-MTL", "EW", "MGDA-UB"])
def test_a_head_that_is_frozen_on_one_rank(pools, name):
    words = "rank 1 is not like rank 0: parameter 2 outside of shared is float64 [2"
    raised_alike(pools, words, frozen, name, "head")


def other_heads(rank, size, name, give_model, order):
    """Heads that are not those of rank 0, or losses in another order."""
    model = Net()
    if rank == 1 and not order:
        torch.manual_seed(99)
        for head in model.heads:
            head.reset_parameters()
    options = {"model": model} if give_model else {}
    balancer = make(name, model, **options)
    x, y, valid = part(batch(0), rank, size)
    z = model.features(x)
    losses = model.losses(z, y, valid)
    counts = valid.sum(1)
    if rank == 1 and order:
        losses = losses[::-1]
        counts = counts.flip(0)
    features = {"features": z} if balancer.level == "features" else {}
    balancer.backward(losses, size=counts, **features)


@pytest.mark.parametrize("name", ["DB-MTL", "EW", "MGDA-UB"])
@pytest.mark.parametrize("give_model", [False, True])
@pytest.mark.parametrize("order", [False, True])
def test_heads_that_are_not_those_of_the_other_rank(pools, name, give_model, order):
    for error in told(pools, other_heads, name, give_model, order):
        assert error is not None and "rank 1" in error
        assert "the head of task" in error or "the parameters of the model" in error


# states


def loaded_on_one_rank(rank, size, name):
    model = Net()
    balancer = make(name, model)
    steps(rank, size, balancer, model, 2)
    state = balancer.state_dict()
    if rank == 1:
        balancer.load_state_dict(state)
    steps(rank, size, balancer, model, 1)


def loaded_before_the_first_step(rank, size, name):
    model = Net()
    alone = make(name, model, process_group=False)
    steps(0, 1, alone, model, 2)
    balancer = make(name, model)
    if rank == 1:
        balancer.load_state_dict(alone.state_dict())
    steps(rank, size, balancer, model, 1)


@pytest.mark.parametrize("name", ["DB-MTL", "EW"])
def test_a_state_that_is_loaded_on_one_rank_alone(pools, name):
    raised_alike(pools, "not at the same place", loaded_on_one_rank, name)
    raised_alike(pools, "step is 2, there 0", loaded_before_the_first_step, name)


def other_state(rank, size, options):
    """States of two runs that took as many steps on other data."""
    model = Net()
    alone = make("DB-MTL", model, process_group=False, **options)
    for seed in range(2):
        x, y, valid = batch(seed + 10 * rank)
        alone.backward(model.losses(model.features(x), y, valid))
    balancer = make("DB-MTL", model, **options)
    balancer.load_state_dict(alone.state_dict())
    steps(rank, size, balancer, model, 1)


@pytest.mark.parametrize(
    "options, words", [({}, "averages"), ({"beta": 0, "update_every": 3}, "weights")]
)
def test_states_of_other_runs(pools, options, words):
    raised_alike(pools, words, other_state, options)


# calls that differ


def without_an_end_of_epoch(rank, size, name):
    model = Net()
    balancer = make(name, model)
    steps(rank, size, balancer, model, 1)
    if rank == 0:
        balancer.end_epoch()
    steps(rank, size, balancer, model, 1)


@pytest.mark.parametrize("name", ["DWA", "DB-MTL"])
def test_a_rank_that_ends_no_epoch(pools, name):
    raised_alike(pools, "not at the same place", without_an_end_of_epoch, name)


def other_scale(rank, size, name):
    model = Net()
    balancer = make(name, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0 * (1 + rank))
    x, y, valid = part(batch(0), rank, size)
    z = model.features(x)
    features = {"features": z} if balancer.level == "features" else {}
    balancer.backward(model.losses(z, y, valid), size=valid.sum(1), scaler=scaler, **features)
    return model.grads()


@pytest.mark.parametrize("name", ["DB-MTL", "EW", "MGDA-UB"])
def test_scalers_with_other_factors(pools, name):
    raised_alike(pools, "rank 1 is not like rank 0: the factor of the scaler", other_scale, name)


def scaled_on_one_rank(rank, size):
    model = Net()
    balancer = make("DB-MTL", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0) if rank else None
    x, y, valid = part(batch(0), rank, size)
    balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1), scaler=scaler)


def test_a_scaler_on_one_rank_alone(pools):
    raised_alike(pools, "rank 1 is not like rank 0: the factor of the scaler", scaled_on_one_rank)


def accumulated_on_one_rank(rank, size, name):
    """Rank 1 accumulates, sample by sample, what rank 0 has in one batch."""
    model = Net()
    balancer = make(name, model)
    seen = []
    for seed in range(3):
        data = x, y, valid = part(batch(seed), rank, size)
        if rank == 1:
            accumulate_by_sample(model, balancer, data)
            balancer.backward()
        else:
            losses = model.losses(model.features(x), y, valid)
            balancer.backward(losses, size=valid.sum(1))
        seen.append([model.grads(), balancer.slopes, balancer.log()])
    return seen


@pytest.mark.parametrize("name", ["DB-MTL", "EW", "loss-only", "UW", "GradDrop"])
def test_micro_batches_on_one_rank_alone(pools, name):
    """Methods that weigh losses run a pass for each task then, on both ranks."""
    agree(pools(2).run(accumulated_on_one_rank, name), accumulated_on_one_rank(0, 1, name))


def counted_on_one_rank(rank, size):
    """Rank 1 accumulates with counts, and rank 0 says nothing of its own."""
    model = Net()
    balancer = make("DB-MTL", model)
    x, y, valid = part(batch(0), rank, size)
    losses = model.losses(model.features(x), y, valid)
    if rank == 1:
        balancer.accumulate(losses, valid.sum(1))
        losses = None
    balancer.backward(losses)


def test_counts_on_one_rank_alone(pools):
    raised_alike(pools, "not at the same place", counted_on_one_rank)


# what is missing, or not a number, on one rank


def missing_on_one_rank(rank, size, name, check):
    """Rank 1 has no loss of the second task from the second step on."""
    model = Net()
    balancer = make(name, model, check=check, model=model)
    seen = []
    for seed in range(3):
        x, y, valid = batch(seed)
        if seed:
            valid[1, 9:] = False
        x, y, valid = part((x, y, valid), rank, size)
        z = model.features(x)
        losses = model.losses(z, y, valid)
        losses = [loss if n else None for loss, n in zip(losses, valid.sum(1), strict=True)]
        features = {"features": z} if balancer.level == "features" else {}
        balancer.backward(losses, size=valid.sum(1), **features)
        balancer.verify()
        seen.append([model.grads(), balancer.slopes, balancer.log()])
    return seen


@pytest.mark.parametrize("check", ["later", "off"])
@pytest.mark.parametrize("name", ["DB-MTL", "EW", "CAGrad", "MGDA-UB", "PCGrad", "UW"])
def test_a_task_that_is_missing_on_one_rank_without_a_look(pools, name, check):
    one = missing_on_one_rank(0, 1, name, check)
    agree(pools(2).run(missing_on_one_rank, name, check), one)


class SyncBatchNorm(torch.autograd.Function):
    """What tells the graph that passes wait for each other; the real one needs a GPU."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(torch.zeros(1))
        return gradient


def missing_with_sums_in_every_pass(rank, size, name, missing):
    """A trunk whose passes sum over the ranks, and rank 1 lacks some losses."""
    model = Net()
    balancer = make(name, model, model=model)
    x, y, valid = part(batch(0), rank, size)
    z = SyncBatchNorm.apply(model.features(x))
    losses = model.losses(z, y, valid)
    counts = valid.sum(1)
    if rank == 1:
        losses = [None if t in missing else loss for t, loss in enumerate(losses)]
        counts = [0 if t in missing else n for t, n in enumerate(counts)]
    balancer.backward(losses, size=counts)
    return model.grads()


def test_passes_that_wait_for_each_other_need_every_loss_on_every_rank(pools):
    words = (
        "SyncBatchNorm sums over the ranks in every pass, so every task needs a loss on every rank"
    )
    for name, missing in (("DB-MTL", (1,)), ("EW", (0, 1, 2))):
        raised_alike(
            pools, f"{words}; missing on rank 1", missing_with_sums_in_every_pass, name, missing
        )
    for name, missing in (("DB-MTL", ()), ("EW", (1,))):
        agree(
            pools(2).run(missing_with_sums_in_every_pass, name, missing)[:1],
            pools(2).run(missing_with_sums_in_every_pass, name, missing)[1],
        )


def real_sums_in_every_pass(rank, size):
    """The trunk with torch's own SyncBatchNorm."""
    model = Net()
    model.trunk = nn.SyncBatchNorm.convert_sync_batchnorm(
        nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    )
    x, y, valid = part(batch(0), rank, size)
    balancer = make("DB-MTL", model)
    balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))


def test_the_real_thing_refuses_its_forward_on_the_cpu(pools):
    """So it raises on all ranks alike, before the balancer is called."""
    raised_alike(pools, "SyncBatchNorm expected input tensor to be on", real_sums_in_every_pass)


def with_batch_norm(rank, size):
    """A plain batch norm: the statistics are those of the rank's own samples."""
    model = Net()
    norm = nn.BatchNorm1d(3).double()
    model.trunk = nn.Sequential(nn.Linear(4, 3).double(), norm)
    balancer = make("DB-MTL", model)
    return steps(rank, size, balancer, model, 2), norm.running_mean


def test_plain_batch_norm_keeps_the_statistics_of_its_own_rank(pools):
    """Gradients are alike on both ranks, buffers are not."""
    (grads, mean), (other_grads, other_mean) = pools(2).run(with_batch_norm)
    assert same(grads, other_grads)
    assert not torch.equal(mean, other_mean)


def nan_under_accumulation(rank, size, check, goes_on):
    """A micro-batch of rank 1 has a loss that is not a number."""
    model = Net()
    balancer = make("DB-MTL", model, check=check)
    for seed in range(2):
        x, y, valid = part(batch(seed), rank, size)
        for one in range(len(x)):
            piece = x[one : one + 1], y[:, one : one + 1], valid[:, one : one + 1]
            losses = model.losses(model.features(piece[0]), *piece[1:])
            if seed == 1 and rank == 1 and one == 2:
                losses[2] = losses[2] * float("nan")
            try:
                balancer.accumulate(losses, piece[2].sum(1))
            except FloatingPointError:
                if not goes_on:
                    balancer.discard()
                    break
        balancer.backward()
    if check == "later":
        balancer.verify()
    return model.grads(), tensors(balancer.state_dict())


def test_a_loss_under_accumulation_that_is_not_a_number(pools):
    """It raises where it is; what that rank does then, both do."""
    raised_alike(pools, "call that first", nan_under_accumulation, "now", False)
    first, second = pools(2).run(nan_under_accumulation, "now", True)  # without that micro-batch
    assert same(first, second) and first[1]["step"] == 2
    raised_alike(pools, "bad losses of tasks [2]", nan_under_accumulation, "later", True)


# errors in the middle of a step


def fail(*given):
    raise MemoryError("in the middle of it")


def failing_at(call, function):
    """The function, whose call of that number raises."""
    calls = itertools.count()

    def wrapped(*given):
        if next(calls) == call:
            fail()
        return function(*given)

    return wrapped


def spoiled(rank, size, what, name, options, call=0):
    """A step in which the call of that number raises on rank 1 alone, and the next step."""
    model = Net()
    balancer = make(name, model, **options)
    lines = []
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x)
        losses = model.losses(z, y, valid)
        owner = {
            "propose": balancer.ema,
            "forward": balancer.aggregator,
            "advance": balancer.transform,
        }[what]
        if seed == 1 and rank == 1:
            setattr(owner, what, failing_at(call, getattr(owner, what)))
        before = [model.grads(), tensors(balancer.gathered_state_dict())]
        features = {"features": z} if balancer.level == "features" else {}
        try:
            balancer.backward(losses, size=valid.sum(1), **features)
        except Exception as error:
            lines.append(f"{type(error).__name__}: {error}")
            assert same([model.grads(), tensors(balancer.gathered_state_dict())], before)
        vars(owner).pop(what, None)
    return lines, model.grads(), tensors(balancer.gathered_state_dict())


@pytest.mark.parametrize(
    "what, name, options, call",
    [
        *(("propose", "DB-MTL", {}, call) for call in range(3)),
        *(("propose", "DB-MTL", {"sync": "shard"}, call) for call in range(3)),
        ("forward", "DB-MTL", {}, 0),
        ("forward", "CAGrad", {}, 0),
        ("forward", "CAGrad", {"sync": "shard"}, 0),
        ("forward", "MGDA", {}, 0),
        ("forward", "loss-only", {}, 0),
        ("forward", "MGDA-UB", {}, 0),
        ("advance", "loss-only", {}, 0),
        ("advance", "MGDA-UB", {}, 0),
    ],
)
def test_what_raises_on_one_rank_between_the_sums_raises_on_both(pools, what, name, options, call):
    answers = pools(2).run(spoiled, what, name, options, call)
    for lines, _, state in answers:
        assert len(lines) == 1 and "in the middle of it" in lines[0]
        assert state["step"] == 2
    assert "rank 1: " in answers[0][0][0]  # the other rank is told whose error it is
    assert same(answers[0][1:], answers[1][1:])


def failing_hook_after_the_gradient(rank, size, name):
    """A hook that runs when `.grad` was written."""
    model = Net()
    balancer = make(name, model)
    hook = None
    lines = []
    for seed in range(3):
        if seed == 1 and rank == 1:
            hook = model.trunk[0].weight.register_post_accumulate_grad_hook(fail)
        x, y, valid = part(batch(seed), rank, size)
        try:
            balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
        except MemoryError as error:
            lines.append(str(error))
        if hook is not None:
            hook.remove()
    return lines, model.grads(), tensors(balancer.state_dict())


@pytest.mark.parametrize("name", ["DB-MTL", "EW"])
def test_a_hook_that_raises_after_the_gradient_leaves_the_step_done(pools, name):
    """All sums are done by then: the error is that rank's alone, and the step counts on both."""
    first, second = pools(2).run(failing_hook_after_the_gradient, name)
    assert first[0] == [] and second[0] == ["in the middle of it"]
    assert same(first[1:], second[1:])


# groups


def outside_of_the_group(rank, size):
    """A group of some ranks is given on all of them."""
    pair = dist.new_group([0])
    model = Net()
    balancer = make("DB-MTL", model, process_group=pair)
    x, y, valid = batch(0)
    balancer.backward(model.losses(model.features(x), y, valid))
    return model.grads()


def test_a_rank_that_is_not_in_the_group(pools):
    inside, outside = told(pools, outside_of_the_group)
    assert inside is None
    assert "not in the process group" in outside


def two_groups(rank, size):
    """Ranks 0 and 2 share their steps, and so do 1 and 3, at another pace."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    model = Net()
    balancer = make("DB-MTL", model, process_group=groups[rank % 2])
    return steps(rank // 2, 2, balancer, model, 2 + rank % 2)


def test_two_groups_beside_each_other(pools):
    four = pools(4).run(two_groups)
    for pace in (0, 1):
        model = Net()
        one = steps(0, 1, make("DB-MTL", model), model, 2 + pace)
        agree([four[pace], four[pace + 2]], one)


# warnings that are errors on one rank


def warned(rank, size, case, strict):
    """A step that warns, with `python -W error` on some ranks; then a plain one."""
    if rank in strict:
        warnings.simplefilter("error")
    else:
        warnings.simplefilter("ignore")
    return CASES[case](rank, size)


def tried(balancer, model, call):
    """What a call raised, and that it changed nothing."""
    before = [model.grads(), tensors(balancer.state_dict())]
    try:
        call()
    except Warning as error:
        assert same([model.grads(), tensors(balancer.state_dict())], before)
        return str(error)
    return None


def forgotten(rank, size, name):
    model = Net()
    level = {"level": "features"} if name == "features" else {}
    aggregator = MaxNorm() if name == "features" else Sum()
    shared = model.trunk[0]
    balancer = Balancer(
        Log(), aggregator, shared=shared, num_tasks=3, ema=None if level else EMA(), **level
    )

    def step():
        x, y, valid = part(batch(0), rank, size)
        z = shared(x)
        features = {"features": z} if level else {}
        losses = model.losses(model.trunk[1:](z), y, valid)
        balancer.backward(losses, size=valid.sum(1), **features)

    return tried(balancer, model, step), tried(balancer, model, step), balancer.step


def slipped_in(rank, size):
    model = Net()
    shared = [*model.trunk.parameters(), *model.heads[0].parameters()]
    balancer = DBMTL(shared=shared, num_tasks=3)

    def step():
        x, y, valid = part(batch(0), rank, size)
        balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))

    return tried(balancer, model, step), tried(balancer, model, step), balancer.step


def no_end_of_epoch(rank, size, name):
    model = Net()
    balancer = make(name, model)
    means = balancer.transform.means if name == "DWA" else balancer.aggregator.epochs
    means.patience = 1
    steps(rank, size, balancer, model, 1)

    def step():
        steps(rank, size, balancer, model, 1)

    return tried(balancer, model, step), tried(balancer, model, step), balancer.step


def rescaled_updates(rank, size):
    """MTAdam under an optimizer that goes another way."""
    model = Net()
    balancer = make("MTAdam", model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    said = []
    for seed in range(4):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        step = functools.partial(balancer.backward, losses, size=valid.sum(1))
        said.append(tried(balancer, model, step))
        optimizer.step()
        optimizer.zero_grad()
    [text] = [text for text in said if text]
    return text, None, balancer.step - 1


def same_losses_again(rank, size):
    model = Net()
    balancer = make("FAMO", model)
    x, y, valid = part(batch(0), rank, size)
    losses = model.losses(model.features(x), y, valid)
    balancer.backward(losses, size=valid.sum(1))
    text = tried(balancer, model, lambda: balancer.after_step(losses, size=valid.sum(1)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        balancer.after_step(losses, size=valid.sum(1))
    steps(rank, size, balancer, model, 1)
    return text, None, balancer.step - 1


CASES = {
    "forgotten": lambda rank, size: forgotten(rank, size, "DB-MTL"),
    "forgotten, features": lambda rank, size: forgotten(rank, size, "features"),
    "slipped in": slipped_in,
    "DWA": lambda rank, size: no_end_of_epoch(rank, size, "DWA"),
    "GradNorm": lambda rank, size: no_end_of_epoch(rank, size, "GradNorm"),
    "MTAdam": rescaled_updates,
    "FAMO": same_losses_again,
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strict", [[0], [1], [0, 1]], ids=str)
def test_a_warning_that_is_an_error_on_one_rank_is_one_on_both(pools, case, strict):
    """It is raised once, nothing has changed, and the next step goes on."""
    answers = pools(2).run(warned, case, strict)
    for text, second, step in answers:
        assert text is not None and second is None
        assert step == 1 or case in ("DWA", "GradNorm", "MTAdam")
    assert answers[0][2] == answers[1][2]
