"""Local HTTP: what an app, a person and an operator ask of a process on their own machine."""
