"""ImageNet weights: what fits, where files are looked for, what a broken one says."""

import hashlib
import io
import tarfile
import urllib.error
from email.message import Message

import pytest
import torch
from torch.testing import assert_close

from dbmtl.models import imagenet_weights
from dbmtl.models.imagenet_weights import IMAGENET, find_weights, load_imagenet, trunk_state
from dbmtl.models.resnet import resnet18_trunk, resnet50_dilated

MAKERS = {"resnet18": resnet18_trunk, "resnet50": resnet50_dilated}


@pytest.fixture(scope="module")
def checkpoint(published):
    """A state dict of torchvision's names and shapes, with random values."""

    def checkpoint(name):
        generator = torch.Generator().manual_seed(0)
        state = {}
        for entry, shape in published(name):
            state[entry] = torch.rand(shape, generator=generator) if shape else torch.tensor(7)
        return state

    return checkpoint


@pytest.mark.full
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("age", ["today", "2017"])
def test_weights_load_from_a_torchvision_shaped_file(checkpoint, name, age, tmp_path):
    state = checkpoint(name)
    if age == "2017":
        state = {n: v for n, v in state.items() if "num_batches" not in n}
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    trunk = MAKERS[name]()
    note = load_imagenet(trunk, name, path)
    for key, value in trunk.state_dict().items():
        assert_close(value, state.get(key, torch.tensor(0)), rtol=0, atol=0)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert note == f"weights.pth (SHA-256 {digest[:16]})"


def without(state, name):
    return {n: value for n, value in state.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: without(state, "bn1.bias"),
            "1 entries do not fit, first bn1.bias: missing in the file, (2,) in the network",
        ),
        (
            lambda state: {**state, "layer1.1.conv2.weight": torch.ones(3, 2)},
            "layer1.1.conv2.weight: (3, 2) in the file",
        ),
        (
            lambda state: {**state, "extra": torch.ones(1)},
            "extra: (1,) in the file, unknown in the network",
        ),
        (lambda state: {**state, "conv1.weight": "text"}, "conv1.weight: str in the file"),
    ],
)
def test_weights_that_do_not_fit_are_named(change, message):
    trunk = resnet18_trunk(2)
    state = resnet18_trunk(2).state_dict()
    assert list(trunk_state(state, trunk)) == list(state)
    with pytest.raises(ValueError) as error:
        trunk_state(change(state), trunk)
    assert message in str(error.value)


def test_weights_are_a_mapping():
    with pytest.raises(ValueError, match="not list"):
        trunk_state([1], resnet18_trunk(2))


def test_weights_of_the_other_network_are_refused_by_name(checkpoint, tmp_path):
    torch.save(checkpoint("resnet18"), tmp_path / "w.pth")
    message = r"w\.pth holds no weights of resnet50: .*layer1\.0\.conv1\.weight"
    with pytest.raises(ValueError, match=message):
        load_imagenet(resnet50_dilated(), "resnet50", tmp_path / "w.pth")


@pytest.mark.parametrize("width", [4, 32, 128])
def test_weights_have_one_width(width):
    message = f'the trunk has width {width}: use width=64 or weights="none"'
    with pytest.raises(ValueError, match=message):
        load_imagenet(resnet18_trunk(width), "resnet18")


# ---------------------------------------------------------------------------------- on the machine


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """An empty machine: own data folder, own torch hub; the network answers with its `body`."""
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
def file18(checkpoint):
    buffer = io.BytesIO()
    torch.save(checkpoint("resnet18"), buffer)
    return buffer.getvalue()


def expect(monkeypatch, data):
    """Let `data` be what torchvision publishes as its ResNet-18."""
    name = f"resnet18-{hashlib.sha256(data).hexdigest()[:8]}.pth"
    monkeypatch.setitem(imagenet_weights.IMAGENET, "resnet18", name)
    return name


def files_below(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.parametrize("name", MAKERS)
def test_weights_without_a_network_one_error_holds_the_recipe(machine, tmp_path, name):
    with torch.device("meta"):
        trunk = MAKERS[name]()
    with pytest.raises(FileNotFoundError) as error:
        load_imagenet(trunk, name)
    text, file = str(error.value), IMAGENET[name]
    for part in (
        "Name or service not known",
        f"https://download.pytorch.org/models/{file}",
        'weights="none"',
        str(tmp_path / "data" / "weights" / file),
        str(tmp_path / "hub" / "checkpoints" / file),
    ):
        assert part in text
    assert machine.asked[-1] == f"https://download.pytorch.org/models/{file}"
    assert files_below(tmp_path) == []


def test_weights_are_downloaded_once_into_torch_hub(machine, tmp_path, monkeypatch, file18):
    name, machine.body = expect(monkeypatch, file18), file18
    machine.asked.clear()
    for _ in range(2):
        assert load_imagenet(resnet18_trunk(), "resnet18").startswith(name)
    assert len(machine.asked) == 1
    assert (tmp_path / "hub" / "checkpoints" / name).read_bytes() == file18


def test_weights_of_a_damaged_download_are_not_kept(machine, tmp_path, monkeypatch, file18):
    expect(monkeypatch, file18)
    machine.body = b"<html>a proxy says hello</html>"
    with pytest.raises(FileNotFoundError, match="invalid hash"):
        load_imagenet(resnet18_trunk(), "resnet18")
    assert files_below(tmp_path) == []


@pytest.mark.parametrize("place", ["data/weights", "hub/checkpoints"])
def test_weights_in_a_damaged_file_are_named_and_good_ones_need_no_network(
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


def test_weights_of_the_user_go_before_the_cache(machine, tmp_path):
    for place in ("data/weights", "hub/checkpoints"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / IMAGENET["resnet50"]).touch()
    assert find_weights("resnet50").is_relative_to(tmp_path / "data")


# -------------------------------------------------------------------------------- files without any


def test_weights_in_unreadable_files_are_named(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    with tarfile.open(tmp_path / "old.pth", "w") as tar:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    trunk = resnet18_trunk()
    with pytest.raises(ValueError, match=r"text\.pth holds no weights of resnet18"):
        load_imagenet(trunk, "resnet18", tmp_path / "text.pth")
    message = r"old\.pth .* tar archive of 2017, use resnet18-f37072fd\.pth"
    with pytest.raises(ValueError, match=message):
        load_imagenet(trunk, "resnet18", tmp_path / "old.pth")
    with pytest.raises(FileNotFoundError, match=r"file=.*none\.pth"):
        load_imagenet(trunk, "resnet18", tmp_path / "none.pth")
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        load_imagenet(trunk, "resnet-18", tmp_path / "text.pth")


def test_weights_that_run_code_are_refused(tmp_path):
    torch.save({"conv1.weight": tmp_path}, tmp_path / "path.pth")
    with pytest.raises(ValueError, match="holds no weights"):
        load_imagenet(resnet18_trunk(), "resnet18", tmp_path / "path.pth")
