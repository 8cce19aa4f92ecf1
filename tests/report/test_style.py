"""The figure style: one appearance per method, readable by everybody, the same bytes every time."""

import io
import itertools
import math
import os
import re
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from dbmtl.experiments.intervals import Interval
from dbmtl.report.style import (
    COLORS,
    FAMILIES,
    error_or_bound,
    method_color,
    method_style,
    palette_png,
    save_figure,
    settled,
    use_style,
)
from dbmtl.report.tables import write_csv, write_table


@pytest.fixture(autouse=True)
def style():
    use_style()
    yield
    plt.close("all")
    matplotlib.rcdefaults()


def picture():
    fig, ax = plt.subplots()
    for method, step in (("DB-MTL", 7), ("EW", 4)):
        ax.plot(np.arange(5.0) * 3 % step, label=method, **method_style(method))
        ax.fill_between(range(5), np.arange(5.0), 5, alpha=0.2, color=method_color(method))
    ax.set(xlabel="epoch", ylabel="$\\Delta_p$ (%)")
    ax.legend()
    return fig


def test_save_figure_writes_the_same_bytes_twice(tmp_path):
    first = save_figure(picture(), "shape", tmp_path / "a" / "b")
    second = save_figure(picture(), "shape", tmp_path / "c")
    assert [path.name for path in first] == ["shape.svg", "shape.png"]
    for one, two in zip(first, second, strict=True):
        assert one.read_bytes() == two.read_bytes()


@pytest.mark.full
def test_save_figure_writes_the_same_bytes_in_another_process(tmp_path):
    script = (
        "import sys, matplotlib; matplotlib.use('Agg')\n"
        "import matplotlib.pyplot as plt\n"
        "from dbmtl.report.style import save_figure, method_style, use_style\n"
        "use_style(); fig, ax = plt.subplots()\n"
        "ax.plot([1, 2, 4], **method_style('CAGrad'))\n"
        "save_figure(fig, 'f', sys.argv[1])"
    )
    for name in "ab":
        subprocess.run([sys.executable, "-c", script, tmp_path / name], check=True, timeout=60)
    for ending in ("svg", "png"):
        assert (tmp_path / "a" / f"f.{ending}").read_bytes() == (
            tmp_path / "b" / f"f.{ending}"
        ).read_bytes()


def test_save_figure_keeps_its_words_and_no_date_or_version(tmp_path):
    svg, png = save_figure(picture(), "f", tmp_path)
    text = svg.read_text()
    assert not re.search(r"<dc:date>|<dc:creator>|Matplotlib v", text)
    assert (
        "<text" in text
        and "'DejaVu Sans', 'Verdana', sans-serif" in text
        and not re.search(r"\s\d+\.\d{3}", text)
    )
    with Image.open(png) as image:
        assert image.size == (700, 500) and image.info == {}
    assert {path.name for path in tmp_path.iterdir()} == {"f.svg", "f.png"}


def test_palette_png_keeps_the_colors():
    fig, ax = plt.subplots()
    ax.axis("off")
    for place, color in enumerate(FAMILIES):
        ax.bar(place, 1, color=color)
    exact = np.asarray(Image.open(io.BytesIO(palette_png(fig))).convert("RGB")).reshape(-1, 3)
    for color in FAMILIES:
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)])
        assert np.abs(exact.astype(int) - wanted).max(1).min() <= 3


def test_every_method_has_a_look_of_its_own():
    looks = [(style["color"], style["marker"]) for style in map(method_style, COLORS)]
    assert len(set(looks)) == len(looks) >= 32
    assert [m for m in COLORS if method_style(m)["marker"] == "*"] == ["DB-MTL"]
    assert sum(color == COLORS["DB-MTL"] for color in COLORS.values()) == 1


@pytest.mark.parametrize(
    "method", ["PCGrad", "GradVac", "IMTL-G", "CAGrad", "Nash-MTL", "Aligned-MTL"]
)
def test_log_variants_are_hollow_and_keep_the_color(method):
    plain = method_style(method)
    log = method_style(f"{method}+log")
    assert (log["color"], log["marker"]) == (plain["color"], plain["marker"])
    assert log["markerfacecolor"] == "white" and "markerfacecolor" not in plain


def test_aliases_and_unknown_methods():
    assert method_style("EW+log") == method_style("loss only") == method_style("SI")
    assert method_color("DB-MTL") == "#D55E00"
    for wrong, near in (("DBMTL", "DB-MTL"), ("CAGradd+log", "CAGrad")):
        with pytest.raises(
            ValueError, match=f"unknown method {re.escape(repr(wrong))}: did you mean '{near}'"
        ):
            method_style(wrong)


def to_lab(rgb):
    """CIE L*a*b* (D65) of linear RGB."""
    xyz = (
        np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
        @ rgb
    )
    f = np.cbrt(xyz / np.array([0.9505, 1.0, 1.089]))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes (2009), severity 1
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
}


