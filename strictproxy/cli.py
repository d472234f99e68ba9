"""The `strictproxy` command: everything but running the proxy, which is twistd's."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import click
from rich.console import Console

from strictproxy import top as look
from strictproxy.config import Config, InvalidConfig, load
from strictproxy.config.changes import changes
from strictproxy.errors import ConfigError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(version("strictproxy"), prog_name="strictproxy")
def main() -> None:
    """
    Tools for strictproxy.

    The proxy itself runs as: twistd -n strictproxy --config FILE
    """


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Another file, as the one in force: print what a change from it would mean.",
)
def check(file: Path, against: Path | None) -> None:
    """
    Validate a configuration FILE.

    Prints every mistake as FILE:LINE:COLUMN: KEY: MESSAGE and exits 1; exits 0
    if there is none.
    """
    config = _load(file)
    click.echo(f"{file}: ok: {_summary(config)}")
    if against is not None:
        lines = changes(_load(against), config)
        for line in lines:
            click.echo(line)
        click.echo(f"{len(lines)} {'change' if len(lines) == 1 else 'changes'}")


@main.command()
@click.option(
    "--url", default="http://127.0.0.1:9901", show_default=True, help="Of the admin port."
)
@click.option(
    "--token-file", type=click.Path(path_type=Path), help="With the token, where one is needed."
)
@click.option("--once", is_flag=True, help="Print one picture, and exit.")
def top(url: str, token_file: Path | None, once: bool) -> None:
    """
    Watch a running proxy: pods, slots and the line.

    Ends with Ctrl-C.
    """
    try:
        look.run(url, token_file, Console(), once=once)
    except KeyboardInterrupt:
        pass
    except look.CannotLook as error:
        click.echo(str(error), err=True)
        sys.exit(1)


def _load(file: Path) -> Config:
    """Read a configuration, or print its mistakes and exit."""
    try:
        return load(file)
    except InvalidConfig as error:
        for problem in error.problems:
            click.echo(str(problem), err=True)
        count = len(error.problems)
        click.echo(f"{count} {'mistake' if count == 1 else 'mistakes'}", err=True)
        sys.exit(1)
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(1)


def _summary(config: Config) -> str:
    counts = {
        "listener": len(config.listen),
        "upstream": len(config.upstreams),
        "route": len(config.routes),
    }
    return ", ".join(f"{n} {name}{'' if n == 1 else 's'}" for name, n in counts.items())


if __name__ == "__main__":
    main()
