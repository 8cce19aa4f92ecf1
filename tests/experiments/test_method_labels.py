"""Labels: what goes to which method."""

from dbmtl.experiments.method_labels import hyper_of, parse_hyper


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
