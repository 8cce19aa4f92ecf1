"""The book: built without a warning, every link leads somewhere, and pages open in a browser from
the file system, with their mathematics, on a desk and on a telephone. The test needs the extra
`book`; DBMTL_BOOK names a book that is built already."""

import asyncio
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

pytest.importorskip("sphinx", reason="needs the extra `book`")
pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OPENED = [
    "index",
    "01_core/index",
    "01_core/16_balancer",
    "02_loss_balancing/01_log",
    "03_gradient_balancing/09_cagrad",
    "04_dbmtl",
    "15_paper/05_table5_ablation",
    "17_site/01_methods",
    "methods/cagrad",
    "api/dbmtl.core.balancer",
    "api/index",
    "glossary",
    "paper_results",
    "search.html?q=gramian",
]
WIDTHS = (390, 1440)
EXERCISES = ["01_core/05_ema", "02_loss_balancing/01_log"]  # with folded solutions


class Page(HTMLParser):
    """The anchors, links and files of a page."""

    def __init__(self, text):
        super().__init__()
        self.anchors = set()
        self.links = []  # to follow
        self.loaded = []  # by the browser, with the page
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        if values.get("id"):
            self.anchors.add(values["id"])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])
        if tag in ("img", "script", "source") and values.get("src"):
            self.loaded.append(values["src"])
        if tag == "link" and values.get("href") and values.get("rel") != "canonical":
            self.loaded.append(values["href"])


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """The folder of the built book."""
    if os.environ.get("DBMTL_BOOK"):
        return (ROOT / os.environ["DBMTL_BOOK"]).resolve()
    folder = tmp_path_factory.mktemp("book") / "site"
    command = [sys.executable, "ci/book_files/build.py", "--output", folder]
    subprocess.run(command, cwd=ROOT, check=True)
    return folder


@pytest.fixture(scope="module")
def pages(book):
    """{path: what the page holds} of all pages."""
    return {path: Page(path.read_text(encoding="utf-8")) for path in book.rglob("*.html")}


def test_every_notebook_method_and_module_has_a_page(book):
    from dbmtl.registry import method_names

    notebooks = {path.relative_to(ROOT / "nbs") for path in (ROOT / "nbs").rglob("*.ipynb")}
    notebooks = {path for path in notebooks if ".ipynb_checkpoints" not in path.parts}
    assert [path for path in notebooks if not (book / path.with_suffix(".html")).exists()] == []
    methods = list((book / "methods").glob("*.html"))
    assert len(methods) == len(method_names()) + 1  # and their list
    modules = [path for path in (ROOT / "dbmtl").rglob("*.py") if path.stem[0] != "_"]
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules]
    assert [name for name in names if not (book / "api" / f"{name}.html").exists()] == []


def test_public_names_are_linked_to_their_descriptions(book, pages):
    import dbmtl

    links = set(pages[book / "api" / "index.html"].links)
    for name in dbmtl.__all__:
        module = getattr(dbmtl, name).__module__
        assert f"{module}.html#{module}.{name}" in links, name


def test_every_internal_link_leads_somewhere(book, pages):
    lost = []
    for path, page in pages.items():
        for link in page.links + page.loaded:
            if re.match(r"[a-z]+:", link) or link.startswith("//"):
                continue
            place, _, anchor = link.partition("#")
            place = unquote(place.partition("?")[0])
            target = Path(os.path.normpath(path.parent / place)) if place else path
            is_there = target.is_file() and target.is_relative_to(book)
            is_page = is_there and target.suffix == ".html"
            if not is_there or (
                is_page and anchor and unquote(anchor) not in pages[target].anchors
            ):
                lost.append((path.relative_to(book).as_posix(), link))
    assert lost == []


def test_links_into_the_repository_name_files_that_are_there(pages):
    prefix = re.compile(r"https://github\.com/dbmtl/dbmtl/(?:blob|tree|edit)/main/([^#?]+)")
    found = set()
    for page in pages.values():
        for link in page.links:
            if match := prefix.match(link):
                found.add(unquote(match[1]))
    assert len(found) > 100
    assert sorted(path for path in found if not (ROOT / path).exists()) == []


def test_nothing_is_loaded_from_elsewhere(book, pages):
    foreign = {
        link for page in pages.values() for link in page.loaded if re.match(r"(https?:)?//", link)
    }
    assert foreign == set()
    assert (book / "_static" / "mathjax" / "LICENSE").exists()


