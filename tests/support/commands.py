"""Commands that are run without the console script."""

import typer
from typer.testing import CliRunner

from secure_cnn.cli.bench_overhead import overhead_command


def overhead(*words):
    """Runs `bench overhead`, which must succeed, on a wide terminal; what it printed."""
    app = typer.Typer()
    app.command()(overhead_command)
    done = CliRunner().invoke(app, [*words], env={"COLUMNS": "200"}, catch_exceptions=False)
    assert done.exit_code == 0
    return done
