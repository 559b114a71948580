import json
from itertools import pairwise
from pathlib import Path

import jsonschema
import numpy as np
import pytest

import training
from difficulty.errors import InputError
from difficulty.process import PROCESSES, get_process
from training.curriculum import Curriculum, DensityPhase, schema
from training.curriculum_builders import interval_curriculum, make_curriculum
from training.density import task_masses

SCHEMA = Path(training.__file__).parent / "curriculum.schema.json"


def test_saved_curriculum_is_read_back_as_it_was(curriculum, tmp_path):
    curriculum.save(tmp_path / "c.json")
    loaded = Curriculum.load(tmp_path / "c.json")
    assert loaded == curriculum
    assert loaded.sha256 == curriculum.sha256


def test_shipped_schema_is_that_of_the_model():
    assert json.loads(SCHEMA.read_text()) == schema()


def test_shipped_schema_accepts_a_saved_curriculum_and_refuses_one_without_clusters(curriculum, tmp_path):
    curriculum.save(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    jsonschema.validate(content, json.loads(SCHEMA.read_text()))
    del content["clusters"]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, json.loads(SCHEMA.read_text()))


def test_file_is_used_with_nothing_but_json(curriculum, tmp_path):
    curriculum.save(tmp_path / "c.json")
    content = json.loads((tmp_path / "c.json").read_text())
    allowed = set()
    for number, cluster in enumerate(content["clusters"]):
        for index in cluster["tasks"]:
            task = content["tasks"][index]
            allowed |= set(range(task["t_first"], task["t_last"] + 1))
        expected = {
            t
            for i in curriculum.stages()[number]
            for t in range(curriculum.tasks[i].t_first, curriculum.tasks[i].t_last + 1)
        }
        assert allowed == expected
    assert allowed == set(range(1, content["process"]["T"] + 1))


def test_stages_accumulate_from_the_easiest_cluster_to_all_tasks(curriculum):
    assert curriculum.stages() == [[5, 6, 7], [2, 3, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]]


def test_separate_stages_end_with_all_tasks(curriculum):
    separate = curriculum.with_clusters(curriculum.clusters, accumulate=False)
    assert separate.stages() == [[5, 6, 7], [2, 3], [0, 1, 4], list(range(8))]


def test_paper_curriculum_starts_at_the_noisiest_interval():
    paper = interval_curriculum(get_process("vp-linear"))
    assert len(paper.clusters) == 20
    assert paper.tasks[paper.clusters[0].tasks[0]].t_last == 1000
    assert paper.tasks[paper.clusters[-1].tasks[0]].t_first == 1


def test_interval_method_can_be_ordered_by_a_measure(ranking):
    measured = make_curriculum(ranking, method="log-snr", k=3, measure="excess_nats")
    difficulty = [cluster.difficulty for cluster in measured.clusters]
    assert difficulty == sorted(difficulty)
    noise = make_curriculum(ranking, method="log-snr", k=3)
    assert noise.provenance["measure"] == "noise-level"


def _changed(curriculum, change):
    content = json.loads(json.dumps(curriculum.model_dump()))
    change(content)
    return content


