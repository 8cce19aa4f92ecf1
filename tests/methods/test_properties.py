"""One suite for every method that has a name: what all promise, and tables of what only some do."""

import functools
import io

import pytest
import torch
from helpers.methods import (
    BASES,
    EPOCHS,
    F64,
    FEATURES,
    LEARNED,
    NAMES,
    RANDOM,
    SMALL,
    THREE,
    VARIANTS,
    Lines,
    Net,
    base,
    cosine,
    every,
    every_base,
    every_variant,
    follow,
    make,
    same,
    step,
    train,
    unchanged,
)
from torch.testing import assert_close

from dbmtl import make_balancer
from dbmtl.profile import anatomy
from dbmtl.registry import hyperparameters


def test_the_tables_name_methods():
    assert RANDOM == {name for name in BASES if "seed" in hyperparameters(name)}
    for table in (RANDOM, FEATURES, THREE, LEARNED, EPOCHS, SCALE, PERMUTATION, PER_TENSOR):
        assert set(table) <= set(NAMES)
    assert set(ANATOMY) == set(BASES)
    assert {name for name in BASES if make(name, Net()).level == "features"} == FEATURES
    assert {name for name in BASES if list(make(name, Net()).parameters())} == LEARNED
    assert len(NAMES) == len(set(NAMES))
    assert "Nash-MTL+log" in NAMES
    assert "GLS+log" not in NAMES


# --------------------------------------------------------------------------------- what all promise


@every_variant
def test_every_method_fills_grad(name, hyper):
    model = Net()
    balancer = make(name, model, **hyper)
    for seed in range(5):
        step(balancer, model, seed)
        for p in model.parameters():
            assert p.grad.shape == p.shape
            assert p.grad.dtype == p.dtype
            assert p.grad.isfinite().all()
        assert balancer.slopes.shape == (3,)
        assert balancer.slopes.isfinite().all()
        if balancer.weights is not None:
            assert balancer.weights.shape == (3,)
            assert balancer.weights.isfinite().all()
        assert balancer.step == seed + 1
        assert balancer.nonfinite.sum() == 0
        assert any((p.grad != 0).any() for p in model.trunk)
        follow(balancer, model, seed)


@every_variant
def test_every_method_gives_the_same_numbers_by_every_route(name, hyper):
    def by(route):
        model = Net()
        return train(make(name, model, grads=route, **hyper), model, range(2))

    expected = by("loop")
    for route in ("split", "batched"):
        assert_close(by(route), expected, rtol=1e-9, atol=1e-10)


@every_variant
def test_every_method_in_float32(name, hyper):
    def numbers(dtype):
        model = Net(dtype=dtype)
        gradients, scales = train(make(name, model, **hyper), model, range(2))
        return sum(gradients, []), scales

    single, single_scales = numbers(torch.float32)
    double, double_scales = numbers(F64)
    assert all(g.dtype == torch.float32 for g in single)
    for a, b in zip(single + single_scales, double + double_scales, strict=True):
        assert (a - b).norm() <= 2e-4 * b.norm() + 1e-6


@every_variant
def test_every_method_goes_on_from_a_saved_state(name, hyper):
    """In mid-run, through a file that holds nothing but tensors and numbers, into a balancer with
    another seed."""
    model = Net()
    whole = train(make(name, model, **hyper), model, range(5))
    model = Net()
    first = make(name, model, **hyper)
    begun = train(first, model, range(3))
    other_seed = {"seed": 8} if base(name) in RANDOM else {}
    second = make(name, model, **hyper, **other_seed)
    second.load_state_dict(through_disk(first.state_dict()))
    ended = train(second, model, range(3, 5))
    assert same(begun.gradients + ended.gradients, whole.gradients)
    assert same(ended.scales, whole.scales)
    assert second.state_dict()["step"] == 5


