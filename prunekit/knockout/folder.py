"""A sweep's folder: what is in one.

    python -m prunekit.knockout.folder --out runs/knockout

`knockout_check.sh` asks so, before it removes or computes anything, whether OUT is one, or free.
"""

import re
from pathlib import Path

from prunekit.arguments import Parser
from prunekit.errors import PruneKitError, run_script

RANKING, TABLE = "ranking.json", "ranking.csv"
PICTURES = ("ranking.png", "greedy.png", "curves.png")
WORK = ("scan", "trained")  # folders: a sweep has one at least before it has anything else
DRAFT = re.compile(r"\..+\.new")  # of a file that was being written: a kill leaves it


def check_folder(out: Path) -> None:
    """PruneKitError for an OUT that holds more than a sweep writes, or only files that are called so."""
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    ours = {*WORK, RANKING, TABLE, *PICTURES}
    if not (
        any((out / name).is_dir() for name in WORK)
        and all(path.name in ours or DRAFT.fullmatch(path.name) for path in out.iterdir())
    ):
        raise PruneKitError(f"{out}: is in use, and no sweep of knockouts; choose another OUT")


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    check_folder(parser.parse_args().out)


if __name__ == "__main__":
    run_script(main)
