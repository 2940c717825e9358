"""Small real tasks: data and a recipe. One file a task, one row each.

Every file has `load(...)`, whose result has `train` and `queries`, and `recipe(...) -> Recipe`.
"""

from importlib import import_module
from types import ModuleType

from forebear.errors import unknown_name

TASKS = {
    "breast_cancer": "forebear.zoo.breast_cancer",
    "diabetes": "forebear.zoo.diabetes",
    "digits": "forebear.zoo.digits",
    "digits_diffusion": "forebear.zoo.digits_diffusion",
    "fashion_diffusion": "forebear.zoo.fashion_diffusion",
    "fashion_mnist": "forebear.zoo.fashion_mnist",
    "text": "forebear.zoo.text",
}


def get(name: str) -> ModuleType:
    """The module of a task.

    Raises:
        UnknownNameError: there is no task of that name.
    """
    if name not in TASKS:
        raise unknown_name("zoo task", name, TASKS)
    return import_module(TASKS[name])