def through_disk(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


LENGTHS_OF_THEIR_OWN = {  # an eps, a unit, a step size, or moments that are squares, as Adam's
    *("DB-MTL", "gradient-only", "MoCo", "ExcessMTL", "SDMGrad", "MoDo"),
    *("Nash-MTL", "FairGrad", "MTAdam"),
}


@pytest.mark.parametrize("size", [1e20, 1e25, 1e30, 1e-22, 1e-26])
@pytest.mark.parametrize("name", sorted(set(BASES) - FEATURES - {"FAMO"}))
def test_gradients_of_any_finite_size_in_float32(name, size):
    """Squares of float32 numbers overflow above 1.8e19; norms and products must not."""
    J = torch.tensor([[1.0, 2.0, 3.0], [2.0, -1.0, 1.0], [0.0, 1.0, 2.0]])

    def train(scale):
        model = Lines(J * scale)
        balancer = make(name, model)
        gradients = []
        for seed in range(3):
            step(balancer, model, seed)
            assert balancer.nonfinite.sum() == 0
            gradients.append(model.shared_gradient() / scale)
            follow(balancer, model, rate=0.0)
        return torch.stack(gradients)

    gradients = train(size)
    assert gradients.isfinite().all()
    if name not in LENGTHS_OF_THEIR_OWN:
        assert_close(gradients, train(1.0), rtol=1e-3, atol=1e-3)


@every_base
def test_every_method_has_a_state_of_its_own_after_loading(name):
    """Neither a loaded balancer nor the one that it came from writes into the other, or into what
    was saved."""
    model = Net()
    first = make(name, model)
    second = make(name, model)
    train(first, model, range(2))
    state = first.state_dict()
    before = through_disk(state)
    second.load_state_dict(state)
    train(second, model, range(2))
    assert same(first.state_dict(), before)
    assert same(state, before)
    train(first, model, range(2))
    assert same(state, before)


@every
def test_every_method_tells_its_hyper_parameters(name):
    """State is matched by this text, so every value that changes numbers must be in it, and
    nothing that does not."""
    text = repr(make(name, Net()))
    assert "0x" not in text
    assert "\n" not in text
    model = Net()
    balancer = make(name, model)
    assert repr(balancer) == text
    step(balancer, model)
    assert repr(balancer) == text
    small = SMALL.get(name, {})
    for key, value in (hyperparameters(name) | small).items():
        if key == "seed":
            continue
        if value or key not in ("weights", "shrinkage"):  # told where there are some
            assert f"{key}={value!r}" in text, f"{key}={value!r} not in {text}"
        hyper = small | {key: another(key, value)}
        changed = repr(make_balancer(name, shared=model.trunk, num_tasks=3, **hyper))
        assert changed != text
        assert f"{key}=" in changed


OTHERS = {
    "weights": [0.5, 2.0, 1.0],
    "order": "fixed",
    "reduction": "mean",
    "normalize": "l2",
    "projection": "simplex",
    "scale": "median",
    "initial": "first",
    "heads": "last",
    "total": 2.5,
    "update": "below",
    "group": "tensor",
    "window": 5,
    "max_norm": 2.0,
    "rtol": 1e-3,
    "half": False,
    "rescale": 2,
    "hidden": (6, 6),
    "warmup": 3,
    "betas": (0.5, 0.9, 0.5),
}


def another(key, value):
    """Another value that a hyper-parameter may have."""
    if isinstance(value, bool) and key != "half":
        return not value
    if key in OTHERS and OTHERS[key] != value:
        return OTHERS[key]
    if key == "alpha" and isinstance(value, str):
        return "min"
    if isinstance(value, int):
        return value + 1
    return value / 2 if value else 0.25


# ------------------------------------------------------------------------- permutation of the tasks

PERMUTATION = {
    "RLW": "draws a weight for each place",
    "IGBv2": "draws a weight for each place, and its networks read places",
    "PCGrad": "draws an order of places",
    "GradVac": "draws an order of places",
    "MTAdam": "the first task is the anchor",
    "MetaBalance": "the first task is the target",
}


@every
def test_tasks_may_come_in_any_order(name):
    order = [2, 0, 1]
    straight = Net()
    turned = Net(tasks=order)
    expected = train(make(name, straight), straight, range(3))
    permuted = train(make(name, turned), turned, range(3))

    def check():
        for ours, right in zip(permuted.gradients, expected.gradients, strict=True):
            trunk, heads = right[:4], right[4:]
            assert_close(ours[:4], trunk, rtol=1e-7, atol=1e-9)
            assert_close(ours[4:], [heads[t] for t in order], rtol=1e-7, atol=1e-9)
        assert_close(permuted.scales, [s[order] for s in expected.scales], rtol=1e-6, atol=1e-8)

    if base(name) not in PERMUTATION:
        check()
        return
    with pytest.raises(AssertionError):
        check()


# -------------------------------------------------------------------------------- scale of one loss

# What happens in the first step to the shared gradient and the heads' if one loss is multiplied by
# 1000: "nothing"; "length", of the shared gradient alone; or its "direction" changes.
SCALE = {
    "EW": "direction",
    "LS": "direction",
    "UW-SO": "direction",
    "GLS": "length",
    "RLW": "direction",
    "UW": "direction",
    "DWA": "direction",
    "IMTL-L": "direction",
    "IGBv2": "nothing",
    "MGDA": "direction",
    "GradNorm": "direction",
    "PCGrad": "direction",
    "GradDrop": "direction",
    "GradVac": "direction",
    "IMTL-G": "length",
    "CAGrad": "direction",
    "MTAdam": "nothing",
    "Nash-MTL": "nothing",
    "MetaBalance": "direction",
    "MoCo": "direction",
    "Aligned-MTL": "direction",
    "IMTL": "length",
    "loss-only": "nothing",
    "gradient-only": "length",
    "DB-MTL": "nothing",
    "FAMO": "length",
    "STCH": "nothing",
    "FairGrad": "direction",
    "UPGrad": "direction",
    "ConFIG": "length",
    "ExcessMTL": "direction",
    "SDMGrad": "direction",
    "MoDo": "direction",
    "MGDA-UB": "direction",
    "IMTL-G-features": "length",
    "GradDrop-features": "direction",
    "MoCo+log": "direction",  # gives each gradient the length of its raw loss
}


def times(task, factor):
    """The change of a step that multiplies one loss."""

    def change(losses, batch):
        losses[task] = losses[task] * factor
        return losses

    return change


def scaled_step(name, task, factor, **hyper):
    """The gradients of the trunk and of the heads if one loss is multiplied."""
    model = Net()
    step(make(name, model, **hyper), model, 0, times(task, factor))
    return model.shared_gradient(), torch.cat([h.grad for h in model.heads])


def check_scale(expected, name, **hyper):
    trunk, heads = scaled_step(name, 0, 1.0, **hyper)
    scaled = [scaled_step(name, task, 1000.0, **hyper) for task in range(3)]
    turns = [1 - cosine(trunk, scaled_trunk) for scaled_trunk, _ in scaled]
    if expected == "direction":
        assert max(turns) > 1e-3
        return
    assert max(turns) < 1e-9
    both = torch.cat([trunk, heads])
    equal = [torch.allclose(torch.cat(parts), both, rtol=1e-5) for parts in scaled]
    if expected == "nothing":
        assert all(equal)
    else:
        assert expected == "length"
        assert not any(equal)


@every
def test_one_loss_a_thousand_times_larger(name):
    if name in SCALE:
        check_scale(SCALE[name], name)
    else:
        assert name.endswith("+log")
        check_scale("nothing", name)


@pytest.mark.parametrize(
    "expected, name, hyper",
    [
        ("length", "MGDA", {"normalize": "l2"}),
        ("length", "MGDA", {"normalize": "loss"}),
        ("direction", "MGDA", {"normalize": "loss+"}),
        ("direction", "MGDA", {"normalize": "l2", "raw": True}),
        ("nothing", "FairGrad", {"alpha": 1.0}),
        ("direction", "FairGrad", {"alpha": 0.5}),
    ],
)
def test_one_loss_a_thousand_times_larger_with_options(expected, name, hyper):
    check_scale(expected, name, **hyper)


# ---------------------------------------------------------------------------- one tensor or several

PER_TENSOR = {"MTAdam": "normalizes each tensor", "MetaBalance": "normalizes each tensor"}


@every
def test_the_cut_of_the_parameters_into_tensors(name):
    cut = Net()
    whole = Net(flat=True)
    for model in (cut, whole):
        balancer = make(name, model)
        for seed in range(3):
            step(balancer, model, seed)
            balancer.after_step(model.losses(model.features(seed + 1)))
    close = torch.allclose(cut.shared_gradient(), whole.shared_gradient(), rtol=1e-9, atol=1e-10)
    assert close == (base(name) not in PER_TENSOR)


def test_gradvac_by_tensor_depends_on_the_cut():
    cut = Net()
    whole = Net(flat=True)
    for model in (cut, whole):
        step(make("GradVac", model, group="tensor"), model)
    assert not torch.allclose(cut.shared_gradient(), whole.shared_gradient(), rtol=1e-3)


# -------------------------------------------------------------------------------------------- seeds


@every_base
def test_seeds(name):
    """Equal seeds give equal numbers; nobody but a random method without a seed draws from torch's
    own generator."""

    def run(**options):
        model = Net()
        return train(make(name, model, **options), model, range(3))

    torch.manual_seed(3)
    before = torch.get_rng_state()
    expected = run()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert same(run(), expected)
    if name not in RANDOM:
        return
    assert not all(same(run(seed=seed), expected) for seed in range(8, 30))
    torch.manual_seed(3)
    unseeded = run(seed=None)
    assert not all(same(run(seed=None), unseeded) for _ in range(20))
    torch.manual_seed(3)
    assert same(run(seed=None), unseeded)


# ---------------------------------------------------------------------------------- batch in pieces


@every
def test_a_batch_in_pieces(name):
    whole = Net()
    pieces = Net()
    at_once = make(name, whole)
    in_pieces = make(name, pieces)
    for seed in range(3):
        if base(name) in FEATURES | THREE:
            with pytest.raises(RuntimeError, match="accumulate"):
                in_pieces.accumulate(pieces.losses(pieces.features(seed)), 8)
            assert same(in_pieces.state_dict(), make(name, pieces).state_dict())
            continue
        step(at_once, whole, seed)
        for rows in (slice(0, 3), slice(3, 8)):
            losses = pieces.losses(pieces.features(3 * seed)[rows])
            in_pieces.accumulate(losses, rows.stop - rows.start)
        in_pieces.backward()
        assert_close(pieces.grads(), whole.grads(), rtol=1e-8, atol=1e-9)
        follow(at_once, whole, seed)
        follow(in_pieces, pieces, seed)


# ------------------------------------------------------------------------------------ bad gradients


def poisoned(task, poisoned_batch, value):
    """The change of a step that multiplies the gradient of one task in one batch."""

    def change(losses, batch):
        if batch == poisoned_batch:
            losses[task] = losses[task] * 1
            losses[task].register_hook(lambda g: g * value)
        return losses

    return change


@pytest.mark.parametrize(
    "name, value", [(name, torch.nan) for name in NAMES] + [(name, torch.inf) for name in BASES]
)
def test_a_gradient_that_is_not_finite(name, value):
    """It is seen in .grad, and nothing is learned from it; in any of three batches."""
    for batch in (0, 1, 2) if base(name) in THREE else (0,):
        check_bad_gradient(name, batch, value)


def check_bad_gradient(name, batch, value):
    model = Net()
    balancer = make(name, model)
    train(balancer, model, range(2))
    before = balancer.state_dict()
    step(balancer, model, 5, poisoned(1, batch, value))
    after = balancer.state_dict()
    assert not model.shared_gradient().isfinite().all()
    assert same(after["aggregator"], before["aggregator"])
    assert after["step"] == 3
    if balancer.aggregator.needs_gradients or balancer.ema:
        assert balancer.nonfinite.tolist() == [0, 1, 0]
        assert balancer.weights is None or not balancer.weights[1].isfinite()
    if balancer.ema:
        assert same(after["ema"][1], before["ema"][1])
        assert not same(after["ema"][0], before["ema"][0])
    for p in [*model.parameters(), *balancer.parameters()]:
        p.grad = None
    balancer.after_step(model.losses(model.features()))
    step(balancer, model, 6)
    assert all(g.isfinite().all() for g in model.grads())
    assert all(p.grad.isfinite().all() for p in balancer.parameters())


@pytest.mark.parametrize(
    "name, value", [(name, torch.nan) for name in NAMES] + [(name, -torch.inf) for name in BASES]
)
def test_a_loss_that_is_not_finite(name, value):
    """An error that names the task, and as if the call had never been: states, random streams,
    gradients."""
    model = Net()
    balancer = make(name, model)
    begun = train(balancer, model, range(2))
    state = balancer.state_dict()
    stream = torch.get_rng_state()
    with pytest.raises(FloatingPointError, match="task 1 is"):
        step(balancer, model, 2, times(1, value))
    assert all(p.grad is None for p in [*model.parameters(), *balancer.parameters()])
    assert same(balancer.state_dict(), state)
    assert torch.equal(torch.get_rng_state(), stream)
    ended = train(balancer, model, range(2, 4))
    model = Net()
    whole = train(make(name, model), model, range(4))
    assert same(begun.gradients + ended.gradients, whole.gradients)
    assert same(ended.scales, whole.scales)


# -------------------------------------------------------------------------------------------- edges


@every_variant
def test_one_task_is_its_own_gradient(name, hyper):
    if "leak" in hyper or "half" in hyper:
        hyper = {}  # a value for each task
    model = Net(tasks=(1,))
    balancer = make(name, model, **hyper)
    for seed in range(3):
        step(balancer, model, seed)
        gradient = model.shared_gradient()
        last_batch = 2 if base(name) in THREE else 0
        (loss,) = model.losses(model.features(3 * seed + last_batch))
        plain = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(model.trunk))])
        assert all(g.isfinite().all() for g in model.grads())
        if base(name) == "MTAdam":  # Adam has a direction of its own
            assert seed or (gradient * plain >= 0).all()
        elif base(name) != "MoCo" and not balancer.ema:  # these average over the steps
            assert cosine(gradient, plain) > 1 - 1e-9
        follow(balancer, model, seed, rate=1e-5)


