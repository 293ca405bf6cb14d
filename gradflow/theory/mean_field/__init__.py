"""Second moments of the stream and of its gradient in the limit of infinite width."""
