"""The walk engine: forward unit by unit, one VJP per unit, in as much memory as there is."""
