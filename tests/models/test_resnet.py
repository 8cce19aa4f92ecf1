"""Residual networks: torchvision's names and shapes, a second way to compute them, ImageNet weights."""

import hashlib
import io
import tarfile
import urllib.error
from email.message import Message

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

from dbmtl.models import resnet
from dbmtl.models.deeplab import ASPPHead, DeepLab
from dbmtl.models.imagenet_weights import load_imagenet
from dbmtl.models.resnet import BasicBlock, Bottleneck, ResNet, resnet18_trunk, resnet50_dilated

TASKS = {"segmentation": 13, "depth": 1, "normal": 3}


def norm(name, channels):
    vectors = [
        (f"{name}.{kind}", (channels,))
        for kind in ("weight", "bias", "running_mean", "running_var")
    ]
    return [*vectors, (f"{name}.num_batches_tracked", ())]


def published(name):
    """Names and shapes of torchvision's state dict in its order, from the table of layers in He et al. 2016."""
    blocks = {"resnet18": (2, 2, 2, 2), "resnet50": (3, 4, 6, 3)}[name]
    table = [("conv1.weight", (64, 3, 7, 7)), *norm("bn1", 64)]
    inside = 64
    for stage, (count, channels) in enumerate(zip(blocks, (64, 128, 256, 512), strict=True), 1):
        for i in range(count):
            at = f"layer{stage}.{i}."
            if name == "resnet18":
                outside, kernels = channels, [(channels, inside, 3), (channels, channels, 3)]
            else:
                outside = 4 * channels
                kernels = [(channels, inside, 1), (channels, channels, 3), (outside, channels, 1)]
            for k, (rows, columns, side) in enumerate(kernels, 1):
                table += [
                    (f"{at}conv{k}.weight", (rows, columns, side, side)),
                    *norm(f"{at}bn{k}", rows),
                ]
            if i == 0 and (stage > 1 or name == "resnet50"):
                table += [
                    (f"{at}downsample.0.weight", (outside, inside, 1, 1)),
                    *norm(f"{at}downsample.1", outside),
                ]
            inside = outside
    return [*table, ("fc.weight", (1000, inside)), ("fc.bias", (1000,))]


def filled(table, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(shape, generator=generator) if shape else torch.tensor(7)
        for name, shape in table
    }


MAKERS = {"resnet18": resnet18_trunk, "resnet50": resnet50_dilated}


@pytest.mark.parametrize(
    ("name", "entries", "numbers"), [("resnet18", 122, 11_689_512), ("resnet50", 320, 25_557_032)]
)
def test_resnet_has_torchvisions_names_shapes_and_order(name, entries, numbers):
    table = published(name)
    counted = sum(torch.Size(s).numel() for n, s in table if s and "running" not in n)
    assert (len(table), counted) == (entries, numbers)  # as torchvision documents them
    with torch.device("meta"):
        trunk = MAKERS[name]()
    assert [(n, tuple(v.shape)) for n, v in trunk.state_dict().items()] == table[:-2]


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("age", ["today", "2017"])
def test_resnet_loads_a_torchvision_shaped_file(name, age, tmp_path):
    state = filled(published(name))
    if age == "2017":
        state = {n: v for n, v in state.items() if "num_batches" not in n}
    torch.save(state, tmp_path / "weights.pth")
    trunk = MAKERS[name]()
    note = load_imagenet(trunk, name, tmp_path / "weights.pth")
    for key, value in trunk.state_dict().items():
        assert_close(value, state.get(key, torch.tensor(0)), rtol=0, atol=0)
    assert (
        note
        == f"weights.pth (SHA-256 {hashlib.sha256((tmp_path / 'weights.pth').read_bytes()).hexdigest()[:16]})"
    )


def test_resnet_names_the_entries_that_do_not_fit():
    trunk, full = resnet18_trunk(2), resnet18_trunk(2).state_dict()
    assert list(resnet.trunk_state(full, trunk)) == list(full)
    cases = {
        "1 entries do not fit, first bn1.bias: missing in the file, (2,) in the network": lambda s: (
            s.pop("bn1.bias")
        ),
        r"layer1.1.conv2.weight: (3, 2) in the file": lambda s: s.update(
            {"layer1.1.conv2.weight": torch.ones(3, 2)}
        ),
        "extra: (1,) in the file, unknown in the network": lambda s: s.update(extra=torch.ones(1)),
        "conv1.weight: str in the file": lambda s: s.update({"conv1.weight": "text"}),
    }
    for message, change in cases.items():
        state = dict(full)
        change(state)
        with pytest.raises(ValueError) as error:
            resnet.trunk_state(state, trunk)
        assert message in str(error.value)
    with pytest.raises(ValueError, match="not list"):
        resnet.trunk_state([1], trunk)


