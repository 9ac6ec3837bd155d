"""`tsdiff export RUN run.html`: the page in one file, opened from a disk."""

from __future__ import annotations

import json
import re

import pytest
from browser import file_address
from click.testing import CliRunner
from viewer_runs import grown, write_run

from tsdiff.cli.app import cli
from tsdiff.treesearch.saved import load_run
from tsdiff.viewer import html

COUNT = 60
HOSTILE = "</script><script>window.hacked=1</script><img src=x onerror='window.hacked=1'>"


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "run", grown(COUNT, seed=6), pictures=range(0, COUNT, 2), best_png=True, prompt=HOSTILE)


def test_the_file_shows_the_run_and_asks_for_nothing(new_tab, run, tmp_path):
    result = CliRunner().invoke(cli, ["export", str(run), str(tmp_path / "run.html")])
    assert result.exit_code == 0, result.output
    tab = new_tab().open(file_address(tmp_path / "run.html", "node=20")).painted()
    assert tab.page.text_content("#prompt") == HOSTILE
    assert tab.state("node") == 20
    tab.page.wait_for_selector(".facts")
    assert f"{load_run(run).nodes[20].id:032x}" in tab.text(".facts")
    tab.until("document.querySelector('.node-image')?.naturalWidth > 0")
    tab.click(8)
    assert tab.text(".node-head h2") == "Node 8"
    for view in ("gallery", "compare", "curve", "tree"):
        tab.page.locator(f'#views [data-view="{view}"]').click()
        tab.settled()
    tab.page.locator("#time").fill("10")
    tab.settled()
    assert tab.text("#scrubber output").startswith("10 of 60")
    assert tab.page.locator(".grow").count() == 0
    assert tab.page.evaluate("window.hacked") is None
    assert all(address.startswith(("file://", "data:")) for address in tab.asked)
    assert len([address for address in tab.asked if address.startswith("file://")]) == 1


def test_the_policy_permits_the_own_script_only(new_tab, run, tmp_path):
    html.write_html(load_run(run), tmp_path / "run.html")
    text = (tmp_path / "run.html").read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)[1]
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "unsafe" not in policy
    (tmp_path / "changed.html").write_text(text.replace("</body>", "<script>window.hacked=1</script></body>"))
    tab = new_tab().open(file_address(tmp_path / "changed.html"))
    assert tab.page.evaluate("window.hacked") is None
    assert all("Content Security Policy" in one for one in tab.complaints)
    assert len(tab.complaints) == 1
    tab.complaints.clear()


def test_a_file_that_would_be_large_tells_what_it_left_out(new_tab, run, tmp_path, monkeypatch):
    whole = html.write_html(load_run(run), tmp_path / "whole.html")
    assert whole == []
    monkeypatch.setattr(html, "ROOM", 12_000)
    told = html.write_html(load_run(run), tmp_path / "small.html")
    left = json.loads(re.search(r'id="tsdiff-data">(.*?)</script>', (tmp_path / "small.html").read_text())[1])
    kept = len(left["nodes"])
    assert 0 < kept < COUNT
    assert any(f"details of {COUNT - kept} nodes" in text for text in told)
    assert len(left["tree"]["nodes"]) == COUNT
    assert (tmp_path / "small.html").stat().st_size < (tmp_path / "whole.html").stat().st_size
    missing = next(index for index in range(COUNT) if str(index) not in left["nodes"])
    tab = new_tab().open(file_address(tmp_path / "small.html", f"node={missing}"))
    tab.until("document.querySelector('#panel-body').textContent.includes('left out')")
    tab.page.locator("#tab-run").click()
    assert "Left out of this file" in tab.text("#panel-body")


def test_scripts_are_joined_in_order():
    script = html.joined("main.js")
    assert not re.search(r"^\s*(import|export)\b", script, re.MULTILINE)
    made = re.findall(r"^const (module_\w+) = \(", script, re.MULTILINE)
    assert made[-1] == "module_main_js"
    for match in re.finditer(r"^const \{[^}]*\} = (module_\w+);", script, re.MULTILINE):
        assert script.index(f"const {match[1]} = (() =>") < match.start()


@pytest.mark.parametrize("status", ["killed", "failed"])
def test_a_run_that_is_not_done_is_written_too(tmp_path, status):
    folder = write_run(tmp_path / "run", grown(12, seed=2), status="interrupted" if status == "killed" else status)
    html.write_html(load_run(folder), tmp_path / "run.html")
    assert (tmp_path / "run.html").stat().st_size > 50_000
