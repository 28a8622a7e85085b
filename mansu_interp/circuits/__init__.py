"""Edge scores -> a circuit -> how the attribution graphs of two models differ."""
