"""Optimizers that know which attention heads were pruned, and train the others.

    bash full_run.sh --optimizer head_rates      # pruned heads stay as they are, weak ones learn slowly, the rest fully
    bash full_run.sh --optimizer active_heads    # nothing but the heads that are left is trained

HEAD_RATES='weak=0.1 weak_share=0.25 refresh=100' in the environment sets the rate of weak heads, how many of a layer's
heads are weak, and after how many steps the gradients say anew which. At first the scores that width_cut.py left in
pruning_info.json say it, or the weights. For full training, on one device or by DDP: DeepSpeed (DEEPSPEED= turns it
off) and FSDP keep copies of the weights that would undo it. Weights of 16 bits round a weak head's steps away, and are
refused: float32 under --bf16 true.
"""

import os

from swift.optimizers import OptimizerCallback, optimizers_map

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.training.head_rates import HeadRates, Rates, freeze_others, known_scores

PRESETS = {"head_rates": {}, "active_heads": {"others": 0.0, "weak_share": 0.0}}


class HeadRatesOptimizer(OptimizerCallback):
    def create_optimizer(self, model=None):
        trainer, name = self.trainer, self.args.optimizer
        settings = Rates.parse(os.environ.get("HEAD_RATES", ""), **PRESETS[name])
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise PruneKitError(f"--optimizer {name}: works with plain DDP only; set DEEPSPEED= (empty)")
        if self.args.tuner_type != "full":
            raise PruneKitError(f"--optimizer {name}: works with --tuner_type full only")
        module = trainer.model if model is None else model
        checkpoint = open_checkpoint(trainer.model_info.model_dir)
        rates = HeadRates(module, checkpoint, settings, known_scores(checkpoint))
        if not settings.others:
            freeze_others(module, rates)
        optimizer = super().create_optimizer(model)
        rates.attach(optimizer)
        return optimizer


for name in PRESETS:
    optimizers_map[name] = HeadRatesOptimizer
