"""`rendered-faces`: cartoon faces drawn from exactly `num_factors` continuous factors, without any other randomness.

The pictures form a smooth surface of known dimension, so they can check that a VAE keeps exactly that many latent
dimensions active. Every shape is a signed distance turned into a soft coverage, hence a picture is a differentiable
function of its factors. Lengths are in units of half the picture width: x runs from -1 (left) to 1 (right), y from -1
(top) to 1 (bottom).
"""

import math

import numpy as np

# The first `num_factors` of these vary, the others stay at 0.
FACTOR_NAMES = (
    "hair_colour",  # dark brown to ginger
    "turn",  # the face looks to the left or right
    "background",  # peach to blue
    "smile",  # mouth corners down or up
    "skin_tone",  # deep to fair
    "hair_length",  # above the chin or down to the shoulders
    "light_side",  # lit from the left or right
    "eye_size",  # small to large
    "tilt",  # the head leans to a shoulder
    "fringe",  # high or low hairline
    "shirt_colour",  # plum to green
    "face_width",  # narrow to wide
    "nod",  # the face looks up or down
    "brow_height",  # low to raised
    "eye_spacing",  # close to wide apart
    "light_strength",  # dim to bright
)

_EDGE = 0.08  # width of a soft edge: 2.6 pixels at 64, so that moving edges stay nearly linear in the factors
_CHUNK_PIXELS = 2**16  # pictures are drawn in groups of about this many pixels, which stay in the processor cache

# Colour = middle + factor * half range, in RGB between 0 and 1.
_BACKGROUND = np.float32([[0.74, 0.75, 0.76], [-0.085, 0.005, 0.085]])
_HAIR = np.float32([[0.43, 0.27, 0.19], [0.18, 0.08, 0.02]])
_SKIN = np.float32([[0.74, 0.575, 0.47], [0.07, 0.09, 0.10]])
_SHIRT = np.float32([[0.42, 0.47, 0.55], [-0.18, 0.15, -0.04]])
_EYE_WHITE = np.float32([0.96, 0.95, 0.93])
_IRIS = np.float32([0.22, 0.42, 0.48])
_PUPIL = np.float32([0.08, 0.08, 0.11])
_LIPS = np.float32([0.50, 0.12, 0.15])
_BLUSH = np.float32([0.92, 0.42, 0.38])


def factors_of(indices, num_factors, seed=0):
    """Factors of the pictures with the given indices: a function of (seed, index, factor number) alone.

    Args:
        indices (`int` sequence of length n): picture numbers, each at least 0.
        num_factors (`int`): number r of varying factors, 1 to `len(FACTOR_NAMES)`.
        seed (`int`): chooses the set of pictures, at least 0.
    Returns:
        `np.ndarray` of shape `(n, r)`, float32: independent uniform values in [-1, 1].
    Raises:
        ValueError: for `num_factors` out of range, or a negative seed or index.
    """
    _check_num_factors(num_factors)
    indices = np.asarray(indices, dtype=np.int64).reshape(-1)
    if seed < 0 or (indices < 0).any():
        raise ValueError(f"seed and indices must be at least 0, got seed {seed} and indices {indices.tolist()[:5]}")
    # Philox is a counter-based generator: each index owns the block of counters that starts at (0, index, 0, 0).
    bits = [np.random.Philox(key=seed, counter=[0, index, 0, 0]).random_raw(num_factors) for index in indices]
    uniform = (np.array(bits, dtype=np.uint64).reshape(-1, num_factors) >> 11) * 2.0**-53
    return (2 * uniform - 1).astype(np.float32)