@pytest.mark.parametrize("vision", VISION)
def test_family_colors_stay_apart(vision):
    def seen(color):
        srgb = np.array([int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
        return to_lab(np.clip(np.array(VISION[vision]) @ linear, 0, 1))

    labs = {color: seen(color) for color in FAMILIES}
    distances = {
        pair: np.linalg.norm(labs[pair[0]] - labs[pair[1]])
        for pair in itertools.combinations(labs, 2)
    }
    assert min(distances.values()) > 15
    against = [distances[pair] for pair in distances if COLORS["DB-MTL"] in pair]
    assert min(against) > 18
    assert all(np.linalg.norm(lab - to_lab(np.ones(3))) > 30 for lab in labs.values())


def test_use_style_overrides_settings():
    matplotlib.rcParams["lines.linewidth"] = 9
    use_style()
    assert (
        matplotlib.rcParams["lines.linewidth"] == 1.2
        and matplotlib.rcParams["svg.hashsalt"] == "dbmtl"
    )


def test_importing_style_changes_no_setting():
    script = (
        "import matplotlib as m; before = dict(m.rcParams)\n"
        "import dbmtl.report.style; assert dict(m.rcParams) == before"
    )
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        timeout=60,
        env=os.environ | {"MPLBACKEND": "Agg"},
    )


# ------------------------------------------------------------------- the same on every machine


def test_settled_drops_what_differs_between_machines():
    assert settled(1.8e-15) == settled(-1.8e-15) == 0 and math.copysign(1, settled(-0.0)) == 1
    assert settled(1.5 + 4e-16) == settled(1.5 - 4e-16) == 1.5
    assert settled(1e-11) == 1e-11 and settled(123456.7890123) == 123456.789012
    assert math.isnan(settled(math.nan)) and settled(-math.inf) == -math.inf


@pytest.mark.parametrize("error", [1.8e-15, -2.2e-16, 0.0, 9.9e-13])
def test_an_error_of_rounding_is_written_as_a_bound(error):
    assert error_or_bound(error) == "< 1e-12"


def test_another_error_is_written_with_two_digits():
    assert [error_or_bound(error) for error in (1.31e-5, -1.36, 2e-12)] == [1.3e-5, -1.4, 2e-12]


def test_rows_and_tables_are_the_same_bytes_with_rounding_errors(tmp_path):
    def written(folder, noise):
        value = 0.1234565 * (1 + noise)
        rows = [
            {"value": value, "zero": noise, "error": error_or_bound(noise)},
            {"value": Interval(value, value - noise, value + noise, 3), "zero": 2.5 + noise},
        ]
        write_csv(rows[:1], tmp_path / folder / "rows.csv")
        write_table("table", rows, tmp_path / folder)
        return [path.read_bytes() for path in sorted((tmp_path / folder).iterdir())]

    exact = written("exact", 0.0)
    assert len(exact) == 3 and b"e-1" not in b"".join(exact).replace(b"1e-12", b"")
    for number, noise in enumerate((1.8e-15, -1.8e-15, 2.2e-16, -3e-14)):
        assert written(str(number), noise) == exact


def drawn_with(noise, kind):
    """A picture whose values lie half way between pixels, on ticks, or on the edge of the axes."""
    fig, ax = plt.subplots()
    x = np.arange(12.0)
    if kind == "bars":
        ax.bar(x, noise((x * 5) % 35 - 10))
        ax.bar(x + 20, noise(x / 4))
    elif kind == "curves":
        for line in noise(np.array([x, x**2 / 4, np.sqrt(x)])):
            ax.plot(x, line, **method_style("DB-MTL"))
        ax.fill_between(x, noise(x), noise(x**2), alpha=0.2)
    elif kind == "logarithmic":
        ax.plot(x, noise(10.0**-x))
        ax.set_yscale("log")
    elif kind == "diagonal":
        ax.plot(noise(np.linspace(0, 1, 11)), noise(np.linspace(0, 1, 11)))
        ax.margins(0)
    elif kind == "marks":
        ax.scatter(noise(x), noise(x**2))
        ax.errorbar(x, noise(x), yerr=noise(x / 10), fmt="o")
        ax.hlines(noise(x), 0, noise(x))
        for place in noise(x / 2):
            ax.text(place, place, "text")
    return fig


@pytest.mark.full
@pytest.mark.parametrize("kind", ["bars", "curves", "logarithmic", "diagonal", "marks"])
def test_a_picture_is_the_same_bytes_with_rounding_errors(tmp_path, kind):
    random = np.random.default_rng(0)

    def written(noise):
        return [path.read_bytes() for path in save_figure(drawn_with(noise, kind), "f", tmp_path)]

    exact = written(lambda values: values)
    assert exact == written(lambda values: values)
    for _ in range(3):
        assert exact == written(lambda v: v * (1 + 1e-13 * random.standard_normal(v.shape)))
    assert exact != written(lambda values: values * 1.01 + 0.01)


def test_rounded_coordinates_leave_the_figure_as_it_was(tmp_path):
    fig = drawn_with(lambda values: values, "marks")
    before = [line.get_xydata().copy() for line in fig.axes[0].lines]
    save_figure(fig, "f", tmp_path)
    after = [line.get_xydata() for line in fig.axes[0].lines]
    assert all(map(np.array_equal, before, after)) and "draw" not in vars(fig)
