"""What the picture at the front of the README is drawn from."""

import numpy as np
import pandas as pd

from dbmtl.experiments.records import project_root
from dbmtl.report.front_page import stored_small_task

COMMITTED = project_root() / "figures" / "site" / "small_task.csv"


def test_the_committed_curves_are_those_of_a_training_now(tmp_path):
    committed = pd.read_csv(COMMITTED)
    now = stored_small_task(tmp_path / "now.csv")
    keys = ["method", "step"]
    pd.testing.assert_frame_equal(now[keys], committed[keys])
    numbers = ["mean", "low", "high"]
    apart = np.log(now[numbers] / committed[numbers]).abs()
    assert apart.max(axis=None) < 0.3  # Adam amplifies roundings: six percent on another kernel
    assert apart[now["step"] <= 20].max(axis=None) < 1e-3


def test_a_file_that_is_there_is_drawn_and_trained_anew_only_when_asked(tmp_path):
    file = tmp_path / "curves.csv"
    kept = pd.DataFrame({"method": ["EW"], "step": [0], "mean": [1.0], "low": [0.5], "high": [2.0]})
    kept.to_csv(file, index=False)
    pd.testing.assert_frame_equal(stored_small_task(file), kept)
    assert len(stored_small_task(file, fresh=True)) == 400 == len(pd.read_csv(file))
