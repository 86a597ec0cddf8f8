"""
For MkDocs: pages link to the repository's files as they lie, so that the links work where the repository is read. What
a page links to outside of `docs/` comes along into the site; a link to nothing stays as it is, and the strict build
refuses it. Formulas become MathML, which browsers draw themselves, and the font comes along: nothing is fetched.
"""

import json
import re
from base64 import b64decode
from dataclasses import fields
from html import unescape
from importlib.resources import files as find_resource
from pathlib import Path
from textwrap import fill

from latex2mathml.converter import convert
from mkdocs.structure.files import File


ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "notebook.ipynb"
FORMULA = re.compile(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", re.DOTALL)  # as pymdownx.arithmatex and docstrings write them
# In a search: lists, which have every word, come last, and a metric finds its own page before those that speak of it
BOOSTS = dict.fromkeys(("api.md", "architecture.md", "bad_input.md", "reliability.md"), 0.2) | {"metrics.md": 2}
LINK = re.compile(r"(?<=\]\()\.\./([^)#\s]+)")


def list_settings(config_class: type, parent: type) -> str:
    """
    The settings that a configuration adds to another one, by the groups and in the words of its docstring, for
    `docs/settings.md`, which a test holds to it.
    """
    docstring, lines = config_class.__doc__ or "", []
    own = {each.name for each in fields(config_class)} - {each.name for each in fields(parent)}
    parts = re.findall(r"(?ms)^        > (.*?)$|^        (\w+) \((.*?)\):\n(.*?)(?=^ {0,8}\S|\Z)", docstring)
    for title, name, kind, text in parts:
        if title:
            lines.append(f"## {title}")
        elif name in own:
            kind, default = re.fullmatch(r"(.*?), \*optional\*(?:, defaults to (.*))?", kind).groups()
            text = re.sub(r"\[(`)~?(?:[\w.]+\.)?(\w+`)\]", r"\1\2", " ".join(text.split()))
            text = f"{kind}, default {default or '`None`'}. {text}"
            lines += [f"### `{name}`", fill(text, 119, break_long_words=False, break_on_hyphens=False)]
    return "\n\n".join(lines) + "\n"


def place(name: str) -> str:
    """Where a file of the repository is in the site: as plain text, unless it is a picture."""
    return f"repository/{name}" + ("" if name.endswith(".png") else ".txt")


def show_notebook(config) -> list[File]:
    """The notebook with its stored outputs as a page, and its pictures."""
    parts, files = [], []
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "image/png" in data:
                name = f"notebook_{len(files)}.png"
                files.append(File.generated(config, name, content=b64decode(data["image/png"])))
                parts.append(f"![]({name})")
            elif "text/html" in data:
                parts.append("".join(data["text/html"]))
            else:
                parts.append(f"```text\n{''.join(data['text/plain']).rstrip()}\n```")
    return [File.generated(config, "notebook.md", content="\n\n".join(parts)), *files]


def draw_formula(formula: re.Match) -> str:
    inline, block = formula.groups()
    drawn = convert(unescape(inline or block), display="inline" if inline else "block")
    return drawn.replace("<mi>log</mi>", '<mi>log</mi><mspace width="0.167em" />')


def on_files(files, config):
    font = find_resource("ziamath.fonts").joinpath("STIXTwoMath-Regular.ttf")
    files.append(File.generated(config, "stylesheets/math.ttf", abs_src_path=str(font)))
    for file in show_notebook(config):
        files.append(file)
    for page in Path(config.docs_dir).glob("*.md"):
        for name in LINK.findall(page.read_text()):
            if (ROOT / name).is_file() and ROOT / name != NOTEBOOK and files.get_file_from_path(place(name)) is None:
                files.append(File.generated(config, place(name), abs_src_path=str(ROOT / name)))


def on_page_markdown(markdown, page, config, files):
    if page.file.src_uri in BOOSTS:
        page.meta["search"] = {"boost": BOOSTS[page.file.src_uri]}
    return LINK.sub(lambda link: place(link[1]), markdown.replace("../examples/notebook.ipynb", "notebook.md"))


def on_page_content(html, page, config, files):
    """Docstrings name types in TRL's way, [`~package.Class`], which would need the sites of all these packages."""
    html = re.sub(
        r"<code>[^<]*`[^<]*</code>", lambda cell: re.sub(r"\[?`~?|`\]?|\*|\b(\w+\.)+(?=[A-Z])", "", cell[0]), html
    )
    html = FORMULA.sub(draw_formula, html)
    return re.sub(r"\[<code>~?(?:\w+\.)*(\w+)</code>\]", r"<code>\1</code>", html)
