"""Scores, maps, concepts and the counterfactual of generated images, joined into a gallery."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from forebear import methods as registry
from forebear.data import Data
from forebear.errors import DataError, TaskError, unknown_name
from forebear.gallery import Gallery, Mapped
from forebear.generated.counterfactual import Counterfactual, digest, regenerate
from forebear.generated.exhibits import ON_PAGE, Curator, compared
from forebear.generated.familiar import familiar
from forebear.generated.pictures import Album, Decode, shown
from forebear.methods.belonging import facts_of
from forebear.methods.concept_trak import ConceptTRAK
from forebear.methods.nda import NDA
from forebear.methods.pixels import Pixels
from forebear.methods.settings import settings_of
from forebear.pipeline import method_result, write_scores
from forebear.record import open_run, write_texts
from forebear.report import write
from forebear.run import IMAGES, MethodResult, Run, scores_folder
from forebear.task import Task
from forebear.tasks.diffusion import Denoising
from forebear.types import Scores, read_json, write_json

DEFAULT = ("das", "nda", "similarity")

CONCEPTS = "concept_trak"

PIXELS = "pixels"
"""The baseline that every page has: it looks at no model."""

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
    methods: Any = DEFAULT,
    out: str | Path,
    concepts: Mapping[Any, Any] | None = None,
    counterfactual: Counterfactual | None = None,
    decode: Decode | None = None,
    texts: Texts | None = None,
    ids: Any = None,
    top: int = SHOWN,
    title: str = "",
    batch_size: int | None = None,
) -> Run:
    """Which training images made these images, by several methods, as a folder with a page.

    A row of the training images that are closest pixel by pixel is always there to compare with.
    What is in the folder already is not computed again; other methods of an earlier call stay.

    Args:
        task: a diffusion task: its loss is a `fb.losses.Denoising`.
        train: training images, as of `forebear.tasks.diffusion.images` or any map-style dataset of
            such dicts; of those in a folder only the ones that are shown, and a sample to
            judge the model by, are read again.
        generated: images that the model made, of the same kind, with the keys that their start
            noise belongs to. The page shows the first twelve.
        methods: names or configured methods, or one of them. `concept_trak` among them says how
            concepts are scored, and has no row of its own.
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
        batch_size: images at a time; chosen by what one takes in memory when left out.

    Returns:
        The record of the run.

    Raises:
        TaskError: the task is not a diffusion task.
        DataError: images cannot be shown, `top` is below one, two methods have one name, or
            concepts are not one for each image.
        MismatchError: the folder holds a run of another model, loss or data.
    """
    if not isinstance(task.loss, Denoising):
        raise TaskError(
            f"the task's loss is {getattr(task.loss, 'name', task.loss)!r}: attribute_images is "
            "for diffusion models, whose loss is a fb.losses.Denoising; use fb.attribute"
        )
    if top < 1:
        raise DataError(f"top is {top}: a row shows at least one training image")
    work = _Work(
        task=task,
        train=Data.of(train, ids=ids, collate=task.collate),
        queries=Data.of(generated, collate=task.collate),
        out=Path(out),
        album=Album(Path(out), decode),
        top=top,
        batch_size=batch_size,
    )
    each = (methods,) if isinstance(methods, str) or hasattr(methods, "fit") else tuple(methods)
    return work.run(each, concepts or {}, counterfactual, texts, title)


@dataclass(frozen=True)
class _Work:
    """One call: what is asked, and where results go."""

    task: Task
    train: Data
    queries: Data
    out: Path
    album: Album
    top: int
    batch_size: int | None

    @property
    def sized(self) -> dict[str, Any]:
        """The batch size for `fit`, where one was given."""
        return {} if self.batch_size is None else {"batch_size": self.batch_size}

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
        beside = [] if any(row.name == PIXELS for row in rows) else [Pixels()]
        for method in [*rows, *beside]:
            run = self._joined(run, self.method(method, run))
        run = replace(run, best=rows[0].name)
        run.save(self.out)
        mapped = self.maps(next((method for method in rows if isinstance(method, NDA)), None))
        curator = Curator(run, self.train, self.queries, self.album, self.top)
        gallery = curator.gallery(mapped, self.concepts(conceptual, asked), side)
        some = self.queries.slice(slice(0, ON_PAGE))
        known = familiar(self.task, self.train, some, self.batch_size)
        gallery = replace(gallery, familiar=known)
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
        facts = self._facts(configured)
        known = next((result for result in run.methods if result.name == name), None)
        if known is not None and path.is_file() and read_json(path).get("facts") == facts:
            return known
        started = time.perf_counter()
        fitted = configured.fit(self.task, self.train, **self.sized)
        scores = fitted.score(self.queries)
        seconds = time.perf_counter() - started
        write_scores(scores, self.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"facts": facts})
        label = registry.METHODS[name].label
        return method_result(scores, label, seconds, run.plain_pass_seconds)

    def maps(self, nda: NDA | None) -> list[Mapped | None]:
        """Where each image's strongest training images matter, by the number in the training set.

        Images without maps have None: the method was not asked, or mixes two scales.
        """
        some = self.queries.slice(slice(0, ON_PAGE))
        if nda is None or len(nda.windows) > 1:
            return [None] * len(some)
        top = min(MAPPED, self.top, len(self.train))
        name = digest({**self._facts(nda), "top": top})
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
        fitted = nda.fit(self.task, self.train, **self.sized)
        maps, sources = fitted.maps_and_sources(some, top)
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
            facts = {**self._facts(configured), "queries": data.fingerprint}
            folder = self.out / "concepts" / digest(facts)
            if not (folder / "scores.json").is_file():
                fitted = fitted or configured.fit(self.task, self.train, **self.sized)
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

    def _facts(self, configured: Any) -> dict[str, Any]:
        """What decides scores, and the names of training images in them."""
        return {
            "settings": settings_of(configured),
            "model": self.task.model_hash(),
            **facts_of(configured, self.task),
            "ids": digest({"ids": self.train.ids.tolist()}),
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
    for name, times in Counter(method.name for method in each).items():
        if times > 1:
            raise DataError(
                f"{times} of methods are called {name!r}, and a row and its files have that name: "
                "keep one of them, and give the others a folder of their own with out="
            )
    return rows, conceptual[0] if conceptual else ConceptTRAK()
