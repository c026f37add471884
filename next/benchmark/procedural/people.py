"""Who and what the procedural benchmark shows: families of similar people, and shots of them.

A person has attributes that only one modality can see (visible colours: RGB; fabric albedo and
weave: NIR; heat and lining: TIR) and attributes of shape that all can see. People come in families
that share all but one or two attributes, so each modality alone confuses most of a family.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypeVar

import numpy as np

MODALITIES = ("RGB", "NI", "TI")
"""Names of the modality folders, in the card's order (RGBNT201's names)."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (0.07, 0.07, 0.08),
    "white": (0.92, 0.92, 0.90),
    "gray": (0.48, 0.48, 0.50),
    "red": (0.78, 0.12, 0.12),
    "blue": (0.14, 0.26, 0.74),
    "green": (0.14, 0.52, 0.22),
    "yellow": (0.90, 0.80, 0.16),
    "brown": (0.42, 0.26, 0.13),
    "pink": (0.94, 0.55, 0.66),
    "purple": (0.48, 0.20, 0.60),
    "beige": (0.82, 0.73, 0.56),
    "orange": (0.92, 0.48, 0.10),
}
"""Visible colours of garments and bags, reflectance of red, green and blue in [0, 1]."""

HAIR_COLOURS: dict[str, tuple[float, float, float]] = {
    "black": (0.05, 0.04, 0.04),
    "brown": (0.28, 0.17, 0.09),
    "blond": (0.76, 0.62, 0.32),
    "gray": (0.62, 0.62, 0.62),
}
"""Visible colours of hair."""

ALBEDOS = (0.14, 0.38, 0.62, 0.86)
"""Near-infrared reflectance of a fabric; independent of its visible colour."""

PATTERNS = ("plain", "stripes", "bars", "checks", "dots")
"""Patterns of a print (RGB) and of a weave (NIR): horizontal stripes, vertical bars, ..."""

LININGS = ("even", "shoulders", "core", "hem")
"""Where an upper garment lets heat through (TIR)."""

LEAKS = (-0.2, 0.0, 0.2)
"""How much warmer than its kind a garment is outside, in units of skin minus ambient (TIR)."""

UPPER_HEAT = {
    "t-shirt": 0.62, "shirt": 0.56, "sweater": 0.48, "hoodie": 0.44, "jacket": 0.38, "coat": 0.32,
    "dress": 0.56,
}  # fmt: skip
"""Outside temperature of an upper garment: 0 = ambient, 1 = skin."""

LOWER_HEAT = {"trousers": 0.48, "jeans": 0.42, "shorts": 0.58, "skirt": 0.50, "dress": 0.54}
"""Outside temperature of a lower garment: 0 = ambient, 1 = skin."""

CARRIED = ("nothing", "backpack", "handbag", "suitcase", "phone", "bottle")
"""What a person may carry."""

CHANGES: dict[str, tuple[str, ...]] = {
    "visible": ("upper_colour", "lower_colour", "upper_print"),
    "fabric": ("upper_albedo", "lower_albedo", "upper_weave", "lower_weave"),
    "heat": ("upper_leak", "lower_leak", "lining"),
    "shape": ("hair", "carries", "hat", "build"),
}
"""The attributes in which members of a family differ, by the modality that sees them."""

Split = Literal["train", "test"]
View = Literal["front", "side", "back"]
Occlusion = Literal["none", "box", "bicycle", "person"]

_Choice = TypeVar("_Choice")
_SHARES = (
    "second_change",
    "dark_colour",
    "crossover_contrast",
    "camera_shift",
    "backdrop",
    "caption_habit",
)
"""Knobs that are shares without being called so."""


