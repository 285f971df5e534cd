"""Processes, signals, devices, the console: what a run is built on."""
