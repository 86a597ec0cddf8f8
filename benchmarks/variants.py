"""
Controls and what was tried, which are no settings of the library: guides of an `RLADTrainer` with one thing changed.
"""

from dataclasses import replace

import torch

from trl_rlad.objective.guidance import Guidance, two_dimensional
from trl_rlad.objective.trrd import TRRDLoss
from trl_rlad.teacher_guide import TeacherGuide


class NormalizedCreditGuide(TeacherGuide):
    """
    The credit of Distilled RL (arXiv 2607.17247): divided by its geometric mean over the completion, rewarded rows
    only.
    """

    def guide(self, per_token_logps, old_per_token_logps, batch):
        terms, advantages = self.terms, two_dimensional(batch["advantages"])
        scores = self.read_scores(batch, terms)
        trrd = TRRDLoss(terms.alpha, terms.teacher_log_ratio_clip)
        anchor, _ = trrd(old_per_token_logps, old_per_token_logps, scores.logps, scores.mask)
        credit = (anchor - old_per_token_logps) * scores.mask
        credit = credit - credit.sum(1, keepdim=True) / scores.mask.sum(1, keepdim=True).clamp(min=1)
        return Guidance(advantages=torch.where(advantages > 0, advantages * credit.exp(), advantages))


class ShuffledGuide(TeacherGuide):
    """
    A control: what the teacher said, in another order. Anything that is still gained doesn't come from the teacher.
    """

    def finish(self, batch, rewards_per_func, rows):
        batch = super().finish(batch, rewards_per_func, rows)

        def shuffle(values):
            generator = torch.Generator().manual_seed(self.trainer.state.global_step)
            return values[torch.randperm(len(values), generator=generator)]

        logps, mask = batch["teacher_per_token_logps"], batch["teacher_mask"]
        batch = {**batch, "teacher_per_token_logps": logps.masked_scatter(mask, shuffle(logps[mask]))}
        for name in ("teacher_top_ids", "teacher_top_logps"):
            if name in batch:
                batch[name] = list(shuffle(torch.cat(batch[name])).split(list(map(len, batch[name]))))
        return batch


class GateGuide(TeacherGuide):
    """GRPO without the tokens that the teacher would have clipped: of RLAD's ratio the gate, and not the weight."""

    def guide(self, per_token_logps, old_per_token_logps, batch):
        causes = super().guide(per_token_logps, old_per_token_logps, batch).causes
        return Guidance(advantages=two_dimensional(batch["advantages"]) * ~_gated(causes))


def share_out(advantages, old_logps, teacher_logps):
    """Praise as far as the teacher accepts a token, blame as far as it doesn't."""
    accepted = (teacher_logps - old_logps).clamp(max=0).exp()
    return advantages * torch.where(advantages > 0, accepted, 1 - accepted)


class AcceptanceGuide(TeacherGuide):
    """
    Tried as a better form of the ratio: GRPO whose praise counts as far as the teacher accepts a token, and whose
    blame as far as it doesn't, with the probability min(1, teacher / student) of speculative sampling. `alpha` is the
    part of GRPO's own advantages.
    """

    @property
    def terms(self):
        return replace(super().terms, ratio=False)

    def guide(self, per_token_logps, old_per_token_logps, batch):
        scores, advantages = self.read_scores(batch, self.terms), two_dimensional(batch["advantages"])
        part = scores.mask * (1 - self.terms.alpha) * (1.0 if scores.weight is None else scores.weight)
        shared = torch.lerp(advantages, share_out(advantages, old_per_token_logps, scores.logps), part)
        penalty = super().guide(per_token_logps, old_per_token_logps, batch).penalty
        return Guidance(advantages=shared, penalty=penalty)


class RandomGateGuide(TeacherGuide):
    """A control: GRPO that drops as many tokens as the teacher would have clipped, at random."""

    def guide(self, per_token_logps, old_per_token_logps, batch):
        causes = super().guide(per_token_logps, old_per_token_logps, batch).causes
        mask, advantages = batch["teacher_mask"], two_dimensional(batch["advantages"])
        rate = _gated(causes)[mask].float().mean().nan_to_num()
        return Guidance(advantages=advantages * (torch.rand(mask.shape) >= rate))


def _gated(causes):
    return causes["high_by_teacher"] | causes["low_by_teacher"]
