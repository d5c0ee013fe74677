"""What a causal model makes of a batch, its output head left out or in parts: states, labels, token_acc and loss."""

from collections.abc import Iterable
from typing import Any


def model_inputs(model, batch: dict[str, Any]) -> dict[str, Any]:
    """A collated batch as arguments of the model's forward: on its device, no labels, no cache."""
    not_inputs = ("labels", "text_position_ids", "loss_scale")  # the last two are for ms-swift's trainer
    inputs = {key: value for key, value in batch.items() if key not in not_inputs}
    moved = {key: value.to(model.device) for key, value in inputs.items() if hasattr(value, "to")}
    return inputs | moved | {"use_cache": False}


class _Final(Exception):
    """Carries what enters the output head."""


def final_states(model, batch: dict[str, Any]):
    """What the output head gets for a batch: (batch, length, hidden). The head itself isn't run."""

    def stop(_, inputs):
        raise _Final(inputs[0])

    with model.get_output_embeddings().register_forward_pre_hook(stop):
        try:
            model(**model_inputs(model, batch))
        except _Final as reached:
            return reached.args[0]
    raise RuntimeError(f"{type(model).__name__} doesn't call its output head")


def counted_states(states, labels):
    """The states (n, hidden) that predict a label other than -100, their labels (n,) and rows in the batch (n,)."""
    labels = labels[:, 1:].to(states.device)
    counted = labels != -100
    return states[:, :-1][counted], labels[counted], counted.nonzero()[:, 0]


def logits_in_parts(model, states):
    """(slice, fp32 logits (part, vocabulary)) of states (n, hidden): parts that fit a CPU's cache are twice as fast."""
    import torch

    head = model.get_output_embeddings()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    size = 128 if states.device.type == "cpu" else 2048
    for start in range(0, len(states), size):
        logits = head(states[start : start + size]).float()
        yield slice(start, start + size), torch.tanh(logits / cap) * cap if cap else logits


def score_batch(model, batch: dict[str, Any]):
    """Of a batch's labels but -100: is the likeliest token the label (n,), its loss in nats (n,), its row (n,)."""
    import torch

    with torch.inference_mode():
        states, labels, rows = counted_states(final_states(model, batch), batch["labels"])
        right = torch.zeros_like(labels, dtype=torch.bool)
        losses = torch.zeros_like(labels, dtype=torch.float32)
        for part, logits in logits_in_parts(model, states):
            right[part] = logits.argmax(-1) == labels[part]
            losses[part] = torch.nn.functional.cross_entropy(logits, labels[part], reduction="none")
    return right, losses, rows


def backward_loss(model, batch: dict[str, Any]) -> None:
    """Gradients of the sum of a batch's next-token losses, in nats; the output head is run in parts, forth and back."""
    import torch

    states, labels, _ = counted_states(final_states(model, batch), batch["labels"])
    leaf = states.detach().requires_grad_()
    for part, logits in logits_in_parts(model, leaf):
        torch.nn.functional.cross_entropy(logits, labels[part], reduction="sum").backward()
    states.backward(leaf.grad)


def score_batches(model, batches: Iterable[dict[str, Any]]) -> dict[str, float]:
    """token_acc and mean loss (nats per token) over all labels but -100, in batches of a causal model's inputs."""
    right = total = 0
    loss = 0.0
    for batch in batches:
        found, losses, _ = score_batch(model, batch)
        right += int(found.sum())
        loss += float(losses.double().sum())
        total += len(found)
    return {"token_acc": right / total, "loss": loss / total}


def loss_by_row(model, batches: Iterable[dict[str, Any]]):
    """The sum of the losses of each row's labels but -100, in nats: (rows,), fp64."""
    import torch

    found = []
    for batch in batches:
        _, losses, rows = score_batch(model, batch)
        sums = torch.zeros(len(batch["labels"]), dtype=torch.float64, device=losses.device)
        found.append(sums.index_add(0, rows, losses.double()))
    return torch.cat(found)
