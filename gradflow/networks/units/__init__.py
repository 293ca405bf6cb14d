"""One file per kind of unit: the modules that compute one step of the stream."""
