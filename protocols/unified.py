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
from protocols.search import Search, mates_in, name_identities, origin_of, search_gallery

MISS = -2.0  # below every cosine


def choose_crowd(splits: list[Split]) -> list[Split]:
    """One test split per domain; none with fewer than two domains."""
    chosen = [ordered_tests([split for split in splits if split.domain == domain])[:1] for domain in DOMAINS]
    crowd = [split for splits_of_domain in chosen for split in splits_of_domain]
    return crowd if len(crowd) > 1 else []


@dataclass(eq=False)
class Member:
    """The part of one domain in the unified gallery."""

    split: Split
    x: np.ndarray  # unit embeddings [M, D]
    who: np.ndarray  # int64 [M]: identity over all domains, -1 unknown
    probes: np.ndarray  # rows
    gallery: np.ndarray  # rows
    picture: np.ndarray  # int64 [M]: number shared by an image and its degraded copy; -1: no copies
    unread: np.ndarray  # further rows of the gallery: listed images that could not be read

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
        """Whether any of its probes can be scored in its own gallery."""
        mates = self.mates(self, self.gallery)
        return any(len(mates(probe)[0]) for probe in self.probes)

    def search(self, other: "Member", device: torch.device | str) -> Search:
        """Search the gallery of `other`; a probe that is unreadable, or all of whose mates are, misses."""
        search = search_gallery(self.x, self.probes, other.gallery, self.mates(other, other.gallery), other=other.x,
                                device=device)
        lost = ~np.isfinite(self.x[self.probes, 0])
        search.wrong[lost], search.correct[lost] = MISS, -np.inf
        if lost.any() or len(other.unread):
            mates = self.mates(other, np.append(other.gallery, other.unread))
            for i in np.flatnonzero(~np.isfinite(search.correct)):
                if len(mates(self.probes[i])[0]):
                    search.correct[i], search.wrong[i] = MISS, max(search.wrong[i], MISS)
        return search


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
        who = np.where(name == "", -1, np.searchsorted(people, name))
        good, roles, missing = np.isfinite(x[:, 0]), split.optional("role"), split.missing
        probes = np.flatnonzero((good | missing) & (roles <= ROLES.index("probe")) & (who >= 0))
        rng = np.random.default_rng((seed, DOMAINS.index(split.domain)))
        probes = np.sort(rng.permutation(probes)[:limit])
        gallery = roles != ROLES.index("probe")
        members.append(Member(split, x, who, probes, np.flatnonzero(good & gallery), picture,
                              np.flatnonzero(missing & gallery)))
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
    searches = [[a.search(b, device) for b in members] for a in members]
    hits: dict[tuple[str, str], tuple[int, np.ndarray, np.ndarray]] = {}  # member, its scored probes, their values
    domains = [member.split.domain for member in members]
    for i, (row, domain, member) in enumerate(zip(searches, domains, members, strict=True)):
        best_mate, best_other = (np.array([getattr(search, name) for search in row]) for name in ("correct", "wrong"))
        counted = np.isfinite(best_mate[i])
        hits[domain, "rank-1 alone"] = (i, counted, best_mate[i] > best_other[i])
        hits[domain, "rank-1 in the crowd"] = (i, counted, best_mate.max(0) > best_other.max(0))
        nearest = np.where(np.isfinite(member.x[member.probes, 0]), np.maximum(best_mate, best_other).argmax(0), -1)
        for j, other in enumerate(domains):
            hits[domain, f"nearest is {other}"] = (i, counted, nearest == j)
            if j != i and np.isfinite(best_mate[j]).any():
                hits[domain, f"rank-1 in {other}"] = (i, np.isfinite(best_mate[j]), best_mate[j] > best_other[j])
    ends = np.cumsum([len(member.probes) for member in members])[:-1]

    def statistic(weights: np.ndarray | None) -> dict[tuple[str, str], float]:
        parts = [None] * len(members) if weights is None else np.split(weights, ends)
        values = {key: weighted_mean(hit[counted].astype(float), None if parts[i] is None else parts[i][counted])
                  for key, (i, counted, hit) in hits.items()}
        for name in ("rank-1 alone", "rank-1 in the crowd"):
            tasks = [values[domain, name] for domain in domains]
            values["all", f"average {name}"] = float(np.mean(tasks))
            values["all", f"worst {name}"] = float(np.min(tasks))
        return values

    # people are resampled once for all domains: who is in two of them is drawn in both or in neither
    who = np.concatenate([member.who[member.probes] for member in members])
    figures: dict = {}
    for (domain, metric), figure in intervals(statistic, bootstrap_counts(who, draws, seed)).items():
        if domain == "all":
            figure.count, figure.identities = len(who), len(np.unique(who))
        else:
            i, counted, _ = hits[domain, metric]
            figure.count = int(counted.sum())
            figure.identities = len(np.unique(members[i].who[members[i].probes][counted]))
        figures.setdefault(domain, {})[metric] = figure
    return figures
