"""Progress bars: silent unless asked, and never in the way."""

import io

import pytest
from rich.console import Console

import forebear as fb
from forebear.progress import track


def test_a_library_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(range(5), "counting")) == [0, 1, 2, 3, 4]
    assert capsys.readouterr() == ("", "")


def test_nothing_is_drawn_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with fb.progress():
        assert list(track(iter(range(3)), "counting", total=3)) == [0, 1, 2]
    assert capsys.readouterr().out == ""
    text = io.StringIO()
    with fb.progress(Console(file=text)):
        list(track(range(3), "counting"))
    assert "counting" not in text.getvalue()


def test_a_terminal_shows_what_is_done_and_how_far() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100)
    with fb.progress(console):
        assert sum(track([1, 2, 3], "adding up")) == 6
        for _ in track(range(4), "outer loop"):
            list(track(range(2), "inner loop"))
            console.file.flush()
    shown = text.getvalue()
    assert "outer loop" in shown
    assert "0/4" in shown


def test_errors_and_breaks_pass_through_and_the_bar_goes() -> None:
    text = io.StringIO()
    with fb.progress(Console(file=text, force_terminal=True)):
        with pytest.raises(ZeroDivisionError):
            [1 / (1 - i) for i in track(range(3), "failing")]
        for _ in track(range(3), "stopping"):
            break
        assert list(track(range(2), "after")) == [0, 1]
    # Outside the block nothing is drawn any more.
    before = text.getvalue()
    list(track(range(3), "outside"))
    assert text.getvalue() == before
