"""ms-swift's trainer, whose evaluations say perplexity. By itself: its imports take seconds."""

from swift.trainers import Seq2SeqTrainer

from prunekit.data.figures import perplexity


class TextsTrainer(Seq2SeqTrainer):
    """Of each evaluation's loss in nats a token, `eval_perplexity` goes to W&B and logging.jsonl, too."""

    def log(self, logs, *args, **kwargs):
        if "eval_loss" in logs:
            logs["eval_perplexity"] = perplexity(logs["eval_loss"])
        super().log(logs, *args, **kwargs)
