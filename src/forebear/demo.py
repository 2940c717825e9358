"""The demo: one real task from training to a page, checked against retrained models.

Every stage leaves its result in the run folder, so an interrupted demo resumes where it stopped.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from forebear import methods, metrics, zoo
from forebear.data import Data
from forebear.errors import MismatchError, unknown_name
from forebear.methods.fitted import version
from forebear.pipeline import evaluate, run_method, truth_facts
from forebear.progress import track
from forebear.record import environment, now, plain_pass_seconds
from forebear.report import write as write_report
from forebear.run import (
    DatasetFacts,
    LabelErrors,
    MethodResult,
    ModelFacts,
    Removal,
    Run,
    read_self_influence,
    scores_folder,
)
from forebear.task import Checkpoint, Task
from forebear.training import GroundTruth, Recipe, half_subsets, removal_outcomes
from forebear.types import Scores, read_json, write_json
from forebear.zoo.images import Images

DATA = {"digits": "digits", "fashion-mnist": "fashion_mnist"}
FLIPPED = 0.05
SUBSETS = 100
SEEDS = {"digits": 4, "fashion-mnist": 2}  # what three minutes on two cores allow
CHECKPOINTS = 5
MODELS_OF_TRAK = 5
REMOVED = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Entry:
    """One line of the demo's table: a method with its options and what to say about it."""

    name: str
    options: dict[str, Any]
    note: str = ""


ENTRIES = (
    Entry("random", {}, "the floor of every column"),
    Entry("similarity", {}, "looks alike to the model; labels play no part"),
    Entry("graddot", {}),
    Entry("gradcos", {}),
    Entry("tracin", {}, f"{CHECKPOINTS} checkpoints of the training run"),
    Entry("trak", {"dimension": 512}, f"{MODELS_OF_TRAK} models trained with other seeds"),
    Entry("kfac", {}),
    Entry("ekfac", {}),
    Entry("exact", {"curvature": "gauss_newton"}, "the last two layers"),
)


def run(*, out: Path, data: str = "digits", seed: int = 0, threads: int | None = None) -> Run:
    """Train, attribute, retrain, compare; write the run folder `out` and its page.

    Args:
        out: folder to write; one that holds an interrupted demo is resumed.
        data: `"digits"` or `"fashion-mnist"`.
        seed: of everything that is drawn.
        threads: for torch; its default when left out.

    Raises:
        MismatchError: the folder holds another demo.
    """
    if data not in DATA:
        raise unknown_name("data", data, DATA)
    if threads is not None:
        torch.set_num_threads(threads)
    out = Path(out)
    _claim(out, {"data": data, "seed": seed, "subsets": SUBSETS, "seeds": SEEDS[data]})
    started = time.perf_counter()
    module = zoo.get(DATA[data])
    demo = Demo(out, module.load(seed=seed), module.recipe(), seed, SEEDS[data])
    finished = replace(demo.record(data), seconds=time.perf_counter() - started)
    finished.save(out)
    write_report(out)
    return finished


