"""Draws a person of the procedural benchmark as RGB, near-infrared and thermal camera see them.

One label map holds which part of the scene each pixel shows. Each modality looks the labels up in
its own palette (colour, reflectance, temperature), adds its own pattern, and degrades the result
in its own way. So what only one modality sees cannot leak into another.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from next.data.demo_people import (
    COLOURS,
    HAIR_COLOURS,
    LOWER_HEAT,
    UPPER_HEAT,
    Difficulty,
    Person,
    Shot,
    random_person,
    stream,
)

_SUPERSAMPLING = 2
_CHANNELS = 5
"""Red, green, blue, near-infrared reflectance, temperature."""
_RGB, _NIR, _TIR = slice(0, 3), 3, 4

Point = tuple[float, float]
"""Right and down, in units of the frame's height."""


class Part(IntEnum):
    """What a pixel shows; a passer-by's parts are numbered from ``Part.PASSER_BY`` on."""

    BACKGROUND = 0
    UPPER = 1
    SLEEVE = 2
    LOWER = 3
    FAR_LEG = 4
    SKIN = 5
    FACE = 6
    HAIR = 7
    SHOES = 8
    BAG = 9
    BAG_TRIM = 10
    HAT = 11
    OBJECT = 12
    GLASSES = 13
    FAR_SLEEVE = 14
    PASSER_BY = 16
    OBSTACLE = 32
    OBSTACLE_TRIM = 33
    CLUTTER = 34


