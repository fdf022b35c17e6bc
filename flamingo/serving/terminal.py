"""`flamingo chat`: lines in, answers out. A terminal gets a prompt, streaming and history; a pipe
gets answers only."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from flamingo.serving.chat import Chat
from flamingo.serving.drawing import as_picture, as_seen, in_characters
from flamingo.serving.settings import changed, parsed, unknown

ASK = "> "
HISTORY = 1000  # lines that are kept from chat to chat

HELP = """\
/image PATH ...     pictures of the next question; a path with blanks as it stands, or in quotes
/images             the pictures that wait, and those of earlier questions
/look [FILE.png]    where the words of the last answer looked: here, or in a picture
/set [NAME=VALUE]   how answers are drawn, e.g. temperature=0.7 seed=1; alone, all settings
/undo               take the last question back; its pictures wait again
/new                forget all turns and pictures
/help               this
/quit               leave, as Ctrl-D does
Anything else is a question; one that begins with / is written with //. Ctrl-C ends an answer."""


class Terminal:
    """A chat and where it is said: `say` for answers, `tell` for all else."""

    def __init__(self, chat: Chat, interactive: bool) -> None:
        self.chat, self.interactive = chat, interactive
        self.commands: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/images": self._images,
            "/look": self._look,
            "/set": self._set,
            "/undo": self._undo,
            "/new": self._new,
            "/help": lambda rest: self.tell(HELP),
            "/quit": self._quit,
        }

    def say(self, text: str, end: str = "\n") -> None:
        print(text, end=end, flush=True)

    def tell(self, text: str) -> None:
        if self.interactive:
            print(text, flush=True)

    def take(self, line: str) -> None:
        """One line. Raises ValueError for what cannot be done, EOFError to leave."""
        line = line.strip()
        if not line:
            return
        if line.startswith("//"):
            self._ask(line[1:])
        elif line.startswith("/"):
            name, _, rest = line.partition(" ")
            if name not in self.commands:
                raise ValueError(unknown(name, self.commands, "command") + " (/help tells all)")
            self.commands[name](rest.strip())
        else:
            self._ask(line)

    # -- what lines ask for ----------------------------------------------------------------

    def _ask(self, question: str) -> None:
        before, printed = self.chat.forgotten, ""
        answers = self.chat.ask(question)
        try:
            for answer in answers:
                if self.chat.forgotten > before:
                    self.tell(
                        f"(the {self.chat.forgotten} oldest questions no longer fit: they are left out)"
                    )
                    before = self.chat.forgotten
                if self.interactive and answer.text.startswith(printed):
                    self.say(answer.text[len(printed) :], end="")
                    printed = answer.text
        except KeyboardInterrupt:
            if not self.interactive:
                raise
            self.say(" (ended)")
            return
        finally:
            answers.close()  # type: ignore[attr-defined]
        if not self.interactive:
            self.say(" ".join(self.chat.turns[-1].answer.text.split()))
        elif self.chat.turns[-1].answer.text != printed:  # what was printed changed as it grew
            self.say("\n" + self.chat.turns[-1].answer.text)
        else:
            self.say("")

    def _image(self, rest: str) -> None:
        if not rest:
            raise ValueError("/image: name a file")
        self.chat.add(paths(rest))
        self.tell(f"{len(self.chat.waiting)} for the next question")

    def _images(self, rest: str) -> None:
        for number, turn in enumerate(self.chat.turns[self.chat.forgotten :], self.chat.forgotten + 1):
            for each in turn.shown:
                self.tell(f"question {number}: {each.name}")
        for each in self.chat.waiting:
            self.tell(f"waits: {each.name}")
        if not self.chat.waiting and not any(turn.shown for turn in self.chat.turns):
            self.tell("no pictures: add one with /image PATH")

    def _look(self, rest: str) -> None:
        words, turn = self.chat.looks(), self.chat.turns[-1]
        if not rest:
            names = [each.name for each in turn.seen]
            self.say(in_characters(words, names, shutil.get_terminal_size().columns))
            return
        (path,) = paths(rest) if len(paths(rest)) == 1 else (Path(rest),)
        if path.suffix.lower() != ".png":
            raise ValueError(f"/look {path}: name a .png to write")
        processor = self.chat.engine.processor.image_processor
        pixels = processor([each.picture for each in turn.seen])["pixel_values"]
        as_picture(words, as_seen(pixels, processor.image_mean, processor.image_std), path)
        self.tell(f"{path}")

    def _set(self, rest: str) -> None:
        if rest:
            self.chat.sampling = changed(self.chat.sampling, parsed(rest))
        self.tell(" ".join(f"{name}={value}" for name, value in asdict(self.chat.sampling).items()))

    def _undo(self, rest: str) -> None:
        turn = self.chat.undo()
        self.tell("nothing to take back" if turn is None else f"taken back: {turn.question}")

    def _new(self, rest: str) -> None:
        self.chat.clear()
        self.tell("a new chat")

    def _quit(self, rest: str) -> None:
        raise EOFError


def paths(text: str) -> list[Path]:
    """Files as people write them: one that is there as it stands, blanks and all; else words, quoted
    and escaped as in a shell. Raises ValueError for a quote that is not closed."""
    whole = Path(text).expanduser()
    if whole.is_file():
        return [whole]
    try:
        return [Path(word).expanduser() for word in shlex.split(text)]
    except ValueError as error:
        raise ValueError(f"{text!r}: {error}") from None


def talk(chat: Chat, images: list[Path]) -> int:
    """Until the end of the lines; the exit status. In a pipe the first mistake ends it, with 1: what
    would follow is an answer to something else."""
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    terminal = Terminal(chat, interactive)
    chat.add(images)
    if not interactive:
        for number, line in enumerate(sys.stdin, 1):
            try:
                terminal.take(line)
            except EOFError:
                break
            except (ValueError, OSError) as error:
                print(f"error: line {number}: {error}", file=sys.stderr, flush=True)
                return 1
        return 0
    terminal.tell("Ask about pictures: /image PATH, then a question. /help tells all, Ctrl-D leaves.")
    with _history():
        while True:
            try:
                terminal.take(input(ASK))
            except EOFError:
                print()
                return 0
            except KeyboardInterrupt:
                print("  (Ctrl-D leaves)")
            except (ValueError, OSError) as error:
                print(f"error: {error}", flush=True)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Lines of earlier chats under the arrow keys, where the machine has readline."""
    try:
        import readline
    except ImportError:
        yield
        return
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    file = Path(state) / "flamingo" / "chat_history"
    readline.set_history_length(HISTORY)
    with contextlib.suppress(OSError):
        readline.read_history_file(file)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            readline.write_history_file(file)