def vectors(*rows):
    return torch.tensor(rows, dtype=F64)


SEEDED = torch.Generator().manual_seed(0)
EDGES = {
    "one zero": vectors((1.0, 2.0, 0.0), (0.0, 0.0, 0.0), (3.0, -1.0, 1.0)),
    "two zeros": vectors((0.0, 0.0, 0.0), (0.0, 0.0, 0.0), (3.0, -1.0, 1.0)),
    "all zero": torch.zeros(3, 4, dtype=F64),
    "equal": vectors((1.0, 2.0, 3.0)).repeat(3, 1),
    "equal up to scale": vectors((1.0, 2.0, 3.0)).repeat(3, 1) * vectors((1.0,), (10.0,), (1e-4,)),
    "a duplicate": vectors((1.0, 0.5, 0.0), (1.0, 0.5, 0.0), (0.0, 1.0, 0.0)),
    "opposite": vectors((1.0, 2.0), (-1.0, -2.0)),
    "opposite, unequal": vectors((1.0, 2.0), (-3.0, -6.0)),
    "opposite and another": vectors((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0)),
    "rank one": vectors((1.0,), (-2.0,), (3.0,), (0.5,)),
    "more tasks than dimensions": torch.randn(6, 3, generator=SEEDED, dtype=F64),
    "sum is zero": vectors((1.0, 0.0), (-0.5, 3**0.5 / 2), (-0.5, -(3**0.5) / 2)),
    "tiny": 1e-12 * torch.randn(3, 4, generator=SEEDED, dtype=F64),
    "huge": 1e12 * torch.randn(3, 4, generator=SEEDED, dtype=F64),
    "far apart": torch.randn(3, 4, generator=SEEDED, dtype=F64) * vectors((1e-8,), (1.0,), (1e8,)),
    "sign of one coordinate": vectors((1.0, 0.0, 0.0), (0.0, -1.0, 0.0), (0.0, 0.0, 1e-30)),
}