def render_faces(factors, resolution):
    """Draw faces.

    Args:
        factors (`np.ndarray` of shape `(n, r)`): float values in [-1, 1] of the first r factors in `FACTOR_NAMES`.
        resolution (`int`): height and width in pixels, 32 to 256.
    Returns:
        `np.ndarray` of shape `(n, resolution, resolution, 3)`, uint8 RGB.
    Raises:
        ValueError: for a wrong shape, a factor outside [-1, 1], or a resolution out of range.
    """
    factors = _checked(factors, resolution)
    images = np.empty((len(factors), resolution, resolution, 3), np.uint8)
    chunk = max(1, _CHUNK_PIXELS // resolution**2)
    for start in range(0, len(factors), chunk):
        drawing = _draw(factors[start : start + chunk], resolution)
        drawing *= 255
        drawing += 0.5
        images[start : start + chunk] = drawing.astype(np.uint8).transpose(0, 2, 3, 1)
    return images


def _check_num_factors(num_factors):
    if not 1 <= num_factors <= len(FACTOR_NAMES):
        raise ValueError(f"num_factors must be between 1 and {len(FACTOR_NAMES)}, got {num_factors}")


def _checked(factors, resolution):
    factors = np.asarray(factors, dtype=np.float32)
    if factors.ndim != 2:
        raise ValueError(f"factors must have shape (n, num_factors), got {factors.shape}")
    _check_num_factors(factors.shape[1])
    if not (np.abs(factors) <= 1).all():
        raise ValueError("factors must lie in [-1, 1], got values outside; take them from factors_of or clip them")
    if not 32 <= resolution <= 256:
        raise ValueError(f"resolution must be between 32 and 256 pixels, got {resolution}")
    return factors


def _coverage(distance):
    """Share of a pixel that a shape covers, from its signed distance (negative inside): 1 inside, 0 outside."""
    inside = distance * np.float32(-1 / _EDGE)
    inside += np.float32(0.5)
    np.clip(inside, 0, 1, out=inside)
    return inside * inside * (3 - 2 * inside)


def _ellipse(x, y, width, height):
    """Approximate signed distance to an axis-aligned ellipse around (0, 0); `width` and `height` are half axes."""
    scale = np.minimum(width, height)
    return (np.sqrt((x / width) ** 2 + (y / height) ** 2) - 1) * scale


def _stroke(x, y, half_length, thickness, bend):
    """Signed distance to a thick curve y = bend (x / half_length)^2 with round ends; `thickness` is a half width."""
    height = y - bend * np.minimum((x / half_length) ** 2, 1)
    beyond = np.maximum(np.abs(x) - half_length, 0)  # distance past either end
    slope = 1 + (2 * bend / half_length) ** 2 / 3
    return np.sqrt(beyond**2 + height**2 / slope) - thickness


class _Canvas:
    """Planar pictures `pixels` of shape `(n, 3, height, width)`, and pixel coordinates that shapes are cut from."""

    def __init__(self, num_images, resolution):
        self.resolution = resolution
        self.centres = (np.arange(resolution, dtype=np.float32) + 0.5) * (2 / resolution) - 1
        self.pixels = np.empty((num_images, 3, resolution, resolution), np.float32)

    def window(self, left, right, top, bottom):
        """Slices (rows, columns) of a region; shapes are computed only in a region they can never leave."""
        edges = [(edge + 1) / 2 * self.resolution for edge in (left, right, top, bottom)]
        first_column, first_row = (max(0, math.floor(edges[i])) for i in (0, 2))
        last_column, last_row = (min(self.resolution, math.ceil(edges[i])) for i in (1, 3))
        return slice(first_row, last_row), slice(first_column, last_column)

    def paint(self, coverage, colour, window=(slice(None), slice(None))):
        """Lay `colour`, of shape (3,) or (n, 3), over the window where `coverage`, of shape (n, rows, columns)."""
        region = self.pixels[:, :, *window]
        region += coverage[:, None] * (np.reshape(colour, (-1, 3, 1, 1)) - region)


def _draw(factors, resolution):
    """Faces as float32 of shape `(n, 3, resolution, resolution)` between 0 and 1, before rounding."""
    num_images, num_factors = factors.shape
    f = dict.fromkeys(FACTOR_NAMES, np.zeros((num_images, 1, 1), np.float32))
    f.update((FACTOR_NAMES[i], factors[:, i, None, None]) for i in range(num_factors))

    def mix(colour, name):
        return colour[0] + colour[1] * f[name][:, 0]

    canvas = _Canvas(num_images, resolution)
    x, y = canvas.centres[None, None, :], canvas.centres[None, :, None]
    skin, hair = mix(_SKIN, "skin_tone"), mix(_HAIR, "hair_colour")

    # Background: a wash with a round glow behind the head.
    wash = 0.11 * np.exp(-(x**2 + (y + 0.1) ** 2) / 0.9) - 0.04 * y + 0.075 * f["light_side"] * x
    canvas.pixels[:] = mix(_BACKGROUND, "background")[:, :, None, None] + wash[:, None]

    # Head frame: u to the right of the face, v down, turned around the mouth.
    angle = 0.075 * f["tilt"]
    cos, sin = np.cos(angle), np.sin(angle)
    u = cos * x + sin * (y - 0.2)
    v = cos * (y - 0.2) - sin * x + 0.2

    # Hair behind the head: a bob, all points within a radius of an upright segment.
    hair_end = 0.17 + 0.09 * f["hair_length"]
    hair_coverage = _coverage(np.sqrt(u**2 + (v - np.clip(v, -0.14, hair_end)) ** 2) - 0.66)
    canvas.paint(hair_coverage, hair * np.float32(0.82))

    # Neck and shoulders stay in place.
    rows, columns = window = canvas.window(-0.9, 0.9, 0.4, 1)
    neck = _coverage(np.maximum(np.abs(x[..., columns]) - 0.19, 0.45 - y[:, rows]))
    canvas.paint(neck, skin * np.float32(0.86), window)
    shirt = _coverage(_ellipse(x[..., columns], y[:, rows] - 1.10, 0.80, 0.42))
    collar = _coverage(_ellipse(x[..., columns], y[:, rows] - 0.70, 0.19, 0.14))
    canvas.paint(shirt * (1 - collar), mix(_SHIRT, "shirt_colour"), window)

    # Face: an egg, narrower at the chin, whose outline moves less than the features when the head turns or nods.
    face_width = 0.49 + 0.04 * f["face_width"]
    face_coverage = _coverage(_ellipse((u - 0.02 * f["turn"]) / (1 - 0.16 * v), v - 0.04, face_width, 0.57))
    canvas.paint(face_coverage, skin)

    # Fringe: the hair above a slanted hairline.
    rows, columns = window = canvas.window(-0.9, 0.9, -0.9, 0.2)
    u_top, v_top = u[:, *window], v[:, *window]
    hairline = -0.33 + 0.06 * f["fringe"] + 0.5 * u_top**2 + 0.12 * u_top
    canvas.paint(hair_coverage[:, *window] * _coverage(v_top - hairline), hair, window)
    window = canvas.window(-0.7, 0.7, -0.9, -0.1)
    shine = _coverage(_stroke(u[:, *window] + 0.1, v[:, *window] + 0.6, 0.26, 0.035, 0.12) / np.float32(1.5))
    canvas.paint(0.3 * shine, hair + np.float32(0.3), window)

    # Light falls on the head from above and from a side.
    figure = 1 - (1 - hair_coverage) * (1 - face_coverage)
    light = 0.23 * f["light_side"] * u - 0.04 * v + 0.10 * f["light_strength"]
    canvas.pixels *= 1 + (figure * light)[:, None]

    # Features, from the frame (p, q) that moves with turn and nod.
    p, q = u - 0.05 * f["turn"], v - 0.04 * f["nod"]

    def feature(box, colour, shape, *sizes, at, opacity=1.0, softness=1.0):
        window = canvas.window(*box)
        distance = shape(p[:, *window] - at[0], q[:, *window] - at[1], *sizes)
        canvas.paint(opacity * _coverage(distance / np.float32(softness)), colour, window)

    eye_x = 0.215 + 0.03 * f["eye_spacing"]
    eye = 1 + 0.19 * f["eye_size"]
    brow_y = -0.235 - 0.05 * f["brow_height"]
    blush = 0.35 + 0.15 * f["smile"]
    for side in (-1, 1):
        box = (-0.12, 0.62, -0.25, 0.45) if side > 0 else (-0.62, 0.12, -0.25, 0.45)
        feature(box, _BLUSH, _ellipse, 0.13, 0.10, at=(side * 0.28, 0.19), opacity=blush, softness=2.5)
        box = (-0.12, 0.62, -0.4, 0.3) if side > 0 else (-0.62, 0.12, -0.4, 0.3)
        x0 = side * eye_x
        feature(box, _EYE_WHITE, _ellipse, 0.125 * eye, 0.135 * eye, at=(x0, -0.02))
        feature(box, _IRIS, _ellipse, 0.085 * eye, 0.095 * eye, at=(x0, -0.01))
        feature(box, _PUPIL, _ellipse, 0.05 * eye, 0.055 * eye, at=(x0, -0.01))
        feature(box, _EYE_WHITE, _ellipse, 0.035, 0.035, at=(x0 - 0.035, -0.05), opacity=0.9)
        feature(box, _PUPIL, _stroke, 0.115 * eye, 0.012, 0.08, at=(x0, -0.02 - 0.135 * eye), opacity=0.8)
        feature(box, hair * np.float32(0.7), _stroke, 0.12, 0.03, 0.03, at=(x0, brow_y), opacity=0.9)
    feature((-0.25, 0.25, 0, 0.4), skin * np.float32(0.76), _stroke, 0.05, 0.01, -0.03, at=(0, 0.17), opacity=0.8)
    bend = -0.025 - 0.095 * f["smile"]
    mouth_y = 0.325 - 0.75 * bend
    feature((-0.45, 0.45, 0.1, 0.6), _LIPS, _stroke, 0.19, 0.038, bend, at=(0, mouth_y))
    return canvas.pixels
