"""`tsdiff show`: trees, nodes and pictures in the terminal."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import tsdiff as package
from tsdiff.cli.picture_history import read_parameters
from tsdiff.cli.tree_lines import lay_out
from tsdiff.treesearch.saved import load_run
from tsdiff.treesearch.savedtree import SavedTree

PROMPT = "near (3, 2.4)"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs: best of 20, and a beam."""
    out = tmp_path_factory.mktemp("shown")
    package.search("gaussian", PROMPT, policy="best-of-n", policy_options={"n": 20}, steps=4, out=out)
    package.search("gaussian", PROMPT, policy="beam", policy_options={"width": 2, "branch": 3}, steps=6, out=out)
    return out


@pytest.fixture
def show(tsdiff, folder, tmp_path):
    for name in ("run-0001", "run-0002"):
        shutil.copytree(folder / name, tmp_path / name)
    return lambda *arguments: tsdiff("show", *arguments)


def document(result):
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


# Trees ---------------------------------------------------------------------------------------------------------------


def test_the_best_samples_are_shown_best_first(show, folder):
    run = load_run(folder / "run-0001")
    result = show("run-0001")
    assert result.exit_code == 0, result.output
    head, _, tree = result.stdout.partition("\n\n")
    assert re.search(rf"^score +{run.score:.4g} \(gaussian-target, node {run.best.index}; baseline {run.first_score:.4g}\)$", head, re.MULTILINE)
    assert re.search(r"^cost +80 NFE \+ 4 for the baseline, 40 nodes$", head, re.MULTILINE)
    title, first, *rest = tree.splitlines()
    assert title.split() == ["node", "level", "score", "NFE", "hidden"]
    assert first.split() == ["*", str(run.best.parent.index), ">", str(run.best.index), "0", "→", "4", f"{run.score:.4g}", "4"]
    scores = [float(line.split()[-2]) for line in (first.removeprefix("* "), *rest)]
    assert scores == sorted(scores, reverse=True)
    assert len(scores) == 12
    assert result.stderr == "24 of 40 nodes and 12 of 20 ends are shown; --most 20 shows more\n"
    assert all(len(line) <= 80 for line in result.stdout.splitlines())


def test_branches_are_drawn_and_what_is_not_shown_is_counted(folder):
    tree = load_run(folder / "run-0002").tree
    for most, depth in ((None, None), (1, None), (3, None), (1000, None), (1000, 2), (2, 0)):
        shown = lay_out(tree, most=most, depth=depth)
        inside = [node for line in shown.lines for node in line.nodes]
        assert len({node.index for node in inside}) == len(inside) == shown.nodes
        roots = {line.nodes[0].index for line in shown.lines if line.nodes[0].parent is None}
        below = sum(1 for node in tree.nodes if node.path()[0].index in roots)
        assert sum(line.hidden for line in shown.lines) + shown.nodes == below
        for line in shown.lines:
            assert all(child.parent is parent for parent, child in zip(line.nodes, line.nodes[1:], strict=False))
            assert line.best == (line.nodes[-1] in tree.path(tree.best))
            assert len(line.guides) % 2 == 0
        assert shown.lines[0].best
        if depth is not None:
            assert max(len(node.path()) for node in inside) == depth + 1
    assert lay_out(tree, most=1000).nodes == len(tree.nodes)
    assert [line.nodes[-1] for line in lay_out(tree, most=1).lines] == [tree.best]


def test_any_chain_of_nodes_is_one_line_and_depth_is_no_limit():
    tree = SavedTree({"verifier": "v"}, last=1)
    nodes = [
        {"index": i, "id": "0", "stream": "0", "parent": i - 1 if i else None, "move": {"kind": "denoise" if i % 2 else "renoise", "levels": [1], "copy": 0}, "level": i % 2, "draft": False}
        for i in range(5000)
    ]
    tree.apply({"request": {}, "nodes": nodes, "effects": [], "ledger": tree.ledger})
    (line,) = lay_out(tree).lines
    assert (len(line.nodes), line.guides, line.hidden) == (5000, "", 0)


