"""The committed albums of predictions: what they hold, what is drawn from them, and where real
images go."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.report import predictions
from dbmtl.report.predictions import errors_in_words

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
ALBUMS = {
    "rooms": ("nyuv2", ["label", "depth", "normal"]),
    "streets": ("cityscapes", ["label", "depth"]),
}


def album(stem):
    """Depth is kept as differences along a row, images with 32 levels."""
    with np.load(ROOT / "figures" / "studies" / f"predictions_{stem}.npz") as file:
        found = dict(file)
    found["depth"] = np.cumsum(found["depth"], axis=2).astype(np.int16)
    return found, json.loads(str(found.pop("about")))


def enlarged(small, size):
    """Corner to corner and linear in between, along one axis after the other."""
    for axis, length in zip((2, 3), size, strict=True):
        places = np.linspace(0, small.shape[axis] - 1, length)
        low = np.minimum(places.astype(int), small.shape[axis] - 2)
        part = (places - low).reshape([-1 if a == axis else 1 for a in range(4)])
        small = np.take(small, low, axis) * (1 - part) + np.take(small, low + 1, axis) * part
    return small


def angle(truth, found):
    """Mean angle in degrees where there is a truth."""
    lengths = np.linalg.norm(truth, axis=1), np.linalg.norm(found, axis=1)
    cosine = (truth * found).sum(1)[lengths[0] > 0] / (lengths[0] * lengths[1])[lengths[0] > 0]
    return np.degrees(np.arccos(cosine.clip(-1, 1))).mean()


def reproduce(*args, out, **env):
    command = [
        sys.executable,
        ROOT / "ci" / "run_notebooks.py",
        "--only",
        "16_studies/02_predictions",
        *args,
    ]
    env = {**os.environ, "DBMTL_OUT": str(out), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("stem", ALBUMS)
def test_predictions_files_are_small_and_whole(stem):
    name, fields = ALBUMS[stem]
    arrays, about = album(stem)
    assert (ROOT / "figures" / "studies" / f"predictions_{stem}.npz").stat().st_size < 61_440
    assert (
        about["benchmark"] == name
        and about["scale"] == "generated"
        and {"EW", "DB-MTL"} <= set(about["methods"])
    )
    assert (
        about["epochs"] == get_benchmark(name).scale("generated").epochs
        and about["weights"] == "none"
    )
    assert set(arrays) == {"image", *fields} | {
        f"{method} {field}" for method in about["methods"] for field in fields
    }
    assert len(about["chosen"]) == len(arrays["image"]) == 3


@pytest.mark.parametrize("stem", ALBUMS)
def test_predictions_truths_are_the_generated_test_scenes(stem):
    """Up to rounding on another machine."""
    name, fields = ALBUMS[stem]
    arrays, about = album(stem)
    test = get_benchmark(name).load(get_benchmark(name).scale("generated")).test
    assert test.depth_unit == about["depth_unit"]
    for field in ["image", *fields]:
        again = test.arrays[field][about["chosen"]].numpy()
        again = again // 8 if field == "image" else again
        assert again.dtype == arrays[field].dtype and again.shape == arrays[field].shape
        assert (again == arrays[field]).mean() > 0.995, field


@pytest.mark.parametrize("stem", ALBUMS)
def test_predictions_beat_constants_on_their_scenes(stem):
    """Computed without the project's losses and meters; and the two methods are two networks."""
    arrays, about = album(stem)
    label, depth = arrays["label"], arrays["depth"] * about["depth_unit"]
    known, valid, size = label != 255, depth != 0, label.shape[1:]
    share = np.bincount(label[known]).max() / known.sum()
    spread = np.abs(depth[valid] - np.median(depth[valid])).mean()
    for method in about["methods"]:
        assert (arrays[f"{method} label"] == label)[known].mean() > 1.3 * share
        found = enlarged(arrays[f"{method} depth"].astype(float), size)[:, 0]
        assert (
            np.abs(found - depth)[valid].mean() < 0.9 * spread
        )  # of the best constant for these very scenes
        if "normal" in arrays:
            truth = arrays["normal"].astype(float)
            mean = truth.sum((0, 2, 3)).reshape(1, 3, 1, 1)
            found = enlarged(arrays[f"{method} normal"].astype(float), size)
            assert angle(truth, found) < 0.8 * angle(truth, np.broadcast_to(mean, truth.shape))
    assert not np.array_equal(arrays["EW depth"], arrays["DB-MTL depth"])


@pytest.mark.parametrize("stem", ALBUMS)
def test_predictions_errors_by_numpy(stem):
    """The sentence about classes, counted pixel by pixel."""
    name, _ = ALBUMS[stem]
    arrays, about = album(stem)
    label = arrays["label"].astype(int)
    known = label != 255
    first, last = ((arrays[f"{m} label"] != label) & known for m in about["methods"][-2:])
    near = np.zeros_like(known)
    for place in np.ndindex(label.shape):
        _, y, x = place
        window = label[place[0], max(y - 4, 0) : y + 5, max(x - 4, 0) : x + 5]
        near[place] = len(set(window[window != 255])) > 1
    parts = [(first, known), (last, known), (last, first), (near, first), (near, known)]
    shares = [f"{100 * (part & whole).sum() / whole.sum():.0f} %" for part, whole in parts]
    said = errors_in_words(arrays | {"about": about}, get_benchmark(name))
    assert re.findall(r"\d+ %", said) == shares


