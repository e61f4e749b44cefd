"""``python -m perfedrec``."""

from perfedrec.cli import app

app(prog_name="perfedrec")
