"""`tsdiff view`: saved runs in the browser."""

from __future__ import annotations

from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import click

from tsdiff.cli.app import INTERRUPTED
from tsdiff.cli.options import Sectioned, SectionedOption, debug_option
from tsdiff.cli.output import say
from tsdiff.treesearch.errors import SetupError

_NEEDED = ("starlette", "uvicorn")


@click.command("view", cls=Sectioned)
@click.argument("folder", metavar="RUN|FOLDER", type=click.Path(path_type=Path), default=Path("runs"), required=False)
@click.option("--port", cls=SectionedOption, section="The server", type=click.IntRange(0, 65535), default=0, metavar="N", help="The port of 127.0.0.1 to serve on.  [default: a free one]")
@click.option("--open/--no-open", "opens", cls=SectionedOption, section="The server", default=True, help="Only print the address, do not open a browser.")
@debug_option
def command(folder: Path, port: int, opens: bool) -> int:
    """Look at saved runs in the browser, and steer them.

    \b
    Try:
      tsdiff view
      tsdiff view runs/run-0001

    RUN is the folder of a run, whatever state it is in; FOLDER holds several, `runs` by default. One that goes on is
    followed live. The page is served to this machine only, loads nothing from any network, and ends with Ctrl-C.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise SetupError(f"`tsdiff view` needs {' and '.join(missing)}, which {'are' if len(missing) > 1 else 'is'} not installed; run: pip install 'tsdiff[viewer]'")
    from tsdiff.cli.steering import RunSteering
    from tsdiff.viewer.app import make_app
    from tsdiff.viewer.folders import Folders
    from tsdiff.viewer.library import Library
    from tsdiff.viewer.server import address, listen, new_token, serve

    library = Library(Folders(folder))
    token = new_token()
    with listen(port) as opened, closing(RunSteering(lambda: library.folders.all().values())) as steering:
        where = address(opened, token)
        app = make_app(library, port=opened.getsockname()[1], token=token, steering=steering, tell=lambda text: say("warning", text))

        def ready() -> None:
            click.echo(where)
            say("", f"showing {library.folders.root}; Ctrl-C ends it")
            if opens:
                _open(where)

        stopped_by = serve(app, opened, ready=ready)
    return 0 if stopped_by in (None, 2) else INTERRUPTED


def _open(where: str) -> None:
    """Open a browser; where there is none, the address is there to be copied."""
    import webbrowser

    try:
        shown = webbrowser.open(where)
    except webbrowser.Error:
        shown = False
    if not shown:
        say("", "no browser could be opened; copy the address")