def test_resnet_file_of_the_other_network_is_refused_by_name(tmp_path):
    torch.save(filled(published("resnet18")), tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"w\.pth holds no weights of resnet50: .*layer1\.0\.conv1\.weight"
    ):
        load_imagenet(resnet50_dilated(), "resnet50", tmp_path / "w.pth")


@pytest.mark.parametrize("width", [4, 32, 128])
def test_resnet_other_widths_have_no_imagenet_weights(width):
    with pytest.raises(
        ValueError, match=f'the trunk has width {width}: use width=64 or weights="none"'
    ):
        load_imagenet(resnet18_trunk(width), "resnet18")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An empty machine: own data folder, own torch hub; what the network answers is in `answer`."""
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    class Answer(io.BytesIO):
        asked, body = [], None

        @staticmethod
        def info():
            return Message()

    def urlopen(request, *rest, **keys):
        Answer.asked.append(request.full_url)
        if Answer.body is None:
            raise urllib.error.URLError("Name or service not known")
        return Answer(Answer.body)

    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    return Answer


@pytest.fixture(scope="module")
def file18():
    buffer = io.BytesIO()
    torch.save(filled(published("resnet18")), buffer)
    return buffer.getvalue()


def expect(monkeypatch, data):
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    monkeypatch.setitem(resnet.IMAGENET, "resnet18", name)
    return name


@pytest.mark.parametrize("name", MAKERS)
def test_resnet_without_a_network_one_error_holds_the_recipe(machine, tmp_path, name):
    with torch.device("meta"):
        trunk = MAKERS[name]()
    with pytest.raises(FileNotFoundError) as error:
        load_imagenet(trunk, name)
    text, file = str(error.value), resnet.IMAGENET[name]
    for part in (
        "Name or service not known",
        f"https://download.pytorch.org/models/{file}",
        'weights="none"',
        str(tmp_path / "data" / "weights" / file),
        str(tmp_path / "hub" / "checkpoints" / file),
    ):
        assert part in text
    assert machine.asked[-1] == f"https://download.pytorch.org/models/{file}"
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_resnet_weights_are_downloaded_once_into_torch_hub(machine, tmp_path, monkeypatch, file18):
    name, machine.body = expect(monkeypatch, file18), file18
    machine.asked.clear()
    for _ in range(2):
        assert load_imagenet(resnet18_trunk(), "resnet18").startswith(name)
    assert len(machine.asked) == 1
    assert (tmp_path / "hub" / "checkpoints" / name).read_bytes() == file18


def test_resnet_a_damaged_download_is_not_kept(machine, tmp_path, monkeypatch, file18):
    expect(monkeypatch, file18)
    machine.body = b"<html>a proxy says hello</html>"
    with pytest.raises(FileNotFoundError, match="invalid hash"):
        load_imagenet(resnet18_trunk(), "resnet18")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("place", ["data/weights", "hub/checkpoints"])
def test_resnet_a_damaged_file_is_named_and_a_good_one_needs_no_network(
    machine, tmp_path, monkeypatch, file18, place
):
    path = tmp_path / place / expect(monkeypatch, file18)
    path.parent.mkdir(parents=True)
    path.write_bytes(file18[:100])
    machine.asked.clear()
    with pytest.raises(ValueError, match="is damaged or another file") as error:
        load_imagenet(resnet18_trunk(), "resnet18")
    assert str(path) in str(error.value)
    path.write_bytes(file18)
    load_imagenet(resnet18_trunk(), "resnet18")
    assert machine.asked == []


def test_resnet_own_weights_go_before_the_cache(machine, tmp_path):
    for place in ("data/weights", "hub/checkpoints"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / resnet.IMAGENET["resnet50"]).touch()
    assert resnet.find_weights("resnet50").is_relative_to(tmp_path / "data")


def test_resnet_unreadable_files_are_named(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    with tarfile.open(tmp_path / "old.pth", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(ValueError, match=r"text\.pth holds no weights of resnet18"):
        load_imagenet(resnet18_trunk(), "resnet18", tmp_path / "text.pth")
    with pytest.raises(
        ValueError, match=r"old\.pth .* tar archive of 2017, use resnet18-f37072fd\.pth"
    ):
        load_imagenet(resnet18_trunk(), "resnet18", tmp_path / "old.pth")
    with pytest.raises(FileNotFoundError, match=r"file=.*none\.pth"):
        load_imagenet(resnet18_trunk(), "resnet18", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        load_imagenet(resnet18_trunk(), "resnet-18", tmp_path / "text.pth")


def test_resnet_files_that_run_code_are_refused(tmp_path):
    torch.save({"conv1.weight": tmp_path}, tmp_path / "path.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        load_imagenet(resnet18_trunk(), "resnet18", tmp_path / "path.pth")


# -------------------------------------------------------------------- the network, computed by hand

DILATIONS = {3: (1, 2, 2, 2, 2, 2), 4: (2, 4, 4)}  # of the 3x3 convolutions of stages 3 and 4


class ByHand:
    """A forward pass from a state dict alone, in torch.nn.functional."""

    def __init__(self, state, training):
        self.state, self.training = state, training

    def conv(self, x, name, stride=1, dilation=1):
        weight = self.state[f"{name}.weight"]
        padding = (weight.shape[-1] - 1) // 2 * dilation
        return F.conv2d(x, weight, self.state.get(f"{name}.bias"), stride, padding, dilation)

    def norm(self, x, name):
        mean, var = self.state[f"{name}.running_mean"], self.state[f"{name}.running_var"]
        if self.training:
            mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        scale = self.state[f"{name}.weight"] / (var + 1e-5).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self.state[f"{name}.bias"][
            :, None, None
        ]

    def trunk(self, x, blocks, dilations, layers):
        x = self.norm(self.conv(x, "conv1", 2), "bn1").relu()
        x = F.max_pool2d(x, 3, 2, 1)
        for stage, count in enumerate(blocks, 1):
            for i in range(count):
                at, first = f"layer{stage}.{i}.", i == 0
                stride = 2 if first and stage > 1 and stage not in dilations else 1
                dilation = dilations.get(stage, (1,) * count)[i]
                y = x
                for k in range(1, layers + 1):
                    moves = k == (1 if layers == 2 else 2)  # the convolution that has the stride
                    wide = self.state[f"{at}conv{k}.weight"].shape[-1] == 3
                    y = self.conv(
                        y, f"{at}conv{k}", stride if moves else 1, dilation if wide else 1
                    )
                    y = self.norm(y, f"{at}bn{k}")
                    y = y.relu() if k < layers else y
                if f"{at}downsample.0.weight" in self.state:
                    x = self.norm(self.conv(x, f"{at}downsample.0", stride), f"{at}downsample.1")
                x = (x + y).relu()
        return x

    def head(self, x):
        parts = [self.layer(x, "branches.0")]
        parts += [self.layer(x, f"branches.{i}", rate) for i, rate in ((1, 12), (2, 24), (3, 36))]
        pooled = self.layer(F.adaptive_avg_pool2d(x, 1), "pool")
        parts.append(F.interpolate(pooled, x.shape[2:], mode="bilinear"))
        x = self.layer(torch.cat(parts, 1), "project")
        return self.conv(self.layer(x, "read"), "read.3")

    def layer(self, x, name, dilation=1):
        return self.norm(self.conv(x, f"{name}.0", 1, dilation), f"{name}.1").relu()


def scrambled(module, seed=0):
    """Every parameter and statistic away from its initial value, so that each of them matters."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in module.state_dict().items():
        if value.dim() == 1:
            low = 0.5 if name.endswith(("weight", "var")) else -0.5
            value.copy_(low + torch.rand(value.shape, generator=generator))
    return module.double()


