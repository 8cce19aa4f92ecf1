"""Several processes against one on the joined batch: gradients, slopes, weights, state."""

import pytest
import torch
from helpers.methods import (
    BASES,
    FEATURES,
    SMALL,
    THREE,
    same,
)
from helpers.ranks import (
    CUTS,
    Net,
    Seen,
    agree,
    assert_alike,
    batch,
    make,
    part,
    tensors,
    train,
)
from torch import distributed as dist
from torch import nn
from torch.testing import assert_close

from dbmtl import DBMTL, Balancer, GradDrop, Transform, make_balancer

pytestmark = pytest.mark.full  # starts processes

sizes = pytest.mark.parametrize("size", [2, 3])


@pytest.mark.parametrize("name", BASES)
@sizes
def test_ranks_equal_one_process_on_the_joined_batch(pools, size, name):
    agree(pools(size).run(train, name), train(0, 1, name))


@pytest.mark.parametrize("name", ["EW", "GLS", "UW", "MoCo", "DB-MTL", "MGDA-UB", "SDMGrad"])
def test_four_ranks_equal_one_process(pools, name):
    agree(pools(4).run(train, name, steps=3), train(0, 1, name, steps=3))


@pytest.mark.parametrize("grads", ["loop", "split", "batched"])
def test_two_ranks_equal_one_process_in_every_order_of_passes(pools, grads):
    agree(pools(2).run(train, "DB-MTL", 3, grads=grads), train(0, 1, "DB-MTL", 3, grads=grads))


@pytest.mark.parametrize("check", ["later", "off"])
@pytest.mark.parametrize("name", ["loss-only", "DB-MTL"])
def test_two_ranks_without_a_look_at_the_losses(pools, name, check):
    agree(pools(2).run(train, name, 3, check=check), train(0, 1, name, 3, check=check))


@pytest.mark.parametrize("name", [*sorted(FEATURES), "DB-MTL", "CAGrad"])
def test_cosines_on_two_ranks_equal_one_process(pools, name):
    """At feature level each rank has other coordinates of each row."""
    one = train(0, 1, name, 3, cosines=True)
    agree(pools(2).run(train, name, 3, cosines=True), one)
    assert "cosine/0/1" in one[0][1][-1]


def cosines_of_features_on_one_rank(rank, size):
    model = Net()
    balancer = make("MGDA-UB", model)
    balancer.with_cosines = rank == 0
    x, y, valid = part(batch(0), rank, size)
    z = model.features(x)
    balancer.backward(model.losses(z, y, valid), size=valid.sum(1), features=z)


def test_cosines_of_features_on_one_rank_alone_raise_on_all(pools):
    for _, error in pools(2).answers_of(cosines_of_features_on_one_rank):
        assert "not at the same place" in error


def counts_of_batches(rank, size, name, given):
    """A step of three batches whose counts differ, on all ranks or on one."""
    model = Net()
    balancer = make(name, model)
    pieces = [part(batch(seed), rank, size) for seed in range(3)]
    counts = [valid.sum(1) for _, _, valid in pieces]
    assert not all(same(count, counts[0]) for count in counts)
    sizes = dict(zip(("size", "size2", "size3"), counts, strict=True))
    wanted = given if rank else set(sizes)
    losses = [model.losses(model.features(x), y, valid) for x, y, valid in pieces]
    balancer.backward(*losses, **{key: sizes[key] for key in sizes if key in wanted})


@pytest.mark.parametrize("name", sorted(THREE))
@pytest.mark.parametrize("given", [{"size"}, {"size2", "size3"}])
def test_counts_of_some_of_three_batches_raise_on_all_ranks(pools, name, given):
    for _, error in pools(2).answers_of(counts_of_batches, name, given):
        assert "give size, size2 and size3" in error


ACCUMULATED = [name for name in BASES if name not in FEATURES | THREE | {"FAMO"}]


@pytest.mark.parametrize("name", ACCUMULATED)
def test_micro_batches_on_two_ranks_equal_one_process(pools, name):
    """A micro-batch is one sample, so ranks accumulate unequal numbers of them."""
    agree(pools(2).run(train, name, 3, accumulate=True), train(0, 1, name, 3))


