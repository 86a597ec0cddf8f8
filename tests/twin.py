"""
What a run should have logged, from what its reward function was shown: plain passes of its models, row by row, in
float64.
"""

import math
from collections import defaultdict

import tiny
import torch
from transformers import AutoModelForCausalLM


class Watcher:
    """`tiny.reward`, which keeps what this process was shown: in `calls`, the rows of each call."""

    __name__ = "reward"

    def __init__(self):
        self.calls = []

    def __call__(self, prompts, completion_ids, **columns):
        rewards = tiny.reward(completion_ids)
        rows = [
            {"prompt": prompt, "ids": list(ids), "reward": reward}
            for prompt, ids, reward in zip(prompts, completion_ids, rewards, strict=True)
        ]
        for name in {"teacher_id", "teacher_prompt"} & columns.keys():
            rows = [{**row, name: value} for row, value in zip(rows, columns[name], strict=True)]
        self.calls.append(rows)
        return rewards


def load(path):
    return AutoModelForCausalLM.from_pretrained(path).double()


@torch.no_grad()
def log_probs(model, prompt, ids, temperature=1.0):
    """Those of the whole vocabulary at each token of a completion, `(T, V)`."""
    prompt = tiny.make_tokenizer()(prompt)["input_ids"]
    return (model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1] / temperature).log_softmax(-1)


def advantages(rows, group=4):
    rewards = torch.tensor([row["reward"] for row in rows]).view(-1, group)
    return ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten().tolist()


def divergence(now, theirs, id, k, shared=32, clip=1.0):
    """
    At one token: forward on the teacher's `k` likeliest that are shared, or with `k=0` graded on the sampled one.
    """
    if k == 0:
        x = abs(now[id] - theirs[id]).item()
        return x * x / 2 if x <= clip else clip * (x - clip / 2)
    top = theirs.topk(k).indices
    top = top[top < shared]
    p, q = theirs[top].exp(), now[top].exp()
    p, q = (torch.cat([each, 1 - each.sum(0, keepdim=True)]) for each in (p, q))
    return torch.where(p > 1e-9, p * (p / q).log(), 0.0).sum().item()


def entropy(theirs, k, shared=32):
    top = theirs.topk(k)
    p = top.values[top.indices < shared].exp()
    p = torch.cat([p, 1 - p.sum(0, keepdim=True)])
    return -torch.xlogy(p, p.clamp(min=1e-12)).sum().item()


def log_of_step(
    rows,
    student,
    teacher,  # a model, or a dictionary of them by name
    old=None,  # the student that has written the rows
    alpha=0.5,
    coef=0.0,
    k=0,
    success_reward=float("inf"),  # up to this a row has the divergence
    group=4,
    low=0.2,
    high=0.28,
):
    """Means over the tokens of all rows of what is logged under these names, and `loss`, of `loss_type="grpo"`."""
    seen, losses = defaultdict(list), []
    for row, advantage in zip(rows, advantages(rows, group), strict=True):
        name, ids = row.get("teacher_id"), row["ids"]
        prompts = [row["prompt"], row["prompt"], row.get("teacher_prompt") or row["prompt"]]
        models = student, old or student, teacher[name] if name else teacher
        passes = [log_probs(model, prompt, ids) for model, prompt in zip(models, prompts, strict=True)]
        has_kl = coef > 0.0 and row["reward"] <= success_reward
        has_say = has_kl or alpha < 1.0 and advantage != 0.0
        tokens = []
        for id, now, before, theirs in zip(ids, *passes, strict=True):
            drift, gap = (now[id] - before[id]).item(), (now[id] - theirs[id]).item()
            kl = divergence(now, theirs, id, k) if has_kl else 0.0
            log_ratio = alpha * drift + (1 - alpha) * min(max(gap, -1.0), 1.0) if has_say else drift
            ratio, policy_ratio = math.exp(log_ratio), math.exp(drift)
            bounded = min(max(ratio, 1 - low), 1 + high)
            tokens.append(coef * kl - min(ratio * advantage, bounded * advantage))
            for side, is_clipped, by_policy in (
                ("high", advantage > 0 and ratio > 1 + high, policy_ratio > 1 + high),
                ("low", advantage < 0 and ratio < 1 - low, policy_ratio < 1 - low),
            ):
                seen[f"clip_ratio/{side}_by_policy"].append(is_clipped and by_policy)
                seen[f"clip_ratio/{side}_by_teacher"].append(is_clipped and not by_policy)
            if not has_say:
                continue
            seen["teacher/log_ratio"].append(gap)
            seen["teacher/clamped"].append(abs(gap) > 1.0)
            if advantage:
                seen[f"teacher/log_ratio_{'rewarded' if advantage > 0 else 'punished'}"].append(gap)
            if has_kl:
                seen["teacher/kl"].append(kl)
            if k:
                seen["teacher/top1"].append(theirs.argmax() == id)
                seen["teacher/entropy"].append(entropy(theirs, k))
                top = theirs.topk(k)
                seen["teacher/named_mass"].append(top.values[top.indices < 32].exp().sum())
            if name:
                seen[f"teacher/{name}/log_ratio"].append(gap)
                for each in teacher:
                    seen[f"teacher/{each}/tokens"].append(each == name)
        losses.append(sum(tokens) / len(tokens))
    return {"loss": sum(losses) / len(losses)} | {name: float(sum(each)) / len(each) for name, each in seen.items()}


def assert_logged(log, expected, leave_out=(), abs=1e-4):
    """All that is expected was logged, and of our metrics nothing else."""
    ours = {name for name in log if name.startswith("teacher/") or "_by_" in name}
    ours -= {"teacher/kl_coef"} | {name for name in ours if name.endswith("scoring_time")}
    missing = {name for name, value in log.items() if value is None}  # NaN
    assert ours - missing - set(leave_out) == expected.keys() - {"loss", *leave_out}
    for name in expected.keys() - set(leave_out):
        assert log[name] is not None and -abs <= log[name] - expected[name] <= abs, (name, log[name], expected[name])