class Demo:
    """The stages of the demo; each reads what an earlier run of it left."""

    def __init__(self, out: Path, clean: Images, recipe: Recipe, seed: int, seeds: int) -> None:
        self.out = out
        self.clean = clean
        self.images = clean.with_flipped_labels(FLIPPED, seed)
        self.recipe = recipe
        self.seed = seed
        self.seeds = seeds

    def record(self, data: str) -> Run:
        """Run all stages and put their results together."""
        model, checkpoints = self.model()
        self.write_data(model)
        results = [self.method(entry, model, checkpoints) for entry in track(ENTRIES, "methods")]
        truth, truth_seconds = self.truth(model)
        results = [self.judged(result, truth) for result in results]
        best = max(results, key=lambda result: result.lds.mean if result.lds else -1.0)
        task, train, queries = self.task("", model), self.images.train, self.images.queries
        return Run(
            kind="demo",
            title=f"{self.images.name.capitalize()}: which training images made the model say so",
            created=now(),
            version=version(),
            dataset=DatasetFacts(
                name=self.images.name,
                train=len(train),
                queries=len(queries),
                classes=list(self.images.classes),
                fingerprint=train.fingerprint,
                image_shape=list(self.images.train_images.shape[1:]),
            ),
            model=ModelFacts(
                description=_description(model),
                parameters=sum(p.numel() for p in model.parameters()),
                hash=task.model_hash(),
                **{name: task.facts()[name] for name in ("loss", "measure")},
                train_accuracy=_accuracy(model, train),
                query_accuracy=_accuracy(model, queries),
            ),
            plain_pass_seconds=plain_pass_seconds(task, train),
            truth=truth_facts(truth, truth_seconds),
            label_errors=LabelErrors(flipped=int(self.images.flipped.sum())),
            methods=results,
            removal=self.removal(best),
            best=best.name,
            environment=environment() | {"seed": self.seed, "data": data},
        )

    def model(self) -> tuple[nn.Module, tuple[Checkpoint, ...]]:
        """The attributed model and the checkpoints of its training."""
        from safetensors.torch import load_file, save_file

        path = self.out / "model.safetensors"
        if not path.is_file():
            model, checkpoints = self.recipe.train_with_checkpoints(
                self.images.train, seed=self.seed, count=CHECKPOINTS
            )
            tensors = {
                f"{i}:{c.learning_rate!r}:{name}": value.contiguous()
                for i, c in enumerate(checkpoints)
                for name, value in c.load().items()
            }
            save_file(tensors, path.with_suffix(".partial"))
            path.with_suffix(".partial").replace(path)
        states: dict[tuple[int, float], dict[str, torch.Tensor]] = {}
        for key, value in load_file(path).items():
            i, rate, name = key.split(":", 2)
            states.setdefault((int(i), float(rate)), {})[name] = value
        checkpoints = tuple(Checkpoint(states[key], key[1]) for key in sorted(states))
        model = self.recipe.build()
        model.load_state_dict(checkpoints[-1].load())
        return model.eval(), checkpoints

    def task(self, name: str, model: nn.Module, checkpoints: tuple[Checkpoint, ...] = ()) -> Task:
        """The task for a method: the last model, some of its layers, its checkpoints or others."""
        loss = self.recipe.loss
        if name == "tracin":
            return Task(model, loss, checkpoints=checkpoints)
        if name == "exact":
            layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear)]
            return Task(model, loss, layers=layers[-2:])
        if name == "trak":
            everything = torch.ones(MODELS_OF_TRAK, len(self.images.train), dtype=torch.bool)
            seeds = [self.seed, *range(1000, 999 + MODELS_OF_TRAK)]
            others = self.recipe.train_many(self.images.train, everything, seeds)
            states = [model.state_dict(), *(m.state_dict() for m in list(others.models())[1:])]
            return Task(model, loss, checkpoints=states)
        return Task(model, loss)

    def method(
        self, entry: Entry, model: nn.Module, checkpoints: tuple[Checkpoint, ...]
    ) -> MethodResult:
        """Scores, top lists and self-influence of one method."""
        path = self.out / "methods" / f"{entry.name}.json"
        if path.is_file():
            facts = read_json(path)
            facts.pop("format", None)
            return MethodResult(**facts)
        configured = methods.get(entry.name, **entry.options)
        task = self.task(entry.name, model, checkpoints)
        result = run_method(
            configured, task, self.images.train, self.images.queries, self.out, note=entry.note
        )
        suspicion = read_self_influence(self.out, entry.name)
        flipped = self.images.flipped.numpy()
        result = replace(
            result,
            label_error_auc=metrics.mislabel_auc(suspicion, flipped),
            found_in_first_10_percent=metrics.found_in_first(suspicion, flipped, 0.1),
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(result))
        return result

    def truth(self, model: nn.Module) -> tuple[GroundTruth, float]:
        """Outcomes of models retrained on random halves of the training set."""
        folder = self.out / "truth"
        if (folder / "truth.json").is_file():
            return GroundTruth.load(folder), read_json(folder / "seconds.json")["seconds"]
        started = time.perf_counter()
        subsets = half_subsets(len(self.images.train), SUBSETS, seed=self.seed)
        truth = GroundTruth.collect(
            self.recipe,
            self.images.train,
            self.images.queries,
            subsets=subsets,
            # The attributed model's own seed would let its luck into the truth.
            seeds=[self.seed + 1 + i for i in range(self.seeds)],
            model=model,
            full=False,
            folder=folder / "pieces",
        )
        seconds = time.perf_counter() - started
        write_json(_made(folder) / "seconds.json", {"seconds": seconds})
        truth.save(folder)
        return truth, seconds

    def judged(self, result: MethodResult, truth: GroundTruth) -> MethodResult:
        """A result with its linear datamodelling score."""
        found = evaluate(Scores.load(scores_folder(self.out, result.name)), truth)
        return replace(result, lds=found["lds"])

    def removal(self, best: MethodResult) -> Removal:
        """What retraining without each query set's strongest proponents does."""
        path = self.out / "removal.json"
        if path.is_file():
            facts = read_json(path)
            facts.pop("format", None)
            return Removal(**facts)
        curves: dict[str, list[float]] = {}
        random: np.ndarray | None = None
        full = 0.0
        names = list(dict.fromkeys([best.name, "graddot", "similarity"]))
        for name in track(names, "removal curves"):
            scores = Scores.load(scores_folder(self.out, name))
            outcome = removal_outcomes(
                self.recipe,
                self.images.train,
                self.images.queries,
                scores,
                fractions=REMOVED,
                seeds=2,
            )
            full = float(outcome.full.mean())
            curves[name] = [full, *outcome.highest.mean(1).tolist()]
            random = outcome.random if random is None else random
        assert random is not None
        curves["random"] = [full, *random.mean(1).tolist()]
        removal = Removal(
            fractions=[0.0, *REMOVED],
            curves=curves,
            measurement="minus the loss, mean over the queries",
        )
        write_json(path, asdict(removal))
        return removal

    def write_data(self, model: nn.Module) -> None:
        """Images and labels, for the page."""
        from safetensors.numpy import save_file

        path = self.out / "data.safetensors"
        queries, labels = _pair(self.images.queries)
        with torch.no_grad():
            predictions = model(queries).argmax(1)
        save_file(
            {
                "train_images": np.ascontiguousarray(self.images.train_images),
                "query_images": np.ascontiguousarray(self.images.query_images),
                "train_labels": _pair(self.clean.train)[1].numpy(),
                "train_given_labels": _pair(self.images.train)[1].numpy(),
                "query_labels": labels.numpy(),
                "query_predictions": predictions.numpy(),
                "flipped": self.images.flipped.numpy(),
            },
            path,
        )


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Mark the folder as this demo's, or refuse one that belongs to another."""
    path = out / "demo.json"
    if path.is_file():
        found = read_json(path)
        for key, value in settings.items():
            if found.get(key) != value:
                raise MismatchError(
                    f"{out} holds a demo with {key} {found.get(key)!r}, this one has {value!r}: "
                    "choose another --out, or delete the folder"
                )
        return
    if (out / "run.json").is_file():
        raise MismatchError(f"{out} holds another run: choose another --out, or delete it")
    write_json(_made(out) / "demo.json", settings)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _pair(data: Data) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels."""
    inputs, labels = data.batch(slice(None))
    return inputs, labels


def _accuracy(model: nn.Module, data: Data) -> float:
    inputs, labels = _pair(data)
    with torch.no_grad():
        return float((model(inputs).argmax(1) == labels).float().mean())


def _description(model: nn.Module) -> str:
    """The sizes of a multilayer perceptron, or the class name."""
    layers = [part for part in model.modules() if isinstance(part, nn.Linear)]
    if not layers:
        return type(model).__name__
    return "-".join(str(n) for n in [layers[0].in_features, *(p.out_features for p in layers)])
