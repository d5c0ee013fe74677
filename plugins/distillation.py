"""Distil by our loss (prunekit/training/distillation_loss.py) instead of ms-swift's. distil.sh loads this.

    swift rlhf --rlhf_type gkd --external_plugins plugins/distillation.py ...

All flags keep their meaning. With --gkd_logits_topk K ms-swift 4.6 renormalises teacher and student inside the
teacher's K likeliest tokens, and doesn't see what the student puts elsewhere; here all other tokens together are one
more. All is computed in fp32. Liger's own loss (--use_liger_kernel true) stays what it is.
"""

from swift.trainers.trainer_factory import TrainerFactory

# By name: the trainer's imports take seconds, and a rollout server that loads this needs none.
TrainerFactory.TRAINER_MAPPING["gkd"] = "prunekit.training.distillation_trainer.DistillationTrainer"
