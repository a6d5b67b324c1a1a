"""Do influences predict what retraining does? `loopsway evaluate` measures it: retrain, and compare."""
