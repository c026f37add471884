"""The figures of the procedural benchmark: people in parts, drawn as a map of labels.

Distances are in units of the frame's height; a body's own points in units of its size, down from
the top of the head and across from its axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import numpy as np
from PIL import Image, ImageDraw

from next.benchmark.procedural.people import Person, Shot

Point = tuple[float, float]
"""Right and down, in units of the frame's height."""


class Part(IntEnum):
    """What a pixel shows; a passer-by's parts are numbered from ``Part.PASSER_BY`` on."""

    BACKGROUND = 0
    UPPER = 1
    SLEEVE = 2
    FAR_SLEEVE = 3
    LOWER = 4
    FAR_LEG = 5
    SKIN = 6
    FACE = 7
    HAIR = 8
    SHOES = 9
    BAG = 10
    BAG_TRIM = 11
    HAT = 12
    OBJECT = 13
    GLASSES = 14
    PASSER_BY = 16
    OBSTACLE = 32
    OBSTACLE_TRIM = 33
    CLUTTER = 34


class Canvas:
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


class Frame:
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


def draw_person(canvas: Canvas, who: Person, where: Shot, frame: Frame, offset: int) -> None:
    """The whole figure, back to front; ``offset`` shifts the labels (a passer-by)."""
    seen_from_side = where.view == "side"
    swing = where.stride * float(np.sin(where.phase))
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
    canvas: Canvas, who: Person, frame: Frame, arm: Arm, sleeve: int, offset: int
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


def _draw_legs(canvas: Canvas, who: Person, frame: Frame, where: Shot, offset: int) -> None:
    thigh, shin, hip = 0.235, 0.225, 0.51
    thick = 0.052 * frame.size * (0.45 + 0.55 * frame.girth)
    bare_shin = who.lower in ("shorts", "skirt", "dress")
    bare_thigh = who.lower in ("skirt", "dress")
    for far in (True, False):
        phase = where.phase + (np.pi if far else 0.0)
        swing = where.stride * float(np.sin(phase))
        if where.view == "side":
            bend = 0.55 * where.stride * max(0.0, float(np.cos(phase)))
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
    canvas: Canvas, who: Person, frame: Frame, ankle: Point, toe: float, offset: int
) -> None:
    foot = frame.at(ankle[0] + 0.45 * toe, ankle[1] + 0.018)
    radii = ((0.034 + 0.5 * toe) * frame.size, (0.020 + 0.2 * (toe == 0) * 0.06) * frame.size)
    label = Part.SHOES + offset
    canvas.ellipse(foot, radii, label)
    if who.shoes == "boots":
        top = frame.at(ankle[0], ankle[1] - 0.07)
        canvas.limb(top, frame.at(*ankle), (0.036 * frame.size, 0.034 * frame.size), label)


def _draw_torso(
    canvas: Canvas, who: Person, frame: Frame, shoulder: float, swing: float, offset: int
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
    canvas: Canvas, frame: Frame, hip: float, span: tuple[float, float], label: int
) -> None:
    top, bottom = span
    outline = [(-hip, top), (hip, top), (1.45 * hip + 0.02, bottom), (-1.45 * hip - 0.02, bottom)]
    canvas.polygon([frame.at(x, y) for x, y in outline], label)


def _draw_head(canvas: Canvas, who: Person, where: Shot, frame: Frame, offset: int) -> None:
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


def _draw_backpack(canvas: Canvas, where: Shot, frame: Frame, offset: int) -> None:
    size = frame.size
    bag, trim = Part.BAG + offset, Part.BAG_TRIM + offset
    if where.view == "back":
        canvas.limb(frame.at(0, 0.25), frame.at(0, 0.39), (0.082 * size, 0.09 * size), bag)
        canvas.box(frame.at(-0.055, 0.36), frame.at(0.055, 0.41), trim)
    elif where.view == "side":
        canvas.limb(frame.at(-0.09, 0.25), frame.at(-0.10, 0.38), (0.06 * size, 0.07 * size), bag)
    else:
        canvas.limb(frame.at(0, 0.20), frame.at(0, 0.40), (0.15 * size, 0.135 * size), bag)


def _draw_carried(canvas: Canvas, who: Person, frame: Frame, hand: Point, offset: int) -> None:
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
