"""Make a checkpoint ready to serve (ONNX, INT8), and measure what that gains on this machine.

    python deploy.py --model checkpoints/pruned --out serve/int8 --dataset data/test.jsonl
    python deploy.py --model checkpoints/dense checkpoints/pruned --out serve/int8 --dataset data/test.jsonl
    python deploy.py --model checkpoints/dense checkpoints/pruned serve/int8 --dataset data/test.jsonl --json table.json
    python deploy.py --model checkpoints/pruned --out serve/int8 --dataset data/test.jsonl --min-f1 0.84

With --out, the last model is written there: onnx or onnx-int8 (onnxruntime's dynamic quantisation) for encoders and
small decoders, torchao-int8 or torchao-int8-dynamic for any text model, which plain transformers loads where torchao is
installed. With --dataset, all models and OUT are measured side by side: size of the weight files, peak memory, latency
and throughput of batches, F1 (token classifiers: rows as for ner_run.py) or loss (decoders: rows {"text": ...}). To
publish a folder: hf upload NAME/MODEL serve/int8

--min-f1 and --require are gates on what was measured of OUT, or of the last model: exit code 3 if it falls short. OUT
is written then, too.
"""

from pathlib import Path

from prunekit.arguments import Parser, device, new_file, positive_float, positive_int
from prunekit.checkpoint import check_out, open_checkpoint, write_json
from prunekit.errors import run_script
from prunekit.gates import add_gates, check_bounds, gate
from prunekit.serving.deploy import FORMATS, choose_format, deploy
from prunekit.serving.measure import (
    Measuring,
    check_measurable,
    measure_served,
    metric_names,
    served_table,
    where_zeros_save_nothing,
)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument("--model", nargs="+", required=True, type=Path, help="folders; the last becomes OUT")
    parser.add_argument("--out", type=Path, help="folder to write")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="of OUT (default: onnx-int8, torchao-int8 over 0.5 billion parameters)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a folder at OUT")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument("--dataset", type=Path, help="measure all models on these held-out rows")
    measuring.add_argument("--limit", type=positive_int, help="rows to use (default: all)")
    measuring.add_argument("--length", type=positive_int, default=128, help="tokens of a timed row (default: 128)")
    measuring.add_argument(
        "--batches", nargs="+", type=positive_int, default=[1, 32], metavar="N", help="(default: 1 32)"
    )
    measuring.add_argument("--seconds", type=positive_float, default=2.0, help="to time each batch for (default: 2)")
    measuring.add_argument("--rounds", type=positive_int, default=2, help="turns of each model (default: 2)")
    measuring.add_argument("--threads", type=positive_int, help="(default: all cores)")
    measuring.add_argument("--device", type=device, help="of what torch runs (default: cpu)")
    measuring.add_argument("--json", type=new_file, help="also write the table here")
    add_gates(measuring, min_f1=True)
    arguments = parser.parse_args()
    if not arguments.out and not arguments.dataset:
        parser.error("--out or --dataset is needed")
    if arguments.format and not arguments.out:
        parser.error("--format is that of the folder to write: give --out")
    if (arguments.require or arguments.json) and not arguments.dataset:
        parser.error("--require, --min-f1 and --json are of what is measured: give --dataset")

    how = None
    if arguments.dataset:
        how = Measuring(
            arguments.dataset, arguments.limit, arguments.length, tuple(arguments.batches), arguments.seconds,
            arguments.rounds, arguments.threads, arguments.device or "cpu",
        )  # fmt: skip
        check_measurable(arguments.model, how)
        check_bounds(arguments.require, metric_names(arguments.model[-1]))
    folders = list(arguments.model)
    if arguments.out:
        checkpoint = open_checkpoint(arguments.model[-1])
        check_out(arguments.out, checkpoint.path, *arguments.model, overwrite=arguments.overwrite)
        form = choose_format(checkpoint, arguments.format)
        entry = deploy(checkpoint, arguments.out, form, arguments.overwrite)
        same = entry["metrics"]
        print(f"wrote {arguments.out}: {form}, {entry['bytes'] / 1e6:,.1f} MB of {entry['bytes_before'] / 1e6:,.1f}")
        print(f"logits of random tokens: cosine {same['cosine']:.4f}, same best {same['same_best']:.1%}")
        folders.append(arguments.out)
    if how:
        rows = measure_served(folders, how)
        print(served_table(rows))
        for line in where_zeros_save_nothing(rows):
            print(line)
        if arguments.json:
            write_json(arguments.json, {"length": how.length, "rounds": how.rounds, "rows": rows})
        return gate(arguments.require, {rows[-1]["model"]: rows[-1]})
    return 0


if __name__ == "__main__":
    run_script(main)
