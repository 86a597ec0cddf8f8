"""The page of `trl-rlad view`: what is in it, and what must not be."""

import json
import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_rlad.commands.view import main
from trl_rlad.reports.view import render


def record(text="ok", gap=0.0, advantage=1.0, clipped=0, step=1, group=0):
    return {
        "step": step,
        "group": group,
        "prompt": f"prompt of {text}",
        "reward": 1.0,
        "advantage": advantage,
        "tokens": [text],
        "ids": [7],
        "logps": [-1.0],
        "teacher_logps": [-1.0 - gap],
        "clipped": [clipped],
    }


class Page(HTMLParser):
    """
    Checks that all elements are closed; keeps their names, and the classes and hover texts of tokens by their text.
    """

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.open, self.tokens, self.text = set(), set(), [], {}, ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.names.add(name)
        self.attributes |= dict(attributes).keys()
        if name == "br":
            self.text += "\n"
        elif name != "meta":
            self.open.append((name, dict(attributes)))

    def handle_startendtag(self, name, attributes):
        self.names.add(name)

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name
        if name in ("p", "summary", "div"):
            self.text += "\n"

    def handle_data(self, data):
        self.text += data
        if self.open and "data-x" in self.open[-1][1]:
            attributes = self.open[-1][1]
            self.tokens[data] = attributes["class"].split(), attributes["data-x"]


def read_points(path):
    return [(float(x), float(y)) for x, y in re.findall(r"[ML] (\S+) (\S+)", path.get("d"))]


def read_curves(page):
    """Lines and bands of each panel, by its title: pairs of a color and points `(step, value)`, read off the ticks."""
    svg = page[page.index("<svg") : page.index("</svg>")].replace("xlink:", "") + "</svg>"
    panels = {}
    for panel in ElementTree.fromstring(svg).iterfind("g/g"):
        if not panel.get("id").startswith("axes"):
            continue
        scales = []
        for axis, letter in enumerate("xy"):
            ticks = [tick for tick in panel.iterfind("g/g") if tick.get("id", "").startswith(f"{letter}tick_")]
            places = [read_points(tick.find("g/path"))[0][axis] for tick in (ticks[0], ticks[-1])]
            values = [float(tick.find("g/text").text.replace("−", "-")) for tick in (ticks[0], ticks[-1])]
            unit = (values[1] - values[0]) / (places[1] - places[0])
            scales.append(
                lambda place, at=places[0], value=values[0], unit=unit: round(value + unit * (place - at), 3)
            )
        lines, bands = [], []
        for part in panel.iterfind("g"):
            path = part.find("path")
            if part.get("id").startswith("line2d") and path is not None:  # of the legend's own lines there is none
                color = re.search("stroke: (#......)", path.get("style"))[1]
                lines.append((color, [(scales[0](x), scales[1](y)) for x, y in read_points(path)]))
            elif part.get("id").startswith("FillBetween"):
                use = part.find("g/use")  # which moves the path down by `y`
                points = [
                    (scales[0](x), scales[1](y + float(use.get("y")))) for x, y in read_points(part.find("defs/path"))
                ]
                bands.append((re.search("fill: (#......)", use.get("style"))[1], set(points)))
        titles = [text.text for text in panel.iterfind("g/text")]
        panels[titles[0]] = lines, bands
    return panels


def test_tokens_say_what_the_teacher_made_of_them():
    records = [
        record("surer", gap=2.5, clipped=1),
        record("liked", gap=-0.2, clipped=2),
        record("agreed", gap=0.05),
        record("unread") | {"teacher_logps": [None]},
    ]
    tokens = Page(render([("run", records, [])])).tokens
    classes = {text: classes for text, (classes, _) in tokens.items()}
    assert classes == {"surer": ["s3", "teacher"], "liked": ["t0", "policy"], "agreed": [], "unread": ["mute"]}
    # e^-1 and e^-3.5
    assert tokens["surer"][1] == "surer   student 36.8%   teacher 3.0%   log ratio +2.50   clipped by the teacher"


def test_whatever_a_run_says_is_only_text():
    evil = '<script>alert("1")</script><img src=x onerror=alert(1)>" onmouseover="x'
    page = render([(evil, [record(evil, gap=1.5)], [{"step": 1, "reward": 0.5, f"eval_rewards/{evil}/pass@1": 0.1}])])
    parsed = Page(page)
    assert not parsed.names & {"script", "img", "link", "iframe", "object"} and list(parsed.tokens) == [evil]
    # No address from which anything would be fetched: only the clip paths of the picture itself
    assert not re.search(r"https?:|url\((?!#)|@import", page) and not parsed.attributes & {
        "src",
        "onmouseover",
        "onerror",
    }


def test_the_most_changed_groups_come_first_and_fill_the_page():
    # |advantage| * min(|gap|, 1): 0.4 (bounded), 0, 0.3 and 0.5
    rows = [("a", 7.0, 0.4), ("b", 9.0, 0.0), ("c", 0.1, -3.0), ("d", 0.5, 1.0)]
    records = [record(text, gap, advantage, group=i) for i, (text, gap, advantage) in enumerate(rows)]
    assert list(Page(render([("run", records, [])])).tokens) == ["d", "a", "c", "b"]
    page = Page(render([("run", records, [])], max_tokens=2))
    assert list(page.tokens) == ["d", "a"] and "2 of 4 groups" in page.text


