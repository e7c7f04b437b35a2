"""The command line: `lorakit VERB`, one file per verb.

Nothing here or in the verbs' files imports torch at the top, so that `lorakit --help` and a mistyped verb
answer at once; each verb imports what it needs when it runs. A `LorakitError` is the user's to mend: its
message is printed on stderr and the exit code is 2; so is what the operating system refuses. Any other exception
is one line with exit code 1, and its traceback is in a file. `--debug` or LORAKIT_DEBUG=1 shows tracebacks.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import traceback
from collections import Counter
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from lorakit.cli import bench_serve as bench_serve_verb
from lorakit.cli import chat as chat_verb
from lorakit.cli import combine as combine_verb
from lorakit.cli import convert as convert_verb
from lorakit.cli import diff as diff_verb
from lorakit.cli import evaluate as eval_verb
from lorakit.cli import extract as extract_verb
from lorakit.cli import generate as generate_verb
from lorakit.cli import init as init_verb
from lorakit.cli import inspect as inspect_verb
from lorakit.cli import keys as keys_verb
from lorakit.cli import merge as merge_verb
from lorakit.cli import methods as methods_verb
from lorakit.cli import plan as plan_verb
from lorakit.cli import predict as predict_verb
from lorakit.cli import prune as prune_verb
from lorakit.cli import push as push_verb
from lorakit.cli import resize as resize_verb
from lorakit.cli import route as route_verb
from lorakit.cli import scale as scale_verb
from lorakit.cli import serve as serve_verb
from lorakit.cli import train as train_verb
from lorakit.cli import verify as verify_verb
from lorakit.cli.arguments import NotFetchedError
from lorakit.cli.screen import fail


class Verbs(TyperGroup):
    """A group of commands in which a LorakitError is a message and `--debug` may stand anywhere."""

    debug = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Takes `--debug` out of the arguments, wherever it is."""
        self.debug = "--debug" in args
        rest: list[str] = super().parse_args(ctx, [arg for arg in args if arg != "--debug"])
        return rest

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb."""
        from lorakit.errors import COMMAND_LINE, LorakitError

        before = COMMAND_LINE.set(True)
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(error, typer.Exit | typer.Abort) or hasattr(error, "exit_code"):
                raise  # the command line's own: an exit, or a usage error, which shows itself
            if self.debug or os.environ.get("LORAKIT_DEBUG", "") not in ("", "0"):
                raise
            if isinstance(error, LorakitError | NotFetchedError):
                fail(str(error))
                raise typer.Exit(getattr(error, "status", 2)) from None
            fail(_unexpected(ctx.invoked_subcommand or "lorakit", error))
            raise typer.Exit(2 if isinstance(error, OSError) else 1) from None
        finally:
            COMMAND_LINE.reset(before)


class Verb(TyperCommand):
    """A command that takes negative numbers as arguments, and no option twice unless it may be repeated."""

    def make_parser(self, ctx: Any) -> Any:
        """The parser, to which -1 is a number and no option."""
        parser: Any = super().make_parser(ctx)
        options = parser._process_opts

        def process(word: str, state: Any) -> None:
            if re.fullmatch(r"-\.?\d\S*|-(inf|nan)", word):
                state.largs.append(word)
            else:
                options(word, state)

        parser._process_opts = process
        return parser

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuses an option that is given twice: one of the two would be ignored."""
        from lorakit.errors import LorakitError

        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for option, count in Counter(order).items():
            if count > 1 and option.param_type_name == "option" and not option.multiple:
                raise LorakitError(f"{self.name}: {option.opts[0]} is given {count} times; keep one.")
        rest: list[str] = super().parse_args(ctx, args)
        return rest


def _unexpected(verb: str, error: Exception) -> str:
    """What to print for an error that lorakit has no words for: what failed and why in a line, and where the traceback is."""
    why = (str(error).strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, OSError) and error.filename is not None:
        return f"{verb}: {error.filename}: {error.strerror}. --debug shows the traceback."
    kept = "--debug shows the traceback"
    try:
        with tempfile.NamedTemporaryFile("w", prefix=f"lorakit-{verb}-", suffix=".log", delete=False) as file:
            traceback.print_exception(error, file=file)
        kept = f"the traceback is in {file.name}; --debug shows it"
    except OSError:
        pass  # nowhere to write: --debug is what is left
    library = type(error).__module__.partition(".")[0]
    origin = "" if library in ("builtins", "lorakit") else f"{library}'s "
    return f"{verb}: {origin}{type(error).__name__}: {why} ({kept})"


app = typer.Typer(
    name="lorakit",
    cls=Verbs,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Low-rank adaptation: train an adapter, look at it, talk to it, merge it. `--debug` shows tracebacks.",
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("lorakit"))
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Low-rank adaptation: train an adapter, look at it, talk to it, merge it. `--debug` shows tracebacks."""


app.command(name="train", cls=Verb, help=train_verb.HELP, context_settings=train_verb.CONTEXT, add_help_option=False)(
    train_verb.train
)
app.command(name="init", cls=Verb, help=init_verb.HELP)(init_verb.init)
app.command(name="eval", cls=Verb, help=eval_verb.HELP, context_settings=eval_verb.CONTEXT)(eval_verb.evaluate)
app.command(name="predict", cls=Verb, help=predict_verb.HELP)(predict_verb.predict)
app.command(name="generate", cls=Verb, help=generate_verb.HELP)(generate_verb.generate)
app.command(name="chat", cls=Verb, help=chat_verb.HELP)(chat_verb.chat)
app.command(name="merge", cls=Verb, help=merge_verb.HELP)(merge_verb.merge)
app.command(name="inspect", cls=Verb, help=inspect_verb.HELP)(inspect_verb.inspect)
app.command(name="methods", cls=Verb, help=methods_verb.HELP)(methods_verb.methods)
app.command(name="plan", cls=Verb, help=plan_verb.HELP)(plan_verb.plan)
app.command(name="convert", cls=Verb, help=convert_verb.HELP)(convert_verb.convert)
app.command(name="resize", cls=Verb, help=resize_verb.HELP)(resize_verb.resize)
app.command(name="route", cls=Verb, help=route_verb.HELP)(route_verb.route)
app.command(name="verify", cls=Verb, help=verify_verb.HELP)(verify_verb.verify)
app.command(name="scale", cls=Verb, help=scale_verb.HELP)(scale_verb.scale)
app.command(name="prune", cls=Verb, help=prune_verb.HELP)(prune_verb.prune)
app.command(name="extract", cls=Verb, help=extract_verb.HELP)(extract_verb.extract)
app.command(name="diff", cls=Verb, help=diff_verb.HELP)(diff_verb.diff)
app.command(name="combine", cls=Verb, help=combine_verb.HELP)(combine_verb.combine)
app.command(name="push", cls=Verb, help=push_verb.HELP)(push_verb.push)
app.command(name="serve", cls=Verb, help=serve_verb.HELP)(serve_verb.serve)
app.command(name="keys", cls=Verb, help=keys_verb.HELP)(keys_verb.keys)
app.command(name="bench-serve", cls=Verb, help=bench_serve_verb.HELP)(bench_serve_verb.bench_serve)


def main() -> None:
    """The entry point of the `lorakit` command."""
    try:
        app(prog_name="lorakit")
    except KeyboardInterrupt:
        fail("interrupted")
        sys.exit(130)