def test_directives_and_hidden_cells_are_gone(book):
    for path in book.rglob("*.html"):
        assert "#| " not in re.sub("<[^>]+>", "", path.read_text(encoding="utf-8")), path
    page = (book / "03_gradient_balancing" / "09_cagrad.html").read_text(encoding="utf-8")
    text = re.sub("<[^>]+>", "", page)
    assert "class CAGrad(GramianAggregator)" in text
    assert "import matplotlib.pyplot" not in text  # of its hidden cell


def test_solutions_are_folded(book):
    notebook = (ROOT / "nbs/01_core/05_ema.ipynb").read_text(encoding="utf-8")
    page = (book / "01_core" / "05_ema.html").read_text(encoding="utf-8")
    folded = re.findall(r"<details.*?</details>", page, flags=re.DOTALL)
    solutions = [part for part in folded if "Show the solution" in part]
    assert len(solutions) == notebook.count("#| code-fold: true") == 3
    assert "steps_above" in re.sub("<[^>]+>", "", solutions[0])


def test_long_imports_are_folded_and_short_ones_are_not(book):
    def imports(page):
        text = (book / f"{page}.html").read_text(encoding="utf-8")
        folded = re.findall(r"<details.*?</details>", text, flags=re.DOTALL)
        return [re.sub("<[^>]+>", "", part) for part in folded if "Show the imports" in part]

    (long,) = imports("01_core/16_balancer")
    assert "from dbmtl.core.aggregator import" in long and "class " not in long
    assert imports("02_loss_balancing/01_log") == []


def test_the_sidebar_unfolds_the_part_that_is_open(book, pages):
    links = set(pages[book / "methods" / "cagrad.html"].links)
    assert {"mtadam.html", "../glossary.html", "../01_core/index.html"} <= links
    assert "../01_core/16_balancer.html" not in links


def test_every_page_can_be_edited(book, pages):
    made = {book / f"{name}.html" for name in ("genindex", "py-modindex", "search")}
    for path in pages.keys() - made:
        text = path.read_text(encoding="utf-8")
        (address,) = re.findall(r'<a href="([^"]+)">Edit this page</a>', text)
        name = path.relative_to(book).with_suffix(".ipynb")
        is_notebook = (ROOT / "nbs" / name).exists()
        file = f"nbs/{name}" if is_notebook else "ci/book_files/pages.py"
        assert address.endswith(f"/edit/main/{file}"), path


def test_every_page_of_the_book_has_a_next_one(book, pages):
    made = {book / f"{name}.html" for name in ("genindex", "py-modindex", "search")}
    ends = [
        path.relative_to(book).as_posix()
        for path in pages.keys() - made
        if 'class="right-next"' not in path.read_text(encoding="utf-8")
    ]
    assert len(ends) == 1, ends  # the last


def test_a_method_s_page_shows_its_equations(book):
    for path in (book / "methods").glob("*.html"):
        if path.stem != "index":
            assert '<div class="math' in path.read_text(encoding="utf-8"), path
    text = (book / "methods" / "imtl.html").read_text(encoding="utf-8")
    assert text.count('<div class="math') == 2  # of IMTL-L and of IMTL-G
    assert r"\ell - s" in text and r"u_t\cdot d" in text


def test_a_method_s_page_links_what_there_is_about_it(pages, book):
    links = pages[book / "methods" / "cagrad.html"].links
    assert "https://arxiv.org/abs/2110.14048" in links
    assert "../03_gradient_balancing/09_cagrad.html" in links
    for file in ("dbmtl/gradient_balancing", "tests/gradient_balancing/test_cagrad"):
        assert any(file in link for link in links), file
    text = (book / "methods" / "cagrad.html").read_text(encoding="utf-8")
    assert "Differences between implementations" in text
    assert "TorchJD does not divide" in text


def test_results_of_the_paper_are_linked_by_their_names(pages, book):
    anchors = pages[book / "paper_results.html"].anchors
    tables = {f"table-{number}" for number in range(1, 7)}
    figures = {f"figure-{number}" for number in range(1, 11)}
    assert anchors >= tables | figures | {"proposition-3-1", "algorithm-1", "equation-2"}
    links = pages[book / "04_dbmtl.html"].links
    assert {"paper_results.html#table-5", "paper_results.html#algorithm-1"} <= set(links)
    of_another = pages[book / "03_gradient_balancing" / "05_pcgrad.html"].links
    assert not any("algorithm-1" in link for link in of_another)


