"""Pictures of one run: the tree as a figure, the animation of the way to the answer, the contact sheet, the folder."""

from __future__ import annotations

import csv
import json
import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from viewer_runs import STEPS, VERIFIER, Going, add_pictures, colour, node, write_run
from viewer_runs import grown as any_steps

from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.saved import load_run
from tsdiff.viewer.figures import animation, folder, lettering, paper, sheet
from tsdiff.viewer.figures.images import Pictures, score_of, thumbnail
from tsdiff.viewer.figures.layout import most_telling, place, stepped_aside, thinned
from tsdiff.viewer.figures.tree import tree_figure, write_tree

HOSTILE = '<script>alert(1)</script> $\\frac{1} & "quotes" \x00\x1b[31m\u202e ]]> --> \U0001f600 \u4e2d'


SHORT = 6
"""Steps of the grown trees, so that many nodes are finished samples."""


def grown(count):
    return any_steps(count, width=4, steps=SHORT)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tree of 60 nodes with drafts, failures and a picture of every other node."""
    nodes = grown(60)
    nodes[50] |= {"draft": True}
    nodes[51] |= {"status": "failed", "reason": "lost", "values": {}}
    return load_run(write_run(tmp_path_factory.mktemp("runs") / "run-0001", nodes, pictures=range(0, 60, 2), steps=SHORT))


@pytest.fixture(scope="module")
def figure(run):
    with paper.drawing():
        return tree_figure(run)[0]


def collections(figure, prefix):
    return [one for axes in figure.axes for one in axes.collections if (one.get_gid() or "").startswith(prefix)]


# The tree ------------------------------------------------------------------------------------------------------------


def test_every_node_has_one_mark_at_its_level_and_every_move_one_line(run, figure):
    marks = np.concatenate([one.get_offsets() for one in collections(figure, "nodes-")])
    assert len(marks) == len(run.nodes)
    assert sorted(marks[:, 1]) == sorted(node.level for node in run.nodes)
    lines = [tuple(map(tuple, line)) for prefix in ("edges-", "answer-") for one in collections(figure, prefix) for line in one.get_segments()]
    assert len(lines) == sum(node.parent is not None for node in run.nodes)
    places = set(map(tuple, marks))
    assert all(end in places for line in lines for end in line)


def test_the_way_to_the_answer_stands_out_and_operations_differ(run, figure):
    path = run.path_to(run.best)
    assert sum(len(one.get_segments()) for one in collections(figure, "answer-")) == len(path) - 1
    kinds = {node.move.kind for node in run.nodes if node.parent is not None}
    looks = {one.get_gid(): (one.get_edgecolor()[0].tolist(), str(one.get_linestyle())) for one in collections(figure, "edges-")}
    assert {gid.removeprefix("edges-") for gid in looks} == kinds == {"denoise", "renoise"}
    assert looks["edges-denoise"][0] != looks["edges-renoise"][0]
    assert looks["edges-denoise"][1] != looks["edges-renoise"][1]
    (ring,) = collections(figure, "answer")[-1:]
    assert ring.get_offsets()[0][1] == SHORT


def test_colours_follow_scores(run, figure):
    shades = {}
    scored = [node for node in run.nodes if score_of(run, node) is not None and not node.failed and not node.draft]
    for kind, done in (("finished", True), ("estimate", False)):
        (marks,) = collections(figure, f"nodes-{kind}")
        nodes = [node for node in scored if (node.level == SHORT) == done]
        shades |= {node.index: float(np.dot(face[:3], (0.2126, 0.7152, 0.0722))) for node, face in zip(nodes, marks.get_facecolors(), strict=True)}
    ordered = [shades[node.index] for node in sorted(scored, key=lambda node: score_of(run, node))]
    assert len(ordered) > 20
    assert all(before <= after + 1e-9 for before, after in pairwise(ordered))
    assert ordered[0] < 0.2 < 0.6 < ordered[-1]
    for kind in ("unscored", "draft", "failed"):
        assert collections(figure, f"nodes-{kind}")


def test_thumbnails_do_not_overlap_and_the_answer_has_one(tmp_path):
    nodes = [node(index, None, 0, kind="draw") for index in range(12)] + [node(12 + index, index, STEPS, score=index / 10) for index in range(12)]
    run = load_run(write_run(tmp_path / "r", nodes, pictures=range(12, 24)))
    with paper.drawing():
        figure, notices = tree_figure(run)
    axes = figure.axes[0]
    boxes = [tuple(image.get_window_extent().bounds) for image in axes.images if image.get_gid() == "thumbnail"]
    assert 3 <= len(boxes) <= 12
    for at, (x, y, wide, high) in enumerate(boxes):
        assert (round(wide, 3), round(high, 3)) == (23.0, 23.0)
        assert all(abs(x - other[0]) >= wide or abs(y - other[1]) >= high for other in boxes[:at])
    shown = [image.get_array()[0, 0].tolist() for image in axes.images if image.get_gid() == "thumbnail"]
    assert list(colour(23)) == shown[0]  # the best first
    assert not notices


def test_a_large_tree_is_bounded_and_says_so(tmp_path):
    run = load_run(write_run(tmp_path / "r", grown(400), steps=SHORT))
    with paper.drawing():
        figure, notices = tree_figure(run, most=100)
    assert sum(len(one.get_offsets()) for one in collections(figure, "nodes-")) == 100
    assert notices == ["300 of 400 nodes are left out, those that the lowest scores came of: a figure shows 100"]
    assert figure.get_size_inches()[0] <= paper.PAGE
    kept = most_telling(run, 100)
    indices = {node.index for node in kept}
    assert all(node.parent is None or node.parent.index in indices for node in kept)
    assert {node.index for node in run.path_to(run.best)} <= indices
    worst_kept = min(max(score_of(run, leaf) or -9.0 for leaf in below(node)) for node in kept if node not in run.path_to(run.best))
    left = [node for node in run.nodes if node.index not in indices]
    assert max(score_of(run, node) or -9.0 for node in left) <= worst_kept


def below(node):
    return [node, *(found for child in node.children for found in below(child))]


def test_svg_and_png_parse_and_have_the_same_bytes_again_whatever_the_users_settings(run, tmp_path):
    import matplotlib

    write_tree(run, tmp_path / "a.svg")
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "none", "axes.facecolor": "red", "savefig.dpi": 20}):
        write_tree(run, tmp_path / "b.svg")
    write_tree(run, tmp_path / "a.png")
    write_tree(run, tmp_path / "b.png")
    for suffix in (".svg", ".png"):
        assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
    root = ElementTree.parse(tmp_path / "a.svg").getroot()
    marks = [group for group in root.iter("{http://www.w3.org/2000/svg}g") if (group.get("id") or "").startswith("nodes-")]
    assert sum(len(list(group.iter("{http://www.w3.org/2000/svg}use"))) for group in marks) == len(run.nodes)
    with Image.open(tmp_path / "a.png") as picture:
        assert paper.COLUMN * paper.DPI - 1 <= picture.width <= paper.PAGE * paper.DPI + 1


@pytest.mark.filterwarnings("error")
def test_hostile_text_is_only_text(tmp_path):
    about = {"prompt": HOSTILE, "options": {"policy": {"name": HOSTILE}, "model": HOSTILE, "verifiers": [VERIFIER], "steps": SHORT}}
    nodes = grown(30)
    nodes[-1] |= {"move": {"kind": '"><script>', "levels": [1], "copy": 0}}
    run = load_run(write_run(tmp_path / "r", nodes, pictures=range(30), steps=SHORT, **about))
    write_tree(run, tmp_path / "t.svg")
    text = (tmp_path / "t.svg").read_text(encoding="utf-8")
    names = {element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()}
    assert "script" not in names
    assert not re.search(r"<script|\x00|\x1b", text)
    for name in ("s.sheet.png", "w.gif"):
        (sheet.write_sheet if "sheet" in name else animation.write_animation)(run, tmp_path / name)
    folder.write_folder(run, tmp_path / "out")
    assert "\x1b" not in (tmp_path / "out" / "index.txt").read_text(encoding="utf-8")


def test_a_run_that_has_only_begun_has_a_figure(tmp_path):
    going = Going(tmp_path / "r")
    going.add(node(0, None, 0, kind="draw"))
    run = load_run(going.path)
    write_tree(run, tmp_path / "t.png")
    with pytest.raises(UsageError, match="no finished sample yet"):
        animation.write_animation(run, tmp_path / "w.gif")
    with pytest.raises(UsageError, match="has kept no picture"):
        sheet.write_sheet(run, tmp_path / "s.png")
    going.close()


# Places --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=60))
def test_the_leaves_below_a_node_stand_together_and_parents_over_their_children(choices):
    nodes = []
    for index, choice in enumerate(choices):
        parent = None if index == 0 or choice % 7 == 0 else nodes[choice % index]
        made = SimpleNamespace(index=index, parent=parent, children=[])
        if parent is not None:
            parent.children.append(made)
        nodes.append(made)
    layout = place(nodes)
    leaves = sorted(layout.across[node.index] for node in nodes if not node.children)
    assert all(after - before >= 1.0 for before, after in pairwise(leaves))
    assert layout.width == leaves[-1] - leaves[0]
    for made in nodes:
        own = sorted(layout.across[one.index] for one in below(made) if not one.children)
        assert own == [x for x in leaves if own[0] <= x <= own[-1]]  # nothing else in between
        if made.children:
            assert layout.across[made.index] == pytest.approx((layout.across[made.children[0].index] + layout.across[made.children[-1].index]) / 2)


def test_the_way_forth_again_does_not_cover_the_way_there(run):
    layout = stepped_aside(place(run.nodes))
    marks = [(layout.across[node.index], node.level) for node in run.nodes]
    plain = [(place(run.nodes).across[node.index], node.level) for node in run.nodes]
    assert len(set(marks)) == len(marks) > len(set(plain))
    assert all(abs(x - before) in (0.0, pytest.approx(0.36)) for (x, _), (before, _) in zip(marks, plain, strict=True))


@given(st.integers(0, 50), st.integers(2, 20))
def test_thinning_keeps_both_ends(count, most):
    found = thinned(list(range(count)), most)
    assert len(found) == min(count, most)
    assert found == sorted(set(found))
    assert not count or (found[0], found[-1]) == (0, count - 1)


def test_ranks_and_numbers_for_people():
    ranks = paper.Ranks([3.0, 1.0, 2.0, 2.0])
    assert [ranks(score) for score in (1.0, 2.0, 3.0, 9.0)] == [0.0, 1 / 3, 1.0, 1.0]
    assert [ranks.at(share) for share in (0.0, 1.0)] == [1.0, 3.0]
    assert paper.Ranks([5.0])(5.0) == 1.0
    assert paper.number(-1234.5) == "\u22121,234"
    assert paper.number(-0.00356) == "\u22120.00356"
    assert paper.numbers([0.13401, 0.13402]) == ["0.13401", "0.13402"]


def test_text_is_cut_to_its_room_and_holds_only_what_the_font_has():
    assert lettering.plain("a\x00b\n\tc \u4e2d") == "a b c □"
    assert lettering.plain("x" * 10, 5) == "xxxx…"
    font = lettering.font(12)
    assert font.getlength(lettering.fitted("wide " * 40, font, 100)) <= 100
    lines = lettering.wrapped("one two three four five six seven", font, 60, 2)
    assert len(lines) == 2
    assert all(font.getlength(line) <= 60 for line in lines)
    assert lines[-1].endswith("…")


# Pictures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_way(tmp_path_factory):
    """A way of 8 nodes, of which the last 6 have a picture, and a failed beginning beside it."""
    levels = (0, 3, 6, 4, 8, 12, 16, STEPS)
    nodes = [node(index, index - 1 if index else None, level, kind="renoise" if index == 3 else "denoise" if index else "draw", score=level / 10) for index, level in enumerate(levels)]
    nodes.append(node(8, None, 0, kind="draw"))
    return load_run(write_run(tmp_path_factory.mktemp("way") / "r", nodes, pictures=range(2, 8)))


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_an_animation_has_a_frame_for_each_node_of_the_way(long_way, tmp_path, suffix):
    notices = animation.write_animation(long_way, tmp_path / f"w{suffix}")
    assert notices == ["2 of 8 frames have no picture: pictures are kept of nodes that a verifier has looked at"]
    with Image.open(tmp_path / f"w{suffix}") as film:
        assert film.n_frames == len(long_way.path_to(long_way.best)) == 8
        assert film.info["loop"] == 0
        durations, centres = [], []
        for frame in range(film.n_frames):
            film.seek(frame)
            film.load()
            durations.append(film.info["duration"])
            centres.append(film.convert("RGB").getpixel((100, 100)))
    assert durations == [animation.HELD] * 7 + [animation.LAST]
    for index in range(2, 8):
        assert np.abs(np.subtract(centres[index], colour(index))).max() <= 12  # palettes and lossy files
    first = (tmp_path / f"w{suffix}").read_bytes()
    animation.write_animation(long_way, tmp_path / f"w{suffix}")
    assert (tmp_path / f"w{suffix}").read_bytes() == first


def test_a_long_animation_is_bounded(long_way):
    frames, notices = animation.frames(long_way, most=4)
    assert len(frames) == 4
    assert notices[0] == "4 of 8 nodes on the way are left out: an animation has 4 frames"


def test_the_answers_own_image_is_preferred_and_stale_or_damaged_previews_do_not_count(tmp_path):
    nodes = [node(0, None, 0, kind="draw"), node(1, 0, STEPS, score=1.0), node(2, 0, STEPS, score=0.5)]
    path = write_run(tmp_path / "r", nodes, pictures=(1,), best_png=True)
    about = json.loads((path / "run.json").read_text())
    about["result"]["image"] = "best.png"
    (path / "run.json").write_text(json.dumps(about))
    add_pictures(path, [(2, "f" * 32)])  # of a node that was lost in an interruption
    run = load_run(path)
    pictures = Pictures(run)
    assert [one.index for one in pictures.nodes()] == [1]
    assert pictures.image(run.nodes[1]).getpixel((3, 3)) == (10, 200, 30)
    (path / "best.png").unlink()
    pictures = Pictures(run)
    assert pictures.image(run.nodes[1]).getpixel((3, 3)) == colour(1)
    assert "has no best.png" in pictures.damaged[0]
    data = bytearray((path / "previews.pack").read_bytes())
    data[data.index(b"RIFF") + 20] ^= 255
    (path / "previews.pack").write_bytes(data)
    pictures = Pictures(run)
    assert pictures.image(run.nodes[1]) is None
    assert len(pictures.damaged) == 2
    with pytest.raises(UsageError, match="can be read"):
        sheet.write_sheet(run, tmp_path / "s.png")
    with pytest.raises(UsageError, match="has kept no picture"):
        animation.write_animation(run, tmp_path / "w.gif")


def test_small_pictures_grow_sharply_and_large_ones_keep_their_shape():
    tiny = Image.fromarray(np.array([[[255, 0, 0], [0, 0, 255]]], dtype=np.uint8))
    large = thumbnail(tiny, 128)
    assert large.size == (128, 64)
    assert {tuple(pixel) for pixel in np.asarray(large).reshape(-1, 3)} == {(255, 0, 0), (0, 0, 255)}
    assert thumbnail(Image.new("RGB", (400, 200)), 100).size == (100, 50)


def test_a_contact_sheet_has_the_best_first_and_says_what_it_leaves_out(run):
    image, notices = sheet.sheet(run, most=5)
    kept = sheet.in_order(run, Pictures(run).nodes())
    assert notices == [f"{len(kept) - 5} of {len(kept)} pictures are left out, those of the lowest scores: a contact sheet has 5"]
    finished = [one for one in kept if one.level == SHORT and not one.failed and not one.draft]
    assert kept[: len(finished)] == finished
    for group in (finished[finished[0] is run.best :], kept[len(finished) :]):
        scores = [-np.inf if score_of(run, one) is None else score_of(run, one) for one in group]
        assert scores == sorted(scores, reverse=True)
    left, top = 24 + sheet.SIDE // 2, 24 + 64 + sheet.SIDE // 2
    found = [image.getpixel((left + number * (sheet.SIDE + 10), top)) for number in range(3)]
    assert found == [colour(one.index) for one in kept[:3]]


# The folder ----------------------------------------------------------------------------------------------------------


def test_a_folder_says_what_is_in_it(run, tmp_path):
    said = folder.write_folder(run, tmp_path / "out")
    text = (tmp_path / "out" / "index.txt").read_text(encoding="utf-8")
    there = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()} - {"index.txt"}
    assert all(any(line.startswith(f"{name} ") for line in text.splitlines()) for name in there)
    assert {"tree.png", "tree.svg", "sheet.png", "summary.csv", "nodes.csv"} <= there
    assert sum(name.startswith("nodes/") for name in there) == len(Pictures(run))
    assert all(f"- {line}" in text for line in said)
    with (tmp_path / "out" / "summary.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (float(row["score"]), row["prompt"], Path(row["folder"])) == (run.score, run.prompt, run.path)


def test_without_pictures_the_folder_holds_the_rest_and_says_why(tmp_path):
    run = load_run(write_run(tmp_path / "r", grown(30), steps=SHORT))
    said = folder.write_folder(run, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["index.txt", "nodes.csv", "summary.csv", "tree.png", "tree.svg"]
    assert [line.partition(":")[0] for line in said] == ["sheet.png", "way.gif"]


# What it takes -------------------------------------------------------------------------------------------------------


def test_without_matplotlib_one_line_says_what_to_install(run, tmp_path, monkeypatch):
    monkeypatch.setattr(paper, "find_spec", lambda name: None)
    lettering.font.cache_clear()
    lettering._letters.cache_clear()
    for write, name in ((write_tree, "t.svg"), (sheet.write_sheet, "s.png"), (animation.write_animation, "w.gif"), (folder.write_folder, "out")):
        with pytest.raises(SetupError, match=r"pictures need matplotlib, .* pip install 'tsdiff\[plots\]'"):
            write(run, tmp_path / name)
    assert list(tmp_path.iterdir()) == []
