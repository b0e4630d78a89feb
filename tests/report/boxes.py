"""What a look at a plot would find, without a browser: texts that overlap or are cut, axes without label or unit, no legend.

Widths are those of DejaVu Sans, measured once; a browser with another font draws narrower texts.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from dataclasses import dataclass

FONT = 12.5
WIDTH_OF = {
    letter: width
    for width, letters in {
        3.6: "'ijlIJ",
        4.1: " ,./:;\\|",
        4.9: "f-()[]t!",
        5.8: 'r"',
        6.6: "*_`s?zc",
        7.2: "FkLc",
        7.8: "vxyPTYoae",
        8.0: "ESbdghnpqu$0123456789{}",
        8.7: "KABVXZCR",
        9.8: "UNHDOQG&",
        10.8: "w#+<=>^~M±→×",
        12.5: "%mW@…",
    }.items()
    for letter in letters
}


@dataclass(frozen=True)
class Box:
    """A text's place in view box units."""

    text: str
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Box) -> bool:
        return (
            min(self.right, other.right) - max(self.left, other.left) > 0.5
            and min(self.bottom, other.bottom) - max(self.top, other.top) > 0.5
        )


def width(text: str) -> float:
    return sum(WIDTH_OF.get(letter, FONT) for letter in text)


def boxes(svg: ET.Element) -> list[Box]:
    """Every text's box: from 0.76 font heights above its base line to 0.2 below."""
    found = []
    for one in svg.iter("text"):
        text = (one.text or "") + "".join(child.tail or "" for child in one)
        x, y, long = float(one.get("x")), float(one.get("y")), width(text)
        left = x - {"start": 0.0, "middle": long / 2, "end": long}[one.get("text-anchor")]
        up, down = 0.76 * FONT, 0.2 * FONT
        turned = re.fullmatch(r"translate\(([\d.]+) ([\d.]+)\) rotate\(-90\)", one.get("transform", ""))
        if turned:
            middle_x, middle_y = map(float, turned.groups())
            found.append(Box(text, middle_x - up, middle_y - long / 2, middle_x + down, middle_y + long / 2))
        else:
            found.append(Box(text, left, y - up, left + long, y + down))
    return found


def faults(figure: str) -> list[str]:
    """What is wrong with one figure (``<figure>...</figure>``)."""
    tree = ET.fromstring(figure)
    svg = next(one for one in tree.iter("svg") if one.get("role") == "img")
    name = svg.get("aria-label")
    by_class: dict[str, list[str]] = {}
    for text in svg.iter("text"):
        by_class.setdefault(text.get("class", ""), []).append((text.text or "") + "".join(child.tail or "" for child in text))
    found = []
    for axis in ("axis-x", "axis-y"):
        labels = by_class.get(axis, [])
        if len(labels) != 1 or not re.fullmatch(r".+ \([^()]+\)", labels[0]):
            found.append(f"{name}: {axis} has no label with a unit: {labels}")
    entries = [item for one in tree.iter("ul") if one.get("class") == "legend" for item in one.iter("li")]
    if not by_class.get("scale") and (not entries or not all("".join(item.itertext()).strip() for item in entries)):
        found.append(f"{name}: no legend")
    if not by_class.get("tick"):
        found.append(f"{name}: no ticks")
    _, _, wide, high = map(float, svg.get("viewBox").split())
    places = boxes(svg)
    found += [
        f"{name}: {box.text!r} is cut" for box in places if box.left < 0 or box.top < 0 or box.right > wide or box.bottom > high
    ]
    for index, box in enumerate(places):
        found += [f"{name}: {box.text!r} on {other.text!r}" for other in places[:index] if box.overlaps(other)]
    return found


def figures(page: str) -> list[str]:
    """All figures of a page."""
    return re.findall(r"<figure>.*?</figure>", page, re.DOTALL)
