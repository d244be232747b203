"""`python -m orchestrator.cli`: the command where no script is installed."""

from orchestrator.cli import main

main()