def images(batch=2, height=40, width=64, seed=1):
    return torch.rand(
        batch, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("make", "blocks", "dilations", "layers"),
    [(resnet18_trunk, (2, 2, 2, 2), {}, 2), (resnet50_dilated, (3, 4, 6, 3), DILATIONS, 3)],
)
def test_resnet_trunk_is_what_one_computes_by_hand(make, blocks, dilations, layers, training):
    trunk = scrambled(make(4)).train(training)
    expected = ByHand({n: v.clone() for n, v in trunk.state_dict().items()}, training)
    x = images()
    assert_close(trunk(x), expected.trunk(x, blocks, dilations, layers))


@pytest.mark.parametrize("training", [True, False])
def test_resnet_aspp_head_is_what_one_computes_by_hand(training):
    head = scrambled(ASPPHead(6, 5, 4)).train(training)
    head.project[3].p = 0.0
    x = torch.rand(3, 6, 41, 17, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert_close(
        head(x), ByHand({n: v.clone() for n, v in head.state_dict().items()}, training).head(x)
    )


def test_resnet_aspp_head_drops_half_in_training_and_nothing_in_evaluation():
    drops = [m for m in ASPPHead(6, 5, 4).modules() if isinstance(m, torch.nn.Dropout)]
    assert [m.p for m in drops] == [0.5]
    torch.manual_seed(0)
    head, x = ASPPHead(6, 5, 64), torch.rand(2, 6, 9, 9, generator=torch.Generator().manual_seed(2))
    assert not torch.equal(head(x), head(x))
    zeros = (
        (head.project(torch.rand(2, 320, 9, 9)) == 0).float().mean()
    )  # a relu before it takes a half already
    assert 0.7 < zeros < 0.8
    head.eval()
    assert_close(head(x), head(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(32, 32), (64, 96)])
def test_resnet_dilated_agrees_with_strided_where_both_compute(size):
    dilated = scrambled(resnet50_dilated(4)).eval()
    strided = ResNet(Bottleneck, (3, 4, 6, 3), 4).double().eval()
    strided.load_state_dict(dilated.state_dict())
    x = images(1, *size)
    assert_close(dilated(x)[:, :, ::4, ::4], strided(x))


@pytest.mark.parametrize(
    ("outputs", "numbers"), [(13, 16_128_781), (1, 16_125_697), (3, 16_126_211), (7, 16_127_239)]
)
def test_resnet_head_sizes_are_the_published_ones(outputs, numbers):
    with torch.device("meta"):
        assert sum(p.numel() for p in ASPPHead(2048, outputs).parameters()) == numbers
        network = DeepLab({"task": outputs})
    assert sum(p.numel() for p in network.trunk.parameters()) == 23_508_032
    assert sum(p.numel() for p in network.heads["task"].parameters()) == numbers
    assert sum(p.numel() for p in network.parameters()) == 23_508_032 + numbers


def test_resnet_full_size_shapes():
    with torch.device("meta"):
        network, x = DeepLab(TASKS), torch.empty(8, 3, 288, 384)
        assert network.trunk(x).shape == (8, 2048, 36, 48)
        assert {t: tuple(p.shape) for t, p in network(x).items()} == {
            t: (8, n, 288, 384) for t, n in TASKS.items()
        }
        assert network.trunk.channels == [256, 512, 1024, 2048]
        trunk = resnet18_trunk()
        assert trunk(torch.empty(64, 3, 224, 224)).shape == (64, 512, 7, 7)
        assert trunk.channels == [64, 128, 256, 512]
        x, sizes = trunk.stem(torch.empty(2, 3, 224, 224)), []
        for stage in (trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4):
            x = stage(x)
            sizes.append(x.shape[1])
        assert sizes == trunk.channels


@pytest.mark.parametrize("width", [1, 4, 8])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (8, 8)])
def test_resnet_tiny_networks_run_on_small_images_of_any_size(width, size):
    network = DeepLab({"a": 2}, width)
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert network(x)["a"].shape == (2, 2, *size)
    assert network.heads["a"].read[0].in_channels == 4 * width


