"""dmd.viz: pictures say what they show, sliders carry their frames, numbers are written once."""

import base64
import html
import io
import json
import subprocess
import sys
from html.parser import HTMLParser

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from dmd import MODALITIES, viz

ALT = 'A line that rises from 0 to 1, marked "A < B & C", over ten time steps'


@pytest.fixture
def shown(monkeypatch):
    """What reaches the reader: the data of every displayed object, in order."""
    outputs = []
    monkeypatch.setattr(viz, "display", lambda thing: outputs.append(thing.data))
    return outputs


class Tags(HTMLParser):
    """Every start tag with its attributes, as a browser reads them."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def __getitem__(self, name):
        return [attributes for tag, attributes in self.found if tag == name]


def picture(source):
    return Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))


def line(height=1.0):
    figure, axes = plt.subplots()
    axes.plot([0, height])
    axes.set_ylim(0, 3)
    return figure


def alt_of(height):
    return f"A straight line that rises from zero to {height} over a single step"


def test_show_carries_the_alt_text_through_escaping_and_closes_the_figure(shown):
    viz.show(line(), ALT)
    (image,) = Tags(shown[0])["img"]
    assert image["alt"] == ALT
    assert image["src"].startswith("data:image/png;base64,")
    assert plt.get_fignums() == []


def test_figures_are_sharp_and_stand_on_opaque_white(shown):
    with matplotlib.rc_context():
        viz.setup()
        viz.show(line(), ALT)
    (image,) = Tags(shown[0])["img"]
    pixels = picture(image["src"])
    assert pixels.width >= 1.5 * int(image["width"])
    assert pixels.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)


@pytest.mark.parametrize("alt", ["", "   ", "a plot", "a" + " " * 60 + "plot"])
def test_an_alt_text_that_says_nothing_is_refused(alt, shown):
    with pytest.raises(ValueError, match="too short"):
        viz.show(line(), alt)
    assert shown == []
    plt.close("all")


def test_each_frame_of_a_slider_has_its_own_picture_text_and_value(shown):
    heights = [0.5, 1.0, 2.0]
    viz.slider(line, heights, "Height < 3", alt_of)
    tags = Tags(shown[0])
    (box,) = [a for a in tags["figure"] if "dmd-slider" in a["class"]]
    frames = json.loads(box["data-frames"])
    assert [f["alt"] for f in frames] == [alt_of(h) for h in heights]
    assert [f["value"] for f in frames] == ["0.5", "1", "2"]
    assert len({f["src"] for f in frames}) == 3
    assert len({picture(f["src"]).size for f in frames}) == 1
    (image,) = tags["img"]
    assert (image["src"], image["alt"]) == (frames[0]["src"], frames[0]["alt"])
    assert plt.get_fignums() == []
    assert len(shown[0]) < 250_000


def test_a_slider_is_a_labelled_native_control(shown):
    viz.slider(line, [0.5, 1.0, 2.0], "Height < 3", alt_of)
    tags = Tags(shown[0])
    (control,), (label,), (output,) = tags["input"], tags["label"], tags["output"]
    assert control["type"] == "range"
    assert (control["min"], control["max"], control["value"]) == ("0", "2", "0")
    assert control["id"] == label["for"] == output["for"]
    assert control["aria-valuetext"] == "0.5"
    assert html.escape("Height < 3") in shown[0]


def test_sliders_share_nothing_and_load_nothing(shown):
    viz.slider(line, [0.5, 1.0], "Height", alt_of)
    viz.slider(line, [0.5, 1.0], "Height", alt_of)
    first, second = (Tags(text)["input"][0]["id"] for text in shown)
    assert first != second
    for text in shown:
        assert not Tags(text)["script"]
        assert "http" not in text


@pytest.mark.parametrize(
    ("values", "label", "alt", "message"),
    [
        ([1.0], "Height", alt_of, "two values"),
        ([1.0, 2.0], " ", alt_of, "label"),
        ([1.0, 2.0], "Height", lambda h: "short", "too short"),
        ([1.0, 2.0], "Height", lambda h: ALT, "same text"),
    ],
)
def test_a_slider_that_cannot_be_read_is_refused(values, label, alt, message, shown):
    with pytest.raises(ValueError, match=message):
        viz.slider(line, values, label, alt)
    assert shown == []


def test_without_a_front_end_live_says_where_it_runs_and_runs_nothing(shown, monkeypatch):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    viz.live(lambda x: pytest.fail("ran without a reader"), x=(0, 3))
    assert len(shown) == 1
    assert "JupyterLab" in shown[0]


def test_with_a_front_end_live_runs_the_function(monkeypatch):
    ipywidgets = pytest.importorskip("ipywidgets")
    calls = []
    monkeypatch.setenv("JPY_SESSION_NAME", "a notebook")
    monkeypatch.setattr(ipywidgets, "interact", lambda f, **controls: f(**controls))
    viz.live(lambda x: calls.append(x), x=2)
    assert calls == [2]


def test_a_table_writes_each_value_in_its_cell(shown):
    rows = [{"name": "a|b", "loss": 0.123456}, {"name": "two\nlines", "loss": np.float32(7)}]
    viz.table(rows, "Losses by name")
    caption, _, header, rule, *body = shown[0].split("\n")
    assert caption == "*Losses by name*"
    assert header == "| name | loss |"
    assert rule == "| --- | ---: |"
    assert body == ["| a\\|b | 0.123 |", "| two lines | 7 |"]


@pytest.mark.parametrize(
    ("rows", "caption", "message"),
    [([], "x", "row"), ([{"a": 1}], "", "caption"), ([{"a": 1}, {"b": 1}], "x", "row 1")],
)
def test_a_table_that_cannot_be_read_is_refused(rows, caption, message, shown):
    with pytest.raises(ValueError, match=message):
        viz.table(rows, caption)


def test_say_displays_markdown(shown):
    viz.say("The loss is **3**.")
    assert shown == ["The loss is **3**."]


def test_a_heatmap_writes_every_value_at_its_place():
    figure, axes = plt.subplots()
    viz.heatmap(axes, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], ["r0", "r1"], ["c0", "c1", "c2"])
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written[(2, 0)] == "3.00"
    assert written[(0, 1)] == "4.00"
    with pytest.raises(ValueError, match="row names"):
        viz.heatmap(axes, np.zeros((2, 2)), ["r0"], ["c0", "c1"])
    plt.close(figure)


def test_arrows_of_a_graph_go_from_teacher_to_student_and_grow_with_the_weight():
    figure, axes = plt.subplots()
    edges = np.zeros((3, 3))
    edges[0, 2] = 0.9
    viz.graph(axes, edges)
    arrows = [text for text in axes.texts if getattr(text, "arrow_patch", None) is not None]
    widest = max(arrows, key=lambda a: a.arrow_patch.get_linewidth())
    places = {text.get_text(): text.get_position() for text in axes.texts}
    assert len(arrows) == 6
    assert tuple(widest.xyann) == places["L"]
    assert tuple(widest.xy) == places["A"]
    assert tuple(widest.xy) != places["V"]
    plt.close(figure)


def luminance(colour):
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("background", ["#ffffff", "#14181e"])
def test_colours_have_the_contrast_that_graphics_need(background):
    other = luminance(matplotlib.colors.to_rgb(background))
    for name, colour in zip(MODALITIES, viz.COLOURS, strict=True):
        own = luminance(matplotlib.colors.to_rgb(colour))
        contrast = (max(own, other) + 0.05) / (min(own, other) + 0.05)
        assert contrast >= 3, name  # WCAG 2.1, success criterion 1.4.11


def test_colours_differ_for_readers_without_red_or_green_cones():
    # Machado, Oliveira and Fernandes (2009): protanopia and deuteranopia, on linear RGB.
    protan = [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]]
    deutan = [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]]
    colours = np.array([matplotlib.colors.to_rgb(c) for c in viz.COLOURS])
    for cones in (protan, deutan):
        seen = colours**2.2 @ np.array(cones).T
        gaps = [np.linalg.norm(seen[i] - seen[j]) for i in range(3) for j in range(i)]
        assert min(gaps) > 0.15


def test_importing_the_package_does_not_import_matplotlib():
    code = "import sys, dmd; print([m for m in ('matplotlib', 'IPython') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
