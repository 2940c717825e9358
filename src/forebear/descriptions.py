"""What functions and objects are, in JSON that another process finds too.

Two losses are the same where their descriptions are. An object may say what it is by an attribute
`about`, a mapping of what decides its results. Without one, a dataclass is its fields, and any
other callable object its class and public attributes; a function is its name, its code, and the
values it was made with or finds in its module; a `partial` its function and arguments; a module of
torch its class and settings, its weights left aside. Functions and classes of installed packages
are known by name. Numbers count to nine digits, since machines round the last ones differently.
"""

import dis
import functools
import hashlib
import inspect
import json
import math
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

SHORT = 64
"""Numbers that are written out; of more than that only their hash is."""

LISTED = 8
"""Items of a list in a message; of more than that the first and the last."""

DEEP = 12
"""Levels of objects in objects that are looked into."""

PYTHON = f"{sys.implementation.cache_tag}:"
"""What bytecode belongs to: another Python makes other code of the same text."""

INSTALLED = tuple(
    sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


@dataclass(frozen=True)
class Described:
    """What was read back of a function or an object: told apart, and never called."""

    about: Any


def describe(thing: Any) -> Any:
    """What decides the results of a function or an object, ready for JSON."""
    return _described(thing, _Above())


def same(mine: Any, theirs: Any) -> bool:
    """Whether two descriptions are of the same thing.

    The code of functions is compared only where one version of Python made both.
    """
    if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
        return mine.keys() == theirs.keys() and all(same(mine[k], theirs[k]) for k in mine)
    if isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        return len(mine) == len(theirs) and all(map(same, mine, theirs))
    if isinstance(mine, str) and isinstance(theirs, str):
        one, other = _maker(mine), _maker(theirs)
        return mine == theirs or (one is not None and other is not None and one != other)
    return mine == theirs


def shown(value: Any, other: Any) -> str:
    """A description in a message; of two mappings only what differs."""
    return repr(_differing(value, other))


def _differing(value: Any, other: Any) -> Any:
    if isinstance(value, list | tuple) and len(value) > LISTED:
        return f"{len(value)} from {value[0]!r} to {value[-1]!r}"
    if not (isinstance(value, Mapping) and isinstance(other, Mapping)):
        return value
    return {
        k: _differing(v, other[k]) if k in other else v
        for k, v in value.items()
        if k not in other or not same(v, other[k])
    }


def _maker(text: str) -> str | None:
    """The Python that made the code; None for other texts."""
    start, colon, digest = text.partition(":")
    made = start.startswith(("cpython-", "pypy")) and len(digest) == 12
    return start if colon and made else None


@dataclass(frozen=True)
class _Above:
    """What a value is part of, and the functions that were described already."""

    values: tuple[Any, ...] = ()
    functions: list[Any] = field(default_factory=list)

    def has(self, value: Any) -> bool:
        """Whether the value was met, or is too deep."""
        met = (*self.values, *self.functions)
        return any(value is one for one in met) or len(self.values) > DEEP

    def inside(self, value: Any) -> "_Above":
        """What is above the parts of a value."""
        if isinstance(value, FunctionType):
            self.functions.append(value)
        return _Above((*self.values, value), self.functions)


def _described(value: Any, above: _Above) -> Any:
    plain = _plain(value)
    if plain is not NotImplemented:
        return plain
    if isinstance(value, Described):
        return value.about
    if above.has(value):
        return _name(value)
    above = above.inside(value)
    if isinstance(value, Mapping):
        return {str(key): _described(one, above) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return _sequence([_described(one, above) for one in value])
    if isinstance(value, set | frozenset):
        return sorted((_described(one, above) for one in value), key=_text)
    if isinstance(value, functools.partial):
        kept = {"function": "partial", "of": _described(value.func, above)}
        rest = {"arguments": list(value.args), "keywords": value.keywords}
        return kept | {name: _described(one, above) for name, one in rest.items() if one}
    if isinstance(value, MethodType):
        return {**_function(value.__func__, above), "of": _described(value.__self__, above)}
    if isinstance(value, FunctionType):
        found = _function(value, above)
        return found["function"] if len(found) == 1 else found
    if isinstance(wrapped := getattr(value, "__wrapped__", None), FunctionType):
        return _described(wrapped, above)  # of functools.cache
    return _object(value, above)


def _plain(value: Any) -> Any:
    """Numbers, texts and what is known by name or content; `NotImplemented` for others."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return float(f"{value:.9g}") if math.isfinite(value) else repr(value)
    if isinstance(value, torch.dtype | torch.device | PurePath | complex):
        return str(value)
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        content = value.reshape(-1).view(torch.uint8).numpy().tobytes()
        return f"{value.dtype} {list(value.shape)} {_digest(content)}"
    if isinstance(value, np.ndarray) and value.dtype != object:
        return f"{value.dtype} {list(value.shape)} {_digest(value.tobytes())}"
    if isinstance(value, bytes):
        return f"{len(value)} bytes {_digest(value)}"
    if isinstance(value, ModuleType):
        return value.__name__
    if isinstance(value, type | BuiltinFunctionType):
        return _name(value)
    return NotImplemented


def _object(value: Any, above: _Above) -> Any:
    """A description of an object by what it says of itself, its fields, or its attributes."""
    kind = type(value)
    about = getattr(value, "about", None)
    own = getattr(kind, "name", None)
    name = own if isinstance(own, str) and not is_dataclass(value) else kind.__qualname__
    if isinstance(about, Mapping):
        settings = dict(about)
        name = own if isinstance(own, str) else name
    elif is_dataclass(value):
        settings = {f.name: getattr(value, f.name, None) for f in fields(value) if f.compare}
    elif isinstance(value, nn.Module):
        settings = _module(value)
    elif callable(value) or not _is_installed(kind):
        settings = {
            key: one
            for key, one in getattr(value, "__dict__", {}).items()
            if not key.startswith("_")
            and not isinstance(inspect.getattr_static(kind, key, None), functools.cached_property)
        }
    else:
        settings = {}
    code = _class_code(kind) if callable(value) else {}
    told = {key: _described(one, above) for key, one in settings.items()}
    return {"type": name, **told, **code} if told or code else name


def _module(module: nn.Module) -> dict[str, Any]:
    """Settings of a module, and a hash of those of the modules in it."""
    public = {key: one for key, one in vars(module).items() if not key.startswith("_")}
    own = {
        key: one
        for key, one in public.items()
        if key != "training" and isinstance(one, bool | int | float | str)
    }
    children = {name: [_name(type(one)), _module(one)] for name, one in module.named_children()}
    return {**own, "modules": _digest(_text(children).encode())} if children else own


def _function(function: FunctionType, above: _Above) -> dict[str, Any]:
    """Name, code, and values that a function was made with or finds in its module."""
    told: dict[str, Any] = {"function": _name(function)}
    code = function.__code__
    if not (_is_installed(function) and "<" not in function.__qualname__):
        told["code"] = PYTHON + _digest(_text(_code_of(code, function.__doc__)).encode())
    elif function.__closure__ is None:
        return told  # known by its name alone
    used = dict(_used(function))
    kept = {name: _described(one, above) for name, one in sorted(used.items())}
    return {**told, "with": kept} if kept else told


def _used(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """Values that a function holds, by name."""
    code = function.__code__
    steps = list(_steps(code))
    # What it writes to itself, such as a count of its calls, does not say what it is.
    written = {name for step, name in steps if step in ("STORE_GLOBAL", "STORE_DEREF")}
    for name in sorted({name for step, name in steps if step == "LOAD_GLOBAL"} - written):
        found = function.__globals__.get(name)
        if name in function.__globals__ and not isinstance(found, ModuleType):
            yield name, found
    names = code.co_varnames[: code.co_argcount]
    defaults = function.__defaults__ or ()
    yield from zip(names[len(names) - len(defaults) :], defaults, strict=True)
    yield from (function.__kwdefaults__ or {}).items()
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        if name in written:
            continue
        try:
            yield name, cell.cell_contents
        except ValueError:  # a function that is named further down
            yield name, "nothing yet"


def _steps(code: CodeType) -> Iterator[tuple[str, str]]:
    for step in dis.get_instructions(code):
        yield step.opname, str(step.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _steps(constant)


def _code_of(code: CodeType, words: str | None = None) -> Any:
    """What code does, without where it stands and its docstring."""
    constants = [
        _code_of(one) if isinstance(one, CodeType) else [type(one).__name__, _constant(one)]
        for one in code.co_consts
        if words is None or one != words
    ]
    return [code.co_code.hex(), list(code.co_names), code.co_exceptiontable.hex(), constants]


def _constant(value: Any) -> Any:
    if isinstance(value, tuple | frozenset):
        each = [[type(one).__name__, _constant(one)] for one in value]
        return sorted(each, key=_text) if isinstance(value, frozenset) else each
    return repr(value)


def _class_code(kind: type) -> dict[str, str]:
    """A hash of the methods of a class that is in no installed package."""
    found = [
        [name, _code_of(function.__code__, function.__doc__)]
        for one in kind.__mro__
        if not _is_installed(one)
        for name, held in sorted(vars(one).items())
        for function in (getattr(held, "fget", None), getattr(held, "__func__", None), held)
        # Those that dataclasses write differ from Python to Python, and say nothing of their own.
        if isinstance(function, FunctionType) and function.__code__.co_filename != "<string>"
    ]
    return {"code": PYTHON + _digest(_text(found).encode())} if found else {}


def _is_installed(thing: Any) -> bool:
    """Whether a function or class is of the library, Python, or a package."""
    module = getattr(thing, "__module__", None) or ""
    root = module.partition(".")[0]
    if root in ("forebear", "builtins", "__main__"):
        return root != "__main__"
    code = getattr(thing, "__code__", None)
    files = [getattr(sys.modules.get(module), "__file__", None), code and code.co_filename]
    return any(file is not None and file.startswith((*INSTALLED, "<frozen")) for file in files)


def _name(thing: Any) -> str:
    """Qualified name, with the module where that is of another package: ours may move."""
    module = getattr(thing, "__module__", None) or ""
    name = getattr(thing, "__qualname__", type(thing).__qualname__)
    own = module.partition(".")[0] in ("", "forebear", "builtins")
    return name if own or not _is_installed(thing) else f"{module}.{name}"


def _sequence(values: list[Any]) -> Any:
    numbers = all(isinstance(one, int | float) for one in values)
    if not numbers or len(values) <= SHORT:
        return values
    return f"{len(values)} numbers {_digest(_text(values).encode())}"


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