@pytest.mark.parametrize("name", ["DB-MTL", "CAGrad", "FairGrad", "GradNorm", "PCGrad"])
@pytest.mark.parametrize("accumulate", [False, True])
def test_kept_weights_on_two_ranks_equal_one_process(pools, name, accumulate):
    ranks = pools(2).run(train, name, update_every=3, accumulate=accumulate)
    agree(ranks, train(0, 1, name, update_every=3))


def sums_of_a_step(rank, size):
    """How many sums over the ranks each of six steps took, beside the exchange at its start."""
    model = Net()
    balancer = make("DB-MTL", model, update_every=3)
    counts = []
    plain = dist.all_reduce
    for seed in range(6):
        calls = []
        dist.all_reduce = lambda *given, **options: calls.append(1) or plain(*given, **options)  # noqa: B023
        try:
            x, y, valid = part(batch(seed), rank, size)
            balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
        finally:
            dist.all_reduce = plain
        counts.append(len(calls))
    return counts


def test_a_step_with_kept_weights_takes_one_sum_over_the_ranks(pools):
    measured = 3 + 1  # a row a task, and the heads
    assert pools(2).run(sums_of_a_step) == [[measured, 1, 1, measured, 1, 1]] * 2


def other_options(rank, size):
    model = Net()
    balancer = make("DB-MTL", model, update_every=2 + rank)
    x, y, valid = part(batch(0), rank, size)
    balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))


def test_ranks_with_unlike_cycles_are_refused(pools):
    for _, error in pools(2).answers_of(other_options):
        assert "rank 1 is not like rank 0: update_every is 3, there 2" in error


def test_averages_in_place_on_two_ranks_equal_one_process(pools):
    agree(pools(2).run(train, "DB-MTL", in_place=True), train(0, 1, "DB-MTL"))


@pytest.mark.parametrize("name", ["DB-MTL", "PCGrad", "GradDrop", "RLW", "Nash-MTL", "MTAdam"])
def test_twenty_steps_leave_all_ranks_equal_to_the_bit(pools, name):
    first, *others = pools(3).run(train, name, 20)
    assert all(same(other, first) for other in others)


# random numbers and what is learned


def train_without_seeds(rank, size, name):
    """Each rank's generator starts elsewhere; the ranks must draw the same numbers all the same."""
    torch.manual_seed(1000 + rank)
    hyper = SMALL.get(name, {})
    model = Net()
    torch.manual_seed(2000 + rank)
    balancer = make_balancer(name, shared=model.trunk, num_tasks=3, **hyper)
    seen = Seen()
    for seed in range(4):
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x)
        features = {"features": z} if balancer.level == "features" else {}
        balancer.backward(model.losses(z, y, valid), size=valid.sum(1), **features)
        seen.note(model, balancer)
        balancer.end_epoch()
    return list(seen)


@pytest.mark.parametrize(
    "name", ["RLW", "PCGrad", "GradVac", "GradDrop", "GradDrop-features", "IGBv2"]
)
def test_ranks_without_a_seed_draw_the_same_numbers(pools, name):
    first, second = pools(2).run(train_without_seeds, name)
    assert same(first, second)


class Jitter(Transform):
    """A user's own, which draws its first random numbers in a step."""

    def forward(self, losses):
        return losses

    def advance(self, losses):
        self.memory["drawn"] = torch.rand(3, generator=self.generator())


def streams_of_two_parts(rank, size):
    torch.manual_seed(rank)
    model = Net()
    balancer = Balancer(Jitter(), GradDrop(), shared=model.trunk, num_tasks=3)
    x, y, valid = part(batch(0), rank, size)
    balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
    return balancer.transform.seed, balancer.aggregator.seed, balancer.transform.memory["drawn"]


def test_two_parts_of_a_method_draw_from_two_streams(pools):
    first, second = pools(2).run(streams_of_two_parts)
    assert same(first, second) and first[0] != first[1]


# errors: on all ranks or on none


