"""A task: what was trained and what is asked of it."""

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from forebear.data import batch_length
from forebear.descriptions import describe
from forebear.errors import EvaluationModeWarning, FormatError, TaskError, unknown_name
from forebear.sharding import in_step, require_whole, spread, to_shards, whole
from forebear.tasks.objective import Objective
from forebear.types import read_tensors

Loss = Callable[[nn.Module, Any], Tensor]
State = Mapping[str, Tensor]
Result = TypeVar("Result")


@dataclass(frozen=True)
class Checkpoint:
    """Weights at one moment of training and the learning rate used around it.

    `state` is a state dict or the path of a `.safetensors` or `torch.save` file; files are read
    with `weights_only=True`, so no code in them runs.
    """

    state: State | str | Path
    learning_rate: float = 1.0

    def load(self) -> State:
        """The state dict.

        Raises:
            FormatError: the file is missing, or holds something else than weights.
        """
        if isinstance(self.state, Mapping):
            return self.state
        path = Path(self.state)
        if not path.is_file():
            raise FormatError(f"checkpoint {path} does not exist")
        if path.suffix == ".safetensors":
            return read_tensors(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).splitlines()[0]
            raise FormatError(f"checkpoint {path} cannot be read as weights: {reason}") from error
        if not isinstance(state, Mapping):
            kind = type(state).__name__
            raise FormatError(f"checkpoint {path} holds a {kind}: save model.state_dict()")
        return state


