"""The data of an analysis: probes and galleries of each task, and the images that components are fitted on.

Copy with it: data_prep/, kernels/gather.py, kernels/gather_triton.py, models/, protocols/.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_prep import DOMAINS, InputError
from data_prep.degrade import degrade
from data_prep.format import ROLES, Split, named_splits, ordered_tests
from protocols.bootstrap import normalise
from protocols.classify import class_means
from protocols.embed import Embedder
from protocols.search import mates_in, name_identities

ROWS = 1 << 16  # vectors handled at once


@dataclass
class Task:
    """The part of one domain: rows to fit on, and a test on other identities.

    A projection is scored by the share of probes whose nearest gallery vector is a mate. Gallery vectors are single
    images for people and class means for objects.
    """

    domain: str
    split: Split  # the test split
    train: Split
    fit: np.ndarray  # rows of the training split, identities disjoint from the tested ones
    probe: np.ndarray  # rows of the test split, [n]
    gallery: np.ndarray  # rows of the test split (people) or of the training split (objects)
    group: np.ndarray  # [gallery] which of the m gallery vectors a row is averaged into; all different for people
    target: np.ndarray  # [n] identity of each probe
    mates: list[np.ndarray]  # [n] gallery vectors that are right, at least one
    ignored: list[np.ndarray]  # [n] gallery vectors that do not count: the probe itself, its identity under its camera

    def chance(self) -> float:
        """Expected share of hits of a random nearest vector."""
        many = self.group.max() + 1
        return float(np.mean([len(right) / (many - len(out))
                              for right, out in zip(self.mates, self.ignored, strict=True)]))


def choose_pairs(root: dict[str, dict[str, Split]], domains: list[str], names: str | None, where: str,
                 degrade: str | None = None, seed: int = 0) -> tuple[dict[str, tuple[Split, Split]], dict[str, str]]:
    """Training and test split of each domain of a run; and why other domains are left out.

    A domain that --splits (`names`) does not name is tested on the first of `ordered_tests`. `degrade`: of the run,
    whose network never saw face_lq/train as it is stored.
    """
    chosen: dict[str, Split] = {}
    for split in named_splits(root, names, where) if names else []:
        if split.domain not in domains:
            raise InputError(f"--splits: {split.domain}/{split.name}: the run has no {split.domain}; it has "
                             f"{', '.join(domains)}")
        if split.domain in chosen:
            raise InputError(f"--splits: two of {split.domain}: one test split of a domain is analysed")
        chosen[split.domain] = split
    pairs, left_out = {}, {}
    for domain in domains:
        splits = root.get(domain, {})
        test = chosen.get(domain) or next(iter(ordered_tests(splits.values())), None)
        if "train" in splits and test:
            pairs[domain] = splits["train"], test
            if degrade and domain == "face_lq":
                pairs[domain] = Degraded(splits["train"].folder, float(degrade.partition("@")[0]), seed), test
            rest = ", ".join(s.name for s in splits.values() if s.protocol and s.folder != test.folder)
            print(f"  {domain}: tested on {test.name}" + f", not on {rest} (--splits chooses)" * bool(rest))
        else:
            left_out[domain] = "no test split in distribution" if "train" in splits else "no training split"
    if not pairs:
        raise InputError(f"{where}: none of {', '.join(domains)} has both a training and a test split: nothing to "
                         "analyse")
    return pairs, left_out


class Degraded(Split):
    """A training split as `train.py --degrade` shows it: each image degraded by up to `severity`, each time alike."""

    def __init__(self, folder: Path, severity: float, seed: int) -> None:
        super().__init__(folder)
        self.severity, self.seed = severity, seed
        self.name += f"-degraded{100 * severity:g}-{seed}"  # its embeddings have a file of their own

    def __reduce__(self):
        return Degraded, (self.folder, self.severity, self.seed)

    def image(self, row: int) -> torch.Tensor:
        rng = np.random.default_rng((self.seed, DOMAINS.index(self.domain), row))
        return degrade(super().image(row), self.severity * rng.random(), rng)[0]


def make_task(base: Split, test: Split, readable: tuple[np.ndarray, np.ndarray], limit: int, seed: int) -> Task | str:
    """The task of a domain, or why there is none.

    Classes that are in both splits (objects) are divided: every second one is fitted on, the others are tested.
    Its rows to fit on still contain identities that other tasks test: see `drop_tested`.
    `readable`: bool, rows of the training and of the test split that may be used; `limit`: most probes, drawn at
    random. InputError if only one identity can be tested.
    """
    domain, rng = base.domain, np.random.default_rng((seed, DOMAINS.index(base.domain)))
    shared = sorted(set(test.classes) & set(base.classes))
    for_fit, for_test = set(shared[::2]), set(shared[1::2])
    tested = np.array([name not in for_fit for name in test.classes])
    fitted = np.array([name not in for_test for name in base.classes])
    fit = np.flatnonzero(fitted[base.labels] & readable[0])
    rows = np.flatnonzero(np.where(test.labels >= 0, tested[test.labels], True) & readable[1])

    if domain == "object":
        place = {name: i for i, name in enumerate(base.classes)}
        label = np.array([place.get(name, -1) for name in test.classes])[test.labels]
        probe = rng.permutation(rows[label[rows] >= 0])[:limit]
        target, classes = label[probe], np.unique(label[probe])
        gallery = np.flatnonzero(np.isin(base.labels, classes) & readable[0])
        group = np.searchsorted(classes, base.labels[gallery])
        if len(shared) < 2:
            return (f"{'one class' if shared else 'no class'} of {test.name} is in {base.name}, want at least 2: "
                    "--splits names another split")
        if len(fit) < 2 or not len(classes) or len(np.unique(group)) < len(classes):
            return "too few readable images of its classes"
        mates = list(np.searchsorted(classes, target)[:, None])
        ignored = [mates[0][:0]] * len(probe)
    else:
        roles, cameras, labels = test.optional("role"), test.optional("camera"), np.array(test.labels)
        gallery = rows[roles[rows] != ROLES.index("probe")]
        group = np.arange(len(gallery))
        probe = rows[roles[rows] <= ROLES.index("probe")]  # without roles every image is a probe and in the gallery
        probe = rng.permutation(probe[labels[probe] >= 0])[:limit]
        same, kept, mates, ignored = mates_in(labels[gallery]), [], [], []
        for row in probe:
            places = same(labels[row])
            out = gallery[places] == row
            if test.protocol["name"] == "reid":
                out |= cameras[gallery[places]] == cameras[row]
            if not out.all():
                kept.append(row)
                mates.append(places[~out])
                ignored.append(places[out])
        if len(fit) < 2:
            return f"fewer than 2 images of {base.name} to fit on"
        if not kept:
            return f"no probe of {test.name} has a mate in its gallery that counts"
        probe = np.array(kept)
        target = labels[probe]
    if len(np.unique(target)) < 2:  # intervals resample identities: with a single one they have no width
        raise InputError(f"{test.folder}: only one identity can be tested, want at least 2: name another split of "
                         f"{domain} with --splits")
    return Task(domain, test, base, fit, probe, gallery, group, target, mates, ignored)


def drop_tested(tasks: list[Task], most: int, seed: int) -> None:
    """Drop from each task's rows to fit on every identity that ANY task tests: people may be in several.

    At most `most` drawn rows of a task are checked: more would not be used, and each is read.
    """
    tested = set()
    for task in tasks:
        rows = task.probe if task.domain == "object" else np.union1d(task.probe, task.gallery)
        tested.update(name_identities(task.split, rows).tolist())
    known = np.array(sorted(tested - {""}))
    for task in tasks:
        rows = np.sort(np.random.default_rng((seed, DOMAINS.index(task.domain))).permutation(task.fit)[:most])
        task.fit = rows[~np.isin(name_identities(task.train, rows), known)]


def vectors_of(task: Task, embedded: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Probe vectors [n, D] and gallery vectors [m, D] of a task, from the unit embeddings of its two splits.

    An object class is the mean of its unit embeddings in the full space, as in `class_means`, and is centred and
    projected like an image, so that one sweep serves people and objects. (Normalising the images in each subspace would
    give those most weight of which it holds least, and cost a pass over the training set for every k.)
    """
    base, test = embedded
    x, m = base if task.domain == "object" else test, task.group.max() + 1
    if m == len(task.gallery):  # single images: a million would be gigabytes in float64
        return test[task.probe], x[task.gallery[np.argsort(task.group)]]
    means = np.zeros((m, x.shape[1]))
    for start in range(0, len(task.gallery), ROWS):  # by blocks: a copy of a million images would be gigabytes
        part = slice(start, start + ROWS)
        means += class_means(x[task.gallery[part]], task.group[part], m)
    return test[task.probe], means / np.bincount(task.group)[:, None]


class Embeddings:
    """Unit embeddings [M, D] in their file: rows are read on demand, since a million are gigabytes."""

    def __init__(self, path: Path) -> None:
        self.raw = np.load(path, mmap_mode="r", allow_pickle=False)
        self.shape = self.raw.shape

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        """float32 [rows, D]; NaN in those of unreadable images."""
        return normalise(np.array(self.raw[rows]))


def read_embeddings(embedder: Embedder, split: Split) -> Embeddings:
    """The embeddings of a split, computed if missing."""
    return Embeddings(embedder.prepare(split))
