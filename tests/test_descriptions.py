"""Descriptions decide what is the same: in this process, in another, and on another machine."""

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import forebear as fb
from forebear.descriptions import describe, same, shown
from forebear.report.descriptions import described
from forebear.tasks.schedules import Continuous, Discrete

Denoising = fb.losses.Denoising

OTHERS: list[dict[str, Any]] = [
    {"levels": 4},
    {"levels": (100, 500, 901)},
    {"prediction": "v"},
    {"noise": "shared"},
    {"seed": 1},
    {"draws": 2},
    {"schedule": Discrete.cosine()},
    {"schedule": Discrete.linear(999)},
    {"call": lambda model, noisy, levels, condition: model(noisy, levels)},
]


@pytest.mark.parametrize("changes", OTHERS, ids=lambda one: "-".join(one))
def test_every_setting_of_denoising_tells_losses_apart(changes: dict[str, Any]) -> None:
    one, other = Denoising(levels=3), Denoising(**{"levels": 3, **changes})
    assert same(describe(one), describe(Denoising(levels=3)))
    assert not same(describe(one), describe(other))
    name = next(iter(changes))
    assert name in shown(describe(one), describe(other))


def test_continuous_schedules_are_told_apart_too() -> None:
    first, second = (Denoising(Continuous(d), "x0", levels=3) for d in (0.5, 0.6))
    assert not same(describe(first), describe(second))


def test_what_plays_no_part_in_training_is_not_of_it() -> None:
    one = describe(Denoising(levels=3).training())
    assert one == describe(Denoising(levels=9, seed=4, noise="shared").training())
    assert one != describe(Denoising(prediction="v").training())
    assert one == describe(Denoising().training(spread=3.0))  # of continuous schedules only
    edm = Denoising(Continuous(), "x0")
    assert describe(edm.training()) != describe(edm.training(spread=3.0))


class Powered(Denoising):
    """A loss of one's own with a setting more."""

    def __init__(self, power: float, **settings: Any) -> None:
        super().__init__(**settings)
        self.power = power


def test_settings_of_a_loss_made_from_denoising_count() -> None:
    assert describe(Powered(1.0)) == describe(Powered(1.0))
    assert describe(Powered(1.0)) != describe(Powered(2.0))
    assert describe(Powered(1.0).training()) != describe(Powered(2.0).training())


def test_parts_of_a_loss_are_told_apart() -> None:
    each = [json.dumps(describe(part)) for part in Denoising(levels=2, draws=2).parts]
    assert len(set(each)) == 4


def times(factor: float) -> Any:
    """A function that is made with a number."""
    return lambda model, batch: factor * model(batch)


def test_functions_are_their_name_their_code_and_what_they_hold() -> None:
    assert same(describe(times(1.0)), describe(times(1.0)))
    assert not same(describe(times(1.0)), describe(times(2.0)))
    first, second = (lambda m, b: m(b) + 1), (lambda m, b: m(b) + 2)
    assert describe(first)["function"] == describe(second)["function"]
    assert not same(describe(first), describe(second))
    assert not same(describe(partial(times, 1)), describe(partial(times, 2)))
    assert not same(describe(partial(times, factor=1)), describe(partial(times, factor=2)))


def test_what_a_function_finds_in_its_module_counts() -> None:
    text = "def loss(model, batch):\n    '''{words}'''\n    return SCALE * helper(model, batch)\n"
    text += "def helper(model, batch):\n    return model(batch) {change}\n"

    def made(scale: float = 1.0, words: str = "One.", change: str = "") -> Any:
        found: dict[str, Any] = {"SCALE": scale, "__name__": "of_a_user"}
        exec(compile(text.format(words=words, change=change), "file.py", "exec"), found)
        return describe(found["loss"])

    assert same(made(), made(words="Other words."))
    assert not same(made(), made(scale=2.0))
    assert not same(made(), made(change="+ 1"))


def test_a_count_that_a_function_keeps_is_not_what_it_is() -> None:
    calls = 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return model(batch)

    before = describe(loss)
    loss(nn.Identity(), torch.zeros(2))
    assert calls == 1
    assert same(before, describe(loss))


