"""What was tried to better the paper's objective and is no setting of the library: `RLADTrainer` with one thing changed."""

from trl_rlad import RLADTrainer
from trl_rlad.trrd import clip_causes


class GateTrainer(RLADTrainer):
    """TRRD's ratio only decides which tokens are dropped, and GRPO's carries the gradient of the others."""

    def get_anchor(self, per_token_logps, old_per_token_logps, batch):
        super().get_anchor(per_token_logps, old_per_token_logps, batch)
        scores = (per_token_logps.detach(), old_per_token_logps, batch["teacher_per_token_logps"])
        anchor, _ = self.trrd(*scores, batch["teacher_mask"])
        advantages = batch["advantages"].view(len(anchor), -1)
        log_ratios = [scores[0] - other for other in (anchor, old_per_token_logps)]
        causes = clip_causes(*log_ratios, advantages, self.epsilon_low, self.epsilon_high)
        dropped = causes["high_by_teacher"] | causes["low_by_teacher"]
        batch["advantages"] = advantages.masked_fill(dropped, 0.0)


class TrustedKLTrainer(GateTrainer):
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