def _set(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        for key in path:
            content = content[key]
        content[last] = value

    return change


BROKEN = {
    "another version": (_set("format", "denoising-difficulty/curriculum/9"), "this version reads"),
    "no format": (lambda c: c.pop("format"), "states no format"),
    "unknown field": (_set("speed", 3), "speed"),
    "overlap": (_set("tasks", 1, "t_first", 10), "overlaps"),
    "gap": (_set("tasks", 1, "t_first", 12), "belongs to no task"),
    "too short": (_set("tasks", 7, "t_last", 79), "end at t = 79"),
    "missing task": (_set("clusters", 0, "tasks", [5, 6]), "in no cluster"),
    "task twice": (_set("clusters", 0, "tasks", [5, 6, 7, 2]), "more than one cluster"),
    "unknown task": (_set("clusters", 0, "tasks", [5, 6, 7, 8]), "does not exist"),
    "empty cluster": (_set("clusters", 0, "tasks", []), "clusters.0.tasks"),
    "unknown pacing": (_set("pacing", "rule", "hope"), "unknown pacing rule"),
    "unknown pacing option": (_set("pacing", "options", {"tau": 3}), "has no option"),
    "masses that do not add up": (_set("density", "task_mass", [0.5] * 8), "task_mass"),
    "text for a number": (_set("tasks", 0, "t_first", "one"), "tasks.0.t_first"),
    "number as text": (_set("tasks", 0, "t_first", "1"), "tasks.0.t_first"),
    "fraction for a whole number": (_set("clusters", 0, "tasks", [5.0, 6, 7]), "clusters.0.tasks.0"),
    "text for true": (_set("accumulate", "yes"), "accumulate"),
    "mass of NaN": (_set("density", "task_mass", [float("nan")] * 8), "density.task_mass.0"),
    "pacing option of NaN": (_set("pacing", "options", {"share": float("nan")}), "pacing.options"),
    "pacing option of a fraction": (
        _set("pacing", {"rule": "patience", "options": {"tau": 1.5}}), "'tau' .* must be a whole number"
    ),
    "fingerprint without points": (_set("process", "t", []), "fingerprint must state t"),
    "fingerprint beyond T": (_set("process", "t", [1, 81]), "fingerprint must state t"),
    "fingerprint of text": (_set("process", "t", "1"), "fingerprint must state t"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_is_refused_with_one_sentence_that_says_why(name, curriculum, tmp_path):
    change, reason = BROKEN[name]
    (tmp_path / "c.json").write_text(json.dumps(_changed(curriculum, change)))
    with pytest.raises(InputError, match=reason) as refusal:
        Curriculum.load(tmp_path / "c.json")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '{"a": 1}'])
def test_foreign_and_truncated_json_is_refused(content, tmp_path):
    (tmp_path / "c.json").write_text(content)
    with pytest.raises(InputError) as refusal:
        Curriculum.load(tmp_path / "c.json")
    assert "\n" not in str(refusal.value)


def test_curriculum_of_another_process_is_refused(curriculum, process):
    curriculum.validate_for(process)
    with pytest.raises(InputError, match="noise levels differ"):
        curriculum.validate_for(get_process("vp-cosine:T=80"))
    with pytest.raises(InputError, match="T = 80"):
        curriculum.validate_for(get_process("vp-linear"))


def test_curriculum_that_counts_t_the_other_way_is_refused(curriculum, process):
    changed = _changed(curriculum, _set("process", "t_direction", "noise decreases with t"))
    with pytest.raises(InputError, match="noise increases with t"):
        Curriculum.model_validate(changed).validate_for(process)


def test_boundary_that_was_edited_in_t_but_not_in_log_snr_is_refused(curriculum, process):
    def change(content):
        content["tasks"][0]["t_last"], content["tasks"][1]["t_first"] = 12, 13
        content["density"]["name"] = "table"

    with pytest.raises(InputError, match="on every axis or on none"):
        Curriculum.model_validate(_changed(curriculum, change)).validate_for(process)


@pytest.mark.parametrize(
    "axis", ["u_first", "u_last", "sigma_first", "sigma_last", "log_snr_high", "log_snr_low"]
)
@pytest.mark.parametrize("change", [lambda value: 1.01 * value + 0.01, lambda value: float("nan")])
def test_boundary_that_disagrees_with_t_on_any_axis_is_refused(curriculum, process, axis, change):
    edited = _set("tasks", 3, axis, change(getattr(curriculum.tasks[3], axis)))
    with pytest.raises(InputError, match=f"task 3 holds t = 31..40, where {axis} is"):
        Curriculum.model_validate(_changed(curriculum, edited)).validate_for(process)


def test_boundaries_written_with_four_digits_are_accepted(curriculum, process):
    def rounded(content):
        for task in content["tasks"]:
            task |= {name: float(f"{value:.4g}") for name, value in task.items() if isinstance(value, float)}

    Curriculum.model_validate(_changed(curriculum, rounded)).validate_for(process)


@pytest.mark.parametrize("name", PROCESSES)
def test_every_process_agrees_with_its_own_curriculum(name):
    process = get_process(f"{name}:T=100")
    interval_curriculum(process, k=5).validate_for(process)


def test_intervals_inside_one_measured_task_come_noisier_first(ranking):
    fine = make_curriculum(ranking, method="snr", k=7, measure="excess_nats")
    ties = [
        (a.tasks[0], b.tasks[0])
        for a, b in pairwise(fine.clusters)
        if a.difficulty == pytest.approx(b.difficulty, rel=1e-12)
    ]
    assert ties
    assert all(first > second for first, second in ties)


def test_table_density_follows_the_masses_in_the_file(curriculum, process):
    masses = [0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    table = Curriculum.model_validate(_changed(curriculum, _set("density", {"name": "table", "task_mass": masses})))
    assert np.allclose(task_masses(table.base_densities(process)[0][1], table.tasks), masses)


def test_edited_masses_of_a_named_density_are_refused(curriculum, process):
    masses = [0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]
    edited = Curriculum.model_validate(_changed(curriculum, _set("density", "task_mass", masses)))
    with pytest.raises(InputError, match="table"):
        edited.validate_for(process)


@pytest.mark.parametrize("field", ["density", "density_phases"])
def test_density_that_is_zero_on_a_whole_stage_is_refused(curriculum, process, field):
    table = {"name": "table", "task_mass": [0.2] * 5 + [0.0] * 3}  # nothing for tasks 5, 6, 7, the first cluster
    value = table if field == "density" else [{"start": 0.5, "density": table}]
    edited = Curriculum.model_validate(_changed(curriculum, _set(field, value)))
    with pytest.raises(InputError, match=r"zero on all of stage 1 \(tasks \[5, 6, 7\]\)"):
        edited.validate_for(process)


def test_measured_density_draws_hard_tasks_more_often_and_is_a_table_for_other_readers(ranking, process):
    measured = make_curriculum(ranking, k=3, base_density="measured:power=1,uniform_share=0.5")
    assert measured.density.name == "table"
    mass, value = np.array(measured.density.task_mass), np.array(ranking.measures["excess_nats"].value)
    assert np.allclose(mass, 0.5 / 8 + 0.5 * value / value.sum())
    assert np.allclose(task_masses(measured.base_densities(process)[0][1], measured.tasks), mass)
    assert measured.provenance["density"] == "measured:power=1,uniform_share=0.5"
    with pytest.raises(InputError, match="power and uniform_share"):
        make_curriculum(ranking, k=3, base_density="measured:exponent=1")


def test_later_base_densities_are_kept_in_the_file_and_checked(curriculum, process, tmp_path):
    half = DensityPhase(start=0.5, density=curriculum.density)
    changed = curriculum.with_clusters(curriculum.clusters, density_phases=[half.model_dump()])
    changed.save(tmp_path / "curriculum.json")
    assert Curriculum.load(tmp_path / "curriculum.json") == changed
    assert [start for start, _ in changed.base_densities(process)] == [0.0, 0.5]
    with pytest.raises(ValueError, match="one after the other"):
        curriculum.with_clusters(curriculum.clusters, density_phases=[half.model_dump()] * 2)
    wrong = half.model_dump() | {"density": {"name": "log-snr", "task_mass": curriculum.density.task_mass}}
    with pytest.raises(InputError, match="not that of density 'log-snr'"):
        curriculum.with_clusters(curriculum.clusters, density_phases=[wrong]).validate_for(process)
