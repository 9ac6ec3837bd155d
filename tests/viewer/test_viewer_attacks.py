"""What strangers may try: pages of other sites, made-up addresses and requests, and run folders that were made to do harm."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import time
from urllib.parse import quote

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from viewer_runs import QUICK, STEPS, VERIFIER, Going, add_pictures, grown, node, write_run
from viewer_server import ORIGIN, PORT, TOKEN, WRITES, Told, ask, send, serving, strict, view

from tsdiff.treesearch.previewfile import PREVIEWS, PreviewFile
from tsdiff.treesearch.strictjson import decode
from tsdiff.viewer import app as app_module

SCRIPT = "<script>alert(1)</script><img src=x onerror=alert(1)>\"'`;${}</title>"
SECRET = "the-secret-outside"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with one good run, and a secret beside it."""
    root = tmp_path_factory.mktemp("viewed")
    (root / "secret.txt").write_text(SECRET)
    (root / "secret.json").write_text(json.dumps({"format": 1, "prompt": SECRET, "status": "done"}))
    write_run(root / "runs" / "run", grown(20), pictures=[3], best_png=True)
    return root


@pytest.fixture(scope="module")
def viewer(place):
    return view(place / "runs", Told())


@pytest.fixture(scope="module")
def real(place):
    with serving(place / "runs", Told()) as port:
        yield port


# Other sites ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "evil.example", f"evil.example:{PORT}", "127.0.0.1", "127.0.0.1:1", f"127.0.0.1.evil.example:{PORT}", f"localhost.evil.example:{PORT}", f"0.0.0.0:{PORT}",
        f"127.0.0.1:{PORT}@evil.example", f"[::]:{PORT}", f"127.0.0.1:{PORT}, evil.example", "", f"2130706433:{PORT}", f"127.1:{PORT}",
    ],
)  # fmt: skip
def test_other_names_of_this_server_are_refused(viewer, host):
    """DNS rebinding: a name of the attacker's that points here."""
    for path in ("/", "/api/runs", "/static/index.html", "/nothing"):
        answer = viewer.client.get(path, headers={"Host": host})
        assert answer.status_code == 421
        assert answer.json() == {"error": f"this server goes by other names; open {ORIGIN}/"}
    assert viewer.client.post("/api/runs/run/stop", json={}, headers=WRITES | {"Host": host, "Origin": f"http://{host or 'x'}"}).status_code == 421


@pytest.mark.parametrize("host", [f"127.0.0.1:{PORT}", f"localhost:{PORT}", f"LOCALHOST:{PORT}", f"[::1]:{PORT}"])
def test_the_names_of_loopback_are_answered(viewer, host):
    assert viewer.client.get("/api/runs", headers={"Host": host}).status_code == 200
    assert viewer.client.post("/api/runs/run/stop", json={}, headers={"X-Tsdiff-Token": TOKEN, "Host": host, "Origin": f"http://{host.lower()}"}).status_code == 202


