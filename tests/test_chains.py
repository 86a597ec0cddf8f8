"""Chains of operators, and the beds of the comparison that are made of them."""

import sys
from pathlib import Path

import pytest


sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import beds
import comparison

from trl_rlad.scripts.mini import make_chains
from trl_rlad.scripts.tasks import chains


def test_a_solution_is_the_digit_after_each_operator():
    operators = {"a": [1, 2, 3, 4, 5, 6, 7, 8, 9, 0], "b": [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]}  # one more; nine minus
    assert chains.solve("a a b b a b b a 3", operators) == [4, 5, 4, 5, 6, 3, 6, 7]


def test_operators_are_permutations_and_the_flawed_teachers_are_others():
    assert len(chains.OPERATORS) == 20
    assert all(sorted(values) == list(range(10)) for values in chains.OPERATORS.values())
    flawed = chains.make_operators(make_chains.FLAW, seed=1)
    assert len(flawed) == 3
    assert all(flawed[name] != chains.OPERATORS[name] for name in flawed)


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("1 2 3 4 5 6 7 8", 1.0),
        ("1 two three 4 5 6 7 eight", 1.0),  # in either form
        ("0 0 0 0 0 0 0 8", 1.0),  # what leads to it isn't asked
        ("1 2 3 4 5 6 7 9", 0.0),
        ("1 2 3 4 5 6 7 a", 0.0),
        ("2 3 4 5 6 7 8", 0.0),  # too short
        ("1 2 3 4 5 6 7 8 8", 0.0),  # without an end
        ("", 0.0),
    ],
)
def test_the_reward_takes_the_last_digit_of_a_solution_that_ends(completion, reward):
    assert chains.correctness_reward([completion], ["1 2 3 4 5 6 7 8"]) == [reward]


def test_a_pool_is_the_same_for_every_method_and_another_for_every_seed():
    def prompts(bed, size, seed):
        return list(comparison.BEDS[bed].train_puzzles(size, seed)["prompt"])

    assert prompts("half_gpt_64", 4800, 1) == prompts("half_gpt_64", 300, 1)
    assert len(set(prompts("half_qwen3_64", 4800, 1))) == 64
    assert not set(prompts("half_gpt_64", 4800, 1)) & set(prompts("half_gpt_64", 4800, 2))
    assert len(set(prompts("half_gpt", 4800, 1))) == 4800


@pytest.fixture(scope="module")
def untaught(tmp_path_factory):
    """A bed whose models have learnt nothing."""
    folder, tokenizer = tmp_path_factory.mktemp("untaught"), chains.make_tokenizer()
    for name in ("student", "teacher"):
        make_chains.make("gpt", (16, 1), tokenizer).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    class Untaught(beds.Bed):
        def path(self, name, output_dir):
            return folder / name

    sampling = {"temperature": 1.0, "batch_size": 60}
    return Untaught("student", {"strong": "teacher"}, chains, chains.make_dataset, sampling, (60, 60))


@pytest.mark.parametrize("method", ["RLAD + named", "TRL's distillation, forward"])
def test_a_run_has_as_many_updates_and_rollouts_by_every_trainer(untaught, method, monkeypatch, tmp_path):
    monkeypatch.setitem(comparison.BEDS, "half_gpt", untaught)
    monkeypatch.setattr(beds.Bed, "measure_pass", lambda self, model: 0.5)
    trainers = []
    make_trainer = comparison.make_trainer
    monkeypatch.setattr(comparison, "make_trainer", lambda *args: trainers.append(make_trainer(*args)) or trainers[-1])
    plan = comparison.make_plan("half_gpt") | {"steps": 4, "eval_steps": 2, "rollouts": 32}
    job = comparison.make_jobs(plan, [(method, 1e-4)], "strong", [1])[0]
    result = comparison.run(job | {"output_dir": str(tmp_path)})
    assert [point[0] for point in result["curve"]] == [0, 2, 4]
    assert comparison.identify(result) == comparison.identify(job)
    (trainer,) = trainers
    # Four batches of 32 rollouts, each cut into two updates
    assert trainer.state.global_step == 8
    prompts = 4 * 32 // comparison.GROUP
    assert len(trainer.train_dataset) == (prompts if "RLAD" in method else prompts * comparison.GROUP)
    assert result["logs"]["entropy"]