@dataclass(frozen=True)
class Difficulty:
    """What makes the benchmark hard.

    The defaults are calibrated so that a small network trained from scratch for a minute or two
    lies in the middle of the scale, and with one modality clearly lower.

    Raises:
        ValueError: a knob is out of range; the message names it.
    """

    family_size: int = 4
    """Look-alikes in a family (1: no hard negatives)."""
    second_change: float = 0.3
    """Probability that a member differs from its family in a second attribute too."""
    dark_share: float = 0.2
    """Share of samples taken at night without light: RGB loses colour and gains noise."""
    dark_gain: float = 0.4
    """Mean exposure of a dark RGB image, relative to daylight."""
    dark_colour: float = 0.5
    """Colour that survives in the dark, as a share of the saturation."""
    rgb_noise: float = 0.035
    """Standard deviation of RGB pixel noise in daylight, of a range of 1; dark: times 1.5."""
    camera_shift: float = 0.06
    """Spread of the cameras' gain in each colour (and in NIR), as a share."""
    glare_share: float = 0.12
    """Share of NIR images that an illuminator saturates in part."""
    nir_noise: float = 0.035
    """Standard deviation of NIR pixel noise."""
    crossover_share: float = 0.12
    """Share of TIR images in which the surroundings are about as warm as the body."""
    crossover_contrast: float = 0.5
    """Thermal contrast that is left in those, as a share."""
    tir_noise: float = 0.035
    """Standard deviation of TIR pixel noise."""
    tir_blur: float = 1.4
    """Radius of the TIR optics' blur in pixels of an image 128 pixels high."""
    occlusion_share: float = 0.08
    """Share of samples in which something stands in front of the person."""
    motion_blur_share: float = 0.25
    """Share of samples blurred by motion (RGB and NIR)."""
    scale_jitter: float = 0.015
    """Spread of the person's size in the frame, as a share."""
    shift_jitter: float = 0.012
    """Spread of the person's place in the frame, in units of its height."""
    pose_jitter: float = 0.7
    """Length of stride and swing of arms, relative to a brisk walk (0: standing)."""
    side_share: float = 0.12
    """Share of samples seen from the side; the rest from the front or the back."""
    backdrop: float = 0.2
    """Contrast of the backgrounds, which differ between cameras (0: all the same and even)."""
    clutter: int = 1
    """Most objects that stand behind a person, beside the camera's own background."""
    caption_errors: float = 1.0
    """Factor on the rate of wrong words in captions (0: only what a modality cannot see)."""
    caption_habit: float = 0.0
    """Share of a caption's words that are what the captioner says most often, whatever is shown."""

    def __post_init__(self) -> None:
        if not 1 <= self.family_size <= 12:
            raise ValueError(f"family_size must lie in 1..12, but got {self.family_size}")
        for field in fields(self):
            value = getattr(self, field.name)
            most = 1 if field.name in _SHARES or field.name.endswith("_share") else float("inf")
            if not 0 <= value <= most:
                raise ValueError(f"{field.name} must lie in 0..{most}, but got {value}")


@dataclass(frozen=True)
class Person:
    """The true attributes of one identity."""

    gender: str
    age: str
    height: float
    """Size relative to a tall adult."""
    build: str
    upper: str
    upper_colour: str
    upper_print: str
    """Visible pattern; its second colour is ``print_colour``."""
    print_colour: str
    lower: str
    lower_colour: str
    shoes: str
    shoe_style: str
    shoe_colour: str
    hair: str
    hair_shape: str
    hair_colour: str
    skin: float
    """Visible lightness of the skin."""
    glasses: bool
    hat: str
    carries: str
    bag_colour: str
    upper_albedo: float
    """NIR reflectance of the upper garment; the same for the rest."""
    upper_weave: str
    lower_albedo: float
    lower_weave: str
    shoe_albedo: float
    bag_albedo: float
    upper_leak: float
    """How much warmer than its kind the upper garment is outside; the same for the lower one."""
    lower_leak: float
    lining: str
    object_heat: float
    """Temperature of a phone or a bottle: 0 = ambient, 1 = skin."""


@dataclass(frozen=True)
class Shot:
    """The circumstances of one sample: camera, light, view, pose and what stands in the way."""

    key: tuple[int, ...]
    """Seeds every random number of the drawing."""
    camera: int
    view: View
    mirrored: bool
    time: str
    lighting: str
    dark: bool
    """RGB sees next to nothing."""
    glare: bool
    """NIR is saturated in part."""
    crossover: bool
    """TIR has little contrast."""
    occlusion: Occlusion
    motion_blur: bool
    phase: float
    """Of the walking cycle, radians."""
    stride: float
    """Length of the stride and swing of the arms; 1: a brisk walk."""
    scale: float
    shift: tuple[float, float]
    """Right and down, in units of the frame's height."""


