"""The paper's experiments, each one command: `loopsway reproduce NAME`. They run on the CPU in minutes."""