def test_curves_add_up():
    log = [
        {"step": 1, "clip_ratio/high_by_teacher": 0.25, "clip_ratio/low_by_teacher": 0.5},
        {"step": 2, "clip_ratio/high_by_teacher": 0.25, "clip_ratio/low_by_teacher": None},
        {"step": 2, "eval_rewards/r/pass@1": 0.4},
        {"step": 2, "eval_rewards/r/pass@1": 0.6},
        {"step": 3, "reward": None},
    ]
    panels = read_curves(render([("run", [], log)]))
    assert {title: [points for _, points in lines] for title, (lines, _) in panels.items()} == {
        "share of tokens clipped": [[(1, 0.75), (2, 0.25)]],
        "pass@1 in evaluation": [[(2, 0.5)]],
    }


def test_seeds_share_a_line_of_their_mean_and_a_band_from_the_lowest_to_the_highest():
    # Mean and median differ, the lowest isn't always the same seed's, and one seed has gone on alone
    seeds = [[0.0, 0.1, 0.2], [0.1, 0.4, 0.15], [0.8, 1.0, 0.7, 0.9]]
    logs = [[{"step": step, "reward": value} for step, value in enumerate(seed, start=1)] for seed in seeds]
    page = render([("GRPO", [], log) for log in logs] + [("RLAD", [], logs[0])])
    lines, bands = read_curves(page)["reward"]
    colors = {name: color for color, name in re.findall(r'class="key" style="background:(.*?)"></span>(\w+)', page)}
    assert lines == [
        (colors["GRPO"], [(1, 0.3), (2, 0.5), (3, 0.35)]),
        (colors["RLAD"], [(1, 0.0), (2, 0.1), (3, 0.2)]),
    ]
    # One run alone has no band
    assert bands == [(colors["GRPO"], {(1, 0.0), (2, 0.1), (3, 0.15), (1, 0.8), (2, 1.0), (3, 0.7)})]
    assert page.count('class="key"') == 2 and len(set(colors.values())) == 2
    assert "its band" in page and "its band" not in render([("GRPO", [], logs[0]), ("RLAD", [], logs[0])])
    assert "currentColor" in page  # in the colours of the page


def test_a_row_says_what_the_loss_made_of_it():
    first = record(advantage=0.5, clipped=1) | {
        "prompt": "one prompt",
        "reward": 0.25,
        "tokens": ["a", " b", " c", " d"],
        "logps": [-1.0, -1.0, -1.0, -1.0],
        "teacher_logps": [-5.0, None, -0.5, -5.0],  # gaps 4, -0.5 and 4
        "clipped": [1, 2, 1, 0],
    }
    second = record("unread", advantage=-0.25) | {"reward": 0.75, "teacher_logps": [None]}
    equal = record("equal", gap=-1e-9, advantage=0.0) | {"reward": -2.0}
    text = Page(render([("run", [second, equal, second, first], [])])).text
    lines = [line for line in text.splitlines() if line]
    # By the advantage, and the same completion once
    assert lines[lines.index("one prompt") + 1 :] == [
        "A = +0.50 · reward 0.25",
        "mean +2.50",
        "50% clipped by the teacher",
        "25% clipped by the policy",
        "a b c d",
        "A = +0.00 · reward -2",
        "mean +0.00",
        "equal",
        "A = -0.25 · reward 0.75",
        "2 times the same",
        "not read by the teacher",
        "unread",
    ]


def test_a_group_has_its_own_run_step_number_and_prompt():
    runs = [
        ("a<b", [record("x", 0.5, step=7, group=2), record("y", 0.5, 0.5, step=7, group=3)], []),
        ("c", [record("z", -0.25, step=7, group=3), record("u", 0.1, step=8, group=3)], []),
    ]
    page = render(runs)
    lines = Page(page).text.splitlines()
    heads = [(line, lines[i + 1]) for i, line in enumerate(lines) if "changed by" in line]
    assert heads == [
        ("a<b · step 7 · group 2 · changed by 0.50", "prompt of x"),
        ("a<b · step 7 · group 3 · changed by 0.25", "prompt of y"),
        ("c · step 7 · group 3 · changed by 0.25", "prompt of z"),
        ("c · step 8 · group 3 · changed by 0.10", "prompt of u"),
    ]
    assert page.count("<details open>") == 3 and page.count("<details>") == 1


def write_log(folder, steps):
    folder.mkdir(parents=True)
    log = [{"step": step, "reward": step / 10} for step in range(1, steps + 1)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))


@pytest.mark.parametrize(("has_finished", "steps"), [(True, 12), (False, 10)])
def test_a_run_with_checkpoints_is_drawn_whole(has_finished, steps, tmp_path):
    run = tmp_path / "run"
    for step in (9, 10):  # the last by its number and not by its name
        write_log(run / f"checkpoint-{step}", step)
    if has_finished:
        write_log(run / "whole", 12)
        (run / "whole" / "trainer_state.json").rename(run / "trainer_state.json")
    main([str(run), "--output", str(tmp_path / "view.html")])
    ((_, points),) = read_curves((tmp_path / "view.html").read_text())["reward"][0]
    assert points == [(step, step / 10) for step in range(1, steps + 1)]


def test_command(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    for step in (1, 2):
        pq.write_table(
            pa.Table.from_pylist([record(f"at{step}", step=step)]), run / f"rollouts/rollouts_0000{step}.parquet"
        )
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "reward": 0.5}]}))
    output = tmp_path / "pages" / "view.html"
    main([f"RLAD={run}", "--output", str(output), "--step", "2"])
    page = Page(output.read_text())
    assert list(page.tokens) == ["at2"] and "RLAD" in page.text and "svg" in page.names
    with pytest.raises(SystemExit, match="no run at"):
        main([str(tmp_path / "nowhere")])
