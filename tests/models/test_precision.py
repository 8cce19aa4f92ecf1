"""How a network is run: half precision, channels-last, recomputed, compiled; numbers stay."""

import copy
import dataclasses
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.amp import GradScaler
from torch.testing import assert_close

from dbmtl import make_balancer
from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.loop import Loop
from dbmtl.experiments.step import evaluate
from dbmtl.models.deeplab import DeepLab
from dbmtl.models.precision import Rewound, checkpointed, efficient, half_precision, map_tensors

METHODS = ["EW", "DB-MTL", "CAGrad"]
SWITCHES = {
    "plain": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "channels-last": {"channels_last": True},
    "checkpoint": {"checkpoint": True},
    "aot_eager": {"compile": "aot_eager"},
    "aot_eager and checkpoint": {"compile": "aot_eager", "checkpoint": True},
    "all": {"precision": "bf16", "channels_last": True, "compile": "aot_eager", "checkpoint": True},
}


class Net(nn.Module):
    """Convolutions, batch norm, dropout, a head a task; with a task's number, that head alone."""

    def __init__(self, tasks=3, dropout=0.0):
        super().__init__()
        first = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(dropout)]
        self.trunk = nn.Sequential(
            *first, nn.Conv2d(8, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh()
        )
        self.heads = nn.ModuleList(nn.Conv2d(6, 1, 1) for _ in range(tasks))

    def forward(self, images, task=None):
        shared = self.trunk(images)
        if task is not None:
            return self.heads[task](shared)
        return {t: head(shared) for t, head in enumerate(self.heads)}


def net(dtype=torch.float32, tasks=3, dropout=0.0, seed=0, **how):
    torch.manual_seed(seed)
    return efficient(Net(tasks, dropout).to(dtype), **how)


def images_of(model, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 10, 10, generator=generator, dtype=torch.float64)
    return images.to(next(model.parameters()).dtype)


def losses_of(model, seed=0, factor=1.0, multi_input=False):
    images = images_of(model, seed)
    if multi_input:
        predictions = {t: model(images + t, t) for t in range(len(model.heads))}
    else:
        predictions = model(images)
    losses = []
    for t, prediction in predictions.items():
        error = (prediction - images[:, t % 3, None]).square().mean()
        losses.append(factor * 10.0 ** (t - 1) * error)
    return losses


def train(model, method="DB-MTL", scaler=None, steps=5, grads="loop", multi_input=False, **hyper):
    balancer = make_balancer(
        method, shared=model.trunk, num_tasks=len(model.heads), grads=grads, **hyper
    )
    optimizer = torch.optim.SGD([*model.parameters(), *balancer.parameters()], 0.05)
    torch.manual_seed(1)
    for step in range(steps):
        z = []
        hook = model.trunk.register_forward_hook(
            lambda trunk, inputs, output, z=z: z.append(output)
        )
        losses = losses_of(model, step, multi_input=multi_input)
        hook.remove()
        assert len(z) == (len(losses) if multi_input else 1) and all(torch.is_tensor(x) for x in z)
        features = None
        if balancer.level == "features":
            features = z if multi_input else z[0]
        balancer.backward(losses, scaler=scaler, features=features)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return model.state_dict()


def way(state, start):
    names = [name for name in start if "num_" not in name]
    return torch.cat([(state[n].double() - start[n].double()).flatten() for n in names])


def difference(state, expected, dtype=torch.float32):
    """How far apart, relative to the way from the start."""
    start = net(dtype).state_dict()
    expected_way = way(expected, start)
    return ((way(state, start) - expected_way).norm() / expected_way.norm()).item()


def is_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


# ----------------------------------------------------------------------------------- half precision


@pytest.mark.full
@pytest.mark.parametrize("method", [*METHODS, "IMTL-L", "MGDA-UB", "MoCo"])
def test_bf16_equals_float32_to_its_precision(method):
    reference = train(net(), method)
    assert 1e-5 < difference(train(net(precision="bf16"), method), reference) < 0.03


@pytest.mark.parametrize("scale", [2.0**4, 2.0**10])
@pytest.mark.parametrize("method", [*METHODS, "IMTL-L", "MGDA-UB", "MoCo"])
def test_fp16_with_a_scaler_equals_float32_to_its_precision(method, scale):
    reference = train(net(), method)
    scaler = GradScaler("cpu", scale)
    assert 1e-6 < difference(train(net(precision="fp16"), method, scaler), reference) < 0.006
    assert scaler.get_scale() == scale  # no step was left out


@pytest.mark.parametrize("method", METHODS)
def test_fp16_from_the_default_scale_on_leaves_out_steps_and_goes_on(method):
    scaler = GradScaler("cpu", 2.0**30)
    state = train(net(precision="fp16"), method, scaler, steps=30)
    assert 1 < scaler.get_scale() < 2.0**30
    assert all(value.isfinite().all() for value in state.values())
    assert (state["trunk.0.weight"] - net().state_dict()["trunk.0.weight"]).norm() > 0.01


def gradient(model, method, factor, scaler=None):
    balancer = make_balancer(method, shared=model.trunk, num_tasks=3)
    balancer.backward(losses_of(model, factor=factor), scaler=scaler)
    gradient = torch.cat([p.grad.flatten() for p in model.trunk.parameters()])
    return gradient if scaler is None else gradient / scaler.get_scale()


@pytest.mark.parametrize("method", ["EW", "CAGrad", "UW"])
def test_small_losses_underflow_in_fp16_without_a_scaler_and_not_with_it(method):
    expected = gradient(net(), method, 1e-6)
    without = gradient(net(precision="fp16"), method, 1e-6)
    scaled = gradient(net(precision="fp16"), method, 1e-6, GradScaler("cpu", 2.0**24))
    assert (without - expected).norm() > 0.1 * expected.norm()
    assert (scaled - expected).norm() < 0.005 * expected.norm()


@pytest.mark.parametrize("factor", [1.0, 1e-4])
def test_the_logarithm_lifts_small_losses_by_itself(factor):
    expected = gradient(net(), "DB-MTL", factor)
    in_half = gradient(net(precision="fp16"), "DB-MTL", factor)
    assert (in_half - expected).norm() < 0.005 * expected.norm()


@pytest.mark.full
@pytest.mark.parametrize("how", SWITCHES)
def test_predictions_losses_and_gradients_are_float32(how):
    model = net(**SWITCHES[how])
    assert {p.dtype for p in model(images_of(model, 0)).values()} == {torch.float32}
    assert model(images_of(model, 0), 1).dtype == torch.float32
    losses = losses_of(model)
    assert {loss.dtype for loss in losses} == {torch.float32}
    make_balancer("DB-MTL", shared=model.trunk, num_tasks=3).backward(losses)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_trunk_runs_in_the_precision_asked_for(precision):
    model, types = net(precision=precision), []
    model.trunk[0].register_forward_hook(lambda layer, inputs, output: types.append(output.dtype))
    model(images_of(model, 0))
    expected = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert types == [expected[precision]]
    assert not torch.is_autocast_enabled("cpu")


def test_float64_predictions_are_not_lowered():
    predictions = net(torch.float64, checkpoint=True)(torch.ones(1, 3, 4, 4).double())
    assert predictions[0].dtype == torch.float64


# ------------------------------------------------------------------------------------ checkpointing


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grads", ["loop", "split"])
@pytest.mark.parametrize("method", [*METHODS, "MGDA-UB", "GradDrop"])
def test_checkpointing_is_exact_with_dropout_and_batch_norm(method, grads, dtype):
    plain = net(dtype, dropout=0.4)
    ours = net(dtype, dropout=0.4, checkpoint=True)
    for model in (plain, ours):
        model.trunk[5].momentum = None  # the mean of all batches: it depends on their number
    expected = train(plain, method, grads=grads)
    assert_close(train(ours, method, grads=grads), expected, rtol=0, atol=0)
    assert ours.trunk[1].num_batches_tracked == ours.trunk[5].num_batches_tracked == 5


@pytest.mark.parametrize("method", [*METHODS, "MGDA-UB"])
def test_checkpointing_is_exact_with_batched_gradients(method):
    plain, ours = (train(net(checkpoint=c), method, grads="batched") for c in (False, True))
    assert_close(ours, plain, rtol=0, atol=0)


def test_batched_gradients_of_a_checkpointed_trunk_with_dropout_are_refused_in_words():
    message = "grads='batched' cannot recompute dropout: use grads='split'"
    with pytest.raises(RuntimeError, match=message):
        train(net(dropout=0.4, checkpoint=True), grads="batched")


@pytest.mark.parametrize("switch", ["bf16", "fp16", "channels-last"])
def test_checkpointing_is_exact_in_half_precision_and_channels_last(switch):

    def trained(checkpoint):
        model = net(dropout=0.4, checkpoint=checkpoint, **SWITCHES[switch])
        return train(model, scaler=GradScaler("cpu", 2.0**8) if switch == "fp16" else None)

    assert_close(trained(True), trained(False), rtol=0, atol=0)


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize(
    ("method", "grads", "again"),
    [("EW", "loop", 1), ("DB-MTL", "loop", "T"), ("DB-MTL", "split", "T"), ("DB-MTL", "batched", 1)]
    + [("CAGrad", "loop", "T"), ("MGDA-UB", "loop", 1), ("UW", "split", 1)],
)
def test_the_trunk_is_recomputed_once_in_each_backward_pass(method, grads, again, tasks):
    model, runs = net(tasks=tasks, checkpoint=True), []
    model.trunk[4].register_forward_hook(lambda *_: runs.append(1))
    train(model, method, steps=1, grads=grads)
    assert len(runs) == 1 + (tasks if again == "T" else again)


@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
def test_multi_input_recomputes_each_tasks_forward_once(method):
    model, runs = net(checkpoint=True), []
    model.trunk[4].register_forward_hook(lambda *_: runs.append(1))
    ours = train(model, method, steps=2, multi_input=True)
    assert len(runs) == 2 * (3 + 3)
    assert_close(ours, train(net(), method, steps=2, multi_input=True), rtol=0, atol=0)
    assert ours["trunk.1.num_batches_tracked"] == 2 * 3


def test_pieces_of_a_batch_are_recomputed_too():
    def run(model):
        balancer = make_balancer("DB-MTL", shared=model.trunk, num_tasks=3)
        torch.manual_seed(1)
        for seed in range(2):
            balancer.accumulate(losses_of(model, seed), 4)
        balancer.backward()
        return [p.grad for p in model.parameters()], list(model.buffers())

    assert_close(run(net(dropout=0.4, checkpoint=True)), run(net(dropout=0.4)), rtol=0, atol=0)


def test_a_layer_that_reads_what_it_writes_is_recomputed_from_the_old_state():
    """Spectral norm moves its vectors in every training pass and reads them in the same pass."""

    def run(**how):
        model = net()
        nn.utils.parametrizations.spectral_norm(model.trunk[0])
        return train(efficient(model, **how), steps=3)

    assert_close(run(checkpoint=True), run(), rtol=0, atol=0)


def test_random_numbers_after_a_step_are_the_same():
    drawn = []
    for checkpoint in (False, True):
        train(net(dropout=0.4, checkpoint=checkpoint))
        drawn.append(torch.rand(3))
    assert_close(drawn[0], drawn[1], rtol=0, atol=0)


def test_evaluation_recomputes_nothing_and_moves_no_statistics():
    model, runs = net(checkpoint=True), []
    train(model, steps=2)
    model.trunk[0].register_forward_hook(lambda *_: runs.append(1))
    model.eval()
    before = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        predictions = model(images_of(model, 9))
    plain = net().eval()
    plain.load_state_dict(before)
    assert_close(predictions, plain(images_of(plain, 9)), rtol=0, atol=0)
    assert len(runs) == 1
    assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_rewound_gives_the_buffers_back_after_an_error():
    norm = nn.BatchNorm1d(2)
    rewound, mean = Rewound(norm), norm.running_mean
    with pytest.raises(KeyError), rewound, rewound:
        norm(torch.randn(4, 2) + 5)
        raise KeyError
    assert norm.running_mean is mean and mean.tolist() == [0, 0]


def saved_bytes(model):
    """Bytes that wait for a backward pass, parameters and buffers aside."""
    parameters = {p.data_ptr() for p in model.state_dict().values()}
    sizes = {}

    def pack(x):
        if x.data_ptr() not in parameters:
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model.trunk(images_of(model, 0)).sum()
    return sum(sizes.values())


def test_a_checkpointed_trunk_keeps_its_input_alone():
    image_bytes = images_of(net(), 0).nbytes
    assert saved_bytes(net(checkpoint=True)) == image_bytes
    assert saved_bytes(net()) > 5 * image_bytes


def test_checkpointed_takes_any_module():
    layer = nn.Linear(2, 3)
    x = torch.ones(1, 2, requires_grad=True)
    assert_close(checkpointed(layer.forward, layer, x), layer(x))
    with torch.no_grad():
        assert not checkpointed(layer.forward, layer, x).requires_grad


# ------------------------------------------------------------------------------------ channels-last


def test_channels_last_weights_and_inputs():
    model, tensors = net(channels_last=True), []
    model.trunk[0].register_forward_hook(
        lambda layer, inputs, output: tensors.extend([inputs[0], output])
    )
    balancer = make_balancer("DB-MTL", shared=model.trunk, num_tasks=3)
    balancer.backward(losses_of(model))
    weights = [model.trunk[0].weight, model.trunk[4].weight]
    assert len(tensors) == 2 and all(is_last(x) for x in tensors + weights)
    plain = net()
    make_balancer("DB-MTL", shared=plain.trunk, num_tasks=3).backward(losses_of(plain))
    gradients = [p.grad for p in model.parameters()]
    assert_close(gradients, [p.grad for p in plain.parameters()], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_channels_last_equals_the_plain_run(method):
    ours, plain = (train(net(torch.float64, channels_last=last), method) for last in (True, False))
    assert difference(ours, plain, torch.float64) < 1e-10


def test_channels_last_weights_stay_so_when_a_state_is_loaded():
    model = net(channels_last=True)
    other = net(seed=1)
    model.load_state_dict(other.state_dict())
    assert is_last(model.trunk[0].weight)
    assert_close(model(images_of(model, 0)), other(images_of(other, 0)), rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------- compiled


@pytest.fixture
def fresh_compiler():
    """Nothing compiled before, in memory or on disk; no silent way back to the plain run."""
    from torch._functorch import config

    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    no_way_back = torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
    with no_way_back, config.patch(enable_autograd_cache=False, donated_buffer=True):
        yield
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert not torch._dynamo.utils.counters["graph_break"]
    torch.compiler.reset()


@pytest.mark.full
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("checkpoint", [False, True])
def test_a_trunk_through_aot_eager_equals_the_plain_run(checkpoint):
    for method in (*METHODS, "MGDA-UB"):
        for grads in ("loop", "split", "batched"):
            plain = train(net(), method, grads=grads)
            ours = train(net(compile="aot_eager", checkpoint=checkpoint), method, grads=grads)
            assert difference(ours, plain) < 1e-5
            name = "trunk.5.running_var"
            assert_close(ours[name], plain[name], rtol=1e-4, atol=1e-5)
            assert ours["trunk.5.num_batches_tracked"] == 5


needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="inductor needs C++"
)


@pytest.mark.full
@needs_compiler
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_trunk_through_inductor_equals_the_plain_run():
    """Equal weighting first: after its single pass the compiler could reuse DB-MTL's buffers."""

    def run(how, method, grads):
        model = Net()
        torch.manual_seed(0)  # one convolution: the C++ compiler takes its time
        model.trunk = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh())
        model.heads = net().heads
        return train(efficient(model, **how), method, grads=grads)

    ways = {"EW": "loop", "DB-MTL": "loop", "CAGrad": "split", "MGDA-UB": "loop"}
    for checkpoint in (False, True):
        for method, grads in ways.items():
            ours = run({"compile": True, "checkpoint": checkpoint}, method, grads)
            assert_close(ours, run({}, method, grads), rtol=1e-3, atol=1e-4)
            assert ours["trunk.1.num_batches_tracked"] == 5


@pytest.mark.full
def test_compiling_works_in_a_process_that_has_imported_nothing_else():
    code = """import torch; from dbmtl.models.precision import efficient
# the import of the compiler would take seconds, and hide what it has imported
torch.compile = lambda run, backend: run
model = torch.nn.Module(); model.trunk = torch.nn.Linear(1, 1)
efficient(model, compile=True)
assert torch._functorch.config.donated_buffer is False"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.full
@pytest.mark.usefixtures("fresh_compiler")
def test_networks_of_one_shape_are_compiled_once():
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(10):
            train(net(seed=seed, compile="aot_eager"), steps=2)


# ------------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("how", SWITCHES)
def test_names_states_and_the_trunk_stay(how):
    model = Net()
    trunk = model.trunk
    names = list(model.state_dict())
    parameters = list(model.parameters())
    assert efficient(model, **SWITCHES[how]) is model and model.trunk is trunk
    assert list(model.state_dict()) == names
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert isinstance(model, Net) and repr(model) == repr(Net())
    Net().load_state_dict(model.state_dict())


def test_without_a_switch_nothing_is_touched():
    assert type(net()) is Net and type(net().trunk) is nn.Sequential


@pytest.mark.full
@pytest.mark.parametrize("how", ["bf16", "checkpoint", "aot_eager and checkpoint"])
def test_a_copy_is_a_whole_copy(how):
    model = net(**SWITCHES[how])
    twin = copy.deepcopy(model)
    train(twin, steps=2)
    assert_close(model.state_dict(), net().state_dict(), rtol=0, atol=0)
    assert twin.trunk[1].num_batches_tracked == 2


@pytest.mark.parametrize("how", SWITCHES)
def test_a_pickled_network_trains_as_the_network_itself(how):
    model = net(dropout=0.4, **SWITCHES[how])
    train(model, steps=1)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is type(model) and type(loaded.trunk) is type(model.trunk)
    assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    state = copy.deepcopy(model.state_dict())
    ours = train(loaded, steps=3)
    assert_close(model.state_dict(), state, rtol=0, atol=0)  # nothing is shared
    assert_close(ours, train(model, steps=3), rtol=0, atol=0)


@pytest.mark.full
def test_a_network_is_loaded_by_another_process(tmp_path):
    torch.manual_seed(0)
    switches = {"precision": "bf16", "channels_last": True, "checkpoint": True}
    model = efficient(DeepLab({"depth": 1, "normal": 3}, 4), **switches).eval()
    images = torch.rand(1, 3, 40, 40)
    torch.save((model, images, model(images)), tmp_path / "model.pt")
    code = """import sys, torch
model, images, predictions = torch.load(sys.argv[1], weights_only=False)
torch.testing.assert_close(model(images), predictions, rtol=1e-3, atol=1e-4)
assert model.made_efficient and type(model.trunk).__name__ == "ResNet"
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pt"], check=True)


@pytest.mark.full
def test_a_compiled_network_keeps_its_buffers_in_another_process(tmp_path):
    model = efficient(DeepLab({"depth": 1}, 4), compile="aot_eager")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    code = """import pickle, sys, torch
torch.compile = lambda run, backend: run  # the import of the compiler would take seconds
pickle.load(open(sys.argv[1], "rb"))
assert torch._functorch.config.donated_buffer is False
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "model.pickle"], check=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "bf-16"}, "unknown precision 'bf-16': did you mean 'bf16'"),
        ({"precision": "float16"}, "known: bf16, fp16, fp32"),
        ({"compile": "inducter"}, "unknown backend 'inducter': did you mean 'inductor'"),
    ],
)
def test_unknown_names(options, message):
    with pytest.raises(ValueError, match=message):
        efficient(Net(), **options)


def test_a_second_call_is_refused():
    with pytest.raises(ValueError, match="before"):
        efficient(net(checkpoint=True), precision="bf16")


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("how", ["checkpoint", "aot_eager"])
def test_a_trunk_that_is_used_in_parts_is_found_out(how):
    class InParts(Net):
        def forward(self, images):
            return {0: self.heads[0](self.trunk[4:](self.trunk[:4](images)))}

    with pytest.raises(RuntimeError, match="InParts.forward does not call self.trunk"):
        efficient(InParts(), **SWITCHES[how])(torch.ones(1, 3, 4, 4))
    assert efficient(InParts(), precision="bf16")(torch.ones(2, 3, 4, 4))[0].dtype == torch.float32


def test_map_tensors_keeps_the_structure():
    nested = {"a": [torch.ones(1), "text"], "b": (torch.zeros(2), None)}
    mapped = map_tensors(lambda x: x + 1, nested)
    assert mapped["a"][1] == "text" and mapped["b"][1] is None and type(mapped["b"]) is tuple
    assert_close([mapped["a"][0], mapped["b"][0]], [2 * torch.ones(1), torch.ones(2)])
    pair = torch.return_types.max((torch.ones(1), torch.zeros(1, dtype=torch.long)))
    tripled = map_tensors(lambda x: x * 3, list(pair))
    assert_close(tripled, [3 * torch.ones(1), torch.zeros(1, dtype=torch.long)])


def test_half_precision_by_name():
    with half_precision("bf16"):
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    with half_precision("fp32"):
        assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ValueError, match="unknown precision"):
        half_precision("int8")


# ----------------------------------------------------------------------------- the benchmarks' loop


def end_of_training(name, how, method="DB-MTL", steps=3, **scale):
    plain = get_benchmark(name)
    benchmark = dataclasses.replace(plain, network=lambda *a: efficient(plain.network(*a), **how))
    size = dataclasses.replace(plain.scale("smoke"), **scale)
    loop = Loop(benchmark, benchmark.load(size, "cpu", 0), benchmark.tasks, method, 0, size)
    for _ in range(steps):
        loop.step()
    return loop.model.state_dict(), evaluate(loop.model, loop.tasks, loop.data.test, 16)


@pytest.mark.parametrize("name", ["toy", "toy-multi", "qm9"])
@pytest.mark.parametrize("method", ["DB-MTL", "IMTL-G-features"])
def test_every_benchmark_is_the_same_with_checkpointing(name, method):
    ours = end_of_training(name, {"checkpoint": True}, method)
    assert_close(ours, end_of_training(name, {}, method), rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", ["toy", "toy-multi"])
def test_the_toys_run_in_half_precision(name, precision):
    state, metrics = end_of_training(name, {"precision": precision}, extra={"precision": precision})
    expected, plain = end_of_training(name, {})
    for key in state:
        assert (state[key] - expected[key]).norm() < 0.05 * (1 + expected[key].norm())
    assert metrics.keys() == plain.keys()
