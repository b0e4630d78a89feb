import xml.etree.ElementTree as ET

import pytest

from r1mega.report.plot import (
    MAX_POINTS,
    WIDTH,
    Bar,
    Mark,
    Series,
    bar_plot,
    heat_map,
    line_plot,
    nice_ticks,
    shorten,
    stacked_bars,
    text_width,
    tick_texts,
)


def svg_of(figure):
    """The plot (not the legend's swatches) as a tree; fails where the text is not well-formed XML."""
    return next(svg for svg in ET.fromstring(figure).iter("svg") if svg.get("role") == "img")


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 10, 5) == [0, 2, 4, 6, 8, 10]
    assert nice_ticks(0.31, 1.72, 5) == pytest.approx([0.5, 1.0, 1.5])
    assert nice_ticks(-0.05, 1.05, 5) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert nice_ticks(3, 3) == [3]


def test_tick_texts_tell_neighbours_apart():
    assert tick_texts([0.0, 0.2, 0.4]) == ["0.0", "0.2", "0.4"]
    assert tick_texts([0.0, 2e-5, 4e-5]) == ["0", "2.0e-05", "4.0e-05"]
    assert tick_texts([0, 5000, 10000, 15000]) == ["0", "5k", "10k", "15k"]
    assert tick_texts([0, 2e6, 4e7]) == ["0", "2M", "40M"]
    assert tick_texts([0, 500, 1000]) == ["0", "500", "1000"]
    assert tick_texts([0.0, 1e30, 2e30]) == ["0", "1.0e+30", "2.0e+30"]


def test_line_goes_from_corner_to_corner():
    svg = svg_of(line_plot([Series("a", [(0, 0), (10, 1)])], "step", "loss", y_range=(0.0, 1.0)))
    path = next(path.get("d") for path in svg.iter("path"))
    (x0, y0), (x1, y1) = [tuple(map(float, spot.split(","))) for spot in path.lstrip("M").split("L")]
    axis = next(line for line in svg.iter("line") if line.get("class") == "axis" and line.get("y1") == line.get("y2"))
    assert (x0, y0) == (float(axis.get("x1")), float(axis.get("y1")))
    assert x1 == float(axis.get("x2")) < WIDTH and y1 == 10.0


def test_line_plot_has_labels_and_a_legend():
    one = line_plot([Series("a", [(0, 1), (1, 2)])], "step", "loss (nats)", title="Loss")
    two = line_plot([Series("a", [(0, 1), (1, 2)]), Series("b", [(0, 2), (1, 1)], 1, dashed=True)], "step", "loss (nats)")
    assert one.count("<li ") == 1 and "<figcaption>Loss</figcaption>" in one
    assert two.count("<li ") == 2 and "dashed" in two
    labels = {text.get("class"): text.text for text in svg_of(two).iter("text")}
    assert labels["axis-x"] == "step" and labels["axis-y"] == "loss (nats)"


def test_values_that_cannot_be_drawn_are_left_out():
    assert line_plot([Series("a", [(0, float("nan"))])], "x", "y") == ""
    assert line_plot([], "x", "y") == ""
    log = svg_of(line_plot([Series("a", [(0, 0.0), (1, 1e-5), (2, 1e-3)])], "x", "y", log_y=True))
    assert next(path.get("d") for path in log.iter("path")).count(",") == 2
    assert {"1e-5", "2e-5", "1e-4", "1e-3"} <= {text.text for text in log.iter("text")}


def test_a_narrow_log_axis_has_ticks_around_its_values():
    svg = svg_of(line_plot([Series("a", [(0, 1.5e-7), (1, 4.6e-7)])], "x", "y", log_y=True))
    assert {"1e-7", "2e-7", "5e-7"} <= {text.text for text in svg.iter("text")}


def test_a_constant_and_a_single_value_are_drawn():
    assert svg_of(line_plot([Series("a", [(1, 5.0), (2, 5.0)])], "x", "y")).find("path") is not None
    assert svg_of(line_plot([Series("a", [(1, 0.0)])], "x", "y")).find("circle") is not None
    assert svg_of(line_plot([Series("a", [(1, 2e-5), (2, 2e-5)])], "x", "y", log_y=True)).find("path") is not None


