"""Draws a person of the procedural benchmark as RGB, near-infrared and thermal camera see them.

One label map holds which part of the scene each pixel shows. Each modality looks the labels up in
its own palette (colour, reflectance, temperature), adds its own pattern, and degrades the result
in its own way. So what only one modality sees cannot leak into another.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageFilter

from next.benchmark.procedural.figures import Canvas, Frame, Part, draw_person
from next.benchmark.procedural.people import (
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
_LABELS = 64
_CHANNELS = 5
"""Red, green, blue, near-infrared reflectance, temperature."""
_RGB, _NIR, _TIR = slice(0, 3), 3, 4
_SHADES = np.array([0, 1.0, 0.86, 0.75, 1.0, 0.78], dtype=np.float32)
"""Light that falls on torso, near and far sleeve, near and far leg, by ``Part``."""


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
    canvas = Canvas(height, width)
    colours = _palette(who)
    palette = np.zeros((_LABELS, _CHANNELS), dtype=np.float32)
    palette[: len(colours)] = colours
    _draw_clutter(canvas, palette, rng, difficulty)
    frame = Frame(who, where, width / height)
    draw_person(canvas, who, where, frame, 0)
    _draw_obstacle(canvas, palette, where, frame, rng)

    labels = canvas.labels()
    scene = np.take(palette.T, labels, axis=1)
    _add_patterns(scene, labels, who, frame)
    behind = labels == Part.BACKGROUND
    scene[:_TIR] *= 1.0 + 0.22 * _smooth_noise(rng, height, width, cells=12)
    backdrop = _backdrop(where.key[0], where.camera, height, width, difficulty)
    top = int(rng.integers(backdrop.shape[1] - height + 1))
    left = int(rng.integers(backdrop.shape[2] - width + 1))
    np.copyto(scene, backdrop[:, top : top + height, left : left + width], where=behind)

    step = _SUPERSAMPLING
    parts = [scene[:, i::step, j::step] for i in range(step) for j in range(step)]
    seen = np.add.reduce(parts) / len(parts)
    person_middle = (frame.top + 0.35 * frame.size, frame.centre * height / width)
    return (
        _see_rgb(seen[_RGB].transpose(1, 2, 0), where, difficulty),
        _see_nir(seen[_NIR], where, person_middle, difficulty),
        _see_tir(seen[_TIR], where, difficulty),
    )


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

    paint(Part.UPPER, cloth, who.upper_albedo, upper_heat, _SHADES[Part.UPPER])
    paint(Part.SLEEVE, cloth, who.upper_albedo, upper_heat - 0.04, _SHADES[Part.SLEEVE])
    paint(Part.FAR_SLEEVE, cloth, who.upper_albedo, upper_heat - 0.06, _SHADES[Part.FAR_SLEEVE])
    paint(Part.LOWER, trousers, who.lower_albedo, lower_heat, _SHADES[Part.LOWER])
    paint(Part.FAR_LEG, trousers, who.lower_albedo, lower_heat - 0.03, _SHADES[Part.FAR_LEG])
    paint(Part.SKIN, skin, 0.66, 0.92, 0.95)
    paint(Part.FACE, skin, 0.70, 1.0, 1.0)
    paint(Part.HAIR, hair, 0.45, 0.50, 1.0)
    paint(Part.SHOES, COLOURS[who.shoe_colour], who.shoe_albedo, 0.25, 1.0)
    paint(Part.BAG, bag, who.bag_albedo, 0.10, 1.0)
    paint(Part.BAG_TRIM, bag, who.bag_albedo, 0.14, 0.6)
    paint(Part.HAT, bag, 0.35, 0.42, 0.8)
    paint(Part.OBJECT, (0.15, 0.15, 0.18), 0.9, who.object_heat, 1.0)
    paint(Part.GLASSES, (0.05, 0.05, 0.06), 0.1, 0.2, 1.0)
    return table


def _draw_clutter(
    canvas: Canvas, palette: np.ndarray, rng: np.random.Generator, difficulty: Difficulty
) -> None:
    for number in range(int(rng.integers(difficulty.clutter + 1))):
        label = Part.CLUTTER + number % (len(palette) - Part.CLUTTER)
        palette[label] = (
            *_muted(rng.uniform(0.1, 0.9, 3)),
            rng.uniform(0.1, 0.7),
            rng.uniform(-0.1, 0.4),
        )
        x, y = float(rng.uniform(-0.05, 0.55)), float(rng.uniform(0.3, 0.95))
        across, down = float(rng.uniform(0.03, 0.12)), float(rng.uniform(0.05, 0.3))
        if rng.random() < 0.5:
            canvas.ellipse((x, y), (across, down), label)
        else:
            canvas.box((x - across, y - down), (x + across, y + down), label)


def _draw_obstacle(
    canvas: Canvas, palette: np.ndarray, where: Shot, frame: Frame, rng: np.random.Generator
) -> None:
    colour, trim = _muted(rng.uniform(0.1, 0.9, (2, 3)))
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
            beside = Frame(passer_by, where, 2 * frame.centre)
            beside.centre += (0.17 if rng.random() < 0.5 else -0.17) * frame.size / 0.8
            colours = _palette(passer_by)
            palette[Part.PASSER_BY : Part.PASSER_BY + len(colours)] = colours
            draw_person(canvas, passer_by, where, beside, Part.PASSER_BY)


def _add_patterns(scene: np.ndarray, labels: np.ndarray, who: Person, frame: Frame) -> None:
    """Print (RGB), weaves (NIR) and lining (TIR) of the garments, in place."""
    height = labels.shape[0]
    rows, columns = np.nonzero((labels >= Part.UPPER) & (labels <= Part.FAR_LEG))
    parts = labels[rows, columns]
    across = ((columns / height - frame.centre) / frame.size).astype(np.float32)
    down = ((rows / height - frame.top) / frame.size).astype(np.float32)
    upper = parts <= Part.FAR_SLEEVE
    shade = _SHADES[parts]

    printed = upper & _pattern(who.upper_print, across, down)
    second = np.asarray(COLOURS[who.print_colour], dtype=np.float32)
    scene[_RGB, rows[printed], columns[printed]] = second[:, None] * shade[printed]
    for garment, weave, albedo in (
        (upper, who.upper_weave, who.upper_albedo),
        (~upper, who.lower_weave, who.lower_albedo),
    ):
        woven = garment & _pattern(weave, across, down)
        other = albedo + (0.4 if albedo < 0.5 else -0.4)
        scene[_NIR, rows[woven], columns[woven]] = other * shade[woven]
    warm = {
        "even": np.zeros_like(upper),
        "shoulders": down < 0.25,
        "core": (np.abs(across) < 0.06) & (down > 0.24) & (down < 0.42),
        "hem": down > 0.42,
    }[who.lining]
    scene[_TIR, rows, columns] += np.where(upper & warm, np.float32(0.32), np.float32(0))


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
    """What a camera looks at, larger than the frame: float32 ``[5, 1.2 H, 1.6 W]``."""
    rng = stream(seed, 3, camera)
    high, wide = int(1.2 * height), int(1.6 * width)
    canvas = Canvas(high, wide)
    aspect = wide / high
    palette = rng.uniform(0.15, 0.75, (40, _CHANNELS)).astype(np.float32)
    palette[:, _RGB] = _muted(palette[:, _RGB])
    palette[:, _NIR] = rng.uniform(0.1, 0.45, 40)
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
            palette[20 + number, _NIR] = 0.6
    scene = np.take(palette.T, canvas.labels(), axis=1)
    scene *= 1.0 + 0.25 * _smooth_noise(rng, high, wide, cells=24)
    even = np.array([0.42, 0.42, 0.42, 0.26, 0.12], dtype=np.float32)[:, None, None]
    return np.clip(even + difficulty.backdrop * (scene - even), -0.2, 1.0)


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
    image = seen * gain * float(rng.uniform(0.88, 1.12)) * (0.6 + 0.45 * falloff)
    if where.glare:
        place = np.add(middle, rng.uniform(-0.14, 0.14, 2))
        distance = (down - place[0]) ** 2 + 0.3 * (across - place[1]) ** 2
        image = image + float(rng.uniform(0.6, 1.0)) * np.exp(-distance / 0.04)
        image = 0.8 * image + 0.2
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


def _muted(colours: np.ndarray) -> np.ndarray:
    """Colours ``[..., 3]`` drawn towards grey, as things of a street are."""
    return 0.55 * colours.mean(axis=-1, keepdims=True) + 0.45 * colours


def _smooth_noise(rng: np.random.Generator, height: int, width: int, *, cells: int) -> np.ndarray:
    """Noise of about ``cells`` spots along the height, in [-1, 1], float32 ``[H, W]``."""
    coarse = rng.uniform(-1, 1, (cells, max(2, cells * width // height))).astype(np.float32)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR))


def _bytes(image: np.ndarray) -> np.ndarray:
    """Values in [0, 1] as uint8, rounded and clipped."""
    return (np.clip(image, 0, 1) * 255 + 0.5).astype(np.uint8)
