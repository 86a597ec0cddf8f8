"""When the teacher is asked, what of it goes into the batch and into the loss, and what is logged."""

from contextlib import nullcontext
from statistics import mean
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model

from ._trl.loss_call import loss_is_patched
from ._trl.names import CLIPPED_LOSS_TYPES, loss_mask
from ._trl.seam import Guide, Rollouts
from .alignment import spread
from .columns import IN_BATCH, NO_PROMPTS, check_prompts, read_weights
from .evaluation import pass_at_k
from .lm_head import LMHead
from .objective.clipping import Clipping
from .objective.guidance import Guidance, Scores, guide, kl_mask, two_dimensional
from .objective.schedule import Terms
from .rollout_log import RolloutLog
from .scoring import TeacherScorer
from .teachers.by_text import MAX_UNALIGNED, unaligned_message


logger = get_logger(__name__)

BATCHES_WITHOUT_SUCCESS = 10  # before a warning


class TeacherGuide(Guide):
    """
    The [`Guide`] of an [`RLADTrainer`].

    Args:
        trainer ([`RLADTrainer`]):
            The objective of its settings says what the teacher is asked: a callback may change those.
        scorer ([`TeacherScorer`] or `None`):
            Asks the teacher. `None` for plain GRPO.
        rollout_log ([`RolloutLog`] or `None`):
            What keeps rollouts to be looked at.
    """

    def __init__(self, trainer, scorer: TeacherScorer | None, rollout_log: RolloutLog | None = None):
        self.trainer, self.scorer, self.rollout_log = trainer, scorer, rollout_log
        self.is_required = scorer is not None
        self._batches_without_success = 0
        self._prompts: list[list[int] | None] | None = None  # what `begin` has tokenized

    @property
    def terms(self) -> Terms:
        """The terms of the objective at this step."""
        state = self.trainer.state
        return self.trainer.args.objective.at(state.global_step / max(state.max_steps, 1))

    def begin(self, rollouts: Rollouts, rows: list[dict]):
        terms = self.terms
        if self.scorer is None or not terms.asks_teacher:
            return nullcontext()
        # Which completions have an advantage isn't known yet
        masks = rollouts.tool_mask or [[1] * len(ids) for ids in rollouts.completion_ids]
        masks = [
            [0] * len(mask) if row.get("teacher_weight") == 0 else mask for row, mask in zip(rows, masks, strict=True)
        ]
        prompts, self._prompts = rollouts.prompt_ids, self.teacher_prompts(rows)
        if self._prompts is not None:
            prompts = [own or ids for own, ids in zip(self._prompts, prompts, strict=True)]
        self.scorer.begin(prompts, rollouts.completion_ids, masks, terms.top_k, self.teacher_ids(rows))
        return self.scorer.score_early()

    def finish(self, batch: dict, rewards_per_func: torch.Tensor, rows: list[dict]) -> dict:
        trainer, terms = self.trainer, self.terms
        if not trainer.model.training:
            self._log_pass_at_k(rewards_per_func)
        if self.rollout_log is not None:
            batch = self.rollout_log.number(batch, trainer.total_reward(rewards_per_func))
        if self.scorer is None:
            return batch
        if not terms.asks_teacher:
            self.scorer.release()  # distillation is over, and the reward has the rest to itself
            return {**batch, "teacher_mask": torch.zeros_like(batch["completion_mask"], dtype=torch.bool)}
        # Without advantage a token contributes nothing to the policy term, whatever the teacher says
        wanted = (two_dimensional(batch["advantages"]) != 0) & terms.scores_advantages
        has_kl = None
        if terms.has_kl:
            batch = {**batch, "teacher_kl_on": self.select_for_kl(rewards_per_func)}
            has_kl = batch["teacher_kl_on"] | terms.distilling
            wanted = wanted | has_kl.unsqueeze(1)
        if any("teacher_weight" in row for row in rows):
            weights = read_weights([row.get("teacher_weight") for row in rows], IN_BATCH)
            batch = {**batch, "teacher_weight": weights.to(batch["advantages"].device)}
            wanted = wanted & (batch["teacher_weight"] > 0.0).unsqueeze(1)
        prompts = self._prompts if self.scorer.has_begun else self.teacher_prompts(rows)
        mask = loss_mask(batch) * wanted
        scores = self.scorer.score(batch, mask, terms.top_k, prompts, self.teacher_ids(rows), has_kl)
        self._log_scoring(scores)
        return {**batch, **scores}

    def watch_forward(self, model, batch):
        terms = self.terms
        if "teacher_top_ids" not in batch or terms.kl_coef == 0.0:
            return nullcontext()
        model = self.trainer.accelerator.unwrap_model(model)
        head = LMHead(model.get_base_model() if is_peft_model(model) else model, self.trainer.temperature)
        mask = kl_mask(terms, batch["teacher_mask"], batch["teacher_kl_on"])
        ids, top_ids = batch["completion_ids"], select_named(batch["teacher_top_ids"], mask)

        def look_up(hidden_states):
            # Over prompt and completion, the state at position t predicts token t + 1
            states = hidden_states[:, -ids.size(1) - 1 : -1]
            batch["named_log_ratios"] = head.log_ratios(states[mask], ids[mask], top_ids)

        return head.on_hidden_states(look_up)

    def guide(self, per_token_logps, old_per_token_logps, batch) -> Guidance:
        trainer, terms = self.trainer, self.terms
        if self.scorer is None and terms.asks_teacher:
            raise RuntimeError(
                "`alpha` or `teacher_kl_coef` was changed in training, but this trainer was made without a teacher. "
                "Make it with a `teacher_model`, and with the settings in which the teacher has the largest part."
            )
        if self.scorer is not None and "teacher_mask" not in batch:
            raise loss_is_patched("its rollouts were not scored by the teacher")
        clipping = None
        if trainer.loss_type in CLIPPED_LOSS_TYPES:
            level = trainer.importance_sampling_level
            clipping = Clipping(trainer.epsilon_low, trainer.epsilon_high, level, loss_mask(batch))
        batch = spread_scores(batch, old_per_token_logps)
        scores = self.read_scores(batch, terms)
        guidance = guide(terms, per_token_logps, old_per_token_logps, scores, batch["advantages"], clipping)
        if self.scorer is not None:
            trainer.log_value("teacher/kl_coef", terms.kl_coef)
        trainer.log_means(guidance.tokens | self._of_each_teacher(guidance.tokens, batch))
        if self.rollout_log is not None:
            self.rollout_log.record(per_token_logps, guidance, batch)
        return guidance

    @staticmethod
    def read_scores(batch: dict, terms: Terms) -> Scores | None:
        """The teacher's scores in a micro-batch; `None` where it has been asked for none."""
        if "teacher_per_token_logps" not in batch:
            return None
        top_logps = None
        if "named_log_ratios" in batch:
            mask = kl_mask(terms, batch["teacher_mask"], batch["teacher_kl_on"])
            top_logps = select_named(batch["teacher_top_logps"], mask)
        return Scores(
            batch["teacher_per_token_logps"],
            batch["teacher_mask"],
            batch.get("teacher_kl_on"),
            top_logps,
            batch.get("named_log_ratios"),
            batch["teacher_weight"].unsqueeze(1) if "teacher_weight" in batch else None,
        )

    def teacher_ids(self, rows: list[dict]) -> list[str | None] | None:
        """Names of the rows' teachers, if there are several."""
        assert self.scorer is not None
        return None if "" in self.scorer.scorers else [row.get("teacher_id") for row in rows]

    def teacher_prompts(self, rows: list[dict]) -> list | None:
        """Token ids of the rows' column `teacher_prompt`; `None` where the teacher reads what the student has read. Of
        a teacher with another tokenizer, the prompts themselves."""
        assert self.scorer is not None
        given = [row.get("teacher_prompt") for row in rows]
        check_prompts(given, IN_BATCH)
        if not all(teacher.is_frozen or "teacher_prompt" in rows[0] for teacher in self.scorer.teachers.values()):
            raise ValueError(NO_PROMPTS)  # a stream is only known now
        by_text = self.scorer.by_text(self.teacher_ids(rows), len(rows))
        prompts: list[Any] = [None] * len(rows)
        if any(given):  # TRL tokenizes one prompt for each row
            ids = self.trainer.tokenize_prompts([prompt or next(filter(None, given)) for prompt in given])
            prompts = [own if prompt else None for own, prompt in zip(ids, given, strict=True)]
        for i in (i for i, is_text in enumerate(by_text) if is_text):
            prompts[i] = given[i] or rows[i]["prompt"]
        return prompts if any(prompts) else None

    def select_for_kl(self, rewards_per_func: torch.Tensor) -> torch.Tensor:
        """Which of this process's completions have the divergence, bool of shape `(B,)`."""
        trainer = self.trainer
        rewards = trainer.total_reward(rewards_per_func)
        if self.terms.kl_on == "all":
            return trainer.of_this_process(torch.ones_like(rewards, dtype=torch.bool))
        self._warn_without_success(rewards)
        # What no reward function can judge is NaN, and hasn't failed
        return trainer.of_this_process(rewards <= trainer.args.success_reward)

    def _warn_without_success(self, rewards):
        highest, bound = rewards.nan_to_num(-float("inf")).max().item(), self.trainer.args.success_reward
        if highest > bound:
            self._batches_without_success = -float("inf")  # never again
        self._batches_without_success += 1
        if self._batches_without_success == BATCHES_WITHOUT_SUCCESS:
            logger.warning(
                f"No completion of {BATCHES_WITHOUT_SUCCESS} generation batches has a reward above `success_reward="
                f"{bound}`, so all of them count as failed. The last batch's highest is {highest:.3g}."
            )

    def _log_pass_at_k(self, rewards_per_func):
        trainer = self.trainer
        groups = rewards_per_func.view(-1, trainer.num_generations_eval, len(trainer.reward_funcs))
        # A reward function returns `None`, which is NaN here, for what it can't judge: that isn't a failure
        judged = (~groups.isnan()).sum(1).T.tolist()
        successes = (groups > trainer.args.success_reward).sum(1).T.tolist()
        for name, *counts in zip(trainer.reward_func_names, judged, successes, strict=True):
            for k in {1, trainer.num_generations_eval}:
                if scores := [pass_at_k(n, count, k) for n, count in zip(*counts, strict=True) if n >= k]:
                    trainer.log_value(f"rewards/{name}/pass@{k}", mean(scores))

    def _log_scoring(self, scores):
        trainer = self.trainer
        trainer.log_value("teacher/scoring_time", self.scorer.seconds)
        if trainer.args.teacher_servers:
            counts = self.scorer.queued_rows, self.scorer.failed_rows
            counts = torch.tensor(counts, device=trainer.accelerator.device)
            queued, failed = trainer.accelerator.reduce(counts).tolist()
            trainer.log_value("teacher/queued_rows", queued)
            if trainer.args.on_teacher_failure == "grpo":
                trainer.log_value("teacher/failed_rows", failed)
        if "teacher_index" in scores:
            for name, scorer in self.scorer.scorers.items():
                trainer.log_value(f"teacher/{name}/scoring_time", scorer.seconds)
        mask = scores["teacher_mask"]
        names = ("entropy", "top1", "named_mass") if "teacher_top_ids" in scores else ()
        if "teacher_first" in scores:
            unaligned = scores.pop("teacher_unaligned")
            trainer.log_means({"teacher/unaligned": (unaligned.float(), unaligned | mask)})
            share = trainer.last_value("teacher/unaligned")
            if share > MAX_UNALIGNED:
                raise ValueError(unaligned_message(share, "a generation batch"))
            # Named are tokens in the place of the first one of a chunk alone
            mask = mask & (scores["teacher_first"] == torch.arange(mask.size(1), device=mask.device))
        trainer.log_means({f"teacher/{name}": (scores.pop(f"teacher_{name}"), mask) for name in names})

    def _of_each_teacher(self, tokens, batch):
        """The log-ratio of each of several teachers, and its share of the tokens."""
        if "teacher_index" not in batch or "teacher/log_ratio" not in tokens:
            return {}
        log_ratio, mask = tokens["teacher/log_ratio"]
        metrics = {}
        for number, name in enumerate(self.scorer.scorers):
            mine = (batch["teacher_index"] == number).unsqueeze(1).expand_as(mask)
            metrics[f"teacher/{name}/log_ratio"] = log_ratio, mask & mine
            metrics[f"teacher/{name}/tokens"] = mine.float(), mask
        return metrics


def spread_scores(batch: dict, old_per_token_logps: torch.Tensor) -> dict:
    """A micro-batch with the scores of chunks, if there are any, spread over their tokens."""
    if "teacher_first" not in batch:
        return batch
    parts = (
        batch["teacher_per_token_logps"],
        old_per_token_logps.float(),
        batch["teacher_first"],
        batch["teacher_mask"],
    )
    return {**batch, "teacher_per_token_logps": spread(*parts)}


def select_named(parts: list[torch.Tensor], mask: torch.Tensor) -> torch.Tensor:
    """What the teacher names at the tokens of `mask`, `(N, k)`: `parts` has it for all tokens of each row, or none."""
    return torch.cat([part if is_on else part[:0] for part, is_on in zip(parts, mask.any(1).tolist(), strict=True)])
