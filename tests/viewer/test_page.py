"""The viewer's page in a real browser: what it shows, what the hand and the keyboard do, and that it never complains."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import pytest
from browser import Tab
from viewer_runs import VERIFIER, Going, grown, node, write_run
from viewer_server import TOKEN, Told, serving

import tsdiff
from tsdiff.treesearch.saved import load_run
from tsdiff.viewer.steering import Command, Question

HOSTILE = "<img src=x onerror='window.hacked=1'><script>window.hacked=1</script>\u202e\"'&amp;"
COUNT = 90


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two runs of one prompt, one of another; the first has pictures."""
    folder = tmp_path_factory.mktemp("runs")
    nodes = grown(COUNT, seed=3)
    nodes[20]["values"] = {VERIFIER: {"score": 0.5, "parts": {"colour": 0.25, "shape": 0.75}}, "second": {"score": 7.0}}
    write_run(folder / "a", nodes, pictures=range(0, COUNT, 2), best_png=True)
    write_run(folder / "b", grown(30, seed=4))
    write_run(folder / "c", grown(30, seed=5), prompt="a dog")
    return folder


@pytest.fixture(scope="module")
def told():
    return Told()


@pytest.fixture(scope="module")
def site(root, told):
    with serving(root, told) as port:
        yield f"http://127.0.0.1:{port}/"


@pytest.fixture(scope="module")
def kept(chromium_browser):
    context = chromium_browser.new_context(viewport={"width": 1280, "height": 800}, reduced_motion="reduce")
    yield Tab(context.new_page())
    context.close()


@pytest.fixture
def tab(kept, site):
    """The first run, freshly opened with the token; nothing may have been complained of afterwards."""
    kept.asked.clear()
    yield kept.open(f"{site}#token={TOKEN}&run=a").painted()
    complaints, kept.complaints = kept.complaints, []
    assert complaints == []


@pytest.fixture(scope="module")
def saved(root):
    return load_run(root / "a")


def ranked(run):
    return sorted((one for one in run.tree.finished if one.score(VERIFIER) is not None), key=lambda one: (-one.score(VERIFIER), one.index))


# Looking -------------------------------------------------------------------------------------------------------------


def test_the_page_shows_the_run(tab, saved):
    assert tab.text("#prompt") == "a cat"
    assert tab.text("#status") == "finished"
    assert tab.page.evaluate("tsdiffPage.state.tree.size") == COUNT
    best = ranked(saved)
    assert tab.page.locator(".leader").count() == len(best)
    assert f"Node {best[0].index}" in tab.page.locator(".leader").first.inner_text()
    assert "denoised" in tab.text("#legend")
    assert tab.page.evaluate("tsdiffPage.locate(0)") is not None
    assert all(address.startswith(("http://127.0.0.1:", "data:")) for address in tab.asked)


def test_the_tree_is_really_drawn(tab):
    """Pixels of the canvas differ from its ground, at the places of nodes."""
    drawn = tab.page.evaluate(
        """() => {
          const canvas = document.getElementById("tree"), scale = devicePixelRatio, pen = canvas.getContext("2d");
          const whole = pen.getImageData(0, 0, canvas.width, canvas.height);
          const colour = (x, y) => { const at = 4 * (Math.round(x * scale) + canvas.width * Math.round(y * scale)); return whole.data.slice(at, at + 3).join(); };
          const ground = colour(2, 2);
          return [0, 1, 2, 3].map((index) => { const at = tsdiffPage.locate(index); return colour(at.x, at.y) !== ground; });
        }"""
    )
    assert drawn == [True] * 4


def test_a_click_chooses_a_node_and_tells_everything_of_it(tab, saved):
    shown = saved.nodes[20]
    tab.click(20)
    tab.page.wait_for_selector(".facts")
    assert tab.text(".node-head h2") == "Node 20"
    scores = tab.text(".scores")
    assert "colour" in scores
    assert "0.25" in scores
    assert "second" in scores
    facts = tab.text(".facts")
    assert f"{shown.level} of 20" in facts
    assert f"node {shown.parent.index}" in facts
    assert f"{shown.id:032x}" in facts
    assert "--node 20" in tab.text(".commands")
    assert tab.page.evaluate("location.hash") == "#run=a&node=20"
    path = [one.index for one in saved.path_to(20)]
    assert tab.page.eval_on_selector_all("#path .stop", "all => all.map(one => Number(/Node (\\d+)/.exec(one.getAttribute('aria-label'))[1]))") == path
    tab.page.locator("#path .stop").first.click()
    assert tab.state("node") == path[0]
    tab.page.mouse.click(300, 90)  # nothing is there
    assert tab.state("node") is None


