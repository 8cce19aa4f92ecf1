"""The gallery: every card is on the page, every picture has a card, the page stands alone."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from dbmtl.experiments.records import read_records
from dbmtl.report.cards import read_cards, states
from dbmtl.report.gallery import PACKING, fitted, orphans, render
from dbmtl.report.runs import run_sizes
from dbmtl.report.tables import markdown_table

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures"
VOID = {"meta", "link", "img", "input"}  # elements without an end
OPTIONAL = {"td", "th", "tr"}  # elements whose end HTML5 does not ask for


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
    figures, stem, notebook, runs, caption='A <b> & "c". Ours: qm9 at cpu scale.', table=0, data=""
):
    folder = figures / notebook.split("/")[0].split("_")[1]
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


NOTEBOOKS = [
    path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    for group in ("15_paper", "16_studies")
    for path in sorted((ROOT / "nbs" / group).glob("*.ipynb"))
]


@pytest.fixture
def folder(tmp_path):
    """A shelf with five cards."""
    figures = tmp_path / "figures"
    add(figures, "figure10", "15_paper/16_figure10_cosines", {"office31": run()})
    add(figures, "figure1", "15_paper/07_figure1_log", {"qm9": None})
    add(figures, "table3_by_task", "15_paper/03_table3_qm9", {"qm9": run(age=True), "pacs": None})
    add(figures, "table3", "15_paper/03_table3_qm9", {"qm9": run(scale="early")}, table=20)
    add(figures, "toy_problem", "16_studies/03_toy_problem", {}, data="computed here")
    return figures


def page_of(folder):
    return render(folder, NOTEBOOKS, ROOT / "nbs")


def test_gallery_has_every_card_in_the_papers_order(folder):
    page = Reader(page_of(folder))
    sections = page.all("section", "id")
    paper = [*(f"table{i}" for i in range(1, 7)), *(f"figure{i}" for i in range(1, 11))]
    assert sections[:20] == ["tables", *paper[:6], "figures", *paper[6:], "claims", "studies"]
    assert {"toy_problem", "nash_protocol", "batch_norm"} <= set(sections[20:])
    articles = page.all("article", "id")
    assert [a for a in articles if "table3" in a] == ["table3-table3", "table3-table3_by_task"]
    assert {"figure1-figure1", "figure10-figure10", "figure2-figure2-pending"} <= set(articles)


def test_gallery_takes_the_titles_of_parts_from_their_notebooks(folder):
    page = page_of(folder)
    titles = dict(re.findall(r'<h3 id="([^"]*)-title">(.*?)</h3>', page))
    for name in NOTEBOOKS:
        first = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"][0]
        heading = "".join(first["source"]).splitlines()[0].lstrip("# ")
        if "claims" not in name:  # alone in its group
            assert heading in titles.values()
    alone = render(folder, [], "nowhere")
    assert "Figure10 cosines" in alone and "Figure1 log" in alone


def test_gallery_says_the_state_of_each_card(folder):
    page = Reader(page_of(folder))
    articles = [attrs for name, attrs in page.elements if name == "article"]
    tags = {attrs["id"].split("-", 1)[1]: attrs["data-tags"].split() for attrs in articles}
    assert tags["figure10"] == ["measured", "scale-cpu"] and tags["figure1"] == ["pending"]
    assert tags["table3_by_task"] == ["part", "scale-cpu", "older"]
    assert tags["toy_problem"] == ["computed"] and tags["figure2-pending"] == ["pending"]
    assert tags["table3"] == ["measured", "scale-early"]
    words = " ".join(page.text)
    assert "QM9: cpu scale, 3 seeds, older code" in words
    assert "not run: PACS" in words and "computed here" in words


def folded_lines(page):
    """{id of an article that is folded: the line beside its title}."""
    folded = r'<article id="([^"]*)"[^>]* class="folded">\s*<details><summary><h4.*?</h4> '
    return dict(re.findall(folded + r"<span>(.*?)</span></summary>", page))


def test_gallery_folds_what_is_not_run_into_one_line_that_says_so(folder):
    lines = folded_lines(page_of(folder))
    assert lines["figure1-figure1"] == "not run: QM9"
    assert lines["figure2-figure2-pending"] == "not made yet"
    assert lines["table3-table3_by_task"] == "picture"  # behind the table, which is open
    assert not {"table3-table3", "figure10-figure10", "toy_problem-toy_problem"} & set(lines)


def test_gallery_opens_two_pictures_of_a_part_and_folds_the_others(folder):
    for i in (1, 2, 10):
        add(folder, f"figure5_{i}", "15_paper/11_figure5_beta", {"office31": run()}, "Line. More.")
    lines = folded_lines(page_of(folder))
    assert [name for name in lines if name.startswith("figure5-")] == ["figure5-figure5_10"]


def test_gallery_shows_a_first_sentence_and_folds_the_others(folder):
    add(folder, "figure5", "15_paper/11_figure5_beta", {}, "As in e.g. b. More. Ours: cpu.")
    page = page_of(folder)
    shown = page[page.index("<figcaption>As in e.g. b.") :]
    assert shown.index("<details>") < shown.index("<p>More.</p>") < shown.index("<p>Ours: cpu.</p>")


def test_gallery_shows_every_statement_of_the_ledger_whole(folder):
    long = "a statement that is " + "very " * 40 + "long"
    add(folder, "claims", "15_paper/17_claims", {}, "Ledger.")
    rows = "".join(f"| C01 | claim | {long} | {v} |\n" for v in ("holds", "holds", "open"))
    (folder / "paper" / "claims.md").write_text(
        "| id | kind | statement | verdict |\n|---|---|---|---|\n" + rows
    )
    (folder / "paper" / "claims.png").unlink()
    page = page_of(folder)
    summary = f"<summary><strong>C01</strong> {long} <span>2 holds, 1 open</span></summary>"
    assert page.count(summary) == 1 and page.count(long) == 1


def test_gallery_takes_a_title_from_the_caption(folder):
    long = "Errors by task: ours, " + "which is long, " * 6 + "and so on"
    add(folder, "figure5_of_mine", "15_paper/11_figure5_beta", {}, f"{long}. Bars.")
    titles = titles_in(page_of(folder))
    assert titles["figure5-figure5_of_mine"] == "Errors by task"
    assert titles["table3-table3"] == "A &lt;b&gt; &amp; &#34;c&#34;"


def test_gallery_needs_nothing_but_itself(folder):
    page = Reader(page_of(folder))
    assert all(source.startswith("data:image/") for source in page.all("img", "src"))
    assert "script" not in {tag for tag, _ in page.elements}
    assert [link for link in page.all("link", "href") if link != "data:,"] == []
    assert [text for text in page.text if "url(" in text or "@import" in text] == []
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    anchors = [link for link in page.all("a", "href") if link.startswith("#")]
    assert len(anchors) == len(set(anchors)) > 20 and all(link[1:] in ids for link in anchors)


def test_gallery_escapes_what_cards_and_tables_say(folder):
    page = Reader(page_of(folder))
    assert 'A <b> & "c".' in [text.strip() for text in page.text]
    assert page.all("img", "alt") == ['A <b> & "c".'] * 4
    assert not {"b", "i"} & {tag for tag, _ in page.elements}
    assert [text for text in page.text if text == "<i>EW</i>"] == ["<i>EW</i>"] * 20


def test_gallery_gives_the_same_bytes_and_names_no_place_or_day(folder):
    first = page_of(folder)
    assert page_of(folder) == first
    assert str(folder.parent) not in first and "/tmp" not in first


def test_gallery_packs_pictures_until_the_page_fits(folder):
    nbs = ROOT / "nbs"
    pages = [render(folder, [], nbs, tightness) for tightness in range(len(PACKING))]
    sizes = [len(page.encode()) for page in pages]
    assert sizes == sorted(sizes, reverse=True)
    assert ["image/webp" in page for page in pages] == [False] + [True] * (len(pages) - 1)
    for wanted in (1, len(sizes) - 1):
        assert len(fitted(folder, [], nbs, sizes[wanted]).encode()) <= sizes[wanted]
    with pytest.raises(ValueError, match="at the tightest packing"):
        fitted(folder, [], nbs, sizes[-1] - 1)


def test_gallery_finds_what_has_no_card(folder):
    assert orphans(folder) == ([], [])
    Image.new("RGB", (5, 5)).save(folder / "paper" / "stray.png")
    (folder / "paper" / "figure1.png").unlink()
    assert orphans(folder) == (["paper/stray"], ["paper/figure1"])


def test_short_form_joins_the_cards_of_a_part(folder):
    table = states(read_cards(folder), NOTEBOOKS, ROOT / "nbs")
    lines = dict(line[2:-2].split(" | ") for line in table.splitlines()[2:])
    of = {link.split("/")[-1].split("_")[1]: words for link, words in lines.items()}
    assert of["table3"] == "QM9 early, 3 seeds; not run: PACS"
    assert of["figure1"] == "not run: QM9" and of["figure2"] == "no card yet"
    assert of["toy"] == "computed here"


# --------------------------------------------------------------------------- the project's own page


def test_project_pictures_and_tables_have_cards_and_cards_have_them():
    strays, empty = orphans(FIGURES)
    assert strays == [], "no card: use Artifacts in the notebook that draws it"
    assert empty == [], "a card without a picture or table"
    cards = read_cards(FIGURES)
    assert len(cards) > 40
    for card in cards:
        assert (ROOT / "nbs" / f"{card['notebook']}.ipynb").exists(), card["stem"]
        assert card["notebook"].split("/")[0].endswith(f"_{card['folder']}"), card["stem"]
        assert len(card["caption"]) > 30 and card["caption"].rstrip().endswith("."), card["stem"]


def test_project_shelf_holds_what_a_shelf_should():
    """Folders as in nbs/; a picture is SVG, PNG and CSV, a table Markdown and CSV."""
    names = {path.name for path in FIGURES.iterdir()}
    folders = {"paper", "studies", "site", "benchmarks", "runs", "evidence"}
    assert names == folders | {"index.html", "replay.json", "protocol.md"}
    photographs = {"predictions_rooms", "predictions_streets"}  # and the arrays behind them
    for part in ("paper", "studies", "site"):
        for path in (FIGURES / part).iterdir():
            is_photograph = path.stem.rstrip("_123") in photographs
            endings = (".png", ".npz") if is_photograph else (".svg", ".png", ".csv", ".md")
            assert path.suffix in endings or path.name == "cards", path
        for picture in (FIGURES / part).glob("*.svg"):
            assert picture.with_suffix(".png").exists(), picture


def test_project_gallery_is_small_whole_and_current():
    page = (FIGURES / "index.html").read_text(encoding="utf-8")
    assert len(page.encode()) <= 1_500_000
    reader = Reader(page)
    titles = titles_in(page)
    assert len(titles) == len(reader.all("article", "id"))
    doubles = {title for title in titles.values() if list(titles.values()).count(title) > 1}
    assert doubles == set()
    for name, title in titles.items():
        words = re.sub("delta_[pm]", "", title)
        assert "_" not in words and len(title) < 160, f"{name}: {title}"
    local = [link for link in reader.all("a", "href") if not link.startswith(("#", "https:"))]
    assert [link for link in local if not (FIGURES / link).exists()] == []
    nbs = ROOT / "nbs"
    assert fitted(FIGURES, NOTEBOOKS, nbs) == page, "run ci/reproduce --only 17_site/03_gallery"
    paper = [name for name in NOTEBOOKS if name.startswith("15_paper")]
    short = (FIGURES / "site" / "states.md").read_text(encoding="utf-8")
    assert short.startswith(states(read_cards(FIGURES), paper, nbs))
    records = [*read_records(FIGURES / "runs"), *read_records(FIGURES / "evidence")]
    assert short.strip().endswith(markdown_table(run_sizes(records)).strip())
