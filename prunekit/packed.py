"""What zeros save in a file: packed, without them, and back, exact to the bit; and a table of what other forms take.

    python -m prunekit.packed sizes checkpoints/sparse
    python -m prunekit.packed pack checkpoints/sparse --out checkpoints/packed
    python -m prunekit.packed unpack checkpoints/packed --out checkpoints/sparse

A packed folder is for keeping and sending: no runtime loads it. Of each weight a bit says whether it is zero, and only
the others' values are there: 16 bits become 9 where half of them are. docs/zeros.md says what each runtime does with
each form.
"""

from pathlib import Path

from prunekit.arguments import Parser, new_file
from prunekit.checkpoint import open_checkpoint, write_json
from prunekit.errors import run_script
from prunekit.surgery.zeros_files import file_sizes, pack, unpack


def main() -> None:
    parser = Parser(description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)
    sizes = parts.add_parser("sizes", help="a table of the file's size in several forms; writes no model")
    sizes.add_argument("model", help="checkpoint folder")
    sizes.add_argument("--modules", metavar="REGEX", help="of the projections that INT8 and CSR are for")
    sizes.add_argument("--json", type=new_file, help="also write the sizes here")
    for name, what, text in (
        ("pack", "checkpoint folder", "write a folder without the zeros"),
        ("unpack", "packed folder", "write the checkpoint that was packed"),
    ):
        part = parts.add_parser(name, help=text)
        part.add_argument("model", help=what)
        part.add_argument("--out", required=True, help="folder to write")
        part.add_argument("--overwrite", action="store_true", help="replace a checkpoint at OUT")
    args = parser.parse_args()

    if args.part == "sizes":
        found = file_sizes(args.model, args.modules)
        dense = found["bytes"]["dense"]
        print(f"{found['zeros']:.1%} of {found['weights']:,} weights zero, {found['zeros_in_int8']:.1%} in INT8")
        for form, size in found["bytes"].items():
            print(f"{form:16}{size:>16,}{size / dense:>8.1%}")
        if args.json:
            write_json(args.json, found)
    elif args.part == "pack":
        entry = pack(open_checkpoint(args.model), args.out, args.overwrite)
        print(f"wrote {args.out}: {entry['packed_bytes']:,} bytes, {entry['packed_bytes'] / entry['bytes']:.1%}")
    else:
        entry = unpack(Path(args.model), args.out, args.overwrite)
        print(f"wrote {args.out}: {entry['bytes']:,} bytes")


if __name__ == "__main__":
    run_script(main)
