"""The page of `trl-rlad view`: what is in it, and what must not be."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from xml.etree import ElementTree

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_rlad.commands.view import main
from trl_rlad.reports.view import COLORS, _card, _draw, _percent, _token, draw_curves, render


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
    """Checks that all is closed; keeps the elements' names, and classes and hover texts of tokens by their text."""

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


def test_a_group():
    records = [
        record("b", gap=-1.0, advantage=0.5) | {"reward": 0.25},
        record("c", advantage=-0.5) | {"tokens": ["c", "d"], "logps": [-1.0, -1.5], "teacher_logps": [-1.5, None]}
        | {"clipped": [1, 0]},
        record("z", advantage=0.0) | {"teacher_logps": [None]},
        record("b", gap=-1.0, advantage=0.5) | {"reward": 0.25},
        record("a", gap=0.5, advantage=0.5),
    ]  # fmt: skip
    records = [record | {"row": row} for row, record in enumerate(records)]
    card = _card(True, 0.125, "a<b", (3, 2), records)
    head = "<details open><summary>a&lt;b · step 3 · group 2 · changed by 0.12</summary>"
    assert card.startswith(f'{head}<div class="prompt">prompt of a</div><div class="row">')
    assert _card(False, 0.0, "", (1, 1), records).startswith("<details><summary>") and card.endswith("</details>")
    rows = re.findall('<div class="row"><div class="soft">(.*?)</div><div class="tokens">(.*?)</div></div>', card)
    assert card.count('</div></div><div class="row">') == 3
    # The rewarded first, in the order of their tokens; the same one once
    assert [facts.split("<br>") for facts, _ in rows] == [
        ['<span class="up">A = +0.50</span> · reward 1', "mean +0.50"],
        ['<span class="up">A = +0.50</span> · reward 0.25', "2 times the same", "mean -1.00"],
        ['<span class="">A = +0.00</span> · reward 1', "not read by the teacher"],
        ['<span class="down">A = -0.50</span> · reward 1', "mean +0.50", "50% clipped by the teacher"],
    ]
    assert [re.sub("<.*?>", "", tokens) for _, tokens in rows] == ["a", "b", "z", "cd"]


def test_records_without_clipping():
    without = {name: value for name, value in record("x").items() if name != "clipped"}
    assert "clipped by" not in _card(True, 0.0, "run", (1, 1), [without, record("y") | {"clipped": None}])


def test_a_token():
    # In steps of .1, .3, 1, 2 and 4: what is at one is not beyond it
    for gap, name in ((0.5, "s1"), (1.0, "s1"), (-1.0, "t1"), (1.5, "s2"), (-4.0, "t3"), (-4.5, "t4"), (0.0, "")):
        assert re.search('class="(.*?)"', _token("x", -1.0, -1.0 - gap, 0))[1] == name
    facts = "a   student 36.8%   not scored by the teacher   clipped by the policy"
    assert _token("a\n", -1.0, None, 2) == f'<span class="mute policy" data-x="{facts}">a⏎\n</span>'
    assert unescape(_token(" ", -1.0, -1.25, 0)) == (
        '<span class="s0" data-x="\' \'   student 36.8%   teacher 28.7%   log ratio +0.25"> </span>'
    )
    assert [_percent(logp) for logp in (0.0, -0.5, -8.0)] == ["100.0%", "60.7%", "3e-04"]


class Axis:
    """What is drawn on it."""

    def __init__(self):
        self.calls = []

    def plot(self, *args, **kwargs):
        self.calls.append((*args, kwargs["color"]))

    def fill_between(self, *args, **kwargs):
        self.calls.append((*args, kwargs["color"]))


def test_the_mean_of_runs_and_their_band():
    axis = Axis()
    _draw(axis, [], "-", "red")
    assert axis.calls == []
    _draw(axis, [{2: 0.7, 1: 0.5}], "--", "red")
    _draw(axis, [{1: 0.5}], "-", "red")  # a line would not be seen
    assert axis.calls == [([1, 2], [0.5, 0.7], "--", "red"), ([1], [0.5], "-.", "red")]
    axis = Axis()
    _draw(axis, [{1: 0.0, 2: 4.0, 3: 9.0}, {2: 2.0, 1: 1.0}], ":", "blue")  # the steps that both have
    assert axis.calls == [([1, 2], [0.5, 3.0], ":", "blue"), ([1, 2], [0.0, 2.0], [1.0, 4.0], "blue")]


