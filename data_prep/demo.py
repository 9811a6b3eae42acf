"""The demo corpus: drawn faces, degraded faces of the same people, their bodies, and objects.

Shape defines an identity (of a face, a body, a silhouette); pose, expression, light, clothes, camera and texture vary
from picture to picture, so that only the identity helps. Every picture is a function of (seed, identity, shot), and a
BMP file: lossless and quick to write.
"""

import math
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw

from data_prep.degrade import degrade
from data_prep.format import Record, Source, encode

SIZE = 80  # pixels a side
FINE = 3  # factor of supersampling: pictures are drawn larger and reduced, for smooth edges
CAMERAS = 4
CIRCLE = np.stack([np.cos(t := np.linspace(0, 2 * np.pi, 48, endpoint=False)), np.sin(t)], 1)


# ---------------------------------------------------------------- drawing


class Canvas:
    """A picture of height x width pixels; x points right, y down, and the shorter side spans -1..1."""

    def __init__(self, height: int, width: int, background: np.ndarray) -> None:
        self.shape = (height * FINE, width * FINE)
        self.image = Image.fromarray(background.astype(np.uint8)).resize(self.shape[::-1])
        self.draw = ImageDraw.Draw(self.image)
        self.unit, self.turn, self.move = min(self.shape) / 2, np.eye(2), np.zeros(2)

    def place(self, angle: float, scale: float, move: tuple[float, float]) -> None:
        """Rotate, scale and move everything drawn afterwards."""
        c, s = math.cos(angle), math.sin(angle)
        self.turn, self.move = scale * np.array([[c, s], [-s, c]]), np.array(move)

    def pixels(self, points: np.ndarray) -> list[tuple[float, float]]:
        """Coordinates [n, 2] in pixels of the fine picture."""
        middle = np.array(self.shape[::-1]) / 2
        return [tuple(p) for p in (np.asarray(points) @ self.turn + self.move) * self.unit + middle]

    def polygon(self, points: np.ndarray, colour) -> None:
        """Fill a polygon with a colour of three numbers 0..1."""
        self.draw.polygon(self.pixels(points), fill=tuple(int(255 * min(max(c, 0), 1)) for c in colour))

    def ellipse(self, x: float, y: float, rx: float, ry: float, colour) -> None:
        """Fill an ellipse."""
        self.polygon(CIRCLE * [rx, ry] + [x, y], colour)

    def limb(self, a, b, width: float, colour) -> None:
        """Draw a bar with round ends from a to b."""
        a, b = np.asarray(a, float), np.asarray(b, float)
        along = (b - a) / max(np.linalg.norm(b - a), 1e-9)
        side = np.array([-along[1], along[0]]) * width
        self.polygon(np.array([a - side, b - side, b + side, a + side]), colour)
        for end in (a, b):
            self.ellipse(*end, width, width, colour)

    def pixels_out(self) -> np.ndarray:
        """The picture at its final size, float32 [H, W, 3] in 0..255."""
        return np.asarray(self.image.reduce(FINE), dtype=np.float32)