def test_the_picture_of_a_node_is_shown(tab):
    tab.click(20)
    tab.until("document.querySelector('.node-image')?.naturalWidth > 0")
    tab.until("document.querySelector('#path canvas.thumb')")


def test_scrubbing_shows_the_tree_as_it_was(tab, saved):
    slider = tab.page.locator("#time")
    slider.fill("30")
    tab.settled()
    assert tab.text("#scrubber output").startswith("30 of 90 nodes")
    spot = tab.spot(60)
    tab.page.mouse.click(spot["x"], spot["y"])
    assert tab.state("node") != 60  # was not made then
    tab.click(20)
    assert tab.state("node") == 20
    slider.fill("90")
    tab.settled()
    assert tab.state("time") is None
    tab.click(60)
    assert tab.state("node") == 60


def test_play_goes_to_the_end(tab):
    tab.page.locator("#tree").focus()
    tab.page.keyboard.press(" ")
    tab.until("tsdiffPage.state.playing && tsdiffPage.state.time > 3")
    tab.page.keyboard.press(" ")
    stopped = tab.state("time")
    assert stopped < COUNT
    tab.page.locator("#time").fill("75")
    tab.page.get_by_label("Play the search in order of creation").click()
    tab.until("!tsdiffPage.state.playing && tsdiffPage.state.time === null")


def test_two_nodes_are_compared_with_a_slider(tab, saved):
    best, second = ranked(saved)[:2]
    tab.page.get_by_role("button", name=re.compile(f"^2.*Node {second.index}\\b", re.DOTALL)).click()
    tab.page.keyboard.press("c")
    tab.page.wait_for_selector(".overlay")
    assert (tab.state("node"), tab.state("other")) == (second.index, best.index)
    table = tab.text(".versus")
    assert VERIFIER in table
    assert "common ancestor" in table
    clip = "document.querySelector('.layer.left').style.clipPath"
    assert tab.page.evaluate(clip) == "inset(0px 50% 0px 0px)"
    tab.page.locator("#split").fill("80")
    assert tab.page.evaluate(clip) == "inset(0px 20% 0px 0px)"
    tab.page.get_by_role("button", name="Swap").click()
    tab.settled()
    assert (tab.state("node"), tab.state("other")) == (best.index, second.index)
    assert tab.page.evaluate("location.hash") == f"#run=a&node={best.index}&other={second.index}&view=compare"


def test_the_gallery_has_all_samples_best_first(tab, saved):
    tab.page.get_by_role("button", name="Gallery").click()
    named = tab.page.eval_on_selector_all(".tile", "all => all.map(one => Number(/node (\\d+)/.exec(one.getAttribute('aria-label'))[1]))")
    assert named == [one.index for one in ranked(saved)]
    tab.until("[...document.querySelectorAll('.tile img')].slice(0, 3).every(one => one.complete && one.naturalWidth > 0)")
    tab.page.locator(".tile").nth(1).click()
    assert tab.state("node") == named[1]


def test_the_curve_rises_to_the_best(tab, saved):
    tab.page.get_by_role("button", name="Curve").click()
    tab.page.wait_for_selector(".rise-line")
    rows = tab.page.locator(".steps tbody tr")
    assert f"node {ranked(saved)[0].index}" in rows.first.inner_text()
    assert rows.count() == tab.page.locator("circle.dot").count() >= 1
    rows.first.get_by_role("button").click()
    assert tab.state("node") == ranked(saved)[0].index


def test_runs_are_compared_prompt_by_prompt(new_tab, site):
    tab = new_tab().open(f"{site}#token={TOKEN}")
    assert tab.state("view") == "runs"
    assert tab.page.eval_on_selector_all(".matrix tbody tr", "all => all.map(one => [one.querySelector('.prompt').textContent, one.querySelectorAll('.entry').length])") == [["a cat", 2], ["a dog", 1]]
    assert tab.page.locator(".matrix .pill-best").count() == 1
    tab.page.locator(".matrix tbody tr").nth(1).locator(".entry").click()
    tab.until("tsdiffPage.state.runId === 'c' && tsdiffPage.state.tree")
    assert tab.text("#prompt") == "a dog"
    tab.page.select_option("#run-choice", "b")
    tab.until("tsdiffPage.state.runId === 'b' && tsdiffPage.state.tree")
    assert tab.page.evaluate("location.hash") == "#run=b"


