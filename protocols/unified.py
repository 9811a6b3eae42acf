"""All domains at once: probes of every domain against one gallery of them all.

Copy with it: protocols/bootstrap.py, protocols/search.py, data_prep/__init__.py, data_prep/format.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from data_prep import DOMAINS, say_once
from data_prep.format import ROLES, Split, ordered_tests
from protocols.bootstrap import Estimate, bootstrap_counts, intervals, weighted_mean
from protocols.search import mates_in, name_identities, origin_of, search_gallery


def choose_crowd(splits: list[Split]) -> list[Split]:
    """One test split per domain; none with fewer than two domains."""
    crowd = [first for domain in DOMAINS for first in ordered_tests(s for s in splits if s.domain == domain)[:1]]
    return crowd if len(crowd) > 1 else []


@dataclass(eq=False)
class Member:
    """The part of one domain in the unified gallery."""

    split: Split
    x: np.ndarray  # unit embeddings [M, D]; NaN where unreadable
    who: np.ndarray  # int64 [M]: identity over all domains, -1 unknown
    probes: np.ndarray  # rows
    gallery: np.ndarray  # rows
    picture: np.ndarray  # int64 [M]: number shared by an image and its degraded copy; -1: no copies

    def mates(self, other: "Member", gallery: np.ndarray) -> Callable:
        """`mates` of `search_gallery` for this domain's probes in these rows of `other`, which may be itself."""
        same = mates_in(other.who[gallery])
        cameras, template = self.split.optional("camera"), self.split.optional("template")

        def mates(probe: int) -> tuple[np.ndarray, np.ndarray]:
            places = same(self.who[probe])
            rows = gallery[places]
            ignored = (other.picture[rows] == self.picture[probe]) & (self.picture[probe] >= 0)
            if other is self:
                ignored |= (rows == probe) | ((template[rows] == template[probe]) & (template[probe] >= 0))
                if self.split.protocol["name"] == "reid":
                    ignored |= cameras[rows] == cameras[probe]
            return places[~ignored], places[ignored]

        return mates

    def has_mates(self) -> bool:
        """Whether any of its probes can be found in its own gallery."""
        mates = self.mates(self, self.gallery[np.isfinite(self.x[self.gallery, 0])])
        return any(len(mates(probe)[0]) for probe in self.probes)


def number_pictures(splits: list[Split]) -> list[np.ndarray]:
    """For each split numbers [M], shared by an image and its copy in another split; -1 without copies."""
    plans, numbers, numbered = [origin_of(split)[1] for split in splits], {}, []
    for split, plan in zip(splits, plans, strict=True):
        keys = []
        if plans.count(plan) > 1:
            original = split.index["provenance"]["plan"] == plan
            keys = [split.jpeg(row)[0] if original else str(split.fields(row).get("degradation", {}).get("from"))
                    .rpartition("/")[2] for row in range(len(split))]
        numbered.append(np.array([numbers.setdefault((plan, key), len(numbers)) for key in keys] or [-1] * len(split)))
    return numbered


def make_members(splits: list[Split], embeddings: list[np.ndarray], limit: int, seed: int) -> list[Member]:
    """Probes and gallery of each domain by its roles; without roles every image is both (and never its own mate).

    Domains without a probe that has a mate are left out; none if fewer than two remain.
    """
    # equal classes of two domains are one person only if one split was made from the other
    names = [name_identities(split, space=origin_of(split)[1]) for split in splits]
    people, members = np.unique(np.concatenate(names)), []
    for split, x, name, picture in zip(splits, embeddings, names, number_pictures(splits), strict=True):
        who, roles = np.where(name == "", -1, np.searchsorted(people, name)), split.optional("role")
        listed = np.isfinite(x[:, 0]) | split.missing
        probes = np.flatnonzero(listed & (roles <= ROLES.index("probe")) & (who >= 0))
        rng = np.random.default_rng((seed, DOMAINS.index(split.domain)))
        probes = np.sort(rng.permutation(probes)[:limit])
        gallery = np.flatnonzero(listed & (roles != ROLES.index("probe")))
        members.append(Member(split, x, who, probes, gallery, picture))
    kept = [member for member in members if member.has_mates()]
    for split in [member.split for member in members if member not in kept]:
        say_once(f"  everything: without {split.domain}/{split.name}: no probe has a mate that counts")
    return kept if len(kept) > 1 else []


def score_unified(members: list[Member], draws: int, seed: int,
                  device: torch.device | str = "cpu") -> dict[str, dict[str, Estimate]]:
    """Probes of every domain against the galleries of all domains together; ties count against the probe.

    The same person in another domain is a hit, but a copy of the probe's picture (`data_prep degrade`) is ignored.
    Listed images that could not be read are misses, as probes and as mates. By domain, over probes with a mate in their
    own gallery: rank-1 alone and in the crowd, and the share whose nearest vector is of each domain; "rank-1 in D":
    over probes with a mate in D, against D's gallery. Under "all": the average and the worst of the domains.
    """
    # people are resampled once for all domains: who is in two of them is drawn in both or in neither
    who = np.concatenate([member.who[member.probes] for member in members])
    hits: dict[tuple[str, str], tuple[np.ndarray, np.ndarray]] = {}  # places in `who` of scored probes, their values
    domains, start = [member.split.domain for member in members], 0
    for i, (domain, member) in enumerate(zip(domains, members, strict=True)):
        searches = [search_gallery(member.x, member.probes, other.gallery, member.mates(other, other.gallery),
                                   other=other.x, device=device) for other in members]
        best_mate, best_other = (np.array([getattr(one, name) for one in searches]) for name in ("correct", "wrong"))
        counted, first = np.array([[len(r) > 0 for r in one.ranks] for one in searches]), best_mate > best_other
        nearest = np.where(np.isfinite(member.x[member.probes, 0]), np.maximum(best_mate, best_other).argmax(0), -1)
        scored = {"rank-1 alone": (counted[i], first[i]),
                  "rank-1 in the crowd": (counted[i], best_mate.max(0) > best_other.max(0))}
        for j, other in enumerate(domains):
            scored[f"nearest is {other}"] = counted[i], nearest == j
            if j != i and counted[j].any():
                scored[f"rank-1 in {other}"] = counted[j], first[j]
        for name, (of, hit) in scored.items():
            hits[domain, name] = start + np.flatnonzero(of), hit[of].astype(float)
        start += len(member.probes)

    def statistic(weights: np.ndarray | None) -> dict[tuple[str, str], float]:
        values = {key: weighted_mean(hit, None if weights is None else weights[place])
                  for key, (place, hit) in hits.items()}
        for name in ("rank-1 alone", "rank-1 in the crowd"):
            tasks = [values[domain, name] for domain in domains]
            values["all", f"average {name}"] = float(np.mean(tasks))
            values["all", f"worst {name}"] = float(np.min(tasks))
        return values

    figures: dict = {}
    for (domain, metric), figure in intervals(statistic, bootstrap_counts(who, draws, seed)).items():
        place = hits[domain, metric][0] if domain != "all" else np.arange(len(who))
        figure.count, figure.identities = len(place), len(np.unique(who[place]))
        figures.setdefault(domain, {})[metric] = figure
    return figures