def test_a_host_that_is_missing_or_there_twice_is_refused(real):
    good = f"Host: 127.0.0.1:{real}\r\n"
    assert send(real, f"GET /api/runs HTTP/1.1\r\n{good}\r\n".encode()).startswith(b"HTTP/1.1 200 ")
    for hosts in ("", "Host: evil.example\r\n" + good, good + "Host: evil.example\r\n", good + good):
        assert send(real, f"GET /api/runs HTTP/1.1\r\n{hosts}\r\n".encode()).startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 421 "))
    assert b" 421 " in send(real, b"GET /api/runs HTTP/1.0\r\n\r\n")
    assert b" 400 " in send(real, f"GET http://evil.example/api/runs HTTP/1.1\r\n{good}\r\n".encode())


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_pages_of_other_sites_can_neither_read_nor_write(viewer, site):
    headers = {"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    for path in ("/", "/api/runs", "/api/runs/run/tree", "/api/runs/run/image/3", "/static/index.html"):
        assert viewer.client.get(path, headers=headers).status_code == 403
    assert viewer.client.post("/api/runs/run/stop", json={}, headers=WRITES | {"Sec-Fetch-Site": site}).status_code == 403
    # Following a link to the page itself is fine; it is not shown in a frame.
    assert viewer.client.get("/", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    assert viewer.client.get("/api/runs", headers={"Sec-Fetch-Site": site, "Sec-Fetch-Mode": "navigate"}).status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", f"https://127.0.0.1:{PORT}", "http://127.0.0.1:1", "http://127.0.0.1", f"http://localhost:{PORT}", f"{ORIGIN}.evil.example", ""])
def test_other_origins_can_neither_read_nor_write(viewer, origin):
    told = viewer.client.post("/api/runs/run/stop", json={}, headers={"X-Tsdiff-Token": TOKEN, "Origin": origin})
    assert told.status_code == 403
    assert viewer.client.get("/api/runs", headers={"Origin": origin}).status_code == 403


def test_a_write_says_where_it_comes_from(viewer):
    assert viewer.client.post("/api/runs/run/stop", json={}, headers={"X-Tsdiff-Token": TOKEN}).status_code == 403
    assert viewer.client.post("/api/runs/run/stop", json={}, headers={"X-Tsdiff-Token": TOKEN, "Sec-Fetch-Site": "none"}).status_code == 403
    assert viewer.client.post("/api/runs/run/stop", json={}, headers={"X-Tsdiff-Token": TOKEN, "Sec-Fetch-Site": "same-origin"}).status_code == 202


@pytest.mark.parametrize("path", ["/api/runs/run/expand", "/api/runs/run/stop", "/api/answers", "/api/runs/nothing/stop"])
@pytest.mark.parametrize("token", [None, "", "x", TOKEN[:-1], TOKEN + "x", TOKEN.upper(), f"{TOKEN}, {TOKEN}", "é"])
def test_a_write_without_the_right_token_is_refused(viewer, path, token):
    headers = {"Origin": ORIGIN} | ({} if token is None else {"X-Tsdiff-Token": token.encode()})
    answer = viewer.client.post(path, json={"node": 1}, headers=headers)
    assert answer.status_code == 403
    assert TOKEN not in answer.text


def test_the_token_counts_in_its_header_only(viewer):
    for path, headers in (
        (f"/api/runs/run/stop?token={TOKEN}", {}), ("/api/runs/run/stop", {"Cookie": f"token={TOKEN}"}), ("/api/runs/run/stop", {"Authorization": f"Bearer {TOKEN}"}),
    ):  # fmt: skip
        assert viewer.client.post(path, json={}, headers={"Origin": ORIGIN, **headers}).status_code == 403


def test_nobody_is_ever_allowed_to_read_from_elsewhere(viewer):
    answer = viewer.client.options("/api/runs", headers={"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"})
    assert answer.status_code == 405
    for path in ("/", "/api/runs"):
        assert not [name for name in viewer.client.get(path).headers if name.startswith("access-control")]


# Headers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/static/index.html", "/static/nothing.js", "/api/runs", "/api/runs/run/tree", "/api/runs/run/image/3", "/api/runs/run/atlas/0", "/api/runs/x", "/%00"])
def test_every_answer_tells_browsers_to_be_careful(viewer, path):
    headers = viewer.client.get(path).headers
    policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cross-origin-resource-policy"] == "same-origin"
    assert headers["x-frame-options"] == "DENY"
    assert "server" not in headers


def test_refusals_have_the_headers_too(viewer):
    answer = viewer.client.get("/", headers={"Host": "evil.example"})
    assert answer.headers["content-security-policy"].startswith("default-src 'none'")
    assert answer.headers["content-type"] == "application/json"


def test_the_page_itself_has_no_inline_script_or_style():
    page = (app_module.STATIC / "index.html").read_text()
    assert not re.search(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\son\w+=|\sstyle=|javascript:|https?://", page.replace("http://www.w3.org/2000/svg", ""))


# Addresses that lead elsewhere ---------------------------------------------------------------------------------------

CLIMBS = [
    "..", "../secret.txt", "../../secret.txt", "..%2fsecret.txt", "%2e%2e%2fsecret.txt", "%2e%2e/secret.txt", "..%5csecret.txt", "....//secret.txt", "%252e%252e%252fsecret.txt",
    "..%00/secret.txt", "run/../../secret.txt", "run%2f..%2f..%2fsecret.txt", "/etc/passwd", "%2fetc%2fpasswd", "//etc/passwd", "file:///etc/passwd", "C:%5cWindows", "run%00", "~root", "",
    "%c0%ae%c0%ae%c0%afsecret.txt", "%uff0e%uff0e/secret.txt", "\uff0e\uff0e/secret.txt", ".", "%2e", "run%2f.", "run/.", "\\\\evil\\share",
]  # fmt: skip


@pytest.mark.parametrize("where", ["/static/{}", "/api/runs/{}", "/api/runs/{}/tree", "/api/runs/run/image/{}", "/api/runs/run/node/{}", "/api/runs/run/atlas/{}", "/{}", "/api/questions/{}/image"])
def test_no_address_leads_out_of_the_folder(real, where):
    for climb in CLIMBS:
        path = quote(where.format(climb), safe="/%:\\~+")
        answer = send(real, f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1:{real}\r\nConnection: close\r\n\r\n".encode())
        assert int(answer.split(b" ", 2)[1]) in ((200,) if path == "/" else (400, 404)), path
        for harm in (SECRET.encode(), b"root:", b"Traceback"):
            assert harm not in answer, path


@given(st.text(st.sampled_from("./\\%~:;aru2fFeEnc0 \x00\n\té\ud7ff?#&+="), max_size=30))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_address_is_too_strange(viewer, text):
    for path in (f"/static/{quote(text, safe='/%')}", f"/api/runs/{quote(text, safe='%')}/tree", f"/{quote(text, safe='/%')}"):
        if path == "/" or path.startswith("//"):
            continue
        answer = viewer.client.get(path)
        assert answer.status_code in (200, 400, 404)
        if answer.status_code != 200:
            assert len(strict(answer.content)["error"].splitlines()) == 1
    assert not viewer.went_wrong


@pytest.mark.parametrize("name", ["run.json", "tree.json", "journal.jsonl", "previews.pack", "best.png", "index.json", "lock", "baseline.json"])
def test_a_file_that_leads_out_of_its_run_is_not_read(tmp_path, name):
    outside = tmp_path / "outside"
    write_run(outside, [*grown(10), node(10, 0, STEPS, score=5.0)], prompt=SECRET, pictures=[1], best_png=True)
    (outside / "journal.jsonl").write_text(SECRET)
    for file in ("index.json", "lock", "baseline.json"):
        (outside / file).write_text(SECRET)
    folder = write_run(tmp_path / "runs" / "run", [*grown(10), node(10, 0, STEPS, score=5.0)], best_png=True)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(os.path.relpath(outside / name, folder))
    viewer = view(tmp_path / "runs")
    (run,) = viewer.get("/api/runs")["runs"]
    assert run["status"] == "unreadable"
    assert run["damage"] == [f"{name} leads out of the run's folder, so it is not read"]
    for path in ("", "/tree", "/node/1", "/image/10", "/image/1", "/image/baseline", "/atlas/0", "/curve"):
        answer = viewer.client.get(f"/api/runs/run{path}")
        assert answer.status_code == 404
        assert SECRET not in answer.text
    assert viewer.went_wrong == []


def test_a_link_that_stays_in_its_run_is_followed(tmp_path):
    folder = write_run(tmp_path / "run", grown(10))
    (folder / "tree.json").rename(folder / "real.json")
    (folder / "tree.json").symlink_to("real.json")
    assert len(view(tmp_path).get("/api/runs/run/tree")["nodes"]) == 10


def test_a_link_that_comes_while_a_run_is_viewed_is_not_followed(tmp_path):
    (tmp_path / "secret.json").write_text(SECRET)
    folder = write_run(tmp_path / "runs" / "run", grown(10))
    viewer = view(tmp_path / "runs")
    viewer.get("/api/runs/run/tree")
    (folder / "best.png").symlink_to(tmp_path / "secret.json")
    assert "leads out" in viewer.get("/api/runs/run/tree", 404)["error"]


def test_folders_that_lead_elsewhere_are_no_runs(tmp_path):
    write_run(tmp_path / "outside" / "run", grown(10), prompt=SECRET)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "outside", target_is_directory=True)
    (tmp_path / "runs" / "run").symlink_to(tmp_path / "outside" / "run", target_is_directory=True)
    viewer = view(tmp_path / "runs")
    assert viewer.get("/api/runs")["runs"] == []
    for name in ("link", "run", "link%2Frun"):
        viewer.get(f"/api/runs/{name}/tree", 404)


@pytest.mark.parametrize("name", ["latents", "rescored"])
def test_folders_of_a_run_that_lead_out_are_not_read(tmp_path, name):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "x.json").write_text(SECRET)
    folder = write_run(tmp_path / "runs" / "run", grown(10))
    (folder / name).symlink_to(tmp_path / "outside", target_is_directory=True)
    assert "leads out" in view(tmp_path / "runs").get("/api/runs/run/tree", 404)["error"]


def test_a_rescored_file_that_leads_out_is_not_read(tmp_path):
    (tmp_path / "x.json").write_text(SECRET)
    folder = write_run(tmp_path / "runs" / "run", grown(10))
    (folder / "rescored").mkdir()
    (folder / "rescored" / "x.json").symlink_to(tmp_path / "x.json")
    viewer = view(tmp_path / "runs")
    assert len(viewer.get("/api/runs/run/tree")["nodes"]) == 10
    assert viewer.get("/api/runs/run")["damage"] == ["x.json leads out of the run's folder, so it is not read"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in this file system")
@pytest.mark.parametrize("name", ["run.json", "tree.json", "lock", "previews.pack", "best.png"])
def test_a_pipe_in_place_of_a_file_holds_up_nobody(tmp_path, name):
    folder = write_run(tmp_path / "run", grown(10), best_png=True)
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    viewer = view(tmp_path)
    assert viewer.get("/api/runs")["runs"][0]["damage"] == [f"{name} is no ordinary file, so it is not read"]
    viewer.get("/api/runs/run/tree", 404)


# Requests that are too large, too slow or no requests ----------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 100 + b"\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"GET / HTTP/1.1\r\nHost 127.0.0.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n folded: yes\r\nContent-Length: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\r\n\r\n\r\n\r\nx\r\n\r\n", "GET /ä HTTP/1.1\r\n\r\n".encode(),
        b"GET /" + b"a" * 70000, b"GET / HTTP/1.1\r\nX: " + b"a" * 70000, b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 12000 + b"\r\n",
        b"POST /api/answers HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", b"POST /api/answers HTTP/1.1\r\nContent-Length: -5\r\n\r\nhello",
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_and_the_server_goes_on(real, data):
    answer = send(real, data)
    assert answer == b"" or re.match(rb"HTTP/1.1 4\d\d ", answer)
    assert b"Traceback" not in answer
    assert ask(real, "/api/runs")[0] == 200


def test_requests_have_bounds(real):
    port = {"Host": f"127.0.0.1:{real}"}
    assert ask(real, "/api/runs", headers=port | {"X": "a" * 20_000})[0] in (400, 413)
    assert ask(real, "/api/runs?" + "a" * 9000)[0] == 413
    assert ask(real, "/api/runs/" + "a" * 7000)[0] == 404
    assert ask(real, "/api/runs", body=b"x" * 10)[0] == 400
    for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "FOO"):
        assert ask(real, "/api/runs", method=method)[0] in (400, 405)
    assert ask(real, "/api/runs", method="HEAD")[0] == 200
    writes = {"X-Tsdiff-Token": TOKEN, "Origin": f"http://127.0.0.1:{real}", "Content-Type": "application/json"}
    assert ask(real, "/api/runs", method="POST", body=b"{}", headers=writes)[0] == 405
    assert ask(real, "/api/runs/run/stop", headers=writes)[0] == 405
    assert ask(real, "/api/runs/run/stop", method="POST", body=b" " * 70_000 + b"{}", headers=writes)[0] == 413
    assert ask(real, "/api/runs/run/stop", method="POST", body=b" " * 60_000 + b"{}", headers=writes)[0] == 202


def test_a_body_without_an_end_is_cut_off(real, monkeypatch):
    start = f"POST /api/runs/run/stop HTTP/1.1\r\nHost: 127.0.0.1:{real}\r\nOrigin: http://127.0.0.1:{real}\r\nX-Tsdiff-Token: {TOKEN}\r\nContent-Type: application/json\r\n"
    chunk = b"2710\r\n" + b" " * 10_000 + b"\r\n"
    assert b" 413 " in send(real, start.encode() + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 8)
    assert b" 413 " in send(real, start.encode() + b"Content-Length: 999999999999\r\n\r\n{}")
    monkeypatch.setattr(app_module, "BODY_SECONDS", 0.2)
    began = time.monotonic()
    assert b" 400 " in send(real, start.encode() + b"Content-Length: 10\r\n\r\n{")
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"nul", b"NaN", b'{"node": NaN}', b'{"node": Infinity}', b"\xff\xfe", b'"\\ud800"', b"[" * 30_000, b'{"node":' * 6000, b"1" * 5000, b'{"node": 1e999}',
        b"[]", b"3", b"null", b"true", b"\xef\xbb\xbf{}", b"{} {}",
    ],
)  # fmt: skip
def test_a_body_that_is_no_json_object_is_refused(viewer, body):
    answer = viewer.client.post("/api/runs/run/expand", content=body, headers=WRITES | {"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert len(strict(answer.content)["error"].splitlines()) == 1
    assert not viewer.went_wrong


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "text/json"])
def test_forms_of_other_pages_are_no_json(viewer, kind):
    assert viewer.client.post("/api/runs/run/stop", content=b"{}", headers=WRITES | {"Content-Type": kind}).status_code == 400


