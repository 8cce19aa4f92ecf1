"""What a new user gets wrong is answered by name, with what to write in its place."""

import inspect
import warnings

import pytest
import torch
from helpers.methods import BASES, EPOCHS, FEATURES, Net, every_base, make, same, step
from torch import nn

from dbmtl import (
    DBMTL,
    EMA,
    Balancer,
    CAGrad,
    Identity,
    Log,
    MaxNorm,
    Sum,
    get_benchmark,
    hyperparameters,
    make_balancer,
    method_facts,
)
from dbmtl.registry import method_classes, recipe, settings_of

WEIGHS_LOSSES = {  # one backward pass of a sum: nothing is balanced by its gradient
    "EW", "LS", "GLS", "RLW", "DWA", "UW", "IMTL-L", "IGBv2", "FAMO", "STCH", "UW-SO", "loss-only",
}  # fmt: skip


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleDict({name: nn.Linear(4, 1) for name in ("seg", "depth")})

    def losses(self, seed=0):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        z = self.trunk(x).tanh()
        return {name: head(z).square().mean() + 0.1 for name, head in self.heads.items()}


# ------------------------------------------------------------------------------- misspelt options


MISSPELT = [
    (lambda m: DBMTL(shared=m.trunk, num_tasks=2, betta=0.5), "DBMTL has no option 'betta'; did "),
    (lambda m: DBMTL(shared=m.trunk, num_tasks=2, betta=0.5), "did you mean 'beta'"),
    (lambda m: DBMTL(shared=m.trunk, num_tasks=2, chek="off"), "did you mean 'check'"),
    (lambda m: DBMTL(shared=m.trunk, num_taks=2), "DBMTL needs 'num_tasks'; 'num_taks' is miss"),
    (lambda m: DBMTL(share=m.trunk, num_tasks=2), "DBMTL needs 'shared'; 'share' is misspelt"),
    (lambda m: Balancer(Identity(), Sum(), shared=m.trunk, num_task=2), "Balancer needs 'num_tas"),
    (
        lambda m: Balancer(Identity(), Sum(), shared=m.trunk, num_tasks=2, emma=None),
        "Balancer has no option 'emma'; did you mean 'ema'",
    ),
    (lambda m: make_balancer("EW", shared=m.trunk, num_taks=2), "make_balancer needs 'num_tasks'"),
    (lambda m: DBMTL(shared=m.trunk, num_tasks=2, aggregator=Sum()), "has no option 'aggregator'"),
    (lambda m: EMA(bta=0.5), "EMA has no option 'bta'; did you mean 'beta'"),
    (lambda m: hyperparameters(nam="EW"), "hyperparameters needs 'name'; 'nam' is misspelt"),
    (lambda m: settings_of(nam="EW"), "settings_of needs 'name'; 'nam' is misspelt"),
    (lambda m: method_facts(nam="EW"), "method_facts needs 'name'; 'nam' is misspelt"),
    (lambda m: get_benchmark(nam="toy"), "get_benchmark needs 'name'; 'nam' is misspelt"),
]


@pytest.mark.parametrize("call, message", MISSPELT)
def test_a_misspelt_option_gets_the_nearest_name(call, message):
    with pytest.raises(TypeError, match=message):
        call(Model())


TWO_MISTAKES = {
    "DBMTL": lambda m: DBMTL(shared=m.trunk, gradz="loop"),
    "Balancer": lambda m: Balancer(Log(), Sum(), shared=m.trunk, gradz="loop"),
    "make_balancer": lambda m: make_balancer("CAGrad", shared=m.trunk, gradz="loop"),
}


@pytest.mark.parametrize("function", TWO_MISTAKES)
def test_a_misspelt_option_and_a_forgotten_one_are_told_together(function):
    message = f"{function} has no option 'gradz'; did you mean 'grads'. It needs 'num_tasks'. Known"
    with pytest.raises(TypeError, match=message):
        TWO_MISTAKES[function](Model())


