"""What every knockout run on a CPU imports: loaded once in the fork server, so that a run doesn't pay for it."""

import torch  # noqa: F401
import transformers.models.auto.modeling_auto  # noqa: F401
import wandb  # noqa: F401
from swift import sft_main  # noqa: F401
from swift.trainers import Seq2SeqTrainer  # noqa: F401