def test_the_picture_has_what_the_logs_have():
    def texts(**logs):
        return re.findall("<text.*?>(.*?)</text>", draw_curves({name: [log] for name, log in logs.items()}))

    assert draw_curves({"GRPO": [[]]}) == "" and draw_curves({"GRPO": [[{"step": 1, "lr": 1.0}]]}) == ""
    alone = texts(GRPO=[{"step": 1, "reward": 0.5}])
    assert "reward" in alone and "seconds" not in alone and alone.count("step") == 1
    log = [{"step": step, "step_time": 2.0, "generation_time": 1.0, "teacher/log_ratio": 0.1} for step in (1, 2)]
    log += [{"step": 2, "reward": 0.5, "eval_rewards/right/pass@1": 0.5, "clip_ratio/low_by_policy": 0.1}]
    picture = texts(GRPO=[{"step": 1, "reward": 0.5}], RLAD=log)
    titles = {"reward", "log(student / teacher), nats", "share of tokens clipped", "pass@1 in evaluation", "seconds"}
    assert titles <= set(picture) and picture.count("step") == 5 + 1  # of each panel, and a line
    # Only lines that there are
    assert {"generation", "right", "by the policy"} <= set(picture)
    assert not {"scoring", "by the teacher", "rewarded"} & set(picture)
    svg = draw_curves({name: [[{"step": 1, "reward": 0.5}]] for name in "abcdefg"})
    assert all(color in svg for color in COLORS) and "metadata" not in svg and "xmlns" not in svg
    assert svg.startswith("<svg") and svg.count("<svg") == 1 and "currentColor" in svg and "XX" not in svg
    assert svg == draw_curves({name: [[{"step": 1, "reward": 0.5}]] for name in "abcdefg"})


def test_the_parts_of_the_page():
    body = re.search("<body>(.*)</body>", render([("run", [], [])]))[1]
    assert body.startswith("<h1>What the teacher did</h1><p>There is nothing to see")
    log = [{"step": 1, "reward": 0.5}]
    curves, rollouts = render([("one", [], log), ("two", [], log)]), render([("run", [record()], [])])
    assert "<h2>Curves</h2>" in curves and "<h2>Rollouts</h2>" not in curves and "its band" not in curves
    assert "<h2>Rollouts</h2>" in rollouts and "<h2>Curves</h2>" not in rollouts
    keys = re.findall('<span class="key" style="background:(.*?)"></span>(\\w+)', curves)
    assert keys == [(COLORS[0], "one"), (COLORS[1], "two")]
    assert "its band" in render([("one", [], log), ("one", [], log)])
    page = Page(render([("run", [record(str(i), gap=0.01 * i, group=i) for i in range(5)], [])]))
    assert "5 of 5 groups" in page.text and page.text.count("run · step") == 5
    page = render([("run", [record(str(i), group=i) for i in range(5)], [])])
    assert page.count("<details open>") == 3 and page.count("</details><details") == 4
    # A group that is longer than the page is shown all the same
    both = [record("long", group=0), record("longer", group=1)]
    assert list(Page(render([("run", both, [])], max_tokens=0)).tokens) == ["long"]
    unread = Page(render([("run", [record("x") | {"teacher_logps": [None]}], [])]))
    assert "changed by 0.00" in unread.text and "nothing to see" not in unread.text
    legend = " > 4.0  > 2.0  > 1.0  > 0.3  > 0.1  0  < -0.1  < -0.3  < -1.0  < -2.0  < -4.0 "
    assert f"log(student / teacher): {legend}" in unread.text


