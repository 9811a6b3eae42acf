"""Degraded copies and shifts: what is drawn, what it does to an image, and the splits that come of it."""

import io
from collections import Counter

import click
import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.degrade import SHIFTS, blur, degrade, shift, warp
from data_prep.demo import draw_face
from data_prep.format import Split, fingerprint, open_root
from data_prep.verify import verify_split
from reports.rows import clean_of
from tests.test_data_prep import PAIRS, files_of, lfw_folder, prepared, run_here

# ---------------------------------------------------------------- an image


def sharp_face(side: int = 112) -> torch.Tensor:
    face = Image.open(io.BytesIO(draw_face(0, 1, 2))).resize((side, side))
    return torch.from_numpy(np.array(face)).permute(2, 0, 1)


def test_degradation_grows_and_repeats():
    sharp = torch.from_numpy(np.array(Image.open(io.BytesIO(draw_face(0, 1, 2))))).permute(2, 0, 1)
    loss = []
    for severity in (0.0, 0.3, 0.6, 1.0):
        soft = [degrade(sharp, severity, np.random.default_rng(i))[0] for i in range(30)]
        assert all(s.shape == sharp.shape and s.dtype == torch.uint8 for s in soft)
        loss.append(np.mean([(s.float() - sharp.float()).abs().mean() for s in soft]))
    assert loss[0] == 0 < loss[1] < loss[2] < loss[3]
    one, draws = degrade(sharp, 0.8, np.random.default_rng(5))
    two, again = degrade(sharp, 0.8, np.random.default_rng(5))
    assert torch.equal(one, two) and draws == again and draws["severity"] == 0.8


def test_every_degradation_happens_within_its_range():
    """Known ranges at severity s; lengths are in pixels of 112, so an image of another size gives the same draws."""
    image, s, seen = sharp_face(), 0.8, Counter()
    limits = {"blur": (0.1, 2.5 * s), "blur_aspect": (0.6, 1), "blur_angle": (0, np.pi), "motion": (1, 1 + 10 * s),
              "motion_angle": (0, np.pi), "turbulence": (0.5 * s, 2.5 * s), "turbulence_sigma": (4, 12),
              "turbulence_blur": (0.1, 2 * s), "noise": (0, 20 * s), "shot_noise": (0, 20 * s), "jpeg": (20, 92),
              "log_gamma": (-0.7 * s, 0.7 * s), "grey": (1, 1), "severity": (s, s), "down": (0, 4),
              "log_shrink": (s * np.log(12 / 112), s * np.log(56 / 112)),
              "short_side": (112 * (12 / 112) ** s - 1, 112 * 0.5**s + 1)}
    for i in range(400):
        soft, draws = degrade(image, s, np.random.default_rng(i))
        assert draws.pop("up") in ("bicubic", "bilinear") and soft.shape == image.shape
        for name, value in draws.items():
            assert limits[name][0] - 1e-3 <= value <= limits[name][1] + 1e-3, name
        seen.update(draws.keys())
    expected = {"blur": 0.7, "motion": 0.3, "turbulence": 0.2, "jpeg": 0.8, "log_gamma": 0.3, "noise": 0.25,
                "shot_noise": 0.25, "grey": 0.05 * s, "down": 1}
    assert set(seen) == set(limits)
    assert all(abs(seen[name] / 400 - share) < 0.08 for name, share in expected.items())


def test_a_warp_moves_pixels_by_its_tilt_and_a_flat_image_not_at_all():
    rng = np.random.default_rng(0)
    field = torch.from_numpy(rng.standard_normal((2, 28, 28), dtype=np.float32))
    ramp = torch.arange(112.0).expand(3, 112, 112)  # the value of a pixel is its column
    shift = (warp(ramp, field, 2.0, 1.5) - ramp)[0, 8:-8, 8:-8]
    assert shift.square().mean().sqrt() == pytest.approx(2.0, rel=0.3)
    assert (shift[:, 1:] - shift[:, :-1]).abs().max() < 1.5  # smooth: neighbours move together
    assert warp(torch.full((3, 30, 20), 7.0), field, 3.0, 2.0).allclose(torch.tensor(7.0))


def test_a_blur_is_the_convolution_that_it_stands_for():
    """Against direct sums over the pixels, edges repeated: a turned Gaussian, and a motion of nine pixels."""
    x, half = sharp_face(60).float(), 12
    v, u = np.mgrid[-half : half + 1, -half : half + 1]
    along, across = u * np.cos(0.6) + v * np.sin(0.6), v * np.cos(0.6) - u * np.sin(0.6)
    turned = np.exp(-0.5 * ((along / 3) ** 2 + (across / 1.5) ** 2))
    padded = np.pad(x.numpy(), ((0, 0), (half, half), (half, half)), mode="edge")

    def summed(kernel):
        kernel = kernel / kernel.sum()
        return sum(weight * padded[:, i : i + 60, j : j + 60] for (i, j), weight in np.ndenumerate(kernel))

    assert np.abs(blur(x, (3.0, 1.5), 0.6).numpy() - summed(turned)).max() < 0.5
    row = ((v == 0) & (np.abs(u) <= 4)).astype(float)
    assert np.abs(blur(x, (1.0, 1.0), 0.0, 9.0, 0.0).numpy() - blur(
        torch.from_numpy(summed(row)).float(), (1.0, 1.0)).numpy())[:, 8:-8, 8:-8].max() < 1
    assert np.abs(blur(x, (1.0, 1.0), 0.0, 9.0, np.pi / 2).mT.numpy()
                  - blur(x.mT.contiguous(), (1.0, 1.0), 0.0, 9.0, 0.0).numpy()).max() < 0.01
    flat = torch.full((3, 31, 47), 9.0)
    assert blur(flat, (2.5, 0.7), 1.0, 7.3, 2.0).allclose(flat, atol=1e-3)


