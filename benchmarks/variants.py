"""What was tried to better the paper's objective and is no setting of the library: `RLADTrainer` with one thing changed."""

import torch

from trl_rlad import RLADTrainer


class TrustedKLTrainer(RLADTrainer):
    """The teacher KL only on prompts where the teacher finds the better completions likelier, or where none succeeded."""

    def extend_rollout(self, batch, rewards_per_func):
        batch = super().extend_rollout(batch, rewards_per_func)
        mask = batch["teacher_mask"]
        likes = (batch["teacher_per_token_logps"] * mask).sum(1) / mask.sum(1).clamp(min=1)
        likes = (likes * batch["advantages"]).view(-1, self.num_generations).sum(1)
        succeeded = (rewards_per_func * self.reward_weights).nansum(1) > self.args.success_reward
        unsolved = ~succeeded.view(-1, self.num_generations).any(1)
        rows = ((likes > 0.0) | unsolved).repeat_interleave(self.num_generations)
        return {**batch, "teacher_kl_rows": batch["teacher_kl_rows"] & rows}


class CreditTrainer(RLADTrainer):
    """GRPO whose advantage is weighted by `(pi_T / pi_S)^((1 - alpha) sign A)`: TRRD's weight, turned round."""

    def get_anchor(self, per_token_logps, old_per_token_logps, batch):
        clip, advantages = self.trrd.teacher_log_ratio_clip, batch["advantages"].unsqueeze(1)
        log_ratio = (batch["teacher_per_token_logps"] - per_token_logps.detach()).clamp(-clip, clip)
        weight = torch.where(batch["teacher_mask"], (1 - self.trrd.alpha) * log_ratio * advantages.sign(), 0.0).exp()
        batch["advantages"] = advantages * weight