def gradients_after(rank, size, change, name="DB-MTL", **options):
    """A good step, a step that `change` spoils on some rank, and a good one again."""
    model = Net()
    balancer = make(name, model, **options)
    told = None
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x)
        losses = model.losses(z, y, valid)
        arguments = {"size": valid.sum(1)}
        if balancer.level == "features":
            arguments["features"] = z
        before = (model.grads(), tensors(balancer.state_dict()))
        try:
            if seed == 1:
                losses, arguments = change(rank, losses, arguments)
            balancer.backward(losses, **arguments)
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            assert same((model.grads(), tensors(balancer.state_dict())), before)
    return told, model.grads(), tensors(balancer.state_dict())


def nan_on_rank_1(rank, losses, arguments):
    if rank == 1:
        losses[1] = losses[1] * float("nan")
    return losses, arguments


def failing_pass_on_rank_1(rank, losses, arguments):
    if rank == 1:
        losses[1] = losses[1] * 1.0
        losses[1].register_hook(fail)
    return losses, arguments


def failing_first_pass_on_rank_1(rank, losses, arguments):
    if rank == 1:
        losses[0] = losses[0] * 1.0
        losses[0].register_hook(fail)
    return losses, arguments


def failing_last_pass_on_rank_1(rank, losses, arguments):
    if rank == 1:
        losses[2] = losses[2] * 1.0
        losses[2].register_hook(fail)
    return losses, arguments


def fail(gradient):
    raise MemoryError("in the middle of a pass")


def detached_on_rank_1(rank, losses, arguments):
    if rank == 1:
        losses[2] = losses[2].detach()
    return losses, arguments


def two_losses_on_rank_1(rank, losses, arguments):
    return losses[: 3 - rank], arguments


def no_size_on_rank_1(rank, losses, arguments):
    return losses, {**arguments, "size": None} if rank else arguments


def negative_size_on_rank_1(rank, losses, arguments):
    return losses, {**arguments, "size": -1} if rank else arguments


def dictionary_on_rank_1(rank, losses, arguments):
    return dict(zip("abc", losses, strict=True)) if rank else losses, arguments


def nothing_on_rank_1(rank, losses, arguments):
    return None if rank else losses, arguments


BAD = {
    nan_on_rank_1: "the loss of task 1 is nan",
    failing_pass_on_rank_1: "in the middle of a pass",
    failing_first_pass_on_rank_1: "in the middle of a pass",
    failing_last_pass_on_rank_1: "in the middle of a pass",
    detached_on_rank_1: "does not require grad",
    two_losses_on_rank_1: "expected 3 losses, got 2",
    no_size_on_rank_1: "not at the same place",
    negative_size_on_rank_1: "size of task 0 is -1",
    dictionary_on_rank_1: "came as a list, and now as a dictionary",
    nothing_on_rank_1: "call that first",
}


@pytest.mark.parametrize("change", [nan_on_rank_1, failing_pass_on_rank_1, two_losses_on_rank_1])
def test_a_bad_step_with_kept_weights_raises_on_all_ranks_and_changes_nothing(pools, change):
    """The second step, which `change` spoils, has the weights of the first; so has the third."""
    answers = pools(2).run(gradients_after, change, "DB-MTL", update_every=3)
    for told, _, state in answers:
        assert BAD[change] in told and state["step"] == 2 and state["kept"]["cheap_steps"] == 1
    assert same(answers[0][1:], answers[1][1:])


@pytest.mark.parametrize("name", ["DB-MTL", "EW", "MGDA-UB"])
@pytest.mark.parametrize("change", BAD, ids=lambda change: change.__name__)
def test_what_is_bad_on_one_rank_raises_on_all_and_changes_nothing(pools, change, name):
    answers = pools(2).run(gradients_after, change, name)
    for told, _, _ in answers:
        assert BAD[change] in told
    kinds = {told.partition(":")[0] for told, _, _ in answers}
    assert len(kinds) == 1
    assert same(answers[0][1:], answers[1][1:])


# what differs between ranks


def train_in_another_order(rank, size, named):
    """Dictionaries in another order on each rank, and a layer that one rank never uses."""
    model = Net()
    balancer = make("DB-MTL", model)
    seen = Seen()
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        pairs = list(zip("abc", losses, strict=True))
        counts = dict(zip("abc", valid.sum(1).tolist(), strict=True))
        if named and rank == 1:
            pairs = pairs[::-1]
        balancer.backward(dict(pairs), size=counts)
        seen.note(model, balancer)
    return list(seen)


