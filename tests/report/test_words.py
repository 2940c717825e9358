from dataclasses import replace

import pytest

from forebear.report import words
from forebear.run import DatasetFacts, Interval, MethodResult, Removal, Run, TruthFacts

EKFAC = MethodResult(
    name="ekfac",
    label="EK-FAC",
    coverage=1.0,
    lds=Interval(mean=0.43, low=0.4, high=0.46),
    label_error_auc=0.9,
    found_in_first_10_percent=0.92,
)
GRADDOT = MethodResult(name="graddot", label="GradDot", lds=Interval(mean=0.2, low=0.15, high=0.25))
TRUTH = TruthFacts(
    subsets=8, seeds=2, fraction=0.5, ceiling=Interval(mean=0.72, low=0.7, high=0.74)
)
RUN = Run(kind="demo", methods=[EKFAC, GRADDOT], truth=TRUTH, best="ekfac")


def plain(text: str) -> str:
    return text.replace(words.NBSP, " ")


def test_the_headline_says_how_good_how_sure_and_what_to_do() -> None:
    assert plain(words.headline(RUN)) == (
        "EK-FAC predicts what retraining would do with rank correlation 0.43 (95 % interval 0.40 "
        "to 0.46; the retraining noise allows at most 0.72); looking at the 10 % most suspicious "
        "labels finds 92 % of the planted errors."
    )
    assert plain(words.title(RUN)) == (
        "Checking a tenth of the labels finds 92 % of the planted errors."
    )


def test_the_headline_names_another_method_that_finds_more_errors() -> None:
    better = replace(GRADDOT, found_in_first_10_percent=1.0)
    text = plain(words.headline(replace(RUN, methods=[EKFAC, better])))
    assert text.endswith("labels in the order of GradDot finds all the planted errors.")


def test_among_equals_the_best_method_finds_the_errors() -> None:
    equal = replace(GRADDOT, found_in_first_10_percent=0.92, label_error_auc=0.99)
    assert words.best_at_labels(replace(RUN, methods=[equal, EKFAC])) == EKFAC


def test_a_run_without_truth_does_not_claim_any() -> None:
    run = Run(
        kind="attribute",
        dataset=DatasetFacts(name="d", train=1200, queries=3),
        methods=[MethodResult(name="ekfac", label="EK-FAC", coverage=0.914)],
    )
    assert plain(words.title(run)) == "3 predictions, traced back to 1,200 training examples."
    assert "91 % of the parameters; nothing here was checked" in plain(words.headline(run))
    assert words.lds_finding(run) == ""
    assert words.removal_finding(run) == ""
    assert words.headline(Run(kind="attribute")) == ""


def test_a_lead_is_called_a_lead_only_when_intervals_are_apart() -> None:
    assert "does not touch that of GradDot (0.20)" in words.lds_finding(RUN)
    assert "60 % of what the noise" in plain(words.lds_finding(RUN))
    close = replace(GRADDOT, lds=Interval(mean=0.41, low=0.38, high=0.44))
    text = words.lds_finding(replace(RUN, methods=[close, EKFAC]))
    assert text.startswith("EK-FAC comes first")
    assert "overlaps that of GradDot (0.41), so these queries do not tell the two apart" in text


def test_removal_is_compared_with_random_removal() -> None:
    removal = Removal(fractions=[0, 0.1], curves={"ekfac": [-0.1, -2.0], "random": [-0.1, -0.2]})
    text = plain(words.removal_finding(replace(RUN, removal=removal)))
    assert text.startswith("Without the 10 % of the training set that EK-FAC calls strongest")
    assert "goes from −0.10 to −2.00; without as many drawn at random, it is −0.20." in text


def test_suspects_are_compared_with_chance() -> None:
    run = replace(RUN, dataset=DatasetFacts(name="d", train=1000, queries=1))
    text = words.suspects_finding(run, "ekfac", found=40, looked=100, flipped=50)
    assert "hold 40 of the 50 planted errors; as many drawn at random would hold about 5." in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "100 %"), (0.999, "99.9 %"), (0.923, "92 %"), (0.004, "0.4 %"), (0.0, "0 %")],
)
def test_percentages_do_not_round_to_all_or_nothing(value: float, text: str) -> None:
    assert plain(words.percent(value)) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0042, "4.2 ms"), (0.5, "0.50 s"), (42.4, "42 s"), (130.0, "2 min 10 s")],
)
def test_durations_use_the_unit_a_person_would(seconds: float, text: str) -> None:
    assert plain(words.duration(seconds)) == text


def test_small_negative_numbers_are_zero() -> None:
    assert words.number(-0.001) == "0.00"
    assert words.number(-0.25) == "−0.25"
    assert [words.multiple(v) for v in (0.41, 3.24, 1650)] == ["0.41×", "3.2×", "1,650×"]
