"""Command lines with something wrong: each ends with one line on stderr, exit code 2 and nothing written.

Scripts run in this process, a few milliseconds each, under a limit of memory and time that only a script which takes an
absurd number at its word can meet.
"""

import contextlib
import copy
import importlib
import io
import json
import math
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

from prunekit.errors import run_script

SECONDS, MEMORY = 20, 2 * 2**30  # of one script; a good one takes a hundredth of it
BAD = [
    "5",
    5.5,
    -1,
    0,
    True,
    None,
    [],
    {},
    [5],
    {"a": 1},
    "\ud800",
    math.nan,
    math.inf,
    10**9,
    10**18,
    10**400,
    [[]] * 3,
]


class Stream(io.TextIOWrapper):
    """A stream like the interpreter's own: strict where that is."""

    def __init__(self, errors: str):
        super().__init__(io.BytesIO(), encoding="utf-8", errors=errors, write_through=True)

    def text(self) -> str:
        return self.buffer.getvalue().decode(errors="replace")


def _too_long(number, frame):
    raise TimeoutError(f"not done in {SECONDS} seconds")


@contextlib.contextmanager
def limits():
    """At most SECONDS and MEMORY more than now."""
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before, hard = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGALRM, _too_long)
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, (before, hard))
        signal.signal(signal.SIGALRM, handler)


def run(name: str, *arguments: object, within=limits) -> tuple[int, str, str]:
    """(exit code, stdout, stderr) of a script's or module's main with this command line."""
    main = importlib.import_module(name.removesuffix(".py")).main
    out, err, argv = Stream("strict"), Stream("backslashreplace"), sys.argv
    sys.argv = [name, *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), within():
            run_script(main)
    except SystemExit as end:
        return end.code, out.text(), err.text()
    except BaseException as error:  # what would be a traceback
        return 1, out.text(), f"{err.text()}Traceback: {type(error).__name__}: {str(error)[:200]}"
    finally:
        sys.argv = argv
    raise AssertionError("run_script ends the process")


def snapshot(folder: Path) -> set[tuple[str, int]]:
    return {(str(path), path.lstat().st_mtime_ns) for path in [folder, *folder.rglob("*")]}


def refusal(code: int, err: str) -> str | None:
    """What is wrong with a refusal; None if it is one: exit code 2, one line (after argparse's usage)."""
    lines = err.splitlines()
    if lines and lines[0].startswith("usage: "):
        lines = [line for line in lines if not line.startswith((" ", "usage: "))]
    if code != 2 or len(lines) != 1 or "error: " not in lines[0]:
        return f"exit code {code}, {err[-300:]!r}"
    return None


class Tries:
    """Collects what isn't as it should be, over many command lines in one folder."""

    def __init__(self, folder: Path):
        self.folder, self.count, self.found = folder, 0, []

    def refused(self, what: object, name: str, *arguments: object) -> None:
        """This command line must be refused, and leave nothing."""
        self._try(what, name, arguments, must=True)

    def survived(self, what: object, name: str, *arguments: object) -> None:
        """This command line must be refused, and leave nothing; or else it ends well."""
        self._try(what, name, arguments, must=False)

    def _try(self, what, name, arguments, must):
        before = snapshot(self.folder)
        code, _, err = run(name, *arguments)
        self.count += 1
        problem = refusal(code, err)
        if code == 0 and not must:
            problem = None
        elif problem is None and snapshot(self.folder) != before:
            problem = "something was written"
        if problem:
            self.found.append(f"{name} {str(what)[:150]}: {problem}")

    def check(self):
        assert not self.found, f"{len(self.found)} of {self.count}:\n" + "\n".join(self.found[:20])


def link(source: Path, folder: Path) -> Path:
    return Path(shutil.copytree(source, folder, copy_function=os.link))


def put(file: Path, content) -> None:
    """Write a file anew: text and bytes as they are, anything else as JSON."""
    file.unlink(missing_ok=True)
    if not isinstance(content, str | bytes):
        content = json.dumps(content)
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def places(value, path=()):
    """Every place in a JSON document, as a path of keys; of lists the first two items and the last."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for index in sorted({0, 1, len(value) - 1} & set(range(len(value)))):
            yield from places(value[index], (*path, index))


def changed(document, path, value):
    """The document with this value at this place; DELETED takes it away."""
    document = copy.deepcopy(document)
    *parents, last = path
    inner = document
    for key in parents:
        inner = inner[key]
    if value is DELETED:
        del inner[last]
    else:
        inner[last] = value
    return document


DELETED = object()
RAW = ["", "{", "[", "null", "5", "[]", "{}", '"x"', b"\xff\xfe{}", "[" * 100_000, '{"a":' * 50_000, "1" * 5000,
       '{"a": 1, "a": ' + "9" * 5000 + "}", "\x00", '"\ud800"', "[{}]", "[[]]", "{}{}"]  # fmt: skip


def mutations(document):
    for path in places(document):
        for value in (*BAD, DELETED):
            what = "deleted" if value is DELETED else repr(value)[:40]
            yield f"{path} = {what}", changed(document, path, value)


def contents(document):
    """(what, content) of files in this document's place: no JSON, other JSON, the document with one thing wrong."""
    return [*((content[:20], content) for content in RAW), *mutations(document)]


CHEAP = {  # what reads a config, with arguments that its model can be cut by
    "prunekit.inspect": (),
    "prunekit.summary": (),
    "manual_select.py": ("--text", "4", "--dry-run"),
    "kv_cut.py": ("--kv-heads", "1", "--dry-run"),
    "width_cut.py": ("--heads", "2", "--neuron-share", "0.5", "--dry-run"),
    "sparsify.py": ("--sparsity", "0.5", "--dry-run"),
    "prunekit.critical": (),
    "prunekit.plan": ("--target-params", "0.5"),
    "prunekit.training.cycles": (),
    "prunekit.distributions": (),
    "prunekit.packed": (),
}


def words(name: str, model) -> tuple:
    match name:
        case "prunekit.inspect" | "prunekit.critical":
            return (model,)
        case "prunekit.summary":
            return ("--line", model)
        case "prunekit.distributions":
            return (model, "--out", "weights.png")
        case "prunekit.packed":
            return ("sizes", model)
        case "prunekit.training.cycles":
            return ("plan", "--model", model, "--sparsity", "0.5")
    return ("--model", model, *CHEAP[name])


RANKING = {
    "metric": "token_acc",
    "removals": [
        {"name": "text-03", "stack": "text", "layer": 3, "relative": 1.0},
        {"name": "text-02", "stack": "text", "layer": 2, "relative": 0.97},
        *({"name": f"text-{n:02d}", "stack": "text", "layer": n, "relative": None} for n in (0, 1, 4)),
    ],
    "greedy": {"healed": False, "bend": None, "path": [
        {"removed": [], "relative": 1.0}, {"removed": ["text-03"], "relative": 0.99}]},
}  # fmt: skip
