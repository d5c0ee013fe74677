"""Train sparse models by ms-swift: keep their zeros, make more of them on the way, or move them.

    swift sft --external_plugins plugins/sparsity.py --callbacks keep_zeros ...
    PRUNEKIT_GRADUAL='sparsity=0.7 events=5 schedule=exponential worse=0.15' swift sft ... --callbacks gradual_pruning
    PRUNEKIT_DYNAMIC='interval=100 share=0.3' swift sft ... --callbacks dynamic_sparsity

For full training (--tuner_type full) of any kind: sft, rlhf --rlhf_type gkd or grpo, in one process or several by DDP
or DeepSpeed ZeRO-2 (dynamic_sparsity: DDP only), resumed or not; keep_zeros for LoRA, too. The settings are the fields
of `Gradual` and `Dynamic` in prunekit/training/zeros_settings.py. What happened at each step is in sparsity.json in the
output folder, and in W&B.
"""

from swift.callbacks import callbacks_map

from prunekit.training.zeros import DynamicSparsity, GradualPruning, KeepZeros
from prunekit.training.zeros_settings import settings_of

callbacks_map["keep_zeros"] = lambda args, trainer: KeepZeros()
callbacks_map["gradual_pruning"] = lambda args, trainer: GradualPruning(settings_of("gradual_pruning"), trainer)
callbacks_map["dynamic_sparsity"] = lambda args, trainer: DynamicSparsity(settings_of("dynamic_sparsity"), trainer)
