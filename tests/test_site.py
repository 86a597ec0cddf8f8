"""The site: what a reader's browser has to fetch from elsewhere, which is nothing, what it makes of a formula and of a
narrow window, and which page its search finds first."""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path

import pytest


pytest.importorskip("ziamath", reason="the site is built with the extra `docs`")
from mkdocs.commands.build import build  # noqa: E402
from mkdocs.config import load_config  # noqa: E402


pytestmark = pytest.mark.slow  # the whole site is built
ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# Once all is loaded: the font, and the height of each formula and of the index of its first letter with one
MEASURE = """<script>window.addEventListener("load", async () => {
  await document.fonts.ready;
  const bottom = node => node.getBoundingClientRect().bottom;
  document.title = JSON.stringify({
    font: [...document.fonts].filter(font => font.family == "Formulas").map(font => font.status),
    heights: [...document.querySelectorAll("math")].map(math => math.getBoundingClientRect().height),
    lowered: [...document.querySelectorAll("msub")].map(sub => bottom(sub.children[1]) - bottom(sub.children[0])),
  });
})</script>"""
# Each page in a window of each width: what reaches beyond the column, and isn't in a box that scrolls
NARROW = """<script>
const scrolls = (node, end) =>
  node != end && (getComputedStyle(node).overflowX == "auto" || scrolls(node.parentNode, end));
window.addEventListener("load", async () => {
  const cut = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, article = page.querySelector("article");
    const edge = Math.min(frame.width, article.getBoundingClientRect().right + 16);  // to which code may reach
    await page.fonts.ready;
    cut[frame.id] = [...article.querySelectorAll("p, li, code, pre, math, table, h1, h2, h3")]
      .filter(node => !scrolls(node.parentNode, article))
      .filter(node => node.getBoundingClientRect().right > edge + 1)
      .map(node => node.textContent.slice(0, 40));
  }
  document.title = JSON.stringify(cut);
})</script>"""
# Questions of a newcomer, and the page that the search must have first
QUESTIONS = {
    "another tokenizer": "teachers/",
    "what is alpha": "settings/",
    "log_ratio": "metrics/",
    "teacher/log_ratio": "metrics/",
    "wandb": "metrics/",
    "out of memory": "when_it_breaks/",
    "resume": "when_it_breaks/",
    "reward doesn't rise": "reward/",
    "two GPUs": "teachers/",
    "DistillationTrainer": "migrating/",
    "push to hub": "hub/",
    "which method": "methods/",
}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    path = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), site_dir=str(path))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)
    return path


def test_pages_fetch_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        text = page.read_text()
        fetched = re.findall(r'<(?:script|img|iframe|source)\b[^>]*\bsrc="([^"]+)', text)
        fetched += re.findall(r'<link\b[^>]*\brel="(?:stylesheet|preconnect|icon)"[^>]*\bhref="([^"]+)', text)
        fetched += re.findall(r'<link\b[^>]*\bhref="([^"]+)"[^>]*\brel="(?:stylesheet|preconnect|icon)"', text)
        assert fetched and not [url for url in fetched if "//" in url], page
        assert not re.search(r"\\\(|\\\[|\$\$", re.sub("(?s)<(code|pre|script).*?</\\1>", "", text)), page


def look_at(page):
    """What a page writes into its title, once Chromium has loaded it without a network."""
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--dump-dom"]
    dom = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120).stdout
    return json.loads(unescape(re.search(r"<title>(.*?)</title>", dom)[1]))


needs_browser = pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here to look at the page")


@needs_browser
def test_formulas_are_drawn_without_a_network(site):
    page = site / "trrd" / "index.html"
    looked_at = page.with_name("measured.html")
    looked_at.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    measured = look_at(looked_at)
    assert measured["font"] == ["loaded"]
    assert len(measured["heights"]) > 25 and min(measured["heights"]) > 5
    assert len(measured["lowered"]) > 25 and min(measured["lowered"]) > 1  # an index is below its letter


@needs_browser
def test_nothing_is_cut_in_a_wide_and_in_a_narrow_window(site):
    frames = [
        f'<iframe id="{page} {width}" width="{width}" height="800" src="{page}/index.html"></iframe>'
        for page in ("metrics", "settings", "reward", "trrd", "migrating", "glossary", "teachers")
        for width in (1300, 390)
    ]
    (site / "frames.html").write_text("<title></title>" + "".join(frames) + NARROW)
    cut = look_at(site / "frames.html")
    assert len(cut) == 14 and not any(cut.values()), {name: texts for name, texts in cut.items() if texts}
    assert "<table" not in (site / "metrics" / "index.html").read_text()


@pytest.mark.skipif(shutil.which("node") is None, reason="the search is JavaScript, and there is no Node here")
def test_a_newcomers_words_find_their_page_first(site):
    command = ["node", Path(__file__).with_name("site_search.js"), site, *QUESTIONS]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    first = {question: pages[0].partition("#")[0] for question, pages in zip(QUESTIONS, found, strict=True)}
    assert first == QUESTIONS


def test_the_notebook_is_a_page_with_its_outputs(site):
    cells = json.loads((ROOT / "examples" / "notebook.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    page = (site / "notebook" / "index.html").read_text()
    assert re.search(r"Step \d+ of 60", page) and "teacher/kl" in page and not list(site.rglob("*.ipynb*"))
    assert outputs and not [output for output in outputs if output.get("name") == "stderr"]