def test_degradation_works_at_the_small_size_and_looks_as_at_full_size():
    """Decibels from the sharp image, mean of 400 images when every step ran at full size with direct convolutions."""
    sharp = sharp_face(112)
    for severity, expected in {0.3: 29.39, 1.0: 20.99}.items():
        soft = torch.stack([degrade(sharp, severity, np.random.default_rng((9, i)))[0] for i in range(200)])
        error = (soft.float() - sharp.float()).square().mean((1, 2, 3))
        assert (10 * torch.log10(255**2 / error)).mean().item() == pytest.approx(expected, abs=0.8)


def test_images_take_different_stretches_of_the_noise(monkeypatch):
    """Noise that rises along the pool from 0 to 1: the brightness of a flat image says where its stretch lies."""
    monkeypatch.setattr("data_prep.degrade.noise_pool", lambda size: torch.arange(size) / size)
    flat, places = torch.full((3, 48, 48), 128, dtype=torch.uint8), []
    for i in range(150):
        soft, draws = degrade(flat, 0.8, np.random.default_rng(i))
        if draws.get("noise", 0) > 5 and "log_gamma" not in draws:
            places.append((soft.float().mean().item() - 128) / draws["noise"])
    assert len(places) > 10 and min(places) < 0.3 and max(places) > 0.6


def test_a_shift_is_what_its_numbers_say():
    image = sharp_face(96)

    def draw(kind, level):
        return shift(kind, level, image, np.random.default_rng(1))[0].float()

    flat = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    noisy = shift("gaussian_noise", 2, flat, np.random.default_rng(0))[0].float()
    assert noisy.std().item() == pytest.approx(20.4, rel=0.03) and noisy.mean().item() == pytest.approx(128, abs=1)
    pale, means = draw("contrast", 5), image.float().mean((1, 2), keepdim=True)
    assert (pale - means - 0.12 * (image.float() - means)).abs().max() <= 0.5 + 1e-3
    assert torch.equal(draw("brightness", 1), (image.float() + 25.5).round().clamp(max=255))
    blocks = draw("pixelate", 5)  # 17 pixels along a side
    assert len(torch.unique_consecutive(blocks, dim=2)[0, 0]) == 17 == round(0.18 * 96)
    sharp = image[:, 20:21].float()
    soft = blur(image.float(), (1.6 * 96 / 112,) * 2)[:, 20:21]
    assert (draw("gaussian_blur", 3)[:, 20:21] - soft).abs().max() <= 0.5 + 1e-3 < 10 < (sharp - soft).abs().max()
    for kind in SHIFTS:
        loss = [(draw(kind, level) - image.float()).abs().mean().item() for level in range(1, 6)]
        assert loss == sorted(loss) and loss[0] > 0.2 and loss[4] > 1.5 * loss[0], kind


# ---------------------------------------------------------------- splits