def test_a_method_of_a_name_knows_its_own_options_too():
    trunk = Model().trunk
    message = "has no option 'rescle'; did you mean 'rescale'. It needs 'num_tasks'"
    with pytest.raises(TypeError, match=f"make_balancer {message}"):
        make_balancer("CAGrad", shared=trunk, rescle=1)
    with pytest.raises(TypeError, match=f"make_balancer {message}"):
        make_balancer(name="CAGrad", shared=trunk, rescle=1)
    with pytest.raises(TypeError, match="recipe needs 'num_tasks'; 'num_task' is misspelt.*'resc"):
        recipe("CAGrad", num_task=2, rescle=1)
    with pytest.raises(TypeError, match="make_balancer needs 'name'; 'nam' is misspelt.$"):
        make_balancer(nam="CAGrad", shared=trunk, num_tasks=2, c=0.4)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'num_tasks'"):
        make_balancer("CAGrad", shared=trunk, c=0.4)


def test_all_misspelt_options_are_told_together():
    trunk = Model().trunk
    with pytest.raises(TypeError, match="did you mean 'grads'. It has no option 'betta'; did you"):
        DBMTL(shared=trunk, num_tasks=2, gradz="loop", betta=0.5)
    with pytest.raises(
        ValueError, match="did you mean 'rescale'. It has no 'chek'; did you mean '"
    ):
        make_balancer("CAGrad", shared=trunk, num_tasks=2, rescle=1, chek="off")


@pytest.mark.parametrize("name", method_classes())
def test_every_class_of_a_method_names_both_mistakes(name):
    method = method_classes()[name]
    parameters = inspect.signature(method).parameters
    needed = [key for key, p in parameters.items() if p.default is p.empty]
    free = [key for key in parameters if key not in needed]
    sentences = [f"needs '{key}'" for key in needed]
    if free:
        sentences.append(f"has no option '{free[-1]}s'; did you mean '{free[-1]}'")
    with pytest.raises(TypeError) as error:
        method(**({f"{free[-1]}s": 1} if free else {"xyzzy": 1}))
    assert str(error.value).startswith(f"{name} has no option")
    assert all(sentence in str(error.value) for sentence in sentences)


def test_a_method_of_ones_own_is_told_as_well():
    class Mine(Log):
        def __init__(self, strength, **options):
            super().__init__(**options)

    with pytest.raises(TypeError, match="Mine needs 'strength'; 'strenght' is misspelt"):
        Mine(strenght=3)
    with pytest.raises(TypeError, match="Mine has no option 'epz'; did you mean 'eps'"):
        Mine(3, epz=1e-6)


def test_an_option_like_no_other_gets_the_list():
    with pytest.raises(TypeError, match=r"has no option 'xyzzy'\. Known: \['shared', 'num_tasks'"):
        DBMTL(shared=Model().trunk, num_tasks=2, xyzzy=1)


def test_what_is_forgotten_and_not_misspelt_is_told_by_python():
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'num_tasks'"):
        DBMTL(shared=Model().trunk)


def test_signatures_stay_what_they_are():
    assert list(inspect.signature(DBMTL).parameters)[:3] == ["shared", "num_tasks", "beta"]
    assert list(inspect.signature(Balancer).parameters)[:2] == ["transform", "aggregator"]


NAMES = [
    ("log+CAGrad", {}, r"the logarithm comes last, CAGrad\+log"),
    ("log + CAGrad", {}, r"the logarithm comes last, CAGrad\+log"),
    ("Log+DB-MTL", {}, r"the logarithm comes last, DB-MTL\+log"),
    ("CAGrad(c=0.4)", {}, r"options are keywords, make_balancer\('CAGrad', c=0.4, \.\.\.\)"),
    ("CAGrad(c=0.4)+log", {}, r"make_balancer\('CAGrad\+log', c=0.4, \.\.\.\)"),
    ("DB-MTL(beta=0.1;alpha=mean)", {}, r"'DB-MTL', beta=0.1, alpha=mean, \.\.\."),
    ("CAGrad", {"c": "0.4"}, "c is a number written as text; write c=0.4, without quotes"),
    ("DB-MTL", {"alpha": "0.5"}, "write alpha=0.5, without quotes"),
    ("CAGrad", {"c": "large"}, "c must be a finite number.*got 'large'"),
]


