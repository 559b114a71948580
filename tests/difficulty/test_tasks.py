"""Tasks partition the timesteps."""

import numpy as np
import pytest

from difficulty.errors import InputError
from difficulty.process import PROCESSES, get_process
from difficulty.process_file import read_process, write_process
from difficulty.tasks import GRIDS, make_tasks, runs, task_of_t


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("count", [1, 7, 20, 1000])
def test_tasks_cover_every_timestep_once(process, grid, count):
    process = get_process(process)
    count = min(count, process.T - int(process.alpha[-1] == 0))  # pure noise alone is no task
    tasks = make_tasks(process, count, grid)
    covered = np.concatenate([np.arange(task.first, task.last + 1) for task in tasks])
    np.testing.assert_array_equal(covered, np.arange(1, process.T + 1))
    assert all(task.log_snr_high >= task.log_snr_low for task in tasks)
    index = task_of_t(tasks, process.T)
    assert index[0] == -1
    assert (index[1:] == np.repeat(np.arange(count), [task.length for task in tasks])).all()


def test_uniform_tasks_are_equally_long():
    assert {task.length for task in make_tasks(get_process("vp-linear"), 20, "t")} == {50}


def test_log_snr_tasks_are_equal_in_log_snr_where_steps_are_fine():
    tasks = make_tasks(get_process("ve"), 20, "log-snr")
    widths = [task.log_snr_high - task.log_snr_low for task in tasks]
    assert max(widths) / min(widths) < 1.05


@pytest.mark.parametrize("count", [0, -3, 1001])
def test_an_impossible_number_of_tasks_is_refused(count):
    with pytest.raises(InputError, match=r"1\.\.T = 1000"):
        make_tasks(get_process("vp-linear"), count)


def test_an_unknown_grid_lists_the_known_ones():
    with pytest.raises(InputError, match="t, log-snr"):
        make_tasks(get_process("vp-linear"), 5, "sigma")


@pytest.mark.parametrize("grid", GRIDS)
def test_pure_noise_joins_the_last_task(grid):
    with pytest.raises(InputError, match=r"number of tasks must lie in 1\.\.T - 1 = 19"):
        make_tasks(get_process("flow-matching:T=20"), 20, grid)
    assert make_tasks(get_process("flow-matching:T=20"), 19, grid)[-1].first == 19


def test_runs_join_consecutive_numbers_only():
    assert runs([7, 1, 2, 3, 9]) == [(1, 3), (7, 7), (9, 9)]
    assert runs([]) == []


@pytest.mark.parametrize("name", ["ve", "ve:T=101", "vp-linear", "edm", "flow-matching"])
def test_the_process_of_a_folder_cuts_the_tasks_that_were_trained(tmp_path, name):
    process = get_process(name)
    write_process(tmp_path, process)
    again = read_process(tmp_path, process.fingerprint)
    np.testing.assert_array_equal(again.sigma, process.sigma)
    for count in range(1, 31):
        # Under `ve` log-SNR is linear in t, and borders fall on timesteps.
        assert make_tasks(again, count, "log-snr") == make_tasks(process, count, "log-snr")
