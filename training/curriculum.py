"""curriculum.json: which denoising tasks are trained, in which order, and when the next ones join.

A curriculum holds tasks (intervals of t with their boundaries as t, u, sigma and log-SNR), clusters of tasks in
training order, a base density of t, and a pacing rule. Stage n trains on the first n clusters together
(``accumulate``) or on the n-th alone; after the last stage training is on all t. Under every stage t follows the base
density restricted to the timesteps of the stage; the base density itself may change at stated shares of the budget
(``density_phases``). The file states the process by its fingerprint and is refused for any other.

Reading the file needs no code of this project; its fields are described by ``curriculum.schema.json`` beside this
module, which is generated from the models below, and in docs/curriculum-json.md.
"""

__all__ = [
    "CURRICULUM_FORMAT",
    "Cluster",
    "Curriculum",
    "DensityField",
    "DensityPhase",
    "PacingField",
    "first_reason",
    "known_process",
    "recorded_process",
    "schema",
    "tasks_of",
]

import math
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from difficulty.errors import InputError
from difficulty.process import PROCESSES, Array, Process, get_process
from difficulty.process_file import read_process
from difficulty.ranking import RankingTask
from difficulty.records import digest, read_json, write_json
from difficulty.tasks import Task, make_tasks
from training.density import density, from_task_masses, task_masses
from training.pacing import check_pacing

TASKS = 20  # without a curriculum
CURRICULUM_FORMAT: Literal["denoising-difficulty/curriculum/1"] = "denoising-difficulty/curriculum/1"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cluster(_Record):
    """Tasks that are trained together."""

    tasks: list[int] = Field(min_length=1, description="Indices into the list of tasks.")
    difficulty: float | None = Field(None, description="Mean value of the measure over the tasks, None if unmeasured.")


class PacingField(_Record):
    """The rule that ends a stage, by name, with its options."""

    rule: str = Field(description="fraction, patience, patience-smoothed, patience-kept or held-out.")
    options: dict[str, float | int | bool] = Field(default_factory=dict, description="Options of the rule.")


class DensityField(_Record):
    """Base density of t."""

    name: str = Field(description="A density by name, or 'table': the masses below, t uniform within a task.")
    task_mass: list[float] = Field(description="Probability of each task under the density; sums to 1.")


class DensityPhase(_Record):
    """A base density that replaces the one before it."""

    start: float = Field(gt=0, lt=1, description="Share of the budget at which it takes over.")
    density: DensityField