@pytest.mark.parametrize("name, hyper, message", NAMES)
def test_a_method_in_the_wrong_form_is_told_the_right_one(name, hyper, message):
    with pytest.raises(ValueError, match=message):
        make_balancer(name, shared=Model().trunk, num_tasks=2, **hyper)


def test_text_for_a_number_is_refused_by_the_classes_too():
    with pytest.raises(ValueError, match="c must be a finite number.*got '0.4'"):
        CAGrad(c="0.4")
    with pytest.raises(ValueError, match="beta must be a finite number.*got '0.5'"):
        DBMTL(shared=Model().trunk, num_tasks=2, beta="0.5")


# ------------------------------------------------------------------------------------- the losses


SUMS = {
    "sum": lambda losses: sum(losses.values()),
    "mean": lambda losses: torch.stack(list(losses.values())).mean(),
    "one of them": lambda losses: losses["seg"],
    "number": lambda losses: 0.5,
}


@pytest.mark.parametrize("form", SUMS)
@pytest.mark.parametrize("method", ["EW", "DB-MTL", "CAGrad"])
def test_a_sum_of_losses_is_refused_and_changes_nothing(method, form):
    model = Model()
    balancer = make_balancer(method, shared=model.trunk, num_tasks=2)
    before = balancer.state_dict()
    with pytest.raises(ValueError, match=r"backward\(\[loss_a, loss_b\]\), not their sum or mean"):
        balancer.backward(SUMS[form](model.losses()))
    with pytest.raises(ValueError, match="not their sum or mean"):
        balancer.accumulate(SUMS[form](model.losses()), 1)
    assert same(balancer.state_dict(), before)
    assert all(p.grad is None for p in model.parameters())


def test_a_sum_in_a_list_is_refused():
    model = Model()
    with pytest.raises(ValueError, match="expected 2 losses, got 1: one for each task, not their"):
        DBMTL(shared=model.trunk, num_tasks=2).backward([sum(model.losses().values())])


def test_first_a_list_and_then_a_dictionary():
    model = Model()
    balancer = DBMTL(shared=model.trunk, num_tasks=2)
    balancer.backward(list(model.losses().values()))
    with pytest.raises(ValueError, match="first step came as a list, and now as a dictionary.*seg"):
        balancer.backward(model.losses())
    assert balancer.step == 1


def test_a_dictionary_with_the_numbers_of_the_tasks_may_follow_a_list():
    model = Model()
    balancer = DBMTL(shared=model.trunk, num_tasks=2)
    balancer.backward(list(model.losses().values()))
    balancer.backward(dict(enumerate(model.losses().values())))
    assert balancer.step == 2


# ------------------------------------------------------------------------------------ the partition


def used_up(model):
    parameters = model.trunk.parameters()
    torch.optim.SGD(parameters, lr=0.1)
    return parameters


@pytest.mark.parametrize(
    "shared, kind, message",
    [
        (used_up, ValueError, "it is a generator that is used up.*give the module, or list"),
        (lambda m: None, TypeError, "`shared` is None: give the part of the model"),
        (lambda m: 3, TypeError, "`shared` is 3: give the part"),
        (lambda m: [m.trunk], TypeError, "the module Linear: give several modules as torch.nn.Mod"),
        (lambda m: nn.ReLU(), ValueError, "`shared` holds no trainable parameter"),
    ],
    ids=["generator", "None", "number", "list of modules", "module without parameters"],
)
def test_what_is_no_shared_part_is_refused(shared, kind, message):
    with pytest.raises(kind, match=message):
        DBMTL(shared=shared(Model()), num_tasks=2)


