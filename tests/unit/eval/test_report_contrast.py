"""The numbers of the heatmap can be read on every colour: WCAG 2 asks for a contrast of 4.5."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from accrete.eval import report
from accrete.eval.matrix import Array

TEMPLATES = Path(report.__file__).parent / "templates"
# Source: B. Ottosson, "A perceptual color space for image processing", as CSS Color 4 has it.
TO_LMS = np.array(
    [
        [0.4122214708, 0.5363325363, 0.0514459929],
        [0.2119034982, 0.6806995451, 0.1073969566],
        [0.0883024619, 0.2817188376, 0.6299787005],
    ]
)
LUMINANCE = np.array([0.2126, 0.7152, 0.0722])


def linear(color: str) -> Array:
    """Linear sRGB of `#rrggbb`."""
    c = np.array([int(color[k : k + 2], 16) / 255 for k in (1, 3, 5)])
    return np.asarray(np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4))


def mixed(low: str, high: str, percent: float) -> Array:
    """`color-mix(in oklab, high percent%, low)`: Oklab is linear in the cube roots of LMS."""
    ends = [np.cbrt(TO_LMS @ linear(color)) for color in (low, high)]
    roots = ends[0] * (1 - percent / 100) + ends[1] * percent / 100
    return np.asarray(np.clip(np.linalg.inv(TO_LMS) @ roots**3, 0, 1))


def contrast(a: Array, b: Array) -> float:
    darker, lighter = sorted((float(LUMINANCE @ a), float(LUMINANCE @ b)))
    return (lighter + 0.05) / (darker + 0.05)


@pytest.mark.parametrize(("scheme", "mark"), [(0, "darkest"), (1, "dark")])
def test_scores_can_be_read_on_every_colour(scheme: int, mark: str) -> None:
    css = (TEMPLATES / "report.css.jinja").read_text()
    html = (TEMPLATES / "report.html.jinja").read_text()
    names = ("heat-0", "heat-1", "on-low", "on-high")
    low, high, *text = (re.findall(rf"--{name}: (#\w{{6}});", css)[scheme] for name in names)
    found = re.search(rf"' {mark}' if cell.score > (\d+)", html)
    assert found is not None
    edge = float(found.group(1))
    for score in np.arange(0, 100.05, 0.1):
        cell = mixed(low, high, score)
        assert contrast(cell, linear(text[int(score > edge)])) >= 4.5, score
    # The small change below a score is in the same colour, not a paler one.
    assert "opacity" not in re.findall(r"\.heat td small \{.*?\}", css)[0]
