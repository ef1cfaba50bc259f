"""`luthier chat RUN`: talk with a tuned model, and with its base beside it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Annotated, Any, Protocol

import typer
from rich.console import Console
from rich.text import Text

from luthier.cli.console import err, out, quiet_libraries
from luthier.errors import RunError, nearest
from luthier.imports import importing

HELP = "/base: the base's reply beside the tuned one, on or off   /reset: forget the conversation   /quit"
COMMANDS = ("/base", "/reset", "/quit", "/help")


class Session(Protocol):
    """What a conversation needs of a loaded model; `luthier.worker.chat.open_chat` gives one."""

    @property
    def has_adapter(self) -> bool:
        """Whether there is a tuned model besides the base."""

    def reply(
        self,
        messages: list[dict[str, Any]],
        *,
        base: bool = False,
        temperature: float = 0.0,
        seed: int | None = None,
        max_new_tokens: int | None = None,
    ) -> Iterator[str]:
        """Stream the reply to a conversation as pieces of text; from the base alone if `base`."""


@dataclass
class Conversation:
    """The loop behind `luthier chat`: lines in, replies out.

    Attributes:
        session: The loaded model.
        console: Where replies go.
        options: Keyword arguments for every `Session.reply`.
        system: A system turn that every conversation begins with.
        compare: Let the base reply too, ahead of the tuned model. Its replies are not remembered.
    """

    session: Session
    console: Console
    options: dict[str, Any]
    system: str | None = None
    compare: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    def run(self, read_line: Callable[[], str]) -> None:
        """Answer lines until `/quit` or the end of the input (EOFError)."""
        self.reset()
        while True:
            try:
                line = read_line().strip()
            except EOFError:
                return
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.ask(line)

    def reset(self) -> None:
        """Forget everything but the system turn."""
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def command(self, line: str) -> None:
        """Do what a line that begins with a slash says."""
        if line == "/reset":
            self.reset()
            self._say("The conversation is forgotten.")
        elif line == "/base" and not self.session.has_adapter:
            self._say("This is the base itself; there is no tuned model to compare with.")
        elif line == "/base":
            self.compare = not self.compare
            self._say("The base replies too." if self.compare else "The tuned model replies alone.")
        elif line == "/help":
            self._say(HELP)
        else:
            self._say(f"{line} is not known{nearest(line, COMMANDS)}. {HELP}")

    def ask(self, text: str) -> None:
        """One turn: print the reply as it comes, and remember it. Ctrl-C ends the reply and keeps what was said."""
        self.messages.append({"role": "user", "content": text})
        if self.compare and self.session.has_adapter:
            self._stream("base", base=True)
        reply = self._stream("tuned" if self.compare else None, base=False)
        self.messages.append({"role": "assistant", "content": reply})

    def _stream(self, name: str | None, *, base: bool) -> str:
        if name is not None:
            self.console.print(Text(f"{name:<6} ", style="bold cyan" if name == "tuned" else "dim"), end="")
        pieces: list[str] = []
        try:
            for piece in self.session.reply(list(self.messages), base=base, **self.options):
                pieces.append(piece)
                self.console.print(Text(piece), end="", soft_wrap=True)
                self.console.file.flush()
        except KeyboardInterrupt:
            self.console.print(Text(" [stopped]", style="dim"), end="")
        self.console.print()
        return "".join(pieces)

    def _say(self, text: str) -> None:
        # Remarks are no replies: on standard output they would mix with them.
        err().print(Text(text, style="dim"), soft_wrap=True)


def chat_command(
    model: Annotated[
        str, typer.Argument(metavar="RUN", help="A run folder, a PEFT adapter's folder, or a base's name or folder.")
    ],
    base: Annotated[bool, typer.Option("--base", help="Let the base reply too, beside the tuned model.")] = False,
    system: Annotated[
        str | None,
        typer.Option(
            "--system", metavar="TEXT", help="Begin with this system turn; '' for none [default: the training's]."
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, max=10.0, help="0 takes the likeliest token; higher is freer.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Repeat the same draws at temperature > 0.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest reply.")] = 512,
    ask: Annotated[
        list[str] | None,
        typer.Option("--ask", metavar="TEXT", help="Answer this, apart from any conversation, and exit; repeatable."),
    ] = None,
) -> None:
    """Talk with a tuned model. Without a terminal, each line of standard input is one turn."""
    quiet_libraries()
    with importing():
        from luthier.worker.chat import open_chat
        from luthier.worker.system_turn import trained_system

    session = open_chat(model)
    if system is None and (system := trained_system(model)):
        err().print(Text(f"system, as in training: {system}", style="dim"), soft_wrap=True)
    options = {"temperature": temperature, "seed": seed, "max_new_tokens": max_new_tokens}
    conversation = Conversation(session, out(), options, system=system, compare=base and session.has_adapter)
    if base and not session.has_adapter:
        raise RunError(f"{model} is a base, so --base has nothing to stand beside", "a run or an adapter")
    if ask:
        _answer_each(conversation, ask)
    elif sys.stdin.isatty():
        err().print(Text(HELP, style="dim"))
        conversation.run(_prompt)
    else:
        conversation.run(_piped_line)


def _answer_each(conversation: Conversation, requests: list[str]) -> None:
    for request in requests:
        conversation.reset()
        conversation.console.print(Text(f"{'you':<6} " if conversation.compare else "> ", style="bold") + Text(request))
        conversation.ask(request)
        conversation.console.print()


def _prompt() -> str:
    try:
        return input("> ")
    except KeyboardInterrupt:
        # Ctrl-C at the prompt leaves, as Ctrl-D does.
        raise EOFError from None


def _piped_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