def test_a_link_leads_to_a_node_and_the_token_leaves_the_address(new_tab, site):
    tab = new_tab().open(f"{site}#token={TOKEN}&run=a&node=33&view=curve")
    assert (tab.state("runId"), tab.state("node"), tab.state("view")) == ("a", 33, "curve")
    assert tab.page.evaluate("location.hash") == "#run=a&node=33&view=curve"
    assert tab.page.evaluate("sessionStorage.getItem('tsdiff-token')") == TOKEN
    tab.page.reload()
    tab.until("window.tsdiffPage?.state.tree")
    assert (tab.state("node"), tab.state("view")) == (33, "curve")
    assert tab.page.evaluate("tsdiffPage.state.source.steers")
    tab.page.evaluate("location.hash = 'run=b&node=5'")
    tab.until("tsdiffPage.state.runId === 'b' && tsdiffPage.state.node === 5")


def test_links_to_nothing_are_told(new_tab, site):
    tab = new_tab()
    tab.page.goto(f"{site}#run=%2e%2e%2fetc&node=99999999999&view=x")
    tab.page.wait_for_selector("#trouble:visible")
    assert "There is no run" in tab.text("#trouble")
    tab = new_tab().open(f"{site}#run=a&node=5000")
    assert tab.state("node") is None


def test_the_keyboard_walks_the_tree(tab, saved):
    tab.page.locator("#tree").focus()
    tab.page.keyboard.press("b")
    best = ranked(saved)[0]
    assert tab.state("node") == best.index
    tab.page.keyboard.press("ArrowUp")
    assert tab.state("node") == best.parent.index
    tab.page.keyboard.press("ArrowDown")
    child = saved.nodes[tab.state("node")]
    assert child.parent is best.parent
    while tab.state("node") != saved.path_to(best)[0].index:
        tab.page.keyboard.press("ArrowUp")
    tab.page.keyboard.press("ArrowRight")
    moved = tab.state("node")
    tab.page.keyboard.press("ArrowLeft")
    assert (saved.nodes[moved].parent, tab.state("node")) == (None, saved.path_to(best)[0].index)
    assert f"Node {tab.state('node')}" in tab.page.text_content("#spoken")
    tab.page.keyboard.press("?")
    assert tab.page.locator("#help").is_visible()
    tab.page.keyboard.press("Escape")
    assert not tab.page.locator("#help").is_visible()
    for key, view in zip("2345", ("gallery", "compare", "curve", "runs"), strict=True):
        tab.page.keyboard.press(key)
        assert tab.state("view") == view


def test_the_search_box_finds_nodes(tab, saved):
    meanings = [
        ("17", lambda one, run: one.index == 17),
        ("best", lambda one, run: one is run.best),
        ("re-noised", lambda one, run: one.move.kind == "renoise"),
        ("level:20", lambda one, run: one.level == 20),
        (">0.9", lambda one, run: (one.score(VERIFIER) or 0) > 0.9),
        ("nothing of the kind", lambda one, run: False),
    ]
    for text, means in meanings:
        tab.page.keyboard.press("/")
        tab.page.locator("#search").fill(text)
        wanted = [one.index for one in saved.nodes if means(one, saved)]
        assert sorted(tab.state("found")) == wanted, text
        tab.page.keyboard.press("Enter")
        if wanted:
            assert tab.state("node") == wanted[0]
        tab.page.keyboard.press("Escape")
        assert tab.state("found") is None


def test_weak_subtrees_are_folded_and_open_on_a_click(tab):
    assert not tab.state("fold")
    tab.page.locator("#fold").click()
    tab.settled()
    assert tab.page.locator("#fold").get_attribute("aria-pressed") == "true"
    weak = tab.page.evaluate("[...tsdiffPage.state.tree.weak()].filter(index => tsdiffPage.locate(index))")
    assert weak
    child = tab.page.evaluate("index => tsdiffPage.state.tree.at(index).children[0].i", weak[0])
    assert tab.spot(child) is None
    tab.click(weak[0])
    assert tab.spot(child) is not None
    tab.page.keyboard.press("w")
    tab.settled()
    assert all(tab.spot(index) for index in range(COUNT))


