"""The teacher's scores against plain forward passes over single, unpadded sequences."""

import itertools
from contextlib import nullcontext

import pytest
import tiny
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from trl_rlad import TeacherScorer
from trl_rlad.scoring import RowScorer, row_scorer
from trl_rlad.teachers import LocalTeacher, TokenContract, TokenScores


def make_teacher(path, tmp_path, temperature=1.0):
    args = tiny.make_config(tmp_path, temperature=temperature)
    return LocalTeacher(path, args, Accelerator(cpu=True))


def make_batch(seed=0, rows=7, prompt=5, completion=9, vocab_size=32):
    """Left-padded prompts and right-padded completions of every length down to one token."""
    generator = torch.Generator().manual_seed(seed)
    prompt_lengths = torch.randint(1, prompt + 1, (rows, 1), generator=generator)
    completion_lengths = torch.randint(1, completion + 1, (rows, 1), generator=generator)
    return {
        "prompt_ids": torch.randint(4, vocab_size, (rows, prompt), generator=generator),
        "prompt_mask": (torch.arange(prompt).flip(0) < prompt_lengths).long(),
        "completion_ids": torch.randint(4, vocab_size, (rows, completion), generator=generator),
        "completion_mask": (torch.arange(completion) < completion_lengths).long(),
    }


def naive_scores(path, batch, temperature):
    """`log_softmax(logits / temperature)` of each sequence by itself, at its tokens."""
    scores = naive_log_probs(path, batch, temperature)
    return scores.gather(2, batch["completion_ids"].unsqueeze(2)).squeeze(2) * batch["completion_mask"]


