"""Charts: where values land, by hand."""

from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from mansu_interp.viz.plots import Axis, Dots, make_axis, scatter_svg, strip_svg


def test_axis_positions():
    assert Axis(0.0, 10.0, 100.0, 200.0, False).at(2.5) == 125
    assert Axis(0.0, 10.0, 100.0, 200.0, False).at(99.0) == 200
    assert Axis(0.01, 1.0, 100.0, 300.0, True).at(0.1) == pytest.approx(200)
    up = Axis(0.0, 1.0, 250.0, 10.0, False)
    assert up.at(0.0) == 250 and up.at(1.0) == 10
    assert Axis(-0.05, 1.05, 0.0, 1.0, False).ticks() == [0.0, 0.5, 1.0]
    assert Axis(0.01, 10.0, 0.0, 1.0, True).ticks() == pytest.approx([0.01, 0.1, 1, 10])


def test_axis_of_equal_or_missing_values():
    flat = make_axis([3.0, 3.0], 0.0, 1.0, False)
    assert flat.low < 3 < flat.high
    assert make_axis([0.0, -1.0], 0.0, 1.0, True).low == pytest.approx(0.1)


def test_strip_has_a_mark_per_value_at_its_place():
    svg = strip_svg([Dots("a<b", [1.0, 2.0]), Dots("ours", [3.0], True)], "what", target=2.0)
    ElementTree.fromstring(svg)
    places = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', svg)]
    (square,) = [float(x) + 4 for x in re.findall(r'<rect x="([\d.]+)" y="[\d.]+" width="8"', svg)]
    assert places[1] - places[0] == pytest.approx(square - places[1], abs=0.2)
    (target,) = re.findall(r'class="target" stroke-width="1.5" d="M([\d.]+)', svg)
    assert float(target) == pytest.approx(places[1], abs=0.1)
    assert "a&lt;b: 1" in svg


def test_scatter_leaves_out_what_a_logarithm_cannot_show():
    points = [(Dots("m", [0.0, 0.1]), Dots("m", [1.0, 2.0]))]
    svg = scatter_svg(points, "x", "y", log_x=True)
    ElementTree.fromstring(svg)
    assert svg.count("<circle") == 1
    assert scatter_svg(points, "x", "y").count("<circle") == 2


def test_scatter_names_each_row_once():
    points = [(Dots("dense", [1.0, 2.0]), Dots("dense", [0.3, 0.4]))]
    assert scatter_svg(points, "x", "y", labels=True).count(">dense</text>") == 1
    assert ">dense</text>" not in scatter_svg(points, "x", "y")


def test_names_at_one_place_do_not_cover_each_other():
    points = [(Dots(n, [2.0]), Dots(n, [0.3])) for n in ("one", "two", "three")]
    points.append((Dots("far", [1.0]), Dots("far", [0.4])))
    svg = scatter_svg(points, "x", "y", labels=True)
    lines = [float(y) for y in re.findall(r'y="([\d.]+)">(?:one|two|three)<', svg)]
    assert [b - a for a, b in itertools.pairwise(lines)] == [12.0, 12.0]
