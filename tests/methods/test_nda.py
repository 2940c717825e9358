"""NDA against a dense softmax over all patches, written without blocks, groups or expansions."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import forebear as fb
from forebear.methods.nda import FittedNDA, maps, patches
from forebear.methods.nda import fitted as state
from forebear.tasks.diffusion import images
from forebear.tasks.noise import gaussian
from forebear.tasks.schedules import Continuous, Discrete, Schedule

N, Q = 9, 3
LINEAR = Discrete.linear()


def drawn(n: int, seed: int, shape: tuple[int, ...] = (1, 8, 9)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return images(2 * torch.rand(n, *shape, generator=generator, dtype=torch.double) - 1)


TRAIN, QUERIES = drawn(N, 1), drawn(Q, 2)


def digits() -> Tensor:
    load_digits = pytest.importorskip("sklearn.datasets").load_digits
    pixels = torch.from_numpy(load_digits().data / 8 - 1)
    return pixels[np.random.RandomState(0).permutation(1797)].reshape(-1, 1, 8, 8)


def compared(x: Tensor, side: int, ratio: int, fill: float) -> Tensor:
    """Patches `[n, u, d]`, with a constant outside the frame, projected onto blocks."""
    margin = (side - 1) // 2
    flat = F.unfold(F.pad(x, (margin,) * 4, value=fill), side).transpose(1, 2)
    square = flat.reshape(*flat.shape[:2], x.shape[1], side, side)
    block = torch.ones(ratio, ratio, dtype=x.dtype) / ratio
    steps = range(0, side, ratio)
    parts = [
        (square[..., i : i + ratio, j : j + ratio] * block).sum((-1, -2))
        for i in steps
        for j in steps
    ]
    return torch.stack(parts, -1).flatten(2)


def dense(
    query: Tensor,
    key: Tensor,
    train: Tensor,
    *,
    level: float = 50,
    patch: int = 3,
    ratio: int = 1,
    fill: float = 1000.0,
    schedule: Schedule = LINEAR,
) -> Tensor:
    """Weights `[u, n, v]` of all training patches for one query `[c, h, w]`."""
    signal, strength = schedule.at(level)
    noise = gaussian(key[None], tuple(query.shape), 0, level, 0, dtype=torch.double)
    noisy = signal * query[None] + strength * noise
    x = compared(noisy, patch * ratio, ratio, fill)[0]
    y = compared(signal * train, patch * ratio, ratio, fill)
    distances = (x[:, None, None] - y).square().sum(-1)
    return (-distances / (2 * strength**2)).flatten(1).softmax(1).view_as(distances)


def summed(weights: Tensor, keep: int | None = None) -> Tensor:
    """Weights of images `[u, n]`."""
    return weights.sort(-1, descending=True).values[..., :keep].sum(-1)


def expected(train: Any, queries: Any, keep: int | None = None, **options: Any) -> Tensor:
    return torch.stack(
        [
            summed(dense(query, key, train["image"], **options), keep).sum(0)
            for query, key in zip(queries["image"], queries["key"], strict=True)
        ]
    )


def scored(train: Any, queries: Any, **options: Any) -> Tensor:
    return fb.NDA(**options).fit(None, train).score(queries).values


@pytest.mark.parametrize("fill", [10.0, 1000.0])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("patch", "ratio"), [(1, 1), (3, 1), (5, 1), (7, 1), (2, 2), (3, 2)])
def test_groups_are_the_limit_of_a_large_constant(
    patch: int, ratio: int, channels: int, fill: float
) -> None:
    train, queries = drawn(N, 1, (channels, 8, 9)), drawn(Q, 2, (channels, 8, 9))
    for level in (50, 900):
        options = {"patch": patch, "ratio": ratio, "level": level, "fill": fill}
        for keep in (None, 7):
            scores = scored(
                train,
                queries,
                patch=patch,
                ratio=max(ratio, 2),
                scale="single" if ratio == 1 else "downscaled",
                timesteps=(level,),
                keep=keep,
            )
            oracle = expected(train, queries, keep, **options)
            assert (scores - oracle).abs().max() < 1e-10


def test_a_block_of_three_pixels_and_noise_on_top() -> None:
    schedule = Continuous()
    scores = scored(
        TRAIN,
        QUERIES,
        patch=2,
        ratio=3,
        scale="downscaled",
        timesteps=(0.4,),
        keep=None,
        schedule=schedule,
    )
    oracle = expected(TRAIN, QUERIES, patch=2, ratio=3, level=0.4, schedule=schedule)
    assert (scores - oracle).abs().max() < 1e-10


def test_scales_are_mixed_and_timesteps_averaged() -> None:
    single, wide = ({"patch": 3, "ratio": ratio} for ratio in (1, 2))
    oracle = torch.zeros(Q, N, dtype=torch.double)
    for level in (50, 200):
        oracle += 0.5 * 0.3 * expected(TRAIN, QUERIES, level=level, **single)
        oracle += 0.5 * 0.7 * expected(TRAIN, QUERIES, level=level, **wide)
    scores = scored(
        TRAIN, QUERIES, patch=3, scale="both", alpha=0.3, timesteps=(50, 200), keep=None
    )
    assert (scores - oracle).abs().max() < 1e-10


def test_all_weights_add_up_to_the_number_of_pixels() -> None:
    scores = scored(TRAIN, QUERIES, keep=None, timesteps=(50, 400))
    assert torch.allclose(scores.sum(1), torch.full((Q,), 72.0).double(), rtol=1e-12)
    kept = scored(TRAIN, QUERIES, keep=1, timesteps=(400,))
    assert (kept.sum(1) < 70).all()


@pytest.mark.parametrize("keep", [None, 3])
@pytest.mark.parametrize("level", [1, 50, 400])
def test_blocks_of_any_size_give_the_same(
    monkeypatch: pytest.MonkeyPatch, level: int, keep: int | None
) -> None:
    options: dict[str, Any] = {"patch": 3, "timesteps": (level,), "keep": keep}
    train = {name: torch.cat([TRAIN[name], QUERIES[name]]) for name in TRAIN}
    whole = fb.NDA(**options).fit(None, train)
    # With hardly any noise all but the copy have a weight of zero.
    top = 1 if level == 1 else 4
    scores, found = whole.score(QUERIES).values, whole.maps(QUERIES, top)
    oracle = expected(train, QUERIES, keep, level=level)
    assert (scores - oracle).abs().max() < 1e-10
    for module, name in (
        (state, "KEPT_BYTES"),
        (state, "BLOCK_BYTES"),
        (patches, "PATCH_BYTES"),
        (patches, "LOGIT_BYTES"),
        (maps, "WEIGHT_BYTES"),
    ):
        monkeypatch.setattr(module, name, 4000)
    small = fb.NDA(**options).fit(None, train, batch_size=2)
    assert (small.score(QUERIES).values - scores).abs().max() < 1e-12
    again = small.maps(QUERIES, top)
    assert (again.ids == found.ids).all()
    # Logits at a timestep t are larger the smaller t is, and so is their rounding.
    assert (again.values - found.values).abs().max() < (1e-10 if level == 1 else 1e-12)
    assert (again.entropy - found.entropy).abs().max() < 1e-12


@pytest.mark.parametrize("block", [1, 2**24])
def test_a_later_image_may_hold_all_the_weight(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    """Exponentials against the reference of earlier images would overflow."""
    monkeypatch.setattr(patches, "PATCH_BYTES", 1)
    monkeypatch.setattr(state, "BLOCK_BYTES", block)
    query = QUERIES["image"][:1]
    # Ever nearer to the query, so that the reference changes again and again.
    train = torch.cat([query + far * (TRAIN["image"][:5] - query) for far in (1.0, 0.5, 0.0)])
    train = train[:11]
    options: dict[str, Any] = {"patch": 7, "timesteps": (20,), "keep": None, "dtype": "float32"}
    fitted = fb.NDA(**options).fit(None, images(train))
    oracle = dense(query[0], torch.tensor(0), train, level=20, patch=7).sum(2)
    scores = fitted.score(images(query)).values.double()
    assert (scores - oracle.sum(0)).abs().max() < 1e-2
    assert scores[0, -1] > 71
    entropy = -torch.xlogy(oracle, oracle).sum(1).view(8, 9)
    assert (fitted.maps(images(query), 1).entropy[0] - entropy).abs().max() < 1e-3


def test_the_order_of_training_images_only_permutes_scores() -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    shuffled = {name: column[order] for name, column in TRAIN.items()}
    difference = scored(TRAIN, QUERIES)[:, order] - scored(shuffled, QUERIES)
    assert difference.abs().max() < 1e-12


def test_noise_belongs_to_the_key_of_a_query() -> None:
    scores = scored(TRAIN, QUERIES)
    backwards = {name: column.flip(0) for name, column in QUERIES.items()}
    assert torch.allclose(scored(TRAIN, backwards).flip(0), scores, atol=1e-12)
    other = {**QUERIES, "key": QUERIES["key"] + 7}
    assert (scored(TRAIN, other) - scores).abs().max() > 1e-3
    assert (scored(TRAIN, QUERIES, seed=1) - scores).abs().max() > 1e-3
    same = {**QUERIES, "key": torch.zeros(Q).long()}
    without = scored((TRAIN["image"],), (QUERIES["image"],))
    assert torch.allclose(without, scored(TRAIN, same), atol=1e-12)


def test_other_kinds_of_datasets_give_the_same() -> None:
    scores = scored((TRAIN["image"],), (QUERIES["image"],))
    examples = [(image, 0) for image in TRAIN["image"]]
    asked = [(image, 0) for image in QUERIES["image"]]
    assert torch.allclose(scored(examples, asked), scores, atol=1e-12)
    flat = TRAIN["image"].flatten(1), QUERIES["image"].flatten(1)
    assert torch.allclose(scored((flat[0],), (flat[1],), shape=(1, 8, 9)), scores, atol=1e-12)
    grey = TRAIN["image"][:, 0], QUERIES["image"][:, 0]
    assert torch.allclose(scored((grey[0],), (grey[1],)), scores, atol=1e-12)


@pytest.mark.parametrize("level", [50, 100])
def test_an_exact_copy_of_a_digit_comes_first(level: int) -> None:
    pixels = digits()[:300].float()
    fitted = fb.NDA(timesteps=(level,)).fit(None, images(pixels))
    queries = images(pixels[:30], keys=torch.arange(1000, 1030))
    assert fitted.top(queries, 1).ids[:, 0].tolist() == list(range(30))


def test_duplicates_share_their_weight() -> None:
    alone = scored(TRAIN, QUERIES)[:, 4]
    twice = {name: torch.cat([column, column[4:5]]) for name, column in TRAIN.items()}
    scores = scored(twice, QUERIES)
    assert torch.allclose(scores[:, 4], scores[:, N], rtol=1e-12)
    assert (scores[:, 4] < alone).all()
    assert (scores[:, 4] > 0.49 * alone).all()


def test_float32_is_good_to_four_places() -> None:
    pixels = digits()[:210]
    weights = []
    for dtype in ("float32", "float64"):
        fitted = fb.NDA(dtype=dtype, keep=None).fit(None, images(pixels[:200]))
        found = fitted.maps(images(pixels[200:]), 200)
        order = torch.from_numpy(found.ids).argsort(1)
        weights.append(found.values.double()[torch.arange(10)[:, None], order])
    assert 0 < (weights[0] - weights[1]).abs().max() < 1e-4


def test_a_timestep_with_little_noise_warns_in_float32() -> None:
    train = images(TRAIN["image"].float())
    with pytest.warns(fb.errors.NumericalWarning, match="timestep 1 .*dtype='float64'"):
        fb.NDA(timesteps=(1,)).fit(None, train)
    fb.NDA(timesteps=(1,), dtype="float64").fit(None, train)


@pytest.mark.parametrize("options", [{}, {"scale": "downscaled"}, {"keep": 3}])
def test_maps_are_the_dense_weights_of_the_top_images(options: dict[str, Any]) -> None:
    ratio = 2 if options.get("scale") else 1
    size = (7, 8) if ratio == 2 else (8, 9)
    settings = {"patch": 3, "keep": None, "timesteps": (100, 300), **options}
    fitted = fb.NDA(**settings).fit(None, TRAIN, ids=[f"image {i}" for i in range(N)])
    found, sources = fitted.maps(QUERIES, 4), fitted.sources(QUERIES, 4)
    assert (found.ids == fitted.top(QUERIES, 4).ids).all()
    assert (sources.ids == found.ids).all()
    for q in range(Q):
        chosen = [int(name.split()[1]) for name in found.ids[q]]
        levels = [
            dense(QUERIES["image"][q], QUERIES["key"][q], TRAIN["image"], level=level, ratio=ratio)
            for level in (100, 300)
        ]
        here = torch.stack([summed(w, settings["keep"]) for w in levels]).mean(0)  # [u, n]
        mean = (levels[0] + levels[1]) / 2  # [u, n, v]
        assert (found.values[q] - here.T[chosen].view(4, *size)).abs().max() < 1e-10
        there = mean.sum(0)[chosen].view(4, *size)
        assert (sources.values[q] - there).abs().max() < 1e-10
        best = mean[:, chosen].argmax(-1).T.view(4, *size)
        assert (sources.best[q, ..., 0] * size[1] + sources.best[q, ..., 1] == best).all()
        shares = torch.stack([w.sum(-1) for w in levels])  # [t, u, n]
        entropy = -torch.xlogy(shares, shares).sum(2).mean(0).view(size)
        assert (found.entropy[q] - entropy).abs().max() < 1e-10


def test_maps_and_sources_together_take_the_passes_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = fb.NDA(patch=3).fit(None, TRAIN)
    read = []
    blocks = fitted._blocks
    monkeypatch.setattr(fitted, "_blocks", lambda: read.append(1) or blocks())
    maps, sources = fitted.maps_and_sources(QUERIES, 4, ids=[f"query {i}" for i in range(Q)])
    together = len(read)
    alone, apart = fitted.maps(QUERIES, 4), fitted.sources(QUERIES, 4)
    assert len(read) == 3 * together
    assert maps.query_ids.tolist() == sources.query_ids.tolist() == [f"query {i}" for i in range(Q)]
    assert (maps.ids == alone.ids).all()
    assert (sources.ids == apart.ids).all()
    assert torch.equal(maps.values, alone.values)
    assert torch.equal(maps.entropy, alone.entropy)
    assert torch.equal(sources.values, apart.values)
    assert torch.equal(sources.best, apart.best)


def test_a_copy_is_found_where_it_is() -> None:
    """Shifted by a row and a column, patches come from a row and a column further."""
    shifted = TRAIN["image"][5].roll((-1, -1), (1, 2))[None]
    fitted = fb.NDA(patch=3, timesteps=(10,), dtype="float64").fit(None, TRAIN)
    sources = fitted.sources(images(shifted), 1)
    assert sources.ids.tolist() == [[5]]
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(9), indexing="ij")
    inside = (slice(1, 6), slice(1, 7))
    assert (sources.best[0, 0, ..., 0] - rows == 1)[inside].all()
    assert (sources.best[0, 0, ..., 1] - columns == 1)[inside].all()


def test_self_influence_is_the_diagonal() -> None:
    fitted = fb.NDA().fit(None, TRAIN)
    assert torch.equal(fitted.self_influence(), fitted.score(TRAIN).values.diagonal())


def test_a_model_goes_into_the_record_and_changes_nothing(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    task = fb.Task(model, loss=fb.losses.cross_entropy)
    configured = fb.NDA(schedule=Discrete.cosine(100), timesteps=(20,))
    fitted = configured.fit(task, TRAIN)
    scores, bare = fitted.score(QUERIES), configured.fit(None, TRAIN).score(QUERIES)
    assert torch.equal(scores.values, bare.values)
    assert scores.provenance.model == task.model_hash()
    assert bare.provenance.model == "none"
    assert scores.provenance.coverage is None
    fitted.save(tmp_path)
    loaded = fb.load(tmp_path, task, TRAIN)
    assert isinstance(loaded, FittedNDA)
    assert loaded.method == configured
    assert torch.equal(loaded.score(QUERIES).values, scores.values)


def test_without_a_model_it_is_saved_and_loaded_too(tmp_path: Path) -> None:
    fitted = fb.NDA(timesteps=(20,)).fit(None, TRAIN)
    fitted.save(tmp_path / "bare")
    loaded = fb.load(tmp_path / "bare", None, TRAIN)
    assert torch.equal(loaded.score(QUERIES).values, fitted.score(QUERIES).values)
    task = fb.Task(nn.Linear(2, 2), loss=fb.losses.cross_entropy)
    with pytest.raises(fb.errors.MismatchError, match=r"no model .* there is a task: pass task=No"):
        fb.load(tmp_path / "bare", task, TRAIN)
    fb.NDA().fit(task, TRAIN).save(tmp_path / "told")
    with pytest.raises(fb.errors.MismatchError, match=f"{task.model_hash()} .* pass the task"):
        fb.load(tmp_path / "told", None, TRAIN)
    with pytest.raises(fb.errors.MismatchError, match="training set"):
        fb.load(tmp_path / "bare", None, drawn(N, 5))


def test_more_weights_than_positions_are_refused() -> None:
    with pytest.raises(
        fb.errors.DataError, match=r"keep is 73 and images of 8 x 9 have 72 positions .* keep=None"
    ):
        fb.NDA(keep=73).fit(None, TRAIN)
    every = fb.NDA(keep=72).fit(None, TRAIN).score(QUERIES).values
    assert torch.equal(every, fb.NDA(keep=None).fit(None, TRAIN).score(QUERIES).values)
    assert torch.equal(every, fb.NDA().fit(None, TRAIN).score(QUERIES).values)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": "publishd"}, "did you mean 'published'"),
        ({"patch": 4}, "patch is 4"),
        ({"patch": 0}, "patch is 0"),
        ({"keep": 0}, "keep is 0"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"scale": "both", "ratio": 1}, "ratio is 1"),
        ({"timesteps": ()}, "timesteps is empty"),
        ({"timesteps": (1000,)}, "timestep 1000 does not exist"),
        ({"timesteps": (0,), "schedule": Discrete((1.0, 0.5))}, "has no noise"),
    ],
)
def test_settings_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises((fb.errors.TaskError, fb.errors.UnknownNameError), match=message):
        fb.NDA(**options)


def test_names_that_do_not_exist_come_with_the_nearest() -> None:
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'single'"):
        fb.NDA(scale="singel")  # type: ignore[arg-type]
    with pytest.raises(fb.errors.UnknownNameError, match="did you mean 'float32'"):
        fb.NDA(dtype="bfloat32")


def test_images_that_make_no_sense_are_refused() -> None:
    nda = fb.NDA()
    image = TRAIN["image"]
    broken = image.clone()
    broken[3, 0, 2, 2] = float("nan")
    names = ["a", "b", "c", "broken", *"efghi"]
    with pytest.raises(fb.errors.NonFiniteError, match="broken"):
        nda.fit(None, (broken,), ids=names)
    with pytest.raises(fb.errors.NonFiniteError, match="image is NaN"):
        nda.fit(None, TRAIN).score({"image": broken})
    for wrong, message in (
        ((image * 127).to(torch.uint8), "of type uint8"),
        (image * 100, "images reach"),
        (image[:, :, :4], "a patch of 5 pixels does not fit into images of 4 x 9"),
        (image.flatten(1), "say NDA"),
    ):
        with pytest.raises(fb.errors.DataError, match=message):
            nda.fit(None, (wrong,))
    with pytest.raises(fb.errors.DataError, match="does not fit"):
        fb.NDA(shape=(1, 8, 8)).fit(None, (image,))
    with pytest.raises(fb.errors.DataError, match="no 'image'"):
        nda.fit(None, {"pixels": image})
    with pytest.raises(fb.errors.DataError, match=r"\(1, 8, 8\) and the training set's"):
        nda.fit(None, TRAIN).score(drawn(2, 3, (1, 8, 8)))
    with pytest.raises(fb.errors.DataError, match="the dataset is empty"):
        nda.fit(None, TRAIN).score({"image": image[:0], "key": torch.arange(0)})
    with pytest.raises(fb.errors.TaskError, match="positions of two kinds"):
        fb.NDA(scale="both", patch=3).fit(None, TRAIN).maps(QUERIES, 2)
    with pytest.raises(fb.errors.DataError, match="k is 10"):
        nda.fit(None, TRAIN).maps(QUERIES, 10)
