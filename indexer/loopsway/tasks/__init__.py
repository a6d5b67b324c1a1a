"""The tasks that ship with Loopsway; each is also an example of how to write one."""
