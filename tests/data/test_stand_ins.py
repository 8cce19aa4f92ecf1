"""Generated stand-ins and real data never take each other's place."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dbmtl.benchmarks.base import benchmark_names, get_benchmark
from dbmtl.data import image_store, nyuv2
from dbmtl.data.cityscapes import CATEGORIES, prepared_cityscapes
from dbmtl.data.image_store import Item, build_store, open_store, store_name
from dbmtl.data.nyuv2 import prepared_nyuv2
from dbmtl.data.office import DOMAINS, PARTS, TITLES, class_names, open_office
from dbmtl.experiments.records import configuration, run_identity

SIZE = (4, 8)


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Data, cache and home of a test: whatever is written there is seen."""
    for name in ("DBMTL_DATA", "DBMTL_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path


def written(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def sources_of(benchmark):
    """{scale name: "generated", "real", "sample", ...} as the scales say it."""
    return {name: scale.extra.get("source") for name, scale in benchmark.scales.items()}


REAL = [
    (benchmark, scale)
    for benchmark in benchmark_names()
    for scale, source in sources_of(get_benchmark(benchmark)).items()
    if source in ("real", "full")
]
WITH_REAL_SCALES = sorted({benchmark for benchmark, _ in REAL})
IMAGES = [benchmark for benchmark in WITH_REAL_SCALES if benchmark != "qm9"]


def test_there_are_real_and_generated_scales_of_every_data_set():
    assert {"nyuv2", "cityscapes", "office31", "officehome", "pacs"} <= set(IMAGES)
    for name in IMAGES:
        assert {"generated", "real"} <= set(sources_of(get_benchmark(name)).values())


@pytest.mark.parametrize("name", benchmark_names())
def test_a_smoke_scale_writes_nothing_and_opens_no_store(name, folders, monkeypatch):
    """Generated images live in memory: there is no store of them that could be mistaken."""
    monkeypatch.setattr(image_store, "open_store", lambda name: pytest.fail(f"opened {name}"))
    monkeypatch.setattr(image_store, "build_store", lambda *_: pytest.fail("built a store"))
    benchmark = get_benchmark(name)
    data = benchmark.load(benchmark.scale("smoke"), "cpu", 0)
    assert written(folders) == []
    if sources_of(benchmark)["smoke"] == "generated":
        assert "generated" in data.note


@pytest.mark.parametrize("name", WITH_REAL_SCALES)
def test_real_scales_without_data_say_so_after_a_smoke_run(name, folders):
    benchmark = get_benchmark(name)
    benchmark.load(benchmark.scale("smoke"), "cpu", 0)
    says_so = "(?s)is not in .*DBMTL_DATA|needs"
    for scale in (scale for real, scale in REAL if real == name):
        with pytest.raises((FileNotFoundError, ImportError), match=says_so):
            benchmark.load(benchmark.scale(scale), "cpu", 0)
        assert benchmark.data_hash(benchmark.scale(scale), 0) is None, scale


def real_names(name):
    """{store name: what a real store of it says of itself}, of the data set's smallest copy."""
    if name == "nyuv2":
        meta = nyuv2._meta("mtan")
        return {store_name("nyuv2", "mtan", part, size=SIZE): meta for part in ("train", "test")}
    if name == "cityscapes":
        meta = {"layout": "mtan", "depth_unit": 1 / 65535, "classes": list(CATEGORIES)}
        sizes = {"train": 2975, "test": 500}
        return {
            store_name("cityscapes", "mtan", part, size=SIZE): meta | {"whole_size": size}
            for part, size in sizes.items()
        }
    return {
        store_name(name, task, part, size=SIZE): {
            "set": TITLES[name],
            "task": task,
            "part": part,
            "classes": len(class_names(name)),
        }
        for task in DOMAINS[name]
        for part in PARTS
    }


OPEN = {
    "nyuv2": lambda: prepared_nyuv2(SIZE),
    "cityscapes": lambda: prepared_cityscapes(SIZE),
    "office31": lambda: open_office("office31", SIZE),
    "officehome": lambda: open_office("officehome", SIZE),
    "pacs": lambda: open_office("pacs", SIZE),
}


def build_all(metas, folder):
    source = folder / "source"
    source.write_bytes(b"1")
    zeros = {"image": np.zeros((3, *SIZE), np.uint8)}
    fields = {"image": ((3, *SIZE), np.uint8)}
    for name, meta in metas.items():
        build_store(name, [Item("0", (source,))], lambda item: zeros, fields, meta)


@pytest.mark.parametrize("name", OPEN)
def test_a_store_that_says_it_is_generated_is_not_opened_as_real(name, folders):
    metas = real_names(name)
    assert OPEN[name]() is None
    build_all({store: meta | {"generated": True} for store, meta in metas.items()}, folders)
    assert all(open_store(store) is not None for store in metas) and OPEN[name]() is None
    build_all(metas, folders)
    assert OPEN[name]() is not None
    first = next(iter(metas))
    build_all({first: {}}, folders)
    assert OPEN[name]() is None


@pytest.mark.parametrize("name", IMAGES)
def test_generated_and_real_runs_have_other_identities(name):
    """Even with all sizes alike, and whatever the data's hash."""
    benchmark = get_benchmark(name)
    scale = benchmark.scale("smoke")
    real = replace(scale, extra=scale.extra | {"source": "real"})
    configs = [
        configuration(replace(benchmark, scales={"smoke": size}), "EW", 0, "smoke")
        for size in (scale, real)
    ]
    assert json.dumps(configs[0]) != json.dumps(configs[1])
    assert run_identity(configs[0], "d") != run_identity(configs[1], "d")
