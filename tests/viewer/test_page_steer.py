"""A person in the loop: nodes are grown and images rated in the page, and real searches take it up."""

from __future__ import annotations

import threading
from contextlib import contextmanager

from expansions import PROMPT, QUICK, begin
from people import quick  # noqa: F401 - a fixture
from viewer_server import TOKEN, serving

from tsdiff.cli.steering import RunSteering
from tsdiff.treesearch.saved import load_run
from tsdiff.treesearch.search import execute, prepare
from tsdiff.viewer.folders import Folders


@contextmanager
def steered(root):
    """A server of a folder that carries out what the page asks; its address with the token."""
    folders = Folders(root)
    folders.patience = 0.0
    steering = RunSteering(lambda: folders.all().values())
    try:
        with serving(root, steering) as port:
            yield f"http://127.0.0.1:{port}/#token={TOKEN}"
    finally:
        steering.close()


def test_a_node_is_grown_and_its_children_arrive(new_tab, tmp_path):
    run = begin(tmp_path, steps=4)
    before = len(load_run(run).nodes)
    with steered(tmp_path) as address:
        tab = new_tab().open(address).painted()
        tab.page.keyboard.press("b")
        chosen = tab.state("node")
        tab.page.locator("#children").fill("2")
        tab.page.get_by_role("button", name="Grow 2 children").click()
        tab.until("tsdiffPage.state.commands.some(one => one.state === 'done' || one.state === 'failed')", 120)
        assert [(one["state"], one["message"] if one["state"] == "failed" else "") for one in tab.state("commands")] == [("done", "")]
        tab.until(f"tsdiffPage.state.tree.size > {before} && tsdiffPage.state.status === 'done'")
        saved = load_run(run)
        tab.until(f"tsdiffPage.state.tree.size === {len(saved.nodes)}")
        assert [child.driver for child in saved.nodes[chosen].children] == [1, 1]
        assert tab.page.evaluate(f"tsdiffPage.state.tree.at({chosen}).children.map(one => one.g)") == [1, 1]
        tab.settled()
        assert tab.spot(before) is not None


def test_images_are_rated_in_the_page_and_the_search_ends_with_them(new_tab, tmp_path, quick):  # noqa: F811
    given = {}
    failed = []

    def search():
        try:
            execute(prepare("gaussian", PROMPT, out=tmp_path, verifiers=["human:where=page"], policy="best-of-n", policy_options={"n": 3}, steps=4, baseline=False), disk=QUICK)
        except BaseException as error:  # told by the test, not lost in the thread
            failed.append(error)

    thread = threading.Thread(target=search, daemon=True)
    with steered(tmp_path) as address:
        thread.start()
        tab = new_tab()
        while thread.is_alive() and not any(tmp_path.glob("*/run.json")):
            thread.join(0.05)
        tab.open(address)
        tab.until("tsdiffPage.state.questions.length > 0", 60)
        tab.page.locator('#views [data-view="rate"]').click()
        for score in (2.0, 9.0, 4.0):
            tab.until("document.querySelector('.card')", 60)
            card = tab.page.locator(".card").first
            node = int(card.locator("small").inner_text().removeprefix("node "))
            card.locator("input").fill(str(score))
            card.get_by_role("button", name="Rate").click()
            given[node] = score
            tab.until(f"tsdiffPage.state.tree.at({node})?.s.human === {score}", 60)
        tab.until("tsdiffPage.state.status === 'done'", 60)
        thread.join(60)
        assert failed == []
        saved = load_run(next(path.parent for path in tmp_path.glob("*/run.json")))
        assert {node: saved.nodes[node].values["human"].score for node in given} == given
        assert given[saved.best.index] == 9.0
        assert tab.page.evaluate("tsdiffPage.state.tree.best") == saved.best.index
