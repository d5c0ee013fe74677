"""Distil by our loss (prunekit/training/distillation_loss.py) instead of ms-swift's. distil.sh loads this.

    swift rlhf --rlhf_type gkd --external_plugins plugins/distillation.py ...

All flags keep their meaning. With --gkd_logits_topk K ms-swift 4.6 renormalises teacher and student inside the
teacher's K likeliest tokens, and doesn't see what the student puts elsewhere; here all other tokens together are one
more. All is computed in fp32. Liger's own loss (--use_liger_kernel true) stays what it is.

    PRUNEKIT_FILL_CACHE=runs/cache swift rlhf --rlhf_type gkd --model TEACHER --gkd_logits_topk 8 ...
    swift rlhf --rlhf_type gkd --teacher_model_server runs/cache --gkd_logits_topk 8 --lmbda 0 ...

The first line trains nothing, but has the teacher say of all rows what the second asks (CACHE=runs/cache of distil.sh).
"""

import os

from swift.trainers.trainer_factory import TrainerFactory

# By name: the trainer's imports take seconds, and a rollout server that loads this needs none.
trainer = "CacheFiller" if os.environ.get("PRUNEKIT_FILL_CACHE") else "DistillationTrainer"
TrainerFactory.TRAINER_MAPPING["gkd"] = f"prunekit.training.distillation_trainer.{trainer}"