def test_dictionaries_in_another_order_are_matched_by_name(pools):
    agree(pools(2).run(train_in_another_order, True), train_in_another_order(0, 1, False))


def train_with_unused_layers(rank, size, place, give_model):
    """The joined loss uses `spare`; only the last rank does."""
    model = Net()
    parts = [model.trunk, model.spare] if place == "shared" else [model.trunk]
    shared = [p for module in parts for p in module.parameters()]
    options = {"model": model} if give_model else {}
    balancer = DBMTL(shared=shared, num_tasks=3, **options)
    seen = Seen()
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        if rank == size - 1 and seed != 1:
            of_spare = model.spare(x[-1:]).square().sum() / valid[0].sum()
            losses[0] = losses[0] + of_spare
        balancer.backward(losses, size=valid.sum(1))
        seen.note(model, balancer)
        for p in model.parameters():
            p.grad = None
    return list(seen)


@pytest.mark.filterwarnings("ignore:2 tensors inside `shared` are reached by one loss alone")
@pytest.mark.parametrize("place, give_model", [("shared", False), ("heads", True)])
def test_layers_unused_on_one_rank(pools, place, give_model):
    one = train_with_unused_layers(0, 1, place, give_model)
    agree(pools(3).run(train_with_unused_layers, place, give_model), one)


def test_a_head_layer_unused_on_one_rank_needs_a_name(pools):
    for _, error in pools(2).answers_of(train_with_unused_layers, "heads", False):
        assert "give the balancer model=" in error


def train_with_absent_tasks(rank, size, how, give_model=False, name="DB-MTL"):
    """Rank 0 never has the second task, and in one step nobody has the third."""
    model = Net()
    options = {"model": model} if give_model else {}
    balancer = make_balancer(name, shared=model.trunk, num_tasks=3, missing="skip", **options)
    seen = Seen()
    for seed in range(3):
        x, y, valid = batch(seed)
        valid[1, : CUTS[2][0]] = False
        valid[2] &= seed != 1
        x, y, valid = part((x, y, valid), rank, size)
        counts = valid.sum(1)
        losses = model.losses(model.features(x), y, valid)
        if how == "none":
            losses = [None if n == 0 else loss for n, loss in zip(counts, losses, strict=True)]
        balancer.backward(losses, size=counts)
        seen.note(model, balancer)
        seen.append(balancer.seen)
        for p in model.parameters():  # a head of a task that nobody has keeps None
            p.grad = None
    return list(seen)


@pytest.mark.parametrize("name", ["DB-MTL", "EW"])
@pytest.mark.parametrize("how, give_model", [("size", False), ("none", True)])
def test_tasks_absent_on_one_rank_and_on_all(pools, how, give_model, name):
    one = train_with_absent_tasks(0, 1, how, name=name)
    agree(pools(2).run(train_with_absent_tasks, how, give_model, name), one)
    assert one[-1].tolist() == [3, 3, 2]


def test_a_head_that_a_rank_has_never_seen_needs_a_name(pools):
    for _, error in pools(2).answers_of(train_with_absent_tasks, "none"):
        assert "rank 0 has not seen the heads of tasks [1]" in error


def other_balancer(rank, size, what):
    torch.manual_seed(rank if what == "weights" else 0)
    trunk = nn.Linear(4, 3)
    tasks = 2 + (what == "tasks" and rank)
    beta = 0.5 + 0.1 * (what == "method" and rank)
    balancer = DBMTL(shared=trunk, num_tasks=tasks, beta=beta)
    if what == "step" and rank:
        balancer.step = 4
    balancer.backward([trunk(torch.ones(2, 4)).square().mean() + t for t in range(tasks)])


OTHER = {
    "weights": "the shared parameters of rank 1 are not those of rank 0",
    "tasks": "num_tasks is 3, there 2",
    "method": "method is",
    "step": "step is 4, there 0",
}


@pytest.mark.parametrize("what", OTHER)
def test_ranks_that_are_not_alike_are_refused(pools, what):
    for _, error in pools(2).answers_of(other_balancer, what):
        assert OTHER[what] in error


