"""What a distillation loss sees of the teacher, by what is kept of it: gradients against the whole vocabulary's.

    bash bench/setup.sh && .venv/bin/python bench/distil.py --json docs/measured/distil.json

Students are SmolLM2-135M without the 3 and the 5 layers that cost it least, and the embedded model without three, not
trained since: where a recovery begins. For forward and reverse KL, over `--tokens` tokens that are held out, the cosine
of the gradient of lm_head by each loss to the whole vocabulary's one, and the loss itself; with it the bytes a token
that keeping the teacher takes. ms-swift's loss is called as it is installed; "sampled" is random sampling of the
teacher (Anshumann et al. 2025) with as many bytes as our top 8. Prints JSON; takes minutes on one CPU core.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from materials import EMBEDDED, MODELS, embedded_data, result_file, smollm2, write_texts
from torch import Tensor

from prunekit.checkpoint import open_checkpoint, write_json
from prunekit.data.batches import calibrate
from prunekit.model.load import load_model
from prunekit.surgery.in_memory import removed
from prunekit.surgery.layers import plan_layers
from prunekit.training.distillation_loss import TopK, distillation_loss, top_k
from prunekit.training.teacher_cache import Settings, pack, unpack

ORDER = [17, 14, 13, 16, 18]  # SmolLM2's cheapest layers, by bench/heal.py
CHEAP = [4, 5, 6]  # of the embedded model, by the demo's ranking
BETAS = {"forward": 0.0, "reverse": 1.0}
Loss = Callable[[Tensor, Tensor, float], Tensor]  # of the student's and the teacher's logits (tokens, vocabulary), beta


def answers(model, batches, heads: list[Tensor] | None = None) -> Iterator[Tensor]:
    """Logits (fp32) of the positions before labels, a batch at a time; `heads` gets what lm_head is given there."""
    for batch in batches:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        seen: list[Tensor] = []
        hook = model.get_output_embeddings().register_forward_pre_hook(
            lambda _, given, seen=seen: seen.append(given[0])
        )
        with torch.no_grad():
            logits = model(**inputs).logits
        hook.remove()
        counted = (batch["labels"].roll(-1, -1) != -100).flatten()
        if heads is not None:
            heads.append(seen[0].flatten(0, 1)[counted].float())
        yield logits.flatten(0, 1)[counted].float()


def ours(k: int, stored: bool) -> Loss:
    """The loss of the top k and the tail; as a cache of the teacher has them, if `stored`."""

    def loss(student, teacher, beta):
        rows = torch.arange(len(student))
        top = top_k(teacher, rows, k)
        if stored:
            settings = Settings("", teacher.shape[-1], k, 1.0)
            top = TopK(*unpack(pack(top, settings), settings))
        return distillation_loss(student, rows, top, beta=beta)

    return loss


def whole(student, teacher, beta):
    return distillation_loss(student, torch.arange(len(student)), teacher, beta=beta)


def ms_swift(k: int) -> Loss:
    def loss(student, teacher, beta):
        from swift.rlhf_trainers.gkd_loss import TeacherOutput, gkd_loss

        top = teacher.log_softmax(-1).topk(k)
        labels = torch.ones(1, len(student), dtype=torch.long)
        output = TeacherOutput(topk_logprobs=top.values[None], topk_indices=top.indices[None], labels=labels)
        return gkd_loss(student[None], output, labels, beta, 1.0)[0]

    return loss


def sampled(number: int) -> Loss:
    """`number` draws from the teacher, each counted alike: an unbiased estimate of forward KL's gradient."""

    def loss(student, teacher, beta):
        assert beta == 0
        drawn = torch.multinomial(teacher.softmax(-1), number, replacement=True)
        return -student.log_softmax(-1).gather(-1, drawn).mean(-1).sum()

    return loss


def kinds(vocabulary: int) -> dict[str, tuple[Loss, float]]:
    """Losses, and bytes a token that they keep of the teacher."""

    def cell(k: int) -> float:
        return Settings("", vocabulary, k, 1.0).token_bytes

    bits = (vocabulary - 1).bit_length()
    found: dict[str, tuple[Loss, float]] = {"whole vocabulary": (whole, 2.0 * vocabulary)}
    for k in (8, 64):
        found[f"ms-swift, top {k}"] = (ms_swift(k), 6.0 * k)  # ids and bf16 values
    for k in (4, 8, 16, 64):
        found[f"top {k} and tail"] = (ours(k, stored=False), 8.0 * k + 4)  # fp32, int32
        found[f"top {k} and tail, stored"] = (ours(k, stored=True), cell(k))
    draws = int(8 * cell(8) / bits)
    found[f"sampled, {draws} draws"] = (sampled(draws), cell(8))
    return found


def compare(teacher: list[Tensor], student: list[Tensor], heads: list[Tensor]) -> list[dict]:
    """Each loss against the whole vocabulary's: cosine of lm_head's gradients, nats a token."""
    torch.manual_seed(0)
    tokens, vocabulary = sum(map(len, heads)), student[0].shape[-1]
    rows = []
    for direction, beta in BETAS.items():
        right = None
        for name, (loss, size) in kinds(vocabulary).items():
            if beta and name.startswith("sampled"):
                continue
            total, gradient = 0.0, torch.zeros(vocabulary, heads[0].shape[-1])
            for one, other, head in zip(teacher, student, heads, strict=True):
                logits = other.clone().requires_grad_()
                value = loss(logits, one, beta)
                value.backward()
                total += float(value.detach())
                gradient += logits.grad.T @ head
            right = gradient if right is None else right
            cosine = torch.nn.functional.cosine_similarity(gradient.double().flatten(), right.double().flatten(), 0)
            rows.append({"direction": direction, "loss": name, "bytes": size, "cosine": round(float(cosine), 4)})
            rows[-1]["nats"] = None if name.startswith("sampled") else round(total / tokens, 4)
            print(f"  {direction:8} {name:24} {size:>9.0f} B  cosine {cosine:.4f}", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/bench"), help="folder of the materials")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--counts", type=int, nargs="*", default=[3, 5], help="of layers to remove from SmolLM2")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: both")
    parser.add_argument("--json", type=result_file, help="also write the result here")
    args = parser.parse_args()
    cases = []
    for count in args.counts if "smollm2" in args.models else ():
        folder, texts = smollm2(args.runs / "smollm2"), write_texts(args.runs)["wikipedia-test"]
        cases.append(("SmolLM2-135M", folder, texts, ORDER[:count]))
    if "embedded" in args.models:
        cases.append(("embedded", EMBEDDED, embedded_data(args.runs / "tiny_vl") / "test.jsonl", CHEAP))
    result = []
    for name, folder, data, layers in cases:
        checkpoint = open_checkpoint(folder)
        model = load_model(checkpoint)
        read = calibrate(model, checkpoint, data, max_tokens=args.tokens)
        batches = [*read.fit, *read.held_out]
        print(f"{name} without layers {layers}", file=sys.stderr)
        heads: list[Tensor] = []
        teacher = list(answers(model, batches))
        with removed(model, plan_layers(checkpoint, text=layers)):
            student = list(answers(model, batches, heads))
        rows = compare(teacher, student, heads)
        result.append({"model": name, "removed": layers, "tokens": sum(map(len, heads)), "losses": rows})
    print(json.dumps(result, indent=2))
    if args.json:
        write_json(args.json, result)


if __name__ == "__main__":
    main()
