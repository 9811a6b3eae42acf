"""The schedule of a run: which domains' images every batch of it holds, planned whole before the first step.

A schedule is three numbers (domains per batch, images per batch, batches per optimiser step). Here too is what changes
over a run: shares, ramps and the learning rate.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from data_prep import InputError
from data_prep.format import Split
from train_options import per_domain


@dataclass(frozen=True)
class Schedule:
    """Three numbers make a schedule; `plan_batches` says which domains' images the batches hold."""

    domains_per_batch: int
    images_per_batch: int
    batches_per_step: int


def make_schedule(name: str, num_domains: int, batch: int) -> Schedule:
    """A (accumulate), B (blend), alternate or sequential at `batch` images per optimiser step."""
    if name == "A":
        if batch % num_domains:
            raise InputError(f"--batch {batch} cannot be dealt to {num_domains} domains by schedule A: "
                             f"take {max(batch // num_domains, 1) * num_domains}")
        return Schedule(1, batch // num_domains, num_domains)
    return Schedule(num_domains if name == "B" else 1, batch, 1)


def shares_at(progress: float, shares: np.ndarray, ramp: tuple[int, float, float, float] | None) -> np.ndarray:
    """Shares [K] of the blended pool when a fraction `progress` of training is over, with the --mix-ramp applied.

    The ramp is (domain, first share, last share, fraction of training); the other shares are rescaled to sum to 1.
    """
    if ramp is None:
        return shares
    k, first, last, fraction = ramp
    own = first + (last - first) * min(progress / fraction, 1.0)
    rest = np.where(np.arange(len(shares)) == k, 0.0, shares)
    mixed = rest / rest.sum() * (1.0 - own)
    mixed[k] = own
    return mixed


def blend_counts(shares: Iterable[np.ndarray], batch: int) -> np.ndarray:
    """Images per batch and domain [batches, K], replayed from batch 0 so that the long-run shares are exact.

    Every domain carries its remainder from batch to batch; the places of a batch go to the largest credits.
    """
    counts, credit = [], 0.0
    for share in shares:
        credit = credit + batch * share
        places = np.floor(np.maximum(credit, 0.0)).astype(np.int64)
        while (left := batch - places.sum()) != 0:
            # while a ramp moves a share through less than one image, a floor can hand out one place too many
            k = np.argmax(credit - places) if left > 0 else np.argmin(np.where(places > 0, credit - places, np.inf))
            places[k] += np.sign(left)
        credit = credit - places
        counts.append(places)
    return np.array(counts)


def plan_batches(config: dict, schedule: Schedule, steps: int, shares: np.ndarray, ramp=None) -> np.ndarray:
    """Images of each domain in each batch of the run: int64 [steps * batches_per_step, K]."""
    K, batch = len(shares), schedule.images_per_batch
    if schedule.domains_per_batch == K:
        return blend_counts((shares_at(s / max(steps, 1), shares, ramp) for s in range(steps)), batch)
    if config["schedule"] == "sequential":
        order = [config["domains"].index(name) for name in config["order"] or config["domains"]]
        which = [order[s * K // steps] for s in range(steps)]
    else:
        which = np.arange(steps * schedule.batches_per_step) % K
    return batch * np.eye(K, dtype=np.int64)[which]


def parse_shares(config: dict, splits: list[Split]) -> tuple[np.ndarray, tuple | None]:
    """Shares [K] of the images that each domain gets, and the --mix-ramp (domain, first, last, fraction) if any."""
    K = len(splits)
    if config["schedule"] != "B":
        return np.full(K, 1.0 / K), None
    sizes = np.array([len(split) for split in splits], dtype=float)
    shares = np.array(per_domain(config, "mix")) if config["mix"] else sizes ** config["mix_temperature"]
    if shares.sum() <= 0:
        raise InputError(f"--mix {config['mix']}: at least one share must be above 0")
    shares, mix_ramp = shares / shares.sum(), None
    if config["mix_ramp"]:
        number = r"(\d+(?:\.\d*)?)"
        match = re.fullmatch(rf"(\w+):{number}->{number}(?:@{number})?", config["mix_ramp"])
        first, last, fraction = (float(x) for x in (*match.groups()[1:3], match[4] or 0.3)) if match else (2, 2, 2)
        if not match or match[1] not in config["domains"] or max(first, last, fraction) > 1 or not fraction:
            raise InputError(f"--mix-ramp {config['mix_ramp']!r}: want DOMAIN:FIRST->LAST[@FRACTION], shares in 0..1, "
                             "FRACTION of training above 0 and up to 1")
        mix_ramp = (config["domains"].index(match[1]), first, last, fraction)
        if shares.sum() - shares[mix_ramp[0]] <= 0:
            raise InputError("--mix-ramp needs another domain with a share above 0")
    for progress in (0.0, 1.0):
        for name, share in zip(config["domains"], shares_at(progress, shares, mix_ramp), strict=True):
            if share and config["batch"] * share < 1:
                raise InputError(f"--batch {config['batch']} gives {name} {config['batch'] * share:.2f} images each: "
                                 f"raise --batch to {math.ceil(1 / share)} or set its share with --mix")
    return shares, mix_ramp


def ramp(progress: float, fraction: float) -> float:
    """0 -> 1, linear over the first `fraction` of training (0: no ramp)."""
    return min(progress / fraction, 1.0) if fraction > 0 else 1.0


def rate(step: int, steps: int, warmup: float, floor: float) -> float:
    """Factor on every learning rate at a step: linear warm-up over a fraction of the steps, then cosine to `floor`."""
    rising = (step + 1) / max(warmup * steps, 1.0)
    falling = floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(step / steps, 1.0)))
    return min(rising, 1.0) * falling
