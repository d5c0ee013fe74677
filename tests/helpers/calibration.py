"""Made-up calibration data: random tokens, pictures among them, rows of text."""

import json

import torch

from prunekit.data.batches import Calibration


def text_batches(count, seed=0, rows=8, length=12):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(5, 100, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, length // 2 :] = 0  # one padded row a batch
        labels = torch.where(mask == 1, ids, -100)
        batches.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return batches


def picture_batches(count, seed):
    """A picture of 8 by 16 patches among 12 tokens, one row a batch."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        ids = torch.randint(5, 100, (1, 12), generator=generator)
        ids = torch.cat([ids[:, :2], torch.tensor([[122] + [120] * 32 + [123]]), ids[:, 2:]], 1)
        batches.append(
            {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "labels": torch.where(ids < 100, ids, -100),
                "pixel_values": torch.randn(128, 96, generator=generator),
                "image_grid_thw": torch.tensor([[1, 8, 16]]),
                "mm_token_type_ids": (ids == 120).int(),
            }
        )
    return batches


def data(fit=6, held_out=2):
    return Calibration(text_batches(fit), text_batches(held_out, seed=1), tokens=(fit + held_out) * 90)


def self_labelled(model, calibration):
    """The same data with the model's own answers as labels: then the uncut model has the lowest loss there is."""
    for batch in [*calibration.fit, *calibration.held_out]:
        with torch.no_grad():
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            answers = model(**inputs, use_cache=False).logits.argmax(-1).roll(1, dims=1)
        batch["labels"] = torch.where(batch["attention_mask"] == 1, answers, -100)
    return calibration


def write_texts(path, count=60):
    path.write_text("".join(json.dumps({"text": f"row {i} " * (1 + i % 7)}) + "\n" for i in range(count)))
    return path


def padded_batch(length: int = 12, padded: int = 0):
    ids = torch.randint(5, 100, (2, length), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, length - padded :] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


PADDED = Calibration([padded_batch()], [padded_batch(9, 4)], 38)