def warned(method, shared, network, steps=2, **options):
    """The warnings of the first steps."""
    balancer = make_balancer(method, shared=shared, num_tasks=2, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(steps):
            balancer.backward(network.losses(seed))
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("method", ["DB-MTL", "CAGrad", "PCGrad", "GradNorm"])
def test_a_whole_network_as_shared_is_told_once(method):
    model = Model()
    [message] = warned(method, model, model, model=model)
    assert "nothing belongs to one task alone: the whole network was given" in message
    assert "heads.seg.weight [1, 4]" in message and "shared=model.trunk" in message


@pytest.mark.parametrize("method", ["DB-MTL", "CAGrad", "PCGrad", "GradNorm"])
def test_a_head_inside_shared_is_told_once(method):
    model = Model()
    shared = [*model.trunk.parameters(), *model.heads["seg"].parameters()]
    [message] = warned(method, shared, model)
    assert message.startswith("2 tensors inside `shared` are reached by one loss alone")
    assert "unnamed [1, 4]" in message and "leave them out of `shared`" in message


def test_heads_inside_shared_are_found_while_accumulating():
    model = Model()
    balancer = DBMTL(shared=model, num_tasks=2)
    losses = model.losses()
    balancer.accumulate(losses, {"seg": 5, "depth": 0})
    with pytest.warns(UserWarning, match="the whole network was given"):
        balancer.accumulate(model.losses(), {"seg": 0, "depth": 5})


def test_a_sum_is_not_balanced_so_nothing_is_told():
    model = Model()
    assert warned("EW", model, model) == []


@every_base
def test_a_right_partition_is_told_nothing(name):
    model = Net()
    balancer = make(name, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(balancer, model)
    assert balancer.step == 1


BALANCES_GRADIENTS = [name for name in BASES if name not in WEIGHS_LOSSES | FEATURES]


@pytest.mark.parametrize("name", BALANCES_GRADIENTS)
def test_every_method_that_balances_gradients_tells_of_a_whole_network(name):
    model = Net()
    options = {"seed": 7} if name in ("PCGrad", "GradDrop", "GradVac") else {}
    balancer = make_balancer(name, shared=list(model.parameters()), num_tasks=3, **options)
    with pytest.warns(UserWarning, match="nothing belongs to one task alone"):
        step(balancer, model)


def test_one_task_has_no_heads_to_slip_in():
    model = Model()
    balancer = Balancer(Identity(), MaxNorm(), shared=model, num_tasks=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        balancer.backward([model.losses()["seg"]])


# -------------------------------------------------------------------------------- a compiled model


DONATED = (
    "This backward function was compiled with non-empty donated buffers which requires "
    "create_graph=False and retain_graph=False."
)


class Donating(torch.autograd.Function):
    """A pass that raises what a compiled model raises where its graph is kept."""

    @staticmethod
    def forward(ctx, z):
        return z * 1

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError(DONATED)


@pytest.mark.parametrize("method", ["DB-MTL", "CAGrad"])
def test_donated_buffers_are_told_in_our_words(method):
    model = Model()
    balancer = make_balancer(method, shared=model.trunk, num_tasks=2)
    losses = {name: Donating.apply(loss) for name, loss in model.losses().items()}
    with pytest.raises(RuntimeError, match=r"torch\._functorch\.config\.donated_buffer = False"):
        balancer.backward(losses)
    with pytest.raises(RuntimeError, match=r"torch\._functorch\.config\.donated_buffer = False"):
        balancer.accumulate(losses, 1)


@pytest.mark.full
def test_a_model_that_was_compiled_for_single_passes(monkeypatch):
    """PyTorch donates buffers where the first pass of a compiled graph was an ordinary one."""
    from torch._functorch import config

    def a_step_after_an_ordinary_pass():
        torch._dynamo.reset()
        model = Model()
        balancer = DBMTL(shared=model.trunk, num_tasks=2)
        losses = torch.compile(lambda: list(model.losses().values()), backend="aot_eager")
        sum(losses()).backward()
        balancer.backward(losses())
        return balancer.step

    monkeypatch.setattr(config, "donated_buffer", True)
    with pytest.raises(RuntimeError, match=r"torch\._functorch\.config\.donated_buffer = False"):
        a_step_after_an_ordinary_pass()
    monkeypatch.setattr(config, "donated_buffer", False)
    assert a_step_after_an_ordinary_pass() == 1


# -------------------------------------------------------------------- epochs that nobody tells of


def quiet_steps(name, number, **options):
    """The warnings of that many steps without an end of an epoch."""
    model = Net()
    balancer = make(name, model, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(number):
            step(balancer, model, seed)
            for p in [*model.parameters(), *balancer.parameters()]:
                p.grad = None
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("name", sorted(EPOCHS))
def test_a_method_that_waits_for_epochs_warns_once_after_200_steps(name):
    [message] = quiet_steps(name, 203)
    assert message.startswith(f"{name} waits for the end of an epoch, and 200 steps passed")
    assert "balancer.end_epoch() after each epoch, or give window=" in message


@pytest.mark.parametrize("name", sorted(EPOCHS))
def test_with_a_window_or_an_epoch_nothing_is_told(name):
    assert quiet_steps(name, 203, window=50) == []
    model = Net()
    balancer = make(name, model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(203):
            balancer.backward(model.losses(model.features(seed)))
            if seed == 100:
                balancer.end_epoch()


def test_methods_without_epochs_are_told_nothing():
    assert quiet_steps("UW", 203) == quiet_steps("DB-MTL", 203) == []
    assert quiet_steps("GradNorm", 203, initial="first") == []


# ---------------------------------------------------------------- updates that somebody rescales


def updated_by(optimizer_class, method="MTAdam", steps=12, moved=(), **options):
    model = Net(dtype=torch.float32)
    balancer = make(method, model)
    optimizer = optimizer_class(model.parameters(), **({"lr": 1e-3} | options))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(steps):
            balancer.backward(model.losses(model.features(seed)))
            optimizer.step()
            optimizer.zero_grad()
            if seed in moved:
                with torch.no_grad():
                    model.trunk[0] += torch.randn(20)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("optimizer_class", [torch.optim.Adam, torch.optim.RMSprop])
def test_mtadam_under_another_adaptive_optimizer_says_so_once(optimizer_class):
    [message] = updated_by(optimizer_class)
    assert message.startswith("MTAdam writes finished updates into .grad")
    assert "use torch.optim.SGD without momentum" in message


@pytest.mark.parametrize("options", [{}, {"lr": 1e-7}, {"weight_decay": 1e-4}, {"lr": 10.0}])
def test_mtadam_under_sgd_says_nothing(options):
    assert updated_by(torch.optim.SGD, **options) == []


def test_mtadam_says_nothing_where_weights_are_replaced_between_two_steps():
    """Once may be weights that were loaded; twice in a row is an optimizer."""
    assert updated_by(torch.optim.SGD, moved=(2, 5)) == []
    assert len(updated_by(torch.optim.SGD, moved=(4, 5))) == 1


def test_a_tensor_of_two_numbers_tells_nothing_of_the_optimizer():
    """Any move of it lies between its gradient and itself: the next tensor is looked at."""
    pair = nn.Parameter(torch.tensor([1.0, -2.0]))
    weight = nn.Parameter(torch.linspace(-1, 1, 30))
    balancer = make_balancer("MTAdam", shared=[pair, weight], num_tasks=2)
    optimizer = torch.optim.Adam([pair, weight], lr=1e-2)
    with pytest.warns(UserWarning, match="MTAdam writes finished updates into .grad"):
        for step in range(1, 6):
            slopes = torch.linspace(0, step, 30).sin()
            losses = [(weight * slopes).sum() + pair[0], weight.square().sum() + pair.sum()]
            balancer.backward(losses)
            optimizer.step()
            optimizer.zero_grad()


def test_other_methods_may_have_any_optimizer():
    assert updated_by(torch.optim.Adam, "DB-MTL") == []
