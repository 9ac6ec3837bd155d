"""A conversation about pictures in the terminal: they are shown where it can show them, and always named by their file.

Inline pictures: the kitty graphics protocol (https://sw.kovidgoyal.net/kitty/graphics-protocol) and iTerm2's inline
images (https://iterm2.com/documentation-images.html). Which of them a terminal speaks is read from the environment,
because asking the terminal would mix its reply with what a person types.
"""

from __future__ import annotations

import base64
import math
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from tsdiff.treesearch.errors import UsageError

Protocol = Literal["kitty", "iterm", "none"]

ROWS = 18
"""Height of a picture, in lines of text."""

CHUNK = 4096
"""Characters that one escape code of the kitty protocol holds at most."""

SKIP, QUIT = "skip", "quit"


def require_terminal(who: str) -> tuple[int, int]:
    """File descriptors of the terminal at stdin: to read what is typed, and to write.

    Raises:
      UsageError: if nobody can answer there.
    """
    try:
        typed = sys.stdin.fileno()
        answers = os.name == "posix" and os.isatty(typed)
    except (AttributeError, OSError, ValueError):  # no stdin, one that is no file, or one that was closed
        answers = False
    if not answers:
        raise UsageError(f"verifier {who} asks a person in the terminal, but standard input is not one; start it from a terminal, without redirected input, or name another verifier")
    # The terminal's own descriptor is writable unless it was opened as `< /dev/tty`; then the others may lead there.
    import fcntl

    for descriptor in (typed, 2, 1):
        try:
            if os.isatty(descriptor) and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY:
                return typed, descriptor
        except OSError:  # closed
            continue
    raise UsageError(f"verifier {who} asks a person in the terminal, but the terminal cannot be written to; leave standard input as it is")


def inline_protocol(environment: Mapping[str, str]) -> Protocol:
    """How the terminal shows pictures; "none" for one that does not, and inside tmux and screen, which swallow them."""
    term, program = environment.get("TERM", ""), environment.get("TERM_PROGRAM", "")
    if environment.get("TMUX") or term.startswith(("screen", "tmux")):
        return "none"
    if term in ("xterm-kitty", "xterm-ghostty") or environment.get("KITTY_WINDOW_ID") or program == "ghostty":
        return "kitty"
    if program in ("iTerm.app", "WezTerm", "mintty") or environment.get("LC_TERMINAL") == "iTerm2":
        return "iterm"
    return "none"


def inline(png: bytes, protocol: Protocol) -> str:
    """What shows a PNG file in the terminal, `ROWS` lines high; "" where it cannot."""
    text = base64.standard_b64encode(png).decode("ascii")
    if protocol == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(png)};height={ROWS};preserveAspectRatio=1:{text}\x07\n"
    return f"{''.join(_kitty(text))}\n" if protocol == "kitty" else ""


def _kitty(text: str) -> Iterator[str]:
    for start in range(0, len(text), CHUNK):
        more = int(start + CHUNK < len(text))
        # q=2: the terminal must not reply, its reply would be read as an answer.
        keys = f"a=T,f=100,r={ROWS},q=2,m={more}" if start == 0 else f"q=2,m={more}"
        yield f"\x1b_G{keys};{text[start : start + CHUNK]}\x1b\\"


def printable(text: str, limit: int = 500) -> str:
    """Text as one line without control characters, so that no prompt can steer the terminal."""
    line = " ".join("".join(character if character.isprintable() else " " for character in text).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


@dataclass
class Dialogue:
    """A person at a terminal.

    Args:
      typed, shown: file descriptors to read from and to write to.
      low, high: the range of scores.
    """

    typed: int
    shown: int
    low: float
    high: float

    def ask(self, introduction: str, waiting: int) -> float | Literal["skip", "quit"]:
        """Ask until there is an answer: a score, or one of the two words. The end of input means "quit".

        Args:
          introduction: what is shown first.
          waiting: how many more pictures wait for their score.
        """
        self._forget()
        self.say(introduction)
        more = f", {waiting} more wait" if waiting else ""
        while True:
            self.say(f"score from {self.low:g} to {self.high:g} (s skip, q quit, ? help{more}): ")
            line = self._line()
            if line is None or line.lower() in ("q", QUIT):
                return "quit"
            if line.lower() in ("s", SKIP):
                return "skip"
            if line in ("?", "h", "help"):
                self.say(
                    f"  a number from {self.low:g} to {self.high:g}: how good the picture is, higher is better; fractions count\n"
                    "  s: no score for this picture\n  q: no score for this one and all that follow; the search goes on without\n"
                    "  Ctrl-C: stop the search\n"
                )
                continue
            score = self._number(line)
            if score is not None:
                return score
            self.say(f"  {printable(line, 40)!r} is neither a number from {self.low:g} to {self.high:g} nor one of s, q, ?\n" if line else "  nothing was typed; s skips the picture\n")

    def say(self, text: str) -> None:
        """Write to the terminal."""
        data = text.encode("utf-8", "replace")
        while data:
            data = data[os.write(self.shown, data) :]

    def _number(self, line: str) -> float | None:
        try:
            score = float(line)
        except ValueError:
            return None
        return score if math.isfinite(score) and self.low <= score <= self.high else None

    def _line(self) -> str | None:
        """The next line typed, None at the end of input."""
        line = b""
        while not line.endswith(b"\n"):
            # Not through sys.stdin: a thread that waits inside its buffer would keep the interpreter from ending.
            piece = os.read(self.typed, 4096)
            if not piece:
                return None
            line += piece
        return line.decode("utf-8", "replace").strip()

    def _forget(self) -> None:
        """Drop what was typed before the question was there to be read."""
        import termios

        termios.tcflush(self.typed, termios.TCIFLUSH)