def naive_log_probs(path, batch, temperature):
    """The same over the whole vocabulary, `(B, T, V)`."""
    model = AutoModelForCausalLM.from_pretrained(path)
    scores = torch.zeros(*batch["completion_ids"].shape, model.config.vocab_size)
    for i, row in enumerate(scores):
        prompt = batch["prompt_ids"][i][batch["prompt_mask"][i].bool()]
        completion = batch["completion_ids"][i][batch["completion_mask"][i].bool()]
        with torch.no_grad():
            logits = model(torch.cat([prompt, completion]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
        row[: len(completion)] = (logits / temperature).log_softmax(-1)
    return scores


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("tokens_per_batch", [1, 30, 1000])
def test_scores_equal_single_unpadded_forwards(temperature, tokens_per_batch, tmp_path, teacher_path):
    batch = make_batch()
    scorer = tiny.make_scorer(make_teacher(teacher_path, tmp_path, temperature), tokens_per_batch)
    scores = scorer.score(batch, batch["completion_mask"])
    expected = naive_scores(teacher_path, batch, temperature)
    assert scores["teacher_per_token_logps"].dtype == torch.float32
    assert torch.equal(scores["teacher_mask"], batch["completion_mask"].bool())
    assert 0 < scorer.seconds < 60
    torch.testing.assert_close(scores["teacher_per_token_logps"], expected, rtol=0, atol=1e-5)
    # the comparison would notice scores that are off by one token
    assert (scores["teacher_per_token_logps"].roll(1, 1) - expected).abs().max() > 0.1


class CountingTeacher:
    """Stands in for a teacher, to see what it is asked for."""

    vocab_size, max_length = 32, float("inf")
    shares_prompts = is_sharded = False
    mixes_rows = True

    def __init__(self, value=-1.0):
        self.value, self.rows, self.released = value, 0, False

    def score(self, prompts, completions, top_k=0, images=None):
        self.rows += len(prompts)
        return [
            TokenScores(torch.full((len(c),), self.value), c.new_zeros(len(c), 0), torch.zeros(len(c), 0))
            for c in completions
        ]

    def placed(self):
        return nullcontext()

    def release(self):
        self.released = True


def test_no_more_than_a_slice_is_scored_at_once(monkeypatch, tmp_path, teacher_path):
    batch, teacher, sizes = make_batch(rows=20), make_teacher(teacher_path, tmp_path), []
    batch = {name: torch.cat([value, value[:5]]) for name, value in batch.items()}  # equal rows in other slices
    scorer = tiny.make_scorer(teacher, 1000)
    monkeypatch.setattr(row_scorer, "SLICE", 30)
    monkeypatch.setattr(
        RowScorer,
        "_score_here",
        lambda self, rows, top_k, score=RowScorer._score_here: (
            sizes.append(sum(map(len, rows))) or score(self, rows, top_k)
        ),
    )
    scores = scorer.score(batch, batch["completion_mask"])["teacher_per_token_logps"]
    torch.testing.assert_close(scores, naive_scores(teacher_path, batch, 1.0), rtol=0, atol=1e-5)
    assert len(sizes) > 4 and max(sizes) <= 30 + 18  # and a row


def test_only_the_rows_that_can_use_them_keep_their_named_tokens(tmp_path, teacher_path):
    batch, teacher = make_batch(), make_teacher(teacher_path, tmp_path)
    scorer, mask = tiny.make_scorer(teacher, 1000, nameable_ids=range(40)), batch["completion_mask"]
    every = scorer.score(batch, mask, 3)
    keeps = torch.arange(7) % 3 == 0
    some = scorer.score(batch, mask, 3, keeps_names=keeps)
    for name in ("teacher_top_ids", "teacher_top_logps"):
        for one, other, is_kept in zip(every.pop(name), some.pop(name), keeps.tolist(), strict=True):
            assert torch.equal(other, one if is_kept else one[:0])
    assert all(torch.equal(every[name], some[name]) for name in every)


def test_rows_and_tokens_that_are_not_wanted_are_left_out():
    batch = make_batch()
    wanted = batch["completion_mask"].clone()
    wanted[[1, 2, 4]] = 0
    wanted[:, 2] = 0
    teacher = CountingTeacher()
    scores = tiny.make_scorer(teacher, 30).score(batch, wanted)
    assert teacher.rows == 4
    assert torch.equal(scores["teacher_mask"], wanted.bool())
    assert torch.equal(scores["teacher_per_token_logps"], -wanted.float())


def test_equal_rows_are_scored_once():
    batch = {name: value[[0, 1, 0, 0, 1, 2]] for name, value in make_batch().items()}
    batch["prompt_ids"][3] += 1  # the same completion of another prompt
    teacher = CountingTeacher()
    scores = tiny.make_scorer(teacher, 30).score(batch, batch["completion_mask"])
    assert teacher.rows == 4
    assert torch.equal(scores["teacher_per_token_logps"], -batch["completion_mask"].float())


def test_what_comes_behind_the_last_wanted_token_is_not_run(tmp_path, teacher_path):
    batch, teacher = make_batch(), make_teacher(teacher_path, tmp_path)
    wanted = batch["completion_mask"] * (torch.arange(9) < 4)
    score, longest = teacher.score, []

    def record(prompts, completions, *args):
        longest.extend(map(len, completions))
        return score(prompts, completions, *args)

    teacher.score = record
    scores = tiny.make_scorer(teacher, 30).score(batch, wanted)
    assert sorted(longest) == sorted(wanted.sum(1).tolist())
    expected = naive_scores(teacher_path, batch, 1.0) * wanted
    torch.testing.assert_close(scores["teacher_per_token_logps"], expected, rtol=0, atol=1e-5)


def test_tokens_the_teacher_does_not_know_are_left_to_the_policy():
    batch = make_batch()
    batch["completion_ids"][:, 0] = 3
    scores = tiny.make_scorer(CountingTeacher(), 30, unknown_ids=[3]).score(batch, batch["completion_mask"])
    assert not scores["teacher_mask"][:, 0].any()
    assert torch.equal(scores["teacher_mask"][:, 1:], batch["completion_mask"][:, 1:].bool())


def test_a_batch_without_any_wanted_token():
    batch, teacher = make_batch(), CountingTeacher()
    scores = tiny.make_scorer(teacher, 30).score(batch, torch.zeros(7, 9))
    assert teacher.rows == 0 and not scores["teacher_mask"].any()


@pytest.mark.parametrize("value", [float("nan"), -float("inf")])
def test_scores_that_are_not_finite_raise(value):
    batch = make_batch()
    tokens = batch["completion_mask"].sum()
    with pytest.raises(FloatingPointError, match=f"{tokens} .* not finite, of {tokens}.*teacher_model_init_kwargs"):
        tiny.make_scorer(CountingTeacher(value), 30).score(batch, batch["completion_mask"])


def test_scores_of_tokens_that_are_not_wanted_may_be_anything():
    teacher, batch = CountingTeacher(), make_batch()
    wanted = batch["completion_mask"].clone()
    wanted[:, 0] = 0
    score = teacher.score

    def spoil(*args):
        scores = score(*args)
        for value, row in zip(itertools.cycle([float("nan"), -float("inf")]), scores, strict=False):
            row.logps[0] = value
        return scores

    teacher.score = spoil
    scores = tiny.make_scorer(teacher, 30).score(batch, wanted)
    assert torch.equal(scores["teacher_per_token_logps"], -wanted.float())


@pytest.mark.parametrize("budget", [20, 40, 80])
def test_a_micro_batch_has_no_more_tokens_than_it_may_prompts_and_padding_counted(budget):
    teacher, batch, sizes = CountingTeacher(), make_batch(rows=20, prompt=9), []
    score = teacher.score

    def watch(prompts, completions, *args):
        longest = max(len(prompt) + len(ids) for prompt, ids in zip(prompts, completions, strict=True))
        sizes.append(len(prompts) * longest)
        return score(prompts, completions, *args)

    teacher.score = watch
    tiny.make_scorer(teacher, budget).score(batch, batch["completion_mask"])
    assert len(sizes) > 1 and max(sizes) <= budget


@pytest.mark.parametrize(("shares_prompts", "most"), [(True, 5), (False, 1)])
def test_the_budget_of_a_shared_prompt_counts_it_once(shares_prompts, most):
    # 30 tokens of a prompt leave room for 5 completions of 4 in 50; with a copy each, only one has room
    batch = {"prompt_ids": torch.full((12, 30), 5), "completion_ids": torch.randint(4, 32, (12, 4))}
    batch |= {f"{part}_mask": torch.ones_like(batch[f"{part}_ids"]) for part in ("prompt", "completion")}
    teacher, sizes = CountingTeacher(), []
    score, teacher.shares_prompts = teacher.score, shares_prompts
    teacher.score = lambda prompts, *args: sizes.append(len(prompts)) or score(prompts, *args)
    tiny.make_scorer(teacher, 50).score(batch, batch["completion_mask"])
    assert sum(sizes) == 12 and most / 2 < max(sizes) <= most


@pytest.mark.parametrize("begins", [False, True])
def test_what_one_of_two_teachers_does_not_know_the_other_one_scores_and_names(begins, tmp_path, teacher_path):
    batch, wide = make_batch(), tiny.save_model(tmp_path / "wide", seed=2, hidden_size=32)
    lengths = batch["completion_mask"].sum(1)
    batch["completion_ids"][range(7), lengths - 1] = 3  # the last token of each
    scorers = {}
    for name, path, unknown_ids, nameable_ids in (("first", teacher_path, [3], range(20)), ("second", wide, [], [])):
        teacher = make_teacher(path, tmp_path)
        contract = TokenContract(teacher, unknown_ids, nameable_ids)
        scorers[name] = RowScorer(teacher, Accelerator(cpu=True), 30, contract)
    names, scorer = ["first", "second"] * 3 + ["first"], TeacherScorer(scorers)
    if begins:
        parts = [
            [ids[keep].tolist() for ids, keep in zip(batch[f"{part}_ids"], batch[f"{part}_mask"].bool(), strict=True)]
            for part in ("prompt", "completion")
        ]
        scorer.begin(*parts, [[1] * len(ids) for ids in parts[1]], 4, names)
    scores = scorer.score(batch, batch["completion_mask"], 4, teacher_ids=names)
    expected = {"first": naive_scores(teacher_path, batch, 1.0), "second": naive_scores(wide, batch, 1.0)}
    for i, name in enumerate(names):
        mask = batch["completion_mask"][i].bool()
        mask[lengths[i] - 1] = name == "second"
        assert torch.equal(scores["teacher_mask"][i], mask)
        logps = scores["teacher_per_token_logps"][i]
        torch.testing.assert_close(logps, expected[name][i] * mask, rtol=0, atol=1e-5)
        assert scores["teacher_top_logps"][i].isfinite().any() == (name == "first" and mask.any())


def test_a_row_may_have_a_prompt_of_its_own_for_the_teacher(tmp_path, teacher_path):
    batch, own = make_batch(rows=3), [9, 8, 7, 6, 5]
    scorer = tiny.make_scorer(make_teacher(teacher_path, tmp_path))
    scores = scorer.score(batch, batch["completion_mask"], prompts=[None, own, None])
    batch["prompt_ids"][1], batch["prompt_mask"][1] = torch.tensor(own), 1
    expected = naive_scores(teacher_path, batch, 1.0)
    torch.testing.assert_close(scores["teacher_per_token_logps"], expected, rtol=0, atol=1e-5)


def test_an_id_beyond_the_teachers_vocabulary_raises():
    batch = make_batch()
    batch["completion_ids"][0, 0] = 32
    with pytest.raises(ValueError, match="token id 32, but the teacher's vocabulary has only 32 rows"):
        tiny.make_scorer(CountingTeacher(), 30).score(batch, batch["completion_mask"])


@pytest.mark.parametrize("shares_prompts", [True, False])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(1, 20)), min_size=1, max_size=10),
    st.integers(1, 25),
    st.integers(1, 200),
)
def test_any_rows_and_budget_give_each_row_its_own_scores(
    shares_prompts, tmp_path, teacher_path, rows, prompt_length, tokens_per_batch
):
    # (which of three prompts, completion length) for each row
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, 32, (3, prompt_length), generator=generator)
    lengths = torch.tensor([length for _, length in rows])
    batch = {
        "prompt_ids": prompts[[which for which, _ in rows]],
        "prompt_mask": torch.ones(len(rows), prompt_length, dtype=torch.long),
        "completion_ids": torch.randint(4, 32, (len(rows), 20), generator=generator),
        "completion_mask": (torch.arange(20) < lengths[:, None]).long(),
    }
    teacher = make_teacher(teacher_path, tmp_path)
    teacher.shares_prompts = shares_prompts
    scores = tiny.make_scorer(teacher, tokens_per_batch).score(batch, batch["completion_mask"])
    expected = naive_scores(teacher_path, batch, 1.0)
    torch.testing.assert_close(scores["teacher_per_token_logps"], expected, rtol=0, atol=1e-5)


