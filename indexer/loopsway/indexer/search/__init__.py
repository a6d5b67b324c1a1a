"""From sketches of a query to the examples that shaped its answer."""
