"""Stimuli of forced-choice experiments with people, in the layout of the model-vs-human toolbox."""

import re
from functools import partial
from pathlib import Path, PurePosixPath

from data_prep import InputError
from data_prep.format import Record, Skipped, Source, stimulus_of
from data_prep.records import read_map
from data_prep.sources.folders import REFERENCE, scan
from data_prep.sources.imagenet import with_fields

CATEGORIES = ("airplane", "bear", "bicycle", "bird", "boat", "bottle", "car", "cat", "chair", "clock", "dog",
              "elephant", "keyboard", "knife", "oven", "truck")  # the choices in the toolbox's experiments
CUES = re.compile(r"([a-z]+)\d+-([a-z]+)\d+")  # cat7-elephant1: a cat's shape, an elephant's texture


def gather(path: Path | None, categories: list[str]) -> dict[str, list[str]]:
    """The classes of each category, from `folder,category` lines; {} without a file."""
    groups: dict[str, list[str]] = {}
    for place, (name, category) in enumerate(read_map(path, "--classes").items() if path else ()):
        if category in categories:
            groups.setdefault(category, []).append(name)
        elif place:  # line 1 may be a header
            raise InputError(f"--classes {path}: {category[:60]!r} is not a category of the stimuli; those are "
                             + ", ".join(categories))
    return groups


@REFERENCE
def stimuli(src: Path, domain: str, train: bool, reference: str | None = None, classes: Path | None = None) -> Source:
    """Stimuli for which people chose a category: `<category>/<stimulus>.png`, one experimental condition.

    Also reads the toolbox's session folders, `session-1/0001_cop_dnn_c05_dog_10_n02085620_7.png`. For cue conflicts
    such as `cat/cat7-elephant1.png`, the folder is the shape; the texture is recorded. `--classes categories.csv`
    assigns classes of the reference and of training to categories (`n02123045,cat` lines); without it, each category is
    a class. A model chooses among the categories of the reference. Scored as forced choice, out of distribution;
    `evaluate.py --humans` compares with people's answers. Expected: edges and silhouettes 160 stimuli each, cue
    conflict 1,280. Source: Geirhos et al., NeurIPS 2018 and ICLR 2019; github bethgelab/model-vs-human.
    """
    skipped, files = Skipped(), {}
    for folder, member in scan(src, skipped):
        stimulus = stimulus_of(member.name)
        if stimulus in files:
            raise InputError(f"--src {src}: {files[stimulus][1].name} and {member.name} are both the stimulus "
                             f"{stimulus!r}: give the folder of one set, whose folders are the categories")
        parts = PurePosixPath(member.name).name.split("_")
        if len(parts) > 5 and folder.casefold() not in CATEGORIES:  # a session folder: its images name the category
            folder = parts[4]
        files[stimulus] = folder.casefold(), member
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
