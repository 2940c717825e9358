"""Bad input of methods for images: each error names the thing, the value and the remedy."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.errors import DataError, NonFiniteError, TaskError
from forebear.tasks.diffusion import images
from tests.denoising_cases import N, Net, Q, case

TASK, TRAIN, QUERIES = case()
METHODS: dict[str, Any] = {
    "graddot": fb.GradDot(),
    "trak": fb.TRAK(dimension=8),
    "dtrak": fb.DTRAK(),
    "das": fb.DAS(),
    "abu": fb.AbU(query_draws=8, fisher_draws=1),
    "abu, steps": fb.AbU(query_draws=8, fisher_draws=1, mode="step", steps=2),
    "mucs": fb.MUCS(layers=("last",), levels=3, batch_size=8, max_steps=3, null=9.0),
    "nda": fb.NDA(patch=3),
}
WITH_MODELS = [name for name in METHODS if name != "nda"]
IDS, QUERY_IDS = [f"image-{i}" for i in range(N)], [f"query-{i}" for i in range(Q)]

pytestmark = pytest.mark.filterwarnings("ignore::forebear.errors.NumericalWarning")


class Told(nn.Module):
    """A network with a condition `[b, 2]`."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(2, 9)
        self.net = Net()

    def forward(self, noisy: Tensor, levels: Tensor, condition: Tensor) -> Tensor:
        return self.net(noisy, levels) + self.last(condition).view(noisy.shape)


def changed(data: dict, row: int, value: float) -> dict:
    image = data["image"].clone()
    image[row, 0, 1, 1] = value
    return {**data, "image": image}


@pytest.mark.parametrize("name", METHODS)
def test_pixels_that_are_not_finite_are_named(name: str) -> None:
    for value in (float("nan"), float("inf")):
        with pytest.raises(NonFiniteError, match=r"is NaN or infinite .*(image-9).*repair"):
            METHODS[name].fit(TASK, changed(TRAIN, 9, value), ids=IDS).score(QUERIES)
    fitted = METHODS[name].fit(TASK, TRAIN)
    with pytest.raises(NonFiniteError, match=r"query-2.*(repair|precision)"):
        fitted.score(changed(QUERIES, 2, float("nan")), ids=QUERY_IDS)


@pytest.mark.parametrize("name", METHODS)
def test_queries_of_another_shape_name_both(name: str) -> None:
    fitted = METHODS[name].fit(TASK, TRAIN)
    with pytest.raises(DataError, match=r"\(1, 4, 4\).*\(1, 3, 3\): prepare both"):
        fitted.score(images(torch.zeros(2, 1, 4, 4).double()))


@pytest.mark.parametrize("name", METHODS)
def test_nothing_to_ask_or_to_learn_from_is_refused(name: str) -> None:
    nothing = {key: column[:0] for key, column in QUERIES.items()}
    with pytest.raises(DataError, match="the dataset is empty: attribution needs at least one"):
        METHODS[name].fit(TASK, nothing)
    with pytest.raises(DataError, match="the dataset is empty"):
        METHODS[name].fit(TASK, TRAIN).score(nothing)


@pytest.mark.parametrize("name", WITH_MODELS)
def test_conditions_are_given_to_all_or_to_none(name: str) -> None:
    torch.manual_seed(0)
    task = fb.Task(Told().double(), TASK.loss)
    told = {**TRAIN, "condition": torch.eye(2).double()[torch.arange(N) % 2]}
    asked = {**QUERIES, "condition": torch.eye(2).double()[torch.arange(Q) % 2]}
    fitted = METHODS[name].fit(task, told)
    assert torch.isfinite(fitted.score(asked).values).all()
    with pytest.raises(DataError, match=r"training set has .condition. and the queries have none"):
        fitted.score(QUERIES)
    with pytest.raises(DataError, match="queries have 'condition' and the training set has none"):
        METHODS[name].fit(TASK, TRAIN).score(asked)
    wide = {**QUERIES, "condition": torch.zeros(Q, 3).double()}
    with pytest.raises(DataError, match=r"'condition' of the queries has shape \(3,\)"):
        fitted.score(wide)


@pytest.mark.parametrize("name", WITH_MODELS)
def test_losses_that_overflow_in_half_precision_are_no_scores(name: str) -> None:
    torch.manual_seed(0)
    model = Net()
    model.last.weight.data *= 2000  # its squared error is beyond what float16 can say
    half = [{**data, "image": data["image"].half()} for data in (TRAIN, QUERIES)]
    task = fb.Task(model.half(), TASK.loss)
    assert torch.isinf(task.losses(model, half[0])).any()
    with pytest.raises(NonFiniteError, match=r"NaN or infinite .*(image|query)-.*precision"):
        METHODS[name].fit(task, half[0], ids=IDS).score(half[1], ids=QUERY_IDS)
    single = fb.Task(model.float(), TASK.loss)
    train, queries = ({**data, "image": data["image"].float()} for data in (TRAIN, QUERIES))
    assert torch.isfinite(METHODS[name].fit(single, train).score(queries).values).all()


def test_nda_works_in_single_precision_at_least() -> None:
    half = [{**data, "image": data["image"].half()} for data in (TRAIN, QUERIES)]
    scores = METHODS["nda"].fit(None, half[0]).score(half[1]).values
    assert scores.dtype == torch.float32
    whole = METHODS["nda"].fit(None, TRAIN).score(QUERIES).values
    torch.testing.assert_close(scores.double(), whole, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("name", METHODS)
def test_a_query_with_the_key_of_an_example_shares_its_noise(name: str) -> None:
    """Keys say whose noise it is: the same for a query and an example is no mistake."""
    fitted = METHODS[name].fit(TASK, TRAIN)
    shared = {**QUERIES, "key": TRAIN["key"][:Q]}
    twice = {**QUERIES, "key": torch.zeros(Q).long()}
    for data in (shared, twice):
        assert torch.isfinite(fitted.score(data).values).all()
    point = TASK.loss.points[0]  # type: ignore[attr-defined]
    noise = TASK.loss.noise_of(shared, point)  # type: ignore[attr-defined]
    assert torch.equal(noise, TASK.loss.noise_of(TRAIN, point)[:Q])  # type: ignore[attr-defined]


def test_levels_that_do_not_exist_are_refused() -> None:
    with pytest.raises(TaskError, match=r"timestep 1000 does not exist.* from 0 to 999"):
        fb.AbU(levels=(1000,)).fit(TASK, TRAIN)
    with pytest.raises(TaskError, match=r"timestep -1 does not exist.* from 0 to 999"):
        fb.NDA(timesteps=(-1,))
    with pytest.raises(TaskError, match="1001 levels of a schedule of 1000 steps: choose 1 to"):
        fb.AbU(levels=1001).fit(TASK, TRAIN)
