"""What results of a method belong to, beside the model's weights and the data."""

from typing import Any

from forebear.descriptions import same, shown
from forebear.errors import MismatchError
from forebear.task import Task, state_hash

_REMEDIES = {
    "loss": "make the task with the loss it was fitted with, or fit again",
    "layers": "pass the same layers= to the task, or fit again",
    "checkpoints": "pass the same checkpoints= to the task, or fit again",
}


def facts_of(method: Any, task: Task | None) -> dict[str, Any]:
    """Loss, measurement, layers and checkpoints that decide scores, ready for JSON.

    Layers that the method names itself are among its settings, and checkpoints count only where it
    looks at several.

    Args:
        method: its configuration.
        task: what was trained and what is asked; None for methods without a model.
    """
    if task is None:
        return {"loss": None, "measure": None, "layers": None, "checkpoints": []}
    several = getattr(method, "checkpoints", "last") != "last"
    checkpoints = task.checkpoints if several else ()
    return {
        **task.facts(),
        "layers": list(task.layers or ()) if getattr(method, "layers", None) is None else None,
        "checkpoints": [[state_hash(c.load()), c.learning_rate] for c in checkpoints],
    }


def saved_facts(method: Any, task: Task | None) -> dict[str, Any]:
    """Those that a fitted state belongs to: any measurement can be asked of it."""
    return {name: fact for name, fact in facts_of(method, task).items() if name != "measure"}


def require_same_task(about: dict[str, Any], method: Any, task: Task | None) -> None:
    """Refuse to load a state that was fitted to another loss, other layers or checkpoints.

    Args:
        about: what was saved; states of earlier versions do not say these, and pass.
        method: the configuration.
        task: what the state is to be used with.

    Raises:
        MismatchError: with what differs, and what to do.
    """
    for name, own in saved_facts(method, task).items():
        theirs = about.get(name, own)
        if not same(theirs, own):
            raise MismatchError(
                f"{name} differs: this state was fitted with {shown(theirs, own)} and the task has "
                f"{shown(own, theirs)}: {_REMEDIES[name]}"
            )
