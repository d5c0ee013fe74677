"""Cut a checkpoint's vocabulary: tokens that your data don't need go, and their rows of embedding and output head.

    python vocab_cut.py --model checkpoints/base --out checkpoints/words --keep-share 0.5 --calib data/train.jsonl
    python vocab_cut.py --model checkpoints/base --out checkpoints/words --size 32000 --calib data/chat.jsonl docs.jsonl
    python vocab_cut.py --model checkpoints/base --keep-share 0.25 --calib data/train.jsonl --dry-run

What stays: bytes or characters, so that every text can still be written; special and added tokens; what the chat
template writes; and of all others those that save most tokens on your data. The number is rounded up to a --multiple.
Tokens are numbered anew, in the tokenizer and in all configs: what was encoded before is of no use to the new model,
and a teacher that is to teach it has to be cut by the same command. No weights are read but those rows.
"""

from prunekit.arguments import positive_int, share
from prunekit.data.batches import read_calibration
from prunekit.errors import run_script
from prunekit.surgery.script import open_input, parse_surgery, save, show_plan, surgery_parser
from prunekit.surgery.vocabulary import MULTIPLE, plan_vocabulary
from prunekit.surgery.vocabulary_fit import fit_vocabulary


def main() -> None:
    parser = surgery_parser(__doc__)
    how_many = parser.add_mutually_exclusive_group(required=True)
    how_many.add_argument("--size", type=positive_int, metavar="N", help="tokens to keep")
    how_many.add_argument("--keep-share", type=share, metavar="S", help="share of them to keep, like 0.5")
    parser.add_argument(
        "--calib",
        nargs="+",
        required=True,
        metavar="JSONL",
        help='ms-swift messages, or {"text": ...}, like the data the model is for',
    )
    parser.add_argument(
        "--multiple",
        type=positive_int,
        default=MULTIPLE,
        metavar="M",
        help=f"round up to a multiple of it, which GPUs like (default: {MULTIPLE})",
    )
    arguments = parse_surgery(parser)

    checkpoint = open_input(arguments)
    plan = plan_vocabulary(checkpoint, arguments.size, arguments.keep_share, arguments.multiple)
    data = [read_calibration(file) for file in arguments.calib]
    show_plan(checkpoint, plan.outline, arguments, plan.notes)
    cut = fit_vocabulary(plan, data)
    print("tokens a byte of held-out rows: {tokens_per_byte_before:.4f} -> {tokens_per_byte:.4f}".format(**cut.metrics))
    for name in (name for name, content in cut.result.files.items() if content is None):
        print(f"{name} has the old numbers, and is left out: tokenizer.json says the same")
    save(cut, arguments)


if __name__ == "__main__":
    run_script(main)
