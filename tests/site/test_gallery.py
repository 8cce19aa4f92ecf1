"""The gallery: every card is on the page, every picture has a card, the page stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures"
VOID = {"meta", "link", "img", "input"}  # elements without an end
OPTIONAL = {"td", "th", "tr"}  # elements whose end HTML5 does not ask for


def run_notebook(name):
    """The names that a notebook's code cells leave behind."""
    space = {"__name__": name, "display": lambda *args: None}
    for cell in json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), space)
    return space


def titles_in(page):
    """{id of an article: its title}."""
    return dict(re.findall(r'<h4 id="([^"]*)-title">(.*?)</h4>', page))


class Reader(HTMLParser):
    """What the tests ask of a page: elements with attributes, its texts, whether it nests."""

    def __init__(self, page):
        super().__init__()
        self.open, self.elements, self.text = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        assert len({name for name, _ in attrs}) == len(attrs)
        if tag not in VOID | OPTIONAL:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def all(self, tag, key):
        return [attrs[key] for name, attrs in self.elements if name == tag and key in attrs]


def run(seeds=3, scale="cpu", age=False):
    counts = dict.fromkeys(("runs", "finished", "seeds"), seeds)
    return {"scale": scale, **counts, "methods": 1, "device": ["cpu: x"], "older code": age}


