"""What the viewer's server says of runs is what is on disk: as it is, as it changes, and without reading more than needed."""

from __future__ import annotations

import gzip
import io
import json
import shlex
import shutil
from pathlib import Path
from urllib.parse import quote

import pytest
from click.testing import CliRunner
from PIL import Image
from viewer_runs import STEPS, VERIFIER, Going, add_pictures, colour, grown, node, write_run
from viewer_server import ORIGIN, TOKEN, Told, ask, serving, view

from tsdiff.cli.app import cli
from tsdiff.treesearch.errors import SetupError, UsageError
from tsdiff.treesearch.node import Value
from tsdiff.treesearch.rescored import Rescored, write_rescored
from tsdiff.treesearch.saved import load_run
from tsdiff.viewer.folders import Folders
from tsdiff.viewer.library import Library
from tsdiff.viewer.steering import Command, Question

STORED = Path(__file__).parents[1] / "data" / "saved-runs"
IDS = ("v1/done", "v1/unfinished", "v2/done", "v2/expanded", "v2/unfinished")


def at(name: str, *parts: str) -> str:
    return "/".join(("/api/runs", name.replace("/", "%2F"), *parts))


# What is said of stored runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stored():
    return view(STORED)


def test_the_list_has_every_run_of_a_folder(stored):
    runs = stored.get("/api/runs")["runs"]
    assert [run["id"] for run in runs] == list(IDS)
    for found in runs:
        run = load_run(STORED / found["id"])
        assert found["prompt"] == run.prompt
        assert found["seed"] == run.seed == 1
        assert (found["policy"], found["model"], found["status"]) == (run.policy, run.model, run.status)
        assert (found["best"], found["nfe"], found["nodes"]) == (run.score, run.ledger["nfe"], len(run.nodes))


@pytest.mark.parametrize("name", IDS)
def test_a_tree_is_the_saved_tree(stored, name):
    run = load_run(STORED / name)
    tree = stored.get(at(name, "tree"))
    assert (tree["status"], tree["best"], tree["restarted"]) == (run.status, run.best and run.best.index, False)
    assert [one["i"] for one in tree["nodes"]] == list(range(len(run.nodes)))
    finished = {one.index for one in run.tree.finished}
    for found, saved in zip(tree["nodes"], run.nodes, strict=True):
        assert (found["p"], found["l"], found["op"]) == (saved.parent and saved.parent.index, saved.level, saved.move.kind)
        assert (found["d"], found["g"], found["fin"]) == (saved.draft, saved.driver, saved.index in finished)
        score = saved.score("gaussian-target")
        assert found["s"] == ({} if score is None else {"gaussian-target": pytest.approx(score, rel=1e-5)})
    spent = [one["n"] for one in tree["nodes"]]
    assert spent == sorted(spent)
    assert spent[-1] == run.ledger["nfe"]


@pytest.mark.parametrize("name", IDS)
def test_a_node_is_told_with_all_that_is_known(stored, name):
    run = load_run(STORED / name)
    for saved in run.nodes:
        found = stored.get(at(name, "node", str(saved.index)))
        assert found["id"] == f"{saved.id:032x}"
        assert found["path"] == [one.index for one in saved.path()]
        assert found["children"] == [child.index for child in saved.children]
        assert (found["noise_scale"], found["nfe"], found["path_nfe"]) == (saved.sigma, saved.nfe, run.tree.path_costs()[saved.index])
        assert {key: (value["score"], value["parts"]) for key, value in found["scores"].items()} == {key: (value.score, value.parts) for key, value in saved.values.items()}
        assert found["recipe"]["move"] == saved.move.to_json()
        assert found["recipe"]["first_noise"]["kind"] == "fresh"
    assert "there is no node 99" in stored.get(at(name, "node", "99"), 404)["error"]


def test_a_run_is_told_with_its_options_baseline_and_commands(stored):
    run = load_run(STORED / "v2" / "expanded")
    found = stored.get(at("v2/expanded"))
    assert found["policy"] == {"name": "beam", **found["policy"]} == run.options["policy"]
    assert (found["solver"], found["steps"], found["best"], found["live"]) == ("ddim", 3, 15, False)
    assert found["schedule"] == {"levels": 3, "noise_scale": list(run.tree.schedule.sigma)}
    assert found["verifiers"] == ["gaussian-target"]
    low, high = found["ranges"]["gaussian-target"]
    scores = [one.score("gaussian-target") for one in run.nodes if one.score("gaussian-target") is not None]
    assert (low, high) == pytest.approx((min(scores), max(scores)), rel=1e-5)
    assert found["baseline"]["scores"]["gaussian-target"] == pytest.approx(run.first_score, rel=1e-5)
    assert [driver["number"] for driver in found["drivers"]] == [0, 1]
    assert found["commands"]["resume"] is None
    assert found["versions"]["torch"].startswith("2.")
    assert stored.get(at("v2/unfinished"))["commands"]["resume"].startswith("tsdiff resume ")


