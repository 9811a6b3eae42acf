"""Stimuli that people have named in a forced choice of categories, as the model-vs-human toolbox keeps them."""

import re
from functools import partial
from pathlib import Path, PurePosixPath

from data_prep import InputError
from data_prep.format import Record, Skipped, Source
from data_prep.records import read_classes
from data_prep.sources.folders import REFERENCE, image_suffixes, scan
from data_prep.sources.imagenet import need_objects

CATEGORIES = ("airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat", "chair", "clock", "dog",
              "elephant", "keyboard", "knife", "oven", "truck")  # what people choose among in the toolbox's experiments
CUES = re.compile(r"([a-z]+)\d+-([a-z]+)\d+")  # cat7-elephant1: the shape of a cat, the texture of an elephant


def stimulus_of(image: str) -> str:
    """What identifies a stimulus in trials and among files: the last part of its name, in lower case.

    `0001_edg_s01_0_oven_00_oven10.png` is `oven10`: what comes before depends on the trial and the observer. A picture
    of ImageNet keeps its class (`n04111531_14126`). Folders and the image's ending do not count.
    """
    path = PurePosixPath(image.strip().replace("\\", "/").casefold())
    parts = (path.stem if path.suffix in image_suffixes() else path.name).split("_")
    return "_".join(parts[-2:] if re.fullmatch(r"n\d{8}", parts[-2:][0]) else parts[-1:])


def category_of(folder: str, image: str) -> str:
    """The category of a stimulus: its folder or, in the toolbox's folders of sessions, the fifth part of its name."""
    parts = PurePosixPath(image).name.split("_")
    return (parts[4] if len(parts) > 5 and folder.casefold() not in CATEGORIES else folder).casefold()


def with_fields(read, fields: dict) -> tuple[bytes, dict]:
    """An image and what the sample's JSON is to say of it."""
    return read(), fields


def gather(path: Path | None, categories: list[str]) -> dict[str, list[str]]:
    """The classes of each category, by `folder,category` lines; {} without a file."""
    of_class = read_classes(path) if path else {}
    if of_class and (first := next(iter(of_class.items())))[1] not in categories:
        of_class.pop(first[0])  # a header
    if unknown := [name for name in of_class.values() if name not in categories]:
        raise InputError(f"--classes {path}: {unknown[0][:60]!r} is no category of the stimuli; those are "
                         + ", ".join(categories))
    return {category: [name for name, of in of_class.items() if of == category]
            for category in dict.fromkeys(of_class.values())}


@REFERENCE
def stimuli(src: Path, domain: str, train: bool, reference: str | None = None, classes: Path | None = None) -> Source:
    """Stimuli of an experiment in which people chose a category: `<category>/<stimulus>.png`, one set or condition.

    Also the toolbox's folders of sessions, `session-1/0001_cop_dnn_c05_dog_10_n02085620_7.png`. Of cue conflicts such
    as `cat/cat7-elephant1.png` the folder is the shape; the texture is recorded. `--classes categories.csv` says which
    classes of the reference, and of training, belong to a category (`n02123045,cat` lines); without it they are the
    categories themselves. A model chooses among the categories that the reference has. Scored as forced choice, out
    of distribution; `evaluate.py --humans` sets the answers of people beside it. Source: Geirhos et al., NeurIPS 2018
    and ICLR 2019; github bethgelab/model-vs-human. Edges and silhouettes: 160 stimuli each, cue conflict 1,280.
    """
    need_objects(domain, train)
    skipped, files = Skipped(), {}
    for folder, member in scan(src, skipped):
        stimulus = stimulus_of(member.name)
        if stimulus in files:
            raise InputError(f"--src {src}: {files[stimulus][1].name} and {member.name} are both the stimulus "
                             f"{stimulus!r}: give the folder of one set, whose folders are the categories")
        files[stimulus] = category_of(folder, member.name), member
    present = {category for category, _ in files.values()}
    categories = sorted(present | {*CATEGORIES} if present <= {*CATEGORIES} else present)
    records = []
    for stimulus, (category, member) in files.items():
        cues, fields = CUES.fullmatch(stimulus), {"stimulus": stimulus}
        if cues and cues[1] == category and cues[2] in categories:
            fields["texture"] = cues[2]
        records.append(Record(partial(with_fields, member.read, fields), member.name, category))
    protocol = {"name": "choice", "reference": reference or "train", "ood": True, "choices": categories,
                "groups": gather(classes, categories)}
    return Source(records, protocol, skipped=skipped)
