"""The site: what a reader's browser has to fetch from elsewhere, which is nothing, and what it makes of a formula."""

import json
import re
import shutil
import subprocess
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


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium here to look at the page")
def test_formulas_are_drawn_without_a_network(site):
    page = site / "trrd" / "index.html"
    looked_at = page.with_name("measured.html")
    looked_at.write_text(page.read_text().replace("</body>", MEASURE + "</body>"))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=20000", "--dump-dom"]
    dom = subprocess.run([*command, looked_at.as_uri()], capture_output=True, text=True, timeout=120).stdout
    measured = json.loads(re.search(r"<title>(.*?)</title>", dom)[1].replace("&quot;", '"'))
    assert measured["font"] == ["loaded"]
    assert len(measured["heights"]) > 25 and min(measured["heights"]) > 5
    assert len(measured["lowered"]) > 25 and min(measured["lowered"]) > 1  # an index is below its letter
