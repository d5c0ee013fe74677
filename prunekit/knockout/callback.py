"""The callback of plugins/knockout_layers.py: ms-swift trains a model from which it has cut layers in memory."""

import gc
import os

from swift.callbacks.base import TrainerCallback

from prunekit.checkpoint import open_checkpoint
from prunekit.errors import PruneKitError
from prunekit.surgery.in_memory import cut

from .removal import parse_removals, plan_without


class KnockoutLayers(TrainerCallback):
    """Cuts the layers that PRUNEKIT_REMOVE names. PruneKitError for a model wrapped by another tuner than LoRA."""

    def on_init_end(self, args, state, control, **kwargs):
        # When a callback is made the Trainer has no model yet; here it has one, and no optimizer for it.
        model = self.trainer.model
        if hasattr(model, "get_base_model"):  # LoRA and other adapters of PEFT
            model = model.get_base_model()
        checkpoint = open_checkpoint(self.trainer.model_info.model_dir)
        plan = plan_without(checkpoint, parse_removals(os.environ.get("PRUNEKIT_REMOVE", "")))
        try:
            cut(model, plan)
        except ValueError as error:  # another tuner has wrapped it
            raise PruneKitError(f"{error}: knock layers out with --tuner_type full or lora") from None
        gc.collect()
