"""Reading shards: the order of the images, and interleaved micro-batches of decoded images.

Everything is a closed-form function of the seed and of running numbers, so that neither the number of loader processes
nor an interruption changes what a run sees.
"""

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch
from tqdm import tqdm

from data_prep import DOMAINS, InputError, progress
from data_prep.degrade import degrade
from data_prep.format import BadImage, Split
from data_prep.loaders import image_memory, load, one_ahead
from kernels.gather import gather_interleaved


class Order:
    """The data order of one domain: number n of its samples in a run -> (epoch, row), a function of (seed, domain, n).

    An epoch visits every row once: shards are shuffled, then rows within windows of `window` shards, so that reading
    from network disks stays mostly sequential.
    """

    def __init__(self, shard_sizes: list[int], seed: int, domain: int, window: int = 8) -> None:
        self.size, self.key, self.window = sum(shard_sizes), (seed, domain), window
        self.bounds = np.concatenate([[0], np.cumsum(shard_sizes)])

    # the caches are those of all orders together: a run has one for each of four domains
    @functools.lru_cache(maxsize=8)  # noqa: B019
    def shards(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        order = np.random.default_rng((*self.key, epoch)).permutation(len(self.bounds) - 1)
        starts = np.concatenate([[0], np.cumsum(np.diff(self.bounds)[order])])[:-1]
        return order, starts[:: self.window]  # the first place of each window

    @functools.lru_cache(maxsize=16)  # noqa: B019
    def rows(self, epoch: int, w: int) -> np.ndarray:
        shards = self.shards(epoch)[0][w * self.window : (w + 1) * self.window]
        rows = np.concatenate([np.arange(self.bounds[s], self.bounds[s + 1]) for s in shards])
        return np.random.default_rng((*self.key, epoch, w)).permutation(rows)

    def __call__(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        epoch, place = np.divmod(n, self.size)
        row = np.empty_like(place)
        for e in np.unique(epoch).tolist():
            starts = self.shards(e)[1]
            window = np.where(epoch == e, np.searchsorted(starts, place, side="right") - 1, -1)
            for w in set(window[window >= 0].tolist()):
                row[window == w] = self.rows(e, w)[place[window == w] - starts[w]]
        return epoch, row


def interleave(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Spread the domains evenly over a batch of counts[d] images each.

    Returns, for every place, its domain and its number among the places of that domain, int64 [B] each.
    """
    domain = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(n) for n in counts])
    order = np.argsort((number + 0.5) / counts[domain], kind="stable")
    return domain[order], number[order]


def scramble(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 that removes patterns: the last step of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> 30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> 31)


def uniforms(count: int, *key: int | np.ndarray) -> np.ndarray:
    """Random numbers in 0..1, float64 [N, count]; row i depends on the i-th numbers of the key (int64 [N]) alone.

    SplitMix64 from a state hashed from the key: a NumPy generator per sample would cost more than its draws.
    """
    gap, state = np.uint64(0x9E3779B97F4A7C15), np.zeros(1, dtype=np.uint64)
    for part in key:
        state = scramble((state ^ np.asarray(part).astype(np.uint64)) + gap)
    return (scramble(state[:, None] + gap * np.arange(1, count + 1, dtype=np.uint64)) >> 11) * 2.0**-53


def random_boxes(u: np.ndarray, side: int, least: float, spread: float, aspect: float) -> np.ndarray:
    """Rectangles [N, 4] (x0, y0, x1, y1) in a square, whose sides are clipped to those of the square.

    Args:
        u: uniform numbers [N, 4].
        side: of the square.
        least, spread: their area is least..least + spread, as fractions of the square's.
        aspect: width / height is between this and its reciprocal.
    """
    area, aspects = least + spread * u[:, 0], np.exp(math.log(aspect) * (2 * u[:, 1] - 1))
    w, h = np.minimum(np.sqrt(area * aspects), 1) * side, np.minimum(np.sqrt(area / aspects), 1) * side
    x, y = u[:, 2] * (side - w), u[:, 3] * (side - h)
    return np.stack([x, y, x + w, y + h], axis=1)


def erase_patches(images: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Normalised images [B, 3, S, S] with the mean colour (0) in `patches` [B, 4], fractions of S."""
    size = images.shape[-1]
    center = (torch.arange(size, device=images.device) + 0.5) / size
    x0, y0, x1, y1 = patches.to(images.device, non_blocking=True)[:, :, None].unbind(1)
    across, down = (center >= x0) & (center < x1), (center >= y0) & (center < y1)
    return images.masked_fill((down[:, :, None] & across[:, None, :])[:, None], 0.0)


@dataclass
class Chunk:
    """A decoded micro-batch: one bank of images per domain and, for every place, the position of its image."""

    banks: list[torch.Tensor]  # K x uint8 [M_d, H_d, W_d, 3]
    domain: torch.Tensor  # int64 [B], index of the bank
    row: torch.Tensor  # int64 [B], index in the bank
    label: torch.Tensor  # int64 [B], counted from the domain's first class; -1: padding of a rank's batch
    boxes: torch.Tensor  # float32 [B, 4], pixels of the bank's images
    flip: torch.Tensor  # bool [B]
    bad: list[str]  # damaged images that were replaced: "domain/split key: reason"
    erase: torch.Tensor | None = None  # float32 [B, 4], for `erase_patches`; None: no domain uses it
    images: torch.Tensor | None = None  # [B, 3, S, S], if the loader process made the batch
    begin: Callable | None = None  # to be called when a step begins with this chunk
    copied: object = None  # CUDA event: the banks have arrived on the device

    def __getstate__(self) -> dict:
        """Send images alone through shared memory, whose opening costs half a millisecond per tensor."""
        return {name: value.numpy() if isinstance(value, torch.Tensor) and name != "images" else value
                for name, value in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update({name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
                           for name, value in state.items()})

    def pin_memory(self) -> "Chunk":
        """Called by the DataLoader, so that copies to the GPU are asynchronous."""
        tensors = {name: value.pin_memory() for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, banks=[bank.pin_memory() for bank in self.banks], **tensors)


class Stream(torch.utils.data.Dataset):
    """The micro-batches of a run; number c is a pure function of (seed, c).

    Args:
        splits: the training split of each of the K domains.
        plan: int64 [batches, K], numbers of images; every batch has the same sum.
        seed: of the order and of every per-sample draw (keyed by seed, domain, epoch, sample).
        micro_batch: largest number of images per chunk (None: the batch).
        crop: least area of the random crop, 0..1, for each domain.
        erase: probability of an erased patch for each domain (None: 0).
        severity: largest severity 0..1 of the degradation of face_lq in each batch [batches]; None: no degradation.
        rank, world: of this process, which takes the places rank, rank + world, ... of every batch.
        readable: for each domain, which images of the cache could be decoded, bool [M_d]: chunks have no banks then,
            and `row` is the row in the split. None: decode.
    """

    def __init__(self, splits: list[Split], plan: np.ndarray, *, seed: int, micro_batch: int | None = None,
                 crop: list[float], severity: np.ndarray | None = None, rank: int = 0, world: int = 1,
                 readable: list[np.ndarray] | None = None, erase: list[float] | None = None) -> None:
        self.splits, self.plan, self.seed, self.crop, self.severity = splits, plan, seed, crop, severity
        self.rank, self.world, self.readable = rank, world, readable
        self.erase = erase or []
        most = math.ceil(int(plan[0].sum()) / world)
        self.micro = min(micro_batch or most, most)
        self.per_batch = math.ceil(most / self.micro)  # chunks
        self.micro = math.ceil(most / self.per_batch)  # nearly equal sizes: compiled code is for one size
        self.item_bytes = 0 if readable else self.micro * 3 * max(split.size for split in splits) ** 2
        self.starts = np.cumsum(plan, axis=0) - plan
        sizes = [[shard["samples"] for shard in split.index["shards"]] for split in splits]
        self.orders = [Order(n, seed, DOMAINS.index(s.domain)) for n, s in zip(sizes, splits, strict=True)]

    def __len__(self) -> int:
        return len(self.plan) * self.per_batch

    def __getitem__(self, c: int) -> Chunk:
        return self.chunk(c)

    def chunk(self, c: int, memory: Callable[[int], torch.Tensor] = image_memory) -> Chunk:
        """Chunk c, with images decoded into `memory(number of bytes)`."""
        batch, part = divmod(c, self.per_batch)
        domain, number = interleave(self.plan[batch])
        size = len(range(0, len(domain), self.world)[part * self.micro : (part + 1) * self.micro])
        places = np.arange(self.rank, len(domain), self.world)[part * self.micro : (part + 1) * self.micro]
        # every rank gets as many as rank 0, so that collectives match; padding has label -1
        real, places = len(places), np.concatenate([places, np.zeros(size - len(places), dtype=np.int64)])
        domain, number = domain[places], number[places] + self.starts[batch][domain[places]]
        row, label, bad = np.empty_like(domain), np.empty_like(domain), []
        # filled image by image: stacking them at the end would copy and transpose them once more
        counts = np.bincount(domain[:0] if self.readable else domain, minlength=len(self.splits)).tolist()
        shapes = [(n, split.size, split.size, 3) for n, split in zip(counts, self.splits, strict=True)]
        parts = memory(sum(map(math.prod, shapes))).split([math.prod(shape) for shape in shapes])
        banks = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        boxes, flip, erase = np.empty((size, 4), np.float32), np.empty(size, bool), np.zeros((size, 4), np.float32)
        for d, split in enumerate(self.splits):
            mine, domain_key = np.flatnonzero(domain == d), DOMAINS.index(split.domain)
            epoch, sample = self.orders[d](number[mine])
            u = uniforms(11, self.seed, domain_key, epoch, sample)
            least = self.crop[d]  # crops as in Inception; 1: the whole image
            boxes[mine] = random_boxes(u[:, :4], split.size, least, 1 - least, 4 / 3 if least < 1 else 1)
            flip[mine] = u[:, 4] < 0.5
            if any(self.erase):  # as in random erasing (arXiv 1708.04896)
                erase[mine] = random_boxes(u[:, 6:10], 1, 0.02, 0.31, 0.3) * (u[:, 5:6] < self.erase[d])
            severity = np.zeros(len(mine)) if self.severity is None or split.domain != "face_lq" else \
                self.severity[batch] * u[:, 10]
            for i, (s, e, strength) in enumerate(zip(sample.tolist(), epoch.tolist(), severity.tolist(), strict=True)):
                image, used = self.read(d, s, bad)
                row[mine[i]], label[mine[i]] = used if self.readable else i, split.labels[used]
                if strength:
                    image, _ = degrade(image, strength, np.random.default_rng((self.seed, domain_key, e, s)))
                if image is not None:
                    banks[d][i] = image.permute(1, 2, 0)
        label[real:] = -1
        return Chunk(banks, *map(torch.from_numpy, (domain, row, label, boxes, flip)), bad,
                     torch.from_numpy(erase) if any(self.erase) else None)

    def read(self, d: int, sample: int, bad: list[str]) -> tuple[torch.Tensor | None, int]:
        """An image uint8 [3, H, W] (None if cached) and its row; the next readable one replaces a damaged one."""
        split = self.splits[d]
        for row in (number % len(split) for number in range(sample, sample + len(split))):
            try:
                if not self.readable:
                    return split.image(row), row
                if self.readable[d][row]:
                    return None, row
                raise BadImage(f"row {row}: unreadable")
            except BadImage as error:
                bad.append(f"{split.domain}/{split.name} {error}")
        raise InputError(f"{split.folder}: no readable image; run `python -m data_prep verify {split.folder}`")


class Batches(torch.utils.data.Dataset):
    """Uncropped images of a split in the order of `rows`, `batch` at a time, for embedding.

    Item b is (rows int64 [n], images uint8 [n, 3, H, W]); unreadable images are left out.
    """

    def __init__(self, split: Split, rows: np.ndarray, batch: int) -> None:
        self.split, self.rows, self.batch, self.item_bytes = split, rows, batch, batch * 3 * split.size**2

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.batch)

    def __getitem__(self, b: int) -> tuple[np.ndarray, torch.Tensor]:
        rows, good = self.rows[b * self.batch : (b + 1) * self.batch].tolist(), []
        images = image_memory(len(rows), self.split.size, self.split.size, 3)
        for row in rows:
            with suppress(BadImage):
                images[len(good)] = self.split.image(row).permute(1, 2, 0)
                good.append(row)
        return np.array(good, dtype=np.int64), images[: len(good)].permute(0, 3, 1, 2)


# ---------------------------------------------------------------- from chunks to images


@dataclass(frozen=True)
class Look:
    """The input format of a network."""

    image_size: int  # pixels
    mean: tuple[float, float, float]  # RGB, of images scaled to 0..1
    std: tuple[float, float, float]
    interpolation: str = "bilinear"  # or "bicubic"


def make_images(chunk: Chunk, look: Look, device: torch.device, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The interleaved, augmented, normalised batch [B, 3, S, S] of a chunk."""
    banks = [bank.to(device, non_blocking=True) for bank in chunk.banks]
    images = gather_interleaved(banks, chunk.domain, chunk.row, size=look.image_size, mean=look.mean, std=look.std,
                                boxes=chunk.boxes, flip=chunk.flip, interpolation=look.interpolation, dtype=dtype)
    return images if chunk.erase is None else erase_patches(images, chunk.erase)


class FinishedImages(torch.utils.data.Dataset):
    """The chunks of a stream with network inputs made by the loader processes, for training on the CPU."""

    def __init__(self, stream: Stream, cache: list[torch.Tensor] | None, look: Look) -> None:
        self.stream, self.cache, self.look = stream, cache, look
        self.bytes = np.empty(0, dtype=np.uint8)  # of the decoded images of a chunk, which stay in this process
        self.item_bytes = stream.micro * 3 * look.image_size**2 * 4  # float32

    def __len__(self) -> int:
        return len(self.stream)

    def memory(self, size: int) -> torch.Tensor:
        if self.bytes.size < size:
            self.bytes = np.empty(size, dtype=np.uint8)
        return torch.from_numpy(self.bytes[:size])

    def __getitem__(self, c: int) -> Chunk:
        chunk = self.stream.chunk(c, self.memory)
        if self.cache is not None:
            chunk = replace(chunk, banks=self.cache)
        return replace(chunk, banks=[], images=make_images(chunk, self.look, torch.device("cpu")))


# ---------------------------------------------------------------- images decoded once and kept (--cache)


def decode_split(split: Split, device: torch.device, workers: int, quiet: bool) -> tuple[torch.Tensor, np.ndarray]:
    """All images of a split, uint8 [M, S, S, 3] on the device, and which could be decoded, bool [M]."""
    bank = torch.zeros(len(split), split.size, split.size, 3, dtype=torch.uint8, device=device)
    readable = np.zeros(len(split), dtype=bool)
    with progress(total=len(split), desc=f"cache {split.domain}", unit="img", disable=quiet) as bar:
        for rows, images in load(Batches(split, np.arange(len(split)), 256), 0, workers, False):
            bank[torch.from_numpy(rows).to(device)] = images.permute(0, 2, 3, 1).to(device)
            readable[rows] = True
            bar.update(len(rows))
    return bank, readable


def from_cache(cache: list[torch.Tensor], chunk: Chunk, pin: bool) -> Chunk:
    """The chunk with banks gathered from the cache; `pin`: in page-locked memory."""
    banks, row = [], torch.empty_like(chunk.row)
    for d, bank in enumerate(cache):
        places = (chunk.domain == d).nonzero().flatten()
        banks.append(torch.empty(len(places), *bank.shape[1:], dtype=bank.dtype, pin_memory=pin))
        torch.index_select(bank, 0, chunk.row[places], out=banks[d])
        row[places] = torch.arange(len(places))
    return replace(chunk, banks=banks, row=row)


# ---------------------------------------------------------------- the feed of a run


class Feed:
    """The micro-batches of a run's steps as network inputs on the device, decoded ahead by loader processes.

    Args:
        bf16: the network computes in bfloat16.
        cache: the decoded images of every split, for a stream with `readable`.
        draw: (step, labels, domains of its micro-batches, on the CPU) -> (new labels, a function to call when the step
            begins or None). It runs in a thread, a step ahead.

    Attributes: passes (micro-batches per step), bad (number of damaged images that were replaced).
    """

    def __init__(self, stream: Stream, batches_per_step: int, look: Look, device: torch.device, *, bf16: bool = False,
                 workers: int = 0, cache: list[torch.Tensor] | None = None, draw: Callable | None = None) -> None:
        self.stream, self.look, self.device, self.workers, self.cache = stream, look, device, workers, cache
        self.dtype = torch.bfloat16 if bf16 else torch.float32  # the dtype that autocast would convert to
        self.passes, self.bad, self.draw, self.chunks = stream.per_batch * batches_per_step, 0, draw, iter(())

    def start(self, step: int) -> None:
        """Start, or continue, with a step."""
        on_gpu = self.device.type == "cuda"  # a GPU makes its inputs from uint8, which are fewer bytes to copy
        chunks = self.stream if on_gpu else FinishedImages(self.stream, self.cache, self.look)
        chunks = load(chunks, step * self.passes, self.workers, on_gpu)
        if self.draw:
            chunks = self.relabelled(chunks, step)
        if on_gpu:
            chunks = self.copied(chunks)
        self.chunks = one_ahead(chunks, self.device) if self.draw or on_gpu else chunks

    def relabelled(self, chunks: Iterator[Chunk], step: int) -> Iterator[Chunk]:
        """The chunks with labels from `draw`."""
        while part := list(itertools.islice(chunks, self.passes)):
            labels, begin = self.draw(step, [chunk.label for chunk in part], [chunk.domain for chunk in part])
            part[0] = replace(part[0], begin=begin)
            yield from (replace(chunk, label=label) for chunk, label in zip(part, labels, strict=True))
            step += 1

    def copied(self, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks with their banks on the device, copied on a second CUDA stream during computation."""
        copying = torch.cuda.Stream(self.device)
        for chunk in chunks:
            if self.cache and self.cache[0].device.type == "cuda":
                yield replace(chunk, banks=self.cache)
                continue
            chunk = from_cache(self.cache, chunk, True) if self.cache else chunk
            with torch.cuda.stream(copying):
                banks = [bank.to(self.device, non_blocking=True) for bank in chunk.banks]
            yield replace(chunk, banks=banks, copied=copying.record_event())

    def next_step(self) -> Iterator[tuple]:
        """The micro-batches of the next step, one by one: (images [B, 3, S, S], labels [B], domains [B])."""
        part = itertools.islice(self.chunks, self.passes)
        first = next(part)
        if first.begin:
            first.begin()
        return self.finish(itertools.chain([first], part))

    def finish(self, part: Iterable[Chunk]) -> Iterator[tuple]:
        """Network inputs, labels and domains of chunks, on the device."""
        for chunk in part:
            for line in chunk.bad:
                tqdm.write(f"damaged image replaced: {line}", file=sys.stderr)
            self.bad += len(chunk.bad)
            if chunk.copied:
                now = torch.cuda.current_stream(self.device)
                now.wait_event(chunk.copied)
                for bank in chunk.banks:
                    bank.record_stream(now)  # otherwise the memory could be reused while it is read
            images = make_images(chunk, self.look, self.device, self.dtype) if chunk.images is None else chunk.images
            yield images, *(v.to(self.device, non_blocking=True) for v in (chunk.label, chunk.domain))
