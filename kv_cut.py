"""Merge KV heads to any divisor of the present count, down to 1 (MQA).

    python kv_cut.py --model checkpoints/pruned --out checkpoints/kv2 --kv-heads 2

Halve and recover (full_run.sh) rather than cut to 1 at once.
"""

import argparse

from prunekit.checkpoint import check_out, open_checkpoint, statistics
from prunekit.errors import run_script
from prunekit.inspect import comparison
from prunekit.kv_heads import METHODS, apply_kv_merge, plan_kv_merge


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="checkpoint folder to read")
    parser.add_argument("--out", help="checkpoint folder to write; not needed with --dry-run")
    parser.add_argument("--kv-heads", type=int, required=True, metavar="N", help="KV heads to keep")
    parser.add_argument(
        "--method", choices=METHODS, default="mean", help="mean of each group, or its first head"
    )
    parser.add_argument(
        "--max-shard-gb", type=float, help="largest weight file (default: sharded like the input)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    parser.add_argument("--dry-run", action="store_true", help="show what would be done, write nothing")
    arguments = parser.parse_args()
    if not arguments.out and not arguments.dry_run:
        parser.error("--out is needed (or --dry-run)")

    checkpoint = open_checkpoint(arguments.model)
    if arguments.out:
        check_out(arguments.out, checkpoint.path, overwrite=arguments.overwrite)
    plan = plan_kv_merge(checkpoint, arguments.kv_heads, arguments.method)
    print(comparison(statistics(checkpoint), statistics(plan.result)))
    if arguments.dry_run:
        print("dry run: nothing written")
        return
    limit = arguments.max_shard_gb
    apply_kv_merge(plan, arguments.out, arguments.overwrite, None if limit is None else int(limit * 1e9))
    print(f"wrote {arguments.out}")


if __name__ == "__main__":
    run_script(main)