FOREIGN = {
    "text": b"no table",
    "torn": None,
    "empty": b"",
    "another table": [{"step": 1}],
    "script": [record() | {"step": "<script>alert(1)</script>"}],
    "short": [record() | {"logps": []}],
    "blank": [record() | {"advantage": None}],
    "silent": [record() | {"logps": [None]}],
    "no tokens": [record() | {"tokens": None}, record()],
    "no log-probability": [record() | {"teacher_logps": [900.0]}],
    "other cause": [record(clipped=3)],
    "no list": [record() | {"tokens": "ok"}],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_or_torn_file_of_rollouts_is_named_and_the_others_shown(kind, tmp_path):
    files = [tmp_path / "run" / "rollouts" / f"rollouts_0000{step}.parquet" for step in (1, 2)]
    files[0].parent.mkdir(parents=True)
    for file in files:
        pq.write_table(pa.Table.from_pylist([record("seen", step=2)]), file)
    content = FOREIGN[kind]
    if isinstance(content, list):
        pq.write_table(pa.Table.from_pylist(content), files[0])
    else:
        files[0].write_bytes(files[0].read_bytes()[:-9] if content is None else content)
    with pytest.warns(UserWarning, match="rollouts_00001.parquet isn't a whole file of rollouts"):
        main([str(tmp_path / "run"), "--output", str(tmp_path / "view.html")])
    assert list(Page((tmp_path / "view.html").read_text()).tokens) == ["seen"]


@pytest.mark.parametrize(
    "text", ['{"log_history": [{"st', "[]", "{}", '{"log_history": 3}', '{"log_history": [{"reward": 1}]}', "\udcff"]
)
def test_a_foreign_or_torn_log_is_named_and_the_others_drawn(text, tmp_path):
    for name in ("a", "b"):
        write_log(tmp_path / name, 2)
    (tmp_path / "a" / "trainer_state.json").write_text(text, errors="surrogateescape")
    with pytest.warns(UserWarning, match="a/trainer_state.json isn't a whole log"):
        main([*map(str, (tmp_path / "a", tmp_path / "b")), "--output", str(tmp_path / "view.html")])
    assert [points for _, points in read_curves((tmp_path / "view.html").read_text())["reward"][0]] == [
        [(1, 0.1), (2, 0.2)]
    ]


def test_what_is_no_number_in_a_log_is_not_drawn(tmp_path):
    write_log(tmp_path / "run", 2)
    log = [{"step": 1, "reward": "<script>", "eval_rewards/$x_{$/pass@1": 0.5}, {"step": 2, "reward": 0.2}]
    (tmp_path / "run" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    main([str(tmp_path / "run"), "--output", str(tmp_path / "view.html")])
    page = (tmp_path / "view.html").read_text()
    assert "script" not in page and "$x_{$" in page


def test_step_and_group_are_only_text():
    page = render([("run", [record() | {"step": "<script>1</script>", "group": "<b>"}], [])])
    assert not Page(page).names & {"script", "b"}


def test_command(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "rollouts").mkdir(parents=True)
    for step in range(3):
        records = [record(f"é{step}", step=step), record(f"ü{step}", gap=0.5, step=step, group=1)]
        pq.write_table(pa.Table.from_pylist(records), run / f"rollouts/rollouts_0000{step}.parquet")
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "reward": 0.5}]}))
    output = tmp_path / "pages" / "view.html"

    def view(*arguments):
        main([*map(str, arguments), "--output", str(output)])
        assert capsys.readouterr().out == f"Wrote {output}\n"
        return Page(output.read_text(encoding="utf-8"))

    for step in range(3):  # 0 is that of a probe
        page = view(f"RLAD={run}", "--step", step)
        assert list(page.tokens) == [f"ü{step}", f"é{step}"] and "RLAD" in page.text and "svg" in page.names
    # Without a name it is that of the folder or the file; and no more than a group for so few tokens
    assert "run · step" in view(run).text and len(view(run).tokens) == 6
    page = view(run / "rollouts" / "rollouts_00001.parquet", "--tokens", 1)
    assert "rollouts_00001 · step" in page.text and list(page.tokens) == ["ü1"]
    with pytest.raises(SystemExit, match="no run at"):
        main([str(tmp_path / "nowhere")])
