"""Seeds, `--fast`, and what the markers cuda, data, full and slow mean."""

import os
import random
from pathlib import Path

import numpy
import pytest
import torch

# What `--fast` leaves out: files and tests that take more than a second or two, or start processes
# (`pytest --durations=60` tells). A file or a test that is not here is quick.
FULL = [
    "project/test_notebooks_run.py",
    "project/test_package_build.py",
    "benchmarks/test_cityscapes.py::test_cityscapes_equal_weighting_learns_generated_streets",
    "benchmarks/test_nyuv2.py::test_nyuv2_command_ends_with_2_where_pictures_are_missing",
    "benchmarks/test_nyuv2.py::test_nyuv2_equal_weighting_learns_generated_rooms",
    "benchmarks/test_nyuv2.py::test_nyuv2_runs_in_half_precision_or_recomputed",
    "benchmarks/test_nyuv2.py::test_nyuv2_segnet_goes_on_in_the_middle_of_an_epoch",
    "benchmarks/test_nyuv2.py::test_nyuv2_single_task_networks_have_the_heads",
    "benchmarks/test_nyuv2.py::test_nyuv2_smoke_runs",
    "benchmarks/test_office.py::test_office_generated_images_can_be_learned",
    "benchmarks/test_prepare.py::test_prepare_as_a_command",
    "benchmarks/test_qm9.py::test_qm9_learns_in_a_minute_of_one_core",
    "core/test_balancer.py::test_state_goes_on_in_a_fresh_balancer",
    "core/test_task_gradients.py::test_task_gradients_under_a_compiled_trunk",
    "data/test_image_store.py::test_image_store_is_imported_without_pillow",
    "data/test_image_store.py::test_image_store_killed_build_leaves_no_store",
    "data/test_image_store.py::test_image_store_two_processes_build_once",
    "data/test_raycast.py::test_first_hit_is_that_of_a_slow_march_along_the_ray",
    "data/test_scenes.py::test_a_scene_does_not_depend_on_how_many_there_are",
    "data/test_scenes.py::test_rooms_can_be_learned_and_are_not_trivial",
    "data/test_scenes.py::test_streets_can_be_learned_and_are_not_trivial",
    "experiments/test_cluster.py",
    "experiments/test_replay.py::test_options_choose_records",
    "experiments/test_replay.py::test_todays_code_replays_committed_records",
    "experiments/test_replay.py::test_two_processes_find_the_same",
    "experiments/test_run.py::test_ctrl_c_with_jobs_stops_every_process_at_a_checkpoint",
    "experiments/test_run.py::test_jobs_give_the_records_of_one_process",
    "experiments/test_run.py::test_missing_data_are_told_without_a_traceback",
    "experiments/test_run.py::test_one_pending_run_gets_a_process_too",
    "experiments/test_train.py::test_a_process_killed_at_any_moment_loses_nothing",
    "experiments/test_train.py::test_a_run_stopped_at_many_steps_gives_the_same_record",
    "gradient_balancing/test_gradvac.py::test_gradvac_duplicate_losses_stay_the_sum",
    "gradient_balancing/test_metabalance.py::test_metabalance_norms_that_have_faded_away",
    "gradient_balancing/test_mtadam.py::test_mtadam_norms_that_have_faded_away",
    "loss_balancing/test_igb.py::test_a_frozen_agent_does_not_learn_the_bandit",
    "loss_balancing/test_igb.py::test_igb_learns_the_bandit",
    "loss_balancing/test_igb.py::test_igb_with_a_bound_learns_it_too",
    "methods/test_hypothesis.py::test_no_error_and_nothing_but_finite_numbers",
    "methods/test_parity_libmtl.py::test_libmtl_shared_gradients_come_out_the_same_by_every_route",
    "methods/test_parity_torchjd.py::test_torchjd_nash",
    "methods/test_properties.py::test_degenerate_gradients_are_no_news",
    "methods/test_training.py",
    "models/test_imagenet_weights.py::test_weights_load_from_a_torchvision_shaped_file",
    "models/test_precision.py::test_a_compiled_network_keeps_its_buffers_in_another_process",
    "models/test_precision.py::test_a_network_is_loaded_by_another_process",
    "models/test_precision.py::test_a_trunk_through_aot_eager_equals_the_plain_run",
    "models/test_precision.py::test_a_trunk_through_inductor_equals_the_plain_run",
    "models/test_precision.py::test_bf16_equals_float32_to_its_precision",
    "models/test_precision.py::test_compiling_works_in_a_process",
    "models/test_precision.py::test_networks_of_one_shape_are_compiled_once",
    "models/test_precision.py::test_predictions_losses_and_gradients_are_float32",
    "models/test_qm9.py::test_qm9_nnconv_dense_form_equals_torch_geometric",
    "models/test_segnet.py::test_segnet_learns_all_tasks_at_once",
    "models/test_soft_sharing.py::test_soft_sharing_learns_all_tasks_at_once",
    "models/test_soft_sharing.py::test_soft_sharing_under_other_methods",
    "paper/test_claims.py::test_claims_have_a_row_each",
    "report/test_bars.py::test_bars_of_figure5_count_the_verdicts_by_kind",
    "report/test_bars.py::test_bars_of_figure6_test_what_constants_do",
    "report/test_bars.py::test_bars_of_figures_draw_made_up_records_exactly",
    "report/test_bars.py::test_bars_of_figures_say_what_was_not_run",
    "report/test_results_page.py::test_pages_bars_have_labels_that_do_not_touch",
    "report/test_results_page.py::test_pages_pictures_have_room_for_everything",
    "report/test_style.py::test_save_figure_writes_the_same_bytes_in_another_process",
    "site/test_gallery.py",
    "site/test_methods.py::test_the_table_of_methods_is_what_is_counted",
    "site/test_methods.py::test_toy_problem_without_a_balancer",
    "site/test_readme.py",
    "studies/test_batch_norm.py",
    "studies/test_early_training.py::test_early_training_takes_steps_and_draws_its_own_records",
    "studies/test_nash_protocol.py::test_nash_figure_is_of_the_records",
    "studies/test_nash_protocol.py::test_nash_toy_passes_by_a_hook",
    "studies/test_predictions.py",
]
TESTS = Path(__file__).resolve().parent


