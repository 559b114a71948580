import json

import numpy as np
import pytest
from scipy import stats

from difficulty.errors import InputError
from difficulty.process import get_process
from training.curriculum_builders import make_curriculum
from training.density import DENSITIES, density
from training.timesteps import TimestepSampler


def _draw(sampler, steps, batch=32, **options):
    return np.concatenate([sampler.sample(batch, step=step, **options)[0].numpy() for step in range(steps)])


def test_one_cluster_of_all_tasks_draws_the_same_timesteps_as_no_curriculum(process, one_cluster):
    plain = TimestepSampler(process, budget=50, seed=3)
    clustered = TimestepSampler(process, one_cluster, budget=50, seed=3)
    assert (_draw(plain, 50) == _draw(clustered, 50)).all()


@pytest.mark.parametrize("name", DENSITIES)
def test_counts_follow_the_density_that_was_asked_for(name, process):
    sampler = TimestepSampler(process, budget=1, base_density=name, seed=1)
    counts = np.bincount(_draw(sampler, 200, batch=500), minlength=81)[1:]
    expected = density(name, process)[1:] * counts.sum()
    chosen = expected > 5
    pooled = [np.append(x[chosen], x[~chosen].sum()) for x in (counts, expected)]
    keep = pooled[1] > 0
    assert stats.chisquare(pooled[0][keep], pooled[1][keep]).pvalue > 1e-3


def test_two_densities_share_the_uniform_numbers_and_so_the_order_of_their_draws(process):
    uniform = TimestepSampler(process, budget=1, seed=5)
    logarithmic = TimestepSampler(process, budget=1, base_density="log-snr", seed=5)
    first, second = uniform.sample(500, step=0)[0], logarithmic.sample(500, step=0)[0]
    assert stats.spearmanr(first, second).statistic > 0.99


def test_a_loop_that_never_reports_its_loss_hears_once_that_later_stages_will_not_come(process, curriculum, recwarn):
    waiting = curriculum.with_clusters(
        curriculum.clusters, pacing={"rule": "patience", "options": {"tau": 5}}
    )
    silent, telling = (TimestepSampler(process, waiting, budget=300) for _ in range(2))
    for step in range(200):
        telling.sample(4, step=step)
        telling.update(1.0)
    assert telling.stage == telling.stages - 1
    assert not recwarn.list
    for step in range(200):
        silent.sample(4, step=step)
    (warning,) = recwarn.list
    assert f"100 draws of stage 1 of {silent.stages} and no call of update(loss)" in str(warning.message)


def test_a_budget_that_ends_in_an_early_stage_is_told(process, curriculum):
    waiting = curriculum.with_clusters(curriculum.clusters, pacing={"rule": "patience", "options": {"tau": 1000}})
    sampler = TimestepSampler(process, waiting, budget=20)
    for step in range(20):
        sampler.sample(4, step=step)
        sampler.update(1.0)
    with pytest.warns(UserWarning, match="the budget of 20 iterations is spent in stage 1"):
        sampler.sample(4, step=20)


def test_stages_without_iterations_are_told_once_each(process, ranking, recwarn):
    brief = make_curriculum(ranking, method="uniform", k=8)  # two iterations for seven stages
    sampler = TimestepSampler(process, brief, budget=20)
    for step in range(20):
        sampler.sample(4, step=step)
    told = [str(warning.message).partition(";")[0] for warning in recwarn.list]
    assert told == ["stage 1 of 8 had no iterations", "stages 3 to 5 of 8 had no iterations",
                    "stage 7 of 8 had no iterations"]  # fmt: skip
    empty = {record.stage + 1 for record in sampler.log() if record.end == record.start}
    assert empty == {1, 3, 4, 5, 7}


def test_stage_draws_nothing_outside_its_tasks_and_the_last_stage_draws_everything(process, curriculum):
    sampler = TimestepSampler(process, curriculum, budget=1000, seed=0)
    first = sampler.sample(2000, step=0)[0].numpy()
    assert set(first) == set(range(51, 81))
    last = sampler.sample(5000, step=500)[0].numpy()
    assert set(last) == set(range(1, 81))
    assert [record.stage for record in sampler.log()] == [0, 1, 2]


