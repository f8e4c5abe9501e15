"""Measurements, each runnable alone; each prints its command, versions and machine."""
