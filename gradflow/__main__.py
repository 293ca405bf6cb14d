"""`python -m gradflow`."""

from __future__ import annotations

from gradflow.cli import main

main()
