"""Makes and changes indices: building, adding, deleting, compacting, exporting, verifying."""
