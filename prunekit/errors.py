"""One exception for every mistake that a user can mend, and the one place where it becomes an exit code."""

import errno
import importlib.util
import os
import re
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

SECRET = re.compile(r"--(?:\w+[-_])?(?:token|key|secret|password)(=|$)")
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")  # a name may hold line ends and a terminal's commands
command: str | None = None  # the line that a user typed, where a script runs
started: float | None = None  # when, by time.monotonic()


class PruneKitError(Exception):
    """A user's mistake. The message is one line that names the thing and the mend."""


def need_packages(*names: str, extra: str) -> None:
    """PruneKitError if one of these packages is not installed; `extra` is ours that brings it."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise PruneKitError(f"{name} is not installed: pip install -e '.[{extra}]'")


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's main function and exit: 0 or its result, 2 and one line for what a user can mend, 130 on Ctrl-C.

    Whatever else is raised is a fault of ours: a traceback, a line that asks to report it, and exit code 1.
    """
    global command, started
    try:
        started = time.monotonic()
        command = f"# run in {Path.cwd()}\n{quoted(['python', *sys.orig_argv[1:]])}\n"
        code = main() or 0
        sys.stdout.flush()  # a pipe that is closed is noticed here
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # who reads it (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 141  # as of a process that SIGPIPE ends
    except Exception as error:
        if message := users_fault(error):
            print("error:", CONTROLS.sub(" ", message), file=sys.stderr)
            code = 2
        else:
            traceback.print_exc()
            print(
                "this is a fault of Prune-Kit, please report it with these lines and your command",
                file=sys.stderr,
            )
            code = 1
    finally:
        command = started = None  # what this process writes from here on is no script's
    sys.exit(code)


def users_fault(error: BaseException) -> str | None:
    """What a user can mend, in words: a PruneKitError, or what files and their names bring about. None: it is ours."""
    match error:
        case PruneKitError():
            return str(error)
        case OSError(errno=errno.ENOSPC | errno.EDQUOT):
            return f"{_name(error) or 'the files to write'}: the disk is full; make room or choose another disk"
        case RuntimeError() if type(error).__name__ == "OutOfMemoryError":  # torch's, which isn't imported for this
            said = ". ".join(str(error).split(". ")[:3])
            return f"{said}: lower --batch-size, --batch-tokens or --max-length, or take a GPU with more memory"
        case OSError() if _name(error) and error.strerror:
            return f"{_name(error)}: {error.strerror}"
        case UnicodeEncodeError() if re.search(r"[\ud800-\udfff]", error.object):
            return f"{ascii(error.object)[:200]}: not UTF-8; write or name it so"
        case UnicodeDecodeError():
            return f"text that isn't UTF-8 ({ascii(error.object[error.start : error.start + 40])}); convert the file"
        case RecursionError() if _raised_in(error).startswith("json."):
            return "a JSON file has brackets in brackets, too many to be read; mend or remove it"
    return None


def _name(error: OSError) -> str:
    return os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""


def _raised_in(error: BaseException) -> str:
    """The module whose code raised it."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return frame.f_globals.get("__name__", "")


def quoted(words: list[str]) -> str:
    """A command line as one would type it, secrets left out."""
    line, hide = [], False
    for word in words:
        secret = SECRET.match(word)
        line.append("'***'" if hide else word[: secret.end()] + "'***'" if secret and secret[1] else shlex.quote(word))
        hide = bool(secret and not secret[1])
    return " ".join(line)
