"""What plugins/head_rates.py gives ms-swift: its own optimizer, with rates by head."""

import os

from swift.optimizers import OptimizerCallback
from swift.utils import is_master

from prunekit.checkpoint import open_checkpoint

from .head_rates import HeadRates, Rates, freeze_others, known_scores

PRESETS = {
    "head_rates": {},
    "active_heads": {"others": 0.0, "weak_share": 0.0},
    "important_heads": {"others": 0.0, "weak": 0.0, "weak_share": 0.5},
}


class HeadRatesOptimizer(OptimizerCallback):
    """By the name that --optimizer gives (PRESETS) and HEAD_RATES. PruneKitError where rates would be undone."""

    def create_optimizer(self, model=None):
        trainer, name = self.trainer, self.args.optimizer
        settings = Rates.parse(os.environ.get("HEAD_RATES", ""), **PRESETS[name])
        settings.check_training(name, trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled, self.args.tuner_type)
        module = trainer.model if model is None else model
        checkpoint = open_checkpoint(trainer.model_info.model_dir)
        rates = HeadRates(module, checkpoint, settings, known_scores(checkpoint), self.say)
        if not settings.others:
            freeze_others(module, rates)
        optimizer = super().create_optimizer(model)
        rates.attach(optimizer)
        return optimizer

    def say(self, said: str) -> None:
        if is_master():
            print(f"--optimizer {self.args.optimizer}: {said}")