def test_parameters_bear_their_comments(book):
    text = re.sub("<[^>]+>", "", (book / "api" / "dbmtl.core.ema.html").read_text("utf-8"))
    assert "weight of the old value at step 1, in [0, 1)" in text
    assert "P fresh tensors" in text


def test_the_api_links_lines_of_the_source(book, pages):
    prefix = "https://github.com/dbmtl/dbmtl/blob/main/"
    links = [link for link in pages[book / "api" / "dbmtl.core.ema.html"].links if "#L" in link]
    definitions = []
    for link in links:
        file, _, line = link.removeprefix(prefix).partition("#L")
        definitions.append((ROOT / file).read_text("utf-8").splitlines()[int(line) - 1].strip())
    assert "def smooth(" in definitions and "class EMA:" in definitions
    assert all(line.startswith(("def ", "class ", "@")) for line in definitions)


def test_constants_have_their_values(book):
    text = re.sub("<[^>]+>", "", (book / "api" / "dbmtl.data.qm9.html").read_text("utf-8"))
    assert "130831: of the full set" in re.sub(r"\s+", " ", text)


# ---------------------------------------------------------------------------------- browser


MEASURE = """(async () => {
    if (window.MathJax && MathJax.startup) await MathJax.startup.promise;
    const results = () => document.querySelectorAll("#search-results li").length;
    for (let i = 0; i < 50 && location.search && results() < 6; i++)
        await new Promise(resolve => setTimeout(resolve, 100));
    return JSON.stringify({
        wide: document.documentElement.scrollWidth - window.innerWidth,
        formulas: document.querySelectorAll("span.math, div.math").length,
        results: results(),
        rendered: document.querySelectorAll("mjx-container svg").length,
        bad: document.querySelectorAll("[data-mjx-error], mjx-merror").length,
        broken: [...document.images].filter(i => i.complete && !i.naturalWidth).length,
    });
})()"""


FOLDS = """(() => {
    const folds = [...document.querySelectorAll("details")].filter(
        fold => fold.querySelector("summary").textContent.includes("Show the solution"));
    // what is folded keeps its size, so that a box tells nothing
    const isSeen = fold => fold.querySelector("pre").checkVisibility();
    return JSON.stringify({
        open: folds.map(fold => fold.open),
        seen: folds.map(isSeen),
        prompts: folds.map(fold => fold.querySelector("summary").innerText.trim()),
        wide: document.documentElement.scrollWidth - window.innerWidth,
    });
})()"""
SUMMARY = """(() => {
    const summary = [...document.querySelectorAll("details > summary")].filter(
        each => each.textContent.includes("Show the solution"))[NUMBER];
    summary.scrollIntoView({block: "center", behavior: "instant"});
    const box = summary.getBoundingClientRect();
    return JSON.stringify({x: box.x + box.width / 2, y: box.y + box.height / 2});
})()"""


