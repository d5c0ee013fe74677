"""One exception for every mistake that a user can mend, and the one place where it becomes an exit code."""

import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

SECRET = re.compile(r"--(?:\w+[-_])?(?:token|key|secret|password)(=|$)")
command: str | None = None  # the line that a user typed, where a script runs


class PruneKitError(Exception):
    """A user's mistake. The message is one line that names the thing and the mend."""


def need_packages(*names: str, extra: str) -> None:
    """PruneKitError if one of these packages is not installed; `extra` is ours that brings it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise PruneKitError(f"{name} is not installed: pip install -e '.[{extra}]'")


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main function and exit: 0 or its result, 2 on PruneKitError, 130 on Ctrl-C."""
    global command
    command = f"# run in {Path.cwd()}\n{quoted(['python', *sys.orig_argv[1:]])}\n"
    try:
        sys.exit(main() or 0)
    except PruneKitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def quoted(words: list[str]) -> str:
    """A command line as one would type it, secrets left out."""
    line, hide = [], False
    for word in words:
        secret = SECRET.match(word)
        line.append(
            "'***'" if hide else word[: secret.end()] + "'***'" if secret and secret[1] else shlex.quote(word)
        )
        hide = bool(secret and not secret[1])
    return " ".join(line)
