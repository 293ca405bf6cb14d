"""What can be asked for: stacks, models, options and grids, validated before torch is imported."""
