"""What several test files of the experiments need."""

import pytest

from dbmtl.experiments.checkpoints import checkpoint_path
from dbmtl.experiments.train import train


@pytest.fixture
def stopped(tmp_path):
    """A function that trains the toy for three steps and stops at a checkpoint: result and file."""

    def stop_early(method="EW", seed=0, **options):
        calls = iter(range(100))
        part = train(
            "toy", method, seed=seed, out=tmp_path, stop=lambda: next(calls) == 3, **options
        )
        return part, checkpoint_path(tmp_path / "checkpoints", part["identity"])

    return stop_early