def draw(
    who: Person, where: Shot, image_size: tuple[int, int], difficulty: Difficulty
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One sample as each modality sees it.

    Args:
        who: the person.
        where: the circumstances; ``where.key`` seeds every random number.
        image_size: height and width in pixels.
        difficulty: noise, blur and the other knobs.

    Returns:
        RGB, NIR, TIR: uint8 ``[H, W, 3]``, ``[H, W]``, ``[H, W]``.
    """
    height, width = (side * _SUPERSAMPLING for side in image_size)
    rng = stream(*where.key, 1)
    canvas = _Canvas(height, width)
    palette = np.zeros((64, _CHANNELS), dtype=np.float32)
    palette[: len(_palette(who))] = _palette(who)

    _draw_clutter(canvas, palette, rng, difficulty)
    frame = _Frame(who, where, width / height)
    _draw_person(canvas, who, where, frame, 0)
    _draw_obstacle(canvas, palette, where, frame, rng)

    labels = canvas.labels()
    scene = palette[labels]
    _add_patterns(scene, labels, who, frame)
    backdrop = _backdrop(where.key[0], where.camera, height, width, difficulty)
    top = int(rng.integers(backdrop.shape[0] - height + 1))
    left = int(rng.integers(backdrop.shape[1] - width + 1))
    behind = labels == Part.BACKGROUND
    scene[behind] = backdrop[top : top + height, left : left + width][behind]
    folds = _smooth_noise(rng, height, width, cells=12)[..., None]
    scene[..., :_TIR] *= np.where(behind[..., None], 1.0, 1.0 + 0.22 * folds)

    seen = scene.reshape(
        image_size[0], _SUPERSAMPLING, image_size[1], _SUPERSAMPLING, _CHANNELS
    ).mean(axis=(1, 3))
    person_middle = (frame.top + 0.35 * frame.size, frame.centre * height / width)
    return (
        _see_rgb(seen[..., _RGB], where, difficulty),
        _see_nir(seen[..., _NIR], where, person_middle, difficulty),
        _see_tir(seen[..., _TIR], where, difficulty),
    )


class _Canvas:
    """A label map with drawing in units of its height."""

    def __init__(self, height: int, width: int) -> None:
        self._height = height
        self._image = Image.new("L", (width, height), int(Part.BACKGROUND))
        self._draw = ImageDraw.Draw(self._image)

    def labels(self) -> np.ndarray:
        return np.asarray(self._image)

    def polygon(self, points: Sequence[Point], label: int) -> None:
        self._draw.polygon([(x * self._height, y * self._height) for x, y in points], fill=label)

    def ellipse(self, centre: Point, radii: Point, label: int) -> None:
        (x, y), (across, down) = centre, radii
        box = (x - across, y - down, x + across, y + down)
        self._draw.ellipse([side * self._height for side in box], fill=label)

    def ring(self, centre: Point, radius: float, width: float, label: int) -> None:
        x, y = centre
        box = [side * self._height for side in (x - radius, y - radius, x + radius, y + radius)]
        self._draw.ellipse(box, outline=label, width=max(1, round(width * self._height)))

    def box(self, left_top: Point, right_bottom: Point, label: int) -> None:
        (left, top), (right, bottom) = left_top, right_bottom
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], label)

    def limb(self, start: Point, end: Point, radii: Point, label: int) -> None:
        """A tapered stroke with round ends."""
        along = np.subtract(end, start)
        length = float(np.hypot(*along)) or 1e-6
        across = np.array([-along[1], along[0]]) / length
        corners = [
            np.add(start, across * radii[0]), np.add(end, across * radii[1]),
            np.subtract(end, across * radii[1]), np.subtract(start, across * radii[0]),
        ]  # fmt: skip
        self.polygon([(float(x), float(y)) for x, y in corners], label)
        self.ellipse(start, (radii[0], radii[0]), label)
        self.ellipse(end, (radii[1], radii[1]), label)


class _Frame:
    """Where a person stands in the frame and how large, in units of the frame's height."""

    def __init__(self, who: Person, where: Shot, aspect: float) -> None:
        self.size = 0.88 * who.height * where.scale
        self.centre = aspect / 2 + where.shift[0]
        self.top = 0.955 + where.shift[1] - self.size
        self.girth = {"slim": 0.84, "medium": 1.0, "broad": 1.24}[who.build]
        self.side = -1.0 if where.mirrored else 1.0

    def at(self, across: float, down: float) -> Point:
        """A point of the body: across from its axis (towards where it faces), down from its top."""
        return self.centre + self.side * across * self.size, self.top + down * self.size


def _palette(who: Person) -> np.ndarray:
    """Red, green, blue, NIR reflectance and temperature of each part, float32 ``[15, 5]``."""
    cloth, trousers = COLOURS[who.upper_colour], COLOURS[who.lower_colour]
    bag, hair = COLOURS[who.bag_colour], HAIR_COLOURS[who.hair_colour]
    skin = tuple(who.skin * tone for tone in (1.0, 0.78, 0.64))
    upper_heat = UPPER_HEAT[who.upper] + who.upper_leak
    lower_heat = LOWER_HEAT[who.lower] + who.lower_leak
    table = np.zeros((15, _CHANNELS), dtype=np.float32)

    def paint(part: Part, colour: Sequence[float], nir: float, heat: float, shade: float) -> None:
        table[part] = (*(shade * tone for tone in colour), shade * nir, heat)

    paint(Part.UPPER, cloth, who.upper_albedo, upper_heat, 1.0)
    paint(Part.SLEEVE, cloth, who.upper_albedo, upper_heat - 0.04, 0.86)
    paint(Part.FAR_SLEEVE, cloth, who.upper_albedo, upper_heat - 0.06, 0.7)
    paint(Part.LOWER, trousers, who.lower_albedo, lower_heat, 1.0)
    paint(Part.FAR_LEG, trousers, who.lower_albedo, lower_heat - 0.03, 0.75)
    paint(Part.SKIN, skin, 0.66, 0.92, 0.95)
    paint(Part.FACE, skin, 0.70, 1.0, 1.0)
    paint(Part.HAIR, hair, 0.30, 0.50, 1.0)
    paint(Part.SHOES, COLOURS[who.shoe_colour], who.shoe_albedo, 0.25, 1.0)
    paint(Part.BAG, bag, who.bag_albedo, 0.10, 1.0)
    paint(Part.BAG_TRIM, bag, who.bag_albedo, 0.14, 0.6)
    paint(Part.HAT, bag, 0.35, 0.42, 0.8)
    paint(Part.OBJECT, (0.15, 0.15, 0.18), 0.9, who.object_heat, 1.0)
    paint(Part.GLASSES, (0.05, 0.05, 0.06), 0.1, 0.2, 1.0)
    return table


def _draw_person(canvas: _Canvas, who: Person, where: Shot, frame: _Frame, offset: int) -> None:
    """The whole figure, back to front; ``offset`` shifts the labels (a passer-by)."""
    seen_from_side = where.view == "side"
    swing = np.sin(where.phase)
    shoulder = (0.075 if seen_from_side else 0.125) * frame.girth
    if who.gender == "female":
        shoulder *= 0.92
    arms = _arms(shoulder, swing, seen_from_side)
    if where.view != "back" and who.carries == "backpack":
        _draw_backpack(canvas, where, frame, offset)
    _draw_arm(canvas, who, frame, arms[0], Part.FAR_SLEEVE + offset, offset)
    _draw_legs(canvas, who, frame, where, offset)
    _draw_torso(canvas, who, frame, shoulder, swing, offset)
    if where.view == "back" and who.carries == "backpack":
        _draw_backpack(canvas, where, frame, offset)
    _draw_head(canvas, who, where, frame, offset)
    _draw_carried(canvas, who, frame, arms[1][2], offset)
    _draw_arm(canvas, who, frame, arms[1], Part.SLEEVE + offset, offset)


Arm = tuple[Point, Point, Point]
"""Shoulder, elbow, hand, in the body's own units."""


def _arms(shoulder: float, swing: float, seen_from_side: bool) -> tuple[Arm, Arm]:
    """The far and the near arm."""
    if seen_from_side:
        far, near = 0.10 * swing, -0.10 * swing
        return (
            ((0.0, 0.205), (far, 0.34), (1.9 * far + 0.05, 0.46)),
            ((0.0, 0.205), (near, 0.34), (1.9 * near + 0.05, 0.46)),
        )
    reach = shoulder + 0.012
    return (
        ((-reach, 0.20), (-reach - 0.030, 0.34), (-reach - 0.016, 0.465 + 0.02 * swing)),
        ((reach, 0.20), (reach + 0.030, 0.34), (reach + 0.016, 0.465 - 0.02 * swing)),
    )


def _draw_arm(
    canvas: _Canvas, who: Person, frame: _Frame, arm: Arm, sleeve: int, offset: int
) -> None:
    thick = 0.034 * frame.size * (0.5 + 0.5 * frame.girth)
    if who.upper in ("jacket", "coat", "hoodie", "sweater"):
        thick *= 1.18
    first, elbow, hand = (frame.at(*joint) for joint in arm)
    bare = who.upper in ("t-shirt", "dress")
    lower_arm = Part.SKIN + offset if bare else sleeve
    canvas.limb(elbow, hand, (0.82 * thick, 0.68 * thick), lower_arm)
    canvas.limb(first, elbow, (thick, 0.9 * thick), sleeve)
    canvas.ellipse(hand, (0.72 * thick, 0.86 * thick), Part.SKIN + offset)


def _draw_legs(canvas: _Canvas, who: Person, frame: _Frame, where: Shot, offset: int) -> None:
    thigh, shin, hip = 0.235, 0.225, 0.51
    thick = 0.052 * frame.size * (0.45 + 0.55 * frame.girth)
    bare_shin = who.lower in ("shorts", "skirt", "dress")
    bare_thigh = who.lower in ("skirt", "dress")
    for far in (True, False):
        swing = float(np.sin(where.phase + (np.pi if far else 0.0)))
        if where.view == "side":
            bend = max(0.0, float(np.cos(where.phase + (np.pi if far else 0.0)))) * 0.55
            start, angle = 0.0, 0.44 * swing
            toe = 0.055
        else:
            bend, start, angle, toe = 0.0, (-0.052 if far else 0.052) * frame.girth, 0.03, 0.0
            thigh, shin = 0.235, 0.225 - 0.018 * max(0.0, swing)
            angle = -0.05 if far else 0.05
        knee = (start + thigh * np.sin(angle), hip + thigh * np.cos(angle))
        ankle = (knee[0] + shin * np.sin(angle - bend), knee[1] + shin * np.cos(angle - bend))
        cloth = (Part.FAR_LEG if far else Part.LOWER) + offset
        skin = Part.SKIN + offset
        points = [frame.at(*joint) for joint in ((start, hip), knee, ankle)]
        wide = 0.9 if who.lower == "jeans" else 1.0
        shin_width = 0.55 if bare_shin else 0.74 * wide
        canvas.limb(
            points[1], points[2], (0.8 * wide * thick, shin_width * thick),
            skin if bare_shin else cloth,
        )  # fmt: skip
        canvas.limb(points[0], points[1], (thick, 0.84 * thick), skin if bare_thigh else cloth)
        _draw_shoe(canvas, who, frame, ankle, toe, offset)


def _draw_shoe(
    canvas: _Canvas, who: Person, frame: _Frame, ankle: Point, toe: float, offset: int
) -> None:
    foot = frame.at(ankle[0] + 0.45 * toe, ankle[1] + 0.018)
    radii = ((0.034 + 0.5 * toe) * frame.size, (0.020 + 0.2 * (toe == 0) * 0.06) * frame.size)
    label = Part.SHOES + offset
    canvas.ellipse(foot, radii, label)
    if who.shoes == "boots":
        top = frame.at(ankle[0], ankle[1] - 0.07)
        canvas.limb(top, frame.at(*ankle), (0.036 * frame.size, 0.034 * frame.size), label)


def _draw_torso(
    canvas: _Canvas, who: Person, frame: _Frame, shoulder: float, swing: float, offset: int
) -> None:
    hip = {"female": 0.92, "male": 0.80}[who.gender] * shoulder
    hem = {"coat": 0.66, "jacket": 0.53, "hoodie": 0.53}.get(who.upper, 0.515)
    flare = 1.15 if who.upper == "coat" else 1.0
    if who.lower == "skirt":
        _draw_skirt(canvas, frame, hip, (0.47, 0.70), Part.LOWER + offset)
    if who.upper == "dress":
        _draw_skirt(canvas, frame, hip, (0.42, 0.72), Part.UPPER + offset)
    waist = (0.88 if who.gender == "female" else 0.95) * hip
    outline = [
        (-0.3 * shoulder, 0.150), (0.3 * shoulder, 0.150), (shoulder, 0.185), (waist, 0.40),
        (flare * hip, hem), (-flare * hip, hem), (-waist, 0.40), (-shoulder, 0.185),
    ]  # fmt: skip
    lean = 0.012 * swing
    points = [frame.at(x + lean * (0.5 - y), y) for x, y in outline]
    canvas.polygon(points, Part.UPPER + offset)
    if who.upper == "hoodie":
        canvas.ellipse(
            frame.at(0.0, 0.165), (0.07 * frame.size, 0.028 * frame.size), Part.SLEEVE + offset
        )


def _draw_skirt(
    canvas: _Canvas, frame: _Frame, hip: float, span: tuple[float, float], label: int
) -> None:
    top, bottom = span
    outline = [(-hip, top), (hip, top), (1.45 * hip + 0.02, bottom), (-1.45 * hip - 0.02, bottom)]
    canvas.polygon([frame.at(x, y) for x, y in outline], label)


def _draw_head(canvas: _Canvas, who: Person, where: Shot, frame: _Frame, offset: int) -> None:
    skin, hair = Part.FACE + offset, Part.HAIR + offset
    across, down = 0.052 * frame.size, 0.068 * frame.size
    canvas.limb(frame.at(0, 0.11), frame.at(0, 0.16), (0.026 * frame.size, 0.03 * frame.size), skin)
    length = {"short": 0.115, "medium": 0.165, "long": 0.27}[who.hair]
    if where.view == "front":
        if who.hair != "short":
            for side in (-0.045, 0.045):
                canvas.limb(
                    frame.at(side, 0.06), frame.at(1.1 * side, length),
                    (0.022 * frame.size, 0.018 * frame.size), hair,
                )  # fmt: skip
        canvas.ellipse(frame.at(0, 0.075), (across, down), hair)
        canvas.ellipse(frame.at(0, 0.088), (0.86 * across, 0.76 * down), skin)
        if who.glasses:
            for side in (-0.02, 0.02):
                canvas.ellipse(
                    frame.at(side, 0.078), (0.017 * frame.size, 0.012 * frame.size),
                    Part.GLASSES + offset,
                )  # fmt: skip
    elif where.view == "side":
        canvas.ellipse(frame.at(0.006, 0.075), (across, down), skin)
        canvas.ellipse(frame.at(-0.012, 0.062), (across, 0.8 * down), hair)
        if who.hair != "short":
            canvas.limb(
                frame.at(-0.034, 0.07), frame.at(-0.045, length),
                (0.030 * frame.size, 0.024 * frame.size), hair,
            )  # fmt: skip
        if who.glasses:
            canvas.limb(
                frame.at(0.01, 0.078), frame.at(0.056, 0.078),
                (0.009 * frame.size, 0.009 * frame.size), Part.GLASSES + offset,
            )  # fmt: skip
    else:
        canvas.ellipse(frame.at(0, 0.075), (across, down), hair)
        if who.hair != "short":
            canvas.limb(frame.at(0, 0.08), frame.at(0, length), (across, 0.85 * across), hair)
    if who.hat != "none":
        canvas.ellipse(frame.at(0, 0.035), (1.08 * across, 0.62 * down), Part.HAT + offset)
        if who.hat == "cap" and where.view != "back":
            tip = 0.095 if where.view == "side" else 0.03
            canvas.limb(
                frame.at(-tip if where.view == "front" else 0.02, 0.055), frame.at(tip, 0.055),
                (0.012 * frame.size, 0.012 * frame.size), Part.HAT + offset,
            )  # fmt: skip


def _draw_backpack(canvas: _Canvas, where: Shot, frame: _Frame, offset: int) -> None:
    size = frame.size
    bag, trim = Part.BAG + offset, Part.BAG_TRIM + offset
    if where.view == "back":
        canvas.limb(frame.at(0, 0.25), frame.at(0, 0.39), (0.082 * size, 0.09 * size), bag)
        canvas.box(frame.at(-0.055, 0.36), frame.at(0.055, 0.41), trim)
    elif where.view == "side":
        canvas.limb(frame.at(-0.09, 0.25), frame.at(-0.10, 0.38), (0.06 * size, 0.07 * size), bag)
    else:
        canvas.limb(frame.at(0, 0.20), frame.at(0, 0.40), (0.15 * size, 0.135 * size), bag)


def _draw_carried(canvas: _Canvas, who: Person, frame: _Frame, hand: Point, offset: int) -> None:
    size = frame.size
    x, y = hand
    bag, trim, thing = (int(part) + offset for part in (Part.BAG, Part.BAG_TRIM, Part.OBJECT))
    match who.carries:
        case "handbag":
            canvas.limb(frame.at(x, y), frame.at(x, y + 0.06), (0.012 * size, 0.012 * size), trim)
            canvas.box(frame.at(x - 0.065, y + 0.05), frame.at(x + 0.065, y + 0.15), bag)
        case "suitcase":
            foot = frame.at(x - 0.07, 0.97)
            canvas.limb(frame.at(x, y), foot, (0.010 * size, 0.010 * size), trim)
            canvas.box(frame.at(x - 0.15, 0.68), frame.at(x + 0.01, 0.97), bag)
        case "phone":
            canvas.box(frame.at(x - 0.014, y - 0.05), frame.at(x + 0.022, y + 0.03), thing)
        case "bottle":
            canvas.limb(
                frame.at(x + 0.01, y - 0.03), frame.at(x + 0.01, y + 0.06),
                (0.018 * size, 0.024 * size), thing,
            )  # fmt: skip


def _draw_clutter(
    canvas: _Canvas, palette: np.ndarray, rng: np.random.Generator, difficulty: Difficulty
) -> None:
    for number in range(int(rng.integers(difficulty.clutter + 1))):
        label = Part.CLUTTER + number % (len(palette) - Part.CLUTTER)
        palette[label] = (*rng.uniform(0.1, 0.9, 3), rng.uniform(0.1, 0.7), rng.uniform(-0.1, 0.4))
        x, y = float(rng.uniform(-0.05, 0.55)), float(rng.uniform(0.3, 0.95))
        across, down = float(rng.uniform(0.03, 0.12)), float(rng.uniform(0.05, 0.3))
        if rng.random() < 0.5:
            canvas.ellipse((x, y), (across, down), label)
        else:
            canvas.box((x - across, y - down), (x + across, y + down), label)


def _draw_obstacle(
    canvas: _Canvas, palette: np.ndarray, where: Shot, frame: _Frame, rng: np.random.Generator
) -> None:
    colour, trim = rng.uniform(0.1, 0.9, (2, 3))
    palette[Part.OBSTACLE] = (*colour, rng.uniform(0.15, 0.8), rng.uniform(-0.1, 0.2))
    palette[Part.OBSTACLE_TRIM] = (*trim, rng.uniform(0.15, 0.8), rng.uniform(-0.1, 0.2))
    x = frame.centre + float(rng.uniform(-0.12, 0.12))
    match where.occlusion:
        case "box":
            top, half = float(rng.uniform(0.58, 0.72)), float(rng.uniform(0.10, 0.20))
            canvas.box((x - half, top), (x + half, 1.0), Part.OBSTACLE)
            canvas.box((x - half, top + 0.05), (x + half, top + 0.08), Part.OBSTACLE_TRIM)
        case "bicycle":
            for wheel in (x - 0.15, x + 0.15):
                canvas.ring((wheel, 0.86), 0.115, 0.016, Part.OBSTACLE)
            joints = ((x - 0.15, 0.86), (x - 0.06, 0.70), (x + 0.10, 0.70), (x + 0.15, 0.86))
            for start, end in itertools.pairwise(joints):
                canvas.limb(start, end, (0.013, 0.013), Part.OBSTACLE)
            canvas.limb((x, 0.86), (x - 0.06, 0.70), (0.013, 0.013), Part.OBSTACLE)
            canvas.box((x + 0.02, 0.62), (x + 0.15, 0.71), Part.OBSTACLE_TRIM)
        case "person":
            passer_by = random_person(rng)
            beside = _Frame(passer_by, where, 2 * frame.centre)
            beside.centre += (0.17 if rng.random() < 0.5 else -0.17) * frame.size / 0.8
            colours = _palette(passer_by)
            palette[Part.PASSER_BY : Part.PASSER_BY + len(colours)] = colours
            _draw_person(canvas, passer_by, where, beside, Part.PASSER_BY)


def _add_patterns(scene: np.ndarray, labels: np.ndarray, who: Person, frame: _Frame) -> None:
    """Print (RGB), weave (NIR) and lining (TIR) of the upper garment, in place."""
    rows, columns = np.nonzero((labels == Part.UPPER) | (labels == Part.SLEEVE))
    if len(rows) == 0:
        return
    height = labels.shape[0]
    across = ((columns / height - frame.centre) / frame.size).astype(np.float32)
    down = ((rows / height - frame.top) / frame.size).astype(np.float32)
    printed = _pattern(who.upper_print, across, down)
    shade = np.where(labels[rows, columns] == Part.SLEEVE, 0.86, 1.0)
    second = np.asarray(COLOURS[who.print_colour], dtype=np.float32)
    scene[rows[printed], columns[printed], _RGB] = second * shade[printed, None]
    woven = _pattern(who.upper_weave, across, down)
    other = who.upper_albedo + (0.34 if who.upper_albedo < 0.5 else -0.34)
    scene[rows[woven], columns[woven], _NIR] = other * shade[woven]
    leak = {
        "even": np.zeros_like(down),
        "shoulders": 0.24 * (down < 0.25),
        "core": 0.24 * ((np.abs(across) < 0.06) & (down > 0.24) & (down < 0.42)),
        "hem": 0.24 * (down > 0.42),
    }[who.lining]
    scene[rows, columns, _TIR] += leak


def _pattern(name: str, across: np.ndarray, down: np.ndarray) -> np.ndarray:
    """Where a pattern shows its second tone, bool like ``across``."""
    period = 0.105
    x, y = np.mod(across / period, 1.0), np.mod(down / period, 1.0)
    match name:
        case "stripes":
            return y < 0.45
        case "bars":
            return x < 0.42
        case "checks":
            return (x < 0.5) ^ (y < 0.5)
        case "dots":
            return (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.09
        case _:
            return np.zeros(across.shape, dtype=bool)


@functools.lru_cache(maxsize=32)
def _backdrop(
    seed: int, camera: int, height: int, width: int, difficulty: Difficulty
) -> np.ndarray:
    """What a camera looks at, larger than the frame: float32 ``[1.2 H, 1.6 W, 5]``."""
    rng = stream(seed, 3, camera)
    high, wide = int(1.2 * height), int(1.6 * width)
    canvas = _Canvas(high, wide)
    aspect = wide / high
    palette = rng.uniform(0.15, 0.75, (40, _CHANNELS)).astype(np.float32)
    palette[:, _RGB] = 0.6 * palette[:, _RGB].mean(axis=1, keepdims=True) + 0.4 * palette[:, _RGB]
    palette[:, _TIR] = rng.uniform(0.0, 0.28, 40)
    horizon = float(rng.uniform(0.45, 0.65))
    canvas.box((0, horizon), (aspect, 1.0), 1)
    for number in range(int(rng.integers(4, 8))):
        x, half = float(rng.uniform(0, aspect)), float(rng.uniform(0.02, 0.12))
        top = float(rng.uniform(0.0, 0.35))
        canvas.box(
            (x - half, top), (x + half, horizon + float(rng.uniform(-0.2, 0.05))), 2 + number
        )
    for number in range(int(rng.integers(2, 6))):
        y = float(rng.uniform(horizon, 1.0))
        canvas.box((0, y), (aspect, y + float(rng.uniform(0.01, 0.05))), 12 + number)
    if rng.random() < 0.6:
        for number in range(8):
            x, y = float(rng.uniform(0, aspect)), horizon + float(rng.uniform(-0.1, 0.05))
            canvas.ellipse((x, y), (0.07, 0.09), 20 + number)
            palette[20 + number, _RGB] = (0.15, 0.35, 0.12)
            palette[20 + number, _NIR] = 0.7
    scene = palette[canvas.labels()]
    scene *= 1.0 + 0.25 * _smooth_noise(rng, high, wide, cells=24)[..., None]
    return np.clip(scene, -0.2, 1.0)


def _see_rgb(seen: np.ndarray, where: Shot, difficulty: Difficulty) -> np.ndarray:
    camera = stream(where.key[0], 4, where.camera, 0)
    gains = 1 + difficulty.camera_shift * camera.uniform(-1, 1, 3)
    gamma = float(camera.uniform(0.8, 1.25))
    rng = stream(*where.key, 2)
    exposure = {"bright": 1.2, "normal": 1.0, "dim": 0.62}[where.lighting]
    noise = difficulty.rgb_noise
    image = seen * gains
    if where.dark:
        grey = image.mean(axis=2, keepdims=True)
        image = grey + difficulty.dark_colour * (image - grey)
        exposure, noise = difficulty.dark_gain, 1.5 * noise
    image = np.clip(image * exposure * float(rng.uniform(0.8, 1.2)), 0, 1) ** gamma
    picture = Image.fromarray(_bytes(image))
    picture = _blurred(picture, where, rng)
    image = np.asarray(picture, dtype=np.float32) / 255
    return _bytes(image + noise * rng.standard_normal(image.shape, dtype=np.float32))


def _see_nir(
    seen: np.ndarray, where: Shot, middle: tuple[float, float], difficulty: Difficulty
) -> np.ndarray:
    camera = stream(where.key[0], 4, where.camera, 1)
    gain = float(1 + difficulty.camera_shift * camera.uniform(-1, 1))
    spot = camera.uniform(0.3, 0.7, 2)
    rng = stream(*where.key, 3)
    height, width = seen.shape
    down = (np.arange(height, dtype=np.float32)[:, None] + 0.5) / height
    across = (np.arange(width, dtype=np.float32)[None, :] + 0.5) / width
    falloff = np.exp(-((down - spot[0]) ** 2 + 0.5 * (across - spot[1]) ** 2) / 0.35)
    image = seen * gain * float(rng.uniform(0.8, 1.2)) * (0.45 + 0.6 * falloff)
    if where.glare:
        place = np.add(middle, rng.uniform(-0.14, 0.14, 2))
        distance = (down - place[0]) ** 2 + 0.3 * (across - place[1]) ** 2
        image = image + float(rng.uniform(0.8, 1.3)) * np.exp(-distance / 0.045)
        image = 0.75 * image + 0.25
    picture = _blurred(Image.fromarray(_bytes(image)), where, rng)
    image = np.asarray(picture, dtype=np.float32) / 255
    noise = difficulty.nir_noise * rng.standard_normal(image.shape, dtype=np.float32)
    return _bytes(image + noise)


def _see_tir(seen: np.ndarray, where: Shot, difficulty: Difficulty) -> np.ndarray:
    camera = stream(where.key[0], 4, where.camera, 2)
    ambient, gain = float(camera.uniform(0.08, 0.22)), float(camera.uniform(0.62, 0.78))
    rng = stream(*where.key, 4)
    image = ambient + gain * float(rng.uniform(0.9, 1.1)) * seen
    if where.crossover:
        image = 0.55 + difficulty.crossover_contrast * (image - 0.45)
    radius = difficulty.tir_blur * image.shape[0] / 128
    picture = Image.fromarray(_bytes(image)).filter(ImageFilter.GaussianBlur(radius))
    image = np.asarray(picture, dtype=np.float32) / 255
    drift = 0.03 * _smooth_noise(rng, *image.shape, cells=4)
    noise = difficulty.tir_noise * rng.standard_normal(image.shape, dtype=np.float32)
    return _bytes(image + drift + noise)


def _blurred(picture: Image.Image, where: Shot, rng: np.random.Generator) -> Image.Image:
    """Lens blur, and blur by motion if the shot has it (horizontal, as people walk)."""
    scale = picture.height / 128
    picture = picture.filter(ImageFilter.GaussianBlur(0.45 * scale))
    if where.motion_blur:
        length = float(rng.uniform(1.0, 2.5)) * scale
        picture = picture.filter(ImageFilter.BoxBlur((length, 0.0)))
    return picture


def _smooth_noise(rng: np.random.Generator, height: int, width: int, *, cells: int) -> np.ndarray:
    """Noise of about ``cells`` spots along the height, in [-1, 1], float32 ``[H, W]``."""
    coarse = rng.uniform(-1, 1, (cells, max(2, cells * width // height))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def _bytes(image: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded and clipped."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