def add(
    folder, stem, notebook, runs, caption='A <b> & "c". Ours: qm9 at cpu scale.', table=0, data=""
):
    (folder / "cards").mkdir(parents=True, exist_ok=True)
    card = {
        "stem": stem,
        "notebook": notebook,
        "caption": caption,
        "runs": runs,
        "data": data,
        "command": "ci/x",
    }
    (folder / "cards" / f"{stem}.json").write_text(json.dumps(card))
    if table:
        rows = "| <i>EW</i> | 1 ± 2 |\n" * table
        (folder / f"{stem}.md").write_text(f"| m | v |\n|---|---|\n{rows}\nCaption.\n")
    else:
        pixels = Image.effect_noise((160, 90), 60).convert("RGB").quantize(128)
        pixels.save(folder / f"{stem}.png")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of figures with four cards, and the place where the notebook looks."""
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    figures = tmp_path / "figures"
    add(figures, "figure10_cosines", "15_paper/16_figure10_cosines", {"office31": run()})
    add(figures, "figure1_log", "15_paper/07_figure1_log", {"qm9": None})
    add(figures, "qm9_per_task", "15_paper/03_table3_qm9", {"qm9": run(age=True), "pacs": None})
    add(figures, "table3_qm9", "15_paper/03_table3_qm9", {"qm9": run(scale="early")}, table=20)
    add(figures, "toy_problem", "16_studies/03_toy_problem", {}, data="computed here")
    return figures


@pytest.fixture
def made(folder):
    return run_notebook("17_site/03_gallery"), Reader(
        (folder / "index.html").read_text(encoding="utf-8")
    )


def test_gallery_has_every_card_in_the_papers_order(made):
    space, page = made
    sections = page.all("section", "id")
    paper = [*(f"table{i}" for i in range(1, 7)), *(f"figure{i}" for i in range(1, 11))]
    assert sections == [
        "tables",
        *paper[:6],
        "figures",
        *paper[6:],
        "claims",
        "studies",
        "nash",
        "toy",
    ]
    articles = page.all("article", "id")
    assert [a for a in articles if "table3" in a] == ["table3-table3_qm9", "table3-qm9_per_task"]
    assert {"figure1-figure1_log", "figure10-figure10_cosines", "figure2-figure2-pending"} <= set(
        articles
    )


def test_gallery_says_the_state_of_each_card(made):
    articles = [attrs for name, attrs in made[1].elements if name == "article"]
    tags = {attrs["id"].split("-", 1)[1]: attrs["data-tags"].split() for attrs in articles}
    assert tags["figure10_cosines"] == ["measured", "scale-cpu"] and tags["figure1_log"] == [
        "pending"
    ]
    assert tags["qm9_per_task"] == ["part", "scale-cpu", "older"] and tags["toy_problem"] == [
        "computed"
    ]
    assert tags["table3_qm9"] == ["measured", "scale-early"] and tags["figure2-pending"] == [
        "pending"
    ]
    words = " ".join(made[1].text)
    assert (
        "QM9: cpu scale, 3 seeds, older code" in words
        and "not run: PACS" in words
        and "computed here" in words
    )


def folded_lines(page):
    """{id of an article that is folded: the line beside its title}."""
    folded = r'<article id="([^"]*)"[^>]* class="folded">\s*<details><summary><h4.*?</h4> '
    return dict(re.findall(folded + r"<span>(.*?)</span></summary>", page))


def test_gallery_folds_what_is_not_run_into_one_line_that_says_so(made, folder):
    lines = folded_lines((folder / "index.html").read_text(encoding="utf-8"))
    assert lines["figure1-figure1_log"] == "not run: QM9"
    assert lines["figure2-figure2-pending"] == "not made yet"
    assert lines["table3-qm9_per_task"] == "picture"  # behind the table, which is open
    assert not {"table3-table3_qm9", "figure10-figure10_cosines", "toy-toy_problem"} & set(lines)


def test_gallery_opens_two_pictures_of_a_part_and_folds_the_others(folder):
    for i in range(1, 4):
        add(folder, f"figure5_{i}", "15_paper/11_figure5_beta", {"office31": run()}, "Line. More.")
    run_notebook("17_site/03_gallery")
    lines = folded_lines((folder / "index.html").read_text(encoding="utf-8"))
    assert [name for name in lines if name.startswith("figure5-")] == ["figure5-figure5_3"]


def test_gallery_shows_a_first_sentence_and_folds_the_others(folder):
    add(folder, "figure5_beta", "15_paper/11_figure5_beta", {}, "As in e.g. b. More. Ours: cpu.")
    run_notebook("17_site/03_gallery")
    page = (folder / "index.html").read_text(encoding="utf-8")
    shown = page[page.index("<figcaption>As in e.g. b.") :]
    assert shown.index("<details>") < shown.index("<p>More.</p>") < shown.index("<p>Ours: cpu.</p>")


def test_gallery_shows_every_statement_of_the_ledger_whole(folder):
    long = "a statement that is " + "very " * 40 + "long"
    add(folder, "claims_table", "15_paper/17_claims", {}, "Ledger.")
    rows = "".join(f"| C01 | claim | {long} | {v} |\n" for v in ("holds", "holds", "open"))
    (folder / "claims_table.md").write_text(
        "| id | kind | statement | verdict |\n|---|---|---|---|\n" + rows
    )
    (folder / "claims_table.png").unlink()
    run_notebook("17_site/03_gallery")
    page = (folder / "index.html").read_text(encoding="utf-8")
    assert (
        page.count(f"<summary><strong>C01</strong> {long} <span>2 holds, 1 open</span></summary>")
        == 1
    )
    assert page.count(long) == 1


def test_gallery_takes_a_title_from_the_table_or_from_the_caption(made, folder):
    add(folder, "figure5_of_mine", "15_paper/11_figure5_beta", {}, "Errors by task: ours. Bars.")
    run_notebook("17_site/03_gallery")
    titles = titles_in((folder / "index.html").read_text(encoding="utf-8"))
    assert titles["figure5-figure5_of_mine"] == "Errors by task"
    assert titles["figure1-figure1_log"].startswith("Figure 1: six gradient methods")


def test_gallery_needs_nothing_but_itself(made):
    _, page = made
    assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    assert (
        "script" not in {tag for tag, _ in page.elements}
        and [link for link in page.all("link", "href") if link != "data:,"] == []
    )
    assert [text for text in page.text if "url(" in text or "@import" in text] == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    anchors = [link for link in page.all("a", "href") if link.startswith("#")]
    # six tables, ten figures, the ledger, two studies, and the headings of three groups
    assert len(anchors) == len(set(anchors)) == 22 and all(link[1:] in ids for link in anchors)


def test_gallery_escapes_what_cards_and_tables_say(made):
    _, page = made
    assert 'A <b> & "c".' in [text.strip() for text in page.text]
    assert page.all("img", "alt") == ['A <b> & "c".'] * 4
    assert "b" not in {tag for tag, _ in page.elements} and "i" not in {
        tag for tag, _ in page.elements
    }
    assert [text for text in page.text if text == "<i>EW</i>"] == ["<i>EW</i>"] * 20


def test_gallery_gives_the_same_bytes_and_names_no_place_or_day(folder, made):
    first = (folder / "index.html").read_bytes()
    run_notebook("17_site/03_gallery")
    assert (folder / "index.html").read_bytes() == first
    assert str(folder.parent).encode() not in first and b"/tmp" not in first


def test_gallery_packs_pictures_until_the_page_fits(made, folder):
    space, _ = made
    sizes, kinds = [], []
    for tightness in range(len(space["PACKING"])):
        page = space["render"](folder, [], tightness)
        sizes.append(len(page.encode()))
        kinds.append("image/webp" in page)
    assert sizes == sorted(sizes, reverse=True) and kinds == [False] + [True] * (len(kinds) - 1)
    for wanted in (1, len(sizes) - 1):
        space["limit"] = sizes[wanted]
        page, _ = space["fitted"](folder, [])
        assert len(page.encode()) <= sizes[wanted]
    space["limit"] = sizes[-1] - 1
    with pytest.raises(ValueError, match="at the tightest packing"):
        space["fitted"](folder, [])


def test_gallery_finds_what_has_no_card(made, folder):
    space, _ = made
    assert space["orphans"](folder) == ([], [])
    Image.new("RGB", (5, 5)).save(folder / "stray.png")
    (folder / "figure1_log.png").unlink()
    assert space["orphans"](folder) == (["stray"], ["figure1_log"])


def test_gallery_short_form_joins_the_cards_of_a_part(made):
    space, _ = made
    lines = {line.split(" | ")[0][2:]: line for line in space["table"].splitlines()}
    assert "| qm9 cpu, 3 seeds; not run: pacs |" in lines["Table 3: QM9"]
    assert "| not run: qm9 |" in lines["Figure 1: the logarithm in front of six methods"]
    assert "| no card yet |" in lines["Figure 2: IMTL-L against the logarithm"]


# --------------------------------------------------------------------------- the project's own page


def test_project_pictures_and_tables_have_cards_and_cards_have_them():
    shown = {path.stem for pattern in ("*.png", "*.md") for path in FIGURES.glob(pattern)} - {
        "states"
    }
    cards = {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in FIGURES.glob("cards/*.json")
    }
    assert sorted(shown - set(cards)) == [], "no card: write_card in the notebook that draws it"
    assert sorted(set(cards) - shown) == [], "a card without a picture or table"
    for stem, card in cards.items():
        assert card["stem"] == stem and (ROOT / "nbs" / f"{card['notebook']}.ipynb").exists(), stem
        assert len(card["caption"]) > 30 and card["caption"].rstrip().endswith("."), stem


def test_project_gallery_is_small_whole_and_current(tmp_path, monkeypatch):
    page = (FIGURES / "index.html").read_text(encoding="utf-8")
    assert len(page.encode()) <= 1_500_000
    reader = Reader(page)
    titles = titles_in(page)
    assert len(set(titles.values())) == len(titles) == len(reader.all("article", "id"))
    for name, title in titles.items():
        stem = name.split("-", 1)[1]
        in_words = re.sub(r"^(table|figure)(\d)", r"\1 \2", stem.replace("_", " "))
        assert title.lower() not in {stem, in_words, stem.replace("_", " ")}, f"{stem}: no title"
        assert "_" not in title and title[0].isupper(), f"{stem}: no title"
    cards = {path.stem for path in FIGURES.glob("cards/*.json")}
    assert cards <= {name.split("-", 1)[1] for name in reader.all("article", "id")}
    local = [link for link in reader.all("a", "href") if not link.startswith(("#", "https:"))]
    assert [link for link in local if not (FIGURES / link).exists()] == []
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    (tmp_path / "figures").mkdir()
    for name in ("cards", "benchmarks"):
        (tmp_path / "figures" / name).symlink_to(FIGURES / name)
    for path in FIGURES.iterdir():
        if (
            path.suffix in (".png", ".svg", ".csv", ".md")
            or path.suffix == ".html"
            and path.stem != "index"
        ):
            if path.stem != "states":
                (tmp_path / "figures" / path.name).symlink_to(path)
    (tmp_path / "nbs").symlink_to(ROOT / "nbs")
    space = run_notebook("17_site/03_gallery")
    assert set(space["TITLES"]) >= cards, "a title is missing in the table of titles"
    assert (tmp_path / "figures" / "index.html").read_text(encoding="utf-8") == page, (
        "run ci/reproduce --only 17_site/03_gallery"
    )
    assert (tmp_path / "figures" / "states.md").read_text() == (FIGURES / "states.md").read_text()