def test_the_tree_as_json(show, folder):
    run = load_run(folder / "run-0002")
    found = document(show("run-0002", "--json", "--most", "2"))
    assert (found["prompt"], found["status"], found["score"], found["best"], found["nodes"], found["damage"]) == (PROMPT, "done", run.score, run.best.index, len(run.nodes), [])
    assert {index for path in found["paths"] if path["best"] for index in path["nodes"]} == {node.index for node in run.path_to(run.best)}
    plain = document(show("run-0002", "--baseline", "--json"))
    assert (plain["tree"], plain["paths"][0]["nodes"]) == ("baseline", [node.index for node in run.baseline.nodes])


def test_an_unfinished_run_is_shown_with_what_is_wrong(show, tmp_path):
    for name in ("tree.json", "best.png"):
        (tmp_path / "run-0001" / name).unlink()
    facts = json.loads((tmp_path / "run-0001/run.json").read_text())
    (tmp_path / "run-0001/run.json").write_text(json.dumps(facts | {"status": "running"}))
    journal = tmp_path / "run-0001/journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:3])[:-20])
    result = show("run-0001")
    assert result.exit_code == 0
    assert re.search(r"^run +run-0001, killed", result.stdout, re.MULTILINE)
    assert "none yet" in result.stdout
    assert re.search(r"warning: journal.jsonl: line 3 was never finished", result.stderr)
    journal.unlink()
    assert "no node has been written down" in show("run-0001").stdout


# Nodes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [("run-0002:best",), ("run-0002", "--node", "best")])
def test_a_node_is_shown_with_how_it_came_about(show, folder, arguments):
    run = load_run(folder / "run-0002")
    result = show(*arguments)
    assert result.exit_code == 0, result.output
    best = run.best
    for text in (
        f"{best.index} of {len(run.nodes)} (run-0002, search tree)", "level                        6 of 6 (alpha 1, sigma 0)", f"value gaussian-target        {run.score:.4g}", "- gaussian-target: distance",
        f"{best.nfe} NFE, {sum(node.nfe for node in best.path())} on the path to it", f"fresh, index {run.tree.roots.index(best.path()[0])}", f"{best.id:032x}",
    ):  # fmt: skip
        assert text in result.stdout, text
    path = result.stdout.rpartition("the path to it")[2].splitlines()[2:]
    assert [int(line.split()[0]) for line in path] == [node.index for node in best.path()]
    assert [line.split()[1].rstrip(",") for line in path] == [node.move.kind for node in best.path()]


def test_a_node_as_json(show, folder):
    run = load_run(folder / "run-0002")
    found = document(show(f"run-0002:{run.best.index}", "--json"))
    assert found["node"]["values"] == {key: value.to_json() for key, value in run.best.values.items()}
    assert [node["index"] for node in found["path"]] == [node.index for node in run.path_to(run.best)]
    assert (found["seed"], found["recipe"]["kind"], found["path_nfe"]) == (0, "fresh", sum(node.nfe for node in run.best.path()))


# Pictures ------------------------------------------------------------------------------------------------------------

PARAMETERS = "a red cube,\non blue\nNegative prompt: blurry: very\nSteps: 20, Sampler: dpm++2m, CFG scale: 7.5, Seed: 3, Size: 512x640, Model: \"a, b: \\\"c\\\"\", Policy: beam"


def picture(path, **texts):
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", (4, 6)).save(path, pnginfo=info)
    return path


def test_a_picture_says_where_it_came_from(show, tmp_path):
    picture(tmp_path / "one.png", parameters=PARAMETERS, tsdiff=json.dumps({"format": 1, "policy": {"name": "beam", "width": 4}, "path": [0, 3, 9], "nodes": [{"index": 3}], "note": None}))
    text = show("one.png").stdout
    for fact in (r"size +4 x 6", r"Prompt +a red cube, on blue", r"Negative prompt +blurry: very", r"Sampler +dpm\+\+2m", r"Model +a, b: \"c\"", r"policy\.name +beam", r"path +0, 3, 9", r"nodes\.0\.index +3", r"note +none"):
        assert re.search(rf"^{fact}$", text, re.MULTILINE), fact
    steps = [{"index": 4, "move": {"kind": "draw", "levels": [0], "copy": 0}, "level": 0, "nfe": 1}, {"index": 9, "move": {"kind": "denoise", "levels": [0, 1, 2], "copy": 2}, "level": 2, "nfe": 2}]
    picture(tmp_path / "two.png", tsdiff=json.dumps({"seed": 3, "path": steps}))
    text = show("two.png").stdout
    assert re.search(r"^ +4 +draw +0 +1\n +9 +denoise, copy 2 +0 → 2 +2\n", text, re.MULTILINE)
    assert "path." not in text
    found = document(show("one.png", "--json"))
    assert found["parameters"]["CFG scale"] == "7.5"
    assert found["tsdiff"]["policy"]["width"] == 4
    assert found["size"] == [4, 6]