def test_predictions_are_drawn_again_from_their_albums(tmp_path):
    """A smoke run draws the committed pictures anew, its own elsewhere, and no album changes."""
    (tmp_path / "figures" / "studies").mkdir(parents=True)
    for stem in ALBUMS:
        shutil.copy(
            ROOT / "figures" / "studies" / f"predictions_{stem}.npz",
            tmp_path / "figures" / "studies",
        )
    done = reproduce(out=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    for stem in ALBUMS:
        again, kept = (
            folder / "figures" / "studies" / f"predictions_{stem}" for folder in (tmp_path, ROOT)
        )
        assert again.with_suffix(".npz").read_bytes() == kept.with_suffix(".npz").read_bytes()
        first, second = (
            np.asarray(Image.open(f"{path}_1.png").convert("RGB"), dtype=int)
            for path in (again, kept)
        )
        assert first.shape == second.shape and np.abs(first - second).mean() < 2
        assert (
            tmp_path / "out" / "smoke" / "figures" / "studies" / f"predictions_{stem}_1.png"
        ).exists()
    made = {
        path.relative_to(tmp_path / "figures").as_posix()
        for path in tmp_path.glob("figures/**/*.*")
    }
    names = {f"predictions_{stem}_{number}" for stem in ALBUMS for number in (1, 2, 3)}
    assert made == {f"studies/predictions_{stem}.npz" for stem in ALBUMS} | {
        f"studies/{part}" for name in names for part in (f"{name}.png", f"cards/{name}.json")
    }


def test_predictions_of_real_images_stay_out_of_figures(tmp_path, monkeypatch):
    """Ten files in the packed layout, which pass for NYUv2: drawn in the ignored folder, and not
    shown."""
    random = np.random.default_rng(0)
    parts = {
        "image": ("jpg", 256, 3),
        "label13": ("png", 13, 0),
        "depth8": ("png", 255, 0),
        "normal": ("webp", 63, 3),
    }
    for split, count in (("train", 8), ("test", 2)):
        for (part, (end, top, channels)), n in (
            (item, n) for item in parts.items() for n in range(count)
        ):
            folder = tmp_path / "data" / "nyuv2" / split / part
            folder.mkdir(parents=True, exist_ok=True)
            values = random.integers(1, top, (36, 48, channels) if channels else (36, 48)).astype(
                np.uint8
            )
            options = {"lossless": True, "exact": True} if end == "webp" else {}
            Image.fromarray(values).save(folder / part_name(n, end), **options)
    for name in ("data", "cache", "out"):
        monkeypatch.setenv(f"DBMTL_{name.upper()}", str(tmp_path / name))

    real, shown = get_benchmark("nyuv2"), []
    size = replace(real.scale("smoke"), train_size=8, eval_size=2)
    small = replace(
        real,
        scales={"cpu": replace(size, extra=size.extra | {"source": "real"}), "generated": size},
    )
    given = {"scale": "cpu", "benchmarks": "nyuv2", "images": 2}
    monkeypatch.setattr(predictions, "display", lambda *outputs: shown.extend(outputs))
    run_cells(given, {"get_benchmark": lambda name: small})
    made = tmp_path / "out" / "out" / "predictions"
    assert sorted(path.name for path in made.iterdir()) == [
        "nyuv2_cpu.npz",
        "nyuv2_cpu_1.png",
        "nyuv2_cpu_2.png",
    ]
    assert not (tmp_path / "out" / "figures").exists()
    texts = [each.data for each in shown if type(each).__name__ == "Markdown"]
    assert len(texts) == len(shown) == 2 and texts[0].startswith(
        "NYUv2 with normals derived from depth, 4 + 2 images at 32x48, 4 more cut"
    )


def part_name(number, end):
    return f"{number + 1:04}.{end}"


def run_cells(given, names):
    """The notebook's code in this process, with other parameters and some imported names
    replaced."""
    space = {}
    for cell in json.loads((ROOT / "nbs" / "16_studies/02_predictions.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
            space |= given if "parameters" in cell["metadata"].get("tags", []) else names
    return space


def test_predictions_notebook_shows_the_committed_scenes():
    cells = json.loads((ROOT / "nbs" / "16_studies/02_predictions.ipynb").read_text())["cells"]
    outputs = [
        output for cell in cells if cell["cell_type"] == "code" for output in cell["outputs"]
    ]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 6
    words = "".join("".join(output.get("data", {}).get("text/markdown", "")) for output in outputs)
    assert "generated rooms, 400 + 100" in words and "generated streets, 240 + 80" in words
