"""Scores, maps, concepts and the counterfactual of generated images, joined into a gallery."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from forebear import methods as registry
from forebear.data import Data
from forebear.errors import DataError, TaskError, unknown_name
from forebear.gallery import Gallery, Mapped
from forebear.generated.counterfactual import Counterfactual, digest, regenerate
from forebear.generated.exhibits import ON_PAGE, Curator, compared
from forebear.generated.pictures import Album, Decode, shown
from forebear.methods.baselines import Similarity
from forebear.methods.concept_trak import ConceptTRAK
from forebear.methods.fitted import version
from forebear.methods.nda import NDA
from forebear.methods.settings import settings_of
from forebear.pipeline import method_result, write_scores
from forebear.progress import track
from forebear.record import open_run, write_texts
from forebear.report import write
from forebear.run import IMAGES, MethodResult, Run, scores_folder
from forebear.stream import BATCH
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.types import Provenance, Scores, read_json, write_json

DEFAULT = ("das", "nda", "similarity")

CONCEPTS = "concept_trak"

PIXELS = "pixels"
"""The baseline that every page has: it looks at no model."""

PIXELS_AT_A_TIME = 2**22
"""Of training images, for the baseline."""

SHOWN = 8
"""Training images of a list on the page."""

MAPPED = 4
"""Training images that have maps."""

Texts = Mapping[str, Mapping[Any, str]]


def attribute_images(
    task: Task,
    train: Any,
    generated: Any,
    *,
    methods: Sequence[Any] = DEFAULT,
    out: str | Path,
    concepts: Mapping[Any, Any] | None = None,
    counterfactual: Counterfactual | None = None,
    decode: Decode | None = None,
    texts: Texts | None = None,
    ids: Any = None,
    top: int = SHOWN,
    title: str = "",
    batch_size: int = BATCH,
) -> Run:
    """Which training images made these images, by several methods, as a folder with a page.

    A row of the training images that are closest pixel by pixel is always there to compare with.
    What is in the folder already is not computed again; other methods of an earlier call stay.

    Args:
        task: a diffusion task: its loss is a `fb.losses.Denoising`.
        train: training images, as of `forebear.tasks.diffusion.images` or any map-style dataset of
            such dicts; of those in a folder only the ones that are shown are read a second time.
        generated: images that the model made, of the same kind, with the keys that their start
            noise belongs to. The page shows the first twelve.
        methods: names, or configured methods. `concept_trak` among them says how concepts are
            scored, and has no row of its own.
        out: folder to write.
        concepts: queries of `forebear.methods.concept_trak.concepts` by the name of the concept,
            one for each generated image; a tuple of names gives each image its own.
        counterfactual: retrain without each image's strongest training images.
        decode: from what the model makes to pictures `[b, 1 or 3, h, w]` from -1 to 1, for models
            of latents.
        texts: words for people by id, `{"train": {id: text}, "queries": {id: text}}`.
        ids: of the training images, such as file names, which the page shows.
        top: training images in a row of the page.
        title: of the page.
        batch_size: images at a time; a memory setting.

    Returns:
        The record of the run.

    Raises:
        TaskError: the task is not a diffusion task.
        DataError: images cannot be shown, or concepts are not one for each image.
        MismatchError: the folder holds a run of another model or data.
    """
    if not isinstance(task.loss, Denoising):
        raise TaskError(
            f"the task's loss is {getattr(task.loss, 'name', task.loss)!r}: attribute_images is "
            "for diffusion models, whose loss is a fb.losses.Denoising; use fb.attribute"
        )
    work = _Work(
        task=task,
        train=Data.of(train, ids=ids, collate=task.collate),
        queries=Data.of(generated, collate=task.collate),
        out=Path(out),
        album=Album(Path(out), decode),
        top=top,
        batch_size=batch_size,
    )
    return work.run(methods, concepts or {}, counterfactual, texts, title)


@dataclass(frozen=True)
class _Work:
    """One call: what is asked, and where results go."""

    task: Task
    train: Data
    queries: Data
    out: Path
    album: Album
    top: int
    batch_size: int

    def run(
        self,
        methods: Sequence[Any],
        concepts: Mapping[Any, Any],
        counterfactual: Counterfactual | None,
        texts: Texts | None,
        title: str,
    ) -> Run:
        """Everything, in an order that leaves a page before models are trained again."""
        started = time.perf_counter()
        one = self.queries.batch(slice(0, 1))["image"]
        side = list(shown(one, self.album.decode).shape[2:])
        rows, conceptual = _configured(methods, bool(concepts))
        asked = {name: self._concept(name, data) for name, data in concepts.items()}
        name = title or self.out.name
        run = open_run(self.out, name, self.task, self.train, self.queries, kind=IMAGES)
        removing = self._removing(counterfactual, rows, run)
        if texts is not None:
            write_texts(self.out, texts)
        for method in rows:
            run = self._joined(run, self.method(method, run))
        run = replace(self._joined(run, self.pixels(run)), best=rows[0].name)
        run.save(self.out)
        mapped = self.maps(next((method for method in rows if isinstance(method, NDA)), None))
        curator = Curator(run, self.train, self.queries, self.album, self.top)
        gallery = curator.gallery(mapped, self.concepts(conceptual, asked), side)
        gallery.save(self.out)
        write(self.out)
        if counterfactual is not None:
            self.remove(counterfactual, removing, gallery)
        run = replace(run, seconds=(run.seconds or 0.0) + time.perf_counter() - started)
        run.save(self.out)
        write(self.out)
        return run

    def method(self, configured: Any, run: Run) -> MethodResult:
        """Scores and top lists of a method; those of an earlier call are kept."""
        name = configured.name
        path = self.out / "methods" / f"{name}.json"
        facts = self._facts(settings_of(configured))
        known = next((result for result in run.methods if result.name == name), None)
        if known is not None and path.is_file() and read_json(path).get("facts") == facts:
            return known
        started = time.perf_counter()
        fitted = configured.fit(self._task(configured), self.train, batch_size=self.batch_size)
        scores = fitted.score(self.queries)
        seconds = time.perf_counter() - started
        write_scores(scores, self.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"facts": facts})
        label = registry.METHODS[name].label
        return method_result(scores, label, seconds, run.plain_pass_seconds)

    def pixels(self, run: Run) -> MethodResult:
        """Minus the Euclidean distance of the pixels: what looks alike, with no model at all."""
        known = next((result for result in run.methods if result.name == PIXELS), None)
        if known is not None and (scores_folder(self.out, PIXELS) / "scores.json").is_file():
            return known
        started = time.perf_counter()
        mine = self.queries.batch(slice(None))["image"].double().flatten(1)
        step = max(1, PIXELS_AT_A_TIME // mine.shape[1])
        steps = -(-len(self.train) // step)
        columns = [
            -torch.cdist(mine, batch["image"].double().flatten(1))
            for _, batch in track(self.train.batches(step), "pixel distance", total=steps)
        ]
        about = Provenance(
            method=PIXELS,
            train=self.train.fingerprint,
            queries=self.queries.fingerprint,
            model=self.task.model_hash(),
            version=version(),
        )
        scores = Scores(
            values=torch.cat(columns, 1).float(),
            query_ids=self.queries.ids,
            train_ids=self.train.ids,
            provenance=about,
        )
        write_scores(scores, self.out)
        return method_result(scores, "Pixel distance", time.perf_counter() - started, None)

    def maps(self, nda: NDA | None) -> list[Mapped | None]:
        """Where each image's strongest training images matter, by the number in the training set.

        Images without maps have None: the method was not asked, or mixes two scales.
        """
        some = self.queries.slice(slice(0, ON_PAGE))
        if nda is None or len(nda.windows) > 1:
            return [None] * len(some)
        top = min(MAPPED, self.top, len(self.train))
        name = digest({**self._facts(settings_of(nda)), "top": top})
        files = [f"maps/{name}-{i:03d}.safetensors" for i in range(len(some))]
        if not all((self.out / file).is_file() for file in files):
            self._write_maps(nda, some, top, files)
        position = {str(each): i for i, each in enumerate(self.train.ids.tolist())}
        lists = Scores.load(scores_folder(self.out, nda.name)).top(top).ids[: len(some)].tolist()
        return [
            Mapped(file=file, images=[position[str(one)] for one in each])
            for file, each in zip(files, lists, strict=True)
        ]

    def _write_maps(self, nda: NDA, some: Data, top: int, files: list[str]) -> None:
        from safetensors.torch import save_file

        (self.out / "maps").mkdir(parents=True, exist_ok=True)
        fitted = nda.fit(self.task, self.train, batch_size=self.batch_size)
        maps, sources = fitted.maps(some, top), fitted.sources(some, top)
        for i, file in enumerate(files):
            tensors = {
                "here": maps.values[i],
                "there": sources.values[i],
                "entropy": maps.entropy[i],
            }
            plain = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
            partial = (self.out / file).with_suffix(".partial")
            save_file(plain, partial)
            partial.replace(self.out / file)

    def concepts(self, configured: Any, asked: Mapping[Any, Data]) -> dict[Any, Scores]:
        """Scores of concepts by name, each kept in a folder of its own."""
        found, fitted = {}, None
        for name, data in asked.items():
            facts = {**self._facts(settings_of(configured)), "queries": data.fingerprint}
            folder = self.out / "concepts" / digest(facts)
            if not (folder / "scores.json").is_file():
                fitted = fitted or configured.fit(self.task, self.train, batch_size=self.batch_size)
                fitted.score(data).save(folder)
            found[name] = Scores.load(folder)
        return found

    def remove(self, about: Counterfactual, method: str, gallery: Gallery) -> None:
        """Retrain without the strongest of a method, and put what that changes into the gallery."""
        loss = self.task.loss
        assert isinstance(loss, Denoising)
        scores = Scores.load(scores_folder(self.out, method))
        folder = self.out / "counterfactual"
        again = regenerate(about, loss, self.train, self.queries, scores, folder)
        compared(gallery, again, about, method, self.album).save(self.out)

    def _removing(self, about: Counterfactual | None, rows: list[Any], run: Run) -> str:
        """The method whose list is removed."""
        if about is None or about.method is None:
            return rows[0].name
        known = [*(row.name for row in rows), *(result.name for result in run.methods), PIXELS]
        if about.method not in known:
            raise unknown_name("method of the counterfactual", about.method, known)
        return about.method

    def _concept(self, name: Any, data: Any) -> Data:
        """Queries of a concept, one for each generated image that the page shows."""
        queries = Data.of(data, collate=self.task.collate)
        names = [name] if isinstance(name, str) else list(name)
        if len(queries) != len(self.queries) or len(names) not in (1, len(self.queries)):
            raise DataError(
                f"the concept {name!r} has {len(queries)} queries and {len(names)} names for "
                f"{len(self.queries)} generated images: give one query each, and one name for all "
                "or one each"
            )
        return queries.slice(slice(0, ON_PAGE))

    def _task(self, configured: Any) -> Task:
        """The task; for hidden states, with nearly clean images, in which there is more to see."""
        task, loss = self.task, self.task.loss
        if not isinstance(configured, Similarity) or not isinstance(loss, Denoising):
            return task
        clear = min(loss.levels, key=lambda level: noise_share(loss, level))
        return Task(
            task.model,
            loss.at((clear,), draws=1),
            layers=task.layers,
            collate=task.collate,
        )

    def _facts(self, settings: dict[str, Any]) -> dict[str, Any]:
        """What decides scores."""
        return {
            "settings": settings,
            "model": self.task.model_hash(),
            "train": self.train.fingerprint,
            "queries": self.queries.fingerprint,
        }

    def _joined(self, run: Run, result: MethodResult) -> Run:
        """The record with a method; the baseline stays at the end of the rows."""
        others = [other for other in run.methods if other.name != result.name]
        ranked = sorted([*others, result], key=lambda each: each.name == PIXELS)
        run = replace(run, methods=ranked)
        run.save(self.out)
        return run


def _configured(methods: Sequence[Any], asked: bool) -> tuple[list[Any], Any]:
    """Methods of the rows, and that of concepts."""
    each = [registry.get(method) if isinstance(method, str) else method for method in methods]
    conceptual = [method for method in each if method.name == CONCEPTS]
    if conceptual and not asked:
        raise DataError(
            f"{CONCEPTS} is about concepts, and none are named: pass concepts=, which a file for "
            "the command line defines as concepts()"
        )
    rows = [method for method in each if method.name != CONCEPTS]
    if not rows:
        raise DataError("methods names none for the rows of the page: add one, such as 'das'")
    return rows, conceptual[-1] if conceptual else ConceptTRAK()


def noise_share(loss: Denoising, level: float) -> float:
    """Noise over signal at a level."""
    signal, strength = loss.schedule.at(level)
    return strength / signal