READERS = [
    (name, hyper)
    for name, hyper in VARIANTS
    if not name.endswith("+log")
    and "leak" not in hyper
    and make(name, Net(), **hyper).aggregator.needs_gradients
]


@pytest.mark.full
@pytest.mark.parametrize("dtype", [F64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", EDGES)
def test_degenerate_gradients_are_no_news(case, dtype):
    """No error, and nothing but finite numbers, for any method that looks at gradients; zero
    gradients move nothing."""
    wrong = {}
    for name, hyper in READERS:
        model = Lines(EDGES[case].to(dtype))
        balancer = make(name, model, **hyper)
        try:
            for seed in range(2):
                step(balancer, model, seed)
                shared, scales = model.trunk[0].grad, [p.grad for p in balancer.parameters()]
                for g in (shared, balancer.slopes, balancer.weights, *scales):
                    assert g is None or g.isfinite().all(), f"step {seed}: {g.tolist()}"
                assert case != "all zero" or (shared == 0).all()
                follow(balancer, model, seed, rate=0.0)
        except Exception as error:
            wrong[f"{name} {hyper}"] = f"{type(error).__name__}: {error}"
    assert not wrong


@every
def test_a_task_with_a_zero_gradient_in_a_network(name):
    """Through a graph, with heads, in mid-run, and back again."""
    model = Net()
    balancer = make(name, model)

    def constant(losses, batch):
        losses[1] = losses[1] * 0 + losses[1].detach()
        return losses

    for seed in range(3):
        step(balancer, model, seed, unchanged if seed == 1 else constant)
        assert all(g.isfinite().all() for g in model.grads())
        if seed == 0:
            assert (model.heads[1].grad == 0).all()
        follow(balancer, model, seed)
    assert balancer.nonfinite.sum() == 0


# ---------------------------------------------------------------------------------- forgotten calls


def loop(balancer, model, steps, move):
    for seed in range(steps):
        step(balancer, model, seed)
        with torch.no_grad():
            for p in move:
                p.sub_(p.grad, alpha=1e-4)
                p.grad = None


def test_famo_asks_for_the_second_look():
    model = Net()
    balancer = make("FAMO", model)
    step(balancer, model)
    state = balancer.state_dict()
    gradients = model.grads()
    with pytest.raises(RuntimeError, match="FAMO.*balancer.after_step"):
        step(balancer, model)
    assert same(balancer.state_dict(), state)
    assert same(model.grads(), gradients)
    balancer.after_step(model.losses(model.features(1)))
    step(balancer, model)


@pytest.mark.parametrize("name", sorted(EPOCHS))
def test_methods_with_epochs_ask_for_their_end(name):
    model = Net()
    balancer = make(name, model)
    for part in (*balancer.transform.modules(), *balancer.aggregator.modules()):
        if hasattr(part, "longest"):
            part.longest = 4
    learned = list(balancer.parameters())
    loop(balancer, model, 5, [*model.parameters(), *learned])
    before = balancer.state_dict()
    with pytest.raises(RuntimeError, match=rf"{name}.*balancer\.end_epoch.*window="):
        loop(balancer, model, 1, [])
    assert all(p.grad is None for p in [*model.parameters(), *learned])
    assert same(balancer.state_dict(), before)
    balancer.end_epoch()
    loop(balancer, model, 3, [*model.parameters(), *learned])


@pytest.mark.parametrize("name", sorted(EPOCHS - {"GradNorm"}))
def test_the_longest_epoch_is_an_option(name):
    model = Net()
    loop(make(name, model, longest=3), model, 4, list(model.parameters()))
    with pytest.raises(RuntimeError, match="end_epoch"):
        loop(make(name, model, longest=3), model, 5, list(model.parameters()))


@pytest.mark.parametrize("name", sorted(EPOCHS))
def test_a_window_makes_epochs_by_itself(name):
    model = Net()
    longest = {} if name == "GradNorm" else {"longest": 3}
    balancer = make(name, model, window=2, **longest)
    loop(balancer, model, 12, [*model.parameters(), *balancer.parameters()])


@pytest.mark.parametrize("name", sorted(LEARNED))
def test_learned_scales_ask_for_an_optimizer(name):
    model = Net()
    balancer = make(name, model)
    loop(balancer, model, 1, list(model.parameters()))
    balancer.end_epoch([1.0] * balancer.num_tasks)  # GradNorm's scores get gradients from now on
    loop(balancer, model, 1, list(model.parameters()))
    before = balancer.state_dict()
    with pytest.raises(RuntimeError, match="never moved.*add_param_group.*balancer.parameters"):
        step(balancer, model, 2)
    assert same(balancer.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())


@every
def test_three_batches_where_they_are_wanted_and_nowhere_else(name):
    model = Net()
    balancer = make(name, model)

    def losses():
        return model.losses(model.features())

    if base(name) in THREE:
        with pytest.raises(ValueError, match="three batches"):
            balancer.backward(losses())
        with pytest.raises(ValueError, match="give size, size2 and size3"):
            balancer.backward(losses(), losses(), losses(), size=3)
    else:
        features = {"features": model.features()} if base(name) in FEATURES else {}
        with pytest.raises(ValueError, match="one batch"):
            balancer.backward(losses(), losses(), losses(), **features)
        with pytest.raises(ValueError, match="one batch: give its counts as size"):
            balancer.backward(losses(), size=3, size2=3, **features)
    if base(name) in FEATURES:
        with pytest.raises(ValueError, match="features=z"):
            balancer.backward(losses())
    elif base(name) not in THREE:
        with pytest.raises(ValueError, match="features were given"):
            balancer.backward(losses(), features=model.features())
    assert balancer.step == 0
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------------------------ what it costs

D = 251  # shared parameters, in 4 tensors
LOSSES = "as the losses say"
WEIGHTS = "weighted"
OWN = "own updates"
# two critics, their targets, the actor; their Adams
AGENT = 4 * 17_537 + 17_798 + 2 * (2 * 17_537 + 17_798)
# backward passes of the trunk, what the heads get, and numbers kept, for 3 tasks
ANATOMY = {
    "EW": (1, LOSSES, 0),
    "LS": (1, LOSSES, 0),
    "UW-SO": (1, LOSSES, 0),
    "GLS": (1, LOSSES, 0),
    "RLW": (1, LOSSES, 3),
    "UW": (1, LOSSES, 3),
    "DWA": (1, LOSSES, 3 * 3 + 1),
    "IMTL-L": (1, LOSSES, 3),
    "IGBv2": (1, LOSSES, AGENT + 10_000 * 10 + 25),
    "MGDA": (3, LOSSES, 0),
    "GradNorm": (3, LOSSES, 4 * 3 + 1),
    "PCGrad": (3, LOSSES, 0),
    "GradDrop": (3, LOSSES, 0),
    "GradVac": (3, LOSSES, 3 * 3),
    "IMTL-G": (3, LOSSES, 0),
    "CAGrad": (3, LOSSES, 0),
    "MTAdam": (3, OWN, 2 * 3 * (D + 4) + 3 * (4 + 2)),
    "Nash-MTL": (3, WEIGHTS, 0),
    "MetaBalance": (3, LOSSES, 3 * 4),
    "MoCo": (3, LOSSES, 3 * D + 3),
    "Aligned-MTL": (3, LOSSES, 0),
    "IMTL": (3, LOSSES, 3),
    "loss-only": (1, LOSSES, 0),
    "gradient-only": (3, LOSSES, 3 * D),
    "DB-MTL": (3, LOSSES, 3 * D),
    "FAMO": (1, LOSSES, 3 * 3),
    "STCH": (1, LOSSES, 3 * 3 + 1),
    "FairGrad": (3, WEIGHTS, 0),
    "UPGrad": (3, LOSSES, 0),
    "ConFIG": (3, LOSSES, 0),
    "ExcessMTL": (3, WEIGHTS, 3 * D + 9),
    "SDMGrad": (9, "sum of three", 3),
    "MoDo": (9, "mean of three", 3),
    "MGDA-UB": (1, LOSSES, 0),
    "IMTL-G-features": (1, LOSSES, 0),
    "GradDrop-features": (1, LOSSES, 0),
}


@every_base
def test_every_method_has_its_line_in_the_tables(name):
    """A method that is new: what does a step of it cost, and how does it follow scales?"""
    assert name in ANATOMY, f"add {name} to ANATOMY: (passes, heads' weights, state)"
    assert name in SCALE, f"add {name} to SCALE: what scaling the losses does to its direction"


@every
def test_what_a_step_costs(name):
    counted = anatomy(functools.partial(make_balancer, name))
    passes, heads, state = ANATOMY[base(name)]
    assert counted.passes == passes
    assert counted.state == state
    if name == base(name):  # with the log, see the next test
        assert counted.heads == heads


def gradients_of_heads(model, batch):
    """Each head's gradient of its own loss."""
    losses = model.losses(model.features(batch))
    pairs = zip(losses, model.heads, strict=True)
    return [torch.autograd.grad(loss, head)[0] for loss, head in pairs]


@pytest.mark.parametrize("name", [n for n in NAMES if base(n) not in {*THREE, "MTAdam"}])
def test_what_the_heads_get(name):
    """Their gradients of the transformed losses, times the weights where the table says so."""
    model = Net()
    balancer = make(name, model)
    for seed in range(3):
        step(balancer, model, seed)
        factors = balancer.slopes
        if ANATOMY[base(name)][1] == WEIGHTS:
            factors = factors * balancer.weights
        raw = gradients_of_heads(model, 3 * seed)
        expected = [factor * g for factor, g in zip(factors, raw, strict=True)]
        assert_close([head.grad for head in model.heads], expected, rtol=1e-9, atol=1e-11)
        follow(balancer, model, seed)


@pytest.mark.parametrize("name, number", [("SDMGrad", 1), ("MoDo", 3)])
def test_what_the_heads_get_from_three_batches(name, number):
    """Without the log every slope is one: SDMGrad sums over the batches, MoDo takes their mean."""
    model = Net()
    balancer = make(name, model)
    for seed in range(3):
        step(balancer, model, seed)
        raw = [gradients_of_heads(model, 3 * seed + batch) for batch in range(3)]
        expected = [sum(gradients) / number for gradients in zip(*raw, strict=True)]
        assert_close([head.grad for head in model.heads], expected, rtol=1e-9, atol=1e-11)
        follow(balancer, model, seed)


def test_nash_keeps_its_weights_for_so_many_steps():
    """New weights in steps 1, 4, 7, with a pass for each task; one pass in the steps between."""
    model = Net()
    balancer = make("Nash-MTL", model, update_every=3)
    gradients_of_features = []
    passes = []
    weights = []
    for seed in range(7):
        z = model.features(seed)
        z.register_hook(gradients_of_features.append)
        balancer.backward(model.losses(z))
        passes.append(len(gradients_of_features))
        weights.append(tuple(balancer.weights.tolist()))
        gradients_of_features.clear()
        follow(balancer, model, seed)
    assert passes == [3, 1, 1, 3, 1, 1, 3]
    assert len(set(weights[0:3])) == 1
    assert len(set(weights[3:6])) == 1
    assert len(set(weights)) == 3


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.5])
def test_gradnorm_scores_get_the_derivative_of_its_loss(alpha):
    """sum |w_t |g_t| - mean(w |g|) r_t^alpha| with constant targets, r from the mean losses of the
    epoch before."""
    model = Net()
    balancer = make("GradNorm", model, alpha=alpha)
    (p,) = balancer.parameters()
    p.data = torch.tensor([0.3, -0.2, 0.1], dtype=F64)
    initial = torch.tensor([2.0, 1.0, 30.0], dtype=F64)
    step(balancer, model)
    assert (p.grad == 0).all()
    follow(balancer, model, epoch=False)
    balancer.end_epoch(initial)
    losses = model.losses(model.features(3))
    rows = [torch.autograd.grad(loss, list(model.trunk), retain_graph=True) for loss in losses]
    lengths = torch.stack([torch.cat([g.reshape(-1) for g in row]).norm() for row in rows])
    scores = p.detach().clone().requires_grad_()
    G = 3 * scores.softmax(0) * lengths
    rates = torch.stack(losses).detach() / initial
    target = (G.mean() * (rates / rates.mean()) ** alpha).detach()
    (expected,) = torch.autograd.grad((G - target).abs().sum(), scores)
    step(balancer, model, 1)
    assert_close(p.grad, expected, rtol=1e-9, atol=1e-9)
    assert_close(balancer.weights, 3 * p.detach().softmax(0))


