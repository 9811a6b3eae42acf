"""The unified gallery of all domains: against a literal transcription, by hand, and who is one person in it."""

from functools import partial

import numpy as np
import pytest

from data_prep.degrade import degrade_between, degraded_split
from data_prep.format import Split, open_root
from data_prep.write import write_split
from protocols.bootstrap import Estimate
from protocols.search import name_identities
from protocols.unified import Member, choose_crowd, make_members, score_unified
from reports.rows import make_unified_rows
from tests.test_evaluate import FakeSplit, unit
from tests.test_evaluate_inputs import copy_of


class FakeMember(Member):
    """A domain of the unified gallery, from arrays."""

    def __init__(self, domain, x, who, roles=None, cameras=None, protocol="reid"):
        split = FakeSplit(np.maximum(who, 0), {"name": protocol}, **({} if cameras is None else {"camera": cameras}))
        split.domain = domain
        rows = np.arange(len(x))
        super().__init__(split, x, who, rows if roles is None else np.flatnonzero(roles == 0),
                         rows if roles is None else np.flatnonzero(roles > 0), np.full(len(x), -1))


def literal_unified(members):
    """One probe after the other against one list of everything; a value per figure."""
    sums: dict = {}
    for me in members:
        for probe in me.probes:
            entries = []  # score, domain, right
            for you in members:
                for row in you.gallery:
                    mine = me.who[probe] == you.who[row]
                    camera = me.split.optional("camera")
                    if me is you and (row == probe or (mine and me.split.protocol["name"] == "reid"
                                                       and camera[row] == camera[probe])):
                        continue
                    entries.append((float(me.x[probe] @ you.x[row]), you.split.domain, mine))
            own = [e for e in entries if e[1] == me.split.domain]
            name = me.split.domain
            for other in {e[1] for e in entries} - {name}:
                there = [e for e in entries if e[1] == other]
                if any(e[2] for e in there):
                    sums.setdefault((name, f"rank-1 in {other}"), []).append(max(there)[2])
            if any(e[2] for e in own):
                sums.setdefault((name, "rank-1 alone"), []).append(max(own)[2])
                sums.setdefault((name, "rank-1 in the crowd"), []).append(max(entries)[2])
                for other in (m.split.domain for m in members):
                    sums.setdefault((name, f"nearest is {other}"), []).append(max(entries)[1] == other)
    return {key: np.mean(values) for key, values in sums.items()}


@pytest.mark.parametrize("seed", range(3))
def test_unified_gallery_equals_a_literal_transcription(seed):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(30, 6))

    def vectors(who):
        return unit(centres[who] + 0.9 * rng.normal(size=(len(who), 6)))

    object_, hq, lq, body = (rng.integers(a, b, 60) for a, b in ((20, 30), (0, 12), (0, 12), (4, 16)))
    roles, cameras = (rng.random(60) < 0.6).astype(int), rng.integers(0, 3, 60)
    members = [FakeMember("object", vectors(object_), object_, protocol="classification"),
               FakeMember("face_hq", vectors(hq), hq, protocol="verification"),
               FakeMember("face_lq", vectors(lq), lq, roles, protocol="identification"),
               FakeMember("body", vectors(body), body, roles, cameras)]
    found = score_unified(members, 10, 0)
    values = {(domain, metric): f.value for domain, by in found.items() for metric, f in by.items()}
    expected = literal_unified(members)
    assert {key: v for key, v in values.items() if key[0] != "all"} == pytest.approx(expected)
    tasks = [expected[d, "rank-1 in the crowd"] for d in ("object", "face_hq", "face_lq", "body")]
    assert values["all", "average rank-1 in the crowd"] == pytest.approx(np.mean(tasks))
    assert values["all", "worst rank-1 in the crowd"] == pytest.approx(min(tasks))
    assert ("object", "rank-1 in body") not in values  # nobody is both: absent, not 0


def test_unified_gallery_by_hand():
    # person 0's blurred face at 0 degrees: nearest of its own domain is person 1 at 20 (wrong), its mate at 40; nearest
    # of all is person 0's sharp face at 10 (right, in another domain): a miss alone, a hit in the crowd. Person 1's
    # blurred probe at 25 has its mate at 20 as nearest anywhere.
    def at(*degrees):
        return np.stack([np.cos(np.radians(degrees)), np.sin(np.radians(degrees))], 1)

    lq = FakeMember("face_lq", at(0, 40, 20, 25), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 0]),
                    protocol="identification")
    hq = FakeMember("face_hq", at(10, 80, 10, 80), np.array([0, 1, 0, 1]), np.array([1, 1, 0, 0]),
                    protocol="identification")
    found = {d: {m: f.value for m, f in by.items()} for d, by in score_unified([hq, lq], 5, 0).items()}
    assert found["face_lq"] == {"rank-1 alone": 0.5, "rank-1 in the crowd": 1.0, "nearest is face_hq": 0.5,
                                "nearest is face_lq": 0.5, "rank-1 in face_hq": 0.5}  # 25 is nearer to 10 than to 80
    assert found["face_hq"]["rank-1 alone"] == 1 and found["face_hq"]["rank-1 in face_lq"] == 0
    assert found["all"]["worst rank-1 alone"] == 0.5 and found["all"]["average rank-1 alone"] == 0.75

    # person 0's blurred mate cannot be read: its probe misses alone, and finds the sharp face at 10 in the crowd
    lq.gallery, lq.x[1] = np.array([1, 2]), np.nan
    found = {m: f for m, f in score_unified([hq, lq], 5, 0)["face_lq"].items()}
    assert found["rank-1 alone"].value == 0.5 and found["rank-1 alone"].count == 2
    assert found["rank-1 in the crowd"].value == 1


