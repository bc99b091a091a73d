"""What each command of the command line does; `datafree.cli` imports them when they run."""
