"""The versions of a prerequisite, which the seeds take in turn, in tables and charts."""

from collections.abc import Mapping

from vlm_jax.study.planning import Plan
from vlm_jax.study.run.folder import as_json, diff

FIRST = "first version"


def version_names(plan: Plan) -> dict[str, list[str]]:
    """Returns each prerequisite with several versions -> what changes in each."""
    names = {}
    for name, versions in plan.prerequisites.items():
        first, *others = [as_json(version) for version in versions]
        if others:
            names[name] = [FIRST, *("; ".join(diff(first, other)) for other in others)]
    return names


def by_version(count: int, by_seed: Mapping[int, float]) -> list[list[float]]:
    """Returns the values of the seeds of each of `count` versions."""
    return [[x for seed, x in by_seed.items() if seed % count == i] for i in range(count)]


def seed_groups(plan: Plan, by_seed: Mapping[int, float]) -> dict[str, list[float]]:
    """Returns label -> values of the seeds, by version of the first prerequisite with several.

    Without one, all seeds have the label "".
    """
    for name, versions in version_names(plan).items():
        groups = by_version(len(versions), by_seed)
        return {f"{name}: {version}": group for version, group in zip(versions, groups)}
    return {"": list(by_seed.values())}
