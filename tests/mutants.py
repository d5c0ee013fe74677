"""Do the tests notice when the code is wrong? Runs them on copies of the code with one mistake each.

    python tests/mutants.py                                 # all of tests/mutant_table.py, an hour on one core
    python tests/mutants.py --files heal kv_merge           # of files whose names contain one of these words
    python tests/mutants.py --files heal --only 3 7 --show  # some of them by number, with what pytest says

A mistake is killed if a test fails (or hangs) on it, and has survived if all that were selected pass. What survives
wants a test, or a line in the table that says why nothing could tell it from the code. Tests run in forks of a process
that has imported the heavy libraries, on a copy of what git tracks here, in a temporary folder: the tree is never
touched.
"""

import argparse
import contextlib
import importlib
import importlib.util
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from mutant_table import FILES, Mutant

ROOT = Path(__file__).resolve().parents[1]
HEAVY = (
    "transformers.trainer",
    "torch._dynamo",
    "hypothesis.strategies",
    "matplotlib.pyplot",
    "swift",
    "pytest",
)
SECONDS, TIMEOUT = (
    120,
    900,
)  # of CPU time and of the clock, which a mutant that loops or waits for ever ends by
VERDICTS = {0: "survived", 1: "killed", -signal.SIGXCPU: "killed (hangs)", None: "killed (hangs)"}


def stale(mutant: Mutant, text: str) -> str | None:
    """Why a mutant can't be made of a file's text any more; None if it can."""
    if (found := text.count(mutant.old)) != 1:
        return f"its old text occurs {found} times"
    return "its new text is the old one" if mutant.old == mutant.new else None


@contextlib.contextmanager
def copied_tree() -> Iterator[Path]:
    """A temporary copy of the files that git knows of, with the environment that the launchers look for."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file():
                (tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, tree / name)
        if (ROOT / ".venv").exists():
            (tree / ".venv").symlink_to((ROOT / ".venv").resolve())
        yield tree


def write(file: Path, text: str) -> None:
    """Change a module; what was compiled of it before goes: it could have the same time and size."""
    Path(importlib.util.cache_from_source(str(file))).unlink(missing_ok=True)
    file.write_text(text)


class CheapFirst:
    """Tests without models and scripts go first: most mistakes end there."""

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: len({"tiny", "tmp_path", "script"} & set(item.fixturenames)))


def run_tests(tree: Path, tests: str, log: Path) -> int | None:
    """pytest's exit code for these tests of the tree, in a fork of this process; None if it took too long."""
    if not (child := os.fork()):
        os.setsid()
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 9))
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        sys.path[:0] = [str(tree), str(tree / "tests")]
        for name in ("mutants", "mutant_table"):
            sys.modules.pop(name, None)
        import pytest

        words = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", tree]
        files, _, selected = tests.partition(" -k ")
        words += [*files.split(), *(["-k", selected] if selected else []), "-m", "not slow"]
        code = 3
        try:
            words += ["--basetemp", tree.parent / "pytest"]
            code = int(pytest.main([*map(str, words)], [CheapFirst()]))
        finally:
            sys.stdout.flush()
            os._exit(code)
    deadline = time.time() + TIMEOUT
    while time.time() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", nargs="+", default=[""], help="words of file names (default: all)")
    parser.add_argument("--only", nargs="+", type=int, help="numbers of mutants within these files")
    parser.add_argument("--show", action="store_true", help="print what pytest says")
    arguments = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    for name in HEAVY:
        importlib.import_module(name)
    rates: dict[str, Counter] = {}
    with copied_tree() as tree:
        log = tree.parent / "log"
        for file, (default, mutants) in FILES.items():
            if not any(word in file for word in arguments.files):
                continue
            rates[file] = counts = Counter()
            text, sound = (tree / file).read_text(), {}
            for number, mutant in enumerate(mutants, 1):
                if mutant.equivalent or arguments.only and number not in arguments.only:
                    counts["equivalent"] += bool(mutant.equivalent)
                    continue
                began, tests = time.time(), mutant.tests or default
                if why := stale(mutant, text):
                    verdict = f"stale: {why}"
                elif sound.setdefault(tests, tests in sound or run_tests(tree, tests, log)) not in (0, True):
                    verdict = f"no verdict: the tests fail without it ({tests})"
                else:
                    write(tree / file, text.replace(mutant.old, mutant.new))
                    code = run_tests(tree, tests, log)
                    write(tree / file, text)
                    verdict = VERDICTS.get(code, f"no verdict: pytest ended with {code}")
                counts[verdict.partition(" ")[0].rstrip(":")] += 1
                shown = " ".join(mutant.new.split())
                print(f"{file} {number:3} {verdict:9} {time.time() - began:5.1f} s  {shown[:90]}", flush=True)
                if arguments.show or verdict.startswith("no verdict"):
                    print(log.read_text()[-4000:])
    print()
    for file, counts in {**rates, "all": sum(rates.values(), Counter())}.items():
        tried = sum(counts.values()) - counts["equivalent"]
        others = {name: count for name, count in counts.items() if count and name != "killed"}
        share = counts["killed"] / max(1, tried)
        print(f"{file:32} {counts['killed']:3} of {tried:3} killed ({share:6.1%})  {others or ''}")


if __name__ == "__main__":
    main()
