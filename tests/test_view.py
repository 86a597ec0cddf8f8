"""The page of `trl-rlad view`: what is in it, and what must not be."""

import json
import re
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from trl_rlad.commands.view import main
from trl_rlad.reports.view import _curve, render


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
    """Checks that all elements are closed; keeps their names, and the classes and hover texts of tokens by their text."""

    def __init__(self, page):
        super().__init__()
        self.names, self.attributes, self.open, self.tokens, self.text = set(), set(), [], {}, ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, name, attributes):
        self.names.add(name)
        self.attributes |= dict(attributes).keys()
        if name not in ("meta", "br"):
            self.open.append((name, dict(attributes)))

    def handle_startendtag(self, name, attributes):
        self.names.add(name)

    def handle_endtag(self, name):
        assert self.open.pop()[0] == name

    def handle_data(self, data):
        self.text += data
        if self.open and "data-x" in self.open[-1][1]:
            attributes = self.open[-1][1]
            self.tokens[data] = attributes["class"].split(), attributes["data-x"]


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


def test_curves_add_up_and_seeds_make_a_band():
    log = [
        {"step": 1, "clip_ratio/high_by_teacher": 0.25, "clip_ratio/low_by_teacher": 0.5},
        {"step": 2, "eval_rewards/r/pass@1": 0.4},
        {"step": 2, "eval_rewards/r/pass@1": 0.6},
        {"step": 3, "reward": None},
    ]
    assert _curve(log, ["clip_ratio/high_by_teacher", "clip_ratio/low_by_teacher"]) == {1: 0.75}
    assert _curve(log, ["eval_rewards/r/pass@1"]) == {2: 0.5} and _curve(log, ["reward"]) == {}
    logs = [[{"step": step, "reward": step / 10 + seed} for step in (1, 2)] for seed in (0, 1)]
    alone, seeds = (render([("GRPO", [], log) for log in each]) for each in (logs[:1], logs))
    assert ("band" in seeds, "band" in alone) == (True, False) and seeds.count("FillBetween") > alone.count(
        "FillBetween"
    )
    assert "currentColor" in seeds and seeds.count("GRPO") == 1  # one name, in the colours of the page


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
