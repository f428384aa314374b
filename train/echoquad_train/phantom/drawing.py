"""Phantom frames: synthetic apical four-chamber views for tests and the demo.

They use no patient data and are no physiological simulation. A frame is a random heart imaged by a random scanner:
echo level of the tissue under each beam, speckle, point spread, log compression, scan conversion.

The view is apex-down, because the quadrants expect the atria above: the probe is at the bottom centre of the frame and
the sector opens upwards, with the ventricles near the probe (LV left, RV right) and the atria beyond (LA left, RA
right).

``ASD`` differs from ``NORM`` by a gap in the interatrial septum and a larger right heart. Both distributions overlap:
there are small defects, and normal hearts with septal dropout. The scanner (frame size, gain, depth, angle, tilt,
shadows, overlays) has the same distribution for both labels, so that it is no shortcut feature.

Everything follows from seeds. The same numpy build gives the same bytes; another may differ by one grey level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from echoquad_runtime.errors import ConfigError

__all__ = ["LABELS", "Anatomy", "draw_patient", "echo_level", "generator_of", "phantom_frame", "render"]

LABELS = ("ASD", "NORM")
MIN_SIDE = 32  # a chamber has only a few pixels below this size

# The beam grid: fine enough for a 420 px frame, coarse enough that a frame costs some 10 ms.
SAMPLES, BEAMS = 288, 144
PROBE_FACE = 0.015  # depth at which the sector starts, as a share of its depth

# Echo levels in dB below the brightest reflector, roughly those of the CAMUS frames after compression.
BLOOD_DB, TISSUE_DB, WALL_DB, RIM_DB, VALVE_DB = -39.0, -20.0, -13.0, -6.0, -8.0
EDGE = 0.012  # how softly blood turns into wall, in sector depths: partial volume of a thick slice
HEADROOM_DB = 6.0  # level shown as white: the brightest speckle saturates, as on a scanner
SQUARE = 0.35  # 0 draws chambers as ellipses, 1 nearly as boxes; values between give septa of even thickness

Plane: TypeAlias = NDArray[np.floating[Any]]  # float32 throughout: float64 would double the time


@dataclass(frozen=True, slots=True)
class Anatomy:
    """One patient's heart and the scanner's settings.

    Lengths of the heart are in its own unit, which is `scale` sector depths; only `height` and `width` are in pixels.
    Angles are in radians, levels in dB. A chamber is ``(half width, length)``.
    """

    label: str
    lv: tuple[float, float]
    rv: tuple[float, float]
    la: tuple[float, float]
    ra: tuple[float, float]
    septum: float  # thickness of the interatrial septum
    wall: float  # thickness of the left ventricle's wall
    bow: float  # how far the ventricular septum leans to the right at the apex
    gap: float  # length of the defect; 0 for no defect
    gap_at: float  # middle of the defect, as a share of the septum's length from the crux
    flare: float  # level added at the defect's rims (the "T" sign), dB
    dropout: float  # level lost at the fossa ovalis in spite of tissue, dB
    crux: tuple[float, float]  # (right of centre, from the probe), in sector depths
    tilt: float
    scale: float
    half_angle: float
    gain: float
    dynamic_range: float
    depth_gain: float  # time-gain error: level added at full depth, dB
    noise: float  # level of the electronic noise, dB
    grain: tuple[float, float]  # speckle blur, sigma in (samples along, beams across)
    shadows: tuple[tuple[float, float, float, float], ...]  # (beam -1..1, width, start depth, dB lost)
    height: int
    width: int
    offset: float  # probe right of the frame's centre, as a share of its width
    overlay: bool
    texture: int  # seed of what all frames of a patient share


def draw_patient(rng: np.random.Generator, label: str) -> Anatomy:
    """Return a random patient and scanner.

    Parameters
    ----------
    rng
        Source of all variation; advanced by the same number of draws for either label.
    label
        ``"ASD"`` or ``"NORM"``.

    Raises
    ------
    ConfigError
        If the label is unknown.
    """
    if label not in LABELS:
        raise ConfigError(f"phantom label is {label!r}, expected {' or '.join(LABELS)}")

    def uniform(low: float, high: float) -> float:
        return float(rng.uniform(low, high))

    def spread(sd: float) -> float:
        return math.exp(sd * float(np.clip(rng.standard_normal(), -2.0, 2.0)))

    half_angle = math.radians(uniform(35.0, 43.0))
    height = int(rng.integers(220, 371))
    width = int(np.clip(round(height * 2 * math.sin(half_angle) * uniform(0.88, 1.1)), 200, 420))
    shadows = tuple(
        (uniform(-1.0, 1.0), uniform(0.04, 0.12), uniform(0.1, 0.6), uniform(5.0, 16.0))
        for _ in range(int(rng.integers(0, 4)))
    )
    gain, texture = float(np.clip(rng.normal(0.0, 3.5), -7.0, 7.0)), int(rng.integers(2**31))
    left, right, ventricle, atrium = spread(0.05), spread(0.07), spread(0.04), spread(0.05)
    dropout = uniform(5.0, 20.0) if rng.random() < 0.5 else uniform(0.0, 4.0)
    severity = math.sqrt(uniform(0.02, 1.0))  # favours large defects
    flare, gap_at = uniform(0.0, 6.0), uniform(0.4, 0.62)

    variant = uniform(1.12, 1.22) if rng.random() < 0.2 else 1.0  # a large but healthy right heart

    ill = label == "ASD"
    if not ill:
        right *= variant
    else:  # volume overload: the right heart grows, the left fills less
        right *= 1.0 + 0.6 * severity
        left *= 1.0 - 0.12 * severity
    return Anatomy(
        label=label,
        lv=(0.136 * left * ventricle, 0.40 * spread(0.05)),
        rv=(0.094 * right * ventricle, 0.345 * spread(0.05) * (1.0 + 0.14 * severity * ill)),
        la=(0.104 * left * atrium, 0.235 * spread(0.05)),
        ra=(0.095 * right * atrium, 0.230 * spread(0.05) * (1.0 + 0.2 * severity * ill)),
        septum=0.022 * spread(0.12),
        wall=0.048 * spread(0.15),
        bow=uniform(0.015, 0.055) * (1.0 - 0.8 * severity * ill),
        gap=(0.04 + 0.10 * severity) * ill,
        gap_at=gap_at,
        flare=flare,
        dropout=dropout,
        crux=(uniform(-0.015, 0.015), uniform(0.52, 0.56)),
        tilt=math.radians(uniform(-3.5, 3.5)),
        scale=uniform(1.0, 1.1),
        half_angle=half_angle,
        gain=gain,
        dynamic_range=uniform(48.0, 60.0),
        depth_gain=uniform(-6.0, 5.0),
        noise=uniform(-46.0, -31.0),
        grain=(uniform(0.7, 1.15), uniform(1.0, 1.9)),
        shadows=shadows,
        height=height,
        width=width,
        offset=uniform(-0.02, 0.02),
        overlay=bool(rng.random() < 0.6),
        texture=texture,
    )


def _ramp(x: Plane) -> Plane:
    """Return a smooth step from 0 at x <= 0 to 1 at x >= 1, cheaper than an exponential."""
    t = np.clip(x, 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def _chamber(x: Plane, y: Plane, size: float) -> Plane:
    """Return the approximate distance to a rounded box of half sides 1, in units of `size`; negative inside."""
    xx, yy = x * x, y * y
    return (np.sqrt((1.0 - SQUARE) * (xx + yy) + SQUARE * (xx * xx + yy * yy)) - 1.0) * np.float32(0.8 * size)


def _leaflet(u: Plane, v: Plane, start: tuple[float, float], end: tuple[float, float]) -> Plane:
    """Return the squared distance from each (u, v) to the segment from start to end."""
    du, dv = end[0] - start[0], end[1] - start[1]
    pu, pv = u - start[0], v - start[1]
    along = np.clip((pu * du + pv * dv) / (du * du + dv * dv), 0.0, 1.0)
    return np.square(pu - along * du) + np.square(pv - along * dv)


def _valves(level: Plane, u: Plane, v: Plane, a: Anatomy, *, opening: float, wide: float) -> None:
    """Draw two leaflets in each atrioventricular valve, in place; only cells near the valves are computed."""
    near = (v > -0.16) & (v < 0.06) & (np.abs(u) < 0.36)
    nu, nv = u[near], v[near]
    valves = level[near]
    for sign, width in ((-1.0, a.la[0] * wide), (1.0, a.ra[0] * wide)):
        inner, outer = sign * 0.27 * width, sign * 1.6 * width
        middle = sign * 0.95 * width
        for root, length_open in ((inner, 0.085), (outer, 0.06)):
            swing = opening * 0.9
            tip = (middle + swing * (root - middle), -0.022 - swing * length_open)
            valves = np.maximum(valves, VALVE_DB - 9.0 * _leaflet(nu, nv, (root, 0.004), tip) / 0.0085**2)
    level[near] = valves


def _cycle(phase: float) -> tuple[float, float]:
    """Return contraction and valve opening, each in [0, 1]; phase 0 is end-diastole, about 0.4 end-systole."""
    contraction = math.sin(math.pi * min(phase / 0.8, 1.0)) ** 2
    early = math.exp(-(((phase - 0.57) / 0.09) ** 2))
    atrial = 0.7 * math.exp(-(((phase - 0.86) / 0.06) ** 2))
    return contraction, max(early, atrial)


def echo_level(anatomy: Anatomy, phase: float, u: Plane, v: Plane) -> NDArray[np.float32]:
    """Return the noise-free echo level of the heart, before beams, speckle and gain.

    Parameters
    ----------
    anatomy
        The patient.
    phase
        Phase of the cardiac cycle, 0 <= phase < 1.
    u, v
        float32 arrays of one shape: heart coordinates with the crux at (0, 0). `u` grows towards the right heart, `v`
        towards the atria. The interatrial septum is ``u = 0, v > 0``; a chamber is at most 0.5 long.

    Returns
    -------
    float32 array of the same shape
        Level in dB below the brightest reflector, about -45 to 0.
    """
    a, nought = anatomy, np.float32(0.0)
    squeeze, opening = _cycle(phase)
    base = -0.03 * squeeze  # the valve plane moves towards the apex, which is fixed
    v = v - np.float32(base)
    u = u - np.where(v < 0.0, np.float32(a.bow / 0.16) * v * v, nought)

    side: Plane = np.abs(u)
    is_left = u < 0.0
    # Each side holds one ventricle and one atrium, so that two evaluations draw four chambers.
    narrow, wide = 1.0 - 0.20 * squeeze, 1.0 + 0.10 * squeeze

    def pick(left: float, right: float) -> Plane:
        return np.where(is_left, np.float32(left), np.float32(right))

    v_width, v_length = pick(a.lv[0] * narrow, a.rv[0] * narrow), pick(a.lv[1] + base, a.rv[1] + base)
    a_width, a_length = pick(a.la[0] * wide, a.ra[0] * wide), pick(a.la[1] * wide, a.ra[1] * wide)
    ivs = np.float32(0.5 * a.wall * (1.0 + 0.25 * squeeze))

    y = (v + 0.008 + 0.5 * v_length) / (0.5 * v_length)  # -1 at the apex, 1 at the valve
    # Ventricles taper towards the apex, the right one more; they are anchored at the septum, so the free wall leans.
    half = v_width * (1.0 + pick(0.14, 0.3) * np.clip(y, -1.2, 1.0))
    ventricle = _chamber((side - ivs - half) / half, y, 0.11)
    y = (v - 0.012 - 0.5 * a_length) / (0.5 * a_length)
    atrium = _chamber((side - 0.5 * a.septum - a_width) / a_width, y, 0.11)
    mouth = _chamber((side - 0.012 - 0.95 * a_width) / (0.76 * a_width), v / 0.05, 0.05)
    blood = np.minimum(np.minimum(ventricle, atrium), mouth)
    v_wall = pick(a.wall * (1.0 + 0.35 * squeeze), 0.5 * a.wall)
    wall = np.minimum(ventricle - v_wall, atrium - np.float32(0.016))

    length = 0.5 * (a.la[1] + a.ra[1]) * wide
    at, gap = a.gap_at * length, a.gap * (1.0 + 0.15 * squeeze)
    if gap > 0.0:
        blood = np.minimum(blood, np.maximum(side - 0.04, np.abs(v - np.float32(at)) - np.float32(0.5 * gap)))

    rim = np.float32(RIM_DB) - np.square((wall - 0.008) / 0.011) * 9.0
    level = np.float32(TISSUE_DB) + np.float32(WALL_DB - TISSUE_DB) * _ramp(0.5 - wall / 0.03)
    # The pericardium and the atrial roof are bright where they face the beam; side walls run along it and are not.
    facing = np.clip(0.35 + 1.6 * np.abs(v) / (side + 0.12) - np.where(v < 0.0, nought + 1.2, nought), 0.0, 1.0)
    level = np.maximum(level, np.where(wall > -0.03, TISSUE_DB + (rim - TISSUE_DB) * facing, BLOOD_DB))
    # The atrial septum is thin and runs along the beam, so that intact tissue may give hardly any echo.
    fossa = np.square((v - np.float32(at)) / 0.055)
    lost = np.float32(a.dropout) / (1.0 + fossa * fossa)
    level -= np.where((side < a.septum) & (v > 0.0), lost, nought)
    level += (BLOOD_DB - level) * _ramp(0.5 - blood / EDGE)

    def spot(u0: float, v0: float, size: float, peak: float) -> None:
        np.maximum(level, peak - 9.0 * (np.square(u - u0) + np.square(v - v0)) / size**2, out=level)

    spot(0.0, -0.005, 0.024, -2.0)  # the crux
    spot(-2.05 * a.la[0], 0.0, 0.036, -4.0)  # the grooves where the valves hang
    spot(2.05 * a.ra[0], 0.0, 0.028, -6.0)
    if gap > 0.0:
        for end in (at - 0.5 * gap, at + 0.5 * gap):
            spot(0.0, end, 0.009, WALL_DB + a.flare)

    _valves(level, u, v, a, opening=opening, wide=wide)
    result: NDArray[np.float32] = level.astype(np.float32, copy=False)
    return result


def _hats(knots: int, at: Plane) -> Plane:
    """Return weights [at.size, knots] of linear interpolation between knots spread evenly over [0, 1]."""
    position = at[:, None] * np.float32(knots - 1)
    return np.clip(1.0 - np.abs(position - np.arange(knots, dtype=np.float32)), 0.0, 1.0)


def _field(rng: np.random.Generator, depths: Plane, beams: Plane, knots: tuple[int, int]) -> Plane:
    """Return a smooth random field [samples, beams] with unit variance at its knots."""
    values = rng.standard_normal(knots, dtype=np.float32)
    field: Plane = _hats(knots[0], depths) @ values @ _hats(knots[1], 0.5 + 0.5 * beams).T
    return field


def _blur(field: NDArray[Any], sigma: float, axis: int) -> NDArray[Any]:
    """Blur along one axis with a Gaussian that keeps the variance of white noise; the edges wrap around."""
    radius = math.ceil(2.2 * sigma)
    taps = np.exp(-0.5 * (np.arange(radius + 1) / sigma) ** 2)
    taps /= math.sqrt(float(taps[0] ** 2 + 2.0 * np.sum(taps[1:] ** 2)))
    out: NDArray[Any] = field * np.float32(taps[0])
    for shift in range(1, radius + 1):
        out += np.float32(taps[shift]) * (np.roll(field, shift, axis) + np.roll(field, -shift, axis))
    return out


def _beams(a: Anatomy, rng: np.random.Generator, phase: float) -> Plane:
    """Return grey levels in [0, 255] on the beam grid [SAMPLES, BEAMS], depth first."""
    steady = np.random.Generator(np.random.PCG64(a.texture))
    depths = np.linspace(PROBE_FACE, 1.0, SAMPLES, dtype=np.float32)
    beams = np.linspace(-1.0, 1.0, BEAMS, dtype=np.float32)
    shift, sway = rng.normal(0.0, 0.004, 2), float(rng.normal(0.0, 0.01))  # motion of the probe

    angle = beams * np.float32(a.half_angle)
    x = depths[:, None] * np.sin(angle)[None, :] - np.float32(a.crux[0] + shift[0])
    z = depths[:, None] * np.cos(angle)[None, :] - np.float32(a.crux[1] + shift[1])
    cos, sin = np.float32(math.cos(a.tilt + sway) / a.scale), np.float32(math.sin(a.tilt + sway) / a.scale)
    u, v = x * cos - z * sin, x * sin + z * cos
    # Real outlines are irregular: bend the coordinates a little, in the same way for all frames of a patient.
    u += 0.010 * _field(steady, depths, beams, (8, 8))
    v += 0.010 * _field(steady, depths, beams, (8, 8))
    level = echo_level(a, phase, u, v)

    # Patchy gain (contact, lung, fibre direction) and clutter near the probe.
    level += 4.5 * _field(steady, depths, beams, (5, 7)) + 4.0 * _field(steady, depths, beams, (26, 17))
    clutter = (-10.0 - 150.0 * depths)[:, None] + 6.0 * _field(steady, depths, beams, (60, 4))
    level = np.maximum(level, clutter)
    for beam, width, start, loss in a.shadows:
        across = loss / (1.0 + ((beams - beam) / width) ** 4)
        level -= across[None, :] * _ramp((depths - start) / 0.12)[:, None]

    grains = rng.standard_normal((2, SAMPLES, BEAMS), dtype=np.float32)
    echo = (grains[0] + 1j * grains[1]) * np.exp(level * np.float32(math.log(10.0) / 20.0))
    # Blur on the beam grid: beams widen with depth, and with them the speckle after scan conversion.
    echo = _blur(_blur(echo.astype(np.complex64), a.grain[0], 0), a.grain[1], 1)
    floor = rng.standard_normal((SAMPLES, BEAMS), dtype=np.float32)
    power = np.square(echo.real) + np.square(echo.imag)
    power += np.square(floor) * np.float32(10.0 ** (a.noise / 10.0))
    decibels = np.float32(10.0 / math.log(10.0)) * np.log(power + np.float32(1e-9))
    decibels += (a.gain + a.depth_gain * (depths - 0.5))[:, None]
    share = (decibels + np.float32(a.dynamic_range - HEADROOM_DB)) / np.float32(a.dynamic_range)
    grey: Plane = np.clip(share * np.float32(255.0), 0.0, 255.0)
    return grey


def _overlay(frame: NDArray[np.uint8], a: Anatomy) -> None:
    """Draw depth ticks and bars of text-like blocks at the frame's edge, in place."""
    rng = np.random.Generator(np.random.PCG64([a.texture, 1]))
    ink = int(rng.integers(90, 200))
    for row in np.linspace(0.05, 0.95, int(rng.integers(7, 14))) * a.height:
        column = slice(-5, -1) if ink % 2 else slice(1, 5)
        frame[int(row), column] = ink
    for _ in range(int(rng.integers(1, 5))):
        block = rng.random((6, 4 * int(rng.integers(4, 14)))) < 0.55
        block[:, ::4] = False
        top = int(rng.choice([2, 10, a.height - 18, a.height - 9]))
        part = block[: max(0, a.height - top), : a.width - 16]
        left = 8 if rng.random() < 0.5 else a.width - 8 - part.shape[1]
        frame[top : top + part.shape[0], left : left + part.shape[1]][part] = ink


