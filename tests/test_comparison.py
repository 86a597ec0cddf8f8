"""What the study of `benchmarks/comparison.py` makes of given runs. The runs themselves take hours."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import comparison
import probe_study
import tables
import token_credit
import variants

from trl_rlad import RLADConfig
from trl_rlad.scripts.tasks.chains import OPERATORS, solve


METHODS = ("GRPO", "KDRL", "RLAD + named", "GRPO + named")
PLAN = {
    "student": "mistaken",
    "measured": "",
    "shared_rate": comparison.SHARED_RATE,
    "steps": 4,
    "eval_steps": 2,
    "rollouts": 8,
    "sweep": {"steps": 2, "rollouts": 4},
    "rates": (1e-4, 3e-4),
    "seeds": (1, 2),
    "methods": METHODS,
    "flawed": METHODS[:3],
}
BONUS = {("RLAD + named", "strong"): 0.2, ("RLAD + named", "flawed"): -0.1}  # in final accuracy


@pytest.fixture
def asked(monkeypatch):
    """Make up the runs: what counts is which are asked for, and what becomes of them."""
    asked, asked_at = [], set()

    def run_missing(jobs, output_dir):
        results = comparison.read_results(output_dir / "runs.jsonl")
        done = {comparison.identify(result) for result in results}
        for job in jobs:
            if comparison.identify(job) not in done:
                asked.append((job["method"], job["teacher"], job["rate"], job["seed"]))
                asked_at.add((job["seed"] == 0, job["steps"], job["rollouts"]))
                level = 0.5 + (job["rate"] == 3e-4) * 0.1 + job["seed"] / 100
                level += BONUS.get((job["method"], job["teacher"]), 0.0)
                curve = [[0, 0.1, 0.1, 0.1], [2, *[level / 2] * 3], [4, *[level] * 3]]
                by_operator = {"&": 0.25, "|": level}
                results.append({**job, "seconds": 1.0, "curve": curve, "by_operator": by_operator})
        (output_dir / "runs.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
        return results

    monkeypatch.setattr(comparison, "run_missing", run_missing)
    yield asked
    # The runs that choose the rates are shorter, the others are not
    assert asked_at == {(True, 2, 4), (False, 4, 8)}


def test_the_study_sweeps_chooses_and_goes_on_where_it_was(asked, tmp_path):
    results = comparison.study([PLAN], tmp_path)
    rates = comparison.split(results, PLAN)[2]
    # The sweep, with the strong teacher, at two rates each; what belongs to another method takes that one's rate
    assert sorted(asked[:6]) == sorted((method, "strong", rate, 0) for method in METHODS[:3] for rate in (1e-4, 3e-4))
    assert rates == dict.fromkeys(METHODS, 3e-4)
    # With the flawed teacher all that are to be, but for what has no teacher
    assert sorted(asked[6:]) == sorted(
        [(method, "strong", 3e-4, seed) for method in METHODS for seed in (1, 2)]
        + [(method, "flawed", 3e-4, seed) for method in METHODS[1:3] for seed in (1, 2)]
    )
    asked.clear()
    assert comparison.study([PLAN], tmp_path) == results and not asked


def test_the_report(asked, tmp_path):
    results = comparison.study([PLAN], tmp_path)
    tables.report(*comparison.split(results, PLAN), PLAN, tmp_path / "comparison.md", "command")
    text = (tmp_path / "comparison.md").read_text()
    # Seeds 1 and 2: 61% and 62%, with a standard deviation of 0.0071, so that 12.71 * 0.0071 / 2**0.5 = 6.4%
    assert text.count("| GRPO | 0.0003 | 61.5% | 61.5% | 61.5% | 61.5% ± 6.4% |  | 25% / 62% | 4 |") == 2
    # Seed by seed it is 20 points above, and its curve is there (81.5% / 2 < 61.5%) only at the end
    assert "| RLAD + named | 0.0003 | 81.5% | 81.5% | 81.5% | 81.5% ± 6.4% | +20.0 ± 0.0 | 25% / 82% | 4 |" in text
    assert "| RLAD + named | 0.0003 | 51.5% | 51.5% | 51.5% | 51.5% ± 6.4% | -10.0 ± 0.0 | 25% / 52% | - |" in text
    assert text.count("| before |  | 10.0% | 10.0% | 10.0% | 10.0% |  |  |  |") == 2
    assert text.count("| GRPO | 50.0% | 60.0% |") == 1
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


def test_first_step_that_reaches_a_target():
    runs = [{"curve": [[0, 0.0], [2, 0.4], [4, 0.6]]}, {"curve": [[0, 0.2], [2, 0.6], [4, 0.8]]}]
    assert [tables.steps_to(runs, target) for target in (0.1, 0.5, 0.51, 0.9)] == [0, 2, 4, None]


def test_every_method_is_well_formed(tmp_path):
    for phases in comparison.METHODS.values():
        for phase in phases:
            if phase is not comparison.OFFLINE and "beta" not in phase:
                settings = {name: value for name, value in phase.items() if name not in ("guide", "trusted")}
                RLADConfig(str(tmp_path), use_cpu=True, bf16=False, lr_scheduler_type="constant", **settings)
                assert hasattr(variants, phase.get("guide", "TeacherGuide"))
    for plan in map(comparison.make_plan, comparison.BEDS):
        assert set(plan["flawed"]) <= set(plan["methods"]) <= set(comparison.METHODS)
        assert plan["steps"] % plan["eval_steps"] == 0  # or the end isn't measured
        assert set(plan["rates"]) <= set(comparison.RATES)
    for quick in (comparison.QUICK, comparison.REGIME_QUICK):
        assert set(quick["flawed"]) <= set(quick["methods"]) <= set(comparison.METHODS)
    assert {*comparison.SHARED_RATE, *comparison.SHARED_RATE.values()} <= set(comparison.METHODS)


def test_the_probe_quotes_the_study():
    assert json.loads(probe_study.QUOTED.read_text()) == probe_study.quote()


GUIDES = {phase["guide"] for phases in comparison.METHODS.values() for phase in phases if phase and "guide" in phase}


@pytest.mark.parametrize("name", sorted(GUIDES))
def test_every_variant_trains(make_trainer, name):
    trainer = make_trainer(max_steps=2)
    trainer.guide = getattr(variants, name)(trainer, trainer.teacher_scorer)
    trainer.train()
    assert trainer.state.global_step == 2


def test_each_token_of_a_chain_is_judged_by_the_one_before_it():
    prompt = "a f t b b c q o 3"
    words = [*map(str, solve(prompt)), "<eos>"]
    assert token_credit.is_right(prompt, words) == [True] * 9
    # One mistake, from which the next step goes on as it should; a digit in letters; and no end
    wrong = next(digit for digit in "0123456789" if digit not in words[1])
    after = str(OPERATORS["t"][int(wrong)])
    judged = token_credit.is_right(prompt, [words[0], wrong, after, *words[3:8], "5"])
    assert judged == [True, False, True, False, True, True, True, True, False]
    assert token_credit.is_right(prompt, ["eight"]) == [words[0] == "8"]
    assert token_credit.is_right(prompt, [words[0], "<eos>"]) == [True, False]


@pytest.mark.parametrize("alpha", [0.0, 0.5])
def test_acceptance_shares_out_praise_and_blame(make_trainer, alpha):
    trainer = make_trainer(alpha=alpha)
    mask = torch.ones(2, 3, dtype=torch.bool)
    old = torch.full((2, 3), -1.0)
    batch = {
        "advantages": torch.tensor([2.0, -1.0]),
        "completion_mask": mask.long(),
        # Liked better, half as likely as the student has it, and not scored
        "teacher_per_token_logps": torch.tensor([[-0.5, -1.0 - math.log(2), -9.0]]).expand(2, 3),
        "teacher_mask": torch.tensor([[True, True, False]]).expand(2, 3),
    }
    guide = variants.AcceptanceGuide(trainer, trainer.teacher_scorer)
    guidance = guide.guide(old, old, batch)
    shares = torch.tensor([[1.0, 0.5, 1.0], [0.0, 0.5, 1.0]])
    given = batch["advantages"].unsqueeze(1)
    torch.testing.assert_close(guidance.advantages, given * (alpha + (1 - alpha) * shares))
    assert guidance.anchor is None and guidance.penalty is None
    # A teacher that isn't believed changes nothing
    trusting = guide.guide(old, old, {**batch, "teacher_weight": torch.tensor([1.0, 0.0])})
    torch.testing.assert_close(trusting.advantages, torch.stack([guidance.advantages[0], given[1].expand(3)]))
