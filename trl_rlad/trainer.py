"""The trainer of RLAD."""

import inspect
import textwrap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any
from weakref import WeakValueDictionary

import torch
from accelerate.logging import get_logger
from datasets import Dataset
from transformers import PreTrainedModel

from ._trl.names import get_config_model_id
from ._trl.seam import GuidedGRPOTrainer
from .checkpoints import RunRecord, describe_settings, last_checkpoint
from .columns import NAMES, NO_PROMPTS, check_prompts, check_readers, number_teachers, read_weights
from .config import RLADConfig, did_you_mean
from .model_card import write_model_card
from .rollout_log import RolloutLog
from .scoring import RowScorer, ServedRowScorer, TeacherScorer
from .scoring.watchdog import check_agreement
from .teacher_guide import TeacherGuide
from .teachers import TextContract, TokenContract, check_settings_of_servers, create_teacher
from .teachers.contract import PROMPTS_TO_MEASURE


logger = get_logger(__name__)


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
            As in [`~trl.GRPOTrainer`]. With `distillation_fraction=1.0` no `reward_funcs` are needed.
        args ([`RLADConfig`], *optional*):
            Configuration for this trainer. If `None`, a default configuration is used.
        *grpo_args, **grpo_kwargs:
            All other arguments of [`~trl.GRPOTrainer`], in its order.
        teacher_model (`str`, [`~transformers.PreTrainedModel`] or `dict` of these by name, *optional*):
            The teacher, by its name on the Hub, its local path (of an adapter too), or as a loaded model; or `"base"`,
            the base model of a student that trains an adapter, or `"self"`, the student as it is, which reads the
            dataset's column `teacher_prompt`. With another tokenizer than the student's it is given text. Of several
            teachers, each scores the rows that have its name in the dataset's column `teacher_id`.
            Beside `teacher_server_urls` it is the served model's name, or a name or path that has its tokenizer, and
            may be left out; without them, only for `alpha=1.0` without a `teacher_kl_coef`.

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
                author       = {Zhaoyang Zhang and Shuli Jiang and Yantao Shen and Yuting Zhang and Dhananjay Ram and
                                Shuo Yang and Zhuowen Tu and Wei Xia and Stefano Soatto},
                year         = 2026,
                eprint       = {arXiv:2602.22495},
            }"""),
    }

    own_columns = NAMES

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
        teachers = check_arguments(model, args, teacher_model, grpo_kwargs)
        names = list(inspect.signature(GuidedGRPOTrainer).parameters)[3:]  # after the three above
        check_inputs(dict(zip(names, grpo_args, strict=False)) | grpo_kwargs, reward_funcs, args)
        check_ranks(args, teachers)
        rewards: Any = reward_funcs or (no_reward if args.distillation_fraction == 1.0 else None)
        super().__init__(model, rewards, args, *grpo_args, **grpo_kwargs)

        self._check_data(teachers)
        self.teacher_scorer: Any = self._create_scorer(teachers) if teachers else None
        keeps_rollouts = args.log_rollouts and (teachers or args.log_completions)
        self.rollout_log = RolloutLog(self) if keeps_rollouts else None
        self.run_record = RunRecord(args, self.teacher_scorer.teachers if self.teacher_scorer else {})
        for callback in filter(None, (self.teacher_scorer, self.rollout_log, self.run_record)):
            self.add_callback(callback)
        self.guide = TeacherGuide(self, self.teacher_scorer, self.rollout_log)
        if args.should_save:
            check_writable(str(args.output_dir))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        if resume_from_checkpoint is True:  # with none at all, transformers says so
            resume_from_checkpoint = last_checkpoint(str(self.args.output_dir)) or True
        if resume_from_checkpoint is not True and resume_from_checkpoint:
            self.run_record.compare(resume_from_checkpoint)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _check_data(self, teachers):
        """Refuses datasets with a column of ours that can't be read. Streams are checked as they come."""
        makes_prompts = self.rollout_func is not None or self.environment_factories is not None
        for dataset in self._datasets():
            columns = getattr(dataset, "column_names", None) or ()
            if "teacher_prompt" in columns and makes_prompts:
                logger.warning(
                    "A row with a `teacher_prompt` has its teacher read that as it stands: nothing of what a "
                    "`rollout_func` or the `reset` of an environment has made of the prompt is added."
                )
            if columns and "teacher_prompt" not in columns and "self" in teachers.values():
                raise ValueError(NO_PROMPTS)
            if not isinstance(dataset, Dataset):
                continue
            if "teacher_weight" in columns:
                read_weights(dataset["teacher_weight"])
            if "teacher_prompt" in columns:
                prompts = dataset.select_columns("teacher_prompt")[:PROMPTS_TO_MEASURE]["teacher_prompt"]
                check_prompts(prompts)
                if "self" in teachers.values() and not any(prompts):
                    raise ValueError(NO_PROMPTS)
            if "teacher_id" in columns and "" in teachers:
                logger.warning(
                    "The dataset's column `teacher_id` isn't read, as there is one teacher. For several, pass "
                    "`teacher_model` as a dictionary of them by name."
                )
            elif teachers and "" not in teachers:
                if "teacher_id" not in columns:
                    raise ValueError(
                        "There are several teachers by name, so each row of the dataset needs the name of its own in "
                        f"a column `teacher_id`. The columns are {', '.join(columns)}."
                    )
                number_teachers(dataset["teacher_id"], teachers)

    def _datasets(self) -> list:
        """What is trained and evaluated on."""
        evaluation = self.eval_dataset
        return [self.train_dataset, *(evaluation.values() if isinstance(evaluation, dict) else [evaluation])]

    def _create_scorer(self, teachers):
        if self.loss_type == "vespo" and not self.args.teacher_credit:
            logger.warning(
                "VESPO weights a completion by the sum of its log-ratios. With `alpha < 1` the teacher's part of that "
                "sum grows with the length and mutes long completions. The paper's choice is `loss_type='grpo'`."
            )
        bases: WeakValueDictionary = WeakValueDictionary()  # which several teachers share that are adapters of it
        scorers = {}
        for name, teacher_model in teachers.items():
            try:
                scorers[name] = self._create_row_scorer(teacher_model, self.args.teacher_servers.get(name), bases)
            except ValueError as error:
                if not name:
                    raise
                raise ValueError(f"Teacher {name!r}: {error}") from error
        return TeacherScorer(scorers, self.args.teacher_timeout)

    def _create_row_scorer(self, teacher_model, urls, bases) -> RowScorer:
        args, tokenizer = self.args, self.tokenizer
        # The model that `sync_ref_model` has follow the student is what "self" lags behind as, where there is one
        student = (lambda: self.ref_model) if args.sync_ref_model else (lambda: self.model)
        teacher = create_teacher(teacher_model, args, self.accelerator, student, tokenizer, urls, bases)
        processor: Any = self.processing_class if self.is_vision_language_model else None
        contract = TokenContract.between(tokenizer, teacher, self.eos_token_ids, processor)
        if contract is None:
            if self.rollout_func is not None or self.environment_factories is not None:
                raise ValueError(
                    "`teacher_model` reads the student's token ids differently, so it has to be given the text, but "
                    "what a `rollout_func` or an environment makes of a prompt is known as token ids alone. Choose a "
                    "`teacher_model` that shares the student's tokenizer."
                )
            contract = TextContract(tokenizer, teacher, self.eos_token_ids, self.tools, self.chat_template_kwargs)
        for dataset in self._datasets():
            contract.check_dataset(dataset, tokenizer, self.max_completion_length)
        parts: Any = teacher, self.accelerator, args.teacher_tokens_per_batch, contract
        return ServedRowScorer(*parts, on_failure=args.on_teacher_failure) if urls else RowScorer(*parts)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None):
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            info = getattr(self.train_dataset, "info", None)
            write_model_card(
                self.args,
                self.state,
                self.accelerator.num_processes,
                self.run_record.record["teachers"],
                dataset_name or getattr(info, "dataset_name", None),
                self.hub_model_id,
                self._paper,
            )


