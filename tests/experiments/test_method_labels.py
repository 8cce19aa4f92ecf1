"""Labels: what goes to which method."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dbmtl.experiments.method_labels import (
    check_settings,
    hyper_of,
    method_label,
    parse_hyper,
    parse_method,
    split_methods,
)
from dbmtl.registry import hyperparameters, method_names


def test_hyperparameters_from_the_command_line():
    hyper = parse_hyper(["beta=0.1", "DB-MTL:beta=0.5", "CAGrad+log:name=some text", "flag=true"])
    assert hyper == {
        "beta": 0.1,
        "flag": True,
        "DB-MTL": {"beta": 0.5},
        "CAGrad+log": {"name": "some text"},
    }
    assert hyper_of("DB-MTL", hyper) == {"beta": 0.5, "flag": True}
    assert hyper_of("DB-MTL(beta=0.9; eps=1)", hyper) == {"beta": 0.9, "flag": True, "eps": 1}
    assert hyper_of("STL", hyper) == {}


@pytest.mark.parametrize("method", [*method_names(), "CAGrad+log"])
def test_every_hyperparameter_is_a_setting_and_no_option_of_the_balancer_is(method):
    check_settings(method, hyperparameters(method))
    for option in ("check", "grads", "shared", "num_tasks", "model", "level", "ema", "name"):
        with pytest.raises(ValueError, match=f"{method.partition('+')[0]}.* has no .*'{option}'"):
            check_settings(method, {option: 1})


def test_the_error_lists_the_settings():
    settings = "its settings: eps, alpha, weights, shrinkage, beta, beta_decay"
    with pytest.raises(ValueError, match=settings):
        check_settings("DB-MTL", {"beta": 0.1, "check": "off"})


WORDS = st.text(alphabet="ab1.-{}[]'\" ", max_size=6)
NUMBERS = st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=3)


@given(
    st.dictionaries(
        st.sampled_from(["alpha", "beta", "eps"]),
        st.one_of(
            st.none(),
            st.booleans(),
            st.integers(),
            st.floats(allow_nan=False),
            WORDS,
            NUMBERS,
            st.lists(NUMBERS, max_size=2),
        ),
    )
)
def test_a_label_is_read_back_as_the_same_settings(hyper):
    label = method_label("DB-MTL", hyper)
    assert parse_method(label) == ("DB-MTL", hyper)
    assert split_methods(f"EW,{label}") == ["EW", label]


@pytest.mark.parametrize("setting", ["beta", "beta=", "=0.1", "alpha=mean"])
def test_what_is_no_new_setting_is_named(setting):
    with pytest.raises(ValueError, match=f"'{setting}' in .* is no new key=value"):
        parse_method(f"DB-MTL(alpha=max; {setting})")


@pytest.mark.parametrize("mark", '(),;="')
def test_what_separates_settings_is_quoted_within_them(mark):
    assert method_label("EW", {"name": f"a{mark}b"}) == f"EW(name={json.dumps(f'a{mark}b')})"


def test_a_list_keeps_its_commas():
    label = "LS(weights=[0.2, 0.3, 1], alpha=1)"
    assert parse_method(label) == ("LS", {"weights": [0.2, 0.3, 1], "alpha": 1})
    assert split_methods(f"EW, {label}") == ["EW", "LS(alpha=1, weights=[0.2, 0.3, 1])"]
    assert parse_method('A(word="a, b"; beta=[])')[1] == {"word": "a, b", "beta": []}