def pytest_addoption(parser):
    parser.addoption("--fast", action="store_true", help="leave out the tests marked full")
    parser.addoption("--runslow", action="store_true", help="also run the tests marked slow")


def is_full(item):
    """Is this one of the tests that `--fast` leaves out?"""
    if item.get_closest_marker("full") or "+log" in item.name:  # each method also without the log
        return True
    file = item.path.relative_to(TESTS).as_posix()
    return f"{file}::{item.name}".startswith(tuple(FULL))


def missing(item):
    """What this test needs and does not have, for each of its markers."""
    if item.get_closest_marker("slow") and not item.config.getoption("--runslow"):
        yield "slow: needs --runslow"
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        yield "needs CUDA"
    if item.get_closest_marker("data") and not os.environ.get("DBMTL_DATA"):
        yield "needs DBMTL_DATA"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marker
def pytest_collection_modifyitems(config, items):
    for item in items:
        if is_full(item):
            item.add_marker("full")
        for reason in missing(item):
            item.add_marker(pytest.mark.skip(reason=reason))
    if config.getoption("--fast"):
        full = [item for item in items if item.get_closest_marker("full")]
        items[:] = [item for item in items if not item.get_closest_marker("full")]
        config.hook.pytest_deselected(items=full)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where DBMTL_DATA is set, a skipped test of real data has failed; unless another marker
    skipped it."""
    report = yield
    has_data = item.get_closest_marker("data") and not any(missing(item))
    if has_data and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"DBMTL_DATA is set, yet: {reason}"
    return report


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)
