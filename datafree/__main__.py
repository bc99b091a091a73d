"""`python -m datafree` is the `datafree` command."""

from datafree.cli import main

main(prog_name="datafree")