def test_a_shared_prompt_runs_once(tmp_path, teacher_path):
    batch = make_batch(rows=4, prompt=30, completion=3) | {"prompt_mask": torch.ones(4, 30, dtype=torch.long)}
    batch["prompt_ids"] = batch["prompt_ids"][:1].expand(4, -1)
    teacher = make_teacher(teacher_path, tmp_path)
    widths = []
    teacher.model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    scores = tiny.make_scorer(teacher, 1000).score(batch, batch["completion_mask"])
    longest = batch["completion_mask"].sum(1).max().item()
    assert widths == [(1, 30), (4, longest - 1)]
    torch.testing.assert_close(
        scores["teacher_per_token_logps"], naive_scores(teacher_path, batch, 1.0), rtol=0, atol=1e-5
    )


def test_the_teacher_is_let_go_when_training_has_ended():
    teacher = CountingTeacher()
    scorer = tiny.make_scorer(teacher, 30)
    scorer.on_train_begin(None, None, None)
    scorer.on_evaluate(None, None, None)
    assert not teacher.released
    scorer.on_train_end(None, None, None)
    assert teacher.released
    teacher.released = False
    scorer.on_evaluate(None, None, None)
    assert teacher.released
    teacher.released = False
    scorer.on_train_begin(None, None, None)  # once more
    scorer.on_evaluate(None, None, None)
    assert not teacher.released


