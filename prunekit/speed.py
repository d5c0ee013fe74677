"""How fast causal models read and decode on this machine, measured side by side, by turns.

    python -m prunekit.speed checkpoints/base checkpoints/small --prompt-tokens 1024 --decode-tokens 64 --batches 1 32
    python -m prunekit.speed checkpoints/base --parts --batches 1 --json runs/speed.json

Random tokens are read, and further ones decoded with a KV cache, by transformers: text alone. Each model runs in
processes of its own; of its turns the best counts. --parts also says which share of the time attention, MLPs, the rest
of the text layers and the output head take. Exit code 2 if one can't be measured.
"""

import argparse
from dataclasses import asdict
from pathlib import Path

from prunekit.arguments import Parser, device, new_file, positive_int
from prunekit.checkpoint import Checkpoint, open_checkpoint, write_json
from prunekit.checkpoint.remote_code import check_no_remote_code
from prunekit.errors import run_script
from prunekit.model.load import check_causal
from prunekit.serving.speed import Pace, choose_pace, measure_speed


def add_speed_arguments(parser: argparse._ActionsContainer) -> None:
    """What is timed: what this command and others take of a user."""
    parser.add_argument("--prompt-tokens", type=positive_int, help="to read (default: 256, or what the models take)")
    parser.add_argument("--decode-tokens", type=positive_int, help="to decode behind them (default: 32, as above)")
    parser.add_argument("--batches", nargs="+", type=positive_int, default=[1, 32], help="rows at once (default: 1 32)")
    parser.add_argument("--rounds", type=positive_int, default=2, help="turns of each model (default: 2)")


def pace_of(checkpoints: list[Checkpoint], args: argparse.Namespace, parts: bool = False) -> Pace:
    how = {"sizes": tuple(args.batches), "rounds": args.rounds, "device": args.device, "dtype": args.dtype}
    return choose_pace(checkpoints, args.prompt_tokens, args.decode_tokens, parts=parts, **how)


def main() -> int:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="the first is what others are held against"
    )
    add_speed_arguments(parser)
    parser.add_argument("--parts", action="store_true", help="also where the time is spent, at the first of --batches")
    parser.add_argument("--device", type=device, help="default: cuda if there is one")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--json", type=new_file, help="also write the results here")
    args = parser.parse_args()
    checkpoints = [open_checkpoint(model, quantised=True) for model in args.models]
    for checkpoint in checkpoints:
        check_causal(checkpoint)
        check_no_remote_code(checkpoint.path)
    pace = pace_of(checkpoints, args, args.parts)
    rows = measure_speed([checkpoint.path for checkpoint in checkpoints], pace)
    found = [{"model": str(model), **row} for model, row in zip(args.models, rows)]
    for row in found:
        if "error" in row:
            print(f"{row['model']}: {row['error']}")
            continue
        for size, times in row["batches"].items():
            said = [f"{row['model']}  batch {size}"]
            for key, unit in (("prefill", "s"), ("decode", "s a token")):
                base = found[0].get("batches", {}).get(size, {}).get(key)
                faster = f" ({base / times[key]:.2f} times as fast)" if base and row is not found[0] else ""
                said.append(f"{key} {times[key]:.4g} {unit}{faster}")
            print("  ".join(said))
        for what, parts in row.get("parts", {}).items():
            print(f"  of {what}: {', '.join(f'{part} {share:.0%}' for part, share in parts.items())}")
    if args.json:
        write_json(args.json, {"pace": asdict(pace), "models": found})
    return 2 if any("error" in row for row in found) else 0  # loop.sh would take its file for a measurement


if __name__ == "__main__":
    run_script(main)