def test_ranks_take_disjoint_parts_of_what_one_process_would_draw(process):
    whole = TimestepSampler(process, budget=1, seed=2).sample(32, step=7)[0]
    parts = [TimestepSampler(process, budget=1, seed=2).sample(8, step=7, rank=rank, world=4)[0] for rank in range(4)]
    assert (np.concatenate(parts) == whole.numpy()).all()
    assert not (parts[0] == parts[1]).all()


def test_stratified_draws_hit_every_stratum_once_over_all_ranks(process):
    parts = [
        TimestepSampler(process, budget=1, seed=2, stratified=True).sample(20, step=0, rank=rank, world=4)[0]
        for rank in range(4)
    ]
    assert sorted(np.concatenate(parts)) == list(range(1, 81))


def test_draws_depend_on_seed_and_step_and_on_nothing_else(process):
    sampler = TimestepSampler(process, budget=1, seed=2)
    late = sampler.sample(16, step=9)[0]
    assert (TimestepSampler(process, budget=1, seed=2).sample(16, step=9)[0] == late).all()
    assert not (sampler.sample(16, step=10)[0] == late).all()
    assert not (TimestepSampler(process, budget=1, seed=3).sample(16, step=9)[0] == late).all()


def test_weights_undo_the_density_on_average(process):
    sampler = TimestepSampler(process, budget=1, base_density="cosine-map", reweight=True, seed=0)
    t, weight = sampler.sample(40000, step=0)
    assert float(weight.mean()) == pytest.approx(1, abs=0.03)
    assert float((weight * t).mean()) == pytest.approx(40.5, rel=0.03)


def test_resumed_sampler_draws_what_the_uninterrupted_one_would(process, ranking):
    patience = make_curriculum(ranking, k=3, pacing="patience", pacing_options={"tau": 5})

    def losses(step):
        return float(np.random.default_rng(step).normal())

    def advance(sampler, start, end):
        drawn = []
        for step in range(start, end):
            drawn.append(sampler.sample(4, step=step)[0].numpy())
            sampler.update(losses(step))
        return drawn

    whole = TimestepSampler(process, patience, budget=100, seed=1)
    expected = advance(whole, 0, 100)
    assert whole.stage == 2
    for stop in (1, 7, 23, 60):
        first = TimestepSampler(process, patience, budget=100, seed=1)
        advance(first, 0, stop)
        second = TimestepSampler(process, patience, budget=100, seed=1)
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert (np.stack(advance(second, stop, 100)) == np.stack(expected[stop:])).all()
        assert second.log() == whole.log()


def test_state_of_another_curriculum_is_refused(process, curriculum, one_cluster):
    state = TimestepSampler(process, curriculum, budget=10).state_dict()
    with pytest.raises(InputError, match="another curriculum"):
        TimestepSampler(process, one_cluster, budget=10).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"budget": 20}, "budget"),
        ({"base_density": "log-snr"}, "density"),
        ({"reweight": True}, "density"),
        ({"seed": 1}, "seed"),
    ],
)
def test_state_of_another_budget_density_or_seed_is_refused(process, curriculum, change, name):
    state = TimestepSampler(process, curriculum, budget=10).state_dict()
    with pytest.raises(InputError, match=f"belongs to another {name}"):
        TimestepSampler(process, curriculum, **({"budget": 10} | change)).load_state_dict(state)
    of_earlier_version = {key: value for key, value in state.items() if key not in ("budget", "density")}
    TimestepSampler(process, curriculum, budget=10).load_state_dict(of_earlier_version)


@pytest.mark.parametrize(("batch", "rank", "world"), [(4, 1, 1), (4, 2, 2), (4, -1, 2), (0, 0, 1)])
def test_rank_outside_the_world_and_empty_batches_are_refused(process, batch, rank, world):
    with pytest.raises(InputError, match="cannot draw"):
        TimestepSampler(process, budget=10).sample(batch, step=0, rank=rank, world=world)


@pytest.mark.parametrize("bad", [{"budget": 0}, {"budget": 10, "seed": -1}])
def test_sampler_without_iterations_or_stream_is_refused(process, bad):
    with pytest.raises(InputError, match="at least 1 iteration"):
        TimestepSampler(process, **bad)


def test_log_counts_every_sample_that_was_drawn(process, curriculum):
    sampler = TimestepSampler(process, curriculum, budget=100, seed=0)
    drawn = _draw(sampler, 100, batch=8)
    sampler.finish(100)
    counted = np.sum([record.samples_per_t for record in sampler.log()], axis=0)
    assert (counted == np.bincount(drawn, minlength=81)).all()
    assert [record.end for record in sampler.log()] == [5, 10, 100]