def elsewhere(rank, size):
    model = Net()
    balancer = make("FAMO", model)
    x, y, valid = part(batch(0), rank, size)
    losses = model.losses(model.features(x), y, valid)
    balancer.backward(losses)
    if rank:
        balancer.end_epoch()
    else:
        balancer.after_step(losses)


def test_ranks_at_different_calls_raise(pools):
    for _, error in pools(2).answers_of(elsewhere):
        assert "not at the same place" in error


# other ways to run


def train_alone(rank, size):
    """process_group=False: each rank for itself."""
    return train(0, 1, "DB-MTL", 2, process_group=False)


def train_in_subgroup(rank, size):
    """Two of three ranks share their steps, the third is alone."""
    pair = dist.new_group([0, 1])
    if rank == 2:
        return train(0, 1, "DB-MTL", 2, process_group=False)
    return train(rank, 2, "DB-MTL", 2, process_group=pair)


def test_without_a_group_and_in_a_part_of_the_ranks(pools):
    one = train(0, 1, "DB-MTL", 2)
    for rank in pools(2).run(train_alone):
        assert same(rank, one)
    *pair, alone = pools(3).run(train_in_subgroup)
    agree(pair, one)
    assert same(alone, one)


def wrapped(rank, size, inside):
    model = Net()
    model.spare = None
    ddp = nn.parallel.DistributedDataParallel(Wrapped(model))
    balancer = make("DB-MTL", model)
    seen = Seen()
    for seed in range(3):
        data = part(batch(seed), rank, size)
        if inside:
            with ddp.no_sync():
                losses = ddp(*data)
                balancer.backward(losses, size=data[2].sum(1))
        else:
            balancer.backward(ddp(*data), size=data[2].sum(1))
        seen.note(model, balancer)
    return list(seen)


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y, valid):
        return self.model.losses(self.model.features(x), y, valid)


def unwrapped(rank, size):
    model = Net()
    model.spare = None
    balancer = make("DB-MTL", model)
    seen = Seen()
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
        seen.note(model, balancer)
    return list(seen)


def test_a_wrapped_model_inside_no_sync(pools):
    agree(pools(2).run(wrapped, True), unwrapped(0, 1))


def test_a_wrapped_model_outside_no_sync_is_told_what_to_write(pools):
    for _, error in pools(2).answers_of(wrapped, False):
        assert "with model.no_sync():" in error


def resumed(rank, size, state):
    model = Net()
    balancer = make("DB-MTL", model)
    if state is not None:
        balancer.load_state_dict(state)
    for seed in range(2):
        x, y, valid = part(batch(seed), rank, size)
        balancer.backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
    return model.grads(), balancer.state_dict()


def test_a_state_of_two_ranks_goes_on_on_three_and_on_one(pools):
    (_, state), _ = pools(2).run(resumed, None)
    one = resumed(0, 1, state)
    for rank in pools(3).run(resumed, state):
        assert_alike(rank[0], one[0], 1e-10)
        assert_alike(tensors(rank[1]), tensors(one[1]), 1e-10)


def end_of_epoch(rank, size, name):
    model = Net()
    balancer = make(name, model)
    for epoch in range(3):
        x, y, valid = part(batch(epoch), rank, size)
        losses = model.losses(model.features(x), y, valid)
        balancer.backward(losses, size=valid.sum(1))
        balancer.end_epoch([loss.detach() for loss in losses], size=valid.sum(1))
    return model.grads(), tensors(balancer.state_dict())


@pytest.mark.parametrize("name", ["DWA", "STCH", "GradNorm", "EW"])
def test_means_of_an_epoch_are_joined(pools, name):
    agree(pools(2).run(end_of_epoch, name), end_of_epoch(0, 1, name))


def half_precision(rank, size, dtype):
    model = Net().to(dtype)
    balancer = make("DB-MTL", model)
    for seed in range(2):
        x, y, valid = part(batch(seed), rank, size)
        z = model.features(x.to(dtype))
        balancer.backward(model.losses(z, y.to(dtype), valid), size=valid.sum(1))
    return model.grads()