def test_degraded_shards_keep_people_pairs_and_say_what_was_drawn(tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text(PAIRS)
    sharp = prepared(lfw_folder(tmp_path / "src"), tmp_path / "d/face_hq/lfw", "--pairs", tmp_path / "pairs.txt",
                     source="lfw")
    command = ["degrade", "--src", sharp.folder, "--severity", 0.9, "--min-severity", 0.4, "--seed", 3]
    run_here(*command, "--out", tmp_path / "d/face_lq/lfw", "--workers", 1)
    soft = Split(tmp_path / "d/face_lq/lfw")
    assert verify_split(soft.folder) == [] and soft.classes == sharp.classes and soft.size == sharp.size
    assert soft.labels.tolist() == sharp.labels.tolist() and soft.protocol == sharp.protocol
    assert soft.column("pairs").tolist() == sharp.column("pairs").tolist()
    for row in range(len(soft)):
        draws = soft.fields(row)["degradation"]
        assert 0.4 <= draws["severity"] <= 0.9 and draws["from"] == f"face_hq/lfw/{row:09d}"
        rng = np.random.default_rng((3, 2, row))  # what was drawn can be drawn again
        again, repeated = degrade(sharp.image(row), 0.4 + 0.5 * rng.random(), rng)
        assert draws == repeated | {"from": draws["from"]}
        assert (soft.image(row).float() - again.float()).abs().mean() < 3  # but for the JPEG
    run_here(*command, "--out", tmp_path / "e/face_lq/lfw", "--workers", 2)
    assert files_of(tmp_path / "d/face_lq") == files_of(tmp_path / "e/face_lq")


def test_shifts_of_objects_are_splits_out_of_distribution(demo_root, tmp_path):
    clean = Split(demo_root / "object/val")
    run_here("degrade", "--src", clean.folder, "--out", tmp_path / "object/val", "--shift", "contrast-5, pixelate",
             "--workers", 1)
    found = open_root(tmp_path)["object"]
    assert sorted(found) == ["val-contrast-5", *(f"val-pixelate-{level}" for level in range(1, 6))]
    for split in found.values():
        kind, severity = split.name.split("-")[1:]
        made = split.index["provenance"]
        assert made["source"] == "degrade" and made["options"] == {
            "src": "object/val", "src_plan": clean.index["provenance"]["plan"], "kind": kind, "severity": severity}
        assert split.protocol == clean.protocol | {"ood": True} and split.labels.tolist() == clean.labels.tolist()
        assert clean_of(split, [split, clean]) is clean  # whose score its retention is held against
    assert len({fingerprint(split) for split in found.values()}) == 6
    assert split.fields(3)["degradation"] == {"kind": kind, "severity": int(severity), "from": "object/val/000000003"}
    with pytest.raises(click.ClickException, match="already holds another split"):  # it was taken for complete
        run_here("degrade", "--src", clean.folder, "--out", found["val-contrast-5"].folder, "--workers", 1)


def test_degraded_training_splits_keep_the_identities_that_a_source_proves(demo_root, tmp_path):
    sharp = Split(demo_root / "face_hq/train")
    run_here("degrade", "--src", sharp.folder, "--out", tmp_path / "face_lq/copies", "--workers", 1)
    soft = Split(tmp_path / "face_lq/copies")
    assert soft.protocol is None and soft.classes == sharp.classes and soft.counts.tolist() == sharp.counts.tolist()
    for row in range(0, len(soft), 17):
        fields = soft.fields(row)
        assert fields["person"] == f"demo-{fields['identity']}" and fields["domain"] == "face_lq"
        origin = int(np.flatnonzero([sharp.jpeg(r)[0] == fields["degradation"]["from"][-9:]
                                     for r in range(len(sharp))])[0])
        assert sharp.classes[sharp.labels[origin]] == fields["identity"]
    assert soft.labels.tolist() != sharp.labels.tolist()  # a training split is written in its own random order


def test_the_ladder_is_drawn_from_sharp_to_poor(demo_root, tmp_path):
    for source in ([], ["--src", demo_root / "face_hq/test"]):
        run_here("degrade", "--ladder", tmp_path / "ladder.png", *source)
        sheet = np.asarray(Image.open(tmp_path / "ladder.png").convert("RGB")).astype(float)
        side = (sheet.shape[0] - 14) // 4 - 2
        assert sheet.shape == (14 + 4 * (side + 2), 6 * (side + 2), 3)
        columns = [sheet[14:, c * (side + 2) : c * (side + 2) + side] for c in range(6)]
        loss = [np.abs(column - columns[0]).mean() for column in columns]
        assert loss[0] == 0 < loss[1] < loss[3] < loss[5]


@pytest.mark.parametrize("arguments, words", [
    ([], "want --src SPLIT --out DATA/face_lq/<split>, or --ladder"), (["--out", "{d}/face_lq/x"], "want --src SPLIT"),
    (["--src", "{d}", "--out", "{d}/face_lq/x"], "no index.json"), (["--src", "{hq}", "--out", "{d}/x"], "want DATA/"),
    (["--src", "{hq}", "--out", "{hq}"], "is the same split as --src"), (["--ladder", "{d}/none/x.png"], "--ladder"),
    (["--src", "{hq}", "--out", "{d}/face_lq/x", "--min-severity", "1", "--severity", ".5"], "is above --severity 0.5"),
    (["--ladder", "{d}/x.none"], "cannot be written"), (["--severity", "2"], "--severity"),
    (["--src", "{hq}", "--out", "{d}/object/x", "--shift", "all"], "--shift makes test splits of objects"),
    (["--src", "{val}", "--out", "{d}/face_lq/x", "--shift", "all"], "--shift makes test splits of objects"),
    (["--src", "{val}", "--out", "{d}/object/x", "--shift", "contrast-6"], "--shift 'contrast-6': want all, or KIND"),
    (["--src", "{val}", "--out", "{d}/object/x", "--shift", "fog"], "kind of gaussian_noise, gaussian_blur, contrast"),
])  # fmt: skip
def test_bad_degradations(arguments, words, demo_root, tmp_path):
    places = {"d": tmp_path, "hq": demo_root / "face_hq/test", "val": demo_root / "object/val"}
    with pytest.raises(click.ClickException) as error:
        run_here("degrade", *[a.format(**places) for a in arguments])
    assert words in error.value.format_message() and "\n" not in error.value.format_message()
