"""The bar is drawn where it is wanted and tqdm is there; the work goes on anyway."""

import io
import sys

import pytest

from dbmtl.core.progress import progress_bar


def drawn(monkeypatch, is_terminal=False, **options):
    """What three steps of a bar write to standard error."""
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(3, "toy", **options) as advance:
        advance()
        advance(2)
    return stream.getvalue()


@pytest.mark.parametrize(
    "is_terminal, shown, is_drawn",
    [(True, None, True), (False, None, False), (False, True, True), (True, False, False)],
)
def test_a_bar_is_drawn_where_it_is_wanted(monkeypatch, is_terminal, shown, is_drawn):
    text = drawn(monkeypatch, is_terminal, shown=shown)
    assert ("toy: 100%" in text and "3/3" in text) == is_drawn
    assert is_drawn or text == ""


def test_a_bar_goes_on_from_where_a_run_stopped(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with progress_bar(10, "toy", initial=9, shown=True) as advance:
        advance()
    assert "10/10" in stream.getvalue() and "3/10" not in stream.getvalue()


def test_without_tqdm_nothing_is_drawn(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert drawn(monkeypatch, shown=True) == ""


def test_the_bar_of_work_that_fails_is_closed_and_the_error_passes(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with pytest.raises(ZeroDivisionError):
        with progress_bar(3, "toy", shown=True) as advance:
            advance(1 // 0)