class Browser:
    """A headless Chromium that is spoken to by its protocol for debugging."""

    def __init__(self, connection):
        self.connection = connection
        self.number = 0
        self.events = []

    async def call(self, method, **parameters):
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        await self.connection.write_message(json.dumps(message))
        while True:
            answer = json.loads(await self.connection.read_message())
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]
            self.events.append(answer)

    async def loaded(self):
        while not any(event["method"] == "Page.loadEventFired" for event in self.events):
            self.events.append(json.loads(await self.connection.read_message()))

    async def open(self, address, width):
        """What MEASURE says about a page, and the errors of its console."""
        self.events = []
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=900,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        await self.call("Page.navigate", url=address)
        await self.loaded()
        return await self.evaluate(MEASURE), list(self.errors())

    async def evaluate(self, expression):
        """What an expression tells as JSON."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        return json.loads(answer["result"]["value"])

    async def unfold(self, address, width):
        """What FOLDS says before each solution of a page got a click, and after."""
        await self.open(address, width)
        before = await self.evaluate(FOLDS)
        for number in range(len(before["open"])):
            place = await self.evaluate(SUMMARY.replace("NUMBER", str(number)))
            click = {"button": "left", "clickCount": 1, **place}
            await self.call("Input.dispatchMouseEvent", type="mousePressed", **click)
            await self.call("Input.dispatchMouseEvent", type="mouseReleased", **click)
        return before, await self.evaluate(FOLDS)

    def errors(self):
        for event in self.events:
            parameters = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                yield parameters["exceptionDetails"]
            is_logged = event["method"] == "Log.entryAdded"
            if is_logged and parameters["entry"]["level"] == "error":
                yield parameters["entry"]
            is_called = event["method"] == "Runtime.consoleAPICalled"
            if is_called and parameters["type"] in ("error", "assert"):
                yield parameters["args"]

    async def picture(self, file):
        answer = await self.call("Page.captureScreenshot", format="png")
        Path(file).write_bytes(base64.b64decode(answer["data"]))


def address(book, page):
    """Where a browser finds a page in the file system."""
    path, _, query = page.partition("?")
    if not query:
        return (book / f"{path}.html").as_uri()
    return f"{(book / path).as_uri()}?{query}"


async def visit(port, book, pictures):
    """{(page, width): (measures, errors)}, and {(page, width): (folds before, folds after)}."""
    from tornado.httpclient import AsyncHTTPClient
    from tornado.websocket import websocket_connect

    targets = await AsyncHTTPClient().fetch(f"http://127.0.0.1:{port}/json")
    tab = next(each for each in json.loads(targets.body) if each["type"] == "page")
    connection = await websocket_connect(tab["webSocketDebuggerUrl"], max_message_size=2**28)
    browser = Browser(connection)
    for domain in ("Page", "Runtime", "Log"):
        await browser.call(f"{domain}.enable")

    async def visited(pages, visit, ending=""):
        found = {}
        for page in pages:
            for width in WIDTHS:
                found[page, width] = await visit(address(book, page), width)
                name = re.sub(r"\W+", "-", page) + ending
                await browser.picture(pictures / f"{name}-{width}.png")
        return found

    seen = await visited(OPENED, browser.open)
    unfolded = await visited(EXERCISES, browser.unfold, "-unfolded")
    connection.close()
    return seen, unfolded


def wait_for_port(process, profile):
    """The port that Chromium chose; it writes it into its profile."""
    file = Path(profile, "DevToolsActivePort")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if file.exists() and file.read_text().count("\n"):
            return int(file.read_text().splitlines()[0])
        time.sleep(0.1)
    pytest.skip("the browser does not start here")


@pytest.fixture(scope="module")
def visits(book, tmp_path_factory):
    """What Chromium saw of the pages in OPENED; DBMTL_PICTURES names a folder for pictures."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip("no Chromium here")
    pictures = Path(os.environ.get("DBMTL_PICTURES") or tmp_path_factory.mktemp("pictures"))
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu"]
        command += ["--remote-debugging-port=0", f"--user-data-dir={profile}"]
        command += ["--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "about:blank"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        process = subprocess.Popen(command, **quiet)
        try:
            port = wait_for_port(process, profile)
            return asyncio.run(asyncio.wait_for(visit(port, book, pictures), 300))
        finally:
            process.terminate()
            process.wait(30)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", OPENED)
def test_page_opens_in_a_browser(visits, page, width):
    measures, errors = visits[0][page, width]
    assert errors == []
    assert measures["wide"] <= 0
    assert measures["bad"] == 0
    assert measures["broken"] == 0
    assert measures["rendered"] >= measures["formulas"]


def test_formulas_are_rendered(visits):
    measures, _ = visits[0]["03_gradient_balancing/09_cagrad", 1440]
    assert measures["rendered"] > 10


def test_search_finds_pages_from_the_file_system(visits):
    measures, _ = visits[0]["search.html?q=gramian", 1440]
    assert measures["results"] > 5


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("page", EXERCISES)
def test_a_click_opens_a_solution(visits, page, width):
    before, after = visits[1][page, width]
    number = len(before["open"])
    assert number >= 2
    assert before["open"] == before["seen"] == [False] * number
    assert before["prompts"] == ["Show the solution"] * number
    assert after["open"] == after["seen"] == [True] * number
    assert after["prompts"] == ["Hide the solution"] * number
    assert before["wide"] <= 0 and after["wide"] <= 0
