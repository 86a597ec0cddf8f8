"""The trainer of RLAD."""

import inspect
import textwrap
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from statistics import mean
from tempfile import TemporaryFile
from typing import Any
from weakref import WeakValueDictionary

import torch
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import PreTrainedModel

from ._trl import CLIPPED_LOSS_TYPES, GuidedGRPOTrainer, get_config_model_id, patched
from .checkpoints import RunRecord, last_checkpoint
from .config import RLADConfig
from .evaluation import pass_at_k
from .lm_head import LMHead
from .model_card import write_model_card
from .rollouts import RolloutLog
from .routing import RoutedScorer, teacher_numbers
from .served_scorer import ServedScorer
from .teacher_kl import forward_kl, named_entropy, reverse_kl
from .teacher_scorer import TeacherScorer
from .teachers import create_teacher
from .token_contract import find_shared_ids, find_unknown_ids, longest_prompt
from .trrd import TRRDLoss, clip_causes, sequence_log_ratio


logger = get_logger(__name__)

PROMPTS_TO_MEASURE = 10_000  # within a second
BATCHES_WITHOUT_SUCCESS = 10  # after these it is said


class RLADTrainer(GuidedGRPOTrainer):
    """
    Trainer for reinforcement-aware knowledge distillation, introduced in [Reinforcement-aware Knowledge Distillation
    for LLM Reasoning](https://huggingface.co/papers/2602.22495).

    It is [`~trl.GRPOTrainer`] whose likelihood ratio is taken to a mixture of the old policy and a frozen teacher, see
    [`TRRDLoss`]: the student imitates the teacher only where that helps the reward.

    Example:

    ```python
    >>> from datasets import load_dataset
    >>> from trl.rewards import accuracy_reward
    >>> from trl_rlad import RLADConfig, RLADTrainer

    >>> trainer = RLADTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     teacher_model="Qwen/Qwen3-8B",
    ...     reward_funcs=accuracy_reward,
    ...     args=RLADConfig("Qwen3-0.6B-RLAD", alpha=0.5),
    ...     train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    ... )
    >>> trainer.train()  # doctest: +SKIP
    ```

    Args:
        model, reward_funcs:
            As in [`~trl.GRPOTrainer`].
        args ([`RLADConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        *grpo_args, **grpo_kwargs:
            All other arguments of [`~trl.GRPOTrainer`], in its order.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or `dict` of these by name, *optional*):
            The teacher, by its name on the Hub, its local path (of an adapter too), or as a loaded model; or `"base"`,
            the base model of a student that trains an adapter. It must give the student's token ids the student's
            meaning. Of several teachers, each scores the rows that have its name in the dataset's column `teacher_id`.
            Beside `teacher_server_urls` it is the served model's name, or a name or path that has its tokenizer, and may
            be left out; without them, only for `alpha=1.0` without a `teacher_kl_coef`.

    Raises:
        `TypeError`: if `args` is not an [`RLADConfig`], or `teacher_model` is neither a name nor a model.
        `ValueError`: if a teacher is needed and missing, or the teacher and the student don't fit together.
    """

    args: RLADConfig

    _tag_names = ["trl", "grpo", "rlad"]
    _name = "RLAD"
    _paper = {
        "title": "Reinforcement-aware Knowledge Distillation for LLM Reasoning",
        "id": "2602.22495",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{zhang2026rlad,
                title        = {{Reinforcement-aware Knowledge Distillation for LLM Reasoning}},
                author       = {Zhaoyang Zhang and Shuli Jiang and Yantao Shen and Yuting Zhang and Dhananjay Ram and Shuo Yang and Zhuowen Tu and Wei Xia and Stefano Soatto},
                year         = 2026,
                eprint       = {arXiv:2602.22495},
            }"""),
    }

    def __init__(
        self,
        model,
        reward_funcs=None,
        args: RLADConfig | None = None,
        *grpo_args,
        teacher_model: str | PreTrainedModel | dict[str, str | PreTrainedModel] | None = None,
        **grpo_kwargs,
    ):
        if args is None:
            model_name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = RLADConfig(f"{model_name.split('/')[-1]}-RLAD")
        if not isinstance(args, RLADConfig):
            raise TypeError(
                f"`args` must be an `RLADConfig`, but is a `{type(args).__name__}`. `RLADConfig` takes all arguments "
                "of `GRPOConfig`."
            )
        servers = args.teacher_servers
        if args.needs_teacher and not servers and (teacher_model is None or teacher_model in ("", {})):
            setting = "distillation_fraction" if args.distillation_fraction > 0.0 else "teacher_kl_coef"
            setting = "alpha" if args.alpha < 1.0 else setting
            raise ValueError(
                f"`{setting}={getattr(args, setting)}` needs a teacher: pass it as the keyword argument `teacher_model` "
                "or name its server in `teacher_server_urls`, or set `alpha=1.0` without a `teacher_kl_coef` or "
                "`distillation_fraction` to train with GRPO."
            )
        teachers: dict[str, Any] = {**dict.fromkeys(servers), **_by_name(teacher_model)}
        is_routed = "" not in teachers
        if not is_routed and len(teachers) > 1:
            raise ValueError(
                "Of `teacher_model` and `teacher_server_urls` one has several teachers by name, and the other has none of these "
                "names. Pass both as dictionaries."
            )
        if any(_share_weights(model, each) for each in teachers.values()):
            raise ValueError(
                "`teacher_model` shares its weights with the model that is trained, so it would move with the student. "
                'Pass its name or path, or a copy of it; for the base of a student with an adapter, pass "base".'
            )
        if wrong := grpo_kwargs.keys() - inspect.signature(GuidedGRPOTrainer).parameters.keys():
            name = sorted(wrong)[0]
            hint = " The teacher is passed as `teacher_model`." if "teacher" in name else ""
            raise TypeError(f"`RLADTrainer` has no argument `{name}`.{hint}")
        if not args.needs_teacher and (servers or teacher_model is not None):
            logger.warning(
                "With `alpha=1.0` and no `teacher_kl_coef` or `distillation_fraction`, RLAD is GRPO and needs no teacher: "
                "`teacher_model` is not loaded, and the settings of the teacher have no effect."
            )
        super().__init__(model, reward_funcs, args, *grpo_args, **grpo_kwargs)

        self.trims_padding = args.trim_padding
        if isinstance(self.train_dataset, Dataset) and "teacher_weight" in self.train_dataset.column_names:
            read_weights(self.train_dataset["teacher_weight"])  # refuses bad ones before training
        self.is_guided = args.needs_teacher
        self.trrd = TRRDLoss(args.alpha, args.teacher_log_ratio_clip)
        self.teacher_scorer, self._teachers = None, {}
        self._bases: WeakValueDictionary | None = WeakValueDictionary() if is_routed else None  # that teachers share
        if args.needs_teacher:
            self._check_teacher_ids(teachers if is_routed else None)
            scorers = {name: self._create_teacher_scorer(each, name) for name, each in teachers.items()}
            for scorer in scorers.values():
                self.add_callback(scorer)
            self._teachers = {name: scorer.teacher for name, scorer in scorers.items()}
            self.teacher_scorer = RoutedScorer(scorers) if is_routed else scorers[""]
        self._batches_without_success = 0
        self.rollout_log = RolloutLog(self) if args.log_completions else None
        if self.rollout_log is not None:
            self.add_callback(self.rollout_log)
        self.run_record = RunRecord(args, self._teachers)
        self.add_callback(self.run_record)
        if args.should_save:
            check_writable(str(args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:  # with none at all, transformers says so
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir)) or True
        if resume_from_checkpoint is not True and resume_from_checkpoint:
            self.run_record.compare(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_teacher_ids(self, teachers):
        """Refuses datasets of which a row has no teacher. Streams are checked as they come."""
        for dataset in (self.train_dataset, *_datasets(self.eval_dataset)):
            if not isinstance(dataset, Dataset):
                continue
            has_names = "teacher_id" in dataset.column_names
            if teachers is not None:
                if not has_names:
                    raise ValueError(
                        "There are several teachers by name, so each row of the dataset needs the name of its own in "
                        f"a column `teacher_id`. The columns are {', '.join(dataset.column_names)}."
                    )
                teacher_numbers(dataset.unique("teacher_id"), teachers)
            elif has_names:
                logger.warning(
                    "The dataset's column `teacher_id` isn't read, as there is one teacher. For several, pass `teacher_model` as "
                    "a dictionary of them by name."
                )

    def _create_teacher_scorer(self, teacher_model: str | PreTrainedModel, name: str) -> TeacherScorer:
        try:
            return self._create_one_scorer(teacher_model, self.args.teacher_servers.get(name))
        except ValueError as error:
            if not name:
                raise
            raise ValueError(f"Teacher {name!r}: {error}") from error

    def _create_one_scorer(self, teacher_model, urls):
        if self.loss_type == "vespo" and not self.args.teacher_credit:
            logger.warning(
                "VESPO weights a completion by the sum of its log-ratios. With `alpha < 1` the teacher's part of that "
                "sum grows with the length and mutes long completions. The paper's choice is `loss_type='grpo'`."
            )
        teacher = create_teacher(
            teacher_model, self.args, self.accelerator, lambda: self.model, self.tokenizer, urls, self._bases
        )
        self._check_length(teacher)
        unknown_ids = find_unknown_ids(self.tokenizer, teacher.tokenizer, self.eos_token_ids)
        highest = max(self.tokenizer.get_vocab().values())
        if highest >= teacher.vocab_size:
            raise ValueError(
                f"The student's tokenizer goes up to token id {highest}, but the vocabulary of `teacher_model` has only "
                f"{teacher.vocab_size} rows. Choose a teacher that knows all of the student's tokens."
            )
        if unknown_ids:
            examples = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(unknown_ids[:5])))
            logger.warning(
                f"The teacher has no say on {len(unknown_ids)} of the student's tokens, which it doesn't know or doesn't "
                f"end its turn with (such as {examples}): there the likelihood ratio is GRPO's."
            )
        image_problem = teacher.find_image_problem(self.processing_class) if self.is_vision_language_model else None
        if image_problem is not None:
            image_problem = (
                f"The teacher {teacher.name} can't read the images of this data: {image_problem}. Choose a `teacher_model` "
                "of the student's family, or give the rows with images the `teacher_weight` 0, which trains them with GRPO."
            )
            columns = set(getattr(self.train_dataset, "column_names", None) or ())
            if columns & {"image", "images"} and "teacher_weight" not in columns:
                raise ValueError(image_problem)
        scorer_class = partial(ServedScorer, failure=self.args.on_teacher_failure) if urls else TeacherScorer
        return scorer_class(
            teacher,
            self.accelerator,
            self.args.teacher_tokens_per_batch,
            unknown_ids,
            self.args.teacher_timeout,
            find_shared_ids(self.tokenizer, teacher.tokenizer, unknown_ids, self.eos_token_ids),
            image_problem,
        )

    def _check_length(self, teacher):
        """Refuses a teacher that can't read the longest prompts with a completion behind them. Rollouts are checked too."""
        # A stream isn't looked at: it may be slow, or move on
        prompts = []
        if isinstance(self.train_dataset, Dataset):
            names = {"prompt", "teacher_prompt"} & set(self.train_dataset.column_names)
            columns = self.train_dataset.select_columns(sorted(names))[:PROMPTS_TO_MEASURE]
            prompts = [prompt for column in columns.values() for prompt in column if prompt]
        prompt_length = longest_prompt(prompts, self.tokenizer)
        longest = prompt_length + (self.max_completion_length or 0)
        if longest > teacher.max_length:
            raise ValueError(
                f"Prompts of {prompt_length} tokens and completions of up to {self.max_completion_length} are too long for the "
                f"teacher {teacher.name}, which knows {teacher.max_length:.0f} positions. Lower `max_completion_length`, leave "
                f"out longer prompts, choose a `teacher_model` for longer texts or {teacher.length_remedy}."
            )

    def after_generation(self, *rollouts):
        if self._asks_teacher:
            args, kwargs = self._rows_for_teacher(*rollouts)
            self.teacher_scorer.begin(*args, **kwargs)

    def during_rewards(self, *rollouts):
        if not self._asks_teacher:
            return nullcontext()
        args, kwargs = self._rows_for_teacher(*rollouts)
        return self.teacher_scorer.ahead(*args, **kwargs)

    @property
    def _asks_teacher(self) -> bool:
        return self.teacher_scorer is not None and (self.trrd.alpha < 1.0 or self._has_kl)

    def _rows_for_teacher(self, rows, prompt_ids, completion_ids, tool_mask):
        """What the teacher may have to score of these, before it is known which completions have an advantage."""
        masks = tool_mask or [[1] * len(ids) for ids in completion_ids]
        masks = [
            [0] * len(mask) if row.get("teacher_weight") == 0 else mask for row, mask in zip(rows, masks, strict=True)
        ]
        index = self._teacher_index(rows)
        names = {} if index is None else {"teacher_index": index}
        return (self._teacher_prompts(rows) or prompt_ids, completion_ids, masks, self._top_k), names

    def _teacher_index(self, rows):
        """Numbers of the rows' teachers, `int64`, if there are several."""
        if isinstance(self.teacher_scorer, RoutedScorer):
            return teacher_numbers((row.get("teacher_id") for row in rows), self._teachers)
        return None

    def _teacher_prompts(self, rows):
        """Token ids of the rows' prompts as the teacher is to read them, if for any row these are others."""
        if not any(row.get("teacher_prompt") for row in rows):
            return None
        return self.tokenize_prompts([row.get("teacher_prompt") or row["prompt"] for row in rows])

    def extend_rollout(self, batch, rewards_per_func, rows):
        if not self.model.training:
            self._log_pass_at_k(rewards_per_func)
        if self.rollout_log is not None:
            batch = self.rollout_log.choose(batch, self.of_this_process(self.total_reward(rewards_per_func)))
        if self.teacher_scorer is None:
            return batch
        if self.trrd.alpha == 1.0 and not self._has_kl:
            self.teacher_scorer.release()  # distillation is over, and the reward has the rest to itself
            return {**batch, "teacher_mask": torch.zeros_like(batch["completion_mask"], dtype=torch.bool)}
        # Without advantage a token contributes nothing to the policy term, whatever the teacher says
        wanted = _two_dimensional(batch["advantages"]) != 0
        if self.trrd.alpha == 1.0:
            wanted = torch.zeros_like(wanted)
        if self._has_kl:
            batch = {**batch, "teacher_kl_on": self._select_kl_rows(rewards_per_func)}
            wanted = wanted | batch["teacher_kl_on"].unsqueeze(1) | self.is_distilling
        if any("teacher_weight" in row for row in rows):
            weights = read_weights([row.get("teacher_weight") for row in rows])
            batch = {**batch, "teacher_weight": weights.to(batch["advantages"].device)}
            wanted = wanted & (batch["teacher_weight"] > 0.0).unsqueeze(1)
        scores = self.score_rollout(batch, rows, self.loss_mask(batch) * wanted, self._top_k)
        self.log_value("teacher/scoring_time", self.teacher_scorer.seconds)
        if self.args.on_teacher_failure == "grpo":
            failed = torch.tensor(self.teacher_scorer.failed_rows, device=wanted.device)
            self.log_value("teacher/failed_rows", self.accelerator.reduce(failed).item())
        if isinstance(self.teacher_scorer, RoutedScorer):
            for name, scorer in self.teacher_scorer.scorers.items():
                self.log_value(f"teacher/{name}/scoring_time", scorer.seconds)
        if "teacher_top_logps" in scores:
            top_ids, top_logps = scores["teacher_top_ids"][..., 0], scores["teacher_top_logps"]
            is_top1 = (top_ids == batch["completion_ids"]) & top_logps[..., 0].isfinite()
            values = {"teacher/entropy": named_entropy(top_logps), "teacher/top1": is_top1.float()}
            self.log_means({name: (value, scores["teacher_mask"]) for name, value in values.items()})
        return {**batch, **scores}

    def score_rollout(self, batch, rows, wanted, top_k):
        """What the teacher makes of the tokens `wanted`, `(B, T)`, of a batch, see [`TeacherScorer.score`]."""
        index, prompts = self._teacher_index(rows), self._teacher_prompts(rows)
        if index is not None:
            batch = {**batch, "teacher_index": index.to(wanted.device)}
        prompts = prompts and [torch.tensor(ids) for ids in prompts]
        scores = self.teacher_scorer.score(batch, wanted, top_k, prompts)
        return scores if index is None else {**scores, "teacher_index": batch["teacher_index"]}

    def _log_pass_at_k(self, rewards_per_func):
        groups = rewards_per_func.view(-1, self.num_generations_eval, len(self.reward_funcs))
        # A reward function returns `None`, which is NaN here, for what it can't judge: that isn't a failure
        judged = (~groups.isnan()).sum(1).T.tolist()
        successes = (groups > self.args.success_reward).sum(1).T.tolist()
        for name, *counts in zip(self.reward_func_names, judged, successes, strict=True):
            for k in {1, self.num_generations_eval}:
                if scores := [pass_at_k(n, count, k) for n, count in zip(*counts, strict=True) if n >= k]:
                    self.log_value(f"rewards/{name}/pass@{k}", mean(scores))

    def _select_kl_rows(self, rewards_per_func):
        """Which of this process's completions have the teacher KL, bool of shape `(B,)`."""
        rewards = self.total_reward(rewards_per_func)
        has_failed = ~(rewards > self.args.success_reward) & ~rewards_per_func.isnan().all(1)
        if self.args.teacher_kl_on == "all":
            has_failed = torch.ones_like(has_failed)
        else:
            self._warn_without_success(rewards)
        return self.of_this_process(has_failed)

    def total_reward(self, rewards_per_func):
        """Rewards `(B,)` of all processes, the weighted sums of the reward functions'."""
        return (rewards_per_func * self.reward_weights.to(rewards_per_func)).nansum(1)

    def of_this_process(self, values):
        """This process's rows of values of all processes."""
        size = len(values) // self.accelerator.num_processes
        return values[self.accelerator.process_index * size :][:size]

    def _warn_without_success(self, rewards):
        highest = rewards.max().item()
        if highest > self.args.success_reward:
            self._batches_without_success = float("-inf")
        self._batches_without_success += 1
        if self._batches_without_success == BATCHES_WITHOUT_SUCCESS:
            logger.warning(
                f"No completion of {BATCHES_WITHOUT_SUCCESS} generation batches has a reward above `success_reward="
                f"{self.args.success_reward}`, so all of them count as failed. The last batch's highest is {highest:.3g}."
            )

    @property
    def is_distilling(self) -> bool:
        """Whether the student only imitates at this step, see `distillation_fraction`."""
        return self.state.global_step < self.args.distillation_fraction * max(self.state.max_steps, 1)

    @property
    def _kl_coef(self) -> float:
        if self.is_distilling:
            return 1.0
        return self.args.teacher_kl_coef_at(self.state.global_step / max(self.state.max_steps, 1))

    @property
    def _has_kl(self) -> bool:
        # Its coefficient may rise before the generation batch has been used up
        return bool(self._kl_coef or self.args.teacher_kl_coef_final)

    @property
    def _top_k(self) -> int:
        """Number of tokens that the teacher is to name."""
        return self.args.teacher_top_k if self._has_kl and self.args.teacher_kl == "forward" else 0

    def _kl_mask(self, batch):
        """Tokens whose divergence from the teacher enters the loss, bool of shape `(B, T)`."""
        mask = batch["teacher_mask"]
        return mask if self.is_distilling else mask & batch["teacher_kl_on"].unsqueeze(1)

    def watch_forward(self, model, batch):
        if "teacher_top_ids" not in batch or self._kl_coef == 0.0:
            return nullcontext()
        model = self.accelerator.unwrap_model(model)
        head = LMHead(model.get_base_model() if is_peft_model(model) else model, self.temperature)
        mask, ids, top_ids = self._kl_mask(batch), batch["completion_ids"], batch["teacher_top_ids"]

        def look_up(hidden_states):
            states = hidden_states[:, -ids.size(1) - 1 : -1]  # the state at position t tells of token t + 1
            batch["named_log_ratios"] = head.log_ratios(states[mask], ids[mask], top_ids[mask])

        return head.listen(look_up)

    def get_penalty(self, per_token_logps, batch):
        if self.teacher_scorer is None:
            if self.trrd.alpha < 1.0 or self._has_kl:
                raise RuntimeError(
                    "`alpha` or `teacher_kl_coef` was changed in training, but this trainer was made without a teacher. "
                    "Make it with a `teacher_model`, and with the highest say that the teacher is to have."
                )
            return None
        if "teacher_mask" not in batch:
            raise patched("its rollouts did not come by the teacher")
        self.log_value("teacher/kl_coef", self._kl_coef)
        if self._kl_coef == 0.0 or "teacher_kl_on" not in batch:  # raised since these rollouts were made
            return None
        mask, per_token_logps = self._kl_mask(batch), per_token_logps.float()
        if "named_log_ratios" in batch:
            log_probs = batch["named_log_ratios"] + per_token_logps[mask].unsqueeze(-1)
            kl = forward_kl(log_probs, batch["teacher_top_logps"][mask])
        else:
            teacher = batch["teacher_per_token_logps"][mask]
            kl = reverse_kl(per_token_logps[mask], teacher, self.trrd.teacher_log_ratio_clip)
        kl = torch.zeros_like(per_token_logps).masked_scatter(mask, kl)
        self.log_means({"teacher/kl": (kl.detach(), mask)})
        weight = batch["teacher_weight"].unsqueeze(1) if "teacher_weight" in batch else 1.0
        return self._kl_coef * weight * kl

    def get_anchor(self, per_token_logps, old_per_token_logps, batch):
        if self.is_distilling:
            batch["advantages"] = torch.zeros_like(batch["advantages"])
            return None
        if self.teacher_scorer is None or self.trrd.alpha == 1.0:
            return None
        teacher_mask = batch["teacher_mask"]
        # Under FSDP2 with bf16 the student's log-probabilities come out in bf16: TRRD compares in float32
        per_token_logps, old_per_token_logps = per_token_logps.float(), old_per_token_logps.float()
        if self.args.teacher_credit:
            per_token_logps = old_per_token_logps  # credit is for what was sampled, however the student moves on
        weight = batch["teacher_weight"].unsqueeze(1) if "teacher_weight" in batch else None
        anchor, diagnostics = self.trrd(
            per_token_logps, old_per_token_logps, batch["teacher_per_token_logps"], teacher_mask, weight
        )
        metrics = {f"teacher/{name}": (values, teacher_mask) for name, values in diagnostics.items()}
        if "teacher_index" in batch:
            for number, name in enumerate(self.teacher_scorer.scorers):
                mine = (batch["teacher_index"] == number).unsqueeze(1).expand_as(teacher_mask)
                metrics[f"teacher/{name}/log_ratio"] = (diagnostics["log_ratio"], teacher_mask & mine)
                metrics[f"teacher/{name}/tokens"] = (mine.float(), teacher_mask)
        advantages = _two_dimensional(batch["advantages"])
        for name, is_side in (("rewarded", advantages > 0), ("punished", advantages < 0)):
            metrics[f"teacher/log_ratio_{name}"] = (diagnostics["log_ratio"], teacher_mask & is_side)

        if self.args.teacher_credit:
            self.log_means(metrics)
            batch["advantages"] = advantages * ((anchor - old_per_token_logps) * advantages.sign()).exp()
            return None
        if self.loss_type in CLIPPED_LOSS_TYPES:
            weights = self.loss_mask(batch)
            log_ratios = [(per_token_logps - other).detach() for other in (anchor, old_per_token_logps)]
            if self.importance_sampling_level == "sequence":
                log_ratios = [sequence_log_ratio(log_ratio, weights) for log_ratio in log_ratios]
                weights = torch.ones_like(log_ratios[0])
            causes = clip_causes(*log_ratios, advantages, self.epsilon_low, self.epsilon_high)
            metrics |= {f"clip_ratio/{name}": (clipped, weights) for name, clipped in causes.items()}
        self.log_means(metrics)
        return anchor

    def see_tokens(self, *compared):
        if self.rollout_log is not None:
            self.rollout_log.see(*compared)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            info = getattr(self.train_dataset, "info", None)
            dataset_name = dataset_name or getattr(info, "dataset_name", None)
            write_model_card(self, self.run_record.record["teachers"], dataset_name)


def _by_name(teacher_model) -> dict:
    """Teachers by name, of which a single one has none."""
    if isinstance(teacher_model, dict):
        return teacher_model
    return {} if teacher_model is None else {"": teacher_model}


def _datasets(dataset) -> Iterable:
    return dataset.values() if isinstance(dataset, dict) else [dataset]


def check_writable(folder: str):
    """Raises an `OSError` if no file can be made in a folder, before training has something to lose."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"`output_dir={folder!r}` can't be written to, so the student couldn't be saved: {error}"
        ) from error


def _two_dimensional(advantages: torch.Tensor) -> torch.Tensor:
    return advantages if advantages.dim() == 2 else advantages.unsqueeze(1)


def read_weights(values: Iterable[float | None]) -> torch.Tensor:
    """The column `teacher_weight`, `float32`, 1 where it is `None`. Raises a `ValueError` if it leaves `[0, 1]`."""
    weights = torch.tensor([1.0 if value is None else value for value in values], dtype=torch.float32)
    if not ((weights >= 0.0) & (weights <= 1.0)).all():
        wrong = weights[~((weights >= 0.0) & (weights <= 1.0))][0].item()
        raise ValueError(
            f"The dataset's column `teacher_weight` must be in [0, 1] (0: GRPO, 1: the teacher's full say), but has {wrong}."
        )
    return weights


def _share_weights(model, teacher_model) -> bool:
    modules = [m for m in (model, teacher_model) if isinstance(m, torch.nn.Module)]
    return len(modules) == 2 and not {id(p) for p in modules[0].parameters()}.isdisjoint(
        id(p) for p in modules[1].parameters()
    )
