"""Command lines: a parser that refuses in one line, and types of arguments that say what they take."""

import argparse
import math
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NoReturn

from prunekit.errors import PruneKitError

LARGEST = 10**15  # a number that integers of 64 bits and floats hold exactly, with room to add and multiply


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that keeps the line breaks of its description and names a module as it is called.

    A bad command line is a PruneKitError.
    """

    def __init__(self, **kwargs):
        module = sys.modules["__main__"].__spec__  # argparse of Python 3.11 would say the file's name, as card.py
        name = f"python -m {module.name.removesuffix('.__main__')}" if module else None
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, "prog": name} | kwargs)

    def error(self, message: str) -> NoReturn:
        raise PruneKitError(f"{message} (see --help)")


def check_beside(parser: argparse.ArgumentParser, args: argparse.Namespace, needed: str, names: Iterable[str]) -> None:
    """Refuse flags that say nothing without the flag `needed`, where that isn't given."""
    for name in () if getattr(args, needed) else names:
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')}: is for --{needed}; give that, too, or leave it out")


def _whole(text: str, smallest: int) -> int:
    try:
        number = int(text)
    except ValueError:  # digits beyond Python's limit too
        number = -1
    if not smallest <= number <= LARGEST:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no whole number of {smallest} or more")
    return number


def positive_int(text: str) -> int:
    return _whole(text, 1)


def natural(text: str) -> int:
    return _whole(text, 0)


def finite_float(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number")
    return number


def positive_float(text: str) -> float:
    number = finite_float(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not above 0")
    return number


def share(text: str) -> float:
    """A number above 0, at most 1."""
    number = finite_float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no share above 0, up to 1")
    return number


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    number = finite_float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no number from 0 to 1")
    return number


def device(text: str) -> str:
    """A device of torch's that this machine has, like cpu, cuda or cuda:1."""
    import torch

    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        has = ", ".join(["cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))])
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is no device of this machine: choose from {has}") from error
    if text == "meta":
        raise argparse.ArgumentTypeError("'meta' holds no values: choose cpu or cuda")
    return text


def check_home(path: str | Path) -> None:
    """PruneKitError for a ~ that the shell has left in front, as in --out=~/x."""
    if Path(path).parts[:1] == ("~",):
        raise PruneKitError(f"{path}: the shell left the ~ as it is; write $HOME in its place")


def new_file(text: str) -> Path:
    """A path to write a file to: its folder is there and may be written to, and it is no folder itself."""
    check_home(text)
    path, folder = Path(text), Path(text).parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{folder} is no folder that you may write to: make it first")
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder: name a file")
    return path


def split_arguments() -> tuple[list[str], list[str]]:
    """The command's own arguments, and the line for another program that follows `--`."""
    own = sys.argv[1:]
    return (own[: own.index("--")], own[own.index("--") + 1 :]) if "--" in own else (own, [])


def is_file(path: str | Path) -> bool:
    """Path.is_file; False for a name that is too long, too."""
    try:
        return Path(path).is_file()
    except OSError:
        return False


def is_folder(path: str | Path) -> bool:
    """Path.is_dir; False for a name that is too long, too."""
    try:
        return Path(path).is_dir()
    except OSError:
        return False
