"""Small real tasks: data, a recipe, and planted label errors. One file a task, one row each.

Every file has `load(...) -> Images` and `recipe(...) -> Recipe`.
"""

from importlib import import_module
from types import ModuleType

from forebear.errors import unknown_name

TASKS = {
    "digits": "forebear.zoo.digits",
    "fashion_mnist": "forebear.zoo.fashion_mnist",
}


def get(name: str) -> ModuleType:
    """The module of a task.

    Raises:
        UnknownNameError: there is no task of that name.
    """
    if name not in TASKS:
        raise unknown_name("zoo task", name, TASKS)
    return import_module(TASKS[name])