def assert_names(scores, path, batch, k, temperature=1.0, shared=40):
    """
    The k likeliest tokens and their log-probabilities, wherever the teacher has a say, but for those that the student
    doesn't share; and the sampled token's too.
    """
    mask = batch["completion_mask"].bool()
    expected = naive_log_probs(path, batch, temperature)[mask].topk(k)
    ids, logps = scores["teacher_top_ids"], scores["teacher_top_logps"]
    assert list(map(len, ids)) == list(map(len, logps)) == mask.sum(1).tolist()
    is_shared = expected.indices < shared
    assert torch.equal(torch.cat(ids), expected.indices.where(is_shared, 0).int())
    expected = expected.values.masked_fill(~is_shared, -float("inf"))
    torch.testing.assert_close(torch.cat(logps), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        scores["teacher_per_token_logps"], naive_scores(path, batch, temperature), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(("k", "tokens_per_batch"), [(1, 1), (4, 30), (40, 1000), (99, 1000)])
def test_the_teacher_names_its_likeliest_tokens(k, tokens_per_batch, temperature, tmp_path, teacher_path):
    batch, teacher = make_batch(), make_teacher(teacher_path, tmp_path, temperature)
    scorer = tiny.make_scorer(teacher, tokens_per_batch, nameable_ids=range(40))
    assert_names(scorer.score(batch, batch["completion_mask"], k), teacher_path, batch, min(k, 40), temperature)


def test_names_on_a_shared_prompt(tmp_path, teacher_path):
    batch = make_batch(rows=4, prompt=30, completion=3) | {"prompt_mask": torch.ones(4, 30, dtype=torch.long)}
    batch["prompt_ids"] = batch["prompt_ids"][:1].expand(4, -1)
    teacher = make_teacher(teacher_path, tmp_path)
    scorer = tiny.make_scorer(teacher, 1000, nameable_ids=range(40))
    assert_names(scorer.score(batch, batch["completion_mask"], 3), teacher_path, batch, 3)


def test_a_token_the_student_does_not_share_is_not_named(tmp_path, teacher_path):
    batch, teacher = make_batch(), make_teacher(teacher_path, tmp_path)
    everything = tiny.make_scorer(teacher, 1000, nameable_ids=range(40))
    shared = tiny.make_scorer(teacher, 1000, nameable_ids=range(4, 20))
    everything, shared = (scorer.score(batch, batch["completion_mask"], 5) for scorer in (everything, shared))
    ids, logps = (torch.cat(everything[f"teacher_top_{name}"]) for name in ("ids", "logps"))
    known = (ids >= 4) & (ids < 20)
    assert 0 < known.sum() < known.numel()
    assert torch.equal(torch.cat(shared["teacher_top_ids"]), ids.where(known, 0))
    assert torch.equal(torch.cat(shared["teacher_top_logps"]), logps.masked_fill(~known, -float("inf")))
