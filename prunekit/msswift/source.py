"""What the source of ms-swift and transformers says, read without importing them: that takes seconds."""

import ast
import dataclasses
import enum
import functools
import importlib.util
import typing
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import NoneType
from typing import Any

JSON = typing.Union[dict, str, None]  # noqa: UP007  # in this order it is read as a string; ms-swift sees to it
TYPES = {"str": str, "int": int, "float": float, "bool": bool, "dict": dict, "list": list}


@functools.cache
def package(name: str) -> Path:
    """The folder of an installed package, which isn't imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no package {name}", name=name)
    return Path(spec.origin).parent


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """As `ast.walk`, of statements alone: expressions are most of a tree, and the time that it takes to walk it."""
    left = deque([tree])
    while left:
        node = left.popleft()
        yield node
        for name in ("body", "handlers", "orelse", "finalbody", "cases"):
            left.extend(getattr(node, name, ()))


@functools.cache
def _module(file: Path) -> tuple[dict[str, ast.ClassDef], dict[str, tuple[Path, str]]]:
    """The classes of a source file by name, and from which file its other names come."""
    classes: dict[str, ast.ClassDef] = {}
    imported: dict[str, tuple[Path, str]] = {}
    for node in statements(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ClassDef):
            classes[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            parts = (node.module or "").split(".")
            if node.level:
                folder = file.parents[node.level - 1]
            elif parts[0] in ("swift", "transformers"):
                folder = package(parts[0]).parent
            else:
                continue
            path = folder.joinpath(*parts)
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            imported |= {alias.asname or alias.name: (path, alias.name) for alias in node.names}
    return classes, imported


@functools.cache
def _find(file: Path, name: str) -> tuple[Path, ast.ClassDef] | None:
    """The class that a name means in a source file, and the file that defines it."""
    classes, imported = _module(file)
    if name in classes:
        return file, classes[name]
    return _find(*imported[name]) if name in imported and imported[name][0].is_file() else None


def _defined(file: Path, name: str) -> tuple[Path, ast.ClassDef]:
    """As `_find`, of a class that is there."""
    if (found := _find(file, name)) is None:
        raise LookupError(f"{file}: no class {name}")
    return found


def _constants(node: ast.ClassDef) -> dict[str, Any]:
    """The constants that a class body assigns to names."""
    return {
        item.targets[0].id: item.value.value
        for item in node.body
        if isinstance(item, ast.Assign)
        and isinstance(item.targets[0], ast.Name)
        and isinstance(item.value, ast.Constant)
    }


def constants_in(file: Path, name: str | None = None) -> list[Any]:
    """The constants that the classes of a source file give names to; of one class alone, if it is named."""
    nodes = [_defined(file, name)[1]] if name else _module(file)[0].values()
    return [value for node in nodes for value in _constants(node).values()]


def set_in(source: str, function: str) -> set[str]:
    """The strings in a set that a function of ms-swift's writes out."""
    tree = ast.parse((package("swift") / source).read_bytes())
    [node] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function]
    sets = [part for part in ast.walk(node) if isinstance(part, ast.Set)]
    constants = [item.value for part in sets for item in part.elts if isinstance(item, ast.Constant)]
    return {constant for constant in constants if isinstance(constant, str)}


def _type(node: ast.expr, file: Path) -> Any:
    """The type that an annotation names; what is neither built in, typing's nor an Enum is None."""
    match node:
        case ast.Constant(None):
            return NoneType
        case ast.BinOp(left, ast.BitOr(), right):
            return typing.Union[_type(left, file), _type(right, file)]  # noqa: UP007
        case ast.Subscript(ast.Name("Optional"), inner):
            return typing.Optional[_type(inner, file)]  # noqa: UP045
        case ast.Subscript(ast.Name("Union"), ast.Tuple(parts)):
            return typing.Union[tuple(_type(part, file) for part in parts)]  # noqa: UP007
        case ast.Subscript(ast.Name("Literal"), choices):
            return typing.Literal[ast.literal_eval(choices)]
        case ast.Subscript(ast.Name("List" | "list"), inner):
            return list[_type(inner, file)]  # type: ignore[misc]  # not known before it runs
        case ast.Subscript(ast.Name("Dict" | "dict")):
            return dict
        case ast.Name(name) if name in TYPES:
            return TYPES[name]
        case ast.Name(name) if found := _find(file, name):
            return enum.Enum(name, _constants(found[1]))
    return None


def _field(node: ast.expr | None) -> dict[str, Any] | None:
    """dataclasses.field's arguments for a default; None if the constructor doesn't take the field.

    A default that isn't written out is None; it can't be told from the source, and isn't needed to check a line.
    """

    def value(node: ast.expr | None) -> Any:
        try:
            return node and ast.literal_eval(node)
        except ValueError:
            return None

    if node is None:
        return {}
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "field"):
        return {"default": value(node)}
    given = {keyword.arg: keyword.value for keyword in node.keywords}
    if "init" in given and value(given["init"]) is False:
        return None
    metadata = given.get("metadata")
    said = metadata if isinstance(metadata, ast.Dict) else ast.Dict([], [])
    pairs = {value(key): value(item) for key, item in zip(said.keys, said.values)}
    made = {"metadata": {key: pairs[key] for key in ("aliases", "choices") if pairs.get(key)}}
    if "default_factory" in given:
        factory = given["default_factory"]
        default = value(factory.body) if isinstance(factory, ast.Lambda) else []
        return made | {"default_factory": lambda: default}
    return made | ({"default": value(given["default"])} if "default" in given else {})


@functools.cache
def as_dataclass(file: Path, name: str) -> type:
    """A dataclass with the fields of that class and of its bases, in their order."""
    file, node = _defined(file, name)
    bases = [as_dataclass(file, base.id) for base in node.bases if isinstance(base, ast.Name) and _find(file, base.id)]
    fields = []
    for item in node.body:
        if not (node.decorator_list and isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)):
            continue
        kind, given = _type(item.annotation, file), _field(item.value)
        if kind == JSON:
            kind = JSON
        if kind is not None and given is not None:
            fields.append((item.target.id, kind, dataclasses.field(**given)))
    # None is made of it: to write its methods takes as long as all else here
    return dataclasses.make_dataclass(
        name, fields, bases=tuple(bases), kw_only=True, init=False, repr=False, eq=False, match_args=False
    )
