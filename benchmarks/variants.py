"""Controls and what was tried, which are no settings of the library: `RLADTrainer` with one thing changed."""

import torch

from trl_rlad import RLADTrainer
from trl_rlad.trrd import clip_causes


class NormalizedCreditTrainer(RLADTrainer):
    """The credit of Distilled RL (arXiv 2607.17247): divided by its geometric mean over the completion, rewarded rows only."""

    def get_anchor(self, per_token_logps, old_per_token_logps, batch):
        mask = batch["teacher_mask"]
        advantages = batch["advantages"].view(len(mask), -1)
        anchor, _ = self.trrd(old_per_token_logps, old_per_token_logps, batch["teacher_per_token_logps"], mask)
        credit = (anchor - old_per_token_logps) * mask
        credit = credit - credit.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
        batch["advantages"] = torch.where(advantages > 0, advantages * credit.exp(), advantages)


class ShuffledTrainer(RLADTrainer):
    """A control: what the teacher said, in another order. Anything that is still gained doesn't come from the teacher."""

    def extend_rollout(self, batch, rewards_per_func, rows):
        batch = super().extend_rollout(batch, rewards_per_func, rows)
        mask = batch["teacher_mask"]
        order = torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(self.state.global_step))
        for name in ("teacher_per_token_logps", "teacher_top_ids", "teacher_top_logps"):
            if name in batch:
                shuffled = batch[name].clone()
                shuffled[mask] = batch[name][mask][order]
                batch = {**batch, name: shuffled}
        return batch


class RandomGateTrainer(RLADTrainer):
    """A control: GRPO that drops as many tokens as the teacher would have clipped, at random."""

    def get_anchor(self, per_token_logps, old_per_token_logps, batch):
        anchor = super().get_anchor(per_token_logps, old_per_token_logps, batch)
        advantages = batch["advantages"].view(len(anchor), -1)
        log_ratios = [(per_token_logps - other).detach() for other in (anchor, old_per_token_logps)]
        causes = clip_causes(*log_ratios, advantages, self.epsilon_low, self.epsilon_high)
        mask = batch["teacher_mask"]
        rate = (causes["high_by_teacher"] | causes["low_by_teacher"])[mask].float().mean().nan_to_num()
        batch["advantages"] = advantages * (torch.rand(mask.shape) >= rate)
