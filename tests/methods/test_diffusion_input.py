"""Bad input of methods for images: each error names the thing, the value and the remedy."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.errors import DataError, NonFiniteError, TaskError
from forebear.methods.concept_trak import concepts
from forebear.tasks.diffusion import images
from forebear.tasks.schedules import Continuous
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


LATER: dict[str, Any] = {**METHODS, "ekfac": fb.EKFAC(), "similarity": fb.Similarity()}


@pytest.mark.parametrize("name", LATER)
def test_one_bad_image_of_a_later_batch_is_named(name: str) -> None:
    wrong = {
        "a pixel is NaN": (float("nan"), NonFiniteError, r"is NaN or infinite .*\(ids image-9\): "),
        "unscaled": (255.0, DataError, r"1 of \d+ images reach up to 255: scale .*\(ids image-9\)"),
    }
    for value, kind, told in wrong.values():
        with pytest.raises(kind, match=told):
            LATER[name].fit(TASK, changed(TRAIN, 9, value), ids=IDS, batch_size=4).score(QUERIES)
    fitted = LATER[name].fit(TASK, TRAIN, batch_size=2)
    with pytest.raises(DataError, match=r"reach up to 255: scale .*\(ids query-3\)"):
        fitted.score(changed(QUERIES, 3, 255.0), ids=QUERY_IDS)


@pytest.mark.parametrize("name", LATER)
def test_dicts_made_by_hand_must_be_as_those_of_images(name: str) -> None:
    bytes_ = {**TRAIN, "image": (TRAIN["image"] * 127 + 127).to(torch.uint8)}
    wrong = {
        "images are of type uint8: scale them": bytes_,
        "images have shape": {**TRAIN, "image": TRAIN["image"][:, 0, 0, 0]},
    }
    if name != "nda":  # noise of training images plays no part there, nor do their keys
        wrong["a dict with 'image' and 'key', and this one has image: make"] = {
            "image": TRAIN["image"]
        }
        wrong["'key' is float64"] = {**TRAIN, "key": TRAIN["key"].double()}
        wrong["a dict with 'image' and 'key', and this one has pixels, key"] = {
            "pixels": TRAIN["image"],
            "key": TRAIN["key"],
        }
    for told, data in wrong.items():
        error = "images are rows of shape" if name == "nda" and "have shape" in told else told
        with pytest.raises(DataError, match=error):
            LATER[name].fit(TASK, data).score(QUERIES)


def trained(network: Any, data: Any, kind: str) -> None:
    """The loss alone, training of one network, or of several together."""
    loss: Any = TASK.loss
    recipe = fb.Recipe(network, loss.training(), learning_rate=1e-2, epochs=1, batch_size=4)
    if kind == "loss":
        loss(network(), data)
    elif kind == "stacked":
        recipe.train_many(data, torch.ones(3, N).bool(), 0)
    else:
        recipe.train(data)


@pytest.mark.parametrize("kind", ["alone", "stacked", "from a folder"])
@pytest.mark.parametrize("value", [float("nan"), 255.0])
def test_training_refuses_what_scoring_refuses(kind: str, value: float) -> None:
    data = changed(TRAIN, 9, value)
    data["image"] = data["image"].float()
    told = fb.Data(data, ids=IDS)
    if kind == "from a folder":  # examples are read one at a time
        one = [{name: column[i] for name, column in data.items()} for i in range(N)]
        told = fb.Data(one, ids=IDS, collate=torch.utils.data.default_collate)
    with pytest.raises((NonFiniteError, DataError), match=r"\(ids image-9\)"):
        trained(Net, told, kind)


class Twice(nn.Module):
    """A network of one's own that fails in its own way when no condition comes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Told()

    def forward(self, noisy: Tensor, levels: Tensor, condition: Any = None) -> Tensor:
        return self.net(noisy, levels, condition * 2)


@pytest.mark.parametrize("network", [Told, Twice])
@pytest.mark.parametrize("kind", ["loss", "alone", "stacked"])
def test_a_condition_that_is_missing_is_named(network: Any, kind: str) -> None:
    data = {**TRAIN, "image": TRAIN["image"].float()}
    with pytest.raises(TaskError, match=r"no 'condition' to tell it: .*images\(pixels, ") as found:
        trained(network, data, kind)
    assert isinstance(found.value.__cause__, TypeError)
    assert str(found.value.__cause__) in str(found.value)


def test_a_network_told_a_condition_keeps_its_own_errors() -> None:
    told = {**TRAIN, "condition": "a text"}
    with pytest.raises(TypeError, match="must be Tensor"):
        TASK.loss(Told().double(), told)  # type: ignore[operator]


def test_images_of_another_precision_than_the_network_are_named() -> None:
    with pytest.raises(TaskError, match=r"images are float64 and the network float32: .*float32"):
        TASK.loss(Net(), TRAIN)  # type: ignore[operator]


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


PIXELS = torch.zeros(4, 1, 3, 3)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ([7, 7, 7, 1], "key 7 is given 3 times, and images with one key have one noise: give each"),
        ([0.5, 1.7, 2.0, 3.0], "keys are of type float64: noise belongs to an integer"),
        (torch.arange(4.0), "keys are of type float32: noise belongs to an integer"),
        (
            list("abcd"),
            "keys are text or mixed: noise belongs to an integer",
        ),
        ([True, False, True, False], "keys are of type bool"),
        ([[0], [1], [2], [3]], r"keys of shape \(4, 1\) were given for 4 images: give one integer"),
        ([1, 2], r"keys of shape \(2,\) were given for 4 images"),
        (7, r"keys of shape \(\) were given for 4 images"),
    ],
)
def test_keys_are_an_integer_for_each_image(keys: Any, told: str) -> None:
    with pytest.raises(DataError, match=told):
        images(PIXELS, keys=keys)


