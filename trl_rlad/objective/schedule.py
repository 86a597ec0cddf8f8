"""What the loss consists of at each step: the one place that decides what part the teacher has in it."""

from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True)
class Terms:
    """The terms of the loss at one step of training, see [`Objective.at`]."""

    alpha: float  # weight of the old policy in the ratio or the credit
    teacher_log_ratio_clip: float | None  # in nats
    ratio: bool  # whether the likelihood ratio is TRRD's
    credit: bool  # whether the teacher weighs the advantages instead
    has_kl: bool  # whether a batch generated now is scored for the divergence, see `Objective.at`
    kl_coef: float  # its coefficient now
    kl_on: str  # "all", or "failed": the completions that have it once distillation is over
    top_k: int  # number of tokens that the teacher names; 0 for a divergence that grades the sampled one
    distilling: bool  # whether the advantages are zero, so that the divergence is all there is

    @property
    def scores_advantages(self) -> bool:
        """Whether a batch generated now is scored where it has an advantage: distillation may end while it is used."""
        return self.alpha < 1.0

    @property
    def asks_teacher(self) -> bool:
        """Whether a batch generated now is scored at all."""
        return self.scores_advantages or self.has_kl


@dataclass(frozen=True)
class Objective:
    """The settings that say what part the teacher has in the loss, as in [`RLADConfig`]."""

    alpha: float
    teacher_log_ratio_clip: float | None
    teacher_credit: bool
    teacher_kl_coef: float
    teacher_kl_coef_final: float | None
    teacher_kl: str
    teacher_top_k: int
    teacher_kl_on: str
    distillation_fraction: float

    @classmethod
    def from_config(cls, config: Any) -> "Objective":
        """The objective of an [`RLADConfig`]."""
        return cls(**{each.name: getattr(config, each.name) for each in fields(cls)})

    @property
    def has_kl(self) -> bool:
        """Whether there is a divergence from the teacher in the loss at any time."""
        return any((self.distillation_fraction, self.teacher_kl_coef, self.teacher_kl_coef_final))

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher has a part in the loss at any time."""
        return self.alpha < 1.0 or self.has_kl

    @property
    def top_k(self) -> int:
        """Number of tokens that the teacher names where there is a divergence."""
        return self.teacher_top_k if self.has_kl and self.teacher_kl == "forward" else 0

    def at(self, progress: float) -> Terms:
        """
        The terms of the loss when the share `progress` of training is done, in `[0, 1]`.

        The coefficient moves from `teacher_kl_coef` to `teacher_kl_coef_final` in a straight line, exact at both ends;
        during the first `distillation_fraction` it is 1, on all completions.
        """
        # Of all of training, the evaluation at its end is a part
        distilling = progress < self.distillation_fraction or self.distillation_fraction == 1.0
        start, end = self.teacher_kl_coef, self.teacher_kl_coef_final
        kl_coef = start if end is None else (1.0 - progress) * start + progress * end
        kl_coef = 1.0 if distilling else kl_coef
        # The coefficient may be 0 now and rise while a batch that is generated now is used
        has_kl = bool(kl_coef or end)
        compares = self.alpha < 1.0 and not distilling
        return Terms(
            alpha=self.alpha,
            teacher_log_ratio_clip=self.teacher_log_ratio_clip,
            ratio=compares and not self.teacher_credit,
            credit=compares and self.teacher_credit,
            has_kl=has_kl,
            kl_coef=kl_coef,
            kl_on=self.teacher_kl_on,
            top_k=self.top_k if has_kl else 0,
            distilling=distilling,
        )
