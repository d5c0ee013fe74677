"""ms-swift's command lines, checked in one call."""

from prunekit.msswift.line import check_line, parse


def check(kind: str, *line: object, processes: int = 1):
    args = parse(kind, list(map(str, line)))
    check_line(kind, args, processes)
    return args