@dataclass(frozen=True)
class Weighted:
    """A loss that is a dataclass."""

    weight: float = 1.0
    cache: dict[str, int] = field(default_factory=dict, compare=False)

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Weighted."""
        return self.weight * model(batch)


class Plain:
    """A loss that is an object."""

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        """Weighted."""
        self._calls += 1
        return self.weight * model(batch)


class Telling(Plain):
    """One that says what it is."""

    @property
    def about(self) -> dict[str, Any]:
        """Nothing of the weight."""
        return {"sort": "telling"}


def test_objects_are_their_class_and_what_they_hold() -> None:
    for kind in (Weighted, Plain):
        assert same(describe(kind(1.0)), describe(kind(1.0)))
        assert not same(describe(kind(1.0)), describe(kind(2.0)))
    assert same(describe(Weighted(cache={"a": 1})), describe(Weighted()))
    assert same(describe(Telling(1.0)), describe(Telling(2.0)))
    assert not same(describe(Telling(1.0)), describe(Plain(1.0)))
    one, other = nn.CrossEntropyLoss(reduction="none"), nn.CrossEntropyLoss(label_smoothing=0.1)
    assert not same(describe(one), describe(other))
    assert describe(fb.losses.cross_entropy) == "cross_entropy"
    assert not same(describe(fb.losses.CausalLM("sum")), describe(fb.losses.causal_lm))


def test_the_code_of_a_class_counts() -> None:
    text = "class Loss:\n    @property\n    def weight(self):\n        return {weight}\n"
    text += "    def __call__(self, model, batch):\n        return self.weight * model(batch)\n"

    def made(weight: float) -> Any:
        found: dict[str, Any] = {"__name__": "of_a_user"}
        exec(compile(text.format(weight=weight), "file.py", "exec"), found)
        return describe(found["Loss"]())

    assert same(made(1.0), made(1.0))
    assert not same(made(1.0), made(2.0))


def test_what_holds_itself_is_described_all_the_same() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return loss(model, batch) if batch is None else kept[0](batch)

    kept: list[Any] = [model := nn.Identity(), loss]
    kept.append(kept)
    assert json.dumps(describe(loss))
    assert model is kept[0]


def test_numbers_count_to_nine_digits() -> None:
    assert same(describe(times(0.1 + 0.2)), describe(times(0.3)))
    assert not same(describe(times(0.3)), describe(times(0.3 + 1e-8)))


def test_code_of_another_python_is_not_compared() -> None:
    mine = describe(times(1.0))
    theirs = {**mine, "code": "cpython-399:" + "0" * 12}
    assert same(mine, theirs)
    assert not same(mine, {**theirs, "with": {"factor": 2.0}})
    assert not same(mine, {**mine, "code": mine["code"][:-1] + "x"})


SCRIPT = """
    import json
    import forebear as fb
    from forebear.descriptions import describe
    from functools import partial

    ALLOWED = {"one", "two", "three"}

    def loss(model, batch, *, weight=0.5):
        return weight * model(batch["image"]) if batch["kind"] in {"a", "b", "c"} else ALLOWED

    print(json.dumps([
        describe(loss),
        describe(lambda model, batch: loss(model, batch)),
        describe(partial(loss, weight=2)),
        describe(fb.losses.Denoising(levels=3)),
        describe(fb.losses.Denoising(levels=3).training()),
        describe(fb.losses.causal_lm),
        fb.Task(__import__("torch").nn.Linear(1, 1), loss).facts(),
    ]))
"""


def test_descriptions_are_the_same_in_other_processes(tmp_path: Path) -> None:
    found = []
    for seed in ("0", "12345"):
        folder = tmp_path / seed  # the same file elsewhere, as on another machine
        folder.mkdir()
        (folder / "file.py").write_text("\n" * int(seed[0]) + textwrap.dedent(SCRIPT))
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        said = subprocess.run(
            [sys.executable, "file.py"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(json.loads(said.stdout))
    assert found[0] == found[1]


def test_a_page_says_what_a_description_is() -> None:
    words = described(describe(Denoising(levels=10)))
    assert words.startswith(
        "denoising: prediction epsilon, schedule (Discrete: signal 1000 numbers"
    )
    assert "levels 10 from 50 to 950" in words
    assert words.endswith("seed 0")
    assert described("minus the loss") == "minus the loss"
    assert described(describe(times(2.0))) == "times.<locals>.<lambda>: with (factor 2)"
