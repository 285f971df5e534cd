"""Processes, signals, devices, the console: what a run stands on."""