def test_many_connections_that_say_nothing_hold_up_nobody_for_long(real):
    idle = [socket.create_connection(("127.0.0.1", real)) for _ in range(30)]
    try:
        assert ask(real, "/api/runs")[0] == 200
    finally:
        for one in idle:
            one.close()


# Run folders made to do harm -----------------------------------------------------------------------------------------


def test_script_in_any_text_stays_text(tmp_path):
    """Prompt, label, plug-in name, reason, damage: JSON with the type of JSON, exactly as it was."""
    nodes = [node(0, None, 0, kind="draw", note={"label": SCRIPT, SCRIPT: SCRIPT}), node(1, 0, STEPS, status="failed", reason=SCRIPT), node(2, 0, STEPS)]
    nodes[2]["values"] = {SCRIPT: {"score": 1.0, "parts": {SCRIPT: 2.0}}, VERIFIER: {"score": None, "reason": SCRIPT}}
    folder = write_run(tmp_path / "run", nodes, prompt=SCRIPT)
    about = json.loads((folder / "run.json").read_text())
    about["options"] |= {"policy": {"name": SCRIPT, SCRIPT: SCRIPT}, "model": SCRIPT, "verifiers": [SCRIPT]}
    (folder / "run.json").write_text(json.dumps(about))
    viewer = view(tmp_path)
    found = viewer.get("/api/runs/run")
    assert (found["prompt"], found["model"], found["policy"]["name"]) == (SCRIPT, SCRIPT, SCRIPT)
    assert SCRIPT in found["verifiers"]
    assert viewer.get("/api/runs/run/node/0")["label"] == SCRIPT
    assert viewer.get("/api/runs/run/node/2")["scores"][SCRIPT]["parts"] == {SCRIPT: 2.0}
    assert viewer.get("/api/runs/run/tree")["nodes"][1]["f"] == SCRIPT
    for path in ("/api/runs", "/api/runs/run", "/api/runs/run/tree", "/api/runs/run/node/0", f"/api/runs/{quote(SCRIPT, safe='')}"):
        answer = viewer.client.get(path)
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["x-content-type-options"] == "nosniff"


