"""QM9's molecules: the code of the files, the split, the loaders and their errors."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch.testing import assert_close

from dbmtl.core.files import data_folder
from dbmtl.data import qm9 as qm9_data
from dbmtl.data.qm9 import (
    TASKS,
    Molecules,
    atom_features,
    check_file,
    decode,
    load_qm9,
    load_sample,
    normalization,
    pack_integers,
    paper_split,
    ranges,
    unpack_integers,
)

WIDE_INTEGERS = st.integers(-(2**40), 2**40)


@pytest.fixture(scope="module")
def sample():
    return load_sample()


@pytest.fixture(scope="module")
def full():
    return load_qm9()


@settings(deadline=None, max_examples=50)
@given(hnp.arrays(np.int64, hnp.array_shapes(max_dims=2, max_side=9), elements=WIDE_INTEGERS))
def test_qm9_integers_survive_the_byte_planes(values):
    planes, offset = pack_integers(values)
    assert planes.dtype == np.uint8 and (unpack_integers(planes, offset) == values).all()


def test_qm9_offset_above_the_smallest_value_is_an_error():
    with pytest.raises(ValueError, match="offset=5"):
        pack_integers(np.array([4, 6]), 5)


def test_qm9_tasks_are_the_eleven_of_the_paper():
    names = "mu alpha HOMO LUMO R2 ZPVE U0 U H G cv"
    assert [t.name for t in TASKS] == names.split()
    assert [t.column for t in TASKS] == [0, 1, 2, 3, 5, 6, 12, 13, 14, 15, 11]
    energies = {t.name for t in TASKS if t.factor == 1000}
    assert energies == {"HOMO", "LUMO", "ZPVE", "U0", "U", "H", "G"}
    assert all(t.factor == 1 for t in TASKS if t.unit != "meV")


def test_qm9_sample_is_small_and_split_without_overlap(sample):
    asset = qm9_data.files("dbmtl").joinpath("assets/qm9_sample.npz").read_bytes()
    assert len(asset) < 1_000_000 and sample.hash == hashlib.sha256(asset).hexdigest()
    parts = [sample.train, sample.validation, sample.test]
    assert [len(p) for p in parts] == [5000, 1000, 1000]
    assert_close(torch.cat(parts).sort().values, torch.arange(7000))
    mean = [float(sample.molecules.size[p].double().mean()) for p in parts]
    assert all(abs(m - 18.03) < 0.3 for m in mean)  # three standard errors of 1,000 molecules


def test_qm9_sample_is_chemistry(sample):
    """Independent of the decoder: bonds have the lengths of bonds, and every atom its valence."""
    chosen = sample.molecules.select(torch.arange(0, 7000, 50))
    valence = {1: {1}, 6: {4, 3, 5}, 7: {3, 4, 2}, 8: {2, 1, 3}, 9: {1}}
    broken = atoms = 0
    columns = (chosen.start.tolist(), chosen.size.tolist(), chosen.pair_start.tolist())
    for start, size, pair in zip(*columns, strict=True):
        order = torch.zeros(size, size)
        position = chosen.position[start : start + size]
        distance = torch.cdist(position, position)
        for j in range(size):
            for i in range(j):
                order[i, j] = order[j, i] = chosen.pair_order[pair + j * (j - 1) // 2 + i]
        number = chosen.number[start : start + size].tolist()
        assert distance[order > 0].max() < 1.75
        is_hydrogen = chosen.number[start : start + size] == 1
        hydrogens = (order * is_hydrogen).sum(1)
        assert_close(hydrogens, chosen.hydrogens[start : start + size].float())
        broken += sum(int(order[i].sum()) not in valence[z] for i, z in enumerate(number))
        atoms += size
    assert broken == 0 and atoms > 2000


def test_qm9_select_equals_a_loop(sample):
    m, index = sample.molecules, torch.tensor([6999, 3, 3, 4000])
    chosen = m.select(index)
    for row, i in enumerate(index.tolist()):
        a, b = m.start[i], chosen.start[row]
        n = int(m.size[i])
        assert chosen.size[row] == n
        assert_close(chosen.position[b : b + n], m.position[a : a + n])
        pairs = n * (n - 1) // 2
        order = chosen.pair_order[chosen.pair_start[row] :][:pairs]
        assert_close(order, m.pair_order[m.pair_start[i] :][:pairs])
    assert len(m.select([])) == 0
    assert_close(m.to("cpu").y, m.y)


def test_qm9_ranges_with_empty_ranges():
    assert ranges(torch.tensor([4, 9, 0]), torch.tensor([2, 0, 3])).tolist() == [4, 5, 0, 1, 2]


def test_qm9_features_of_padding_are_zero():
    assert atom_features(torch.tensor([0]), torch.tensor([0])).abs().sum() == 0
    assert atom_features(torch.tensor([9]), torch.tensor([0])).tolist() == [
        [0, 0, 0, 0, 1, 9, 0, 0, 0, 0, 0]
    ]


def test_qm9_normalization_reads_the_training_part_alone(sample):
    mean, std = normalization(sample)
    y = sample.molecules.y[sample.train].double()
    assert_close(mean, y.mean(0).float())
    assert_close(std, y.std(0).float())
    spoiled = sample.molecules.y.clone()
    spoiled[sample.test] += 1e6
    spoiled[sample.validation] -= 1e5
    molecules = dataclasses.replace(sample.molecules, y=spoiled)
    changed = dataclasses.replace(sample, molecules=molecules)
    assert_close(normalization(changed), (mean, std), rtol=0, atol=0)
    assert (normalization(changed, whole=True)[0] - mean).abs().min() > 1e4
    with pytest.raises(ValueError, match="train has 1"):
        normalization(sample, train=sample.train[:1])


def test_qm9_paper_split_sizes():
    train, validation, test = paper_split()
    assert (len(train), len(validation), len(test)) == (110_831, 10_000, 10_000)
    assert len(torch.cat([train, validation, test]).unique()) == 130_831
    assert test[:5].tolist() == [86693, 110371, 90001, 109117, 71129]


def test_qm9_missing_folder_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="qm9pack") as error:
        load_qm9()
    assert str(tmp_path / "qm9") in str(error.value) and "load_sample" in str(error.value)
    monkeypatch.delenv("DBMTL_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "dbmtl"
    with pytest.raises(FileNotFoundError, match="not set"):
        load_qm9()


def test_qm9_wrong_or_truncated_file_is_refused(tmp_path):
    whole = qm9_data.files("dbmtl").joinpath("assets/qm9_sample.npz").read_bytes()
    path = tmp_path / "qm9.npz"
    for content in (whole, whole[:1000], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="truncated or not the expected file"):
            load_qm9(tmp_path)
    path.write_bytes(whole)
    path.with_suffix(".json").write_text(json.dumps({"sha256": hashlib.sha256(whole).hexdigest()}))
    assert check_file(path) == hashlib.sha256(whole).hexdigest()


@pytest.fixture
def geometric_folder(tmp_path, sample):
    """Forty molecules of the sample as torch-geometric stores its processed QM9."""
    pytest.importorskip("torch_geometric")
    from torch_geometric.data import Data, InMemoryDataset

    chosen, graphs = sample.molecules.select(torch.arange(0, 7000, 175)), []
    for row in range(len(chosen)):
        one = chosen.select([row])
        n = int(one.size)
        # (i, j), i < j, in the order of the packed triangle
        pairs = torch.tril_indices(n, n, -1).flip(0)
        bonded = one.pair_order > 0
        forward, kind = pairs[:, bonded], one.pair_order[bonded].long() - 1
        both = torch.cat([forward, forward.flip(0)], 1)
        order = (both[0] * n + both[1]).argsort()
        y = torch.zeros(1, 19)
        y[:, [t.column for t in TASKS]] = one.y
        attr = torch.nn.functional.one_hot(torch.cat([kind, kind])[order], 4).float()
        graphs.append(
            Data(
                x=atom_features(one.number, one.hydrogens),
                edge_index=both[:, order],
                edge_attr=attr,
                y=y,
                pos=one.position,
                z=one.number.long(),
                idx=torch.tensor([row]),
            )
        )
    (tmp_path / "processed").mkdir()
    InMemoryDataset.save(graphs, tmp_path / "processed" / "data_v3.pt")
    return tmp_path, chosen


def test_qm9_reads_torch_geometrics_folder(geometric_folder, monkeypatch):
    folder, chosen = geometric_folder
    with pytest.raises(ValueError, match="40 molecules, not 130,831"):
        load_qm9(folder)
    monkeypatch.setattr(qm9_data, "MOLECULES", 40)
    read = load_qm9(folder)
    for field in dataclasses.fields(Molecules):
        value = getattr(read.molecules, field.name)
        assert_close(value, getattr(chosen, field.name), rtol=0, atol=0)
    content = (folder / "processed" / "data_v3.pt").read_bytes()
    assert read.hash == hashlib.sha256(content).hexdigest()


def test_qm9_truncated_torch_geometric_file(geometric_folder):
    folder, _ = geometric_folder
    path = folder / "processed" / "data_v3.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        load_qm9(folder)


@pytest.mark.data
def test_qm9_full_set_is_torch_geometrics(full):
    """Methane, ammonia and water by the numbers of the raw file, and counts of the whole."""
    m = full.molecules
    assert (len(m), len(m.number), int((m.pair_order > 0).sum())) == (130_831, 2_359_210, 2_440_360)
    assert [len(p) for p in (full.train, full.validation, full.test)] == [110_831, 10_000, 10_000]
    methane = [0.0, 13.21, -10.5499, 3.1865, 35.3641, 1.2177]
    methane += [-17.1722, -17.2868, -17.3897, -16.1519, 6.469]
    assert_close(m.y[0], torch.tensor(methane), rtol=0, atol=5e-5)
    hartree, water = 27.211386246, (-76.404702 - 2 * -0.500273 - -75.064579)
    expected = torch.tensor([1.8511, -0.2928 * hartree, water * hartree])
    assert_close(m.y[2, [0, 2, 6]], expected, rtol=1e-5, atol=1e-4)
    assert [int(n) for n in m.size[:3]] == [5, 4, 3] and m.number[:5].tolist() == [6, 1, 1, 1, 1]
    assert m.hydrogens[m.start[:3]].tolist() == [4, 3, 2]


@pytest.mark.data
def test_qm9_sample_is_a_rounded_part_of_the_full_set(full, sample):
    parts = [full.test[:1000], full.validation[:1000], full.train[:5000]]
    chosen = torch.cat(parts).sort().values
    exact, rounded = full.molecules.select(chosen), sample.molecules
    for name in ("size", "number", "hydrogens", "pair_order", "y"):
        assert_close(getattr(exact, name), getattr(rounded, name), rtol=0, atol=0)
    sizes = exact.size.tolist()
    pairs = zip(exact.position.split(sizes), rounded.position.split(sizes), strict=True)
    error = torch.cat([(torch.pdist(a.double()) - torch.pdist(b.double())).abs() for a, b in pairs])
    assert error.max() < 2 * 3**0.5 * 0.0005 and error.mean() < 0.0004
    assert set(chosen[sample.train].tolist()) <= set(full.train.tolist())


@pytest.mark.data
def test_qm9_whole_set_statistics_leak_little(full):
    mean, std = normalization(full)
    whole_mean, whole_std = normalization(full, whole=True)
    assert 0 < ((whole_mean - mean).abs() / std).max() < 0.003
    assert 0 < (whole_std / std - 1).abs().max() < 0.003


@pytest.mark.data
def test_qm9_truncated_full_file_is_refused(tmp_path):
    content = (data_folder() / "qm9" / "qm9.npz").read_bytes()
    (tmp_path / "qm9.npz").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="truncated"):
        load_qm9(tmp_path)


def test_qm9_decode_needs_no_sample_keys():
    """The sample's step is optional: without it positions are in 1e-4 Angstrom."""
    asset = qm9_data.files("dbmtl").joinpath("assets/qm9_sample.npz")
    with asset.open("rb") as file, np.load(file) as stored:
        arrays = dict(stored)
    scaled = decode(arrays).position
    del arrays["step"]
    assert_close(decode(arrays).position * 10, scaled)


