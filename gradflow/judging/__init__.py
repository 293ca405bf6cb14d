"""From records to answers: verdicts, comparisons, gates, and what theory says. Torch-free."""
