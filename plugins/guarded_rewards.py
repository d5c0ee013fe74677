"""No reward ends a run: a row that one fails on goes without it, and is counted. rl_run.sh loads this.

    swift rlhf --rlhf_type grpo --external_plugins plugins/guarded_rewards.py plugins/ocr_rewards.py ...

To fail is to raise, to return NaN or infinity, or not one value for each completion. ms-swift adds 0 for such a row, as
for a reward of None; W&B and logging.jsonl have rewards/NAME/failed. A reward that fails on all of its first rows does
end the run, before its first step.
"""

from swift.trainers.trainer_factory import TrainerFactory

TrainerFactory.TRAINER_MAPPING["grpo"] = "prunekit.training.reinforcement_trainer.GuardedGRPOTrainer"