@pytest.mark.parametrize("content", ["{", "[]", "{}", "null"])
def test_qm9_damaged_record_of_a_build_is_named(tmp_path, monkeypatch, content):
    path = tmp_path / "qm9.npz"
    path.write_bytes(b"data")
    path.with_suffix(".json").write_text(content)
    message = "qm9.json, the build's record of qm9.npz, is damaged: delete both"
    with pytest.raises(ValueError, match=message) as error:
        load_qm9(tmp_path)
    assert str(tmp_path) in str(error.value)
    digest = hashlib.sha256(b"data").hexdigest()
    monkeypatch.setattr(qm9_data, "KNOWN_FILES", {digest: "known"})
    assert check_file(path) == digest, "a known file needs no record"


def test_qm9_built_file_of_another_size_is_refused(tmp_path):
    whole = qm9_data.files("dbmtl").joinpath("assets/qm9_sample.npz").read_bytes()
    path = tmp_path / "qm9.npz"
    path.write_bytes(whole)
    path.with_suffix(".json").write_text(json.dumps({"sha256": hashlib.sha256(whole).hexdigest()}))
    with pytest.raises(ValueError, match="holds 7000 molecules, not 130,831"):
        load_qm9(tmp_path)


def test_qm9_finds_torch_geometrics_folder_under_dbmtl_data(
    geometric_folder, tmp_path, monkeypatch
):
    folder, chosen = geometric_folder
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    monkeypatch.setattr(qm9_data, "MOLECULES", 40)
    (tmp_path / "data" / "qm9").mkdir(parents=True)
    (folder / "processed").rename(tmp_path / "data" / "qm9" / "processed")
    assert len(load_qm9().molecules) == 40


def test_qm9_of_another_torch_geometric_is_named(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "processed").mkdir()
    (tmp_path / "processed" / "data_v2.pt").write_bytes(b"")
    message = "data_v2.pt of another torch-geometric.*makes processed/data_v3.pt"
    with pytest.raises(FileNotFoundError, match=message):
        load_qm9(tmp_path)