def test_the_command_of_a_search_is_understood(stored):
    """What is told to be typed resolves to the same search."""
    command = stored.get(at("v2/expanded"))["commands"]["search"]
    words = shlex.split(command)
    assert words[:2] == ["tsdiff", "search"]
    answer = CliRunner().invoke(cli, ["plan", *words[2:], "--json"])
    assert answer.exit_code == 0, answer.output
    plan = json.loads(answer.stdout)
    options = load_run(STORED / "v2" / "expanded").options
    for name in ("policy", "prompts", "seeds", "steps", "solver", "deterministic", "cost"):
        assert plan.get(name) == options[name], name


@pytest.mark.parametrize("name", IDS)
def test_the_curve_ends_at_the_best_score_and_the_whole_cost(stored, name):
    run = load_run(STORED / name)
    curve = stored.get(at(name, "curve"))
    assert (curve["verifier"], curve["exact"]) == ("gaussian-target", True)
    if run.score is None:
        assert curve["points"] == []
        return
    nfe, best, index = curve["points"][-1]
    assert (nfe, best, index) == (run.ledger["nfe"], run.score, run.best.index)


def test_the_images_are_the_files(stored):
    answer = stored.client.get(at("v2/expanded", "image", "15"))
    assert answer.content == (STORED / "v2/expanded/best.png").read_bytes()
    assert (answer.headers["content-type"], answer.headers["x-content-type-options"]) == ("image/png", "nosniff")
    plain = stored.client.get(stored.get(at("v2/expanded"))["baseline"]["image"])
    assert plain.content == (STORED / "v2/expanded/baseline.png").read_bytes()
    assert stored.get(at("v2/expanded", "image", "3"), 404)["error"] == "no picture of node 3 was kept"
    again = stored.client.get(at("v2/expanded", "image", "15"), headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


# Lists, names, sizes -------------------------------------------------------------------------------------------------


def test_listing_reads_no_tree_of_a_run_that_is_done(tmp_path):
    for number in range(30):
        folder = write_run(tmp_path / f"run-{number:04d}", [*grown(39), node(39, 0, STEPS, score=1.0 * number)], prompt=f"prompt {number}")
        (folder / "tree.json").write_text("this is read by nobody who only lists")
    runs = view(tmp_path).get("/api/runs")["runs"]
    assert [run["prompt"] for run in runs] == [f"prompt {number}" for number in range(30)]
    assert all(run["nodes"] == 40 and run["best"] >= number and run["damage"] == [] for number, run in enumerate(runs))


def test_a_list_shows_new_runs_and_what_has_changed(tmp_path):
    viewer = view(tmp_path)
    assert viewer.get("/api/runs")["runs"] == []
    run = Going(tmp_path / "run-0001")
    run.add(node(0, None, 0, kind="draw"), node(1, 0, STEPS, score=1.0))
    (found,) = viewer.get("/api/runs")["runs"]
    assert (found["status"], found["nodes"], found["best"], found["steps_total"]) == ("running", 2, 1.0, 48)
    run.add(node(2, 0, STEPS, score=3.0))
    assert viewer.get("/api/runs")["runs"][0]["best"] == 3.0
    run.write("interrupted")
    run.close()
    assert viewer.get("/api/runs")["runs"][0]["status"] == "interrupted"
    write_run(tmp_path / "run-0002", grown(20))
    assert [one["id"] for one in viewer.get("/api/runs")["runs"]] == ["run-0001", "run-0002"]
    shutil.rmtree(tmp_path / "run-0001")
    assert [one["id"] for one in viewer.get("/api/runs")["runs"]] == ["run-0002"]
    assert "there is no run" in viewer.get(at("run-0001"), 404)["error"]


def test_listing_unfinished_runs_forgets_none_that_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("tsdiff.viewer.library.KEPT", 1)
    for name in ("a", "b", "c"):
        run = Going(tmp_path / name)
        run.add(node(0, None, 0, kind="draw"), node(1, 0, STEPS, score=1.0))
        run.close()
    viewer = view(tmp_path)
    token = viewer.get("/api/runs/b/tree")["token"]
    assert [(run["status"], run["nodes"], run["best"]) for run in viewer.get("/api/runs")["runs"]] == [("killed", 2, 1.0)] * 3
    again = viewer.get(f"/api/runs/b/tree?since={token}")
    assert (again["restarted"], again["nodes"]) == (False, [])


def test_a_run_that_is_viewed_itself_goes_by_its_name(tmp_path):
    write_run(tmp_path / "run-0007", grown(20))
    viewer = view(tmp_path / "run-0007")
    assert [run["id"] for run in viewer.get("/api/runs")["runs"]] == ["run-0007"]
    assert len(viewer.get(at("run-0007", "tree"))["nodes"]) == 20


@pytest.mark.parametrize("name", ["a b", "ä/ö", "100%", "%2F", "a+b&c=d", "q?x#y", "..x", "'\"<b>"])
def test_any_name_of_a_folder_works(tmp_path, name):
    write_run(tmp_path / name, grown(12))
    viewer = view(tmp_path)
    (run,) = viewer.get("/api/runs")["runs"]
    assert len(viewer.get(f"/api/runs/{quote(run['id'], safe='')}/tree")["nodes"]) == 12


def test_a_name_that_is_no_text_works_too(tmp_path):
    try:
        write_run(tmp_path / b"run-\xff".decode("utf-8", "surrogateescape"), grown(12))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    viewer = view(tmp_path)
    (run,) = viewer.get("/api/runs")["runs"]
    assert run["id"] == "run-%FF"
    assert len(viewer.get("/api/runs/run-%25FF/tree")["nodes"]) == 12


def test_large_documents_are_compressed_for_who_takes_it(tmp_path):
    write_run(tmp_path / "run", grown(400))
    viewer = view(tmp_path)
    with serving(tmp_path) as port:
        status, headers, body = ask(port, "/api/runs/run/tree", headers={"Accept-Encoding": "gzip"})
    assert (status, headers["content-encoding"]) == (200, "gzip")
    plain = viewer.client.get("/api/runs/run/tree", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert json.loads(gzip.decompress(body))["nodes"] == plain.json()["nodes"]
    assert len(body) < len(plain.content) / 5


def test_a_large_tree_is_a_small_document(tmp_path):
    """At most 1.3 MB for 10,000 nodes, 150 kB on the wire, made once."""
    write_run(tmp_path / "run", grown(3000))
    shown = Library(Folders(tmp_path)).run("run")
    whole = shown.tree(None)
    assert whole.plain.count(b'"i":') == 3000
    assert len(whole.plain) < 130 * 3000
    assert len(whole.squeezed) < 15 * 3000
    assert shown.tree(None) is whole


# Thumbnails ----------------------------------------------------------------------------------------------------------


def cell(page: bytes, number: int, size: int) -> tuple[int, ...]:
    """The middle of a thumbnail, RGBA."""
    with Image.open(io.BytesIO(page)) as image:
        assert image.size == (16 * size, 16 * size)
        return image.convert("RGBA").getpixel((number % 16 * size + size // 2, number // 16 * size + size // 2))


@pytest.mark.parametrize("size", [32, 64])
def test_thumbnails_are_the_pictures_of_their_nodes(tmp_path, size):
    nodes = grown(300)
    write_run(tmp_path / "run", nodes, pictures=range(299, -1, -1))  # numbered in the order of the file, not of the tree
    viewer = view(tmp_path)
    records = viewer.get("/api/runs/run/tree")["nodes"]
    assert sorted(one["th"] for one in records) == list(range(300))
    pages = [viewer.client.get(f"/api/runs/run/atlas/{page}?size={size}") for page in (0, 1)]
    assert {page.headers["content-type"] for page in pages} == {"image/webp"}
    for index in (0, 1, 17, 43, 44, 255, 299):
        th = records[index]["th"]
        assert cell(pages[th // 256].content, th % 256, size) == pytest.approx((*colour(index), 255), abs=6)
    assert cell(pages[1].content, 200, size)[3] == 0
    assert viewer.get("/api/runs/run/atlas/2", 404)["error"].startswith("there is no page 2")
    for wrong in ("63", "100000", "-1", "x"):
        assert viewer.client.get(f"/api/runs/run/atlas/0?size={wrong}").status_code in (400, 404)
    tag = pages[0].headers["etag"]
    assert viewer.client.get(f"/api/runs/run/atlas/0?size={size}", headers={"If-None-Match": tag}).status_code == 304


def test_thumbnails_keep_their_numbers_as_pictures_come_and_go(tmp_path):
    nodes = grown(40)
    folder = write_run(tmp_path / "run", nodes, pictures=[5, 3])
    viewer = view(tmp_path)
    first = viewer.get("/api/runs/run/tree")
    assert {one["i"]: one["th"] for one in first["nodes"] if one["th"] is not None} == {5: 0, 3: 1}
    page = viewer.client.get("/api/runs/run/atlas/0")
    add_pictures(folder, [(20, nodes[20]["id"]), (4, "f" * 32)])  # the second is of a node that was lost
    more = viewer.get(f"/api/runs/run/tree?since={first['token']}")
    assert {one["i"]: one["th"] for one in more["nodes"]} == {20: 2}
    second = viewer.client.get("/api/runs/run/atlas/0")
    assert second.headers["etag"] != page.headers["etag"]
    assert cell(second.content, 2, 64) == pytest.approx((*colour(20), 255), abs=6)
    assert cell(second.content, 1, 64) == pytest.approx((*colour(3), 255), abs=6)
    (folder / "previews.pack").unlink()
    add_pictures(folder, [(20, nodes[20]["id"])])  # those of the path to the answer are kept
    last = viewer.get(f"/api/runs/run/tree?since={more['token']}")
    assert {one["i"]: one["th"] for one in last["nodes"]} == {3: None, 5: None}
    third = viewer.client.get("/api/runs/run/atlas/0")
    assert cell(third.content, 0, 64)[3] == 0
    assert cell(third.content, 2, 64) == pytest.approx((*colour(20), 255), abs=6)


def test_a_picture_that_is_not_square_has_clear_margins(tmp_path):
    nodes = grown(10)
    folder = write_run(tmp_path / "run", nodes)
    add_pictures(folder, [(1, nodes[1]["id"])], size=(32, 8))
    page = view(tmp_path).client.get("/api/runs/run/atlas/0?size=64").content
    with Image.open(io.BytesIO(page)) as image:
        assert image.convert("RGBA").getpixel((32, 4))[3] == 0
        assert image.convert("RGBA").getpixel((32, 32)) == pytest.approx((*colour(1), 255), abs=6)


def test_the_answer_has_its_image_and_others_their_previews(tmp_path):
    nodes = grown(60)
    folder = write_run(tmp_path / "run", nodes, pictures=[2], best_png=True)
    viewer = view(tmp_path)
    best = viewer.get("/api/runs/run")["best"]
    assert viewer.client.get(f"/api/runs/run/image/{best}").content == (folder / "best.png").read_bytes()
    assert viewer.get(f"/api/runs/run/node/{best}")["image"] == f"/api/runs/run/image/{best}"
    small = viewer.client.get("/api/runs/run/image/2")
    assert (small.status_code, small.headers["content-type"]) == (200, "image/webp")
    assert viewer.get("/api/runs/run/node/3")["image"] is None


def test_scores_of_other_verifiers_are_shown_beside(tmp_path):
    folder = write_run(tmp_path / "run", grown(20))
    viewer = view(tmp_path)
    first = viewer.get("/api/runs/run/tree")
    write_rescored(folder, Rescored("other", {4: Value(0.25), 7: Value(None, None, "it failed")}))
    more = viewer.get(f"/api/runs/run/tree?since={first['token']}")
    assert {one["i"]: one["s"]["other"] for one in more["nodes"]} == {4: 0.25, 7: None}
    assert viewer.get("/api/runs/run")["ranges"]["other"] == [0.25, 0.25]
    assert viewer.get("/api/runs/run/node/4")["scores"]["other"] == {"score": 0.25, "parts": None, "reason": None, "rescored": True}


def test_a_run_without_a_journal_has_an_estimated_curve(tmp_path):
    nodes = grown(80)
    write_run(tmp_path / "run", nodes)
    viewer = view(tmp_path)
    curve = viewer.get("/api/runs/run/curve")
    scores = [one["values"][VERIFIER]["score"] for one in nodes if one["values"] and one["level"] == STEPS]
    assert curve["exact"] is False
    assert curve["points"][-1][1] == max(scores)
    assert [point[1] for point in curve["points"]] == sorted(point[1] for point in curve["points"])
    assert {one["n"] for one in viewer.get("/api/runs/run/tree")["nodes"]} == {None}


# Steering ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def steered(tmp_path):
    write_run(tmp_path / "run", grown(20))
    told = Told()
    return view(tmp_path, told), told, (tmp_path / "run").resolve()


def test_what_is_asked_reaches_the_steering(steered):
    viewer, told, folder = steered
    assert viewer.post("/api/runs/run/expand", {"node": 3, "children": 4, "renoise": 0.5}) == {"command": "c1"}
    assert viewer.post("/api/runs/run/expand", {"node": 0, "children": 1, "to_level": 2}) == {"command": "c2"}
    assert viewer.post("/api/runs/run/expand", {"node": 1}) == {"command": "c3"}
    assert viewer.post("/api/runs/run/stop") == {"command": "c4"}
    assert told.asked == [("expand", folder, 3, 4, 0.5, None), ("expand", folder, 0, 1, None, 2), ("expand", folder, 1, None, None, None), ("stop", folder)]
    told.given = [Command("c1", "expand", "failed", "two\nlines")]
    assert viewer.get("/api/runs/run/commands") == {"commands": [{"id": "c1", "do": "expand", "state": "failed", "message": "two lines"}]}
    assert viewer.get("/api/runs")["steers"] is True


@pytest.mark.parametrize(
    "body",
    [
        {}, {"node": None}, {"node": "3"}, {"node": True}, {"node": -1}, {"node": 3.0}, {"node": 10**12}, {"node": 20}, {"node": 3, "children": 0}, {"node": 3, "children": "x"},
        {"node": 3, "renoise": 1.5}, {"node": 3, "renoise": -0.1}, {"node": 3, "renoise": True}, {"node": 3, "renoise": "1"}, {"node": 3, "renoise": 0.5, "to_level": 1},
        {"node": 3, "to_level": -1}, {"node": 3, "policy": "beam"}, [], "x", 3, None,
    ],
)  # fmt: skip
def test_what_makes_no_sense_never_reaches_the_steering(steered, body):
    viewer, told, _ = steered
    answer = viewer.client.post("/api/runs/run/expand", content=json.dumps(body), headers={"X-Tsdiff-Token": TOKEN, "Origin": ORIGIN, "Content-Type": "application/json"})
    assert answer.status_code == 400
    assert len(answer.json()["error"].splitlines()) == 1
    assert told.asked == []


def test_questions_and_answers(steered):
    viewer, told, folder = steered
    Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "asked.png")
    told.open = [
        Question("q1", folder, 3, "a" * 32, "human", "a <b>cat</b>", 0.0, 10.0),
        Question("q2", folder, None, "", "human", "a dog", 1.0, 5.0, folder / "asked.png"),
        Question("q3", folder.parent, 1, "", "human", "of a run that is not viewed", 1.0, 5.0),
    ]
    first, second = viewer.get("/api/questions")["questions"]
    assert (first["run"], first["node"], first["image"], first["low"], first["high"]) == ("run", 3, "/api/runs/run/image/3", 0.0, 10.0)
    assert first["prompt"] == "a <b>cat</b>"
    assert viewer.client.get(second["image"]).content == (folder / "asked.png").read_bytes()
    assert viewer.get("/api/questions/q1/image", 404)["error"].startswith("this question")
    viewer.post("/api/answers", {"question": "q1", "score": 7})
    viewer.post("/api/answers", {"question": "q2", "score": None})
    assert told.asked == [("answer", "q1", 7.0), ("answer", "q2", None)]
    for body in ({"question": "q9", "score": 1}, {"question": "q1"}, {"question": "q1", "score": "5"}, {"question": "q1", "score": True}, {"question": 1, "score": 1},
                 {"question": "../q1", "score": 1}, {"question": "q1", "score": 10**400}, {"question": "q1", "score": 1, "more": 2}):  # fmt: skip
        assert viewer.post("/api/answers", body, 400)["error"]
    assert len(told.asked) == 2


def test_the_steering_s_errors_are_one_line(steered):
    viewer, told, _ = steered
    told.error = UsageError("this run is going on")
    assert viewer.post("/api/runs/run/stop", status=400) == {"error": "this run is going on"}
    told.error = SetupError("nobody can do this\nhere")
    assert viewer.post("/api/runs/run/stop", status=503) == {"error": "nobody can do this here"}
    told.error = RuntimeError("a mistake")
    assert viewer.post("/api/runs/run/stop", status=500) == {"error": "unexpected RuntimeError: a mistake"}
    assert viewer.went_wrong == ["/api/runs/run/stop: unexpected RuntimeError: a mistake"]


def test_without_a_steering_the_page_only_looks(tmp_path):
    write_run(tmp_path / "run", grown(20))
    viewer = view(tmp_path)
    assert viewer.get("/api/runs")["steers"] is False
    assert "only looks" in viewer.post("/api/runs/run/stop", status=503)["error"]
    assert viewer.get("/api/questions") == {"questions": []}
    assert viewer.get("/api/runs/run/commands") == {"commands": []}