def stream(seed: int, *key: int) -> np.random.Generator:
    """A generator of its own for each (seed, key): nothing drawn elsewhere can change it."""
    return np.random.default_rng((seed, *key))


@functools.lru_cache(maxsize=4096)
def family(seed: int, split: Split, number: int, difficulty: Difficulty) -> tuple[Person, ...]:
    """The members of one family; the first is the one the others are variations of."""
    rng = stream(seed, 1, _SPLIT_KEYS[split], number)
    founder = random_person(rng)
    members = [founder]
    hidden = [group for group in CHANGES if group != "shape"]
    order = [*(hidden[i] for i in rng.permutation(len(hidden))), "shape"]
    while len(members) < difficulty.family_size:
        groups = [order[(len(members) - 1) % len(order)]]
        if rng.random() < difficulty.second_change:
            groups.append(_pick(rng, [group for group in order if group not in groups]))
        member = founder
        for group in groups:
            member = _changed(member, group, rng)
        if member not in members:
            members.append(member)
    return tuple(members)


def person(seed: int, split: Split, index: int, difficulty: Difficulty) -> Person:
    """Identity number ``index`` (from 0) of a split, however many others there are."""
    number, member = divmod(index, difficulty.family_size)
    return family(seed, split, number, difficulty)[member]


def shot(
    seed: int, split: Split, index: int, sample: int, camera: int, difficulty: Difficulty
) -> Shot:
    """The circumstances of sample number ``sample`` of an identity, taken by ``camera``."""
    key = (2, _SPLIT_KEYS[split], index, sample, camera)
    rng = stream(seed, *key)
    dark = bool(rng.random() < difficulty.dark_share)
    time = "nighttime" if dark or rng.random() < 0.25 else "daytime"
    if dark:
        lighting = "dim"
    else:
        lighting = _pick(rng, ("normal", "normal", "dim" if time == "nighttime" else "bright"))
    facing: tuple[View, View] = ("front", "back")
    likely = 0.65 if camera % 2 else 0.35
    occlusions: tuple[Occlusion, ...] = ("box", "bicycle", "person")
    return Shot(
        key=(seed, *key),
        camera=camera,
        view="side" if rng.random() < difficulty.side_share else facing[rng.random() > likely],
        mirrored=bool(rng.random() < 0.5),
        time=time,
        lighting=lighting,
        dark=dark,
        glare=bool(rng.random() < difficulty.glare_share),
        crossover=bool(rng.random() < difficulty.crossover_share),
        occlusion=_pick(rng, occlusions) if rng.random() < difficulty.occlusion_share else "none",
        motion_blur=bool(rng.random() < difficulty.motion_blur_share),
        phase=float(rng.uniform(0, 2 * np.pi)),
        stride=difficulty.pose_jitter * float(rng.uniform(0.5, 1.0)),
        scale=float(1 - difficulty.scale_jitter * rng.uniform(0, 2)),
        shift=(
            float(difficulty.shift_jitter * rng.uniform(-1, 1)),
            float(difficulty.shift_jitter * rng.uniform(-0.6, 0.6)),
        ),
    )