def test_the_tree_moves_zooms_and_fits(tab):
    before = tab.spot(0)
    tab.page.mouse.move(500, 300)
    tab.page.mouse.wheel(0, -400)
    tab.settled()
    zoomed = tab.spot(0)
    assert zoomed != before
    tab.page.mouse.down()
    tab.page.mouse.move(540, 330, steps=4)
    tab.page.mouse.up()
    tab.settled()
    moved = tab.spot(0)
    assert (moved["x"] - zoomed["x"], moved["y"] - zoomed["y"]) == pytest.approx((40, 30), abs=0.5)
    tab.page.keyboard.press("f")
    tab.settled()
    assert tab.spot(0) == pytest.approx(before)
    tab.page.keyboard.press("o")
    tab.settled()
    assert tab.spot(0)["x"] < min(tab.spot(one)["x"] for one in range(8, COUNT))


def test_light_and_dark(new_tab, site):
    tab = new_tab(color_scheme="dark").open(f"{site}#run=a").painted()
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = tab.page.evaluate(ground)
    tab.page.locator("#theme").click()
    light = tab.page.evaluate(ground)
    assert sum(map(int, re.findall(r"\d+", light))) > 700 > 100 > sum(map(int, re.findall(r"\d+", dark)))
    tab.page.reload()
    tab.until("window.tsdiffPage?.state.tree")
    assert tab.page.evaluate(ground) == light


def test_narrow_screens_scroll_in_one_direction(new_tab, site):
    tab = new_tab(viewport={"width": 360, "height": 740}, has_touch=True).open(f"{site}#run=a&node=20").painted()
    for view in ("tree", "gallery", "compare", "curve", "runs"):
        tab.page.evaluate("view => { location.hash = `run=a&node=20&view=${view}` }", view)
        tab.until(f"tsdiffPage.state.view === '{view}'")
        tab.settled()
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360, view


def test_everything_that_can_be_used_has_a_name(tab):
    tab.click(20)
    tab.page.wait_for_selector(".facts")
    nameless = """() => [...document.querySelectorAll("button, input, select, canvas[tabindex], [role=tab], summary, img")].filter((one) => {
      const named = one.getAttribute("aria-label") || one.textContent.trim() || one.labels?.[0]?.textContent.trim() || one.hasAttribute("alt");
      return !named;
    }).map((one) => one.outerHTML)"""
    for view in ("tree", "gallery", "compare", "curve", "runs"):
        tab.page.locator(f'#views [data-view="{view}"]').click()
        tab.settled()
        assert tab.page.evaluate(nameless) == []


# Following and steering ------------------------------------------------------------------------------------------------


