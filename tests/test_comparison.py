"""What the study of `benchmarks/comparison.py` makes of given runs. The runs themselves take hours."""

import json
import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import comparison
import mistakes
import variants

from trl_rlad import RLADConfig


PLAN = {
    "student": "hasty",
    "steps": 4,
    "eval_steps": 2,
    "rates": (1e-4, 3e-4),
    "seeds": (1, 2),
    "ablation_seeds": (1, 2),
    "candidates": ("gate", "credit"),
}
BONUS = {  # in final accuracy
    ("KDRL 0.2", "strong"): 0.02,
    ("KDRL 0.002", "flawed"): 0.02,
    ("credit, alpha 0.1", "strong"): 0.2,
}
METHODS = ("GRPO", "KDRL 0.002", "KDRL 0.2", "RLAD")


@pytest.fixture
def asked(monkeypatch):
    """Make up the runs: what counts is which are asked for, and what becomes of them."""
    asked = []

    def run_missing(jobs, plan, output_dir):
        results = comparison.read_results(output_dir)
        done = {comparison.identify(result) for result in results}
        for job in [{**job, "student": "hasty", "steps": 4} for job in jobs]:
            if comparison.identify(job) not in done:
                asked.append((job["method"], job["teacher"], job["rate"], job["seed"]))
                level = 0.5 + (job["rate"] == 3e-4) * 0.1 + job["seed"] / 100
                level += BONUS.get((job["method"], job["teacher"]), 0.0)
                curve = [[0, 0.1, 0.1, 0.1], [2, *[level / 2] * 3], [4, *[level] * 3]]
                results.append({**job, "seconds": 1.0, "curve": curve})
        (output_dir / "runs.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
        return results

    monkeypatch.setattr(comparison, "run_missing", run_missing)
    return asked


def test_the_study_sweeps_chooses_and_goes_on_where_it_was(asked, tmp_path):
    results, tables, rates = comparison.study(PLAN, METHODS, tmp_path)
    # The sweep: GRPO once, all others with both teachers, at two rates each
    assert sum(seed == 0 for *_, seed in asked) == 2 * (1 + 2 * (3 + 2))
    # The better constant KDRL for each teacher
    assert tables == {
        "strong": ["GRPO", "KDRL 0.2", "RLAD", "gate", "credit"],
        "flawed": ["GRPO", "KDRL 0.002", "RLAD", "gate", "credit"],
    }
    assert set(rates.values()) == {3e-4}
    assert sum(seed > 0 for *_, seed in asked) == 2 * (1 + 2 * 4 + 4 + 7)
    assert all(rate == 3e-4 for *_, rate, seed in asked if seed > 0)
    asked.clear()
    assert comparison.study(PLAN, METHODS, tmp_path)[0] == results and not asked


def test_the_report(asked, tmp_path):
    results, tables, rates = comparison.study(PLAN, METHODS, tmp_path)
    comparison.report(results, rates, PLAN, tables, tmp_path / "comparison.md", "command")
    text = (tmp_path / "comparison.md").read_text()
    # Seeds 1 and 2: 61% and 62%, with a standard deviation of 0.0071, so that 12.71 * 0.0071 / 2**0.5 = 6.4%
    assert text.count("| RLAD | 0.0003 | 61.5% | 61.5% | 61.5% | 61.5% ± 6.4% | 4 |") == 3
    assert text.count("| before | | 10.0% | 10.0% | 10.0% | 10.0% | |") == 3
    assert text.count("| credit, alpha 0.1 | 0.0003 | 81.5% | 81.5% |") == 1
    assert text.count("| GRPO | none | 50.0% | 60.0% |") == 1
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_first_step_that_reaches_a_target():
    runs = [{"curve": [[0, 0.0], [2, 0.4], [4, 0.6]]}, {"curve": [[0, 0.2], [2, 0.6], [4, 0.8]]}]
    assert [comparison.steps_to(runs, target) for target in (0.1, 0.5, 0.51, 0.9)] == [0, 2, 4, None]


def test_every_method_is_well_formed(tmp_path):
    for trainer, settings in comparison.ALL.values():
        if trainer is not None:
            RLADConfig(str(tmp_path), use_cpu=True, bf16=False, **settings)
            assert hasattr(variants, trainer)
    for plan in comparison.STUDENTS.values():
        assert set(plan["candidates"]) <= set(comparison.CANDIDATES)
        assert plan["steps"] % plan["eval_steps"] == 0  # or the end isn't measured
    assert set(comparison.OPTIONS) <= set(comparison.CANDIDATES)
    assert set(comparison.QUICK_METHODS) <= set(comparison.METHODS)


@pytest.mark.parametrize(
    ("completion", "kind"),
    [
        ("kk A kn ok", "right"),
        ("kk ok", "`ok` too early"),
        ("kk A kn ok nk", "other"),
        ("kk A kn B nk ok", "`ok` missed"),
        ("kk A kn", "`ok` missed"),
        ("kk B kn ok", "wrong name"),
        ("kk A nk ok", "other"),
        ("", "other"),
    ],
)
def test_first_mistake(completion, kind):
    assert mistakes.classify(completion, "kk A kn ok") == kind