class Curriculum(_Record):
    """Content of curriculum.json."""

    format: Literal["denoising-difficulty/curriculum/1"] = CURRICULUM_FORMAT
    process: dict[str, Any] = Field(description="Fingerprint of the forward process, with the direction of t.")
    tasks: list[RankingTask] = Field(min_length=1, description="Intervals of t without gap or overlap, cleanest first.")
    clusters: list[Cluster] = Field(min_length=1, description="In training order; every task is in exactly one.")
    accumulate: bool = Field(True, description="Whether a stage keeps the clusters of the stages before it.")
    pacing: PacingField
    density: DensityField
    density_phases: list[DensityPhase] = Field(
        default_factory=list, description="Base densities of later parts of the run, in order; `density` comes first."
    )
    provenance: dict[str, Any] = Field(default_factory=dict, description="Where the order comes from.")

    @model_validator(mode="after")
    def _consistent(self) -> "Curriculum":
        T = self.process.get("T")
        if not isinstance(T, int) or isinstance(T, bool) or T < 2:
            raise ValueError("the process fingerprint must state T, a whole number of at least 2")
        t = self.process.get("t")
        if not (isinstance(t, list) and t and all(isinstance(point, int) and 1 <= point <= T for point in t)):
            raise ValueError("the process fingerprint must state t, the timesteps in 1..T of its alpha and sigma")
        expected = 1
        for index, task in enumerate(self.tasks):
            if task.index != index:
                raise ValueError(f"task number {index} has index {task.index}; tasks are numbered from 0")
            if task.t_first < expected:
                raise ValueError(f"task {index} overlaps the one before it at t = {task.t_first}")
            if task.t_first > expected:
                raise ValueError(f"t = {expected}..{task.t_first - 1} belongs to no task and would never be trained")
            if task.t_last < task.t_first:
                raise ValueError(f"task {index} ends (t = {task.t_last}) before it begins (t = {task.t_first})")
            expected = task.t_last + 1
        if expected != T + 1:
            raise ValueError(f"the tasks end at t = {expected - 1}, but the process has T = {T}")
        held = [task for cluster in self.clusters for task in cluster.tasks]
        unknown = sorted(set(held) - set(range(len(self.tasks))))
        if unknown:
            raise ValueError(f"a cluster names task {unknown[0]}, which does not exist")
        if len(set(held)) != len(held):
            raise ValueError("a task is in more than one cluster")
        if len(held) != len(self.tasks):
            missing = sorted(set(range(len(self.tasks))) - set(held))
            raise ValueError(f"task {missing[0]} is in no cluster and would never be trained before the last stage")
        for field in self._densities:
            mass = field.task_mass
            if len(mass) != len(self.tasks) or min(mass) < 0 or abs(sum(mass) - 1) > 1e-6:
                raise ValueError("density.task_mass must hold one non-negative number per task with sum 1")
        starts = [phase.start for phase in self.density_phases]
        if sorted(set(starts)) != starts:
            raise ValueError(f"density_phases must start one after the other, got starts {starts}")
        check_pacing(self.pacing.rule, self.pacing.options)
        return self

    @classmethod
    def load(cls, path: Path | str) -> "Curriculum":
        """Read curriculum.json.

        Raises:
            InputError: if it is missing, foreign, truncated, of another version or inconsistent.
        """
        return cls.parse(read_json(Path(path)), str(path))

    @classmethod
    def parse(cls, content: Any, source: str = "the mapping given") -> "Curriculum":
        """Make a curriculum of the content of a curriculum.json.

        Args:
            content: of the file.
            source: what it is called in errors.

        Raises:
            InputError: if it is foreign, of another version or inconsistent.
        """
        found = content.get("format") if isinstance(content, Mapping) else None
        if found != CURRICULUM_FORMAT:
            what = f"has format {found!r}" if found else "states no format"
            raise InputError(f"{source} {what}; this version reads {CURRICULUM_FORMAT!r}")
        try:
            return cls.model_validate(content, strict=True)
        except ValidationError as error:
            raise InputError(f"{source} is not a valid curriculum: {first_reason(error)}") from None

    def save(self, path: Path | str) -> None:
        """Write curriculum.json atomically."""
        write_json(Path(path), self.model_dump())

    @property
    def _densities(self) -> list[DensityField]:
        return [self.density, *(phase.density for phase in self.density_phases)]

    @property
    def sha256(self) -> str:
        """Hash of the content, independent of the file's layout."""
        return digest(self.model_dump())

    def validate_for(self, process: Process, source: str = "the curriculum") -> None:
        """Refuse to be used with another process, and check what the file says about its tasks.

        Raises:
            InputError: if T, the direction of t, the noise levels, a boundary of a task in u, sigma or log-SNR, or the
                density's masses differ, or a density is zero on a whole stage.
        """
        process.check_fingerprint(self.process, source)
        for task in self.tasks:
            high, low = (float(process.log_snr(t)) for t in (task.t_first, task.t_last))
            true = RankingTask.of(Task(task.index, task.t_first, task.t_last, high, low), process).model_dump()
            for name, stated in task.model_dump().items():
                if not _agree(stated, true[name], 1e-3 if name.startswith("log_snr") else 0.0):
                    raise InputError(
                        f"{source}: task {task.index} holds t = {task.t_first}..{task.t_last}, where {name} is "
                        f"{true[name]}, but it says {stated}; change a boundary on every axis or on none"
                    )
        for field in self._densities:
            if field.name != "table":
                mass = task_masses(density(field.name, process), self.tasks)
                if not np.allclose(mass, field.task_mass, atol=1e-6):
                    raise InputError(
                        f"{source}: density.task_mass is not that of density {field.name!r}; "
                        "name the density 'table' to use the masses as they stand"
                    )
        for _, base in self.base_densities(process):
            self.refuse_empty_stages(base, source)

    def refuse_empty_stages(self, base: Array, source: str = "the curriculum") -> None:
        """Raise InputError if a base density p[t], shape (T+1,), is zero on a whole stage."""
        mass = task_masses(base, self.tasks)
        for number, tasks in enumerate(self.stages(), 1):
            if not mass[tasks].sum() > 0:
                where = f"on all of stage {number} (tasks {tasks})"
                raise InputError(f"{source}: the base density is zero {where}; it would train nothing")

    def base_densities(self, process: Process) -> list[tuple[float, Array]]:
        """Share of the budget from which each base density holds, the first being 0, and p[t] of shape (T+1,)."""
        starts = [0.0, *(phase.start for phase in self.density_phases)]
        tables = [
            from_task_masses(field.task_mass, self.tasks) if field.name == "table" else density(field.name, process)
            for field in self._densities
        ]
        return list(zip(starts, tables, strict=True))

    def stages(self) -> list[list[int]]:
        """Tasks of every stage in turn; the last stage holds all of them."""
        held = [cluster.tasks for cluster in self.clusters]
        if self.accumulate:
            return [sorted(chain(*held[: n + 1])) for n in range(len(held))]
        every = list(range(len(self.tasks)))
        return [sorted(tasks) for tasks in held] + ([every] if len(held) > 1 else [])

    def with_clusters(self, clusters: list[Cluster], **changes: Any) -> "Curriculum":
        """The same curriculum with other clusters (or another order of them) and other top-level fields."""
        content = self.model_dump() | {"clusters": [cluster.model_dump() for cluster in clusters]} | changes
        return Curriculum.model_validate(content)


