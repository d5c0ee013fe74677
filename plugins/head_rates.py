"""Optimizers that know which attention heads were pruned, and train the others.

    bash full_run.sh --optimizer head_rates      # pruned heads stay as they are, weak ones learn slowly, the rest fully
    bash full_run.sh --optimizer active_heads    # nothing but the heads that are left is trained
    bash full_run.sh --optimizer important_heads # nothing but the half of each layer's heads that scores highest

HEAD_RATES='weak=0.1 weak_share=0.25 refresh=100' in the environment sets the rate of weak heads, how many of a layer's
heads are weak, and after how many steps the gradients say anew which. At first the scores that width_cut.py left in
pruning_info.json say it, or the weights. 'weak_below=0.2' calls those weak that score less than a fifth of their
layer's most important head. With 'adaptive=100' every hundred steps a masked head whose gradient is larger than that of
the weakest one comes back in its place: as many stay masked. For full training, on one device or by DDP: DeepSpeed
(DEEPSPEED= turns it off) and FSDP keep copies of the weights that would undo it. Weights of 16 bits round a weak head's
steps away, and are refused: float32 under --bf16 true.
"""

from swift.optimizers import optimizers_map

from prunekit.training.head_rates_optimizer import HeadRatesOptimizer

optimizers_map["head_rates"] = HeadRatesOptimizer
optimizers_map["active_heads"] = HeadRatesOptimizer
optimizers_map["important_heads"] = HeadRatesOptimizer