@pytest.mark.parametrize("dtype, rtol", [(torch.float32, 1e-3), (torch.bfloat16, 0.2)])
def test_other_dtypes_are_summed_in_float32(pools, dtype, rtol):
    first, second = pools(2).run(half_precision, dtype)
    assert same(first, second)
    for a, b in zip(first, half_precision(0, 1, dtype), strict=True):
        if a is not None:
            assert a.dtype == dtype
            assert (a - b).float().norm() < rtol * b.float().norm()


def scaled(rank, size):
    model = Net()
    balancer = make("DB-MTL", model)
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for seed in range(2):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        balancer.backward(losses, size=valid.sum(1), scaler=scaler)
    return model.grads(), tensors(balancer.state_dict())


def test_a_scaler_on_every_rank(pools):
    agree(pools(2).run(scaled), scaled(0, 1))


def input_gradient(rank, size):
    model = Net()
    x, y, valid = part(batch(0), rank, size)
    x.requires_grad_()
    make("EW", model).backward(model.losses(model.features(x), y, valid), size=valid.sum(1))
    return x.grad


def test_inputs_that_ask_for_gradients_stay_with_their_rank(pools):
    assert_close(torch.cat(pools(2).run(input_gradient)), input_gradient(0, 1))


def infinite(rank, size, name):
    """In the second step one rank's gradient overflows, its loss does not."""
    model = Net()
    balancer = make(name, model)
    averages = None
    for seed in range(3):
        x, y, valid = part(batch(seed), rank, size)
        losses = model.losses(model.features(x), y, valid)
        if seed == 1 and rank == size - 1:
            losses[1] = losses[1] * 1.0
            losses[1].register_hook(lambda gradient: gradient * float("inf"))
        balancer.backward(losses, size=valid.sum(1))
        if seed == 1 and balancer.ema:
            averages = tensors(balancer.state_dict())["ema"]["1"]
    return balancer.nonfinite, averages


@pytest.mark.parametrize("name", ["DB-MTL", "MGDA"])
def test_a_gradient_that_overflows_on_one_rank_is_counted_on_all(pools, name):
    ranks = pools(2).run(infinite, name)
    for nonfinite, averages in ranks:
        assert nonfinite[1] == 1
        assert averages is None or all(average.isfinite().all() for average in averages.values())
    assert same(*ranks)


def looked_at_later(rank, size):
    model = Net()
    balancer = make("DB-MTL", model, check="later")
    x, y, valid = part(batch(0), rank, size)
    losses = model.losses(model.features(x), y, valid)
    if rank == 1:
        losses[2] = losses[2] * float("nan")
    balancer.backward(losses, size=valid.sum(1))
    balancer.verify()


def test_a_bad_loss_of_one_rank_is_flagged_on_all(pools):
    for _, error in pools(2).answers_of(looked_at_later):
        assert "bad losses of tasks [2]" in error


def train_stacked(rank, size):
    """A stacked tensor, of which one rank's second loss counts nothing from the start."""
    model = Net()
    balancer = make("DB-MTL", model)
    for seed in range(2):
        x, y, valid = batch(seed)
        valid[1, : CUTS[2][0]] = False
        x, y, valid = part((x, y, valid), rank, size)
        losses = torch.stack(model.losses(model.features(x), y, valid))
        balancer.backward(losses, size=valid.sum(1))
    return model.grads(), tensors(balancer.state_dict())


def test_a_stacked_tensor_with_nothing_to_count_on_one_rank(pools):
    agree(pools(2).run(train_stacked), train_stacked(0, 1))


@pytest.mark.parametrize("name", ["FAMO", "DWA", "GradNorm", "MoCo"])
def test_methods_that_need_all_tasks_raise_on_all_ranks(pools, name):
    for _, error in pools(2).answers_of(train_without_the_third, name):
        assert "needs a loss of every task in every step; missing now: [2]" in error


def train_without_the_third(rank, size, name):
    model = Net()
    balancer = make(name, model)
    x, y, valid = part(batch(0), rank, size)
    losses = model.losses(model.features(x), y, valid)
    balancer.backward([*losses[:2], None], size=valid.sum(1))