def test_questions_about_concepts_may_share_a_key() -> None:
    told = torch.eye(2)
    batch = concepts(told, 0 * told, keys=[5, 5])
    assert batch["key"].tolist() == [5, 5]
    with pytest.raises(DataError, match="keys are of type float64: noise belongs to an integer"):
        concepts(told, 0 * told, keys=[0.5, 1.5])


@pytest.mark.parametrize("keys", [range(4), [3, 1, 2, 0], torch.arange(4, dtype=torch.int32)])
def test_keys_may_be_any_kind_of_integers(keys: Any) -> None:
    assert images(PIXELS, keys=keys)["key"].tolist() == [int(key) for key in keys]


def test_conditions_are_one_for_each_image() -> None:
    with pytest.raises(
        DataError, match=r"conditions of shape \(3,\) were given for 4 images: give"
    ):
        images(PIXELS, torch.arange(3))
    with pytest.raises(DataError, match="conditions are a list: give a tensor"):
        images(PIXELS, ["cat"] * 4)  # type: ignore[arg-type]


class Classes(nn.Module):
    """A network that is told one of three classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.last = Net(), nn.Embedding(3, 9)

    def forward(self, noisy: Tensor, levels: Tensor, condition: Tensor) -> Tensor:
        return self.net(noisy, levels) + self.last(condition).view(noisy.shape)


@pytest.mark.parametrize("name", WITH_MODELS)
def test_classes_that_a_network_does_not_know_are_named(name: str) -> None:
    torch.manual_seed(0)
    task = fb.Task(Classes().double(), TASK.loss)
    told = {**TRAIN, "condition": torch.arange(N) % 3}
    beyond = {**QUERIES, "condition": torch.full((Q,), 7)}
    with pytest.raises(TaskError, match="does not know all classes of 'condition'"):
        METHODS[name].fit(task, told).score(beyond)
    with pytest.raises(TaskError, match=r"'condition' is float64 .*give it classes"):
        METHODS[name].fit(task, {**told, "condition": told["condition"].double()}).score(beyond)


def test_a_class_beyond_the_last_is_told_with_the_range() -> None:
    with pytest.raises(TaskError, match=r"which go from 0 to 13: correct .*IndexError") as found:
        TASK.loss(Classes().double(), {**TRAIN, "condition": torch.arange(N)})  # type: ignore[operator]
    assert isinstance(found.value.__cause__, IndexError)


@pytest.mark.parametrize("name", WITH_MODELS)
def test_images_that_a_network_cannot_take_are_named(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)).double()
    loss = fb.losses.Denoising(levels=2, call=lambda model, noisy, levels, told: model(noisy))
    method = fb.MUCS(layers=("0",), levels=3, batch_size=8) if name == "mucs" else METHODS[name]
    with pytest.raises(TaskError, match=r"does not take images of shape \(1, 3, 3\): prepare"):
        method.fit(fb.Task(model, loss), TRAIN).score(QUERIES)


def test_levels_are_finite_and_named_once() -> None:
    for level in (float("inf"), float("nan"), 0.0):
        with pytest.raises(TaskError, match=f"noise scale {level}: it must be above 0 and finite"):
            fb.losses.Denoising(Continuous(0.5), "x0", levels=[level])
        if level:
            with pytest.raises(TaskError, match=f"timestep {level} does not exist"):
                fb.losses.Denoising(levels=[level])
    with pytest.raises(TaskError, match=r"levels name 3 more than once, .* take more draws="):
        fb.losses.Denoising(levels=[3, 5, 3])
    with pytest.raises(TaskError, match=r"draws is 2\.5: it must be a whole number from 1"):
        fb.losses.Denoising(draws=2.5)  # type: ignore[arg-type]
    with pytest.raises(
        TaskError, match=r"noise scales go from 0.002 to inf: all must be .* finite"
    ):
        Continuous(0.5, most=float("inf"))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"patch": 3.0}, "patch is 3.0: it must be a whole number"),
        ({"ratio": 2.5, "scale": "both"}, "ratio is 2.5: it must be a whole number"),
        ({"keep": 5.0}, "keep is 5.0: it is a whole number, 'published' or None"),
    ],
)
def test_patches_have_whole_numbers_of_pixels(options: dict, told: str) -> None:
    with pytest.raises(TaskError, match=told):
        fb.NDA(**options)


def test_ground_truth_of_a_random_loss_needs_a_measurement() -> None:
    loss: Any = TASK.loss
    recipe = fb.Recipe(Net, loss.training(), learning_rate=1e-2, epochs=1, batch_size=4)
    train, queries = ({**data, "image": data["image"].float()} for data in (TRAIN, QUERIES))
    subsets = torch.rand(3, N, generator=torch.Generator().manual_seed(0)) < 0.5
    with pytest.raises(
        TaskError, match=r"draws new noise at every visit.* pass measure=.*Denoising"
    ):
        fb.GroundTruth.collect(recipe, train, queries, subsets=subsets)
    measured = fb.GroundTruth.collect(
        recipe,
        train,
        queries,
        subsets=subsets,
        seeds=1,
        measure=lambda model, batch: -loss(model, batch),
    )
    assert torch.isfinite(measured.outcomes).all()