def test_expected_exposure_is_what_the_draws_of_a_whole_run_tend_to(process, curriculum):
    sampler = TimestepSampler(process, curriculum, budget=100, seed=0)
    drawn = _draw(sampler, 100, batch=2000)
    counts = np.bincount(drawn, minlength=81)[1:]
    assert stats.chisquare(counts, sampler.exposure()[1:] * counts.sum()).pvalue > 1e-3


def test_density_that_leaves_a_stage_nothing_to_train_is_refused(process, curriculum):
    p = density("uniform", process).copy()
    p[51:] = 0
    with pytest.raises(InputError, match="train nothing"):
        TimestepSampler(process, curriculum, budget=10, base_density=p)


def test_curriculum_of_another_process_is_refused_by_the_sampler(curriculum):
    with pytest.raises(InputError):
        TimestepSampler(get_process("vp-linear"), curriculum, budget=10)


def _with_phases(curriculum):
    """The clean half only from 30 % on, the noisy half only from 70 % on."""
    def phase(start, mass):
        return {"start": start, "density": {"name": "table", "task_mass": mass}}

    clean, noisy = [0.25] * 4 + [0.0] * 4, [0.0] * 4 + [0.25] * 4
    return curriculum.with_clusters(curriculum.clusters, density_phases=[phase(0.3, clean), phase(0.7, noisy)])


def test_base_density_changes_at_its_share_of_the_budget_and_the_log_says_so(process, one_cluster):
    changing = _with_phases(one_cluster)
    sampler = TimestepSampler(process, changing, budget=100, seed=0)
    drawn = [sampler.sample(500, step=step)[0].numpy() for step in range(100)]
    sampler.finish(100)
    early, middle, late = (np.concatenate(drawn[a:b]) for a, b in ((0, 30), (30, 70), (70, 100)))
    assert (early.min(), early.max()) == (1, 80)
    assert (middle.min(), middle.max()) == (1, 40)
    assert (late.min(), late.max()) == (41, 80)
    assert [(r.stage, r.start, r.end) for r in sampler.log()] == [(0, 0, 30), (0, 30, 70), (0, 70, 100)]
    assert "base density 2 of 3" in sampler.log()[0].reason
    counts = np.bincount(np.concatenate(drawn), minlength=81)[1:]
    assert stats.chisquare(counts, sampler.exposure()[1:] * counts.sum()).pvalue > 1e-3


def test_a_stage_goes_on_when_the_base_density_changes_in_it(process, curriculum):
    # stages end at 20 % and 40 % of the budget, as without phases
    slow = {"pacing": {"rule": "fraction", "options": {"share": 0.4}}}
    plain = TimestepSampler(process, curriculum.with_clusters(curriculum.clusters, **slow), budget=100)
    phased = {"density_phases": [{"start": 0.3, "density": curriculum.density.model_dump()}]}
    changing = TimestepSampler(process, curriculum.with_clusters(curriculum.clusters, **slow, **phased), budget=100)
    for step in range(100):
        assert (plain.sample(20, step=step)[0] == changing.sample(20, step=step)[0]).all()
        assert (plain.stage, plain.stage_start) == (changing.stage, changing.stage_start)
    assert [record.start for record in changing.log()] == [0, 20, 30, 40]


def test_resumed_sampler_knows_the_base_density_of_its_step(process, one_cluster):
    changing = _with_phases(one_cluster)
    first = TimestepSampler(process, changing, budget=100, seed=1)
    for step in range(50):
        first.sample(8, step=step)
    second = TimestepSampler(process, changing, budget=100, seed=1)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for step in range(50, 100):
        assert (first.sample(8, step=step)[0] == second.sample(8, step=step)[0]).all()
    assert first.log() == second.log()


@pytest.mark.parametrize("power", [0, 3, 30])
def test_draws_are_the_inverse_of_the_distribution_also_where_a_density_is_very_skewed(power):
    process = get_process("vp-linear")
    table = np.concatenate([[0.0], np.arange(1, 1001.0) ** power])
    sampler = TimestepSampler(process, budget=10, base_density=table / table.sum())
    u = np.concatenate([np.random.default_rng(0).random(20_000), sampler.cdf[sampler.cdf < 1], [0.0, 1 - 2**-53]])
    assert np.array_equal(sampler._t_at(u), sampler.cdf.searchsorted(u, side="right"))