@pytest.mark.parametrize("width", [0, -4, 2.5])
def test_resnet_bad_width_is_named(width):
    with pytest.raises(ValueError, match=f"width must be .* got {width}"):
        DeepLab(TASKS, width)


def between(count, points):
    """The matrix of linear interpolation from `points` values to `count`, first and last kept."""
    place = torch.arange(count, dtype=torch.float64) * (points - 1) / (count - 1)
    return (1 - (place[:, None] - torch.arange(points)).abs()).clamp(min=0)


def test_resnet_predictions_are_resized_with_aligned_corners():
    network = scrambled(DeepLab({"a": 2}, 4)).eval()
    x = images(2, 48, 64)
    logits = network.heads["a"](network.trunk(x))
    assert logits.shape[2:] == (6, 8)
    assert_close(network(x)["a"], between(48, 6) @ logits @ between(64, 8).T)


def test_resnet_gradients_reach_all_parameters_and_no_other_head():
    network = DeepLab(TASKS, 4)
    assert set(network.heads) == set(TASKS)
    shared = {id(p) for p in network.trunk.parameters()}
    predictions = network(images().float())
    for task, prediction in predictions.items():
        network.zero_grad()
        prediction.square().mean().backward(retain_graph=True)
        reached = {
            id(p) for p in network.parameters() if p.grad is not None and p.grad.abs().sum() > 0
        }
        other = {id(p) for t in TASKS if t != task for p in network.heads[t].parameters()}
        assert shared <= reached and not reached & other
        names = [n for n, p in network.heads[task].named_parameters() if id(p) not in reached]
        assert names == []


def test_resnet_initialization_is_torchvisions():
    torch.manual_seed(0)
    trunk = resnet50_dilated(16)
    for module in trunk.modules():
        if isinstance(module, torch.nn.Conv2d) and module.weight.numel() > 20_000:
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert abs(module.weight.std().item() / (2 / fan_out) ** 0.5 - 1) < 0.03
        if isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert not any(isinstance(m, torch.nn.Conv2d) and m.bias is not None for m in trunk.modules())


def test_resnet_a_batch_of_one_is_an_error_in_training_only():
    network = DeepLab(TASKS, 4)
    with pytest.raises(ValueError, match="batch of one image in training mode.*batch_size >= 2"):
        network(images(1).float())
    assert network.eval()(images(1).float())["depth"].shape == (1, 1, 40, 64)


def test_resnet_basic_blocks_are_not_dilated():
    with pytest.raises(ValueError, match="dilate=.*BasicBlock"):
        ResNet(BasicBlock, (2, 2, 2, 2), 4, (False, False, True))
