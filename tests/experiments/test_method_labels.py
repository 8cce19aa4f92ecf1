"""Labels: what goes to which method."""

import pytest

from dbmtl.experiments.method_labels import check_settings, hyper_of, parse_hyper
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
    assert hyper_of("STL", hyper) == {}


@pytest.mark.parametrize("method", [*method_names(), "CAGrad+log"])
def test_every_hyperparameter_is_a_setting_and_no_option_of_the_balancer_is(method):
    check_settings(method, hyperparameters(method))
    for option in ("check", "grads", "shared", "num_tasks", "model", "level", "ema", "name"):
        with pytest.raises(ValueError, match=f"{method.partition('+')[0]}.* has no .*'{option}'"):
            check_settings(method, {option: 1})


def test_the_error_lists_the_settings():
    with pytest.raises(ValueError, match="its settings: eps, alpha, beta, beta_decay"):
        check_settings("DB-MTL", {"beta": 0.1, "check": "off"})