def schema() -> dict[str, Any]:
    """The JSON schema of curriculum.json, as shipped in ``curriculum.schema.json``.

    ``python -c "import json; from training.curriculum import schema; print(json.dumps(schema(), indent=2))"`` writes
    it anew after a change of the models.
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Curriculum.model_json_schema()}


def tasks_of(curriculum: Curriculum | None, process: Process) -> list[RankingTask]:
    """The tasks of the curriculum, or without one twenty of equal width in t, or as many as there are timesteps."""
    if curriculum:
        return curriculum.tasks
    return [RankingTask.of(task, process) for task in make_tasks(process, min(TASKS, process.noisiest))]


def _agree(stated: float | None, true: float | None, absolute: float) -> bool:
    """Whether a boundary is the true one up to what is lost by writing four digits; log-SNR may be 0."""
    if stated is None or true is None:
        return stated is true
    return math.isclose(stated, true, rel_tol=1e-3, abs_tol=absolute)


def known_process(fingerprint: dict[str, Any], source: str) -> Process:
    """The process that a fingerprint names.

    Raises:
        InputError: if the name is none of the project's or stands for other noise levels; then it must be given.
    """
    name = str(fingerprint.get("name"))
    if name not in PROCESSES:
        raise InputError(f"{source} was made for process {name!r}, which is not built in; give the process itself")
    process = get_process(f"{name}:T={fingerprint.get('T')}")
    process.check_fingerprint(fingerprint, source)
    return process


def recorded_process(folder: Path, fingerprint: dict[str, Any], source: str) -> Process:
    """The process of a results folder: built in if its noise levels are those of its name, else from process.csv there.

    Raises:
        InputError: if it is neither.
    """
    try:
        return known_process(fingerprint, source)
    except InputError:
        if not (folder / "process.csv").exists():
            raise
        return read_process(folder, fingerprint)


def first_reason(error: ValidationError) -> str:
    """The first thing that is wrong, with the field it is in."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    reason = first["msg"].removeprefix("Value error, ")
    return f"{where}: {reason}" if where else reason
