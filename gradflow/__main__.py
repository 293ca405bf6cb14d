"""`python -m gradflow` runs the command line."""

from __future__ import annotations

from gradflow.cli.app import main

main()
