"""`python -m gradflow`."""

from __future__ import annotations

from gradflow.cli.app import main

main()
