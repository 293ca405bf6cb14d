"""How far one seed may lie from the prediction, at finite width."""