def test_long_lines_are_thinned_to_means_and_a_band_keeps_the_spikes():
    points = [(float(x), float(x % 2)) for x in range(4 * MAX_POINTS)]
    points[10] = (10.0, 9.0)
    figure = line_plot([Series("a", points)], "x", "y", y_range=(0.0, 1.0))
    band, line = (path.get("d") for path in svg_of(figure).iter("path"))
    heights = {spot.split(",")[1] for spot in line.lstrip("M").split("L")}
    assert line.count(",") == MAX_POINTS and len(heights) == 2  # every group of four has mean 0.5, but for the one with the spike
    tops = [float(spot.split(",")[1]) for spot in band.strip("MZ").split("L")]
    assert min(tops) < 20 and min(map(float, heights)) > 100 and "Means of 4 lines each" in figure


def test_marks_are_lines_with_flags_named_once_and_flags_alone_when_there_are_many():
    series = [Series("a", [(0, 1), (900, 2)])]
    few = line_plot(series, "x", "y", marks=[Mark(300, "step skipped", 6, "step 300: <why>"), Mark(600, "step skipped", 6)])
    assert few.count('class="mark"') == 2 and few.count("step skipped</li>") == 1 and "step 300: &lt;why&gt;" in few
    many = line_plot(series, "x", "y", marks=[Mark(x, "step skipped") for x in range(900)])
    assert many.count('class="mark"') == 0 and 100 < many.count('class="flag"') < WIDTH
    beyond = svg_of(line_plot(series, "x", "y", marks=[Mark(2000, "rolled back")]))
    assert "2000" in {text.text for text in beyond.iter("text")}


def test_steps_have_whole_ticks():
    assert nice_ticks(1, 3, 5, whole=True) == [1, 2, 3]
    one = svg_of(line_plot([Series("a", [(7, 1.0)])], "x", "y"))
    assert [text.text for text in one.iter("text") if text.get("class") == "tick"][-1] == "7"


def test_a_long_text_is_cut_in_its_middle():
    assert shorten("short", 100) == "short"
    cut = shorten("eval_of_" + "x" * 80 + "_grpo_1", 150)
    assert cut.startswith("eval_of_") and cut.endswith("_grpo_1") and "…" in cut and text_width(cut) <= 150


def test_bar_length_and_error_bar_are_in_proportion():
    svg = svg_of(bar_plot([Bar("a", 20.0, 5.0), Bar("b", 80.0, 20.0, hollow=True)], "pass@1 (%)", "stage"))
    widths = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert widths[1] == pytest.approx(4 * widths[0], abs=0.3)
    assert {"20.0 ± 5.0", "80.0 ± 20.0", "a", "b"} <= {text.text for text in svg.iter("text")}
    assert [rect.get("class") for rect in svg.iter("rect")][1].endswith("hollow")


def test_labels_are_escaped_and_shortened():
    figure = bar_plot([Bar("<b>" + "x" * 40, 1.0)], "x & y", "stage", title="<i>")
    svg = svg_of(figure)
    assert "<b>" not in figure and "<i>" not in figure
    short = next(text for text in svg.iter("text") if text.find("title") is not None)
    assert short.find("title").text == "<b>" + "x" * 40 and "…" in short.find("title").tail


def test_stacked_parts_lie_end_to_end():
    figure = stacked_bars(["r1", "r2"], {"a": [10.0, 0.0], "none": [0.0, 0.0], "b": [30.0, 20.0]}, "seconds", "stage")
    svg = svg_of(figure)
    rects = [rect for rect in svg.iter("rect")]
    first, second = rects[0], rects[1]
    assert float(first.get("x")) + float(first.get("width")) == pytest.approx(float(second.get("x")), abs=0.11)
    assert float(second.get("width")) == pytest.approx(3 * float(first.get("width")), abs=0.3)
    assert "none" not in figure and {"40", "20"} <= {text.text for text in svg.iter("text")}


def test_heat_map_colours_by_distance_from_the_centre():
    svg = svg_of(heat_map([[1.0, 2.0, 0.5], [1.5, 1.0, 1.0]], "expert", "layer", "load"))
    cells = [
        (rect.get("class").split()[1], float(rect.get("fill-opacity")))
        for rect in svg.iter("rect")
        if rect.find("title") is not None
    ]
    assert cells == [("high", 0.0), ("high", 1.0), ("low", 1.0), ("high", 0.5), ("high", 0.0), ("high", 0.0)]
    assert heat_map([], "x", "y", "z") == ""


def test_equal_loads_make_no_colour_and_no_error():
    svg = svg_of(heat_map([[1.0] * 256] * 58, "expert", "layer", "load"))
    assert {rect.get("fill-opacity") for rect in svg.iter("rect")} == {"0.00"}
    assert float(svg.get("viewBox").split()[3]) < 700