def test_people_are_joined_across_domains_by_what_the_source_proves(demo_root):
    splits = choose_crowd([split for by_name in open_root(demo_root).values() for split in by_name.values()
                           if split.protocol])
    assert [(s.domain, s.name) for s in splits] == [("object", "val"), ("face_hq", "test"), ("face_lq", "test"),
                                                    ("body", "test")]
    things, sharp, blurred, bodies = (set(name_identities(split)) for split in splits)
    assert sharp == blurred == bodies and len(sharp) == 8 and all(name.startswith("person demo-") for name in sharp)
    assert not things & sharp and all(name.startswith("object/") for name in things)
    rng = np.random.default_rng(0)
    members = make_members(splits, [rng.normal(size=(len(s), 4)) for s in splits], 20, 0)
    assert [len(m.probes) for m in members] == [20, 20, 20, 20] and len(members[1].gallery) == 64
    assert (members[3].split.column("role")[members[3].probes] == 0).all()


def degraded_copy(split: Split, folder) -> Split:
    source = degraded_split(split, partial(degrade_between, 0.0, 0.0), 0)
    write_split(folder, source, source_name="degrade", size=split.size, fit="squash",
                quality=95, train=False, options={"src": f"{split.domain}/{split.name}",
                                                  "src_plan": split.index["provenance"]["plan"]})
    return Split(folder)


def test_degraded_copies_show_the_same_people_and_the_probes_picture_is_no_hit(demo_root, tmp_path):
    """By the numbers: each image's copy is nearest to it, the person's other picture next, a stranger far away."""
    base, body = Split(demo_root / "face_hq/test"), Split(demo_root / "body/test")
    rows = [np.flatnonzero(base.labels == label)[:2] for label in range(4)]
    protocol = {"name": "verification", "folds": 1}
    sharp = copy_of(base, tmp_path / "face_hq/test", np.concatenate(rows).tolist(), protocol)  # no `person`
    lq = degraded_copy(sharp, tmp_path / "face_lq/test")
    assert name_identities(lq).tolist() == name_identities(sharp).tolist() and "person" not in lq.fields(0)
    who, angle = np.repeat(np.arange(4), 2), 0.1 * np.tile([0, 1], 4)
    x = np.zeros((8, 8))
    x[np.arange(8), 2 * who], x[np.arange(8), 2 * who + 1] = np.cos(angle), np.sin(angle)
    strangers = unit(np.random.default_rng(0).normal(size=(len(body), 8)))
    members = make_members([sharp, lq, body], [x, x.copy(), strangers], 100, 0)
    found = {domain: {m: f.value for m, f in by.items()} for domain, by in score_unified(members, 2, 0).items()}
    for domain, other in (("face_hq", "face_lq"), ("face_lq", "face_hq")):
        assert found[domain]["rank-1 in the crowd"] == found[domain]["rank-1 alone"] == 1  # a copy is no stranger ...
        assert found[domain][f"rank-1 in {other}"] == 1
    x[1::2] = -x[1::2]  # the person's other picture is far: nothing but the copy would be a hit
    members = make_members([sharp, lq, body], [x, x.copy(), strangers], 100, 0)
    found = score_unified(members, 2, 0)
    assert found["face_hq"]["rank-1 in the crowd"].value == 0  # ... and no hit either
    other = copy_of(base, tmp_path / "face_hq/other", np.concatenate(rows).tolist()[::-1], protocol)
    assert not set(make_members([other, lq], [x, x], 9, 0)[0].who) & set(make_members([other, lq], [x, x], 9, 0)[1].who)


def test_the_unified_gallery_names_its_splits(demo_root):
    root = open_root(demo_root)
    crowd = [root["object"]["val"], root["face_hq"]["test"]]
    figures = {"tuned": {"all": {"x": Estimate(0.5, np.zeros(2), 3, np.nan, 30)}}}
    (row, _), = make_unified_rows("r", crowd, figures, True, 10, 0)
    assert "sets object/val demo " in row.protocol and " + face_hq/test demo " in row.protocol and row.identities == 30