def render(anatomy: Anatomy, rng: np.random.Generator, phase: float) -> NDArray[np.uint8]:
    """Return one frame of a patient.

    Parameters
    ----------
    anatomy
        The patient and the scanner.
    rng
        Source of what differs between frames: speckle, noise and small movements of the probe.
    phase
        Phase of the cardiac cycle, 0 <= phase < 1: 0 is end-diastole, about 0.4 end-systole.

    Returns
    -------
    uint8 [height, width]
        Grey levels, 0 outside the sector and the overlays.

    Raises
    ------
    ConfigError
        If the phase or the frame's size is out of range.
    """
    a = anatomy
    if not 0.0 <= phase < 1.0:
        raise ConfigError(f"phase is {phase}, expected 0 <= phase < 1")
    if min(a.height, a.width) < MIN_SIDE:
        raise ConfigError(f"frame is {a.height} x {a.width}, expected sides of {MIN_SIDE} or more")
    grid = _beams(a, rng, phase)

    depth = min(0.97 * a.height, 0.99 * a.width / (2.0 * math.sin(a.half_angle)))  # of the sector, in pixels
    x = (np.arange(a.width, dtype=np.float32) + 0.5 - a.width * (0.5 + a.offset)) / np.float32(depth)
    z = (0.5 * (a.height + depth) - np.arange(a.height, dtype=np.float32) - 0.5) / np.float32(depth)
    radius = np.sqrt(np.square(x)[None, :] + np.square(z)[:, None])
    edge = np.float32(math.tan(a.half_angle))
    sector = (radius <= 1.0) & (radius >= PROBE_FACE) & (np.abs(x)[None, :] <= edge * z[:, None])
    rows, cols = np.nonzero(sector)
    across = (np.arctan2(x[cols], z[rows]) / np.float32(2.0 * a.half_angle) + 0.5) * np.float32(BEAMS - 1)
    along = (radius[rows, cols] - PROBE_FACE) * np.float32((SAMPLES - 1) / (1.0 - PROBE_FACE))
    i = np.clip(along.astype(np.int32), 0, SAMPLES - 2)
    j = np.clip(across.astype(np.int32), 0, BEAMS - 2)
    down, over = along - i, across - j
    flat, at = grid.ravel(), i * BEAMS + j
    upper = flat[at] + over * (flat[at + 1] - flat[at])
    lower = flat[at + BEAMS] + over * (flat[at + BEAMS + 1] - flat[at + BEAMS])
    frame = np.zeros((a.height, a.width), dtype=np.uint8)
    frame[rows, cols] = np.clip(np.rint(upper + down * (lower - upper)), 0.0, 255.0).astype(np.uint8)
    if a.overlay:
        _overlay(frame, a)
    return frame


def generator_of(seed: int, *key: int) -> np.random.Generator:
    """Return the random generator of one patient or frame, independent of the number of others.

    Raises
    ------
    ConfigError
        If the seed is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed is {seed}, expected a whole number, 0 or more")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=key)))


def phantom_frame(seed: int, label: str = "NORM", size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """Return one frame of a random patient, uint8 [height, width].

    Parameters
    ----------
    seed
        0 or more. The same seed, label and size give the same frame.
    label
        ``"ASD"`` or ``"NORM"``.
    size
        Height and width in pixels; None draws them with the patient.

    Raises
    ------
    ConfigError
        If the seed, the label or the size is out of range.
    """
    rng = generator_of(seed)
    anatomy = draw_patient(rng, label)
    if size is not None:
        anatomy = replace(anatomy, height=size[0], width=size[1])
    return render(anatomy, rng, float(rng.random()))