def test_a_pasted_command_does_nothing_else(tmp_path):
    harm = "a cat'; touch harm; echo '$(touch harm)`touch harm`\n touch harm\n\x1b[2J"
    write_run(tmp_path / "run", grown(5), prompt=harm)
    command = view(tmp_path).get("/api/runs/run")["commands"]["search"]
    assert command.isprintable()
    words = subprocess.run(["bash", "-c", f"tsdiff() {{ printf '%s\\0' \"$@\"; }}; {command}"], capture_output=True, check=True, cwd=tmp_path).stdout.decode().split("\0")
    assert words[:2] == ["search", harm]
    assert not (tmp_path / "harm").exists()


def test_images_are_passed_on_as_images_whatever_they_hold(tmp_path):
    folder = write_run(tmp_path / "run", [node(0, None, 0, kind="draw"), node(1, 0, STEPS, score=1.0)])
    info = PngInfo()
    info.add_text("parameters", SCRIPT)
    info.add_text("tsdiff", SCRIPT)
    Image.new("RGB", (8, 8)).save(folder / "best.png", pnginfo=info)
    viewer = view(tmp_path)
    answer = viewer.client.get("/api/runs/run/image/1")
    assert (answer.status_code, answer.headers["content-type"], answer.headers["x-content-type-options"]) == (200, "image/png", "nosniff")
    for data in (b"<!doctype html>" + SCRIPT.encode(), b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", b"GIF89a/*" + SCRIPT.encode(), b"", b"%PDF-1.4", b"%!PS-Adobe"):
        (folder / "best.png").write_bytes(data)
        assert viewer.get("/api/runs/run/image/1", 404)["error"] == "this file is no PNG, JPEG or WebP picture"


@pytest.mark.parametrize("picture", [b"", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b"RIFF\xff\xff\xff\xffWEBPVP8L", b"\xff\xd8\xff" + b"\0" * 50, b"P6 60000 60000 255\n"])
def test_previews_that_are_no_pictures_are_left_blank(tmp_path, picture):
    nodes = grown(10)
    folder = write_run(tmp_path / "run", nodes)
    file = PreviewFile(folder / PREVIEWS, QUICK)
    file.append({"tree": "search", "node": 1, "id": nodes[1]["id"], "media_type": "image/webp", "width": 1 << 40, "height": -1}, picture)
    file.close()
    add_pictures(folder, [(2, nodes[2]["id"])])
    viewer = view(tmp_path)
    assert [one["th"] for one in viewer.get("/api/runs/run/tree")["nodes"][:3]] == [None, 0, 1]
    assert viewer.client.get("/api/runs/run/atlas/0").status_code == 200
    answer = viewer.client.get("/api/runs/run/image/1")
    assert answer.status_code in (200, 404)
    assert answer.headers["content-type"] in ("image/webp", "image/jpeg", "application/json")
    assert viewer.went_wrong == []


def test_a_preview_of_too_many_pixels_is_not_unpacked(tmp_path):
    """A bomb: a few kilobytes that would be 400 MB."""
    nodes = grown(10)
    folder = write_run(tmp_path / "run", nodes)
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((4000, 4000), dtype=np.uint8)).save(buffer, "JPEG", quality=1)
    file = PreviewFile(folder / PREVIEWS, QUICK)
    file.append({"tree": "search", "node": 1, "id": nodes[1]["id"], "media_type": "image/jpeg", "width": 32, "height": 32}, buffer.getvalue())
    file.close()
    viewer = view(tmp_path)
    page = viewer.client.get("/api/runs/run/atlas/0")
    with Image.open(io.BytesIO(page.content)) as image:
        assert image.convert("RGBA").getextrema()[3] == (0, 0)


def every_document(viewer, nodes=2):
    """Ask for everything; whatever comes is strict JSON or one line that says why not."""
    runs = viewer.get("/api/runs")["runs"]
    for run in runs:
        name = quote(run["id"], safe="")
        for part in ("", "/tree", "/tree?since=x", *(f"/node/{i}" for i in range(nodes)), "/curve", "/commands", "/image/0", "/image/baseline", "/atlas/0"):
            answer = viewer.client.get(f"/api/runs/{name}{part}")
            assert answer.status_code in (200, 404), (part, answer.text[:300])
            if answer.headers["content-type"] == "application/json":
                found = strict(answer.content)
                if answer.status_code == 404:
                    assert found.keys() == {"error"}
                    assert found["error"]
                    assert len(found["error"].splitlines()) == 1
                    assert "Traceback" not in found["error"]
    assert viewer.went_wrong == []
    return runs


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", "3", '"x"', "NaN", '{"format": NaN}', '{"format": 1, "seed": Infinity}', "[" * 100_000, '{"format": 1, "a":' * 3000, "\ud7ff", "\x00" * 100, '{"format": 1e5}',
        '{"format": 99}', '{"format": 1}', '{"format": 1, "status": ["done"]}', '{"format": 1, "status": "done", "result": 3, "options": [], "tree": "x", "drivers": {}}',
        '{"format": 1, "status": "done", "prompt": {"a": 1}, "seed": "x", "options": {"policy": 3, "model": [1], "verifiers": 5, "cost": [], "environment": 3}}',
        '{"format": 1, "status": "done", "seed": ' + "9" * 4000 + "}", '{"format": 1, "status": "done", "seed": ' + "9" * 5000 + "}",
        '{"format": 1, "status": "running", "tree": {"schedule": {"kind": "x", "key": "y", "timesteps": ["nan"], "alpha": ["nan", 1], "sigma": [1e400, "-inf"]}}, "options": {"steps": 999999999999}}',
        '{"format": 1, "status": "done", "result": {"node": 1e9, "score": {"$float": "nan"}, "nfe": -1, "nodes": "x", "verifier_calls": {"a": "b"}, "seconds": {"$float": "inf"}, "image": 3}}',
        '{"format": 1, "status": "done", "prompt": {"$text": "eda080"}, "arguments": {"nfe": {"$float": "nan"}, "x": [[[[]]]]}, "result": {"truncated": [1], "verifier": 3}, "drivers": [1, "x", [], {}]}',
    ],
    ids=range(24),
)  # fmt: skip
@pytest.mark.parametrize("tree", [True, False])
def test_a_run_json_that_makes_no_sense_is_told_and_the_rest_is_shown(tmp_path, text, tree):
    folder = write_run(tmp_path / "bad", [*grown(10), node(10, 0, STEPS, score=5.0)])
    (folder / "run.json").write_text(text)
    if not tree:
        (folder / "tree.json").unlink()
    write_run(tmp_path / "good", grown(10))
    runs = every_document(view(tmp_path))
    assert [run["id"] for run in runs] == ["bad", "good"]
    assert runs[1]["status"] == "done"


def test_files_larger_than_any_run_has_are_not_read(tmp_path):
    folder = write_run(tmp_path / "run", grown(10))
    with (folder / "run.json").open("r+b") as file:
        file.truncate(40 << 30)  # sparse: it takes no space
    viewer = view(tmp_path)
    began = time.monotonic()
    (run,) = viewer.get("/api/runs")["runs"]
    assert run["damage"][0].startswith("run.json has 42,949,672,960 bytes")
    assert viewer.get("/api/runs/run/tree", 404)["error"] == run["damage"][0]
    assert time.monotonic() - began < 5


JUNK = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.just(10**400), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=8), st.just({"$float": "nan"}), st.just({"$text": "eda080"}),
        st.sampled_from(["done", "running", "search", SCRIPT, "draw", 0, 1, -1, 1 << 70, "\ud800"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=4), st.sampled_from(["name", "score", "node", "$x"])), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip


def replaced(data, draw, junk):
    """The same JSON with junk in one place, at any depth."""
    if not isinstance(data, (dict, list)) or not data or draw(st.integers(0, 3)) == 0:
        return junk
    copy = data.copy()
    key = draw(st.sampled_from(sorted(copy))) if isinstance(copy, dict) else draw(st.integers(0, len(copy) - 1))
    copy[key] = replaced(copy[key], draw, junk)
    return copy


@given(st.data(), JUNK, st.sampled_from(["run.json", "tree.json"]))
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_junk_anywhere_in_a_file_breaks_nothing(tmp_path_factory, data, junk, name):
    root = tmp_path_factory.mktemp("junk")
    folder = write_run(root / "run", [node(0, None, 0, kind="draw"), node(1, 0, STEPS, score=5.0, note={"label": "x"})])
    about = json.loads((folder / name).read_text())
    spoiled = replaced(about, data.draw, junk)
    (folder / name).write_text(json.dumps({"format": 1} | spoiled if isinstance(spoiled, dict) else spoiled))
    every_document(view(root))
    shutil.rmtree(root)


@given(st.data(), JUNK)
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_junk_in_a_journal_breaks_nothing(tmp_path_factory, data, junk):
    root = tmp_path_factory.mktemp("junk")
    run = Going(root / "run")
    run.add(node(0, None, 0, kind="draw"))
    record = {
        "tree": "search", "request": {"kind": "Denoise"}, "price": 1, "nodes": [node(1, 0, STEPS) | {"values": {}}], "notes": [], "engine": {}, "segments": [0, 0],
        "effects": [{"effect": "valued", "node": 1, "key": VERIFIER, "value": {"score": 1.0}}], "ledger": {"nfe": 2, "rows": 2, "encodes": 0, "decodes": 0, "verifier_calls": {}},
    }  # fmt: skip
    viewer = view(root)
    viewer.get("/api/runs/run/tree")
    try:
        spoiled = decode(json.dumps(replaced(record, data.draw, junk)).encode())
        run.journal.commit([spoiled])
    except ValueError:  # what no writer could have written
        pass
    every_document(viewer)
    run.close()
    every_document(view(root))
    shutil.rmtree(root)


def test_scores_too_large_for_a_float_are_damage(tmp_path):
    """An integer of 400 digits is JSON; it is no score. The journal still has the tree."""
    nodes = [node(0, None, 0, kind="draw"), node(1, 0, STEPS, score=2.0)]
    run = Going(tmp_path / "run")
    run.add(*nodes)
    run.close()
    write_run(tmp_path / "run", [nodes[0], node(1, 0, STEPS, score=10**400)])
    viewer = view(tmp_path)
    assert [one["s"] for one in viewer.get("/api/runs/run/tree")["nodes"]] == [{}, {VERIFIER: 2.0}]
    assert "OverflowError" in viewer.get("/api/runs/run")["damage"][0]