def smooth_noise(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth colour noise [height, width, 3] in 0..255, with `cells` cells across."""
    coarse = rng.uniform(0, 255, (max(cells * height // width, 2), cells, 3)).astype(np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)


def photograph(picture: np.ndarray, rng: np.random.Generator, cast: float, noise: float, light: float) -> np.ndarray:
    """Apply light from one side, a colour cast, exposure and sensor noise; returns uint8 [H, W, 3]."""
    h, w = picture.shape[:2]
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : h * 1j, -1 : 1 : w * 1j]
    shade = 1 + light * rng.uniform(0, 1) * (x * math.cos(angle) + y * math.sin(angle))
    picture = picture * shade[..., None] * rng.uniform(1 - cast, 1 + cast, 3) * rng.uniform(0.7, 1.2)
    return (picture + rng.normal(0, noise, picture.shape)).clip(0, 255).astype(np.uint8)


# ---------------------------------------------------------------- faces


def draw_face(seed: int, person: int, shot: int, severity: float = 0.0) -> bytes:
    """A face: the person determines shape and colours; the shot determines pose, expression, light and background."""
    p, r = np.random.default_rng((seed, 1, person)), np.random.default_rng((seed, 2, person, shot))
    width, jaw, tone = p.uniform(0.5, 0.78), p.uniform(0.45, 1.0), p.uniform(0.35, 0.95)
    skin = np.array([tone, tone * p.uniform(0.72, 0.86), tone * p.uniform(0.55, 0.75)])
    hair = np.array([1, p.uniform(0.6, 0.95), p.uniform(0.3, 0.9)]) * p.uniform(0.08, 0.75)
    iris = p.uniform(0.1, 0.7, 3)
    gap, eye_y, eye, lid = p.uniform(0.19, 0.36), p.uniform(-0.2, 0.08), p.uniform(0.07, 0.13), p.uniform(0.4, 0.9)
    brow, thick, tilt = p.uniform(0.1, 0.2), p.uniform(0.015, 0.05), p.uniform(-0.35, 0.35)
    nose, nose_w = p.uniform(0.18, 0.38), p.uniform(0.05, 0.16)
    mouth_y, mouth, lip = p.uniform(0.42, 0.62), p.uniform(0.14, 0.34), p.uniform(0.025, 0.08)
    fringe, sides, ears = p.uniform(-0.8, -0.35), p.uniform(-0.3, 0.9), p.uniform(0.02, 0.16)
    beard = p.uniform(0.3, 0.8) if p.random() < 0.25 else 0.0

    yaw, smile, opened = r.uniform(-0.16, 0.16), r.uniform(-0.1, 0.12), r.uniform(0.5, 1.2)
    c = Canvas(SIZE, SIZE, smooth_noise(r, SIZE, SIZE, int(r.integers(2, 6))))
    c.place(r.normal(0, 0.12), r.uniform(0.78, 0.98), (r.uniform(-0.12, 0.12), r.uniform(-0.12, 0.12)))
    dark = skin * 0.75
    c.polygon(np.array([[-0.9, 1.6], [-0.35, 0.8], [0.35, 0.8], [0.9, 1.6]]), r.uniform(0.1, 0.9, 3))  # clothes
    c.polygon(np.array([[-0.3, 1.1], [-0.3, 0.4], [0.3, 0.4], [0.3, 1.1]]), dark)
    back = CIRCLE * [width + 0.12, 0.98] + [0, -0.1]
    back[back[:, 1] > sides, 1] = sides
    c.polygon(back, hair)
    for side in (-1, 1):
        c.ellipse(side * (width + 0.02) - yaw * 0.3, eye_y + 0.15, ears, 0.16, dark)
    outline = CIRCLE * [width, 0.92]
    below = outline[:, 1] > 0
    outline[below, 0] *= 1 - (1 - jaw) * (outline[below, 1] / 0.92) ** 2
    c.polygon(outline, skin)
    if beard:
        chin = outline[outline[:, 1] > 0.3]
        c.polygon(chin, skin * (1 - beard) + hair * beard)
    top = CIRCLE * [width + 0.04, 0.95]
    top = top[top[:, 1] < fringe + 0.25]
    c.polygon(np.vstack([top, [[width * 0.5 + yaw, fringe], [-width * 0.5 + yaw, fringe - 0.05]]]), hair)
    for side in (-1, 1):
        x = side * gap + yaw * (1 - 0.3 * side)
        c.ellipse(x, eye_y, eye * 1.3, eye * lid * opened, (0.95, 0.95, 0.95))
        c.ellipse(x + yaw * 0.2, eye_y, eye * 0.6, min(eye * 0.6, eye * lid * opened), iris)
        c.ellipse(x + yaw * 0.2, eye_y, eye * 0.25, eye * 0.25, (0.03, 0.03, 0.03))
        lift = tilt * eye * 1.5
        inner, outer = (x - side * eye * 1.4, eye_y - brow + lift), (x + side * eye * 1.4, eye_y - brow - lift)
        c.limb(inner, outer, thick, hair * 0.8)
    tip = eye_y + nose
    c.polygon(np.array([[yaw, eye_y], [1.5 * yaw - nose_w, tip], [1.5 * yaw + nose_w, tip]]), dark)
    arc = np.linspace(-1, 1, 12)
    curve = np.stack([arc * mouth + yaw * 1.2, mouth_y - smile * arc**2 + smile / 2], 1)
    lips = np.array([0, lip])
    c.polygon(np.vstack([curve - lips, (curve + lips * opened)[::-1]]), skin * [0.85, 0.5, 0.5])
    if r.random() < 0.12:  # glasses do not belong to the identity
        for side in (-1, 1):
            x = side * gap + yaw
            ring = np.vstack([CIRCLE, CIRCLE[:1]]) * [0.17, 0.15] + [x, eye_y]
            c.draw.line(c.pixels(ring), fill=(20, 20, 20), width=5)
    picture = photograph(c.pixels_out(), r, cast=0.3, noise=4, light=0.6)
    if severity:
        sharp, rng = torch.from_numpy(picture).permute(2, 0, 1), np.random.default_rng((seed, 3, person, shot))
        picture = degrade(sharp, severity, rng)[0].permute(1, 2, 0).numpy()
    return encode(Image.fromarray(picture), "BMP")


# ---------------------------------------------------------------- bodies


def draw_body(seed: int, person: int, shot: int, camera: int) -> bytes:
    """A standing person: the person determines the build, the shot clothes and pose, the camera the tint."""
    p, r = np.random.default_rng((seed, 4, person)), np.random.default_rng((seed, 5, person, shot))
    v = np.random.default_rng((seed, 6, camera))
    head, neck = p.uniform(0.12, 0.24), p.uniform(0.0, 0.12)
    shoulder, waist, hip = p.uniform(0.2, 0.55), p.uniform(0.14, 0.5), p.uniform(0.18, 0.5)
    trunk, legs, arms = p.uniform(0.5, 0.9), p.uniform(0.6, 1.2), p.uniform(0.5, 1.1)
    leg_w, arm_w, skin = p.uniform(0.06, 0.19), p.uniform(0.04, 0.13), p.uniform(0.3, 0.95)
    skin = skin * np.array([1, p.uniform(0.65, 0.9), p.uniform(0.4, 0.85)])
    hair = p.uniform(0.05, 0.9) * np.array([1, p.uniform(0.5, 1), p.uniform(0.2, 1)])
    long_hair = p.uniform(0, 2.2) if p.random() < 0.5 else 0.0
    tall = head * 2 + neck + trunk + legs

    H, W = SIZE, 3 * SIZE // 5
    cloud = 40 + smooth_noise(r, H, W, 3) * 0.15 + smooth_noise(v, H, W, 3) * 0.1
    c = Canvas(H, W, cloud)
    turn = r.uniform(0.8, 1.0)  # a body turned sideways is narrower
    zoom = 1.15 * v.uniform(0.92, 1.0) * r.uniform(0.94, 1.04)
    c.place(r.normal(0, 0.04), zoom, (r.uniform(-0.12, 0.12), r.uniform(-0.15, 0.15) + 0.1))
    shirt, trousers, shoes = (r.uniform(0.2, 0.8) + r.uniform(-0.12, 0.12, 3) for _ in range(3))
    y = -tall / 2
    y_neck = y + 2 * head
    y_shoulder, y_hip = y_neck + neck, y_neck + neck + trunk
    stride, swing, bent, shorts = r.uniform(0, 0.3), r.uniform(-0.4, 0.4), r.uniform(-0.1, 0.2), r.random() < 0.5
    c.ellipse(0, y + head * (0.8 + long_hair / 2), head * 1.05 * turn, head * (0.9 + long_hair / 2), hair)
    for side in (-1, 1):  # legs behind, then trunk, arms and head
        foot = (side * (hip * 0.5 + stride * 0.5) * turn, y_hip + legs)
        top = np.array([side * hip * 0.55 * turn, y_hip])
        c.limb(top, foot, leg_w, skin if shorts else trousers)
        c.limb(top, top + 0.45 * (foot - top), leg_w * 1.1, trousers)
        c.limb(foot, (foot[0] + 0.09 * side, foot[1]), leg_w * 0.8, shoes)
    ys = (y_shoulder, y_shoulder + trunk * 0.6, y_hip + 0.05)
    half = np.array([shoulder, waist, hip]) * turn
    trunk_shape = np.array([[-half[0], ys[0]], [half[0], ys[0]], [half[1], ys[1]], [half[2], ys[2]], [-half[2], ys[2]],
                            [-half[1], ys[1]]])
    c.polygon(trunk_shape, shirt)
    if r.random() < 0.5:  # a stripe or a coat: clothes change, the build does not
        level = r.uniform(0.1, 0.7)
        band = [np.interp(level + d, [0, 0.6, 1], half) for d in (0, 0.2)]
        y0, y1 = (y_shoulder + (level + d) * trunk for d in (0, 0.2))
        c.polygon(np.array([[-band[0], y0], [band[0], y0], [band[1], y1], [-band[1], y1]]), r.uniform(0, 1, 3))
    sleeve = r.random() < 0.3
    for side in (-1, 1):
        a = (side * shoulder * turn, y_shoulder + arm_w)
        angle = side * (0.12 + abs(swing) * 0.5) + swing * 0.4
        elbow = (a[0] + math.sin(angle) * arms * 0.5, a[1] + math.cos(angle) * arms * 0.5)
        hand = (elbow[0] + math.sin(angle - side * bent) * arms * 0.5, elbow[1] + math.cos(angle) * arms * 0.5)
        c.limb(a, elbow, arm_w, shirt)
        c.limb(elbow, hand, arm_w * 0.85, shirt if sleeve else skin)
    c.limb((0, y_neck - 0.05), (0, y_shoulder), head * 0.45, skin * 0.9)
    c.ellipse(0, y + head, head * 0.85 * turn, head * 1.05, skin)
    c.ellipse(0, y + head * 0.55, head * 0.9 * turn, head * 0.7, hair)
    picture = c.pixels_out() * v.uniform(0.92, 1.08, 3)
    return encode(Image.fromarray(photograph(picture, r, cast=0.06, noise=4, light=0.2)), "BMP")


# ---------------------------------------------------------------- objects


def texture(rng: np.random.Generator, kind: int, f: float) -> np.ndarray:
    """A pattern [SIZE, SIZE, 1] in 0..1 with f waves across: stripes, checks, dots or clouds."""
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    angle = rng.uniform(0, np.pi)
    u, w = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    a, b = np.sin(2 * np.pi * f * u + rng.uniform(0, 6)), np.sin(2 * np.pi * f * w + rng.uniform(0, 6))
    clouds = smooth_noise(rng, SIZE, SIZE, 2 * round(f))[..., 0] / 127 - 1
    wave = [a, np.sign(a * b), np.sign(a * b - 0.5), clouds][kind]
    return 0.5 + 0.5 * wave[..., None]


def draw_object(seed: int, kind: int, shot: int, shifted: bool = False) -> bytes:
    """A textured silhouette: the class determines outline, texture and palette; the shot, light and background.

    `shifted`: a collage with the outlines and palettes of the classes, but other textures, on ruled paper.
    """
    p, r = np.random.default_rng((seed, 7, kind)), np.random.default_rng((seed, 8 + shifted, kind, shot))
    t = np.linspace(0, 2 * np.pi, 120, endpoint=False)
    orders = np.arange(1, 7)
    size = p.uniform(0, 0.42, 6) / orders**0.3 * (p.random(6) < 0.6)
    size = size + r.normal(0, 0.035, 6)  # no two shots are alike
    phase = p.uniform(0, 2 * np.pi, 6) + r.normal(0, 0.12, 6)
    radius = 1 + (size[:, None] * np.cos(orders[:, None] * t + phase[:, None])).sum(0)
    radius = np.maximum(radius, 0.12)
    shape = np.stack([np.cos(t), np.sin(t) * p.uniform(0.5, 1.0)], 1) * radius[:, None]
    shape /= np.abs(shape).max()
    hole, pattern, waves, palette = p.random() < 0.4, int(p.integers(4)), p.uniform(3, 12), p.uniform(0, 255, (2, 3))
    where = p.uniform(-0.25, 0.25, 2)

    c = Canvas(SIZE, SIZE, np.zeros((2, 2, 3)))
    c.place(r.normal(0, 0.25), r.uniform(0.6, 0.95), (r.uniform(-0.18, 0.18), r.uniform(-0.18, 0.18)))
    c.polygon(shape, (1, 1, 1))
    if hole:
        c.ellipse(*where, 0.2, 0.2, (0, 0, 0))
    mask = c.pixels_out() / 255
    if r.random() < 0.2:  # another texture and other colours, so that the outline counts
        pattern, waves, palette = int(r.integers(4)), r.uniform(3, 12), r.uniform(0, 255, (2, 3))
    if shifted:
        pattern, waves = (pattern + int(r.integers(1, 4))) % 4, r.uniform(3, 12)
    one, two = palette + r.normal(0, 25, (2, 3))
    front = one + (two - one) * texture(r, pattern, waves)
    if shifted:
        behind = r.uniform(170, 235) - 60 * (texture(r, 0, r.uniform(12, 20)) > 0.8)
    else:
        behind = 70 + 0.4 * smooth_noise(r, SIZE, SIZE, int(r.integers(2, 7)))
    picture = photograph(mask * front + (1 - mask) * behind, r, cast=0.2, noise=5, light=0.4)
    return encode(Image.fromarray(picture), "BMP")


# ---------------------------------------------------------------- the corpus


def verification_pairs(shots: int, people: int, seed: int) -> list[tuple]:
    """Pairs (left, right, same, fold) of records ordered by person, 200 in each of ten folds, which share no person."""
    rng, pairs = np.random.default_rng((seed, 10)), []
    for fold in range(10):
        of_fold = np.arange(people)[fold::10] if people >= 20 else np.arange(people)
        for same in [True] * 100 + [False] * 100:
            a, b = rng.choice(of_fold, 2, replace=False)
            x, y = rng.choice(shots, 2, replace=False)
            pairs.append((int(a * shots + x), int((a if same else b) * shots + y), int(same), fold))
    return pairs


def demo_splits(seed: int, scale: float) -> dict[str, tuple[Source, bool]]:
    """The splits of the corpus: "domain/split" -> (source, whether it is a training split).

    `scale`: factor on the number of people and classes.
    """
    train_people, test_people, kinds = (max(round(n * scale), 4) for n in (240, 80, 24))

    def faces(people: range, shots: range, severity: float) -> list[Record]:
        return [Record(partial(draw_face, seed, i, j, severity), f"face {i} shot {j}", f"person{i:04d}",
                       person=f"demo-person{i:04d}") for i in people for j in shots]

    def bodies(people: range, shots: range, query: int | None) -> list[Record]:
        return [Record(partial(draw_body, seed, i, j, j % CAMERAS), f"body {i} shot {j}", f"person{i:04d}",
                       person=f"demo-person{i:04d}", camera=j % CAMERAS, clothes=j,
                       role=None if query is None else int(j >= query)) for i in people for j in shots]

    def objects(shots: range, shifted: bool) -> list[Record]:
        return [Record(partial(draw_object, seed, i, j, shifted), f"object {i} shot {j}", f"shape{i:02d}")
                for i in range(kinds) for j in shots]

    learn, test = range(train_people), range(train_people, train_people + test_people)
    pairs = verification_pairs(8, test_people, seed)
    verification = {"name": "verification", "folds": 10}
    classification = {"name": "classification", "reference": "train"}
    return {
        "object/train": (Source(objects(range(100), False)), True),
        "object/val": (Source(objects(range(100, 130), False), classification), False),
        "object/collage": (Source(objects(range(30), True), classification | {"ood": True}), False),
        "face_hq/train": (Source(faces(learn, range(10), 0.0)), True),
        "face_hq/test": (Source(faces(test, range(8), 0.0), verification, pairs), False),
        "face_lq/train": (Source(faces(learn, range(10, 20), 0.7)), True),
        # not the shots of face_hq/test: a blurred probe must find the person, not the same picture
        "face_lq/test": (Source(faces(test, range(8, 16), 0.7), verification, pairs), False),
        "body/train": (Source(bodies(learn, range(12), None)), True),
        "body/test": (Source(bodies(test, range(12), 4), {"name": "reid"}), False),
    }