class Task:
    """A trained model, its training loss, and the measurement to be attributed.

    Args:
        model: any `torch.nn.Module`.
        loss: `loss(model, batch) -> [b]`, the training loss of each example; `fb.losses` has ready
            ones that every method understands.
        measure: `measure(model, batch) -> [b]`, the scalar of each query whose change is
            attributed; minus the loss when left out. Higher = more of the behaviour.
        layers: names or patterns (`"h.*.mlp.*"`) of modules; all trainable parameters when left
            out.
        checkpoints: `Checkpoint`s, state dicts or paths, for methods that use several.
        collate: makes a batch of a list of examples; torch's default when left out.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        *,
        measure: Loss | None = None,
        layers: str | Sequence[str] | None = None,
        checkpoints: Sequence[Checkpoint | State | str | Path] | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TaskError(f"model is a {type(model).__name__}: it must be a torch.nn.Module")
        self.model = model
        self.loss = loss
        self.measure = measure
        self.layers = (layers,) if isinstance(layers, str) else layers and tuple(layers)
        self.checkpoints = tuple(
            c if isinstance(c, Checkpoint) else Checkpoint(c) for c in checkpoints or ()
        )
        self.collate = collate
        # Checkpoints that the model is at, and the weights that each of them took the place of.
        self._moments: list[tuple[Checkpoint | None, State]] = []
        if not any(p.requires_grad for p in model.parameters()):
            raise TaskError(
                f"{type(model).__name__} has no trainable parameter: set requires_grad on those "
                "that training changed"
            )
        # A pattern that matches nothing is an error now, not in a result.
        if not self.selected_parameters():
            raise TaskError(
                f"layers={self.layers!r} select no trainable parameter: name layers that training "
                "changed, or leave layers= out"
            )

    def select(self, layers: str | Sequence[str] | None) -> "Task":
        """The same task restricted to other layers; the model is shared."""
        task = Task(
            self.model,
            self.loss,
            measure=self.measure,
            layers=layers,
            checkpoints=self.checkpoints,
            collate=self.collate,
        )
        task._moments = self._moments
        return task

    def asking(self, measure: Loss | None) -> "Task":
        """The same task with another measurement; the model is shared."""
        task = Task(
            self.model,
            self.loss,
            measure=measure,
            layers=self.layers,
            checkpoints=self.checkpoints,
            collate=self.collate,
        )
        task._moments = self._moments
        return task

    def __getstate__(self) -> dict[str, Any]:
        # Elsewhere the weights are what they are here now, and there is no way back.
        return {**self.__dict__, "_moments": []}

    def selected_modules(self) -> set[str]:
        """Names of the modules that `layers` selects, with all modules below them."""
        names = [name for name, _ in self.model.named_modules(remove_duplicate=False)]
        if self.layers is None:
            return set(names)
        selected: set[str] = set()
        for pattern in self.layers:
            hits = [name for name in names if name and fnmatchcase(name, pattern)]
            if not hits:
                raise unknown_name("layer", pattern, [name for name in names if name])
            selected.update(n for n in names for h in hits if n == h or n.startswith(h + "."))
        return selected

    def selected_parameters(self) -> dict[str, nn.Parameter]:
        """Trainable parameters of the selected modules; a tied one under its first name."""
        modules = self.selected_modules()
        # By identity: the first name of a tied one may lie in a module that is not selected.
        chosen = {
            id(parameter)
            for name, module in self.model.named_modules(remove_duplicate=False)
            if name in modules
            for parameter in module.parameters(recurse=False)
        }
        return {
            name: parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad and id(parameter) in chosen
        }

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter is."""
        return next(self.model.parameters()).device

    @property
    def objective(self) -> Objective:
        """The loss, when it is one that can sample targets.

        Raises:
            TaskError: it is a plain callable.
        """
        if isinstance(self.loss, Objective):
            return self.loss
        raise TaskError(
            f"{getattr(self.loss, '__name__', self.loss)!r} is a plain loss, and this method needs "
            "model outputs: use one of forebear.losses or subclass forebear.Objective"
        )

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        """Training loss of each example, `[b]`, checked."""
        return per_example(self.loss(model, batch), batch_length(batch), "the loss")

    def measurements(self, model: nn.Module, batch: Any) -> Tensor:
        """Measurement of each query, `[b]`, checked; minus the loss unless `measure` was given."""
        if self.measure is None:
            return -self.losses(model, batch)
        return per_example(self.measure(model, batch), batch_length(batch), "measure")

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """The model in evaluation mode inside the block; its modes are restored afterwards."""
        modes = {module: module.training for module in self.model.modules()}
        noisy = sorted(
            {type(m).__name__ for m, on in modes.items() if on and _differs_in_training(m)}
        )
        if noisy:
            warnings.warn(
                f"the model is in training mode and has {', '.join(noisy)}: it is scored in "
                "evaluation mode; call model.eval() to silence this",
                EvaluationModeWarning,
                stacklevel=3,
            )
        self.model.eval()
        try:
            yield
        finally:
            to_shards(self.model)
            for module, mode in modes.items():
                module.training = mode

    @contextmanager
    def at(self, checkpoint: Checkpoint | None) -> Iterator[None]:
        """The model with the weights of `checkpoint` inside the block; None changes nothing.

        Raises:
            TaskError: the checkpoint does not fit; or it is none of the task's own, and the model
                is sharded over processes.
        """
        if checkpoint is None:
            yield
            return
        if not any(checkpoint is one for one in self.checkpoints):
            # The parts of a sharded model must be of the same moment in all processes.
            require_whole(self.model)
        with self._with(checkpoint.load(), checkpoint):
            yield

    def in_step(
        self, kind: str, compute: Callable[[], Result], again: Callable[[], object]
    ) -> Result:
        """Make a pass at the present weights, together with other processes of a sharded model.

        Arguments are those of `forebear.sharding.in_step`.
        """
        moment = self._moments[-1][0] if self._moments else None

        def repeat() -> None:
            with self._back_at(moment):
                again()

        number = next((i for i, one in enumerate(self.checkpoints) if one is moment), "none")
        return in_step(self.model, f"{kind} at checkpoint {number}", compute, repeat)

    @contextmanager
    def _back_at(self, moment: Checkpoint | None) -> Iterator[None]:
        """The weights of a checkpoint or, for None, those outside of all of them."""
        present = self._moments[-1][0] if self._moments else None
        if moment is present:
            yield
            return
        state = self._moments[0][1] if moment is None else moment.load()
        with self._with(state, moment):
            yield

    @contextmanager
    def _with(self, state: State, moment: Checkpoint | None) -> Iterator[None]:
        now = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self._moments.append((moment, now))
        try:
            try:
                # It loads what fits before it complains.
                self.model.load_state_dict(spread(state, now))
            except RuntimeError as error:
                raise TaskError(f"a checkpoint does not fit the model: {error}") from error
            yield
        finally:
            self._moments.pop()
            self.model.load_state_dict(now)

    def model_hash(self) -> str:
        """SHA-256 of the weights and buffers, by name.

        Of a sharded model it is that of the whole weights, which all processes must ask for.
        """
        return state_hash(self.model.state_dict())

    def facts(self) -> dict[str, Any]:
        """Descriptions of loss and measurement, and the layers, as records name them."""
        asked = "minus the loss" if self.measure is None else describe(self.measure)
        return {
            "loss": describe(self.loss),
            "measure": asked,
            "layers": None if self.layers is None else list(self.layers),
        }

    def copy_model(self) -> nn.Module:
        """An independent copy of the model.

        Raises:
            TaskError: its parameters are sharded over processes.
        """
        require_whole(self.model)
        return copy.deepcopy(self.model)


def state_hash(state: State) -> str:
    """SHA-256 (first 16 digits) of a state dict, by name, type, shape and content."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        # One after the other: the whole of a sharded model may be more than a machine holds.
        value = whole(value.detach()).cpu().contiguous()
        digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def per_example(values: Tensor, size: int, what: str) -> Tensor:
    """`values` if it has shape `[size]`.

    Raises:
        TaskError: it has another shape, which would mix the examples' gradients.
    """
    if not isinstance(values, Tensor) or values.shape != (size,):
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise TaskError(
            f"{what} returned {got} for a batch of {size} examples: it must return one value an "
            f"example, shape ({size},); for a torch loss pass reduction='none'"
        )
    return values


def _differs_in_training(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    return isinstance(module, nn.modules.batchnorm._BatchNorm)
