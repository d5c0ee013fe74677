"""ms-swift's GRPO trainer: rewards can't end a run (rewards.py), and losses are divided by a step's own tokens.

plugins/guarded_rewards.py loads it.
"""

import swift
import torch
from swift.rlhf_trainers import GRPOTrainer

from prunekit.data.rewards import GuardedReward, guard
from prunekit.errors import PruneKitError

from .distillation_loss import known_to

for name in ("_prepare_rewards", "_compute_rewards_per_func", "_compute_teacher_logps", "_prepare_batch_inputs"):
    if not hasattr(GRPOTrainer, name):
        raise PruneKitError(f"ms-swift {swift.__version__}: its GRPO trainer has no {name}; install ms-swift 4.6")


class GuardedGRPOTrainer(GRPOTrainer):
    """GRPO for which a row that a reward fails on is "not applicable"; rewards/NAME/failed counts them."""

    reward_funcs: list

    def _prepare_rewards(self, *args, **kwargs):
        super()._prepare_rewards(*args, **kwargs)
        self.reward_funcs = [
            reward if isinstance(reward, torch.nn.Module) else guard(reward, name)
            for reward, name in zip(self.reward_funcs, self.reward_func_names)  # behind them: a gym's, no function
        ]

    def _compute_rewards_per_func(self, samples):
        rewards = super()._compute_rewards_per_func(samples)
        guards = [reward for reward in self.reward_funcs if isinstance(reward, GuardedReward)]
        counts = torch.tensor([each.take_failed() for each in guards], device=self.accelerator.device)
        counts = self.accelerator.reduce(counts, "sum") if guards else counts
        metrics = self._metrics["train" if self.model.training else "eval"]
        for each, count in zip(guards, counts.tolist(), strict=True):
            metrics[f"rewards/{each.name}/failed"].append(count)
        return rewards

    def _compute_teacher_logps(self, model_inputs, *args, **kwargs):
        """Of a token that the teacher's embedding, padded to fewer rows, hasn't, it says what it says of padding."""
        if self.teacher_model is not None:
            teacher, padding = self.accelerator.unwrap_model(self.teacher_model), self.template.tokenizer.pad_token_id
            model_inputs = {**model_inputs, "input_ids": known_to(teacher, model_inputs["input_ids"], padding)}
        return super()._compute_teacher_logps(model_inputs, *args, **kwargs)

    def _prepare_batch_inputs(self, samples):
        """DAPO and CISPO divide by the tokens of an optimizer step; ms-swift does by those of a rollout, of several."""
        batches = super()._prepare_batch_inputs(samples)
        size = self.args.gradient_accumulation_steps
        if self.model.training and len(batches) % size == 0:  # else a step's batches are of several rollouts
            tokens = torch.stack([each["grpo_batch"].completion_mask.sum() for each in batches])
            tokens = self.accelerator.reduce(tokens.float(), "sum").view(-1, size).sum(1)
            for number, each in enumerate(batches):
                each["grpo_batch"].num_items_in_batch = tokens[number // size]
        return batches
