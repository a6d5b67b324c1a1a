"""What each use of a parameter gives each example: the body, its steps, and the forms of a per-example gradient."""
