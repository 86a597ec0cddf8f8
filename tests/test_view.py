"""The page of `trl-rlad view`: what is in it, and what must not be. Of its script see test_browser.py."""

import json
import os
import re
from base64 import b64decode
from html.parser import HTMLParser
from itertools import pairwise
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_rlad.commands.view import main
from trl_rlad.reports.curves import BOTTOM, COLORS, HEIGHT, TOP, draw_curves
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
    """Checks that all is closed; keeps the elements' names and attributes, the text, and what the script is given."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.open, self.text, self.scripts = set(), set(), [], "", []
        self.feed(page)
        assert not self.open
        self.groups = []
        if len(self.scripts) == 2:
            data = json.loads(self.scripts[0])
            self.groups = data["groups"]
            for row in (row for group in self.groups for row in group["rows"]):
                kind = np.uint32 if row["wide"] else np.uint16
                row["tokens"] = [data["texts"][i] for i in np.frombuffer(b64decode(row["tokens"]), kind)]
                row["student"], row["scored"] = (
                    [
                        None if x == data["unscored"] else x / data["grid"]
                        for x in np.frombuffer(b64decode(row[name]), np.int16)
                    ]
                    for name in ("student", "scored")
                )
                row["clipped"] = list(b64decode(row.get("clipped", "")))
                row["named"] = {
                    int(number): [(data["texts"][names[i]], names[i + 1]) for i in range(0, len(names), 2)]
                    for number, names in row.get("named", {}).items()
                }

    def handle_starttag(self, name, attributes):
        self.names.add(name)
        self.attributes |= dict(attributes).keys()
        if name not in ("meta", "input"):
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.names.add(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self.open[-1:] != ["style"]:
            self.text += data

    @property
    def texts(self):
        """Of each completion, in the order of the page."""
        return ["".join(row["tokens"]) for group in self.groups for row in group["rows"]]


def read_curves(page):
    """Lines and bands of each panel, by its title: pairs of a color and points `(step, value)`, read off the axes."""
    panels = {}
    for figure in re.findall("<figure>.*?</figure>", page, re.DOTALL):
        root = ElementTree.fromstring(figure)
        svg = root.find("svg")
        # What is written at the ends of the axes, and where
        texts = [(float(text.get("x")), float(text.get("y")), text) for text in svg.iterfind("text")]
        steps = {int(text.text.split("step ")[1]): x for x, _, text in texts if text.get("text-anchor") == "middle"}
        values = {float(text.text): y - 3 for _, y, text in texts if text.get("text-anchor") == "end"}
        scales = []
        for ticks in (steps, values):
            (a, at), *others = ticks.items()
            b, to = others[0] if others else (a + 1, at + 1)
            scales.append(lambda place, a=a, at=at, b=b, to=to: a + (b - a) * (place - at) / (to - at))

        def points(part, scales=scales):
            pairs = [pair.split(",") for pair in part.get("points").split()]
            return [(round(scales[0](float(x))), round(scales[1](float(y)), 2)) for x, y in pairs]

        lines = [(part.get("stroke"), points(part)) for part in svg.iterfind("polyline")]
        bands = [(part.get("fill"), set(points(part))) for part in svg.iterfind("polygon")]
        panels[root.find("figcaption").text] = lines, bands
    return panels


def test_tokens_say_what_the_teacher_made_of_them():
    records = [
        record("surer", gap=2.5, clipped=1) | {"named": [["x", "surer"]], "named_logps": [[-0.03, -3.5]]},
        record("liked", gap=-0.2, clipped=2) | {"named": [["liked"]], "named_logps": [[-0.05]]},
        record("unread") | {"teacher_logps": [None]},
        record("hopeless", gap=500.0),
        record("between") | {"logps": [-1.0009]},
    ]
    rows = {row["tokens"][0]: row for row in Page(render([("run", records, [])])).groups[0]["rows"]}
    assert [rows["surer"][name] for name in ("student", "scored", "clipped")] == [[-1.0], [-3.5], [1]]
    assert rows["surer"]["named"] == {0: [("x", 97), ("surer", 3)]}  # e^-0.03 and e^-3.5
    # It would say the same
    assert rows["liked"]["scored"] == [-0.8] and rows["liked"]["clipped"] == [2] and rows["liked"]["named"] == {}
    assert rows["unread"]["scored"] == [None] and rows["unread"]["mean"] is None
    assert rows["hopeless"]["scored"] == [-65.0] and rows["hopeless"]["mean"] == 500.0
    assert rows["between"]["student"] == [-1.0]  # the nearest that is written, of 1/500 nat


def test_whatever_a_run_says_is_only_text():
    evil = '</script><script>alert("1")</script><img src=x onerror=alert(1)>" onmouseover="x<!--<script>'
    records = [record(evil, gap=1.5) | {"kind": evil, "teacher": evil, "named": [[evil]], "named_logps": [[-0.1]]}]
    page = render([(evil, records, [{"step": 1, "reward": 0.5, f"eval_rewards/{evil}/pass@1": 0.1}])])
    parsed = Page(page)
    assert not parsed.names & {"img", "link", "iframe", "object"} and parsed.texts == [evil]
    assert page.count("<script") == 2 and parsed.groups[0]["prompt"] == f"prompt of {evil}"
    # No address from which anything would be fetched, and no script but ours
    assert not re.search(r"https?:|url\(|@import", page.replace(parsed.scripts[0], ""))
    assert not parsed.attributes & {"src", "href", "onmouseover", "onerror"}
    assert re.search("default-src 'none';.*script-src 'sha256-[^']{44}'\"", page)


def test_the_groups_in_whose_loss_the_teacher_has_the_largest_part_come_first_and_fill_the_page():
    parts = {"a": 0.4, "b": 0.0, "c": 0.3, "d": 10.0}
    records = [record(text, 7.0, group=i) | {"part": [part]} for i, (text, part) in enumerate(parts.items())]
    records.append(record("e", group=0) | {"part": [99.0], "split": "eval"})  # after those of training
    page = Page(render([("run", records, [])]))
    assert page.texts == ["d", "a", "c", "b", "e"] and [group["part"] for group in page.groups] == [
        10,
        0.4,
        0.3,
        0,
        99,
    ]
    page = Page(render([("run", records, [])], max_tokens=2))
    assert page.texts == ["d", "a"] and "Of 5 groups, 2 are here." in page.text
    # Of a probe nothing has been trained: then it is by the disagreement, bounded by 1. And one is always there
    records = [record(str(gap), gap, group=i) for i, gap in enumerate((0.3, -7.0, 0.5))]
    assert [group["part"] for group in Page(render([("run", records, [])])).groups] == [1.0, 0.5, 0.3]
    assert Page(render([("run", records, [])], max_tokens=0)).texts == ["-7.0"]


def test_more_texts_than_a_short_number_can_tell():
    wide = record() | {"tokens": [str(i) for i in range(70_000)], "logps": [-1.0] * 70_000, "clipped": None}
    wide |= {"teacher_logps": [-2.0] * 70_000, "advantage": 2.0}
    page = Page(render([("run", [wide, record("short")], [])]))
    assert page.texts == ["".join(wide["tokens"]), "short"]


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
        "tokens clipped, share": [[(1, 0.75), (2, 0.25)]],
        "pass@1 in evaluation": [[(2, 0.5)]],
    }


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_the_last_values_stand_apart_above_the_steps_and_below_the_edge(end):
    metrics = {"teacher/log_ratio": end, "teacher/log_ratio_rewarded": end, "teacher/log_ratio_punished": 0.5}
    log = [{"step": 1, "teacher/log_ratio": 1.0 - end}, {"step": 2} | metrics]
    page = render([("run", [], log)])
    *_, panel = re.findall("<svg viewBox.*?</svg>", page[page.index("student against teacher") :], re.DOTALL)[:1]
    texts = re.findall(r'<text fill="[^"]*" x="[^"]*" y="([^"]*)">([^<]*)<', panel)
    heights = [float(y) for y, _ in texts]
    assert [value for _, value in texts] == (["0.5", "0", "0"] if end == 0.0 else ["1", "1", "0.5"])
    assert all(b - a >= 10 for a, b in pairwise(heights)) and heights[0] >= TOP and heights[-1] <= HEIGHT - BOTTOM + 3


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
    # Each value on its point, and the last beside the line
    assert "<title>GRPO, step 3: 0.35</title>" in page and page.count("<circle") == 6 and ">0.35</text>" in page


def test_a_row_says_what_the_loss_made_of_it():
    first = record(advantage=0.5) | {
        "reward": 0.25,
        "tokens": ["a", " b", " c", " d"],
        "logps": [-1.0, -1.0, -1.0, -1.0],
        "teacher_logps": [-5.0, None, -0.5, -5.0],  # gaps 4, -0.5 and 4
        "clipped": [1, 2, 1, 0],
        "part": [1.0, 0.0, 0.5, 0.5],
        "solved": True,
    }
    second = record("unread", advantage=-0.25) | {
        "reward": None,
        "teacher_logps": [None],
        "solved": None,
        "teacher": "m",
    }
    equal = record("equal", gap=-1e-9, advantage=0.0) | {"reward": -2.0}
    ((group,),) = [Page(render([("run", [second, equal, second, first], [])])).groups]
    # By the advantage, and the same completion once
    names = ("reward", "advantage", "solved", "teacher", "times", "mean", "part", "length", "clipped")
    assert [[row[name] for name in names] for row in group["rows"]] == [
        [0.25, 0.5, True, "", 1, 2.5, 0.5, 4, [1, 2, 1, 0]],
        [-2.0, 0.0, False, "", 1, 0.0, 0.0, 1, []],
        [None, -0.25, None, "m", 2, None, 0.0, 1, []],
    ]
    assert group["rewards"] == [None, -2.0, None, 0.25]


def test_a_group_has_its_own_run_step_number_and_prompt():
    runs = [
        (
            "a",
            [record("x", 0.5, step=7, group=2), record("y", 0.4, 0.5, step=7, group=3) | {"rewards": [1.0, 0.0]}],
            [],
        ),
        ("c", [record("z", -0.25, step=7, group=3) | {"kind": "failed"}, record("u", 0.1, step=8, group=3)], []),
    ]
    groups = Page(render(runs)).groups
    names = ("run", "step", "group", "prompt", "part", "kind", "rewards")
    assert [tuple(group[name] for name in names) for group in groups] == [
        ("a", 7, 2, "prompt of x", 0.5, "", [1.0]),
        ("a", 7, 3, "prompt of y", 0.4, "", [1.0, 0.0]),
        ("c", 7, 3, "prompt of z", 0.25, "failed", [1.0]),
        ("c", 8, 3, "prompt of u", 0.1, "", [1.0]),
    ]


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
    assert points == [(step, pytest.approx(step / 10, abs=0.011)) for step in range(1, steps + 1)]


def test_records_without_clipping():
    without = {name: value for name, value in record("x").items() if name != "clipped"}
    page = Page(render([("run", [without, record("y") | {"clipped": None}], [])]))
    assert [row["clipped"] for row in page.groups[0]["rows"]] == [[], []]


def test_the_picture_has_what_the_logs_have():
    def draw(**logs):
        return read_curves(draw_curves({name: [log] for name, log in logs.items()}))

    assert draw_curves({"GRPO": [[]]}) == "" and draw_curves({"GRPO": [[{"step": 1, "lr": 1.0}]]}) == ""
    assert draw(GRPO=[{"step": 1, "reward": 0.5}]) == {"reward": ([(COLORS[0], [(1, 0.5)])], [])}  # a dot
    log = [{"step": step, "step_time": 2.0, "generation_time": 1.0, "teacher/log_ratio": 0.1} for step in (1, 2)]
    log += [{"step": 2, "reward": 0.5, "eval_rewards/right/pass@1": 0.5, "clip_ratio/low_by_policy": 0.1}]
    log += [{"step": 2, "teacher/kl": 1.0, "teacher/top1": 0.9, "teacher/entropy": 0.2}]
    titles = list(draw(GRPO=[{"step": 1, "reward": 0.5}], RLAD=log))
    assert titles == [
        "reward",
        "student against teacher: log(student / teacher), nats",
        "divergence from the teacher, nats",
        "tokens that are the teacher's first choice, share",
        "how undecided the teacher is: entropy, nats",
        "tokens clipped, share",
        "pass@1 in evaluation",
        "seconds",
    ]
    # Only lines that there are
    html = draw_curves({"RLAD": [log]})
    assert "generation" in html and "by the policy" in html and "right" in html
    assert not re.search("scoring|by the teacher|rewarded", html)
    html = draw_curves({name: [[{"step": 1, "reward": 0.5}]] for name in "abcdefg"})
    assert all(color in html for color in COLORS)


def test_the_parts_of_the_page():
    assert "There is nothing to see" in Page(render([("run", [], [])])).text
    log = [{"step": 1, "reward": 0.5}]
    curves, rollouts = render([("one", [], log), ("two", [], log)]), render([("run", [record()], [])])
    assert "<h2>Curves</h2>" in curves and "<h2>Rollouts</h2>" not in curves and "its band" not in curves
    assert "<h2>Rollouts</h2>" in rollouts and "<h2>Curves</h2>" not in rollouts
    assert "<title>What the teacher did: one, two</title>" in curves
    keys = re.findall('<span class="key" style="background:(.*?)"></span>(\\w+)', curves)
    assert keys == [(COLORS[0], "one"), (COLORS[1], "two")]
    assert "its band" in render([("one", [], log), ("one", [], log)])
    assert "orange: the student likes this token more than the teacher" in " ".join(Page(rollouts).text.split())
    # No frame is spoken of that isn't there
    says = "In a frame", "is known where it names"
    told = record() | {"named": [["B"]], "named_logps": [[-0.1]]}
    named = render([("run", [told], [])])
    assert [[text in page for text in says] for page in (rollouts, named)] == [[False, True], [True, False]]


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
    "endless": [record() | {"part": [float("inf")]}],
    "no number": [record() | {"rewards": [float("nan")]}],
    "other names": [record() | {"named": ["x"], "named_logps": [[0.0]]}],
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_or_torn_file_of_rollouts_is_named_and_the_others_shown(kind, tmp_path):
    files = [tmp_path / "run" / "_rollouts" / f"rollouts_0000{step}.parquet" for step in (1, 2)]
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
    assert Page((tmp_path / "view.html").read_text()).texts == ["seen"]


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
    assert page.count("<script>") == 1 and "$x_{$" in page


def test_command(tmp_path, capsys):
    run = tmp_path / "run"
    (run / "_rollouts").mkdir(parents=True)
    for step in range(3):
        records = [record(f"é{step}", step=step), record(f"ü{step}", gap=0.5, step=step, group=1)]
        pq.write_table(pa.Table.from_pylist(records), run / f"_rollouts/rollouts_0000{step}.parquet")
    (run / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "reward": 0.5}]}))
    output = tmp_path / "pages" / "view.html"

    def view(*arguments):
        main([*map(str, arguments), "--output", str(output)])
        assert f"Wrote {output}, " in capsys.readouterr().out
        return Page(output.read_text(encoding="utf-8"))

    for step in range(3):  # 0 is that of a probe
        page = view(f"RLAD={run}", "--step", step)
        assert page.texts == [f"ü{step}", f"é{step}"] and "RLAD" in page.text and "svg" in page.names
    # Without a name it is that of the folder or the file; and no more than a group for so few tokens
    page = view(run)
    assert {group["run"] for group in page.groups} == {"run"} and len(page.texts) == 6
    page = view(run / "_rollouts" / "rollouts_00001.parquet", "--tokens", 1)
    assert page.groups[0]["run"] == "rollouts_00001" and page.texts == ["ü1"]
    with pytest.raises(SystemExit, match="no run at"):
        main([str(tmp_path / "nowhere")])
    with pytest.raises(SystemExit, match="There are no rollouts of step 7: there are those of 0, 1, 2."):
        main([str(run), "--step", "7"])


def test_the_command_takes_the_newest_run_writes_into_its_folder_and_says_what_there_is(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="There is no run here"):
        main([])
    for age, name in enumerate(("outputs/new", "old", "outputs/deep/older")):
        write_log(tmp_path / name / "checkpoint-2", 2)
        os.utime(tmp_path / name / "checkpoint-2" / "trainer_state.json", (1e9 - age, 1e9 - age))
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    main(["--open"])
    said = capsys.readouterr().out
    assert (
        "new: no rollouts (they are written with a teacher, unless `log_rollouts` is false); curves of steps 1 to 2"
        in said
    )
    assert "Wrote outputs/new/view.html, " in said
    assert opened == [(tmp_path / "outputs/new/view.html").as_uri()]
    # Rollouts are younger, and there is no log yet
    (tmp_path / "old" / "_rollouts").mkdir()
    pq.write_table(
        pa.Table.from_pylist([record(), record("b", group=1)]), tmp_path / "old/_rollouts/rollouts_00001.parquet"
    )
    (tmp_path / "old" / "checkpoint-2" / "trainer_state.json").unlink()
    main([])
    said = capsys.readouterr().out
    assert "old: 2 completions in 2 groups, 2 tokens, step 1; no curves (there is no trainer_state.json yet)" in said
    # Several: into the folder of all
    main(["outputs/new", "A=outputs/deep/older"])
    assert "Wrote outputs/view.html" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match="nothing to see"):
        main(["empty"])
    assert not (tmp_path / "empty" / "view.html").exists()


def test_a_name_ends_at_the_first_equals_sign(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_log(tmp_path / "lr=1", 2)
    main(["NAME=lr=1"])
    assert capsys.readouterr().out.startswith("NAME: ")
    main(["lr=1"])  # a folder of this name
    assert capsys.readouterr().out.startswith("lr=1: ")