def test_a_search_is_followed_while_it_runs(new_tab, tmp_path):
    """The tree grows in the page while a search on `gaussian` goes on, and in the end is the tree on disk."""
    go = threading.Event()
    scored = []

    def patient(images, prompts):  # waits until the page has seen the first nodes
        scored.append(len(images))
        if len(scored) == 2:
            assert go.wait(60)
        return images.mean(dim=(1, 2, 3))

    def search():
        tsdiff.search("gaussian", "near (3, 2.4)", policy="beam", verifier=patient, nfe=200, out=tmp_path)

    thread = threading.Thread(target=search, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not scored and thread.is_alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    with serving(tmp_path) as port:
        tab = new_tab().open(f"http://127.0.0.1:{port}/")
        assert tab.text("#status") == "running"
        first = tab.page.evaluate("tsdiffPage.state.tree.size")
        go.set()
        tab.until("tsdiffPage.state.status === 'done'")
        thread.join(60)
        run = load_run(next(path for path in tmp_path.iterdir() if path.is_dir()))
        tab.until(f"tsdiffPage.state.tree.size === {len(run.nodes)}")
        assert 0 < first < len(run.nodes)
        assert tab.text("#status") == "finished"
        assert tab.page.evaluate("tsdiffPage.state.tree.best") == run.best.index
        tab.painted()


def test_new_nodes_appear_and_a_chosen_one_stays(new_tab, tmp_path):
    going = Going(tmp_path / "run")
    try:
        nodes = grown(40, seed=8)
        going.add(*nodes[:12])
        with serving(tmp_path) as port:
            tab = new_tab().open(f"http://127.0.0.1:{port}/").painted()
            tab.click(3)
            going.add(*nodes[12:30])
            tab.until("tsdiffPage.state.tree.size === 30")
            tab.settled()
            assert tab.state("node") == 3
            assert tab.spot(29) is not None
    finally:
        going.close()


def test_a_server_that_goes_away_is_told(new_tab, root):
    with serving(root) as port:
        tab = new_tab().open(f"http://127.0.0.1:{port}/#run=a").painted()
    tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    tab.page.wait_for_selector("#trouble:visible")
    assert "does not answer" in tab.text("#trouble")
    assert all("ERR_CONNECTION_REFUSED" in one for one in tab.complaints)  # the browser's own lines
    tab.complaints.clear()


def test_growing_a_node_is_asked_for(tab, told, root):
    told.asked.clear()
    tab.click(20)
    tab.page.wait_for_selector(".grow")
    tab.page.locator("#renoise").fill("0.35")
    tab.page.locator("#children").fill("3")
    button = tab.page.get_by_role("button", name="Grow 3 children")
    button.click()
    tab.until("document.getElementById('toast').textContent.includes('Asked for 3 children')")
    assert told.asked == [("expand", (root / "a").resolve(), 20, 3, 0.35, None)]
    told.given[:] = [Command("c1", "expand", "done", "3 children of node 20")]
    try:
        tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        tab.page.wait_for_selector(".asked")
        assert "3 children of node 20" in tab.text(".asked")
    finally:
        told.given.clear()


def test_without_the_token_the_page_only_looks(new_tab, site, told):
    told.asked.clear()
    tab = new_tab().open(f"{site}#run=a&node=20").painted()
    tab.page.wait_for_selector(".facts")
    assert tab.page.locator(".grow").count() == 0
    assert "may look but not steer" in tab.text("#panel-body")
    assert told.asked == []


def test_a_person_rates_and_chooses(new_tab, site, told, root):
    questions = [Question(f"q{index}", root / "a", index, "", "human", "a cat", 0.0, 10.0) for index in (2, 4, 6)]
    told.asked.clear()
    told.open[:] = questions
    try:
        tab = new_tab().open(f"{site}#token={TOKEN}&run=a")
        tab.page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
        tab.page.locator('#views [data-view="rate"]').click()
        cards = tab.page.locator(".card")
        cards.nth(2).wait_for()
        tab.until("[...document.querySelectorAll('.card img')].every(one => one.complete && one.naturalWidth > 0)")
        cards.nth(0).locator("input").fill("8.5")
        cards.nth(0).get_by_role("button", name="Rate").click()
        tab.until("document.querySelectorAll('.card').length === 2")
        told.open[:] = questions[1:]
        tab.page.locator(".card").nth(1).get_by_role("button", name="This is the best").click()
        tab.until("document.querySelectorAll('.card').length === 0")
        assert told.asked == [("answer", "q2", 8.5), ("answer", "q4", 0.0), ("answer", "q6", 10.0)]
    finally:
        told.open.clear()


# What others wrote -----------------------------------------------------------------------------------------------------


def test_text_of_a_run_is_text(new_tab, tmp_path):
    """A script in a prompt, a label, a verifier's name or a reason is shown and not run."""
    nodes = grown(12, width=4, seed=1)
    nodes[5]["note"] = {"label": HOSTILE}
    nodes[5]["values"] = {VERIFIER: {"score": 0.1, "parts": {HOSTILE: 1.0}, "reason": HOSTILE}, HOSTILE: {"score": 1.0}}
    nodes.append(node(12, 0, 3, kind=HOSTILE, status="failed", reason=HOSTILE))
    write_run(tmp_path / "run", nodes, prompt=HOSTILE)
    with serving(tmp_path) as port:
        tab = new_tab().open(f"http://127.0.0.1:{port}/").painted()
        assert tab.page.text_content("#prompt").startswith("<img src=x")
        for index in (5, 12):
            tab.click(index)
            tab.page.wait_for_selector(".facts")
            assert "<img" in tab.text("#panel-body")
        for view in ("gallery", "compare", "curve", "tree"):
            tab.page.locator(f'#views [data-view="{view}"]').click()
            tab.settled()
        tab.page.locator("#tab-run").click()
        assert tab.page.evaluate("[window.hacked, document.querySelectorAll('main img[src=x], body script').length]") == [None, 0]
        assert not any(address.endswith("/x") for address in tab.asked)


def test_the_page_is_small_and_whole():
    """No file of the page reaches outside of it, and d3's licence is beside d3."""
    static = Path(tsdiff.__file__).parent / "viewer" / "static"
    files = [path for path in static.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    for path in files:
        if path.suffix in (".js", ".css", ".html") and path.parent.name != "vendor":
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert "//" not in re.sub(r"/\*.*?\*/|// .*", "", text, flags=re.DOTALL) or "http" not in text, path
            assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), path
    assert "Permission to use" in (static / "vendor" / "d3-hierarchy-LICENSE.txt").read_text()
