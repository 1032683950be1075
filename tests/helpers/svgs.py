"""Reading the charts that qkit draws."""

from __future__ import annotations

from xml.etree import ElementTree as ET


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)


def widths(svg: str) -> list[float]:
    return [float(rect.attrib["width"]) for rect in parsed(svg).iter("rect")]


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in parsed(svg).iter("text")]