def random_person(rng: np.random.Generator) -> Person:
    """Someone with independent attributes, as far as attributes go together at all."""
    female = bool(rng.random() < 0.45)
    age = _pick(rng, ("child", "teenager", "adult", "adult", "adult", "adult", "elderly"))
    tall = {"child": 0.74, "teenager": 0.92, "adult": 0.98, "elderly": 0.93}[age]
    upper = _pick(rng, ("t-shirt", "shirt", "sweater", "hoodie", "jacket", "coat"))
    lower = _pick(rng, ("trousers", "trousers", "jeans", "shorts"))
    if female and rng.random() < 0.4:
        upper, lower = ("dress", "dress") if rng.random() < 0.4 else (upper, "skirt")
    shoes = _pick(rng, ("sneakers", "sneakers", "boots", "sandals"))
    colour = _pick(rng, tuple(COLOURS))
    print_colour = _pick(rng, tuple(c for c in COLOURS if _contrast(c, colour) > 0.35))
    lower_colour = _pick(rng, tuple(COLOURS))
    lower_albedo = _pick(rng, ALBEDOS)
    lower_leak = _pick(rng, LEAKS)
    upper_weave, lower_weave = _pick(rng, PATTERNS), _pick(rng, ("plain", *PATTERNS))
    upper_albedo, upper_leak = _pick(rng, ALBEDOS), _pick(rng, LEAKS)
    if upper == "dress":
        lower_colour, lower_leak = colour, upper_leak
        lower_albedo, lower_weave = upper_albedo, upper_weave
    return Person(
        gender="female" if female else "male",
        age=age,
        height=tall * (0.95 if female else 1.0) * float(rng.uniform(0.95, 1.05)),
        build=_pick(rng, ("slim", "medium", "medium", "broad")),
        upper=upper,
        upper_colour=colour,
        upper_print=_pick(rng, ("plain", *PATTERNS)),
        print_colour=print_colour,
        lower=lower,
        lower_colour=lower_colour,
        shoes=shoes,
        shoe_style="athletic" if shoes == "sneakers" and rng.random() < 0.3 else "casual",
        shoe_colour=_pick(rng, ("black", "white", "brown", "red", "gray")),
        hair=_pick(rng, ("medium", "long", "long") if female else ("short", "short", "medium")),
        hair_shape=_pick(rng, ("straight", "straight", "straight", "wavy")),
        hair_colour=_pick(rng, tuple(HAIR_COLOURS)),
        skin=float(rng.uniform(0.45, 0.95)),
        glasses=bool(rng.random() < 0.3),
        hat=_pick(rng, ("none", "none", "none", "cap", "beanie")),
        carries=_pick(rng, CARRIED),
        bag_colour=_pick(rng, tuple(COLOURS)),
        upper_albedo=upper_albedo,
        upper_weave=upper_weave,
        lower_albedo=lower_albedo,
        lower_weave=lower_weave,
        shoe_albedo=_pick(rng, ALBEDOS),
        bag_albedo=_pick(rng, ALBEDOS),
        upper_leak=upper_leak,
        lower_leak=lower_leak,
        lining=_pick(rng, LININGS),
        object_heat=_pick(rng, (-0.3, 0.9)),
    )


_SPLIT_KEYS: dict[Split, int] = {"train": 0, "test": 1}


def _pick(rng: np.random.Generator, choices: Sequence[_Choice]) -> _Choice:
    return choices[int(rng.integers(len(choices)))]


def _contrast(first: str, second: str) -> float:
    return float(np.abs(np.subtract(COLOURS[first], COLOURS[second])).mean())


def _changed(one: Person, group: str, rng: np.random.Generator) -> Person:
    """``one`` with another value in one attribute of ``group`` (a dress is of one cloth)."""
    fields = [name for name in CHANGES[group] if one.upper != "dress" or "lower" not in name]
    name = _pick(rng, fields)
    now = getattr(one, name)
    choices: dict[str, Sequence[Any]] = {
        "upper_colour": [
            colour
            for colour in COLOURS
            if min(_contrast(colour, one.upper_colour), _contrast(colour, one.print_colour)) > 0.25
        ],
        "lower_colour": [c for c in COLOURS if _contrast(c, one.lower_colour) > 0.25],
        "upper_print": PATTERNS,
        "upper_albedo": [a for a in ALBEDOS if abs(a - one.upper_albedo) > 0.3],
        "lower_albedo": [a for a in ALBEDOS if abs(a - one.lower_albedo) > 0.3],
        "upper_weave": PATTERNS,
        "lower_weave": PATTERNS,
        "upper_leak": LEAKS,
        "lower_leak": LEAKS,
        "lining": LININGS,
        "hair": ("short", "medium", "long"),
        "carries": CARRIED,
        "hat": ("none", "cap", "beanie"),
        "build": ("slim", "medium", "broad"),
    }
    value = _pick(rng, [choice for choice in choices[name] if choice != now])
    changes = {name: value}
    if one.upper == "dress" and name.startswith("upper_"):
        twin = name.replace("upper_", "lower_")
        if twin in CHANGES[group]:
            changes[twin] = value
    return replace(one, **changes)