def test_a_picture_that_says_nothing_is_no_mistake(show, tmp_path):
    picture(tmp_path / "none.png", comment="hello")
    result = show("none.png")
    assert (result.exit_code, result.stdout.split()) == (0, ["image", "none.png", "size", "4", "x", "6"])
    assert result.stderr == "this image does not say where it came from: it has no text `tsdiff` or `parameters` (some programs remove it when they save)\n"
    picture(tmp_path / "half.png", tsdiff='{"a": NaN}')
    assert show("half.png").stderr.startswith("warning: what tsdiff has written into 'half.png' is damaged: NaN is not strict JSON")


def test_texts_of_a_picture_cannot_steer_the_terminal(show, tmp_path):
    picture(tmp_path / "evil.png", parameters="\x1b]0;pwned\x07\x1b[2J", tsdiff=json.dumps({"\x1b[31m": "\x1b[0m\r\n\u202e"}))
    result = show("evil.png")
    assert result.exit_code == 0
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f\u202e]", result.stdout)


def test_settings_are_read_in_their_usual_layout():
    assert read_parameters(PARAMETERS) == {
        "Prompt": "a red cube,\non blue", "Negative prompt": "blurry: very", "Steps": "20", "Sampler": "dpm++2m", "CFG scale": "7.5", "Seed": "3", "Size": "512x640",
        "Model": 'a, b: "c"', "Policy": "beam",
    }  # fmt: skip
    assert read_parameters("just a prompt") == {"Prompt": "just a prompt"}
    assert read_parameters("p\nSteps: 4, Odd: , Last: x") == {"Prompt": "p", "Steps": "4", "Odd": "", "Last": "x"}
    assert read_parameters("p\nNegative prompt: \nSteps: 4") == {"Prompt": "p", "Negative prompt": "", "Steps": "4"}
    assert read_parameters("Negative prompt: n\nSteps: 4") == {"Prompt": "", "Negative prompt": "n", "Steps": "4"}


# Mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("nowhere",), "'nowhere' is not the folder of a run"),
        (("nowhere:3",), "'nowhere' is not the folder of a run"),
        (("run-0001:900",), "there is no node 900 in the search tree; its nodes are 0 to 39"),
        (("run-0001", "--node", "-1"), "--node is '-1' but must be a node's number, or `best`"),
        (("run-0001:3", "--node", "4"), "both 'run-0001:3' and --node 4 name a node"),
        (("run-0001/best.png", "--node", "1"), "is a file, which has no nodes"),
        (("run-0001/run.json",), "is neither the folder of a run nor a picture"),
        ((".",), "holds 2 runs; name one of them, such as 'run-0001'"),
        (("run-0001", "--most", "0"), "0 is not in the range x>=1"),
        (("bare", "--baseline"), "'bare' has no baseline tree; leave --baseline out"),
        (("run-0001", "--json", "--node", "x"), "--node is 'x' but must be"),
        ((), "Missing argument 'RUN|RUN:NODE|IMAGE'"),
    ],
)
def test_mistakes_are_one_line(show, tmp_path, arguments, hint):
    if arguments[:1] == ("bare",):
        shutil.copytree(tmp_path / "run-0001", tmp_path / "bare")
        (tmp_path / "bare" / "baseline.json").unlink()
    result = show(*arguments)
    assert (result.exit_code, result.stdout) == (2, ""), result.output
    (line,) = result.stderr.splitlines()
    assert hint in line