WITHOUT_WEIGHTS = {  # of the raw gradients: some have none, some weigh averages of the gradients
    "GradDrop",
    "GradDrop-features",
    "MTAdam",
    "MetaBalance",
    "MoCo",
    "gradient-only",
    "DB-MTL",
}


@every
def test_what_the_shared_parameters_get(name):
    """Where a method has T weights: the weighted sum of the gradients of the transformed losses,
    whatever the route."""
    model = Net()
    balancer = make(name, model)
    step(balancer, model)
    if balancer.weights is None or balancer.ema:
        assert base(name) in WITHOUT_WEIGHTS
        return
    last_batch = 2 if base(name) in THREE else 0
    losses = model.losses(model.features(last_batch))
    factors = balancer.weights
    if base(name) not in THREE or name.endswith("+log"):
        factors = factors * balancer.slopes
    gradients = torch.autograd.grad(losses, list(model.trunk), list(factors))
    expected = torch.cat([g.reshape(-1) for g in gradients])
    if balancer.aggregator.max_norm:
        expected = expected * min(1.0, balancer.aggregator.max_norm / expected.norm().item())
    assert_close(model.shared_gradient(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "name", ["GradDrop", "GradDrop-features", "GradDrop+log", "GradDrop-features+log"]
)
def test_graddrop_that_leaks_everything_is_the_sum(name):
    model = Net()
    plain = Net()
    step(make(name, model, leak=1.0), model)
    step(make(f"EW{name[len(base(name)) :]}", plain), plain)
    assert_close(model.grads(), plain.grads(), rtol=1e-10, atol=1e-12)