def no_reward(completions, **kwargs) -> list[float]:
    """What TRL is given where the student only imitates, as it asks for some reward."""
    return [0.0] * len(completions)


def check_arguments(model, args: RLADConfig, teacher_model, grpo_kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Refuse what can't be trained with, before anything is loaded.

    Args:
        model, args, teacher_model, grpo_kwargs:
            As in [`RLADTrainer`].

    Returns:
        `dict[str, Any]`: the teachers by name, empty if none is needed. A single teacher's name is empty.
    """
    if not isinstance(args, RLADConfig):
        raise TypeError(
            f"`args` must be an `RLADConfig`, but is a `{type(args).__name__}`. `RLADConfig` takes all arguments "
            "of `GRPOConfig`."
        )
    known = [*inspect.signature(GuidedGRPOTrainer).parameters, "teacher_model"]
    if wrong := sorted(grpo_kwargs.keys() - set(known)):
        hint = " The teacher is passed as `teacher_model`." if "teacher" in wrong[0] else did_you_mean(wrong[0], known)
        raise TypeError(f"`RLADTrainer` has no argument `{wrong[0]}`.{hint}")
    servers = args.teacher_servers
    by_name = {"": teacher_model} if teacher_model is not None else {}
    by_name = teacher_model if isinstance(teacher_model, dict) else by_name
    teachers: dict[str, Any] = {**dict.fromkeys(servers), **by_name}
    if "" in teachers and len(teachers) > 1:
        raise ValueError(
            "Of `teacher_model` and `teacher_server_urls` one has several teachers by name, and the other has none of "
            "these names. Pass both as dictionaries."
        )
    if not args.needs_teacher:
        if teachers:
            logger.warning(
                "With `alpha=1.0` and no `teacher_kl_coef` or `distillation_fraction`, RLAD is GRPO and needs no "
                "teacher: `teacher_model` is not loaded, and the settings of the teacher have no effect."
            )
        return {}
    if not servers and teacher_model in (None, "", {}):
        names = ("distillation_fraction", "teacher_kl_coef", "teacher_kl_coef_final")
        setting = "alpha" if args.alpha < 1.0 else next(name for name in names if getattr(args, name))
        raise ValueError(
            f"`{setting}={getattr(args, setting)}` needs a teacher: pass it as the keyword argument `teacher_model` "
            "or name its server in `teacher_server_urls`, or set `alpha=1.0` without a `teacher_kl_coef` or "
            "`distillation_fraction` to train with GRPO."
        )
    if servers.keys() >= teachers.keys():
        check_settings_of_servers(args)
    if any(_share_weights(model, each) for each in teachers.values()):
        raise ValueError(
            "`teacher_model` shares its weights with the model that is trained, so it would move with the student. "
            'Pass its name or path, or a copy of it; for the base of a student with an adapter, pass "base"; for one '
            'that teaches itself what its `teacher_prompt` says, "self".'
        )
    return teachers


def check_inputs(given: dict[str, Any], reward_funcs, args: RLADConfig):
    """Refuse datasets and reward functions that don't fit together, before anything is loaded: see
    [`~trl_rlad.columns.check_readers`]. `given` are arguments of [`~trl.GRPOTrainer`] by name."""
    if given.get("environment_factory"):  # then prompts come from there, and TRL gives rewards other things
        return
    datasets = {"train_dataset": given.get("train_dataset")}
    evaluation = given.get("eval_dataset")
    named = evaluation if isinstance(evaluation, dict) else {}
    datasets |= {f"eval_dataset[{name!r}]": each for name, each in named.items()} or {"eval_dataset": evaluation}
    check_readers(datasets, [] if args.remove_unused_columns else reward_funcs)


def check_ranks(args: RLADConfig, teachers: dict[str, Any]):
    """Refuse processes that differ in what is trained, before one waits for what another doesn't do."""
    # A model object's weights are compared nowhere, and a path may be another one on each machine
    names = {
        name: Path(each).name if isinstance(each, str) else type(each).__name__ for name, each in teachers.items()
    }
    lengths = {"max_steps": args.max_steps, "num_train_epochs": args.num_train_epochs}
    check_agreement({**describe_settings(args), **lengths, "teacher_model": names}, args.ddp_timeout)


def check_writable(folder: str):
    """Raises an `OSError` if no file can be made in a folder, before training has something to lose."""
    try:
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"`output_dir={folder!r}` can't be written to, so the student couldn't be saved: {error}"
        ) from error


def _share_weights(model, teacher_model) -> bool:
    modules = [m for m in (model, teacher_model) if isinstance(m, torch.nn.Module)]
    return len(modules) == 2 and not {id(p) for p in modules[0].parameters()}.isdisjoint(
        id(p) for p in modules[1].parameters()
    )
