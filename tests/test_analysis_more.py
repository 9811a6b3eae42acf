"""Further measures of analyze.py on planted structure, or against a slow computation of the same."""

import numpy as np
import pytest

import analyze
from tests.test_subspaces import D, orthogonal, pairs_of, sweep_case, task_of

# ---------------------------------------------------------------- components that are left out, each alone


@pytest.mark.parametrize("objects", [True, False])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_leaving_out_each_component_equals_a_full_evaluation_without_it(dtype, objects):
    probe, gallery, task = sweep_case(dtype, objects)
    slow = np.concatenate([analyze.hits_one_by_one(np.delete(probe, i, 1), np.delete(gallery, i, 1), task, [39])
                           for i in range(40)])
    assert len(np.unique(slow.sum(1))) > 3  # it matters which
    np.testing.assert_array_equal(analyze.hits_without_each(probe, gallery, task, 40), slow)
    np.testing.assert_array_equal(analyze.hits_without_each(probe, gallery, task, 7, size=3 * len(gallery)), slow[:7])


def test_a_component_of_nuisance_hurts_and_those_of_identity_are_needed():
    """Identities live in 4 directions; in task 0 the shots of a person differ most in a fifth, its first component."""
    rng, directions, people, shots = np.random.default_rng(0), orthogonal(D, 5)[0], 60, 4
    ids, embedded, tasks = np.repeat(np.arange(people), shots), {}, []
    for name, nuisance in (("face_hq*", 3.0), ("body*", 0.0)):
        parts = []
        for _ in range(2):
            x = np.repeat(rng.normal(size=(people, 4)), shots, axis=0) @ directions[:4]
            x = x + nuisance * rng.normal(size=(len(ids), 1)) * directions[4] + 0.06 * rng.normal(size=(len(ids), D))
            parts.append(analyze.unit(x).astype(np.float32))
        embedded[name], tasks = tuple(parts), [*tasks, task_of(name, ids)]
    pairs = pairs_of(analyze.transfer(embedded, tasks, 5, 50, 0, importance=10, controls=False))
    own, other = (pairs["face_hq", name]["importance"] for name in ("face_hq", "body"))
    assert own["low"][0] > 0.05 and abs(other["change"][0]) < 0.02  # the nuisance is the first task's alone
    for found in (own, other):
        assert max(found["high"][1:5]) < 0 and np.abs(found["change"][5:]).max() < 0.03
        assert all(len(found[key]) == 10 for key in ("change", "low", "high"))
    assert "importance" not in pairs_of(analyze.transfer(embedded, tasks, 5, 2, 0, controls=False))["body", "body"]


def test_importance_by_hand():
    """Without the first coordinate alone the probe's nearest is the wrong vector; without the second it stays right."""
    probe, gallery = np.array([[1.0, 0.2, 0.5]]), np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    task = analyze.Task("x", None, None, None, None, None, np.arange(2), None, [np.array([0])], [np.zeros(0, int)])
    assert analyze.hits_without_each(probe, gallery, task, 3).ravel().tolist() == [False, True, True]
